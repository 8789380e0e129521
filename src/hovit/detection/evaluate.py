"""Detections on disk, in COCO's results format, and COCO's average precision of them.

A record's AP is that of the detections beside it, to the last digit. No torch is needed here.
"""

import gzip
import io
import json
import zlib
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import HovitError, one_line
from ..utils.files import atomic, digest
from .coco import Annotations, Picture

# COCOeval's first six, in its order
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KEYS = {"image_id", "category_id", "bbox", "score"}
MOST = 100  # detections that it looks at in an image


def evaluate(
    truth: Annotations, detections: list[dict[str, Any]], images: Collection[int] | None = None
) -> dict[str, float]:
    """COCO's average precision, by pycocotools, at 100 detections an image at most.

    Args:
        truth: the annotations; crowds are neither found nor missed, as COCO has it.
        detections: COCO's results: `image_id`, `category_id`, `bbox` [left, top, width, height],
            `score`.
        images: ids of the images that count; all unless told.

    Returns:
        `METRICS`, percent; without those of a size that no object has.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = [
        each | {"id": i, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
        for i, each in enumerate(detections, start=1)
    ]
    with redirect_stdout(io.StringIO()):  # it tells how long each step took
        sets = []
        for entries in ([dict(each) for each in truth.boxes], found):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": picture.id} for picture in truth.pictures],
                "categories": [{"id": category} for category in truth.categories],
                "annotations": entries,
            }
            coco.createIndex()
            sets.append(coco)
        judge = COCOeval(*sets, "bbox")
        judge.params.imgIds = sorted(images if images is not None else coco.imgs)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    scores = dict(zip(METRICS, np.asarray(judge.stats, float)[: len(METRICS)], strict=True))
    return {name: 100.0 * float(score) for name, score in scores.items() if score >= 0}


def to_coco(picture: Picture, table: np.ndarray, categories: list[int]) -> list[dict[str, Any]]:
    """An image's detections in COCO's results format, to a hundredth of a pixel.

    Args:
        picture: the image.
        table: [n, 6]: left, top, right, bottom in pixels, label, score; NaN where there is none.
        categories: ids, by label.
    """
    found = table[~np.isnan(table[:, 0])]
    sides = found[:, 2:4] - found[:, :2]
    boxes = np.concatenate([found[:, :2], sides], axis=1).round(2).tolist()
    return [
        {"image_id": picture.id, "category_id": categories[int(label)], "bbox": box,
         "score": round(float(score), 5)}
        for box, (label, score) in zip(boxes, found[:, 4:], strict=True)
    ]  # fmt: skip


def detections_digest(detections: list[dict[str, Any]]) -> str:
    """sha256, in hex, of the detections as JSON."""
    return digest(detections)


def write_detections(path: Path, detections: list[dict[str, Any]]) -> None:
    """Write detections as compressed JSON, atomically; the same ones give the same bytes."""
    content = json.dumps(detections, separators=(",", ":"), allow_nan=False).encode()
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0))


def read_detections(path: Path) -> list[dict[str, Any]]:
    """Read detections.

    Raises:
        HovitError: if the file is missing, damaged, or not COCO's results.
    """
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise HovitError(f"{path}: not readable as detections ({one_line(error)})") from None
    if not isinstance(found, list) or not all(
        isinstance(e, dict) and e.keys() == KEYS for e in found
    ):
        raise HovitError(f"{path}: not detections: a list of {', '.join(sorted(KEYS))} each")
    return found
