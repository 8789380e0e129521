"""Where images come from: one reader a source, each giving the same plain items.

Sources: scikit-learn's digits; Oxford-IIIT Pet (Parkhi et al., 2012), CIFAR-10/100 (Krizhevsky,
2009) and Oxford 102 Flower (Nilsback and Zisserman, 2008) through torchvision, which downloads and
checks sums; Stanford Cars (Krause et al., 2013), likewise read but no more to be downloaded; any
ImageFolder tree or a zip of one.
"""

import io
import os
import re
import shutil
import socket
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..config.schema import Dataset
from ..utils.errors import HovitError, one_line
from ..utils.files import clear_leftovers, digest, file_digest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
EXTRACTED = Path("data/extracted")
SILENCE = 30.0  # seconds after which a download that says nothing has failed
MAX_BYTES = 64 * 2**20  # of one image file; a zip may promise anything


@dataclass(frozen=True)
class Item:
    """One image: where it is, what it shows, and how to open it.

    Args:
        path: where a person finds it.
        label: its class, by name; sorted names give the label numbers.
        load: opens it (and may fail).
        test: whether it belongs to the source's own test set.
        val: whether it belongs to the source's own validation set.
    """

    path: str
    label: str
    load: Callable[[], Image.Image]
    test: bool = False
    val: bool = False


def read_items(dataset: Dataset, data_root: Path) -> list[Item]:
    """All images of a dataset, in a stable order.

    Args:
        dataset: what the config says of it.
        data_root: folder with downloads and archives.

    Raises:
        HovitError: if something is missing or is not what it should be.
    """
    items = READERS[dataset.reader](dataset, data_root)
    if not items:
        raise HovitError(f"{dataset.id}: no images found under {data_root}")
    (path, times), *_ = Counter(item.path for item in items).most_common(1)
    if times > 1:  # it could be trained on and tested with
        raise HovitError(f"{path}: listed {times} times in dataset {dataset.id}")
    return items


def _digits(dataset: Dataset, data_root: Path) -> list[Item]:
    from sklearn.datasets import load_digits

    digits = load_digits()

    def load(i: int) -> Image.Image:
        return Image.fromarray((digits.images[i] * (255 / 16)).round().astype(np.uint8))

    return [
        Item(f"sklearn.datasets.load_digits()[{i}]", str(label), lambda i=i: load(i))  # type: ignore[misc]
        for i, label in enumerate(digits.target)
    ]


def _download(
    build: Callable[[], list[Item]],
    dataset: Dataset,
    data_root: Path,
    what: str = "its archives or folders",
) -> list[Item]:
    """Run a torchvision reader; a failed download or a wrong checksum becomes one line."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # torchvision sets none, and would wait for ever
    try:
        return build()
    except (OSError, RuntimeError) as error:
        if dataset.files:
            raise HovitError(f"{dataset.id}: {data_root}: {one_line(error)}") from None
        raise HovitError(
            f"{dataset.id}: torchvision could not get it into {data_root} ({one_line(error)}); "
            f"without a network, put {what} there by hand"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _oxford_iiit_pet(dataset: Dataset, data_root: Path) -> list[Item]:
    from torchvision.datasets import OxfordIIITPet

    root = data_root
    if dataset.files:
        paths = [find(dataset, data_root, name) for name in dataset.files]
        root = extract(paths, EXTRACTED / dataset.id)  # the data root may be read-only

    def build() -> list[Item]:
        items = []
        for split in ("trainval", "test"):
            try:
                pets = OxfordIIITPet(str(root), split, download=not dataset.files)
            except ValueError as error:  # a line is not `name class species breed`
                where = root / "oxford-iiit-pet/annotations" / f"{split}.txt"
                raise HovitError(f"{where}: a line cannot be read ({error})") from None
            items += [
                (Path(path), label) for path, label in zip(pets._images, pets._labels, strict=True)
            ]
        return _checked_pets(items)

    return _download(build, dataset, root)


def _checked_pets(images: list[tuple[Path, int]]) -> list[Item]:
    """Label pets by number and breed; the image whose breed and number do not go together is named.

    A breed's number is what most of its images have, and the other way round.
    """
    breeds = [re.sub(r"_\d+$", "", path.stem) for path, _ in images]
    numbers = [number for _, number in images]
    pairs = [pair for pair, _ in Counter(zip(breeds, numbers, strict=True)).most_common()]
    number_of = dict(reversed(pairs))
    breed_of = {number: breed for breed, number in reversed(pairs)}
    items = []
    for (path, number), breed in zip(images, breeds, strict=True):
        where = f"{path}: labelled as class {number + 1} in annotations/"
        if not 0 <= number < 37:
            raise HovitError(f"{where}, which is outside 1..37")
        if number_of[breed] != number:
            raise HovitError(
                f"{where}, but most of {breed!r} is class {number_of[breed] + 1}: mislabelled"
            )
        if breed_of[number] != breed:
            raise HovitError(f"{where}, but {breed_of[number]!r} is that class: mislabelled")
        items.append(Item(str(path), f"{number + 1:02d} {breed}", lambda p=path: Image.open(p)))  # type: ignore[misc]
    return sorted(items, key=lambda item: item.path)


def _cifar(dataset: Dataset, data_root: Path) -> list[Item]:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset.reader]

    def build() -> list[Item]:
        items = []
        for test in (False, True):
            cifar = source(str(data_root), train=not test, download=True)
            where = f"{source.__name__} {'test' if test else 'train'}"
            items += [
                Item(f"{where}[{i}]", f"{label:02d} {cifar.classes[label]}",
                     lambda image=image: Image.fromarray(image), test)  # type: ignore[misc]
                for i, (image, label) in enumerate(zip(cifar.data, cifar.targets, strict=True))
            ]  # fmt: skip
        return items

    return _download(build, dataset, data_root)


FLOWERS = ("flowers-102/102flowers.tgz", "flowers-102/imagelabels.mat", "flowers-102/setid.mat")


def _flowers102(dataset: Dataset, data_root: Path) -> list[Item]:
    from torchvision.datasets import Flowers102

    def build() -> list[Item]:
        items = []
        for split in ("train", "val", "test"):
            flowers = Flowers102(str(data_root), split, download=True)
            items += [
                _numbered(path, number, Flowers102.classes, split)
                for path, number in zip(flowers._image_files, flowers._labels, strict=True)
            ]
        return sorted(items, key=lambda item: item.path)

    return _download(build, dataset, data_root, ", ".join(FLOWERS))


CARS = (
    "cars_train", "cars_test", "cars_test_annos_withlabels.mat", "devkit/cars_meta.mat",
    "devkit/cars_train_annos.mat",
)  # fmt: skip


def _stanford_cars(dataset: Dataset, data_root: Path) -> list[Item]:
    from torchvision.datasets import StanfordCars

    base = data_root / "stanford_cars"
    if missing := [name for name in CARS if not (base / name).exists()]:
        raise HovitError(
            f"{dataset.id}: {base / missing[0]}: not found, and its authors' download is gone; get "
            f"the images and labels elsewhere and put into {base}: {', '.join(CARS)}"
        )
    items = []
    for split in ("train", "test"):
        try:
            cars = StanfordCars(str(data_root), split)
            found = [(Path(path), int(number)) for path, number in cars._samples]
        except Exception as error:  # scipy's reader stumbles in many ways
            labels = base / CARS[2 if split == "test" else 4]
            raise HovitError(
                f"{labels}, or {base / CARS[3]}: cannot be read ({one_line(error)})"
            ) from None
        items += [_numbered(path, number, cars.classes, split) for path, number in found]
    return sorted(items, key=lambda item: item.path)


def _numbered(path: Path, number: int, names: Sequence[str], split: str) -> Item:
    """An image whose class is a number, from 0, with its source's name for it."""
    if not 0 <= number < len(names):
        raise HovitError(f"{path}: labelled as class {number + 1}, outside 1..{len(names)}")
    label = f"{number + 1:03d} {names[number]}"
    return Item(str(path), label, lambda: Image.open(path), split == "test", split == "val")


def _image_folder(dataset: Dataset, data_root: Path) -> list[Item]:
    items = []
    for test, names in ((False, dataset.files), (True, dataset.test_files)):
        for name in names:
            path = find(dataset, data_root, name)
            entries = _zip_entries(path) if path.is_file() else _folder_entries(path)
            for member, load in entries:
                label = PurePosixPath(member).parent.name
                if not label:
                    raise HovitError(f"{path}: {member}: an image outside any class folder")
                items.append(Item(f"{path}/{member}", label, load, test))
    return sorted(items, key=lambda item: (item.test, item.path))


def _folder_entries(root: Path) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path.relative_to(root).as_posix(), lambda p=path: Image.open(p)  # type: ignore[misc]


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip whose members all stay inside it and are of a sane size.

    Raises:
        HovitError: naming the archive, and the member, that is not as it should be.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a broken zip makes zipfile stumble in many ways
        raise HovitError(
            f"{path}: not a readable zip ({one_line(error)}); fetch it again"
        ) from None
    for info in archive.infolist():
        member = PurePosixPath(info.filename.replace("\\", "/"))
        if member.is_absolute() or ".." in member.parts:
            raise HovitError(f"{path}: {info.filename}: a member that leaves the archive's folder")
        if info.file_size > MAX_BYTES:
            raise HovitError(
                f"{path}: {info.filename}: {info.file_size:,} bytes unpacked, too large"
            )
    return archive


def _zip_entries(path: Path) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    archive = open_zip(path)
    for name in sorted(archive.namelist()):
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            yield name, lambda n=name: Image.open(io.BytesIO(archive.read(n)))  # type: ignore[misc]


def find(dataset: Dataset, data_root: Path, name: str) -> Path:
    """A file or folder of a dataset.

    Raises:
        HovitError: if it is not under the data root.
    """
    path = data_root / name
    if not path.exists():
        raise HovitError(
            f"{path}: not found, and dataset {dataset.id} is made of it; put it there, or name the "
            "folder that has it (--data-root, or DATA= with make)"
        )
    return path


def extract(paths: Sequence[Path], folder: Path) -> Path:
    """Unpack zips beside `folder`, wholly or not at all; done once for the same bytes.

    Returns:
        `folder`, with the archives' digest added to its name.

    Raises:
        HovitError: for a broken archive.
    """
    folder = folder.with_name(f"{folder.name}-{digest([file_digest(p) for p in paths])[:12]}")
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    clear_leftovers(folder)
    try:
        for path in paths:
            with open_zip(path) as archive:
                try:
                    archive.extractall(part)
                except Exception as error:  # as above
                    raise HovitError(
                        f"{path}: cannot be unpacked into {folder} ({one_line(error)})"
                    ) from None
        part.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another process was quicker
            raise HovitError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


READERS: dict[str, Callable[[Dataset, Path], list[Item]]] = {
    "digits": _digits,
    "oxford_iiit_pet": _oxford_iiit_pet,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "flowers102": _flowers102,
    "stanford_cars": _stanford_cars,
    "image_folder": _image_folder,
}
