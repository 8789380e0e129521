"""Batches: shuffled indices, images off the pack, and what happens to them on the device.

Every random choice is drawn from (seed, epoch, step), never from a state that a resumed run would
have to restore.
"""

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

Batch = tuple[Tensor, Tensor]  # uint8 [B, H, W, 3], int64 [B]


class PackedImages(Dataset[Batch]):
    """A pack's images, fetched a batch at a time; on the accelerator as a whole where they fit.

    Args:
        packed: the opened pack.
        device: where batches are wanted.
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
    return torch.cuda.mem_get_info(device)[0]


def make_loader(
    images: PackedImages, batches: list[np.ndarray], device: torch.device
) -> DataLoader[Batch]:
    """A DataLoader over these batches of indices, in this order."""
    on_host = device.type == "cuda" and not images.on_device
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_is,
        num_workers=2 if on_host else 0,
        pin_memory=on_host,
        multiprocessing_context="fork" if on_host else None,  # others would copy the whole map
    )


def _as_is(batch: Any) -> Any:
    return batch


def epoch_batches(
    indices: np.ndarray, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """The training batches of one epoch, whole ones only, as this process sees them.

    Args:
        indices: of the training images.
        batch_size: over all processes.
        seed, epoch: decide the order.
        rank, world: this process and how many there are; each takes every world-th image.

    Raises:
        HovitError: if there is not one whole batch, or processes do not divide it.
    """
    if len(indices) < batch_size:
        raise HovitError(f"{len(indices)} training images: fewer than one batch of {batch_size}")
    if batch_size % world:
        raise HovitError(f"{world} processes do not divide a batch of {batch_size} evenly")
    order = np.random.default_rng([seed, epoch]).permutation(indices)
    whole = len(order) // batch_size
    return [batch[rank::world] for batch in order[: whole * batch_size].reshape(whole, batch_size)]


def eval_batches(
    indices: np.ndarray, batch_size: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """All of `indices` in order, padded by repetition so that every process has as many."""
    padded = np.resize(indices, -(-len(indices) // world) * world)[rank::world]
    return [padded[i : i + batch_size] for i in range(0, len(padded), batch_size)]


def to_input(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised float [B, 3, size, size], resized bilinearly.

    Plane by plane, as a CPU is several times quicker at that; but given as channels_last, on which
    a CPU's convolutions are.
    """
    x = images.permute(0, 3, 1, 2).contiguous().float()
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=x.shape[-1] > size)
    mean, std = _statistics(x.device)
    return x.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@lru_cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation of 8-bit values, put on the device once."""
    with torch.inference_mode(False):
        values = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]).view(2, 1, 3, 1, 1)
        mean, std = (255 * values).to(device)
    return mean, std


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop of 60 to 100 % of each side and random mirror, an own draw for every image.

    [B, 3, H, W] -> [B, 3, H, W], by one grid sample.
    """
    draw = torch.rand(4, x.shape[0], generator=generator).to(x.device)
    scale = 0.6 + 0.4 * draw[0]
    mirror = torch.where(draw[1] < 0.5, -1.0, 1.0)
    shift = (1 - scale) * (2 * draw[2:] - 1)  # [2, B]
    zero = torch.zeros_like(scale)
    theta = torch.stack(
        [torch.stack([scale * mirror, zero, shift[0]], 1), torch.stack([zero, scale, shift[1]], 1)],
        dim=1,
    )  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def augment(x: Tensor, how: str, seed: Sequence[int]) -> Tensor:
    """Apply a recipe's augmentation; `seed` is (run seed, epoch, step, rank)."""
    if how == "none":
        return x
    generator = torch.Generator().manual_seed(step_seed(seed))
    return crop_flip(x, generator)


def step_seed(parts: Sequence[int]) -> int:
    """One 63-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)
