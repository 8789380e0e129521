"""ImageNet-1K read in place, from folders of JPEG files or from the published archives.

Layout under the data root: `imagenet/train/n01440764/*.JPEG` and `imagenet/val/n01440764/*.JPEG`,
as torchvision's `ImageNet` and timm expect it, or the archives that torchvision unpacks
(`ILSVRC2012_img_train.tar`, `ILSVRC2012_img_val.tar`, `ILSVRC2012_devkit_t12.tar.gz`). Images are
read from inside the archives, at the offsets in the manifest. Nothing is copied. The 100,000 test
images have no labels and are not read.

Pillow decodes, and torchvision crops and resizes uint8 tensors, because its bicubic resizing uses
AVX2.
`bench/loader.py --files` compares it with torchvision's ImageFolder loader. torchvision.io decodes
somewhat faster than Pillow, but is deprecated since torchvision 0.29; FFCV copies the data set, and
DALI has transforms of its own, on the GPU.

The pack of the data set has two files: `manifest.csv` (split, label, class, path, offset, bytes)
and `pack.json` (description, folder, and a fingerprint over splits, labels, names and sizes).
"""

import io
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ..config.runs import Pack
from ..config.schema import Dataset
from ..utils.errors import HovitError, one_line
from ..utils.files import alone, atomic, digest, read_json, write_json
from .decode import open_image, to_rgb
from .listing import list_images, printable
from .pack import SPLITS, Packed, open_pack, read_meta

COLUMNS = ["split", "label", "class", "path", "offset", "bytes"]
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
VAL_LABELS = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
ENDS = (b"\xff\xd8", b"\xff\xd9")  # first and last bytes of a JPEG
CHUNK = 10_000  # files that are checked together
CROP = 0.875  # central crop, as a share of the shorter side


class Located(NamedTuple):
    """One image file.

    Args:
        label: class name.
        path: file, relative to the data set's folder.
        offset: position of the first byte in that file; 0 for a file of one image.
        bytes: size.
        name: name of the image, without folders.
    """

    label: str
    path: str
    offset: int
    bytes: int
    name: str


def prepare(pack: Pack, data_root: Path, folder: Path | None = None) -> dict[str, Any]:
    """List and check the images, write manifest.csv and pack.json, and return pack.json.

    Each file must have the first and last bytes of a JPEG, or be decodable. Damaged files are
    printed to stderr, one line each.

    Args:
        pack: pack of a data set with reader `imagenet`.
        data_root: folder that contains the data set's folder.
        folder: folder of the pack; default: `pack.folder`.

    Raises:
        HovitError: if images are missing or damaged, or if their number differs from the published
            number.
    """
    folder, root = folder or pack.folder, (data_root / pack.dataset.files[0]).resolve()
    with alone(folder, wait=True):
        if (folder / "pack.json").exists():
            meta = read_json(folder / "pack.json")
            if meta == _describe(pack, folder, root) | {"fingerprint": meta.get("fingerprint")}:
                return meta
        train, val = list(list_split(root, "train")), list(list_split(root, "val"))
        _check_counts(pack.dataset, root, len(train), len(val))
        _check_files(root, [*train, *val])
        manifest = make_manifest(pack.dataset, train, val)
        with atomic(folder / "manifest.csv") as temporary:
            manifest.drop(columns="name").to_csv(temporary, index=False)
        meta = _describe(pack, folder, root) | {"fingerprint": fingerprint(manifest)}
        write_json(folder / "pack.json", meta)
        return meta


def list_split(root: Path, split: str) -> Iterator[Located]:
    """Yield the images of `train` or `val`, sorted: from folders, or else from the archive.

    Raises:
        HovitError: if there is neither, or an archive cannot be read.
    """
    archive = root / (TRAIN_TAR if split == "train" else VAL_TAR)
    if (root / split).is_dir():
        yield from _list_folders(root, split)
    elif archive.exists():
        try:
            found = _list_train_tar(archive) if split == "train" else _list_val_tar(root)
            yield from sorted(found, key=lambda image: (image.label, image.name))
        except (OSError, tarfile.TarError, KeyError, ValueError, IndexError) as error:
            raise HovitError(f"{archive}: cannot be read ({one_line(error)})") from None
    else:
        raise HovitError(
            f"{root / split}: not found, and no {archive.name} there either; download ImageNet-1K "
            "from image-net.org, and name the folder that contains it (--data-root, or DATA= with "
            "make)"
        )


def _list_folders(root: Path, split: str) -> Iterator[Located]:
    for member, _ in list_images(root / split):
        label, _, name = member.partition("/")
        if not name or "/" in name:
            where = printable(str(root / split / member))
            raise HovitError(f"{where}: images must lie in {split}/CLASS/")
        size = (root / split / member).stat().st_size
        yield Located(label, f"{split}/{member}", 0, size, name)


def _list_train_tar(archive: Path) -> Iterator[Located]:
    """Images of the training archive, which holds one uncompressed archive per class."""
    with tarfile.open(archive, "r:") as outer:
        for each in outer:
            inner = outer.extractfile(each)
            if inner is None:
                continue
            with tarfile.open(fileobj=inner, mode="r:") as images:
                for image in images:
                    if image.isfile():
                        offset = each.offset_data + image.offset_data
                        label, name = PurePosixPath(each.name).stem, PurePosixPath(image.name).name
                        yield Located(label, archive.name, offset, image.size, name)


def _list_val_tar(root: Path) -> Iterator[Located]:
    """Validation images, with labels from the development kit."""
    from scipy.io import loadmat

    devkit = root / DEVKIT
    if not devkit.exists():
        raise HovitError(f"{devkit}: not found; it has the labels of {VAL_TAR}")
    with tarfile.open(devkit) as kit:
        meta, labels = (kit.extractfile(name) for name in (META, VAL_LABELS))
        assert meta is not None  # KeyError names a missing member
        assert labels is not None
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not s["num_children"]}
        numbers = [int(line) for line in labels.read().split()]
    with tarfile.open(root / VAL_TAR, "r:") as archive:
        for image in archive:
            if image.isfile():
                name = PurePosixPath(image.name).name
                number = int(PurePosixPath(name).stem.rpartition("_")[2])  # from 1
                label = wnids[numbers[number - 1]]
                yield Located(label, VAL_TAR, image.offset_data, image.size, name)


def _check_counts(dataset: Dataset, root: Path, train: int, val: int) -> None:
    if not train or not val:
        raise HovitError(f"{root}: no images in {'val' if train else 'train'}")
    if dataset.published and (train, val) != dataset.published:
        expected = " and ".join(f"{n:,}" for n in dataset.published)
        raise HovitError(
            f"{root}: {train:,} training and {val:,} validation images, but {dataset.title} has "
            f"{expected}; a download or an archive is incomplete"
        )


def _check_files(root: Path, images: Sequence[Located]) -> None:
    """Print each damaged file to stderr.

    Raises:
        HovitError: if a file is damaged.
    """
    damaged: list[str] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), CHUNK):
            lines = pool.map(lambda each: _damage(root, each), images[start : start + CHUNK])
            damaged += filter(None, lines)
    for line in damaged[1:]:
        print(line, file=sys.stderr)
    if damaged:
        more = f" ({len(damaged)} damaged files, named above)" if len(damaged) > 1 else ""
        raise HovitError(damaged[0] + more)


def _damage(root: Path, image: Located) -> str:
    """One line that describes the damage of a file; empty for a good file."""
    try:
        with open(root / image.path, "rb") as file:
            file.seek(image.offset)
            first = file.read(2)
            file.seek(image.offset + max(image.bytes - 2, 0))
            if (first, file.read(2)) == ENDS:
                return ""
        _decode(root / image.path, image.offset, image.bytes)
    except (OSError, HovitError) as error:
        where = printable(str(root / image.path))
        return str(error) if isinstance(error, HovitError) else f"{where}: {one_line(error)}"
    return ""


def make_manifest(
    dataset: Dataset, train: Sequence[Located], val: Sequence[Located]
) -> pd.DataFrame:
    """Split the images. The published validation images are the test set.

    The training images are shuffled with the random seed of the split. Its `train` share is used
    for training, and the rest to choose the epoch.

    Raises:
        HovitError: if the number of classes is wrong, or a validation class has no training image.
    """
    names = sorted({each.label for each in train})
    if len(names) != dataset.num_classes:
        raise HovitError(
            f"{dataset.id}: {len(names)} classes found ({names[0]} … {names[-1]}), but num_classes "
            f"is {dataset.num_classes} in config/datasets/{dataset.id}.yaml"
        )
    if unknown := sorted({each.label for each in val} - set(names)):
        raise HovitError(f"{dataset.id}: val/{unknown[0]}: not a class of the training images")
    order = np.random.default_rng(dataset.split.seed).permutation(len(train))
    numbers = {name: number for number, name in enumerate(names)}
    everything = [*(train[i] for i in order), *val]
    sizes = dataset.split.sizes(len(train), has_test=True)
    splits = np.repeat(SPLITS, [sizes[0], sizes[1], len(val)])
    table = pd.DataFrame(everything).rename(columns={"label": "class"})
    table["label"] = table["class"].map(numbers)
    table["split"] = splits
    return table[[*COLUMNS, "name"]]


def fingerprint(manifest: pd.DataFrame) -> str:
    """sha256 in hex over splits, labels, names and sizes; equal for folders and archives."""
    return digest(manifest[["split", "label", "name", "bytes"]].to_csv(index=False))


def _describe(pack: Pack, folder: Path, root: Path) -> dict[str, Any]:
    """pack.json of the current manifest, without the fingerprint."""
    manifest = _read_manifest(folder)
    counts = Counter(manifest["split"])
    return {
        "id": pack.id,
        "dataset": pack.dataset.id,
        "spec_hash": pack.spec_hash,
        "num_classes": pack.dataset.num_classes,
        "pixels": pack.image_size,
        "images": {split: counts[split] for split in SPLITS},
        "bytes": int(manifest["bytes"].sum()),
        "manifest": digest(manifest.to_csv(index=False)),
        "root": str(root),
    }


def _read_manifest(folder: Path) -> pd.DataFrame:
    try:
        text = dict.fromkeys(("split", "class", "path"), str)
        table = pd.read_csv(folder / "manifest.csv", dtype=text, keep_default_na=False)
        return table[COLUMNS].astype(dict.fromkeys(("label", "offset", "bytes"), "int64"))
    except (OSError, ValueError, KeyError) as error:
        raise HovitError(f"{folder}: cannot be read ({one_line(error)}); delete it") from None


class ImageFiles:
    """The images of a manifest, decoded on demand: an `ImageSource` with the interface of a pack.

    Args:
        root: folder of the data set.
        manifest: table with `COLUMNS`.
        size: pixels per side of a central crop.
        meta: pack.json without the folder.
    """

    def __init__(self, root: Path, manifest: pd.DataFrame, size: int, meta: dict[str, Any]) -> None:
        self.root, self.size, self.meta = root, size, meta
        self.labels = manifest["label"].to_numpy(np.int64)
        self.splits = {name: np.flatnonzero(manifest["split"] == name) for name in SPLITS}
        # Fixed-width arrays have no reference counts, so worker processes share their memory.
        self._paths = manifest["path"].to_numpy("S")
        self._offsets = manifest["offset"].to_numpy(np.int64)
        self._bytes = manifest["bytes"].to_numpy(np.int64)
        self.images = CentralCrops(self)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file or archive that holds an image."""
        return self.root / os.fsdecode(self._paths[index])

    def open(self, index: int) -> Image.Image:
        """Read a file and its header; the pixels are decoded later.

        Raises:
            HovitError: naming a file that is missing or not an image.
        """
        offset, size = int(self._offsets[index]), int(self._bytes[index])
        return _open(self.path(index), offset, size)

    def decode(self, image: Image.Image, index: int, shrink: int = 1) -> Tensor:
        """Decode to RGB, uint8 [3, H, W], without EXIF orientation, as torchvision and timm do.

        If `shrink` is 2 or more, libjpeg decodes fewer coefficients.

        Raises:
            HovitError: naming a damaged file.
        """
        if shrink >= 2:
            image.draft(None, (image.width // shrink, image.height // shrink))
        return torch.from_numpy(np.array(self.to_rgb(image, index))).permute(2, 0, 1)

    def to_rgb(self, image: Image.Image, index: int) -> Image.Image:
        """Decode with Pillow.

        Raises:
            HovitError: naming a damaged file.
        """
        return _rgb(image, self.path(index), int(self._offsets[index]))


class CentralCrops(TorchDataset[Any]):
    """Images for evaluation: resized to 8 / 7 of the crop size (bicubic), then cropped centrally.

    `crops[i]` and `crops[[i, j]]` are arrays, like the images of a pack. A loader gets batches.
    """

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> np.ndarray:
        """uint8 [size, size, 3] of one image, or [n, size, size, 3] of several."""
        if isinstance(index, int | np.integer):
            return self._crop(int(index))
        return np.stack([self._crop(int(i)) for i in np.asarray(index)])

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor, Tensor] | HovitError:
        """A batch, uint8 [B, size, size, 3] and labels [B]; an error is returned, not raised."""
        try:
            images = self[indices]
        except HovitError as error:
            return error
        return torch.from_numpy(images), torch.from_numpy(self.files.labels[indices])

    def _crop(self, index: int) -> np.ndarray:
        size = self.files.size
        rgb = self.files.to_rgb(self.files.open(index), index)
        short = int(size / CROP)  # rounded as torchvision's Resize and CenterCrop do
        wide, high = (int(short * side / min(rgb.size)) for side in rgb.size)
        rgb = rgb.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _open(path: Path, offset: int, size: int) -> Image.Image:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return open_image(io.BytesIO(file.read(size)))
    except Exception as error:  # Pillow raises errors of many types on broken files
        raise HovitError(f"{_place(path, offset)}: cannot be decoded ({one_line(error)})") from None


def _rgb(image: Image.Image, path: Path, offset: int) -> Image.Image:
    try:
        return to_rgb(image)
    except Exception as error:  # as above
        raise HovitError(f"{_place(path, offset)}: cannot be decoded ({one_line(error)})") from None


def _decode(path: Path, offset: int, size: int) -> Image.Image:
    return _rgb(_open(path, offset, size), path, offset)


def _place(path: Path, offset: int) -> str:
    return printable(str(path)) + (f", byte {offset}" if offset else "")


def open_files(pack: Pack, folder: Path | None = None) -> ImageFiles:
    """Open a data set that `prepare` checked.

    Raises:
        HovitError: if the pack is missing or has another spec, or if its manifest has changed.
    """
    folder = folder or pack.folder
    meta = read_meta(pack, folder)
    root = Path(str(meta.get("root")))
    if meta != _describe(pack, folder, root) | {"fingerprint": meta.get("fingerprint")}:
        raise HovitError(
            f"{folder}: manifest.csv and pack.json differ; delete it and run `hovit data {pack.id}`"
        )
    shared = {key: value for key, value in meta.items() if key not in ("root", "manifest")}
    return ImageFiles(root, _read_manifest(folder), pack.image_size, shared)


def open_images(pack: Pack, folder: Path | None = None) -> Packed | ImageFiles:
    """Open the images of a pack, whether they are packed or read in place.

    Raises:
        HovitError: as `open_pack` and `open_files`.
    """
    return open_files(pack, folder) if pack.dataset.reads_files else open_pack(pack, folder)
