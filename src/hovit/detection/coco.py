"""COCO's format (Lin et al., https://arxiv.org/abs/1405.0312): `instances_*.json` and its images.

No torch is needed here.
"""

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ..utils.errors import HovitError, one_line
from ..utils.files import read_json

# (annotation, image): the two boxes of COCO's own train2017 that have no height.
WITHOUT_AREA = {(918, 200365), (2206849, 550395)}
SMALLEST = 1.0  # pixels: training leaves out what is less wide or high (ours)


@dataclass(frozen=True)
class Picture:
    """An image, and what training is told of it.

    Args:
        id: COCO's.
        path: its file.
        width, height: pixels.
        boxes: float32 [n, 4], left top right bottom in pixels; crowds are none of them.
        labels: int64 [n], places in the sorted category ids.
        sha256: of the file.
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
    """One `instances_*.json`, checked.

    Args:
        path: the file.
        pictures: all images, by id.
        categories: sorted ids; the place of one is its label.
        boxes: COCO's annotations as they are, crowds too, without outlines.
    """

    path: Path
    pictures: list[Picture]
    categories: list[int]
    boxes: list[dict[str, Any]]


def read_annotations(path: Path, images: Path, num_classes: int) -> Annotations:
    """Read and check an `instances_*.json`; the images themselves are not opened.

    Args:
        path: the file.
        images: folder that its file names are in.
        num_classes: how many categories there must be.

    Raises:
        HovitError: naming the file, and the image or annotation that is not as COCO's format has
            it: not listed, listed twice, a box without area or outside its image.
    """
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise HovitError(f"{path}: {key}: must be a list of objects, as in COCO's instances")
    if not content["images"]:
        raise HovitError(f"{path}: images: there are none")
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
    pictures = _pictures(boxes, sizes, names, categories, images)
    return Annotations(path, pictures, categories, boxes)


def _ids(path: Path, what: str, entries: list[dict[str, Any]]) -> list[int]:
    seen: set[int] = set()
    for entry in entries:
        number = entry.get("id")
        if type(number) is not int:
            raise HovitError(f"{path}: {what}: each one's id must be a whole number")
        if number in seen:
            raise HovitError(f"{path}: {what} {number} is listed twice")
        seen.add(number)
    return [entry["id"] for entry in entries]


def _size(path: Path, image: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of a listed image."""
    where, name = f"{path}: image {image['id']}", image.get("file_name")
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or parts[0] == "/":
        raise HovitError(f"{where}: file_name {name!r} is not inside the folder")
    width, height = image.get("width"), image.get("height")
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        raise HovitError(f"{where}: width and height must be pixels, not {width}, {height}")
    return width, height


def _box(
    path: Path, entry: dict[str, Any], sizes: dict[int, tuple[int, int]], categories: set[int]
) -> dict[str, Any]:
    """What training and COCO's evaluation need of an annotation."""
    where = f"{path}: annotation {entry['id']}"
    image, category, box = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
    if type(image) is not int or image not in sizes:
        raise HovitError(f"{where}: image {image} is not listed")
    if type(category) is not int or category not in categories:
        raise HovitError(f"{where}: category {category} is not listed")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise HovitError(f"{where}: bbox must be [left, top, width, height], not {str(box)[:60]}")
    left, top, width, height = box
    if min(width, height) <= 0 and (entry["id"], image) not in WITHOUT_AREA:
        raise HovitError(f"{where}: its box {box} has no area")
    limits = sizes[image]
    if min(left, top) < -1 or left + width > limits[0] + 1 or top + height > limits[1] + 1:
        raise HovitError(
            f"{where}: its box {box} lies outside image {image} of {limits[0]} x {limits[1]} pixels"
        )
    area, crowd = entry.get("area", width * height), entry.get("iscrowd", 0)
    if not _is_number(area) or type(crowd) is not int or crowd not in (0, 1):
        raise HovitError(f"{where}: area must be a number, and iscrowd 0 or 1")
    return {"id": entry["id"], "image_id": image, "category_id": category, "bbox": box,
            "area": area, "iscrowd": int(crowd)}  # fmt: skip


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _pictures(
    boxes: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    names: dict[int, str],
    categories: list[int],
    folder: Path,
) -> list[Picture]:
    """Every image with its boxes, clipped to it; neither crowds nor what is under a pixel."""
    label_of = {category: label for label, category in enumerate(categories)}
    found: dict[int, list[tuple[float, ...]]] = {image: [] for image in sizes}
    for box in boxes:
        left, top, width, height = box["bbox"]
        limits = sizes[box["image_id"]]
        left, right = max(left, 0.0), min(left + width, limits[0])
        top, bottom = max(top, 0.0), min(top + height, limits[1])
        if not box["iscrowd"] and min(right - left, bottom - top) >= SMALLEST:
            place = (left, top, right, bottom, label_of[box["category_id"]])
            found[box["image_id"]].append(place)
    pictures = []
    for image, (width, height) in sorted(sizes.items()):
        table = np.array(found[image], np.float32).reshape(-1, 5)
        labels = table[:, 4].astype(np.int64)
        pictures.append(Picture(image, folder / names[image], width, height, table[:, :4], labels))
    return pictures


def drawn(pictures: list[Picture], most: int | None, seed: int) -> list[Picture]:
    """At most so many images, by a seeded draw, in their order."""
    some = np.sort(np.random.default_rng(seed).permutation(len(pictures))[:most])
    return [pictures[i] for i in some]


def read_image(picture: Picture) -> np.ndarray:
    """Decode an image: uint8 [H, W, 3].

    Raises:
        HovitError: naming the file, if it is missing, damaged, of another size than was said, or
            not the one that was checked.
    """
    content = read_content(picture.path)
    if picture.sha256 and hashlib.sha256(content).hexdigest() != picture.sha256:
        raise HovitError(f"{picture.path}: changed since the folder was checked (`hovit data`)")
    try:
        with open_sized(picture, content) as image:
            return np.array(image.convert("RGB"))
    except HovitError:
        raise
    except Exception as error:
        raise HovitError(f"{picture.path}: cannot be decoded ({one_line(error)})") from None


def read_content(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        HovitError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise HovitError(f"{path}: cannot be read: {error.strerror}") from None


def open_sized(picture: Picture, content: bytes) -> Image.Image:
    """Open an image by its header.

    Raises:
        HovitError: naming the file, if it is no image, or of another size than was said.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:  # PIL raises whatever a broken file makes it stumble over
        raise HovitError(f"{picture.path}: cannot be decoded ({one_line(error)})") from None
    if image.size != (picture.width, picture.height):
        raise HovitError(
            f"{picture.path}: {image.width} x {image.height} pixels, but the annotations say "
            f"{picture.width} x {picture.height}"
        )
    return image
