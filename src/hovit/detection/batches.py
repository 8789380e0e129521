"""Batches of whole images with their boxes, decoded as they are needed."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..utils.errors import HovitError
from .coco import Picture, read_image

Sample = tuple[Tensor, dict[str, Tensor]]  # uint8 [3, H, W]; boxes [n, 4] and labels [n]


class Samples(Dataset[Sample]):
    """Images and their boxes, mirrored by a draw from (seed, epoch, index).

    Args:
        pictures: the images.
        flip: how often one is mirrored.
        seed: (run seed, epoch).
    """

    def __init__(
        self, pictures: Sequence[Picture], flip: float = 0.0, seed: tuple[int, int] = (0, 0)
    ) -> None:
        self.pictures, self.flip, self.seed = pictures, flip, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[index]
        image = torch.from_numpy(read_image(picture)).permute(2, 0, 1)
        boxes = torch.from_numpy(picture.boxes)
        if self.flip and np.random.default_rng([*self.seed, index]).random() < self.flip:
            image, boxes = mirror(image, boxes)
        return image.contiguous(), {"boxes": boxes, "labels": torch.from_numpy(picture.labels)}

    def __getitems__(self, indices: Sequence[int]) -> list[Sample] | HovitError:
        """A batch; or the error, as a worker would raise it with its traceback for a message."""
        try:
            return [self[index] for index in indices]
        except HovitError as error:
            return error


def mirror(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Left for right: [3, H, W] and [n, 4], left top right bottom."""
    left, top, right, bottom = boxes.unbind(1)
    width = image.shape[2]
    return image.flip(2), torch.stack([width - right, top, width - left, bottom], 1)


def load(
    samples: Samples, batches: list[np.ndarray], device: torch.device, workers: int | None = None
) -> Iterator[list[Sample]]:
    """These batches of indices, in this order.

    Args:
        workers: processes that decode; unless told some for a card, and none for a CPU.

    Raises:
        HovitError: for an image that cannot be read.
    """
    if workers is None:
        workers = min(8, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, HovitError):
            raise batch
        yield batch


def _as_is(batch: Any) -> Any:
    return batch


def to_input(image: Tensor, device: torch.device) -> Tensor:
    """uint8 [3, H, W] -> float in 0..1 on the device; the model itself normalises and resizes."""
    return image.to(device, non_blocking=True).float() / 255
