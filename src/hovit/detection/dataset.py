"""A COCO dataset on disk: checked once and identified by a fingerprint. Imports no torch.

Nothing is copied. The pack of such a dataset has two files: `manifest.csv` (split, image_id, path,
bytes, sha256) and `pack.json` (description, location, and a fingerprint over the manifest and both
annotation files).
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.runs import Pack
from ..config.schema import Dataset
from ..data.pack import read_meta
from ..utils.errors import HovitError, one_line
from ..utils.files import atomic, digest, file_digest, read_json, write_json
from .coco import Annotations, CocoImage, open_sized, read_annotations, read_content


@dataclass(frozen=True)
class CocoDataset:
    """Training and evaluation sets.

    Args:
        train: training images that have at least one box.
        test: evaluation set.
        meta: pack.json without `root`.
        annotations_sha256: hash of the annotation file of the evaluation set.
    """

    train: list[CocoImage]
    test: Annotations
    meta: dict[str, Any]
    annotations_sha256: str


def prepare(pack: Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """Check annotations and image sizes, write manifest.csv and pack.json, return pack.json.

    Args:
        pack: pack of a dataset with reader `coco`.
        data_root: folder that contains the `files` of the dataset.
        folder: folder for manifest.csv and pack.json; default: `pack.folder`.

    Raises:
        HovitError: naming the first file or annotation that is missing or invalid.
    """
    folder, root = folder or pack.folder, data_root.resolve()
    if (folder / "pack.json").exists():
        with suppress(HovitError):  # damaged: check the dataset again
            meta = read_json(folder / "pack.json")
            if meta == _describe(pack, folder, root):
                return meta
    rows = []
    for split, part in read_parts(pack.dataset, root):
        with ThreadPoolExecutor() as pool:
            futures = [pool.submit(_hash_image, image) for image in part.images]
            try:
                rows += [{"split": split, **_row(root, future.result())} for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    with atomic(folder / "manifest.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    meta = _describe(pack, folder, root)
    write_json(folder / "pack.json", meta)
    return meta


def read_parts(dataset: Dataset, root: Path) -> Iterator[tuple[str, Annotations]]:
    """Yield ("train", annotations) and ("test", annotations).

    Raises:
        HovitError: as `read_annotations`, or if the image folder is missing.
    """
    for split, (annotations, images) in (("train", dataset.files), ("test", dataset.test_files)):
        for path in (root / annotations, root / images):
            if not path.exists():
                raise HovitError(
                    f"{path}: not found, but dataset {dataset.id} needs it; put it there, or "
                    "name the folder that has it (--data-root, or DATA= with make)"
                )
        yield split, read_annotations(root / annotations, root / images, dataset.num_classes)


def _hash_image(image: CocoImage) -> tuple[CocoImage, int]:
    """The image with its hash, and its size in bytes."""
    content = read_content(image.path)
    open_sized(image, content).close()
    return replace(image, sha256=hashlib.sha256(content).hexdigest()), len(content)


def _row(root: Path, hashed: tuple[CocoImage, int]) -> dict[str, Any]:
    image, size = hashed
    path = image.path.relative_to(root).as_posix()
    return {"image_id": image.id, "path": path, "bytes": size, "sha256": image.sha256}


def _describe(pack: Pack, folder: Path, root: Path) -> dict[str, Any]:
    """pack.json of the current manifest and annotation files."""
    manifest = _read_manifest(folder)
    parts = [root / pack.dataset.files[0], root / pack.dataset.test_files[0]]
    counts = manifest["split"].value_counts()
    return {
        "id": pack.id,
        "dataset": pack.dataset.id,
        "spec_hash": pack.spec_hash,
        "num_classes": pack.dataset.num_classes,
        "pixels": pack.image_size,
        "images": {split: int(counts.get(split, 0)) for split in ("train", "val", "test")},
        "bytes": int(manifest["bytes"].sum()),
        "fingerprint": digest([file_digest(p) for p in (*parts, folder / "manifest.csv")]),
        "root": str(root),
    }


def _read_manifest(folder: Path) -> pd.DataFrame:
    try:
        types = {"split": str, "image_id": int, "path": str, "bytes": int, "sha256": str}
        return pd.read_csv(folder / "manifest.csv", dtype=types)[list(types)]
    except (OSError, ValueError, KeyError) as error:
        raise HovitError(f"{folder}: cannot be read ({one_line(error)}); delete it") from None


def open_coco(pack: Pack, folder: Path | None = None) -> CocoDataset:
    """Open a dataset that `prepare` checked. `read_image` compares each image with its hash.

    Raises:
        HovitError: if the pack is missing, has another spec, or a file changed since.
    """
    folder = folder or pack.folder
    meta = read_meta(pack, folder)
    root = Path(str(meta.get("root")))
    if meta != _describe(pack, folder, root):
        raise HovitError(
            f"{folder}: it or annotations under {root} changed; run `hovit data {pack.id}`"
        )
    sums = _read_manifest(folder).set_index(["split", "image_id"])["sha256"].to_dict()
    parts = {
        split: replace(part, images=[
            replace(image, sha256=sums[split, image.id]) for image in part.images
        ])
        for split, part in read_parts(pack.dataset, root)
    }  # fmt: skip
    train, test = parts["train"], parts["test"]
    if train.categories != test.categories:
        raise HovitError(f"{test.path}: its categories differ from those of {train.path}")
    shared = {key: value for key, value in meta.items() if key != "root"}
    with_boxes = [image for image in train.images if len(image.boxes)]
    return CocoDataset(with_boxes, test, shared, file_digest(test.path))


def evaluation_set(pack: Pack, sha256: str, folder: Path) -> Annotations | None:
    """Annotations of the evaluation set, or None if they are not on this machine.

    Args:
        pack: pack of the dataset.
        sha256: expected hash of the annotation file.
        folder: folder of pack.json, which states where the dataset lies.

    Raises:
        HovitError: as `read_annotations`.
    """
    if not (folder / "pack.json").exists():
        return None
    root = Path(str(read_json(folder / "pack.json").get("root")))
    path, images = (root / name for name in pack.dataset.test_files)
    if not path.exists() or file_digest(path) != sha256:
        return None
    return read_annotations(path, images, pack.dataset.num_classes)
