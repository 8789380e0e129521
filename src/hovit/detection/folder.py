"""A folder of COCO's, checked once, and named by a fingerprint.

Nothing is copied. The pack of such a dataset is two files: `manifest.csv` (split, image_id, path,
bytes, sha256) and `pack.json` (what it is, where, and the fingerprint of the manifest and of both
annotation files). No torch is needed here.
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
from ..utils.errors import HovitError, one_line
from ..utils.files import atomic, digest, file_digest, read_json, write_json
from .coco import Annotations, Picture, open_sized, read_annotations, read_content


@dataclass(frozen=True)
class Coco:
    """A checked pair of training and evaluation sets.

    Args:
        train: images that have a box to learn from.
        test: the evaluation set.
        meta: pack.json, without the place on this machine.
        annotations_sha256: of the evaluation set's file.
    """

    train: list[Picture]
    test: Annotations
    meta: dict[str, Any]
    annotations_sha256: str


def prepare(pack: Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """Check the annotations and every image's size, keep their fingerprint; give pack.json.

    Args:
        pack: a dataset of reader `coco`.
        data_root: folder in which its `files` are.
        folder: where manifest.csv and pack.json go; the plan's own place unless told.

    Raises:
        HovitError: for the first thing that is missing or not as it should be.
    """
    folder, root = folder or pack.folder, data_root.resolve()
    if (folder / "pack.json").exists():
        with suppress(HovitError):  # then it is checked anew
            meta = read_json(folder / "pack.json")
            if meta == _describe(pack, folder, root):
                return meta
    rows = []
    for split, part in read_parts(pack.dataset, root):
        with ThreadPoolExecutor() as pool:
            futures = [pool.submit(_checked, picture) for picture in part.pictures]
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
    """(`train` or `test`, what `read_annotations` gives) of both parts.

    Raises:
        HovitError: as `read_annotations`, or if the folder of images is missing.
    """
    for split, (annotations, images) in (("train", dataset.files), ("test", dataset.test_files)):
        for path in (root / annotations, root / images):
            if not path.exists():
                raise HovitError(
                    f"{path}: not found, and dataset {dataset.id} is made of it; put it there, or "
                    "name the folder that has it (--data-root, or DATA= with make)"
                )
        yield split, read_annotations(root / annotations, root / images, dataset.num_classes)


def _checked(picture: Picture) -> tuple[Picture, int]:
    """The image with its hash, and its bytes."""
    content = read_content(picture.path)
    open_sized(picture, content).close()
    return replace(picture, sha256=hashlib.sha256(content).hexdigest()), len(content)


def _row(root: Path, checked: tuple[Picture, int]) -> dict[str, Any]:
    picture, size = checked
    path = picture.path.relative_to(root).as_posix()
    return {"image_id": picture.id, "path": path, "bytes": size, "sha256": picture.sha256}


def _describe(pack: Pack, folder: Path, root: Path) -> dict[str, Any]:
    """pack.json, from the manifest and the annotation files as they are now."""
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


def open_coco(pack: Pack, folder: Path | None = None) -> Coco:
    """Open what `prepare` checked; each image is compared with its hash when it is read.

    Raises:
        HovitError: if it is missing, of another spec, or something changed since.
    """
    folder = folder or pack.folder
    again = f"`hovit data {pack.id}`"
    if not (folder / "pack.json").exists():
        raise HovitError(f"{folder}: no such pack; make it with {again}")
    meta = read_json(folder / "pack.json")
    if meta.get("spec_hash") != pack.spec_hash:
        raise HovitError(
            f"{folder}: made by another config/datasets/{pack.dataset.id}.yaml; {again}"
        )
    root = Path(str(meta.get("root")))
    if meta != _describe(pack, folder, root):
        raise HovitError(f"{folder}: the annotations under {root} or a file here changed; {again}")
    sums = _read_manifest(folder).set_index(["split", "image_id"])["sha256"].to_dict()
    parts = {
        split: replace(part, pictures=[
            replace(picture, sha256=sums[split, picture.id]) for picture in part.pictures
        ])
        for split, part in read_parts(pack.dataset, root)
    }  # fmt: skip
    train, test = parts["train"], parts["test"]
    if train.categories != test.categories:
        raise HovitError(f"{test.path}: its categories are not those of {train.path}")
    shared = {key: value for key, value in meta.items() if key != "root"}
    learned = [picture for picture in train.pictures if len(picture.boxes)]
    return Coco(learned, test, shared, file_digest(test.path))


def evaluation_set(pack: Pack, sha256: str, folder: Path) -> Annotations | None:
    """The annotations to evaluate with, if they lie where `folder`'s pack.json says.

    Args:
        sha256: of the file that is wanted.

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
