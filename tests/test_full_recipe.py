"""EfficientViT's full recipe: augmentation, clipping and averaging by timm, resumed exactly."""

import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_run
from PIL import Image
from pydantic import ValidationError
from timm.models import model_parameters
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Recipe
from hovit.data.augmented import (
    AugmentedImages,
    PackedSource,
    _rand_augment,
    load_images,
    mix_batch,
    random_crop,
    with_positions,
)
from hovit.data.loader import epoch_batches
from hovit.measure.cost import macs
from hovit.training.averaged import average_weights, clip_adaptively
from hovit.training.checkpoint import load_weights
from hovit.training.classification import learning_rate, train, training_loss
from hovit.training.trainer import Options, make_fabric
from hovit.utils.create_model import create_model
from hovit.utils.errors import HovitError, OutOfTime

FULL = {
    "augment": "randaugment", "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25, "repeats": 3,
    "agc": 0.02, "ema_decay": 0.8, "label_smoothing": 0.1,
}  # fmt: skip
RECIPE = Recipe(id="x", title="x", epochs=10, batch_size=8, optimizer="adamw", lr=0.1, **FULL)
SOURCE = PackedSource(
    np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), np.uint8), np.arange(12) % 5
)


def test_a_stopped_run_of_the_full_recipe_ends_as_one_that_was_not(
    plan: Plan, packed: Path
) -> None:
    """Weights, averages and every draw of the augmentation are the same after each step."""
    run = small_run(plan, recipe=FULL, model_args={"depth": [1, 1, 1]})
    fabric = make_fabric("32-true", accelerator="cpu")
    straight = train(run, fabric, packed).results
    shutil.rmtree(packed / run.folder)
    for stop in range(5):
        random.seed(stop)  # another process starts from other states
        np.random.seed(stop)  # noqa: NPY002
        torch.manual_seed(stop)
        try:
            results = train(run, fabric, packed, Options(deadline=0.0 if stop < 4 else math.inf))
            break
        except OutOfTime:
            continue
    assert results.results["interruptions"] == 4
    for key in ("history", "loss", "weights_sha256", "predictions_sha256"):
        assert results.results[key] == straight[key]


def test_the_averaged_weights_are_tested_and_saved(plan: Plan, packed: Path) -> None:
    """With a decay close to 1, they stay at the initial weights."""
    run = small_run(plan, epochs=1, recipe={"ema_decay": 1 - 1e-9}, model_args={"depth": [1, 1, 1]})
    record = train(run, make_fabric("32-true", accelerator="cpu"), packed)
    saved = load_weights(packed / run.folder / "weights.safetensors")
    torch.manual_seed(run.seed)
    initial = create_model(run.model, 10, run.image_size, **run.model_args)
    for name, parameter in initial.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=0, atol=1e-6)
    assert record.results["loss"] > 2.2  # near chance, ln 10


def test_the_average_is_that_of_timm() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours, theirs = average_weights(net, 0.7), ModelEmaV3(net, 0.7)
    assert ours is not None
    before = net[0].weight.detach().clone()
    for _ in range(3):
        nn.init.normal_(net[0].weight)
        net(torch.randn(5, 3))
        ours.update(net)
        theirs.update(net)
    found, expected = ours.module.state_dict(), theirs.module.state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(ours.module[0].weight, before)
    assert average_weights(net, None) is None


def test_clipping_is_that_of_timm_without_the_last_layer() -> None:
    nets = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = 100 * torch.randn(8, 6)
    for net in nets:
        net(x).square().sum().backward()
    raw = nets[0][2].weight.grad.clone()
    clip_adaptively(nets[0], 0.02)
    adaptive_clip_grad(list(model_parameters(nets[1], exclude_head=True)), 0.02)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    torch.testing.assert_close(nets[0][2].weight.grad, raw, rtol=0, atol=0)
    norms = nets[0][0].weight.grad.norm(dim=1) / nets[0][0].weight.norm(dim=1)
    assert norms.max() < 0.0201


def test_an_image_depends_on_its_position_in_the_epoch_alone() -> None:
    images = AugmentedImages(SOURCE, "randaugment", 32, (0, 3))
    batches = [np.array([4, 7, 1, 0]), np.array([4, 2, 3, 9])]
    cpu = torch.device("cpu")
    whole = list(load_images(images, with_positions(batches, 0, 4), 32, cpu))
    assert whole[0][0].shape == (4, 32, 32, 3)
    assert whole[0][0].dtype == torch.uint8
    assert whole[0][1].tolist() == [4, 2, 1, 0]
    resumed = list(load_images(images, with_positions(batches[1:], 1, 4), 32, cpu))
    workers = list(load_images(images, with_positions(batches, 0, 4), 32, cpu, workers=2))
    torch.testing.assert_close(resumed[0], whole[1], rtol=0, atol=0)
    torch.testing.assert_close(workers, whole, rtol=0, atol=0)
    for rank in (0, 1):
        half = [batch[rank::2] for batch in batches]
        mine = list(load_images(images, with_positions(half, 0, 4, rank, 2), 32, cpu))
        torch.testing.assert_close(mine[1][0], whole[1][0][rank::2], rtol=0, atol=0)
    assert not torch.equal(whole[0][0][0], whole[1][0][0])  # image 4 twice
    other = AugmentedImages(SOURCE, "randaugment", 32, (0, 4))
    assert not torch.equal(next(load_images(other, with_positions(batches, 0, 4), 32, cpu))[0],
                           whole[0][0])  # fmt: skip


def test_crop_and_flip_alone_show_the_image_itself() -> None:
    flat = PackedSource(np.full((1, 40, 48, 3), 77, np.uint8), np.zeros(1, int))
    x, _ = AugmentedImages(flat, "crop_flip", 32, (0, 0)).__getitems__(np.array([[0, 5]]))
    assert (x == 77).all()
    y, _ = AugmentedImages(SOURCE, "crop_flip", 32, (0, 0)).__getitems__(np.array([[0, 5]]))
    z, _ = AugmentedImages(SOURCE, "crop_flip", 32, (0, 0)).__getitems__(np.array([[0, 6]]))
    assert not torch.equal(y, z)


def test_a_crop_is_that_of_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Pillow's crop, then resize."""
    box = (3, 5, 20, 30)  # top, left, height, width
    monkeypatch.setattr(
        "hovit.data.augmented.RandomResizedCropAndInterpolation.get_params", lambda *_: box
    )
    cropped = SOURCE.open(0).crop((5, 3, 35, 23)).resize((16, 16), Image.Resampling.BICUBIC)
    found = random_crop(SOURCE, 0, 16).permute(1, 2, 0).numpy().astype(int)
    np.testing.assert_allclose(found, np.asarray(cropped).astype(int), atol=1)


def test_an_epoch_of_repeats_has_a_third_of_the_images_three_times() -> None:
    batches = epoch_batches(np.arange(90), 12, seed=0, epoch=0, repeats=3)
    assert [len(batch) for batch in batches] == [12] * 7
    counts = Counter(np.concatenate(batches).tolist())
    assert set(counts.values()) == {3}
    once = epoch_batches(np.arange(90), 12, seed=0, epoch=0)
    assert set(counts) == set(np.concatenate(once)[:28].tolist())


def test_mixing_pairs_images_and_labels() -> None:
    recipe = RECIPE.model_copy(update={"random_erasing": 0.0, "cutmix": 0.0})
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
    labels = torch.arange(8)
    mixed, soft = mix_batch(x.clone(), labels, recipe, 8, (0, 0, 0, 0))
    share = (mixed[0, 0, 0, 0] / 7).item()  # of image 7 in image 0
    assert 0 < share < 1
    smooth = 0.1 / 8
    assert soft[0, 7].item() == pytest.approx(share * 0.9 + smooth, abs=1e-6)
    assert soft.sum(1).tolist() == pytest.approx([1.0] * 8)
    again, _ = mix_batch(x.clone(), labels, recipe, 8, (0, 0, 0, 0))
    other, _ = mix_batch(x.clone(), labels, recipe, 8, (0, 0, 1, 0))
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    logits = torch.randn(8, 8)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(training_loss(logits, soft, 0.1), expected)
    with pytest.raises(HovitError, match="7 images for a process is an odd number"):
        mix_batch(x[:7], labels[:7], recipe, 8, (0, 0, 0, 0))


def test_erasing_changes_rectangles_of_some_images() -> None:
    recipe = RECIPE.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    torch.manual_seed(0)
    x, labels = mix_batch(torch.full((64, 3, 16, 16), 9.0), torch.arange(64), recipe, 64, (0, 0, 0))
    assert labels.dtype == torch.int64
    erased = [image for image in x if (image != 9).any()]
    assert 6 <= len(erased) <= 26  # 16 are expected
    for image in erased:
        rows, columns = torch.nonzero((image != 9).all(0), as_tuple=True)
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box != 9).all()


def test_the_schedule_ends_at_the_smallest_learning_rate() -> None:
    recipe = RECIPE.model_copy(update={"schedule": "cosine", "min_lr": 0.02})
    assert learning_rate(recipe, 10) == pytest.approx(0.02)
    assert learning_rate(recipe, 5) == pytest.approx(0.06)
    assert learning_rate(recipe, 0) == pytest.approx(0.1)


def test_the_recipe_is_the_paper_s_and_shorter_scales_say_so() -> None:
    runs = {}
    for scale in ("mini", "proxy"):
        plan = load_plan(scale, ROOT / "config")
        study = plan.study("efficientvit_family")
        runs[scale] = plan.runs_of(study, study.rows[0])[0].recipe
    full = load_plan("paper", ROOT / "config").config.recipes["efficientvit_full"]
    assert (full.epochs, full.batch_size, full.lr, full.ema_decay) == (300, 2048, 0.004, 0.99996)
    for name in ("augment", "mixup", "cutmix", "random_erasing", "repeats", "agc", "weight_decay"):
        assert {getattr(recipe, name) for recipe in runs.values()} == {getattr(full, name)}
    assert all(recipe.epochs < 300 for recipe in runs.values())
    assert all(recipe.ema_decay < 0.9995 for recipe in runs.values())


def test_rows_at_equal_cost_have_the_multiply_adds_of_m4(plan: Plan) -> None:
    study = plan.study("efficientvit_ablation")
    costs = {
        row.id: macs(create_model(str(row.model), 1000, 224, **row.model_args), 224)
        for row in study.rows
        if row.id in ("base", "swin_equal_cost", "ffn4_equal_cost")
    }
    assert len(costs) == 3
    for cost in costs.values():
        assert cost / costs["base"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("setting", ["mixup", "agc", "ema_decay", "random_erasing"])
def test_a_detector_has_no_such_settings(setting: str) -> None:
    detector = {
        "id": "x", "title": "x", "epochs": 1, "batch_size": 2, "optimizer": "sgd", "lr": 0.1,
        "schedule": "step", "detection": {},
    }  # fmt: skip
    Recipe(**detector)
    with pytest.raises(ValidationError, match=f"{setting} is for classifiers only"):
        Recipe(**detector, **{setting: 0.5})
    with pytest.raises(ValidationError, match="either `clip_norm` or `agc`"):
        Recipe(id="x", title="x", epochs=1, batch_size=2, optimizer="sgd", lr=1, agc=1, clip_norm=1)


def test_every_operation_takes_the_largest_magnitude():
    """At magnitude 10, timm's posterize keeps 0 bits."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    )
    for operation in _rand_augment(32).ops:
        operation.magnitude, operation.magnitude_std, operation.prob = 10, 0, 1.0
        assert operation(image).size == image.size
