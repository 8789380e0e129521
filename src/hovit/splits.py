"""How many images each split gets."""

from .catalogue import Split


def split_sizes(total: int, split: Split, has_test: bool = False) -> tuple[int, int, int]:
    """Images for (train, val, test): shares rounded down, the rest to the last split.

    The last split is test, or validation where the source has a test set of its own. 7,349 images
    at 0.7 : 0.15 : 0.15 give 5,144 / 1,102 / 1,103 (the deck prints 5,114 for the first).
    """
    train = int(total * split.train + 1e-9)
    if has_test:
        return train, total - train, 0
    val = int(total * split.val + 1e-9)
    return train, val, total - train - val
