"""Readers of data sets: each returns a list of `Item`.

Sources: the digits of scikit-learn; Oxford-IIIT Pet (Parkhi et al., 2012), CIFAR-10/100
(Krizhevsky, 2009) and Oxford 102 Flower (Nilsback and Zisserman, 2008) through torchvision, which
downloads them and checks their MD5 sums; Stanford Cars (Krause et al., 2013) through torchvision,
without download, because the authors removed it; any ImageFolder tree or a zip of one.
"""

import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..config.schema import Dataset
from ..utils.errors import HovitError, one_line
from ..utils.files import alone
from .decode import open_image
from .listing import extract, list_images, printable

EXTRACTED = Path("data/extracted")
DOWNLOAD_TIMEOUT = 30.0  # seconds without data


@dataclass(frozen=True)
class Item:
    """One labelled image that is not decoded yet.

    Args:
        path: path, or another description, for messages and the manifest.
        label: class name. Label numbers follow the sorted names.
        load: opens the image; can raise any exception.
        test: whether it belongs to a published test set.
        val: whether it belongs to a published validation set.
        orient: whether its EXIF orientation is applied.
    """

    path: str
    label: str
    load: Callable[[], Image.Image]
    test: bool = False
    val: bool = False
    orient: bool = False


def read_items(dataset: Dataset, data_root: Path) -> list[Item]:
    """All images of a data set, in a reproducible order.

    Args:
        dataset: data set of the config.
        data_root: folder with downloads and archives.

    Raises:
        HovitError: naming the file that is missing or invalid.
    """
    items = READERS[dataset.reader](dataset, data_root)
    if not items:
        raise HovitError(f"{dataset.id}: no images found under {data_root}")
    (path, times), *_ = Counter(item.path for item in items).most_common(1)
    if times > 1:  # it could be in the training and the test split
        raise HovitError(f"{printable(path)}: listed {times} times in dataset {dataset.id}")
    for item in items:
        if not item.path.isascii():
            _check_utf8(item.path)
    return items


def _check_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise HovitError(f"{path!a}: the name is not UTF-8; rename the file") from None


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
    """Run a torchvision reader, and turn a failed download or checksum into one line."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none and can wait forever
    try:
        # Two packs of one data set have the same archives. The data root can be read-only.
        with alone(EXTRACTED / dataset.id, wait=True):
            return build()
    except (OSError, RuntimeError) as error:
        if dataset.files:
            raise HovitError(f"{dataset.id}: {data_root}: {one_line(error)}") from None
        raise HovitError(
            f"{dataset.id}: torchvision could not download it to {data_root} ({one_line(error)}); "
            f"without a network, put {what} there by hand"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _oxford_iiit_pet(dataset: Dataset, data_root: Path) -> list[Item]:
    from torchvision.datasets import OxfordIIITPet

    root = data_root
    if dataset.files:
        paths = [find(dataset, data_root, name) for name in dataset.files]
        root = extract(paths, EXTRACTED / dataset.id)  # the data root can be read-only

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
        return _label_pets(items)

    return _download(build, dataset, root)


def _label_pets(images: list[tuple[Path, int]]) -> list[Item]:
    """Label pets by number and breed.

    The number of a breed is the number that most of its images have, and vice versa.

    Raises:
        HovitError: naming an image whose number and breed do not match.
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
        items.append(Item(str(path), f"{number + 1:02d} {breed}", lambda p=path: open_image(p)))  # type: ignore[misc]
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


def _read_cars(data_root: Path, split: str) -> tuple[list[tuple[Path, int]], list[str]]:
    """Path and class of each image of a split, and the names of all classes."""
    from torchvision.datasets import StanfordCars

    cars = StanfordCars(str(data_root), split)
    return [(Path(path), int(number)) for path, number in cars._samples], list(cars.classes)


def _stanford_cars(dataset: Dataset, data_root: Path) -> list[Item]:
    base = data_root / "stanford_cars"
    if missing := [name for name in CARS if not (base / name).exists()]:
        raise HovitError(
            f"{dataset.id}: {base / missing[0]}: not found, and the original download is gone; get "
            f"the images and labels elsewhere and put these into {base}: {', '.join(CARS)}"
        )
    items = []
    for split in ("train", "test"):
        try:
            # In a process of its own, because scipy crashes on some damaged files.
            with ProcessPoolExecutor(1, get_context("fork")) as pool:
                found, names = pool.submit(_read_cars, data_root, split).result()
        except Exception as error:  # scipy raises errors of many types on broken files
            labels = base / CARS[2 if split == "test" else 4]
            raise HovitError(
                f"{labels}, or {base / CARS[3]}: cannot be read ({one_line(error)})"
            ) from None
        items += [_numbered(path, number, names, split) for path, number in found]
    return sorted(items, key=lambda item: item.path)


def _numbered(path: Path, number: int, names: Sequence[str], split: str) -> Item:
    """An image of class `number` (from 0) in a list of class names."""
    if not 0 <= number < len(names):
        raise HovitError(f"{path}: labelled as class {number + 1}, outside 1..{len(names)}")
    label = f"{number + 1:03d} {names[number]}"
    return Item(str(path), label, lambda: open_image(path), split == "test", split == "val")


def _image_folder(dataset: Dataset, data_root: Path) -> list[Item]:
    items = []
    for test, names in ((False, dataset.files), (True, dataset.test_files)):
        for name in names:
            path = find(dataset, data_root, name)
            images = list(list_images(path))
            labels = class_folders([member for member, _ in images], path)
            items += [
                Item(f"{path}/{member}", label, load, test, orient=True)
                for (member, load), label in zip(images, labels, strict=True)
            ]
    return sorted(items, key=lambda item: (item.test, item.path))


def class_folders(members: Sequence[str], path: Path) -> list[str]:
    """The class of each image: its top folder, as in torchvision's ImageFolder.

    A zip often has all images in one folder, as in `train/CLASS/1.jpg`. Folders that contain the
    whole zip are therefore skipped, unless all images lie directly in one folder.

    Args:
        members: paths of images below `path`, with `/`.
        path: the folder or zip.

    Raises:
        HovitError: for an image outside any class folder.
    """
    folders = [PurePosixPath(member).parent.parts for member in members]
    skipped = 0
    if path.is_file() and folders:
        ends = zip(min(folders), max(folders), strict=False)  # what these share, all share
        skipped = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    if len(set(folders)) == 1 and folders[0]:
        skipped = min(skipped, len(folders[0]) - 1)
    for member, folder in zip(members, folders, strict=True):
        if len(folder) <= skipped:
            where = printable(f"{path}: {member}")
            raise HovitError(f"{where}: an image outside any class folder")
    return [folder[skipped] for folder in folders]


def find(dataset: Dataset, data_root: Path, name: str) -> Path:
    """Path of a file or folder of a data set.

    Raises:
        HovitError: if it does not exist under the data root.
    """
    path = data_root / name
    if not path.exists():
        raise HovitError(
            f"{path}: not found, but dataset {dataset.id} needs it; put it there, or name the "
            "folder that has it (--data-root, or DATA= with make)"
        )
    return path


READERS: dict[str, Callable[[Dataset, Path], list[Item]]] = {
    "digits": _digits,
    "oxford_iiit_pet": _oxford_iiit_pet,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "flowers102": _flowers102,
    "stanford_cars": _stanford_cars,
    "image_folder": _image_folder,
}
