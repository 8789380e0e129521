"""Batches of images with their boxes, decoded on demand."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.loader import no_collate, usable_workers
from ..utils.errors import HovitError
from ..utils.machine import usable_cpus
from .coco import CocoImage, read_image

Sample = tuple[Tensor, dict[str, Tensor]]  # uint8 [3, H, W]; boxes [n, 4] and labels [n]


class DetectionDataset(Dataset[Sample]):
    """Images and their boxes, mirrored at random by (seed, epoch, index).

    Args:
        images: the images.
        flip: probability that an image is mirrored.
        seed: (run seed, epoch).
    """

    def __init__(
        self, images: Sequence[CocoImage], flip: float = 0.0, seed: tuple[int, int] = (0, 0)
    ) -> None:
        self.images, self.flip, self.seed = images, flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        listed = self.images[index]
        image = torch.from_numpy(read_image(listed)).permute(2, 0, 1)
        boxes = torch.from_numpy(listed.boxes)
        if self.flip and np.random.default_rng([*self.seed, index]).random() < self.flip:
            image, boxes = mirror(image, boxes)
        return image.contiguous(), {"boxes": boxes, "labels": torch.from_numpy(listed.labels)}

    def __getitems__(self, indices: Sequence[int]) -> list[Sample] | HovitError:
        """A batch, or the error itself: raised in a worker, its message would be a traceback."""
        try:
            return [self[index] for index in indices]
        except HovitError as error:
            return error


def mirror(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Flip an image [3, H, W] and its boxes [n, 4] (left top right bottom) horizontally."""
    left, top, right, bottom = boxes.unbind(1)
    width = image.shape[2]
    return image.flip(2), torch.stack([width - right, top, width - left, bottom], 1)


def make_loader(
    images: DetectionDataset,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int | None = None,
) -> Iterator[list[Sample]]:
    """Yield the given batches of indices, in order.

    Args:
        images: the images.
        batches: indices of each batch.
        device: device of the model.
        workers: processes that decode; default: up to 8 for a GPU, none for a CPU.

    Raises:
        HovitError: for an image that cannot be read.
    """
    if workers is None:
        largest = max((len(batch) for batch in batches), default=0)
        pixels = max((image.width * image.height for image in images.images), default=0)
        wanted = min(8, usable_cpus() - 1) if device.type == "cuda" else 0
        workers = usable_workers(wanted, largest * pixels * 3) if wanted else 0
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=no_collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, HovitError):
            raise batch
        yield batch


def to_input(image: Tensor, device: torch.device) -> Tensor:
    """uint8 [3, H, W] -> float in 0..1 on the device; the model normalises and resizes."""
    return image.to(device, non_blocking=True).float() / 255
