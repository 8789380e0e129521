"""Training images after augmentation by timm: RandAugment, random erasing, mixup and CutMix.

Crop, flip and RandAugment work on single images, in worker processes if a GPU trains. Random
erasing, mixup and CutMix work on the normalised batch, on the device. Random numbers for an image
are seeded with (seed, epoch, position in the epoch), and those for a batch with (seed, epoch, step,
rank). They are the same in a resumed run, and for any number of workers.

RandAugment: Cubuk et al., arXiv 1909.13719. Random erasing: Zhong et al., arXiv 1708.04896. Mixup:
Zhang et al., arXiv 1710.09412. CutMix: Yun et al., arXiv 1905.04899.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, Mixup
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from ..config.schema import Recipe
from ..utils.errors import HovitError
from ..utils.machine import usable_cpus
from .loader import Batch, no_collate, step_seed, usable_workers

MOST_WORKERS = 16
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # ranges of the area and aspect ratio of a random crop
CONTENT_SEED, BATCH_SEED = 1, 2  # separate the random numbers of images and of batches


class ImageSource(Protocol):
    """Labelled images, opened one at a time."""

    labels: Any  # int64 [N], an array or a tensor

    def open(self, index: int) -> Image.Image:
        """Open an image without decoding it.

        Raises:
            HovitError: naming a file that cannot be read.
        """

    def decode(self, image: Image.Image, index: int, shrink: int) -> Tensor:
        """Decode an open image to RGB, uint8 [3, H, W].

        Args:
            image: result of `open`.
            index: index of the image.
            shrink: the sides may be smaller by up to this factor if decoding is then faster.

        Raises:
            HovitError: naming a file that cannot be decoded.
        """


class PackedSource:
    """Images of a pack as an `ImageSource`.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def decode(self, image: Image.Image, index: int, shrink: int) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class AugmentedImages(Dataset[Batch]):
    """Training images, cropped and flipped, with RandAugment if the recipe has it.

    Args:
        source: the images.
        how: `augment` of the recipe; `none` and `crop_flip` both crop and flip.
        size: pixels per side of the result.
        seed: (run seed, epoch).
    """

    def __init__(self, source: ImageSource, how: str, size: int, seed: tuple[int, int]) -> None:
        self.source, self.size, self.seed = source, size, seed
        self.rand_augment = _rand_augment(size) if how == "randaugment" else None

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitems__(self, draws: np.ndarray) -> Batch | HovitError:
        """A batch of (index, position in the epoch) as uint8 [B, size, size, 3] and labels [B].

        An error is returned, not raised, because a worker would turn it into a traceback.
        """
        try:
            images = [self._augmented(int(index), int(position)) for index, position in draws]
        except HovitError as error:
            return error
        labels = torch.as_tensor(self.source.labels[draws[:, 0]])
        return torch.from_numpy(np.stack(images)), labels

    def _augmented(self, index: int, position: int) -> np.ndarray:
        seed_generators((*self.seed, position, CONTENT_SEED))
        pixels = random_crop(self.source, index, self.size)
        if random.random() < 0.5:
            pixels = pixels.flip(2)
        image = pixels.permute(1, 2, 0).contiguous().numpy()
        if self.rand_augment:
            image = np.asarray(self.rand_augment(Image.fromarray(image)))
        return image


def random_crop(source: ImageSource, index: int, size: int) -> Tensor:
    """Random crop of 8 to 100 % of the area, resized (bicubic) to uint8 [3, size, size]."""
    image = source.open(index)
    top, left, high, wide = RandomResizedCropAndInterpolation.get_params(image, SCALE, RATIO)
    width, height = image.size
    pixels = source.decode(image, index, shrink=min(wide, high) // size)
    x, y = pixels.shape[2] / width, pixels.shape[1] / height  # 1 unless decoded smaller
    box = [round(each) for each in (top * y, left * x, high * y, wide * x)]
    return resized_crop(pixels, *box, [size, size], InterpolationMode.BICUBIC)


@cache
def _rand_augment(size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment, set up as `timm.data.create_transform` does."""
    fill = tuple(min(255, round(255 * x)) for x in IMAGENET_DEFAULT_MEAN)
    settings = {
        "translate_const": int(size * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(RAND_AUGMENT, settings)
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm's posterize. At magnitude 10 it keeps 0 bits, which newer Pillow refuses: black."""
    return posterize(image, bits, **kwargs) if bits else image.point(lambda _: 0)


def with_positions(
    batches: Sequence[np.ndarray], first: int, batch_size: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Pair each image index of this process with its position in the epoch.

    Args:
        batches: indices of each batch of this process.
        first: step of the first batch.
        batch_size: images per batch over all processes.
        rank, world: index of this process and number of processes.

    Returns:
        for each batch int64 [B, 2]: index and position.
    """
    return [
        np.stack([batch, (first + i) * batch_size + rank + world * np.arange(len(batch))], 1)
        for i, batch in enumerate(batches)
    ]


def load_images(
    images: Dataset[Batch],
    batches: Sequence[np.ndarray],
    size: int,
    device: torch.device,
    workers: int | None = None,
    world: int = 1,
) -> Iterator[Batch]:
    """Yield the given batches of images, in order.

    Args:
        images: images of `size` pixels per side.
        batches: for each batch, the argument of `images.__getitems__`.
        size: pixels per side, from which the memory of workers is computed.
        device: device of the model.
        workers: worker processes; default: none on a CPU, otherwise `loader_workers(world)`.
        world: number of training processes on this machine.

    Raises:
        HovitError: for an image that cannot be read.
    """
    on_gpu = device.type == "cuda"
    if workers is None:
        workers = loader_workers(world) if on_gpu else 0
    largest = max((len(batch) for batch in batches), default=0)
    workers = usable_workers(workers, largest * size * size * 3) if workers else 0
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=no_collate,
        num_workers=workers,
        pin_memory=on_gpu,
        multiprocessing_context="fork" if workers else None,  # others would pickle the images
    )
    for batch in loader:
        if isinstance(batch, HovitError):
            raise batch
        yield batch


def loader_workers(world: int) -> int:
    """Number of loader workers for each of `world` training processes that share the cores."""
    return max(1, min(MOST_WORKERS, usable_cpus() // world - 1))


def changes_batch(recipe: Recipe) -> bool:
    """Whether `mix_batch` does anything for a recipe."""
    return bool(recipe.random_erasing or recipe.mixup or recipe.cutmix)


def mix_batch(
    x: Tensor, labels: Tensor, recipe: Recipe, num_classes: int, seed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Erase random rectangles, then mix pairs of images, as the recipe states.

    Args:
        x: normalised images [B, 3, H, W]; changed in place.
        labels: int64 [B].
        recipe: its `random_erasing`, `mixup`, `cutmix` and `label_smoothing`.
        num_classes: number of classes.
        seed: (run seed, epoch, step, rank).

    Returns:
        The images, and labels: int64 [B], or label-smoothed probabilities [B, classes] if the
        recipe mixes images.

    Raises:
        HovitError: if images are mixed and a process has an odd number of them.
    """
    if not changes_batch(recipe):
        return x, labels
    seed_generators((*seed, BATCH_SEED))
    if recipe.random_erasing:
        x = RandomErasing(recipe.random_erasing, mode="pixel", device=x.device)(x)
    if not (recipe.mixup or recipe.cutmix):
        return x, labels
    if len(x) % 2:
        raise HovitError(f"mixup pairs images: {len(x)} images for a process is an odd number")
    mix = Mixup(
        recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes
    )
    mixed: tuple[Tensor, Tensor] = mix(x, labels)
    return mixed


def seed_generators(parts: Sequence[int]) -> None:
    """Seed the global generators of Python and NumPy, which timm uses."""
    seed = step_seed(parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from it
