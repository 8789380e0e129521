"""Batches of packed images: shuffling, loading, and preprocessing on the device.

Random choices are drawn from (seed, epoch, step), never from a state that a resumed run would have
to restore.
"""

import shutil
import sys
from collections.abc import Sequence
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
        if isinstance(self.images, Tensor):
            index = torch.as_tensor(np.asarray(indices), device=self.images.device)
            return self.images[index], self.labels[index]
        order = np.asarray(indices)
        return torch.from_numpy(self.images[order]), self.labels[order]


def _free_memory(device: torch.device) -> int:
    """Free memory of a GPU in bytes."""
    return torch.cuda.mem_get_info(device)[0]


def usable_workers(wanted: int, batch_bytes: int) -> int:
    """Number of DataLoader workers whose batches fit into shared memory, at most `wanted`.

    Workers pass batches through /dev/shm, which is 64 MB by default in a container. A worker fails
    if it is full. Prints a line to stderr when fewer workers are used.

    Args:
        wanted: number of workers if there is enough memory.
        batch_bytes: size of one batch.
    """
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


def make_loader(images: Any, batches: list[np.ndarray], device: torch.device) -> DataLoader[Batch]:
    """DataLoader over the given batches of indices, in order."""
    on_host = device.type == "cuda" and not images.on_device
    largest = max((len(batch) for batch in batches), default=0)
    workers = usable_workers(2, largest * images.images[0].nbytes) if on_host else 0
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_no_collate,
        num_workers=workers,
        pin_memory=on_host,
        multiprocessing_context="fork" if workers else None,  # others would pickle the array
    )


def _no_collate(batch: Any) -> Any:
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
        raise HovitError(f"{world} processes do not divide a batch of {batch_size} evenly")
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


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop of 60 to 100 % of each side and random flip, independent per image.

    [B, 3, H, W] -> [B, 3, H, W], by one grid sample.
    """
    draw = torch.rand(4, x.shape[0], generator=generator).to(x.device)
    side = 0.6 + 0.4 * draw[0]
    flip = torch.where(draw[1] < 0.5, -1.0, 1.0)
    shift = (1 - side) * (2 * draw[2:] - 1)  # [2, B]
    zero = torch.zeros_like(side)
    theta = torch.stack(
        [torch.stack([side * flip, zero, shift[0]], 1), torch.stack([zero, side, shift[1]], 1)],
        dim=1,
    )  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def augment(x: Tensor, how: str, seed: Sequence[int]) -> Tensor:
    """Apply the augmentation of a recipe; `seed` is (run seed, epoch, step, rank)."""
    if how == "none":
        return x
    generator = torch.Generator().manual_seed(step_seed(seed))
    return crop_flip(x, generator)


def step_seed(parts: Sequence[int]) -> int:
    """Hash several numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)
