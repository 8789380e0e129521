"""COCO's average precision, and detections on disk in COCO's results format.

The AP of a record is recomputed exactly from the detections file next to it. Imports no torch.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import HovitError, one_line
from ..utils.files import atomic, digest
from .coco import Annotations, CocoImage, is_box, is_id, is_number

# the first six of COCOeval.stats, in its order
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KEYS: dict[str, Callable[[object], bool]] = {
    "bbox": is_box, "category_id": is_id, "image_id": is_id, "score": is_number,
}  # fmt: skip
MAX_DETECTIONS = 100  # per image, in COCOeval


def evaluate(
    truth: Annotations, detections: list[dict[str, Any]], images: Collection[int] | None = None
) -> dict[str, float]:
    """Average precision by pycocotools, at up to 100 detections per image.

    Args:
        truth: annotations. As in COCO, crowds count neither as hits nor as misses.
        detections: results in COCO's format: `image_id`, `category_id`, `bbox` [left, top, width,
            height], `score`.
        images: ids of the images to evaluate; default: all.

    Returns:
        `METRICS` in percent, without the sizes that no object has.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = [
        each | {"id": i, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
        for i, each in enumerate(detections, start=1)
    ]
    with redirect_stdout(io.StringIO()):  # COCO prints its progress
        sets = []
        for entries in ([dict(each) for each in truth.boxes], found):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": image.id} for image in truth.images],
                "categories": [{"id": category} for category in truth.categories],
                "annotations": entries,
            }
            coco.createIndex()
            sets.append(coco)
        evaluator = COCOeval(*sets, "bbox")
        evaluator.params.imgIds = sorted(images if images is not None else coco.imgs)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    scores = dict(zip(METRICS, np.asarray(evaluator.stats, float)[: len(METRICS)], strict=True))
    return {name: 100.0 * float(score) for name, score in scores.items() if score >= 0}


def to_coco(image: CocoImage, table: np.ndarray, categories: list[int]) -> list[dict[str, Any]]:
    """Convert the detections of an image to COCO's results format, rounded to 0.01 pixels.

    Args:
        image: the image.
        table: [n, 6]: left, top, right, bottom in pixels, label, score; unused rows are NaN.
        categories: category id of each label.
    """
    found = table[~np.isnan(table[:, 0])]
    sides = found[:, 2:4] - found[:, :2]
    boxes = np.concatenate([found[:, :2], sides], axis=1).round(2).tolist()
    return [
        {"image_id": image.id, "category_id": categories[int(label)], "bbox": box,
         "score": round(float(score), 5)}
        for box, (label, score) in zip(boxes, found[:, 4:], strict=True)
    ]  # fmt: skip


def detections_digest(detections: list[dict[str, Any]]) -> str:
    """sha256, in hex, of the detections as JSON."""
    return digest(detections)


def write_detections(path: Path, detections: list[dict[str, Any]]) -> None:
    """Write detections as gzipped JSON, atomically. Equal detections give equal bytes."""
    content = json.dumps(detections, separators=(",", ":"), allow_nan=False).encode()
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0))


def read_detections(path: Path) -> list[dict[str, Any]]:
    """Read detections.

    Raises:
        HovitError: if the file is missing, damaged, or not in COCO's results format.
    """
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise HovitError(f"{path}: not readable as detections ({one_line(error)})") from None
    if not isinstance(found, list) or not all(map(_is_detection, found)):
        raise HovitError(
            f"{path}: not detections: a list of objects with {', '.join(KEYS)}, all numbers "
            "(the box: four)"
        )
    return found


def _is_detection(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == KEYS.keys()
        and all(is_valid(value[key]) for key, is_valid in KEYS.items())
    )
