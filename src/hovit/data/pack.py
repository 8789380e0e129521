"""Decode a dataset once, split it, and keep it as one array with a manifest.

A pack is a folder of three files: `images.npy` (uint8, [N, H, W, 3]), `manifest.csv` (index, split,
label, path) and `pack.json` (what it is, and the fingerprint of the other two). It is written
beside its place and renamed, so there is never half of one.
"""

import hashlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ..config import plan
from ..config.schema import Dataset
from ..utils.errors import HovitError, one_line
from ..utils.files import clear_leftovers, read_json, write_json
from .readers import Item, read_items

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Packed:
    """A pack on disk, opened.

    Args:
        images: uint8 [N, H, W, 3], mapped from disk, not read.
        labels: int64 [N].
        splits: for each of train, val and test the indices into `images`, in seeded order;
            a source's own test set in its own.
        meta: pack.json.
    """

    images: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]
    meta: dict[str, Any]


def prepare(pack: plan.Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """Make the pack if it is not there already, and give its pack.json.

    Args:
        pack: the dataset and its size in pixels.
        data_root: folder with downloads and archives.
        folder: where to; the plan's own place unless told.

    Raises:
        HovitError: if an image or a source is missing, truncated or mislabelled: by its path.
    """
    folder = folder or pack.folder
    if (folder / "pack.json").exists():
        meta = read_json(folder / "pack.json")
        if meta.get("spec_hash") == pack.spec_hash and (folder / "images.npy").exists():
            if meta != _describe(pack, folder) | {"fingerprint": meta.get("fingerprint")}:
                raise HovitError(f"{folder}: pack.json does not match the files; delete it")
            return meta
    items, own_test = _draw(pack.dataset, read_items(pack.dataset, data_root))
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        clear_leftovers(folder)
        part.mkdir(parents=True)
        meta = _write(pack, items, own_test, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise HovitError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return meta


def _draw(dataset: Dataset, items: list[Item]) -> tuple[list[Item], list[Item]]:
    """The images that take part, shuffled by the seed: (to be split, the source's own test set).

    Those of the source's own validation set, if it has one, come after those for training.
    """
    rng = np.random.default_rng(dataset.split.seed)
    names = sorted({item.label for item in items})
    if dataset.classes:
        first, last = dataset.classes
        if not first < last <= len(names):
            raise HovitError(
                f"{dataset.id}: classes [{first}, {last}] in config/datasets/{dataset.id}.yaml are "
                f"not a range of its {len(names)} classes"
            )
        shuffled = [names[i] for i in rng.permutation(len(names))]
        chosen = set(shuffled[first:last])
        items = [item for item in items if item.label in chosen]
    to_split = [item for item in items if not item.test]
    own_test = [item for item in items if item.test]
    unknown = {item.label for item in own_test} - {item.label for item in to_split}
    if unknown:
        stray = next(item for item in own_test if item.label in unknown)
        raise HovitError(f"{stray.path}: class {stray.label!r} is not among the training images")
    to_split = [to_split[i] for i in rng.permutation(len(to_split))]
    if dataset.images:
        if len(to_split) < dataset.images:
            raise HovitError(
                f"{dataset.id}: {len(to_split):,} images found, {dataset.images:,} needed"
            )
        to_split = to_split[: dataset.images]
    return sorted(to_split, key=lambda item: item.val), own_test


def _label_numbers(dataset: Dataset, items: Sequence[Item]) -> dict[str, int]:
    """Class name -> number. Oxford-IIIT Pet's own numbers stand even where breeds are missing."""
    names = sorted({item.label for item in items})
    numbers = {name: number for number, name in enumerate(names)}
    if dataset.reader == "oxford_iiit_pet":
        numbers = {name: int(name[:2]) - 1 for name in names}
        wrong = max(numbers.values()) >= dataset.num_classes
    else:
        wrong = len(names) != dataset.num_classes
    if wrong:
        raise HovitError(
            f"{dataset.id}: {len(names)} classes found ({names[0]} … {names[-1]}), but num_classes "
            f"is {dataset.num_classes} in config/datasets/{dataset.id}.yaml"
        )
    return numbers


def _write(
    pack: plan.Pack, items: list[Item], own_test: list[Item], folder: Path
) -> dict[str, Any]:
    dataset = pack.dataset
    own_val = sum(item.val for item in items)
    sizes = (len(items) - own_val, own_val, 0)
    if not own_val:
        sizes = dataset.split.sizes(len(items), has_test=bool(own_test))
    everything = [*items, *own_test]
    splits = np.repeat(SPLITS, [sizes[0], sizes[1], sizes[2] + len(own_test)])
    numbers = _label_numbers(dataset, everything)
    _decode(everything, _side(pack), folder / "images.npy")
    manifest = pd.DataFrame(
        {
            "split": splits,
            "label": [numbers[item.label] for item in everything],
            "class": [item.label for item in everything],
            "path": [item.path for item in everything],
        }
    )
    manifest.to_csv(folder / "manifest.csv", index_label="index")
    meta = _describe(pack, folder) | {"fingerprint": fingerprint(folder)}
    write_json(folder / "pack.json", meta)
    return meta


def _side(pack: plan.Pack) -> int:
    """Pixels a side: never more than the source has."""
    return min(pack.image_size, pack.dataset.native_size or pack.image_size)


def _describe(pack: plan.Pack, folder: Path) -> dict[str, Any]:
    """pack.json but for the fingerprint, from the other two files."""
    try:
        counts = Counter(_read_manifest(folder)["split"])
        size = (folder / "images.npy").stat().st_size
    except (OSError, ValueError, KeyError) as error:
        raise HovitError(f"{folder}: cannot be read ({one_line(error)}); delete it") from None
    return {
        "id": pack.id,
        "dataset": pack.dataset.id,
        "spec_hash": pack.spec_hash,
        "num_classes": pack.dataset.num_classes,
        "pixels": _side(pack),
        "images": {split: counts[split] for split in SPLITS},
        "bytes": size,
    }


def _read_manifest(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "manifest.csv", dtype={"class": str}, low_memory=False)


def _decode(items: list[Item], side: int, path: Path) -> None:
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (len(items), side, side, 3))
    # Where the disk is full, writing to mapped memory would kill the process; this is an OSError.
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def decode(i: int) -> None:
        images[i] = decode_image(items[i], side)

    # Warnings are the whole process's, so that is set here and not in each thread.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        futures = [pool.submit(decode, i) for i in range(len(items))]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    images.flush()


def decode_image(item: Item, side: int) -> np.ndarray:
    """Decode one image to uint8 [side, side, 3]: plain bilinear resize, as the deck does.

    Raises:
        HovitError: naming the path of an image that is missing, empty, truncated or a bomb.
    """
    try:
        with item.load() as image:
            rgb = image.convert("RGB")
    except Exception as error:  # PIL raises whatever a broken file makes it stumble over
        reason = one_line(error)
        raise HovitError(f"{item.path}: cannot be decoded ({reason})") from None
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def fingerprint(folder: Path) -> str:
    """sha256, in hex, over the manifest and the decoded images; paths up to the root do not count.

    Two machines with the same images, labels and splits get the same fingerprint.
    """
    manifest = _read_manifest(folder)
    total = hashlib.sha256(manifest[["split", "label"]].to_csv(index=False).encode())
    with open(folder / "images.npy", "rb") as file:
        total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def open_pack(pack: plan.Pack, folder: Path | None = None) -> Packed:
    """Open a pack, checking that it is the one asked for and that not a byte of it has changed.

    Raises:
        HovitError: if it is missing, of another spec, or does not match its fingerprint.
    """
    folder = folder or pack.folder
    if not (folder / "pack.json").exists():
        raise HovitError(f"{folder}: no such pack; make it with `hovit data {pack.id}`")
    meta = read_json(folder / "pack.json")
    if meta.get("spec_hash") != pack.spec_hash:
        raise HovitError(
            f"{folder}: made by another config/datasets/{pack.dataset.id}.yaml; delete it"
        )
    try:
        if meta != _describe(pack, folder) | {"fingerprint": fingerprint(folder)}:
            raise HovitError(
                f"{folder}: images, manifest or pack.json differ from the fingerprint; delete it"
            )
        manifest = _read_manifest(folder)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="r")  # unpickles nothing
        shape = (len(manifest), _side(pack), _side(pack), 3)
        if (images.shape, images.dtype) != (shape, np.uint8):
            raise ValueError(f"images.npy is not uint8 {list(shape)}")
    except (OSError, ValueError, KeyError) as error:
        raise HovitError(f"{folder}: cannot be read ({one_line(error)}); delete it") from None
    splits = {name: np.flatnonzero(manifest["split"] == name) for name in SPLITS}
    return Packed(images, manifest["label"].to_numpy(np.int64), splits, meta)
