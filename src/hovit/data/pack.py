"""Packs: data sets decoded once, split and stored as one array with a manifest.

A pack is a folder with three files: `images.npy` (uint8 [N, H, W, 3]), `manifest.csv` (index,
split, label, class, path) and `pack.json` (description, and a fingerprint over the other two). It
is written to a temporary folder and then renamed, so an incomplete pack is never visible.
"""

import hashlib
import os
import shutil
import uuid
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

from ..config.runs import Pack
from ..config.schema import Dataset
from ..utils.errors import HovitError, one_line
from ..utils.files import alone, read_json, remove_parts, write_json
from .decode import to_rgb
from .listing import printable
from .readers import Item, read_items
from .split import stratified_order

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Packed:
    """An open pack.

    Args:
        images: uint8 [N, H, W, 3], memory-mapped.
        labels: int64 [N].
        splits: indices into `images` for train, val and test, in seeded order; a published test
            set keeps its order.
        meta: pack.json.
    """

    images: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]
    meta: dict[str, Any]


def prepare(pack: Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """Make the pack unless it exists, and return pack.json.

    If another process makes the same pack, wait for it.

    Args:
        pack: data set and size in pixels.
        data_root: folder with downloads and archives.
        folder: folder of the pack; default: `pack.folder`.

    Raises:
        HovitError: naming the file that is missing, damaged or mislabelled.
    """
    folder = folder or pack.folder
    if meta := _existing(pack, folder):
        return meta
    with alone(folder, wait=True) as locked:
        if meta := _existing(pack, folder):  # another process has made it
            return meta
        if locked:
            remove_parts(folder)
        return _make(pack, data_root, folder)


def _existing(pack: Pack, folder: Path) -> dict[str, Any] | None:
    """pack.json of a pack that was made from this spec, or None.

    Raises:
        HovitError: if pack.json does not match the other files.
    """
    if not (folder / "pack.json").exists():
        return None
    meta = read_json(folder / "pack.json")
    if meta.get("spec_hash") != pack.spec_hash or not (folder / "images.npy").exists():
        return None
    if meta != _describe(pack, folder) | {"fingerprint": meta.get("fingerprint")}:
        raise HovitError(f"{folder}: pack.json does not match the files; delete it")
    return meta


def _make(pack: Pack, data_root: Path, folder: Path) -> dict[str, Any]:
    items, own_test = select_items(pack.dataset, read_items(pack.dataset, data_root))
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().int}.part")
    try:
        part.mkdir(parents=True)
        meta = _write(pack, items, own_test, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise HovitError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return meta


def select_items(dataset: Dataset, items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Choose classes and images by the seed: (shuffled images to split, published test set).

    The images of a published validation set come last among those to split.
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
    if dataset.split.stratify:
        order = stratified_order(np.array([item.label for item in to_split]))
        to_split = [to_split[i] for i in order]
    return sorted(to_split, key=lambda item: item.val), own_test


def _label_numbers(dataset: Dataset, items: Sequence[Item]) -> dict[str, int]:
    """Class name -> number. Oxford-IIIT Pet keeps its numbers even if breeds are missing."""
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


def _write(pack: Pack, items: list[Item], own_test: list[Item], folder: Path) -> dict[str, Any]:
    """Write the three files of a pack and return pack.json."""
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


def _side(pack: Pack) -> int:
    """Pixels per side, at most those of the source."""
    return min(pack.image_size, pack.dataset.native_size or pack.image_size)


def _describe(pack: Pack, folder: Path) -> dict[str, Any]:
    """pack.json without the fingerprint, computed from the other two files."""
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
    return pd.read_csv(
        folder / "manifest.csv",
        dtype={"class": str},
        low_memory=False,
        keep_default_na=False,
        lineterminator="\n",
    )


def _decode(items: list[Item], side: int, path: Path) -> None:
    """Decode all images into an array on disk."""
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (len(items), side, side, 3))
    # On a full disk, writing to mapped memory kills the process, but this raises OSError.
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def decode(i: int) -> None:
        images[i] = decode_image(items[i], side)

    # Warning filters belong to the process, so they are set here and not in each thread.
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
    """Decode one image to uint8 [side, side, 3], with a plain bilinear resize as in the deck.

    Raises:
        HovitError: naming the file, if it is missing, damaged, too large or not understood.
    """
    try:
        with item.load() as image:
            rgb = to_rgb(image, item.orient)
    except Exception as error:  # Pillow raises errors of many types on broken files
        reason = one_line(error)
        raise HovitError(f"{printable(item.path)}: cannot be decoded ({reason})") from None
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def fingerprint(folder: Path) -> str:
    """sha256 in hex over splits, labels and decoded images, but not paths.

    Two machines with the same images, labels and splits get the same fingerprint.
    """
    manifest = _read_manifest(folder)
    total = hashlib.sha256(manifest[["split", "label"]].to_csv(index=False).encode())
    with open(folder / "images.npy", "rb") as file:
        total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_meta(pack: Pack, folder: Path) -> dict[str, Any]:
    """Read `pack.json` of a pack, packed or read in place.

    Raises:
        HovitError: if it is missing or has another spec.
    """
    command = f"`hovit data {pack.id}`"
    if not (folder / "pack.json").exists():
        raise HovitError(f"{folder}: no such pack; make it with {command}")
    meta = read_json(folder / "pack.json")
    if meta.get("spec_hash") != pack.spec_hash:
        raise HovitError(
            f"{folder}: made from another config/datasets/{pack.dataset.id}.yaml; delete it and "
            f"run {command}"
        )
    return meta


def open_pack(pack: Pack, folder: Path | None = None) -> Packed:
    """Open a pack after checking its spec and fingerprint.

    Raises:
        HovitError: if the pack is missing, has another spec, or does not match its fingerprint.
    """
    folder = folder or pack.folder
    meta = read_meta(pack, folder)
    try:
        if meta != _describe(pack, folder) | {"fingerprint": fingerprint(folder)}:
            raise HovitError(
                f"{folder}: images, manifest or pack.json differ from the fingerprint; delete it"
            )
        manifest = _read_manifest(folder)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="r")  # never unpickles
        shape = (len(manifest), _side(pack), _side(pack), 3)
        if (images.shape, images.dtype) != (shape, np.uint8):
            raise ValueError(f"images.npy is not uint8 {list(shape)}")
    except (OSError, ValueError, KeyError) as error:
        raise HovitError(f"{folder}: cannot be read ({one_line(error)}); delete it") from None
    splits = {name: np.flatnonzero(manifest["split"] == name) for name in SPLITS}
    return Packed(images, manifest["label"].to_numpy(np.int64), splits, meta)
