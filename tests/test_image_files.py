"""ImageNet in place: folders or archives, a resumable order, one line for each damaged file."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, small_run
from PIL import Image
from timm.data import create_transform

from hovit.config.plan import Plan, load_plan
from hovit.config.runs import Pack
from hovit.config.schema import Dataset
from hovit.data.augmented import AugmentedImages, load_images, random_crop, with_positions
from hovit.data.image_files import (
    DEVKIT,
    META,
    TRAIN_TAR,
    VAL_LABELS,
    VAL_TAR,
    open_files,
    prepare,
)
from hovit.pipeline.train import prepare_pack
from hovit.training.classification import train
from hovit.training.trainer import Options, make_fabric
from hovit.utils.errors import HovitError, OutOfTime

CLASSES = ("n01440764", "n01443537", "n01484850")
TREE = Dataset(
    id="tree", title="a tree", about="a tree", reader="imagenet", num_classes=3,
    files=("imagenet",), published=(42, 9), split={"train": 0.8, "seed": 0},
)  # fmt: skip
PACK = Pack(TREE, 64)


def jpeg(seed: int, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> bytes:
    """A smooth picture, so that JPEG changes it little."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    content = io.BytesIO()
    picture = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    picture.save(content, "JPEG", quality=95)
    return content.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A data root with a small ImageNet: 14 training and 3 validation images of each class."""
    for c, name in enumerate(CLASSES):
        for split, count in (("train", 14), ("val", 3)):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                number = 100 * c + i + 50 * (split == "val")
                stem = f"{name}_{i}" if split == "train" else f"ILSVRC2012_val_{3 * c + i + 1:08d}"
                (folder / f"{stem}.JPEG").write_bytes(jpeg(number))
    return tmp_path


def to_archives(root: Path) -> None:
    """Replace the folders by the archives that ImageNet is published as."""
    base = root / "imagenet"
    with tarfile.open(base / TRAIN_TAR, "w") as outer:
        for folder in sorted((base / "train").iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for path in sorted(folder.iterdir(), reverse=True):  # in any order
                    inner.add(path, path.name)
            info = tarfile.TarInfo(f"{folder.name}.tar")
            info.size = len(content.getvalue())
            outer.addfile(info, io.BytesIO(content.getvalue()))
    images = sorted((base / "val").glob("*/*"), key=lambda path: path.name)
    with tarfile.open(base / VAL_TAR, "w") as archive:
        for path in images:
            archive.add(path, path.name)
    numbers = {name: 7 - i for i, name in enumerate(CLASSES)}  # not in the order of the names
    synsets = np.array(
        [(numbers[name], name, 0) for name in CLASSES] + [(9, "n00001740", 3)],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "U9"), ("num_children", "i4")],
    )
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    labels = "\n".join(str(numbers[path.parent.name]) for path in images).encode()
    with tarfile.open(base / DEVKIT, "w:gz") as kit:
        for name, content in ((META, meta.getvalue()), (VAL_LABELS, labels)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            kit.addfile(info, io.BytesIO(content))
    for path in [*images, *(base / "train").glob("*/*")]:
        path.unlink()
    for folder in (*(base / "train").iterdir(), *(base / "val").iterdir()):
        folder.rmdir()
    (base / "train").rmdir()
    (base / "val").rmdir()


def test_folders_and_archives_are_the_same_images(tree: Path) -> None:
    meta = prepare(PACK, tree, tree / "a")
    assert meta["images"] == {"train": 33, "val": 9, "test": 9}
    files = open_files(PACK, tree / "a")
    crops = files.images[np.arange(51)]
    before = sorted(path.name for path in tree.rglob("*") if path.is_file())
    to_archives(tree)
    again = prepare(PACK, tree, tree / "b")
    assert again["fingerprint"] == meta["fingerprint"]
    packed = open_files(PACK, tree / "b")
    np.testing.assert_array_equal(packed.labels, files.labels)
    np.testing.assert_array_equal(packed.images[np.arange(51)], crops)
    assert not set(before) & {p.name for p in tree.rglob("*.JPEG")}  # nothing is unpacked
    assert prepare(PACK, tree, tree / "b") == again
    assert np.bincount(files.labels[files.splits["test"]]).tolist() == [3, 3, 3]
    assert set(files.splits["train"]) | set(files.splits["val"]) == set(range(42))


def test_central_crops_are_those_of_timm(tree: Path) -> None:
    prepare(PACK, tree, tree / "a")
    files = open_files(PACK, tree / "a")
    theirs = create_transform(64, crop_pct=224 / 256, interpolation="bicubic", use_prefetcher=True)
    for i in (0, 50):
        expected = np.asarray(theirs(Image.open(files.path(i)).convert("RGB")))
        if expected.shape[0] == 3:
            expected = expected.transpose(1, 2, 0)
        assert np.abs(files.images[i].astype(int) - expected).max() <= 2


def test_order_and_draws_are_the_same_for_a_resumed_epoch_and_any_workers(tree: Path) -> None:
    prepare(PACK, tree, tree / "a")
    files, cpu = open_files(PACK, tree / "a"), torch.device("cpu")
    images = AugmentedImages(files, "crop_flip", 64, (0, 1))
    batches = with_positions(np.array_split(files.splits["train"][:32], 4), 0, 8)
    whole = list(load_images(images, batches, 64, cpu))
    resumed = list(load_images(images, batches[2:], 64, cpu, workers=2))
    torch.testing.assert_close(resumed, whole[2:], rtol=0, atol=0)
    assert whole[0][1].tolist() == files.labels[files.splits["train"][:8]].tolist()


def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tree / "imagenet/train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    path.write_bytes(jpeg(5, (800, 600)))
    prepare(PACK, tree, tree / "a")
    files = open_files(PACK, tree / "a")
    (index,) = (i for i in range(51) if files.path(i) == path)
    box = (40, 80, 512, 640)  # top, left, height, width
    monkeypatch.setattr(
        "hovit.data.augmented.RandomResizedCropAndInterpolation.get_params", lambda *_: box
    )
    assert tuple(files.decode(files.open(index), index, 8).shape) == (3, 75, 100)
    small = random_crop(files, index, 64).permute(1, 2, 0).numpy().astype(int)
    whole = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC,
                                                   (80, 40, 720, 552))  # fmt: skip
    assert np.abs(small - np.asarray(whole)).mean() < 2


def test_every_kind_of_file_is_decoded_as_pillow_does(tree: Path) -> None:
    folder = tree / "imagenet/train" / CLASSES[0]
    png = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3))).save(png, "PNG")  # ImageNet has a PNG under such a name
    for i, content in enumerate((jpeg(1), jpeg(2, mode="L"), jpeg(3, mode="CMYK"), png.getvalue())):
        (folder / f"{CLASSES[0]}_{i}.JPEG").write_bytes(content)
    prepare(PACK, tree, tree / "a")
    files = open_files(PACK, tree / "a")
    for i in range(4):
        path = folder / f"{CLASSES[0]}_{i}.JPEG"
        (index,) = (k for k in range(51) if files.path(k) == path)
        found = files.decode(files.open(index), index).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(Image.open(path).convert("RGB"))).max() <= 1


def test_every_damaged_file_has_a_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tree / "imagenet/train" / CLASSES[1]
    names = sorted(folder.iterdir())
    names[0].write_bytes(b"")
    names[1].write_bytes(names[1].read_bytes()[:-200])
    names[2].write_bytes(b"<html>not found</html>")
    names[3].write_bytes(names[3].read_bytes() + b"trailing")  # decodable: not damaged
    content = io.BytesIO()
    Image.new("RGB", (80, 80)).save(content, "PNG")  # ImageNet has a PNG under such a name
    names[4].write_bytes(content.getvalue())
    names[5].write_bytes(jpeg(1, mode="CMYK"))
    with pytest.raises(HovitError, match=rf"{names[0].name}: cannot .* \(3 damaged files, named"):
        prepare(PACK, tree, tree / "a")
    lines = capsys.readouterr().err.splitlines()
    assert [str(names[i]) in line for i, line in zip((1, 2), lines, strict=True)] == [True] * 2
    assert not (tree / "a/pack.json").exists()


def test_what_is_missing_is_named(tree: Path) -> None:
    extra = tree / "imagenet/val" / CLASSES[2] / "ILSVRC2012_val_00000009.JPEG"
    content = extra.read_bytes()
    extra.unlink()
    with pytest.raises(HovitError, match="42 training and 8 validation images, but a tree has 42"):
        prepare(PACK, tree, tree / "a")
    stray = extra.parent.with_name("n99999999") / extra.name
    stray.parent.mkdir()
    stray.write_bytes(content)
    with pytest.raises(HovitError, match="val/n99999999: not a class of the training images"):
        prepare(PACK, tree, tree / "a")
    (tree / "imagenet/train").rename(tree / "imagenet/elsewhere")
    with pytest.raises(HovitError, match=r"imagenet/train: not found, and no ILSVRC2012_img_train"):
        prepare(PACK, tree, tree / "a")
    (tree / "imagenet" / TRAIN_TAR).write_bytes(gzip.compress(b"no archive"))
    with pytest.raises(HovitError, match=rf"{TRAIN_TAR}: cannot be read"):
        prepare(PACK, tree, tree / "a")


def test_a_changed_manifest_is_named(tree: Path) -> None:
    prepare(PACK, tree, tree / "a")
    path = tree / "a/manifest.csv"
    path.write_text(path.read_text().replace("train,2,", "train,1,", 1))
    with pytest.raises(HovitError, match=r"manifest\.csv and pack\.json differ"):
        open_files(PACK, tree / "a")
    with pytest.raises(HovitError, match="no such pack; make it with `hovit data tree-64px`"):
        open_files(PACK, tree / "nowhere")


def test_a_stopped_run_on_files_ends_as_one_that_was_not(plan: Plan, tree: Path) -> None:
    recipe = {"augment": "randaugment", "mixup": 0.8, "batch_size": 16, "ema_decay": 0.5}
    run = small_run(plan, dataset=TREE, recipe=recipe, model_args={"depth": [1, 1, 1]}, epochs=1)
    prepare_pack(run.pack, tree, tree / run.pack.folder)
    fabric = make_fabric("32-true", accelerator="cpu")
    straight = train(run, fabric, tree).results
    assert straight["images_test"] == 9
    (tree / run.folder / "record.json").unlink()
    with pytest.raises(OutOfTime):
        train(run, fabric, tree, Options(deadline=0.0))
    files = open_files(run.pack, tree / run.pack.folder)
    path = files.path(files.splits["test"][4])
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(len(content) - 100))
    with pytest.raises(HovitError, match=rf"{path.name}: cannot be decoded") as error:
        train(run, fabric, tree)
    assert "\n" not in str(error.value)
    path.write_bytes(content)
    results = train(run, fabric, tree).results
    for key in ("history", "weights_sha256", "predictions_sha256"):
        assert results[key] == straight[key]


@pytest.mark.exhaustive
def test_two_processes_read_what_one_reads(tmp_path: Path, tree: Path) -> None:
    """torchrun, on CPU: the loss of each step is that of one process (a ViT has no BatchNorm)."""
    work = tmp_path / "work"
    work.mkdir()
    script = work / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
        "from conftest import ROOT, small_run\nfrom test_image_files import TREE\n"
        "from hovit.config.plan import load_plan\nfrom hovit.pipeline.train import prepare_pack\n"
        "from hovit.training.classification import train\n"
        "from hovit.training.trainer import make_fabric\n"
        "plan = load_plan('smoke', ROOT / 'config')\n"
        "run = small_run(plan, 'vit_small_patch16_224.pets.deck', dataset=TREE, epochs=1,\n"
        "                model_args={}, recipe={'augment': 'crop_flip', 'batch_size': 16})\n"
        f"prepare_pack(run.pack, Path({str(tree)!r}), Path(run.pack.folder))\n"
        "train(run, make_fabric('32-true', 'cpu'), Path())\n"
    )
    losses = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        subprocess.run(
            [sys.executable, *launcher, str(script)], cwd=work, check=True, env=dict(os.environ)
        )
        (history,) = work.rglob("history.csv")
        losses.append(float(history.read_text().splitlines()[1].split(",")[1]))
        history.unlink()
        for record in work.rglob("record.json"):
            record.unlink()
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_scale_paper_trains_on_imagenet_itself() -> None:
    plan = load_plan("paper", ROOT / "config")
    for name in ("skipvit", "skipvit_warmup", "efficientvit_family", "efficientvit_ablation"):
        study = plan.study(name)
        runs = [run for row in study.rows for run in plan.runs_of(study, row)]
        assert {run.dataset.id for run in runs} == {"imagenet-1k"}
        assert {run.pack.files[1].name for run in runs} == {"manifest.csv"}
    imagenet = plan.config.datasets["imagenet-1k"]
    assert imagenet.published == (1_281_167, 50_000)
    assert imagenet.split.sizes(1_281_167, has_test=True) == (1_268_355, 12_812, 0)
