"""Splits into training, validation and test images."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..config.runs import Run
from ..config.schema import Split

if TYPE_CHECKING:
    from .image_files import ImageFiles
    from .pack import Packed


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """Order in which each part of a sequence has the classes in proportion.

    The i-th of n images of a class goes to the position (i + 1/2) / n of the whole, so a cut at any
    share cuts every class close to that share.

    Args:
        labels: int [N], or strings; images of a class keep their order.

    Returns:
        int [N], indices into `labels`.
    """
    groups = pd.Series(labels).groupby(labels)
    rank, size = groups.cumcount(), groups.transform("size")
    return np.argsort(((rank + 0.5) / size).to_numpy(), kind="stable")


def draw_splits(labels: np.ndarray, split: Split, seed: int) -> dict[str, np.ndarray]:
    """Draw the splits of a run from its random seed.

    Args:
        labels: int [N], of all images.
        split: shares, and whether they hold within each class.
        seed: random seed of the run.

    Returns:
        indices into `labels` for train, val and test, together all images.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    if split.stratify:
        order = order[stratified_order(labels[order])]
    train, val, _ = split.sizes(len(labels))
    parts = np.split(order, [train, train + val])
    return dict(zip(("train", "val", "test"), parts, strict=True))


def splits_of(run: Run, packed: "Packed | ImageFiles") -> dict[str, np.ndarray]:
    """Indices of the images of a run for train, val and test: those of the pack, or its own."""
    if run.dataset.split.per_run:
        return draw_splits(packed.labels, run.dataset.split, run.seed)
    return packed.splits
