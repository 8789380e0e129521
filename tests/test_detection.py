"""Detection: the model, COCO's format in, COCO's AP out, and training between them."""

# ruff: noqa: E501 (tables: a mistake is a line)

import copy
import gzip
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from synthetic_coco import TINY, make_coco, small_detector
from torch import nn

from hovit.cli import app
from hovit.config.plan import Plan, load_plan
from hovit.config.runs import Run, Weights
from hovit.detection.batches import DetectionDataset, make_loader, mirror
from hovit.detection.coco import Annotations, read_annotations, read_image
from hovit.detection.dataset import evaluation_set, open_coco, prepare
from hovit.detection.evaluate import METRICS, evaluate, read_detections, write_detections
from hovit.detection.model import PRETRAINED_SIZE, STRIDES, make_backbone, retinanet
from hovit.pipeline import evidence
from hovit.records.record import read_record, write_record
from hovit.training.checkpoint import load_weights, save_weights
from hovit.training.detection import DetectionTrainer, learning_rate, make_optimizer, train
from hovit.training.pretrained import load_pretrained
from hovit.training.trainer import Options, make_fabric
from hovit.utils.errors import HovitError, OutOfTime
from hovit.utils.files import digest, file_digest, read_json, write_json

TRAIN = "coco/annotations/instances_train2017.json"
VAL = "coco/annotations/instances_val2017.json"


@pytest.fixture(scope="session")
def paper() -> Plan:
    """The real config at the one scale that has COCO."""
    return load_plan("paper", ROOT / "config")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data root with a small set of eight and four images."""
    make_coco(tmp_path, (8, 4))
    return tmp_path


@pytest.fixture
def run(paper: Plan, data: Path) -> Run:
    """Two steps of training on it."""
    dataset = make_coco(data / "same", (8, 4))
    return small_detector(paper, dataset)


def tiny(num_classes: int = 3, **args: bool) -> nn.Module:
    torch.manual_seed(0)
    body = make_backbone("efficientvit_paper_m4", **TINY)
    return retinanet(body, num_classes, 128, 128, channels=32, **args)


# The model ---------------------------------------------------------------------------------------


def test_the_levels_of_m4_have_their_strides() -> None:
    model = retinanet(make_backbone("efficientvit_paper_m4"), 80).eval()
    with torch.no_grad():
        levels = model.backbone(torch.rand(1, 3, 128, 256))
    shapes = [tuple(level.shape) for level in levels.values()]
    assert shapes == [(1, 256, 128 // s, 256 // s) for s in STRIDES]


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny().train()
    box = {"boxes": torch.tensor([[20.0, 20.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 100, 128), torch.rand(3, 128, 90)], [box, box])
    assert set(losses) == {"classification", "bbox_regression"}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_boxes_come_back_in_the_pixels_of_the_image() -> None:
    """An image twice as large has its boxes at twice the coordinates."""
    model = tiny().eval()
    model.score_thresh = 0.0
    small = torch.rand(3, 64, 64)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        boxes = [model([image])[0]["boxes"] for image in (small, large)]
    assert boxes[0].shape == boxes[1].shape == (100, 4)
    assert boxes[0].max() <= 64
    assert boxes[1].max() > 64


@pytest.mark.parametrize(("name", "says"), [("resnet18", "needs 16, 32, 64"), ("no", "registered")])
def test_a_backbone_of_another_form_is_refused(name: str, says: str) -> None:
    with pytest.raises(HovitError, match=says):
        make_backbone(name)


def test_weights_of_the_classifier_start_the_backbone(run: Run, tmp_path: Path) -> None:
    other = make_backbone("efficientvit_paper_m4", **TINY)
    other.reset_classifier(11)
    path = tmp_path / "efficientvit_m4.safetensors"
    save_weights(path, other)
    plan = load_plan("paper", ROOT / "config", tmp_path)
    study = plan.study("efficientvit_detection")
    weights = [plan.runs_of(study, study.row(name))[0].weights for name in ("m4", "m5")]
    assert weights == [Weights(sha256=file_digest(path)), Weights(timm="efficientvit_m5.r224_in1k")]
    body = make_backbone("efficientvit_paper_m4", **TINY)
    run = run.model_copy(update={"weights": weights[0]})
    assert load_pretrained(body, run, tmp_path, tmp_path) == file_digest(path)
    for name, tensor in body.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_detector_starts_from_weights_of_224_pixels(
    run: Run, data: Path, tmp_path: Path
) -> None:
    given = make_backbone("efficientvit_paper_m4", PRETRAINED_SIZE, **TINY)
    given.reset_classifier(11)
    path = tmp_path / "efficientvit_m4.safetensors"
    save_weights(path, given)
    run = run.model_copy(update={"weights": Weights(sha256=file_digest(path))})
    prepare(run.pack, data, data / run.pack.folder)
    fabric = make_fabric("32-true", accelerator="cpu")
    trainer = DetectionTrainer(run, fabric, data, Options(weights_file=path))
    assert trainer.module.backbone.frozen_norms
    trained = trainer.module.backbone.state_dict()
    for name, tensor in given.state_dict().items():
        if name.startswith("stages.2") and name.endswith("attention_biases"):
            assert (tensor.shape[1], trained[name].shape[1]) == (4**2, 7**2)
        elif not name.startswith("head"):
            assert torch.equal(tensor, trained[name]), name


def test_batch_norms_keep_the_statistics_of_the_weights() -> None:
    model = tiny(frozen_norms=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert model.training
    assert model.backbone.fpn.training
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    norms = [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)


# The recipe --------------------------------------------------------------------------------------


def test_the_learning_rate_rises_over_500_steps_and_falls_twice(paper: Plan) -> None:
    recipe = paper.config.recipes["detection"]
    rates = {(e, s): learning_rate(recipe, e, s, 7000) for e, s in
             ((0, 0), (0, 250), (0, 500), (7, 6999), (8, 0), (10, 6999), (11, 0), (11, 6999))}  # fmt: skip
    expected = [1e-7, 5.005e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-12)


def test_weight_decay_spares_the_attention_biases_alone(paper: Plan) -> None:
    model = tiny()
    spared, decayed = make_optimizer(model, paper.config.recipes["detection"]).param_groups
    biases = [p for name, p in model.named_parameters() if "attention_biases" in name]
    assert biases
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in spared["params"]} == {id(p) for p in biases}
    assert len(decayed["params"]) + len(biases) == len(list(model.parameters()))


def test_a_mirrored_image_keeps_its_objects_in_their_boxes() -> None:
    image = torch.zeros(3, 8, 10)
    image[:, 2:5, 1:4] = 1
    mirrored, boxes = mirror(image, torch.tensor([[1.0, 2.0, 4.0, 5.0]]))
    left, top, right, bottom = (int(value) for value in boxes[0])
    assert (left, top, right, bottom) == (6, 2, 9, 5)
    assert mirrored[:, top:bottom, left:right].min() == 1
    assert mirrored.sum() == image.sum()


def test_half_of_the_images_are_mirrored_and_always_the_same(run: Run, data: Path) -> None:
    prepare(run.pack, data, data / "pack")
    pictures = open_coco(run.pack, data / "pack").train
    flipped = []
    for epoch in range(8):
        samples = [DetectionDataset(pictures, 0.5, (0, epoch)) for _ in range(2)]
        for i, picture in enumerate(pictures):
            image, target = samples[0][i]
            assert torch.equal(image, samples[1][i][0])
            plain = torch.from_numpy(read_image(picture)).permute(2, 0, 1)
            flipped.append(not torch.equal(image, plain))
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert 0.25 < np.mean(flipped) < 0.75


# COCO's format -----------------------------------------------------------------------------------


def read_val(data: Path) -> Annotations:
    return read_annotations(data / VAL, data / "coco/val2017", 3)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_annotations_are_read_as_they_are(data: Path) -> None:
    content = json.loads((data / VAL).read_text())
    truth = read_val(data)
    assert truth.categories == [2, 5, 9]
    assert [p.id for p in truth.images] == [image["id"] for image in content["images"]]
    assert len(truth.boxes) == len(content["annotations"])
    for picture in truth.images:
        own = [a for a in content["annotations"] if a["image_id"] == picture.id]
        single = [a for a in own if not a["iscrowd"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in single)]
        assert picture.boxes.tolist() == boxes  # the crowd is none of them
        assert picture.labels.tolist() == [[2, 5, 9].index(a["category_id"]) for a in single]
        assert read_image(picture).shape == (picture.height, picture.width, 3)


def box(*values: float) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][0].update(bbox=list(values))


BAD_ANNOTATIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no images": (lambda c: c.update(images=[]), "images: the list is empty"),
    "no list": (lambda c: c.update(annotations={}), "annotations: must be a list"),
    "no categories": (lambda c: c.pop("categories"), "categories: must be a list"),
    "too few categories": (lambda c: c["categories"].pop(), "2 categories, but num_classes is 3"),
    "a category twice": (lambda c: c["categories"][0].update(id=5), "category 5 is listed twice"),
    "an image twice": (lambda c: c["images"].append(c["images"][0]), "image 100 is listed twice"),
    "an id of text": (lambda c: c["images"][0].update(id="100"), "image: every id must be"),
    "a file elsewhere": (lambda c: c["images"][0].update(file_name="../x.jpg"), "image 100: file_na"),
    "no width": (lambda c: c["images"][0].pop("width"), "image 100: width and height must be"),
    "an unlisted category": (lambda c: c["annotations"][0].update(category_id=3), "category 3 is not"),
    "an unlisted image": (lambda c: c["annotations"][0].update(image_id=1), "image 1 is not listed"),
    "a list for an image": (lambda c: c["annotations"][0].update(image_id=[1]), "image [1] is not"),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "bbox must be [left, top, width, height]"),
    "three numbers": (box(1, 2, 3), "annotation 1: bbox must be"),
    "text in a box": (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", 4]), "bbox must be"),
    "no area": (box(5, 5, 0, 9), "annotation 1: its box [5, 5, 0, 9] has no area"),
    "a negative side": (box(5, 5, 9, -9), "has no area"),
    "outside, right": (box(100, 5, 40, 9), "lies outside image 100 of 128 x 128 pixels"),
    "outside, above": (box(5, -3, 9, 9), "lies outside image 100"),
    "a crowd of two": (lambda c: c["annotations"][0].update(iscrowd=2), "iscrowd 0 or 1"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_ANNOTATIONS)
def test_bad_annotations_are_one_line(data: Path, mistake: str) -> None:
    change, says = BAD_ANNOTATIONS[mistake]
    edit(data / VAL, change)
    with pytest.raises(HovitError) as error:
        read_val(data)
    line = str(error.value)
    assert line.startswith(f"{data / VAL}: ")
    assert says in line
    assert line.isprintable()


def test_the_two_boxes_without_height_of_coco_itself_are_left_out(data: Path) -> None:
    def known(content: dict[str, Any]) -> None:
        first, other = content["annotations"][:2]
        for entry in content["annotations"]:
            entry["image_id"] = 200365 if entry["image_id"] == 100 else entry["image_id"]
        content["images"][0]["id"] = other["image_id"] = 200365
        first.update(id=918, bbox=[5, 5, 1.03, 0.0], area=0.0)

    edit(data / VAL, known)
    truth = read_val(data)
    assert 918 in {entry["id"] for entry in truth.boxes}
    assert sum(len(p.boxes) for p in truth.images) == len(truth.boxes) - 2  # and the crowd


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no annotations": (lambda d: (d / TRAIN).unlink(), "instances_train2017.json: not found"),
    "no folder": (lambda d: shutil.rmtree(d / "coco/val2017"), "val2017: not found"),
    "no JSON": (lambda d: (d / VAL).write_text("{"), "val2017.json: not readable as JSON"),
    "no image": (lambda d: next((d / "coco/val2017").iterdir()).unlink(), "No such file"),
    "half an image": (
        lambda d: (d / "coco/val2017/000000000100.jpg").write_bytes(b"\xff\xd8\xff"),
        "000000000100.jpg: cannot be decoded"),
    "another image": (
        lambda d: shutil.copy(d / "coco/val2017/000000000100.jpg",
                              d / "coco/val2017/000000000107.jpg"),
        "000000000107.jpg: 128 x 128 pixels, but the annotations say 128 x 112"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_folder_with_something_missing_is_one_line(run: Run, data: Path, mistake: str) -> None:
    change, says = BAD_FILES[mistake]
    change(data)
    with pytest.raises(HovitError) as error:
        prepare(run.pack, data, data / "pack")
    assert says in str(error.value)
    assert str(error.value).isprintable()
    assert not (data / "pack/pack.json").exists()


def test_the_fingerprint_is_of_the_bytes_and_not_of_the_place(run: Run, data: Path) -> None:
    meta = prepare(run.pack, data, data / "pack")
    assert meta["images"] == {"train": 8, "val": 0, "test": 4}
    before = (data / "pack/manifest.csv").stat().st_mtime_ns
    assert prepare(run.pack, data, data / "pack") == meta
    assert (data / "pack/manifest.csv").stat().st_mtime_ns == before  # nothing was done again
    moved = prepare(run.pack, data / "same", data / "other")
    assert moved == meta | {"root": str(data / "same")}
    image = data / "coco/train2017/000000000100.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    changed = prepare(run.pack, data, data / "third")
    assert changed["fingerprint"] != meta["fingerprint"]


def test_what_changes_after_the_check_is_refused(run: Run, data: Path) -> None:
    with pytest.raises(HovitError, match="no such pack; make it with `hovit data shapes-128px`"):
        open_coco(run.pack, data / "pack")
    prepare(run.pack, data, data / "pack")
    picture = open_coco(run.pack, data / "pack").train[0]
    picture.path.write_bytes(picture.path.read_bytes() + b"\0")
    for workers in (0, 1):  # one line, out of another process too
        batches = make_loader(
            DetectionDataset([picture]), [np.array([0])], torch.device("cpu"), workers
        )
        with pytest.raises(HovitError, match=r"^\S+: changed since the folder was checked.*$"):
            next(batches)
    edit(data / VAL, lambda content: content["annotations"].pop(0))
    with pytest.raises(HovitError, match="changed; run `hovit data shapes-128px`"):
        open_coco(run.pack, data / "pack")


# COCO's AP ---------------------------------------------------------------------------------------


def perfect(truth: Annotations) -> list[dict[str, Any]]:
    return [{"image_id": b["image_id"], "category_id": b["category_id"], "bbox": b["bbox"],
             "score": 0.9} for b in truth.boxes if not b["iscrowd"]]  # fmt: skip


def test_perfect_detections_are_100_and_none_are_0(data: Path) -> None:
    truth = read_val(data)
    found = evaluate(truth, perfect(truth))
    assert set(found) <= set(METRICS)
    assert "ap_large" not in found  # no object is of 96 x 96 pixels
    assert list(found.values()) == pytest.approx([100.0] * len(found))
    assert set(evaluate(truth, []).values()) == {0.0}
    wrong = [each | {"category_id": 11 - each["category_id"]} for each in perfect(truth)]
    assert evaluate(truth, [each for each in wrong if each["category_id"] != 6])["ap"] < 1


def test_ap_is_what_pycocotools_says(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, rng = read_val(data), np.random.default_rng(1)
    detections = [
        each | {"score": round(float(rng.random()), 5),
                "bbox": (np.array(each["bbox"]) + rng.integers(-4, 5, 4)).tolist()}
        for each in perfect(truth) * 3
    ]  # fmt: skip
    found = evaluate(truth, detections)
    assert capsys.readouterr().out == ""
    theirs = COCO(str(data / VAL))
    judge = COCOeval(theirs, theirs.loadRes([dict(each) for each in detections]), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    expected = {name: 100 * s for name, s in zip(METRICS, judge.stats, strict=False) if s >= 0}
    assert found == expected
    assert 1 < found["ap"] < 99
    some = [p.id for p in truth.images[:2]]
    assert evaluate(truth, detections, some) != found


def test_a_box_inside_a_crowd_is_no_mistake(data: Path) -> None:
    truth = read_val(data)
    crowd = next(b for b in truth.boxes if b["iscrowd"])
    inside = {key: crowd[key] for key in ("image_id", "category_id")}
    more = [*perfect(truth), inside | {"bbox": [0.0, 60.0, 20.0, 20.0], "score": 0.99}]
    assert evaluate(truth, more)["ap"] == pytest.approx(100.0)


def test_detections_are_kept_and_damage_is_one_line(data: Path) -> None:
    path, detections = data / "d.json.gz", perfect(read_val(data))
    write_detections(path, detections)
    content = path.read_bytes()
    write_detections(path, detections)
    assert path.read_bytes() == content
    assert read_detections(path) == detections
    for damaged in (
        b"",
        content[:-9],
        b"x" + content,
        gzip.compress(b"[{}]"),
        gzip.compress(b"{}"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(HovitError, match=r"d.json.gz: not (readable as )?detections"):
            read_detections(path)


# Damage ------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.just([]), st.just({}),
    st.sampled_from([10**20, 10**400, 1e308, -1e308, math.nan, math.inf, 0.5]),
    st.sampled_from(["", "a", "a\0", "\ud800", "a\nb.jpg", "../a.jpg", "/a.jpg", "é" * 300]),
)  # fmt: skip


def with_odd_values(content: Any, data: st.DataObject) -> Any:
    """JSON with one to three values replaced at random places."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        inside = content
        while True:
            keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
            key = data.draw(st.sampled_from(keys))
            if not (isinstance(inside[key], dict | list) and inside[key]):
                break
            if data.draw(st.integers(0, 9)) == 0:
                break
            inside = inside[key]
        inside[key] = data.draw(ODD)
    return content


@contextmanager
def one_line_of(*paths: Path) -> Iterator[None]:
    """Suppress a HovitError that is one line and names one of the paths."""
    said = str(paths[0])
    with suppress(HovitError):
        try:
            yield
        except HovitError as error:
            said = str(error)
            raise
    assert said.isprintable()
    assert any(str(path) in said for path in paths)


def test_damaged_annotations_are_one_line_or_valid(paper: Plan, tmp_path: Path) -> None:
    """All that is accepted can be read, trained on and evaluated."""
    dataset = make_coco(tmp_path, (3, 2))
    run, path, folder = small_detector(paper, dataset), tmp_path / VAL, tmp_path / "pack"
    content = read_json(path)

    @fuzz(100)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path.write_text(json.dumps(with_odd_values(content, data)))
        with one_line_of(path, tmp_path / "coco/val2017"):
            prepare(run.pack, tmp_path, folder)
            test = open_coco(run.pack, folder).test
            assert all(read_image(image).shape[2] == 3 for image in test.images)
            assert all(np.isfinite(image.boxes).all() for image in test.images)
            evaluate(test, perfect(test))

    check()


def test_damaged_detections_are_one_line_or_valid(data: Path) -> None:
    truth, path = read_val(data), data / "d.json.gz"
    detections = perfect(truth)

    @fuzz(100)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(gzip.compress(json.dumps(with_odd_values(detections, data)).encode()))
        found = []
        with one_line_of(path):
            found = read_detections(path)
        digest(found)
        evaluate(truth, found)

    check()


# Training ----------------------------------------------------------------------------------------


def wider_start(trainer: DetectionTrainer) -> None:
    """RetinaNet starts its heads at 0.01, which is meant for 256 channels; through four layers of
    32 nothing would arrive."""
    torch.manual_seed(0)
    for name, module in trainer.module.head.named_modules():
        if isinstance(module, nn.Conv2d) and ".conv." in name:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def test_training_finds_shapes_that_it_could_not_find_before(paper: Plan, tmp_path: Path) -> None:
    run = small_detector(paper, make_coco(tmp_path), epochs=40)
    prepare(run.pack, tmp_path, tmp_path / run.pack.folder)
    trainer = DetectionTrainer(run, make_fabric("32-true", "cpu"), tmp_path, Options())
    wider_start(trainer)
    before = evaluate(trainer.coco.test, trainer.detect())
    trainer.fit()
    record = trainer.finish()
    results, folder = record.results, tmp_path / run.folder
    losses = [entry["train_loss"] for entry in results["history"]]
    assert losses[-1] < 0.7 * losses[0]
    assert before["ap50"] < 5
    assert results["ap50"] > before["ap50"] + 15
    # The record says what the detections beside it say, and what the weights beside it find.
    assert read_record(folder / "record.json").results == results
    detections = read_detections(folder / "detections.json.gz")
    again = evaluate(trainer.coco.test, detections)
    assert again == {name: results[name] for name in again}
    assert results["detections_sha256"] == digest(detections)
    assert results["weights_sha256"] == file_digest(folder / "weights.safetensors")
    names = {path.name for path in folder.iterdir()}
    assert names == {"record.json", "weights.safetensors", "history.csv", "detections.json.gz"}


class Killed(Exception):
    pass


def killed_at(epoch: int, step: int) -> Options:
    def on_step(*now: int) -> None:
        if now[:2] == (epoch, step):
            raise Killed

    return Options(save_seconds=0.0, on_step=on_step)


def test_a_continued_run_ends_with_the_same_weights(paper: Plan, tmp_path: Path) -> None:
    run = small_detector(paper, make_coco(tmp_path, (16, 2)), epochs=2)
    fabric = make_fabric("32-true", "cpu")
    ends = []
    for name, kills in (("whole", []), ("killed", [(0, 1), (1, 1), (1, 2)])):
        root = tmp_path / name
        prepare(run.pack, tmp_path, root / run.pack.folder)
        for where in kills:
            with pytest.raises(Killed):
                train(run, fabric, root, killed_at(*where))
        if kills:
            with pytest.raises(OutOfTime):
                train(run, fabric, root, Options(deadline=0.0))
        record = train(run, fabric, root)
        assert record.results["interruptions"] == len(kills) + bool(kills)
        ends.append((record.results["history"], record.results["detections_sha256"],
                     load_weights(root / run.folder / "weights.safetensors")))  # fmt: skip
    (history, detections, weights), other = ends
    assert (history, detections) == other[:2]
    assert all(torch.equal(tensor, other[2][name]) for name, tensor in weights.items())


def test_a_loss_that_is_not_finite_ends_the_run(paper: Plan, run: Run, data: Path) -> None:
    prepare(run.pack, data, data / run.pack.folder)
    trainer = DetectionTrainer(run, make_fabric("32-true", "cpu"), data, Options())
    nn.init.constant_(trainer.module.head.regression_head.bbox_reg.bias, math.nan)
    with pytest.raises(HovitError, match="loss is nan at epoch 1, step 1; lower lr"):
        trainer.fit()


# The artifact's own commands ---------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose COCO is a small set, and whose recipe is of one epoch."""
    make_coco(tmp_path / "data", (8, 4))
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for file, old, new in (
        ("datasets/coco.yaml", "num_classes: 80", "num_classes: 3"),
        ("recipes/detection.yaml", "epochs: 12", "epochs: 1"),
        ("recipes/detection.yaml", "batch_size: 16", "batch_size: 4"),
        ("recipes/detection.yaml", "image_size: 800", "image_size: 128"),
        ("recipes/detection.yaml", "long_side: 1333", "long_side: 128"),
        ("recipes/detection.yaml", "channels: 256", "channels: 16"),
        ("studies/efficientvit_detection.yaml", "    pretrained: efficientvit_m4\n", ""),
        ("studies/efficientvit_detection.yaml", "    model: efficientvit_paper_m4\n",
         f"    model: efficientvit_paper_m4\n    model_args: {json.dumps(TINY)}\n"),
    ):  # fmt: skip
        path = tmp_path / "config" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "_check_code", lambda *_: None)  # no history here
    return tmp_path


def hovit(*args: str) -> None:
    app([*args], standalone_mode=False)


def test_the_commands_train_report_and_verify(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hovit("data", "coco-128px", "--data-root", "data")
    assert "8 / 0 / 4 images" in capsys.readouterr().out
    study = "efficientvit_detection"
    plan = load_plan("paper")
    run = plan.runs_of(plan.study(study), plan.study(study).row("m4"))[0]
    hovit("train", run.id, "--scale", "paper", "--accelerator", "cpu", "--threads", "1")
    assert "seed 0: AP 0.0" in capsys.readouterr().out
    hovit("table", study, "--scale", "paper")
    table = Path(f"results/tables/{study}.md").read_text()
    assert "| EfficientViT-M4 | 32.7 | 0.0 |" in table
    assert "8 / 0 / 4 (train / validation / test) at 128 px" in table

    hovit("evidence", "add", "results/runs")
    (place,) = Path("results/evidence").rglob("record.json")
    assert (place.parent / "detections.json.gz").exists()
    hovit("evidence", "verify")
    record = read_record(place)
    assert "root" not in (record.provenance.dataset or {})  # no place of this machine

    tampered = record.model_copy(update={"results": record.results | {"ap": 55.0}})
    write_record(place, tampered)
    with pytest.raises(HovitError, match="1 of 1"):
        hovit("evidence", "verify")
    assert "AP does not match the detections" in capsys.readouterr().err
    shutil.rmtree("data/packed")  # without the annotations, the hash alone
    hovit("evidence", "verify")
    write_detections(place.parent / "detections.json.gz", [])
    if record.results["detections"]:
        with pytest.raises(HovitError, match="1 of 1"):
            hovit("evidence", "verify")
        assert "not the detections that record.json was made from" in capsys.readouterr().err


def test_other_annotations_are_not_taken_for_the_evaluation_set(run: Run, data: Path) -> None:
    folder = data / "pack"
    sha256 = file_digest(data / VAL)
    assert evaluation_set(run.pack, sha256, folder) is None
    prepare(run.pack, data, folder)
    assert evaluation_set(run.pack, sha256, folder) is not None
    assert evaluation_set(run.pack, "0" * 64, folder) is None
    write_json(folder / "pack.json", read_json(folder / "pack.json") | {"root": "nowhere"})
    assert evaluation_set(run.pack, sha256, folder) is None
