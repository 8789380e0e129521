"""The COCO format: `instances_*.json` and the images it lists. Imports no torch.

Paper: `Microsoft COCO: Common Objects in Context` - https://arxiv.org/abs/1405.0312
"""

import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from ..data.decode import open_image, to_rgb
from ..utils.errors import HovitError, one_line
from ..utils.files import read_json

# (annotation, image): the two boxes of train2017 that have no height.
KNOWN_EMPTY_BOXES = {(918, 200365), (2206849, 550395)}
LARGEST = sys.float_info.max
MIN_SIDE = 1.0  # pixels; training skips narrower boxes (our choice)


@dataclass(frozen=True)
class CocoImage:
    """An image with its boxes.

    Args:
        id: id in the annotations.
        path: file.
        width, height: pixels.
        boxes: float32 [n, 4], left top right bottom in pixels, without crowds.
        labels: int64 [n], positions in the sorted category ids.
        sha256: hash of the file, or empty.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    sha256: str = ""


@dataclass(frozen=True)
class Annotations:
    """Contents of one valid `instances_*.json`.

    Args:
        path: file.
        images: all images, sorted by id.
        categories: sorted category ids; a label is a position in this list.
        boxes: annotations without their outlines, crowds included.
    """

    path: Path
    images: list[CocoImage]
    categories: list[int]
    boxes: list[dict[str, Any]]


def read_annotations(path: Path, images: Path, num_classes: int) -> Annotations:
    """Read and check an `instances_*.json` without opening the images.

    Args:
        path: file.
        images: folder of the images.
        num_classes: expected number of categories.

    Raises:
        HovitError: naming the file and the image or annotation that is invalid: not listed, listed
            twice, a box without area or outside its image.
    """
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise HovitError(f"{path}: {key}: must be a list of objects, as in COCO's instances")
    if not content["images"]:
        raise HovitError(f"{path}: images: the list is empty")
    categories = sorted(_ids(path, "category", content["categories"]))
    if len(categories) != num_classes:
        raise HovitError(f"{path}: {len(categories)} categories, but num_classes is {num_classes}")
    sizes = dict(
        zip(_ids(path, "image", content["images"]),
            (_size(path, image) for image in content["images"]), strict=True)
    )  # fmt: skip
    names = {image["id"]: image["file_name"] for image in content["images"]}
    _ids(path, "annotation", content["annotations"])
    boxes = [_box(path, each, sizes, set(categories)) for each in content["annotations"]]
    listed = _images_with_boxes(boxes, sizes, names, categories, images)
    return Annotations(path, listed, categories, boxes)


def _ids(path: Path, what: str, entries: list[dict[str, Any]]) -> list[int]:
    """Ids of a list of objects, in its order."""
    seen: set[int] = set()
    for entry in entries:
        number = entry.get("id")
        if not is_id(number):
            raise HovitError(f"{path}: {what}: every id must be an integer of 64 bits")
        if number in seen:
            raise HovitError(f"{path}: {what} {number} is listed twice")
        seen.add(number)
    return [entry["id"] for entry in entries]


def _size(path: Path, image: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of a listed image."""
    where, name = f"{path}: image {image['id']}", image.get("file_name")
    parts = PurePosixPath(name).parts if isinstance(name, str) and name.isprintable() else ()
    if not parts or ".." in parts or parts[0] == "/":
        raise HovitError(f"{where}: file_name {name!r} is not inside the folder, or not printable")
    width, height = image.get("width"), image.get("height")
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        raise HovitError(f"{where}: width and height must be pixels, not {width!r}, {height!r}")
    return width, height


def _box(
    path: Path, entry: dict[str, Any], sizes: dict[int, tuple[int, int]], categories: set[int]
) -> dict[str, Any]:
    """The fields of an annotation that training and evaluation use."""
    where = f"{path}: annotation {entry['id']}"
    image, category, box = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
    if type(image) is not int or image not in sizes:
        raise HovitError(f"{where}: image {image!r} is not listed")
    if type(category) is not int or category not in categories:
        raise HovitError(f"{where}: category {category!r} is not listed")
    if not is_box(box):
        raise HovitError(f"{where}: bbox must be [left, top, width, height], not {repr(box)[:60]}")
    left, top, width, height = box
    if min(width, height) <= 0 and (entry["id"], image) not in KNOWN_EMPTY_BOXES:
        raise HovitError(f"{where}: its box {box} has no area")
    limits = sizes[image]
    if min(left, top) < -1 or left + width > limits[0] + 1 or top + height > limits[1] + 1:
        raise HovitError(
            f"{where}: its box {box} lies outside image {image} of {limits[0]} x {limits[1]} pixels"
        )
    area, crowd = entry.get("area", width * height), entry.get("iscrowd", 0)
    if not is_number(area) or type(crowd) is not int or crowd not in (0, 1):
        raise HovitError(f"{where}: area must be a number, and iscrowd 0 or 1")
    return {"id": entry["id"], "image_id": image, "category_id": category, "bbox": box,
            "area": area, "iscrowd": int(crowd)}  # fmt: skip


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value from JSON is an integer that fits into 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from JSON is a number that fits into a float: not NaN, not infinite."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= LARGEST


def is_box(value: object) -> TypeGuard[list[float]]:
    """Whether a value from JSON is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _images_with_boxes(
    boxes: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    names: dict[int, str],
    categories: list[int],
    folder: Path,
) -> list[CocoImage]:
    """All images with their boxes, clipped to the image, without crowds and narrow boxes."""
    label_of = {category: label for label, category in enumerate(categories)}
    found: dict[int, list[tuple[float, ...]]] = {image: [] for image in sizes}
    for box in boxes:
        left, top, width, height = box["bbox"]
        limits = sizes[box["image_id"]]
        left, right = max(left, 0.0), min(left + width, limits[0])
        top, bottom = max(top, 0.0), min(top + height, limits[1])
        if not box["iscrowd"] and min(right - left, bottom - top) >= MIN_SIDE:
            place = (left, top, right, bottom, label_of[box["category_id"]])
            found[box["image_id"]].append(place)
    listed = []
    for image, (width, height) in sorted(sizes.items()):
        table = np.array(found[image], np.float32).reshape(-1, 5)
        labels = table[:, 4].astype(np.int64)
        path = folder / names[image]
        listed.append(CocoImage(image, path, width, height, table[:, :4], labels))
    return listed


def sample_images(images: list[CocoImage], limit: int | None, seed: int) -> list[CocoImage]:
    """A seeded sample of at most `limit` images, in their original order."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:limit])
    return [images[i] for i in chosen]


def read_image(image: CocoImage) -> np.ndarray:
    """Decode an image to uint8 [H, W, 3].

    Raises:
        HovitError: naming the file, if it is missing, damaged, changed since `prepare`, or differs
            in size from the annotations.
    """
    content = read_content(image.path)
    if image.sha256 and hashlib.sha256(content).hexdigest() != image.sha256:
        raise HovitError(f"{image.path}: changed since the folder was checked (`hovit data`)")
    try:
        with open_sized(image, content) as opened:
            return np.array(to_rgb(opened))
    except HovitError:
        raise
    except Exception as error:
        raise HovitError(f"{image.path}: cannot be decoded ({one_line(error)})") from None


def read_content(path: Path) -> bytes:
    """Read a file.

    Raises:
        HovitError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise HovitError(f"{path}: cannot be read: {error.strerror}") from None


def open_sized(listed: CocoImage, content: bytes) -> Image.Image:
    """Open an image and check its size, reading only the header.

    Raises:
        HovitError: naming the file, if it is no image or differs in size from the annotations.
    """
    try:
        image = open_image(io.BytesIO(content))
    except Exception as error:  # Pillow raises errors of many types on broken files
        raise HovitError(f"{listed.path}: cannot be decoded ({one_line(error)})") from None
    if image.size != (listed.width, listed.height):
        raise HovitError(
            f"{listed.path}: {image.width} x {image.height} pixels, but the annotations say "
            f"{listed.width} x {listed.height}"
        )
    return image
