"""Images: read, checked, split, packed and made into batches; broken ones are named in one line."""

import hashlib
import io
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fuzz import damaged, damages, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.datasets import ImageFolder

from hovit.config.runs import Pack
from hovit.config.schema import Dataset, Split
from hovit.data import loader
from hovit.data.loader import (
    PackedImages,
    augment,
    crop_flip,
    epoch_batches,
    eval_batches,
    make_loader,
    step_seed,
    to_input,
    usable_workers,
)
from hovit.data.pack import Packed, open_pack, prepare
from hovit.data.readers import read_items
from hovit.utils.errors import HovitError
from hovit.utils.files import alone

try:
    from scipy.io import loadmat, savemat
except ModuleNotFoundError:  # a machine with a GPU; tests of Flowers and Cars need it
    loadmat = savemat = None

CPU = torch.device("cpu")
BREEDS = {1: "Abyssinian", 2: "american_bulldog", 12: "english_setter", 37: "yorkshire_terrier"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Packs and extracted archives go where the test runs."""
    monkeypatch.chdir(tmp_path)


def dataset(reader: str = "image_folder", num_classes: int = 6, **given_: object) -> Dataset:
    what = {"id": "some-data", "title": "t", "about": "a", "split": {"train": 0.5, "val": 0.25}}
    return Dataset(**what | {"reader": reader, "num_classes": num_classes} | given_)


DIGITS = dataset("digits", 10, native_size=8, split={"train": 0.7, "val": 0.15, "seed": 0})


@pytest.mark.parametrize(
    ("title", "is_part", "expected"),
    [
        ("Pets", True, "Pets (part of All pets)"),
        ("Pets (1,033)", True, "Pets (1,033; part of All pets)"),
        ("digits (scikit-learn)", False, "digits (scikit-learn; stands in for All pets)"),
    ],
)
def test_a_title_and_what_it_replaces_share_parentheses(title, is_part, expected) -> None:
    assert dataset(title=title, stands_for="All pets", is_part=is_part).described == expected
    assert dataset(title=title).described == title


def packed(what: Dataset, root: Path | str = ".", size: int = 16) -> Packed:
    pack = Pack(what, size)
    prepare(pack, Path(root))
    return open_pack(pack)


def manifest(what: Dataset, size: int = 16) -> pd.DataFrame:
    return pd.read_csv(Pack(what, size).folder / "manifest.csv", dtype={"class": str})


def refused(what: Dataset, *words: object, root: Path | str = ".", size: int = 16) -> None:
    """`prepare` says, in one line that has all of `words`, what is wrong, and leaves nothing."""
    pack = Pack(what, size)
    with pytest.raises(HovitError) as caught:
        prepare(pack, Path(root))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    assert not pack.folder.exists()
    assert [p for p in Path().rglob("*") if p.suffix in (".part", ".tmp")] == []


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """Smooth, so that JPEG keeps it, and unlike any other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_tree(root: Path | str, classes: int = 6, each: int = 4, first: int = 0) -> Path:
    """An ImageFolder tree of PNGs: class_0/0.png and so on."""
    numbers = itertools.count(first)
    for c in range(classes):
        folder = Path(root) / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(each):
            picture(next(numbers)).save(folder / f"{i}.png")
    return Path(root)


def make_zip(folder: Path | str, target: Path | str, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(Path(folder).rglob("*")):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return Path(target)


# Split sizes


def test_the_decks_split():
    assert Split(train=0.7, val=0.15).sizes(7349) == (5144, 1102, 1103)


def test_an_own_test_set_leaves_the_rest_to_validation():
    assert Split(train=0.9).sizes(50_000, has_test=True) == (45_000, 5_000, 0)
    assert Split(train=0.5, val=0.1).sizes(11, has_test=True) == (5, 6, 0)


@given(
    total=st.integers(0, 10**8),
    train=st.floats(0.001, 0.999),
    rest=st.floats(0, 1),
    has_test=st.booleans(),
)
def test_split_sizes_are_whole(total, train, rest, has_test):
    sizes = Split(train=train, val=(1 - train) * rest).sizes(total, has_test)
    assert sum(sizes) == total
    assert min(sizes) >= 0
    assert abs(sizes[0] - total * train) <= 1


# Digits


def test_digits_pack():
    from sklearn.datasets import load_digits

    pack = packed(DIGITS, size=64)
    assert pack.images.shape == (1797, 8, 8, 3)  # never larger than the source
    assert pack.meta["pixels"] == 8
    assert pack.meta["images"] == {"train": 1257, "val": 269, "test": 271}
    assert {name: len(index) for name, index in pack.splits.items()} == pack.meta["images"]
    assert set(pack.labels) == set(range(10))
    every = np.concatenate(list(pack.splits.values()))
    assert sorted(every) == list(range(1797))

    # each of the source's images once, with its own label
    source = load_digits()
    number = manifest(DIGITS, 64)["path"].str.extract(r"\[(\d+)\]")[0].astype(int).to_numpy()
    assert sorted(number) == list(range(1797))
    assert not np.array_equal(number, np.arange(1797))
    assert np.array_equal(pack.labels, source.target[number])
    grey = (source.images[number] * (255 / 16)).round()
    assert all(np.array_equal(pack.images[..., channel], grey) for channel in range(3))


def test_fingerprint_is_of_the_images_not_the_place(tmp_path):
    pack = Pack(DIGITS, 8)
    one, two = (prepare(pack, Path(), tmp_path / name) for name in ("one", "two/deeper"))
    assert one == two
    assert len(one["fingerprint"]) == 64
    other = DIGITS.model_copy(update={"split": Split(train=0.7, val=0.15, seed=1)})
    assert prepare(Pack(other, 8), Path(), tmp_path / "three")["fingerprint"] != one["fingerprint"]


def test_prepare_again_does_nothing_unless_the_spec_is_another():
    pack = Pack(DIGITS, 8)
    first = prepare(pack, Path())
    images = pack.folder / "images.npy"
    before = images.stat().st_mtime_ns, images.stat().st_ino
    assert prepare(pack, Path()) == first
    assert (images.stat().st_mtime_ns, images.stat().st_ino) == before

    other = Pack(DIGITS.model_copy(update={"split": Split(train=0.5)}), 8)
    assert other.folder == pack.folder
    assert prepare(other, Path())["images"] == {"train": 898, "val": 0, "test": 899}
    assert open_pack(other).meta["fingerprint"] != first["fingerprint"]


def test_two_processes_prepare_one_pack_once(tmp_path):
    """Whatever their process ids: locks decide. The second waits and finds the pack."""
    pack = Pack(DIGITS, 8)
    part = pack.folder.with_name(f".{pack.folder.name}.1.part")  # process 1 is alive
    part.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from hovit.data.pack import prepare; "
        "from hovit.config.runs import Pack; from hovit.config.schema import Dataset; "
        "data = Dataset.model_validate_json(sys.argv[1]); print('up', flush=True); "
        "print(prepare(Pack(data, 8), Path())['fingerprint'])"
    )
    command = [sys.executable, "-c", code, DIGITS.model_dump_json()]
    with alone(pack.folder):
        others = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for other in others:
            assert other.stdout.readline() == "up\n"
        for other in others:  # both wait
            assert other.stderr.readline() == f"{pack.folder}: waiting for another process\n"
        assert part.exists()
        assert not pack.folder.exists()
    printed = [other.communicate(timeout=60) for other in others]
    assert [other.returncode for other in others] == [0, 0], printed
    assert printed[0][0] == printed[1][0] == f"{open_pack(pack).meta['fingerprint']}\n"
    assert [path.name for path in pack.folder.parent.iterdir()] == [pack.folder.name]


def test_a_leftover_of_a_killed_process_with_the_same_id_does_no_harm():
    """In a container every run may be process 7."""
    pack = Pack(DIGITS, 8)
    part = pack.folder.with_name(f".{pack.folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    (part / "images.npy").write_bytes(b"half")
    prepare(pack, Path())
    assert len(open_pack(pack).labels) == 1797
    assert not part.exists()


# Oxford-IIIT Pet, as torchvision reads it


def make_pets(root: Path | str = "pets") -> Path:
    """Five images of each of four breeds; three of them in trainval.txt, two in test.txt."""
    base = Path(root) / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, breed in BREEDS.items():
        for i in range(1, 6):
            picture(100 * number + i, 40, 30).save(base / f"images/{breed}_{i}.jpg", quality=90)
            lines["trainval" if i <= 3 else "test"].append(f"{breed}_{i} {number} 2 {i}")
    for split, of_split in lines.items():
        (base / f"annotations/{split}.txt").write_text("\n".join(of_split) + "\n")
    header = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    listed = [*header, *lines["trainval"], *lines["test"]]
    (base / "annotations/list.txt").write_text("\n".join(listed) + "\n")
    return base


def relabel(base: Path, old: str, new: str, split: str = "trainval") -> None:
    path = base / f"annotations/{split}.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


PETS = dataset("oxford_iiit_pet", 37, files=("pets.zip",))


def test_pets_are_joined_and_keep_their_own_class_numbers():
    make_pets()
    make_zip("pets", "pets.zip")
    pack = packed(PETS)
    assert pack.meta["images"] == {"train": 10, "val": 5, "test": 5}
    table = manifest(PETS)
    assert len(set(table["path"])) == 20
    number_of = {breed: number - 1 for number, breed in BREEDS.items()}  # most breeds are missing
    breeds = [Path(path).stem.rsplit("_", 1)[0] for path in table["path"]]
    assert pack.labels.tolist() == [number_of[breed] for breed in breeds]

    # the folder as torchvision leaves it after a download: the same images, no archive
    shutil.rmtree("data")
    assert (
        packed(dataset("oxford_iiit_pet", 37), "pets").meta["fingerprint"]
        == (pack.meta["fingerprint"])
    )


def test_pets_may_come_in_several_archives():
    make_pets()
    make_zip("pets/oxford-iiit-pet/images", "images.zip", "oxford-iiit-pet/images/")
    make_zip("pets/oxford-iiit-pet/annotations", "lists.zip", "oxford-iiit-pet/annotations/")
    assert (
        len(packed(dataset("oxford_iiit_pet", 37, files=("images.zip", "lists.zip"))).labels) == 20
    )


def test_a_mended_archive_is_unpacked_again():
    base = make_pets()
    (base / "images/Abyssinian_2.jpg").rename("kept.jpg")
    make_zip("pets", "pets.zip")
    refused(PETS, "Abyssinian_2.jpg")
    Path("kept.jpg").rename(base / "images/Abyssinian_2.jpg")
    make_zip("pets", "pets.zip")
    assert len(packed(PETS).labels) == 20


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_image(path: Path) -> None:
    path.write_text("<html>not found</html>")


@pytest.mark.parametrize("spoil", [Path.unlink, _empty, _truncate, _no_image])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_broken_pet_is_named(spoil, zipped):
    spoil(make_pets() / "images/english_setter_4.jpg")
    if zipped:
        make_zip("pets", "pets.zip")
        refused(PETS, "english_setter_4.jpg", "cannot be decoded")
    else:
        refused(dataset("oxford_iiit_pet", 37), "english_setter_4.jpg", root="pets")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # a breed under two numbers; the first line is as suspect as any other
        ("Abyssinian_1 1 ", "Abyssinian_1 37 ", ["Abyssinian_1.jpg", "class 37", "mislabelled"]),
        ("setter_3 12 ", "setter_3 13 ", ["english_setter_3.jpg", "class 13", "mislabelled"]),
        # two breeds under one number
        (
            "english_setter_2",
            "english_pointer_2",
            ["english_pointer_2.jpg", "class 12", "'english_setter'", "mislabelled"],
        ),
        ("Abyssinian_2 1 ", "Abyssinian_2 38 ", ["Abyssinian_2.jpg", "class 38", "1..37"]),
        ("Abyssinian_2 1 ", "Abyssinian_2 0 ", ["Abyssinian_2.jpg", "class 0", "1..37"]),
        # not as torchvision reads it
        ("Abyssinian_2 1 ", "Abyssinian_2 one ", ["trainval.txt", "one"]),
        ("Abyssinian_2 1 2 2", "Abyssinian_2 1", ["trainval.txt"]),
        # in training and test at once
        ("Abyssinian_2 1 ", "Abyssinian_4 1 ", ["Abyssinian_4.jpg", "2 times"]),
    ],
)
def test_a_mislabelled_pet_is_named(old, new, words):
    base = make_pets()
    relabel(base, old, new)
    make_zip("pets", "pets.zip")
    refused(PETS, *words)


@pytest.mark.parametrize("missing", ["annotations/test.txt", "annotations", "images"])
def test_pets_without_a_part_of_them_are_refused(missing):
    base = make_pets()
    path = base / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make_zip("pets", "pets.zip")
    refused(PETS, "some-data", "data/extracted/some-data")


def test_pets_of_more_breeds_than_num_classes_are_refused():
    make_pets()
    refused(dataset("oxford_iiit_pet", 36), "num_classes", "36", root="pets")


@pytest.mark.parametrize(
    ("reader", "where"),
    [
        ("oxford_iiit_pet", "torchvision.datasets.oxford_iiit_pet.download_and_extract_archive"),
        ("cifar10", "torchvision.datasets.cifar.download_and_extract_archive"),
        ("cifar100", "torchvision.datasets.cifar.download_and_extract_archive"),
        ("flowers102", "torchvision.datasets.flowers102.download_and_extract_archive"),
    ],
)
@pytest.mark.parametrize(
    "error", [URLError("Name or service not known"), RuntimeError("File not found or corrupted.")]
)
def test_offline_download_is_one_line(monkeypatch, reader, where, error):
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, download)
    Path("downloads").mkdir()
    reason = getattr(error, "reason", error)
    refused(dataset(reader, 37), "some-data", "downloads", reason, root="downloads")


def test_one_process_at_a_time_downloads_a_data_set(monkeypatch):
    """Two packs of CIFAR-10, at two sizes, have the same archives."""
    said = []

    def download(*_: object, **__: object) -> None:
        folder = Path("data/extracted/some-data")
        with pytest.raises(HovitError, match="in use by another process"), alone(folder):
            pass
        said.append("locked")
        raise RuntimeError("stop")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    with pytest.raises(HovitError, match="stop"):
        read_items(dataset("cifar10", 10), Path("downloads"))
    assert said == ["locked"]


# CIFAR, with a test set of its own


def fake_cifar(monkeypatch, name: str, classes: int) -> dict[bool, SimpleNamespace]:
    """Stands in for torchvision's class: `classes` x 4 training and `classes` x 2 test images."""
    rng = np.random.default_rng(classes)
    parts = {
        train: SimpleNamespace(
            data=rng.integers(0, 256, (classes * each, 32, 32, 3), dtype=np.uint8),
            targets=rng.permutation(np.tile(np.arange(classes), each)).tolist(),
            # CIFAR-100's names are in order and CIFAR-10's are not
            classes=[f"name {(7 * i) % classes:03d}" for i in range(classes)],
        )
        for train, each in ((True, 4), (False, 2))
    }

    def build(root: str, train: bool, download: bool) -> SimpleNamespace:
        return parts[train]

    build.__name__ = name
    monkeypatch.setattr(torchvision.datasets, name, build)
    return parts


@pytest.mark.parametrize(("reader", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_keeps_its_test_set_untouched(monkeypatch, reader, classes):
    parts = fake_cifar(monkeypatch, reader.upper(), classes)
    pack = packed(dataset(reader, classes, native_size=32, split={"train": 0.9}), size=224)
    n = classes * 4
    assert pack.meta["images"] == {
        "train": n * 9 // 10,
        "val": n - n * 9 // 10,
        "test": classes * 2,
    }
    # all of the test set, in its order, with its own numbers
    test = pack.splits["test"]
    assert np.array_equal(pack.images[test], parts[False].data)
    assert pack.labels[test].tolist() == parts[False].targets
    # train and validation: the training part and nothing else, shuffled
    rest = np.concatenate([pack.splits["train"], pack.splits["val"]])
    mine = {
        (i.tobytes(), int(y)) for i, y in zip(pack.images[rest], pack.labels[rest], strict=True)
    }
    source = zip(parts[True].data, parts[True].targets, strict=True)
    assert mine == {(i.tobytes(), y) for i, y in source}
    assert not np.array_equal(pack.images[rest], parts[True].data)


# Oxford 102 Flower, with splits of its own, and Stanford Cars, which nobody downloads any more

KINDS = (1, 2, 5, 40, 101, 102)  # of the 102 flowers, those that these six have
FLOWERS = dataset("flowers102", len(KINDS), split={"train": 0.9})


def make_flowers(monkeypatch: pytest.MonkeyPatch, **labels: int) -> Path:
    """Four images of each of six flowers, as published: an archive, and two files of labels.

    Their checksums take the place of the real ones'.
    """
    base = Path("flowers-102")
    base.mkdir()
    of_image = [KINDS[i % len(KINDS)] for i in range(24)]
    with tarfile.open(base / "102flowers.tgz", "w:gz") as archive:
        for i in range(1, 25):
            data = io.BytesIO()
            picture(i, 40, 30).save(data, "jpeg")
            member = tarfile.TarInfo(f"jpg/image_{i:05d}.jpg")
            member.size = data.tell()
            data.seek(0)
            archive.addfile(member, data)
    of_image[0] = labels.get("first", of_image[0])
    savemat(base / "imagelabels.mat", {"labels": np.array([of_image], dtype=np.uint8)})
    ids = {"trnid": [22, 8, 15, 1, 12, 5], "valid": [2, 9, 16, 23, 6]}  # splits are no ranges
    ids["tstid"] = sorted(set(range(1, 25)) - set(ids["trnid"]) - set(ids["valid"]))
    if "twice" in labels:
        ids["tstid"][0] = ids["trnid"][0]
    savemat(base / "setid.mat", ids)
    sums = {
        part: (name, hashlib.md5((base / name).read_bytes()).hexdigest())
        for part, (name, _) in torchvision.datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", sums)
    return base


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_flowers_keep_their_own_three_splits(monkeypatch):
    base = make_flowers(monkeypatch)
    no_network(monkeypatch)
    pack = packed(FLOWERS)
    assert pack.meta["images"] == {"train": 6, "val": 5, "test": 13}
    table = manifest(FLOWERS)
    ids = loadmat(base / "setid.mat", squeeze_me=True)
    for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        paths = table["path"][table["split"] == split]
        assert sorted(int(path[-9:-4]) for path in paths) == sorted(ids[name])
    numbers = [int(path[-9:-4]) for path in table["path"]]
    assert pack.labels.tolist() == [(i - 1) % len(KINDS) for i in numbers]
    assert set(table["class"]) >= {"001 pink primrose", "102 blackberry lily"}
    # shuffled, by the seed
    train = [
        number for number, split in zip(numbers, table["split"], strict=True) if split != "test"
    ]
    assert train[:6] != sorted(train[:6])

    (base / "102flowers.tgz").unlink()  # once unpacked
    shutil.rmtree("data")
    assert packed(FLOWERS).meta["fingerprint"] == pack.meta["fingerprint"]


@pytest.mark.parametrize("name", ["102flowers.tgz", "imagelabels.mat", "setid.mat"])
@pytest.mark.parametrize("spoil", [Path.unlink, _truncate])
def test_flowers_by_hand_that_are_not_whole_say_what_belongs_there(monkeypatch, name, spoil):
    base = make_flowers(monkeypatch)
    no_network(monkeypatch)
    spoil(base / name)
    refused(FLOWERS, "flowers-102/102flowers.tgz", "imagelabels.mat", "setid.mat", "by hand")


def test_a_wrong_flower_is_named(monkeypatch):
    base = make_flowers(monkeypatch, first=103)
    refused(FLOWERS, "image_00001.jpg", "class 103", "1..102")
    shutil.rmtree(base)
    base = make_flowers(monkeypatch, twice=1)
    refused(FLOWERS, "listed 2 times")
    shutil.rmtree(base)
    base = make_flowers(monkeypatch)
    packed(FLOWERS)
    shutil.rmtree("data")
    (base / "jpg/image_00007.jpg").unlink()
    refused(FLOWERS, "image_00007.jpg", "cannot be decoded")


CARS = dataset("stanford_cars", 4, split={"train": 0.75})
MODELS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Audi TT, 2011", "smart"]


def make_cars(train: int = 8, **labels: int) -> Path:
    """A few images of four cars in the published layout; annotations as Matlab's structs."""
    base = Path("stanford_cars")
    (base / "devkit").mkdir(parents=True)
    for split, where in (
        ("train", "devkit/cars_train_annos"),
        ("test", "cars_test_annos_withlabels"),
    ):
        (base / f"cars_{split}").mkdir()
        rows = []
        for i in range(1, (train if split == "train" else 5) + 1):
            name = f"{i:05d}.jpg"
            picture(i + 100 * (split == "test"), 40, 30).save(base / f"cars_{split}/{name}")
            number = labels.get(f"{split}_{i}", i % 4 + 1)
            rows.append((3, 3, 37, 27, np.uint8(number), name))
        fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        array = np.array([rows], dtype=[(field, object) for field in fields])
        savemat(base / f"{where}.mat", {"annotations": array})
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([MODELS], dtype=object)})
    return base


def test_cars_keep_their_test_set_untouched():
    make_cars()
    pack = packed(CARS)
    assert pack.meta["images"] == {"train": 6, "val": 2, "test": 5}
    table = manifest(CARS)
    for path, split, label in zip(table["path"], table["split"], table["label"], strict=True):
        assert (Path(path).parent.name == "cars_test") == (split == "test")
        assert label == int(Path(path).stem) % 4
    assert set(table["class"]) == {f"{i:03d} {name}" for i, name in enumerate(MODELS, 1)}


PARTS = ["cars_train", "cars_test", "cars_test_annos_withlabels.mat", "devkit/cars_meta.mat",
         "devkit/cars_train_annos.mat"]  # fmt: skip


@pytest.mark.parametrize("missing", PARTS)
def test_cars_that_are_not_there_say_where_they_go(missing):
    path = make_cars() / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(CARS, f"stanford_cars/{missing}: not found", "download is gone", *PARTS)


def _no_struct(path: Path) -> None:
    savemat(path, {"other": [1, 2]})


@pytest.mark.parametrize("spoil", [_empty, _truncate, _no_image, _no_struct])
@pytest.mark.parametrize("name", PARTS[2:])
def test_labels_of_cars_that_cannot_be_read_are_named(name, spoil):
    spoil(make_cars() / name)
    refused(CARS, name, "cannot be read")


def _crash(data_root: Path, split: str) -> None:
    """As scipy does on some damaged files."""
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_on_labels_of_cars_is_one_line(monkeypatch):
    make_cars()
    monkeypatch.setattr("hovit.data.readers._read_cars", _crash)
    refused(CARS, "devkit/cars_train_annos.mat", "cannot be read", "terminated abruptly")


def test_a_wrong_car_is_named():
    base = make_cars(train_3=5)
    refused(CARS, "cars_train/00003.jpg", "class 5", "1..4")
    shutil.rmtree(base)
    (make_cars() / "cars_test/00002.jpg").unlink()
    refused(CARS, "cars_test/00002.jpg", "cannot be decoded")


# Image folders and zips of them


def test_a_folder_and_its_zip_are_the_same():
    make_tree("tree")
    make_zip("tree", "tree.zip")
    make_zip("tree", "deeper.zip", "some/where/")
    metas = [
        packed(dataset(id=name.replace(".", "-"), files=(name,))).meta
        for name in ("tree", "tree.zip", "deeper.zip")
    ]
    assert len({meta["fingerprint"] for meta in metas}) == 1
    assert metas[0]["images"] == {"train": 12, "val": 6, "test": 6}


def test_the_class_is_the_top_folder_as_in_torchvision():
    make_tree("tree")
    for c in range(6):  # n01443537/images/0.png, as Tiny-ImageNet has it
        inner = Path(f"tree/class_{c}/images/more")
        inner.mkdir(parents=True)
        for image in Path(f"tree/class_{c}").glob("[0-1].png"):
            image.rename(inner / image.name)
    make_zip("tree", "deeper.zip", "some/where/")
    wanted = ImageFolder("tree")
    assert sum("/images/more/" in path for path, _ in wanted.samples) == 12
    for name in ("tree", "deeper.zip"):
        what = dataset(id=name.replace(".", "-"), files=(name,))
        packed(what)
        table = manifest(what)
        inside = table["path"].str.removeprefix(f"{name}/").str.removeprefix("some/where/")
        classes = [
            (f"tree/{path}", wanted.class_to_idx[c])
            for path, c in zip(inside, table["class"], strict=True)
        ]
        assert sorted(classes) == sorted(wanted.samples)


def test_a_zip_of_one_class_is_that_class():
    for c in range(6):
        make_zip(
            make_tree(f"tree-{c}", classes=1, first=100 * c) / "class_0", f"{c}.zip", f"all/n{c}/"
        )
    what = dataset(files=tuple(f"{c}.zip" for c in range(6)))
    packed(what)
    assert set(manifest(what)["class"]) == {f"n{c}" for c in range(6)}


def test_an_image_beside_the_class_folders_of_a_zip_is_named():
    make_tree("tree")
    picture(99).save("tree/stray.png")
    make_zip("tree", "tree.zip", "train/")
    refused(dataset(files=("tree.zip",)), "train/stray.png", "class folder")


def test_labels_go_by_sorted_class_names_and_images_by_their_paths():
    make_tree("tree")
    what = dataset(files=("tree",))
    pack, table = packed(what, size=20), manifest(what, 20)
    assert table["label"].tolist() == [int(name[-1]) for name in table["class"]]
    for i, path in enumerate(table["path"]):
        assert Path(path).parent.name == table["class"][i]
        expected = Image.open(path).resize((20, 20), Image.Resampling.BILINEAR)
        assert np.array_equal(pack.images[i], np.asarray(expected))


def test_several_archives_are_joined_and_one_given_twice_is_refused():
    make_zip(make_tree("a"), "a.zip")
    make_zip(make_tree("b", first=100), "b.zip")
    pack = packed(dataset(files=("a.zip", "b.zip")))
    assert len(pack.labels) == 48
    refused(dataset(id="twice", files=("a.zip",), test_files=("a.zip",)), "a.zip", "2 times")


def test_test_files_are_the_test_split():
    make_tree("train", each=4)
    make_tree("held-out", each=3, first=100)
    what = dataset(files=("train",), test_files=("held-out",), split={"train": 0.75})
    assert packed(what).meta["images"] == {"train": 18, "val": 6, "test": 18}
    table = manifest(what)
    held_out = table["path"].str.startswith("held-out")
    assert (held_out == (table["split"] == "test")).all()


def test_a_class_that_only_the_test_set_has_is_refused():
    make_tree("train", classes=5)
    make_tree("held-out", classes=6)
    what = dataset(files=("train",), test_files=("held-out",), split={"train": 0.75})
    refused(what, "held-out/class_5/0.png", "class_5")


def test_class_draws_are_disjoint():
    make_tree("tree")
    drawn = []
    for classes in ((0, 3), (3, 6)):
        what = dataset("image_folder", 3, id=f"from-{classes[0]}", files=("tree",), classes=classes)
        pack = packed(what)
        assert len(pack.labels) == 12
        assert set(pack.labels) == {0, 1, 2}
        drawn.append(set(manifest(what)["class"]))
    assert drawn[0] | drawn[1] == {f"class_{c}" for c in range(6)}
    assert not drawn[0] & drawn[1]


@pytest.mark.parametrize("classes", [(4, 7), (9, 12), (3, 3)])
def test_a_class_draw_beyond_the_classes_is_refused(classes):
    make_tree("tree")
    refused(dataset(num_classes=3, files=("tree",), classes=classes), "some-data", "6 classes")


def test_images_are_drawn():
    make_tree("tree")
    what = dataset(files=("tree",), images=20)
    assert packed(what).meta["images"] == {"train": 10, "val": 5, "test": 5}
    drawn = manifest(what)["path"].tolist()
    assert len(set(drawn)) == 20
    other = dataset(id="other", files=("tree",), images=20, split={"train": 0.5, "seed": 1})
    packed(other)
    assert set(manifest(other)["path"]) != set(drawn)
    refused(dataset(id="more", files=("tree",), images=25), "more", "24", "25")


def test_a_wrong_num_classes_is_refused():
    make_tree("tree")
    for number in (5, 7):
        refused(
            dataset(num_classes=number, files=("tree",)),
            "6 classes", "num_classes", number, "config/datasets/some-data.yaml",
        )  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_an_image_outside_any_class_is_named(zipped):
    make_tree("tree")
    picture(99).save("tree/stray.png")
    make_zip("tree", "tree.zip")
    refused(dataset(files=("tree.zip" if zipped else "tree",)), "stray.png", "class folder")


def test_nothing_there():
    Path("tree/class_0").mkdir(parents=True)
    Path("tree/class_0/notes.txt").write_text("no image")
    refused(dataset(files=("tree",)), "some-data", "no images")


@pytest.mark.parametrize("reader", ["image_folder", "oxford_iiit_pet"])
def test_a_missing_archive_is_named_with_what_to_do(reader):
    refused(
        dataset(reader, files=("gone.zip",)), "downloads/gone.zip", "--data-root", root="downloads"
    )


def _rewritten(change: Callable[[bytearray], object], **kwargs: int) -> None:
    """pets.zip with some of its bytes changed."""
    make_tree("tree")
    with zipfile.ZipFile("pets.zip", "w", **kwargs) as archive:
        for path in sorted(Path("tree").rglob("*.png")):
            archive.write(path)
    data = bytearray(Path("pets.zip").read_bytes())
    change(data)
    Path("pets.zip").write_bytes(data)


def _member(name: str) -> None:
    make_tree("tree")
    make_zip("tree", "pets.zip")
    with zipfile.ZipFile("pets.zip", "a") as archive:
        archive.writestr(name, Path("tree/class_0/0.png").read_bytes())


def _halved(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _huge(data: bytearray) -> None:
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 2**31)  # in the directory


def _future(data: bytearray) -> None:
    data[data.index(b"PK\x01\x02") + 6] = 199  # version needed


def _encrypted(data: bytearray) -> None:
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1


def _garbled(data: bytearray) -> None:
    start = data.index(b"PK\x03\x04") + 30 + len("tree/class_0/0.png")
    data[start : start + 40] = b"\xff" * 40


BAD_ZIPS = {
    "up": (lambda: _member("class_0/../../evil.png"), "evil.png"),
    "backslashes": (lambda: _member("class_0\\..\\..\\evil.png"), "evil.png"),
    "absolute": (lambda: _member("/tmp/class_0/evil.png"), "evil.png"),
    "no zip": (lambda: Path("pets.zip").write_text("<html>try again later</html>"), "zip"),
    "empty": (lambda: Path("pets.zip").write_bytes(b""), "zip"),
    "truncated": (lambda: _rewritten(_halved), ""),
    "huge": (lambda: _rewritten(_huge), "2,147,483,648"),
    "from the future": (lambda: _rewritten(_future), ""),
    "encrypted": (lambda: _rewritten(_encrypted), "encrypted"),
    "garbled": (lambda: _rewritten(_garbled), ""),
    "garbled, packed": (lambda: _rewritten(_garbled, compression=zipfile.ZIP_DEFLATED), ""),
}  # fmt: skip


@pytest.mark.parametrize("reader", ["image_folder", "oxford_iiit_pet"])
@pytest.mark.parametrize(("make", "word"), BAD_ZIPS.values(), ids=BAD_ZIPS)
def test_a_bad_zip_is_named(tmp_path, reader, make, word):
    (tmp_path / "here").mkdir()
    make()
    refused(dataset(reader, files=("pets.zip",)), "pets.zip", word)
    assert not list(tmp_path.parent.glob("**/evil.png"))
    assert not Path("/tmp/class_0").exists()


def png_of(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_named():
    make_tree("tree")
    Path("tree/class_3/bomb.png").write_bytes(png_of(50_000, 50_000))
    refused(dataset(files=("tree",)), "tree/class_3/bomb.png", "decompression bomb")


def test_pils_mere_warning_of_a_bomb_is_an_error_too(monkeypatch):
    make_tree("tree", each=30)
    picture(99, 30, 30).save("tree/class_5/zz.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 20)
    before = list(warnings.filters)
    refused(dataset(files=("tree",)), "tree/class_5/zz.png", "decompression bomb")
    assert warnings.filters == before  # decoding threads must not leave their own behind


# Opening a pack


def _flip(folder: Path) -> None:
    data = bytearray((folder / "images.npy").read_bytes())
    data[-1] ^= 1
    (folder / "images.npy").write_bytes(data)


def _cut(folder: Path) -> None:
    os.truncate(folder / "images.npy", 5_000)


def _relabel(folder: Path) -> None:
    table = pd.read_csv(folder / "manifest.csv", index_col="index")
    table.loc[3, "label"] = (table.loc[3, "label"] + 1) % 10
    table.to_csv(folder / "manifest.csv")


def _move(folder: Path) -> None:
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace(",test,", ",train,", 1))


def _lose_line(folder: Path) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join(lines[:-1]) + "\n")


@pytest.mark.parametrize(
    "spoil",
    [
        _flip,
        _cut,
        _relabel,
        _move,
        _lose_line,
        lambda folder: (folder / "images.npy").unlink(),
        lambda folder: (folder / "manifest.csv").write_bytes(b""),
        lambda folder: (folder / "manifest.csv").write_bytes(b"\xff\xfe\x00garbage\n\n,,,"),
        lambda folder: (folder / "pack.json").write_text("{"),
    ],
)
def test_a_changed_pack_is_not_opened(spoil):
    pack = Pack(DIGITS, 8)
    prepare(pack, Path())
    open_pack(pack)
    spoil(pack.folder)
    with pytest.raises(HovitError, match=str(pack.folder)) as caught:
        open_pack(pack)
    assert "\n" not in str(caught.value)


def test_a_pack_that_is_missing_or_of_another_spec_is_not_opened():
    pack = Pack(DIGITS, 8)
    with pytest.raises(HovitError, match="hovit data some-data-8px"):
        open_pack(pack)
    prepare(pack, Path())
    for change in ({"split": Split(train=0.7, val=0.15, seed=1)}, {"num_classes": 11}):
        other = Pack(DIGITS.model_copy(update=change), 8)
        with pytest.raises(HovitError, match=r"config/datasets/some-data\.yaml"):
            open_pack(other)
    open_pack(Pack(DIGITS.model_copy(update={"title": "only the title"}), 8))


# Batches


def batch_of(n: int, size: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def test_pack_and_input_equal_torchvisions_transforms():
    """Resize, ToTensor, Normalize: the deck's own pipeline, on images larger than the input."""
    rng = np.random.default_rng(0)
    for c, (width, height) in enumerate([(150, 100), (97, 131), (64, 200)]):
        for i in range(2):
            Path(f"tree/class_{c}").mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(f"tree/class_{c}/{i}.png")
    picture(5, 90, 80).convert("L").save("tree/class_0/grey.png")
    picture(6, 90, 80).quantize(16).save("tree/class_1/palette.png")
    size = 48
    theirs = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    what = dataset(num_classes=3, files=("tree",))
    pack = packed(what, size=size)
    ours = to_input(torch.from_numpy(np.array(pack.images)), size)
    expected = torch.stack(
        [theirs(Image.open(p).convert("RGB")) for p in manifest(what, size)["path"]]
    )
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape == (8, 3, size, size)
    assert (ours - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [8, 20, 33, 64])
def test_to_input_resizes_as_pil_does(size):
    """Up and down, with antialiasing, to a grey level: PIL rounds, the device does not."""
    images = batch_of(3, 20)
    before = images.clone()
    x = to_input(images, size)
    assert torch.equal(images, before)
    assert x.is_contiguous(memory_format=torch.channels_last)  # quicker to convolve
    assert x.shape == (3, 3, size, size)
    assert x.dtype == torch.float32
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    levels = ((x * std + mean) * 255).permute(0, 2, 3, 1)
    for ours, image in zip(levels, images, strict=True):
        pil = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
        assert (ours - torch.from_numpy(np.array(pil)).float()).abs().max() < 1.01


def test_to_input_normalises_each_channel():
    colour = torch.tensor([10, 128, 250], dtype=torch.uint8)
    x = to_input(colour.expand(2, 12, 12, 3), 24)
    for channel in range(3):
        mean, std = IMAGENET_DEFAULT_MEAN[channel], IMAGENET_DEFAULT_STD[channel]
        expected = torch.full((2, 24, 24), (colour[channel].item() / 255 - mean) / std)
        torch.testing.assert_close(x[:, channel], expected)


def test_loader_gives_the_batches_asked_for():
    pack = packed(DIGITS, size=8)
    images = PackedImages(pack, CPU)
    assert len(images) == 1797
    batches = epoch_batches(pack.splits["val"], 32, 0, 0)
    given_ = list(make_loader(images, batches, CPU))
    assert len(given_) == len(batches) == 8
    for (x, y), index in zip(given_, batches, strict=True):
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert np.array_equal(x.numpy(), pack.images[index])
        assert np.array_equal(y.numpy(), pack.labels[index])


@pytest.mark.parametrize(("free", "workers"), [(0, 0), (2, 0), (3, 1), (6, 2), (7, 3), (100, 3)])
def test_workers_fit_into_shared_memory(monkeypatch, capsys, free, workers):
    """Each worker has two batches in flight, and the loop holds one."""
    usage = SimpleNamespace(free=free * 1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert usable_workers(3, 1_000_000) == workers
    assert usable_workers(3, 0) == 0  # resumed at the end of an epoch: no batch is left
    said = capsys.readouterr().err
    assert said.count("\n") == (workers < 3)
    assert workers == 3 or (f"{free} MB free" in said and "--shm-size" in said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("free", [0, 10**12])
def test_loader_gives_the_same_on_and_off_the_accelerator(monkeypatch, free):
    monkeypatch.setattr(loader, "_free_memory", lambda _: free)
    pack, device = packed(DIGITS, size=8), torch.device("cuda")
    images = PackedImages(pack, device)
    assert images.on_device == (free > 0)
    batches = epoch_batches(pack.splits["val"], 32, 0, 0)
    for (x, y), index in zip(make_loader(images, batches, device), batches, strict=True):
        assert np.array_equal(x.cpu().numpy(), pack.images[index])
        assert np.array_equal(y.cpu().numpy(), pack.labels[index])


@settings(deadline=None)
@given(
    n=st.integers(1, 80),
    each=st.integers(1, 6),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
)
def test_epoch_batches(n, each, world, seed, epoch):
    indices, size = np.arange(n) * 3 + 5, each * world
    if n < size:
        with pytest.raises(HovitError, match=f"{n} training images"):
            epoch_batches(indices, size, seed, epoch, 0, world)
        return
    whole = epoch_batches(indices, size, seed, epoch)
    assert [len(batch) for batch in whole] == [size] * (n // size)
    seen = np.concatenate(whole)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(indices)
    again = epoch_batches(indices, size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    ranks = [epoch_batches(indices, size, seed, epoch, rank, world) for rank in range(world)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [len(part) for part in parts] == [each] * world
        assert sorted(np.concatenate(parts)) == sorted(batch)


def test_every_epoch_and_seed_has_its_own_order():
    orders = {
        tuple(np.concatenate(epoch_batches(np.arange(96), 32, seed, epoch)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_processes_must_divide_the_batch():
    with pytest.raises(HovitError, match="a batch of 32 is not divisible by 3 processes"):
        epoch_batches(np.arange(100), 32, 0, 0, 0, 3)


@settings(deadline=None)
@given(n=st.integers(1, 60), size=st.integers(1, 16), world=st.sampled_from([1, 2, 3]))
def test_eval_batches_cover_everything_in_order(n, size, world):
    indices = np.arange(n) * 2 + 1
    ranks = [eval_batches(indices, size, rank, world) for rank in range(world)]
    shapes = [[len(batch) for batch in batches] for batches in ranks]
    assert shapes == [shapes[0]] * world  # collectives need as many everywhere
    assert max(shapes[0]) <= size
    joined = np.stack([np.concatenate(batches) for batches in ranks], axis=1).flatten()
    assert joined[:n].tolist() == indices.tolist()
    assert len(joined) - n < world


# Augmentation


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(seed: int, n: int) -> torch.Tensor:
    return torch.rand(4, n, generator=generator(seed))


def test_crop_flip_is_its_seeds():
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(crop_flip(x, numbers(1, len(x))), crop_flip(x, numbers(1, len(x))))
    assert not torch.equal(crop_flip(x, numbers(1, len(x))), crop_flip(x, numbers(2, len(x))))


def test_crop_flip_draws_for_every_image_and_stays_in_range():
    x = torch.randn(1, 3, 16, 16, generator=generator(0)).expand(8, -1, -1, -1)
    y = crop_flip(x, numbers(0, len(x)))
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)  # as to_input gives it
    for a, b in itertools.combinations(y, 2):
        assert not torch.equal(a, b)
    assert y.min() >= x.min() - 1e-5
    assert y.max() <= x.max() + 1e-5


def test_crop_flip_keeps_60_to_100_percent_and_mirrors_only_sideways():
    n, size = 200, 32
    ramp = (torch.arange(size) + 0.5) / size
    across = ramp.expand(n, 1, size, size)
    x = torch.cat([across, across.transpose(2, 3)], dim=1)
    y = crop_flip(x, numbers(3, len(x)))
    # slope from the middle of the image, where no border is reflected
    middle = slice(size // 4, -(size // 4))
    slopes = [
        (y[:, 0, :, middle].diff(dim=2).mean((1, 2)) * size),
        (y[:, 1, middle, :].diff(dim=1).mean((1, 2)) * size),
    ]
    side = slopes[0].abs()
    assert 0.599 <= side.min() < 0.65
    assert 0.95 < side.max() <= 1.001
    torch.testing.assert_close(slopes[1], side, atol=1e-3, rtol=0)  # upright, square
    mirrored = (slopes[0] < 0).float().mean()
    assert 0.35 < mirrored < 0.65


def test_augment_leaves_the_global_state_alone():
    x = torch.randn(2, 3, 16, 16)
    state = torch.get_rng_state()
    assert augment(x, "none", (0, 0, 0, 0)) is x
    one = augment(x, "crop_flip", (0, 0, 0, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, augment(x, "crop_flip", (0, 0, 0, 0)))
    for other in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        assert not torch.equal(one, augment(x, "crop_flip", other))


def test_step_seeds_are_distinct():
    parts = list(itertools.product(range(4), range(10), range(50), range(2)))
    seeds = {step_seed(p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed((0, 1, 2, 3)) == step_seed([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("make", "reader", "name"),
    [
        *((make_cars, CARS, f"stanford_cars/{name}") for name in PARTS[2:]),
        *(
            (make_pets, dataset("oxford_iiit_pet", 37), f"pets/oxford-iiit-pet/annotations/{name}")
            for name in ("trainval.txt", "test.txt")
        ),
    ],
    ids=lambda each: each.rpartition("/")[2] if isinstance(each, str) else "",
)
def test_a_damaged_list_of_labels_is_one_line_or_a_list(make, reader, name):
    """Only the lists without a published checksum; torchvision refuses the others unread."""
    make()
    path = Path(name)
    original = path.read_bytes()
    refusals = []

    @fuzz(15)
    @given(damage=damages)
    def run(damage):
        path.write_bytes(damaged(original, damage))
        try:
            items = read_items(reader, Path("pets" if make is make_pets else "."))
        except HovitError as error:
            refusals.append(str(error))
            assert "\n" not in refusals[-1]
        else:
            assert all(isinstance(item.label, str) for item in items)

    run()
    assert refusals
