"""Batches of packed images: shuffling, loading, and preprocessing on the device.

Random choices are drawn from (seed, epoch, step), never from a state that a resumed run would have
to restore.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..utils.errors import HovitError
from .pack import Packed

PREFETCH = 2  # batches in flight per worker, the default of DataLoader
Batch = tuple[Tensor, Tensor]  # uint8 [B, H, W, 3], int64 [B]


class PackedImages(Dataset[Batch]):
    """Images of a pack, read a batch at a time. Kept on a GPU if they fit into 1/4 of its memory.

    Args:
        packed: an open pack.
        device: device of the model.
    """

    def __init__(self, packed: Packed, device: torch.device) -> None:
        fits = device.type == "cuda" and packed.images.nbytes < _free_memory(device) // 4
        self.on_device = fits
        self.images = (
            torch.from_numpy(np.array(packed.images)).to(device) if fits else packed.images
        )
        self.labels = torch.tensor(packed.labels).to(device if fits else "cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        order = np.asarray(indices)
        return torch.as_tensor(self.images[order]), self.labels[order]


def _free_memory(device: torch.device) -> int:
    """Free memory of a GPU in bytes."""
    return torch.cuda.mem_get_info(device)[0]


def usable_workers(wanted: int, batch_bytes: int) -> int:
    """Number of DataLoader workers whose batches fit into shared memory, at most `wanted`.

    Workers pass batches through /dev/shm, which is 64 MB by default in a container. A worker fails
    if it is full. Prints a line to stderr when fewer workers are used.

    Args:
        wanted: number of workers if there is enough memory.
        batch_bytes: size of one batch; 0 if there is no batch, which needs no worker.
    """
    if not batch_bytes:
        return 0
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux
        return wanted
    in_flight = PREFETCH * batch_bytes  # per worker; the loop holds one more
    workers = max(0, min(wanted, (free - batch_bytes) // in_flight))
    if workers < wanted:
        how = f"with {workers} of {wanted} workers" if workers else "without workers"
        print(
            f"/dev/shm has {free / 1e6:.0f} MB free: images are loaded {how} "
            f"({(wanted * PREFETCH + 1) * batch_bytes / 1e6:.0f} MB wanted; in a container, set "
            "--shm-size)",
            file=sys.stderr,
        )
    return workers


def make_loader(images: Any, batches: list[np.ndarray], device: torch.device) -> Iterable[Batch]:
    """Batches of the given indices, in order.

    Images that are already on the device of the model are gathered there; only a GPU that cannot
    hold them gets worker processes.

    Args:
        images: `PackedImages` or `FrontFeatures`.
        batches: indices of each batch.
        device: device of the model.
    """
    if images.on_device:
        return gather_batches(images.images, images.labels, batches)
    if device.type == "cpu":
        return (images.__getitems__(batch) for batch in batches)
    largest = max((len(batch) for batch in batches), default=0)
    workers = usable_workers(2, largest * images.images[0].nbytes)
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=no_collate,
        num_workers=workers,
        pin_memory=True,
        multiprocessing_context="fork" if workers else None,  # others would pickle the array
    )


def gather_batches(images: Tensor, labels: Tensor, batches: list[np.ndarray]) -> Iterator[Batch]:
    """Yield batches of a tensor, which never waits for the device: one copy holds all indices."""
    if not batches:
        return
    order = torch.from_numpy(np.concatenate(batches)).to(images.device)
    for index in order.split([len(batch) for batch in batches]):
        yield images.index_select(0, index), labels.index_select(0, index)


def no_collate(batch: Any) -> Any:
    """`collate_fn` for datasets that return whole batches."""
    return batch


def epoch_batches(
    indices: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    repeats: int = 1,
) -> list[np.ndarray]:
    """Training batches of one epoch for this process. The last, incomplete batch is dropped.

    Args:
        indices: indices of the training images.
        batch_size: images per batch over all processes.
        seed, epoch: determine the order.
        rank, world: index of this process and number of processes; each takes every world-th image.
        repeats: copies of each image, side by side (repeated augmentation, arXiv 1902.05509). The
            epoch is as long as without copies, so it has 1 / `repeats` of the images.

    Raises:
        HovitError: if there are fewer images than one batch, or `world` does not divide it.
    """
    if len(indices) < batch_size:
        raise HovitError(f"{len(indices)} training images: fewer than one batch of {batch_size}")
    if batch_size % world:
        raise HovitError(f"a batch of {batch_size} is not divisible by {world} processes")
    order = np.random.default_rng([seed, epoch]).permutation(indices)
    order = np.repeat(order, repeats)[: len(order)]
    whole = len(order) // batch_size
    return [batch[rank::world] for batch in order[: whole * batch_size].reshape(whole, batch_size)]


def eval_batches(
    indices: np.ndarray, batch_size: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """All indices in order, padded by repetition so that all processes have equally many."""
    padded = np.resize(indices, -(-len(indices) // world) * world)[rank::world]
    return [padded[i : i + batch_size] for i in range(0, len(padded), batch_size)]


def to_input(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised float [B, 3, size, size], resized bilinearly.

    Resizing is several times faster on contiguous planes on a CPU, and convolutions are faster on
    channels_last, the format of the result.
    """
    x = images.permute(0, 3, 1, 2).contiguous().float()
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=x.shape[-1] > size)
    mean, std = _statistics(x.device)
    return x.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ImageNet for values 0..255, on the device."""
    with torch.inference_mode(False):
        values = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]).view(2, 1, 3, 1, 1)
        mean, std = (255 * values).to(device)
    return mean, std


def crop_flip(x: Tensor, numbers: Tensor) -> Tensor:
    """Random crop of 60 to 100 % of each side and random flip, independent per image.

    By one grid sample, on the device of the images, without waiting for it.

    Args:
        x: [B, 3, H, W].
        numbers: uniform in [0, 1), [4, B]: side, flip, and two of the place.

    Returns:
        [B, 3, H, W], channels_last.
    """
    side = 0.6 + 0.4 * numbers[0]
    flip = 1 - 2 * (numbers[1] < 0.5).float()  # -1 or 1, without a copy from the host
    shift = (1 - side) * (2 * numbers[2:] - 1)  # [2, B]
    zero = torch.zeros_like(side)
    theta = torch.stack(
        [torch.stack([side * flip, zero, shift[0]], 1), torch.stack([zero, side, shift[1]], 1)],
        dim=1,
    )  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)  # grid_sample loses it


def draw_crops(n: int, seed: Sequence[int], device: torch.device) -> Tensor:
    """Random numbers for `crop_flip`, float32 [4, n] on the device.

    The host draws them, so that they are the same on every device.

    Args:
        n: images of the batch.
        seed: (run seed, epoch, step, rank).
        device: device of the model.
    """
    numbers = torch.rand(4, n, generator=torch.Generator().manual_seed(step_seed(seed)))
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # else the copy waits for the device
    return numbers.to(device, non_blocking=True)


def augment(x: Tensor, how: str, seed: Sequence[int]) -> Tensor:
    """Apply the augmentation of a recipe; `seed` is (run seed, epoch, step, rank)."""
    return x if how == "none" else crop_flip(x, draw_crops(len(x), seed, x.device))


def step_seed(parts: Sequence[int]) -> int:
    """Hash several numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)
