"""Training steps as CUDA graphs: on a card, and on a CPU with graphs of recorded operators."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_run
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from recorded_graph import RecordedCallable
from timm.models import levit
from torch import Tensor, nn

from hovit.config.plan import Plan
from hovit.config.runs import Run
from hovit.data import loader
from hovit.records.record import read_record
from hovit.training import captured, classification
from hovit.training.captured import CapturedStep, RunAhead, model_settings
from hovit.training.checkpoint import load_weights
from hovit.training.classification import ClassificationTrainer
from hovit.training.detection import DetectionTrainer
from hovit.training.trainer import Options, Trainer, make_fabric
from hovit.utils.errors import HovitError, OutOfTime
from hovit.utils.graphs import SyncLog

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BOTH = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])]
AUGMENTED = {
    "optimizer": "adamw", "augment": "crop_flip", "weight_decay": 0.05, "clip_norm": 0.5,
    "schedule": "cosine", "label_smoothing": 0.1,
}  # fmt: skip
VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}
SKIPPING = VIT | {"schedule": "1(50%)+3", "warmup": 0.5, "proj_drop_rate": 0.2}
# Of losses, relative, where sums are in another order.
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 3e-2, "16-mixed": 1e-2}


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded graphs on a CPU, after one eager step; on a card the first step fills caches."""
    monkeypatch.setattr(captured, "GraphedCallable", RecordedCallable)
    monkeypatch.setattr(captured, "WARMUP", 1 + torch.cuda.is_available())
    # The capture comes after eager batches of the same pass, whose caches it must not use.
    monkeypatch.setattr(classification, "EVAL_BATCH", 8)


def skipvit_run(plan: Plan, **changes: Any) -> Run:
    model = {"model": "skipvit_tiny_patch16_224", "model_args": SKIPPING}
    return small_run(plan, **(model | changes))


def trained(
    run: Run, root: Path, device: str, **options: Any
) -> tuple[ClassificationTrainer, dict[str, Any]]:
    """Train a run from its checkpoint; the trainer and the results of the record."""
    fabric = make_fabric(run.precision, accelerator=device)
    trainer = ClassificationTrainer(run, fabric, root, Options(**{"capture": True} | options))
    trainer.fit()
    return trainer, trainer.finish().results


def assert_same(a: dict[str, Any], b: dict[str, Any], device: str, precision: str) -> None:
    """Equal curves and test results: bit-identical on a CPU, to rounding on a card."""
    if device == "cpu":
        assert a["history"] == b["history"]
        assert (a["loss"], a["weights_sha256"]) == (b["loss"], b["weights_sha256"])
        return
    assert_close(a, b, TOLERANCE[precision])


def assert_close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    for key in ("train_loss", "val_loss"):
        curves = [[epoch[key] for epoch in results["history"]] for results in (a, b)]
        np.testing.assert_allclose(*curves, rtol=tolerance)


def replayed(steps: int) -> list[tuple[str, int]]:
    """Events of so many steps with one capture."""
    warmup = captured.WARMUP
    return [("eager", warmup), ("capture", 1), ("replay", steps - warmup)]


def events(step: CapturedStep | None) -> list[tuple[str, int]]:
    assert step is not None
    return step.graphed.events


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("case", ["levit, adamw, augmented", "vit, adam", "vit, sgd"])
def test_captured_training_gives_the_eager_curve(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch, device: str, case: str
) -> None:
    """With its schedule, dropout, augmentation, clipping and validation."""
    model, optimizer, *_ = case.split(", ")
    if model == "levit":
        run = small_run(plan, epochs=3, recipe=AUGMENTED)
    else:
        run = skipvit_run(plan, epochs=3, recipe={"optimizer": optimizer}, model_args=VIT)
    trainer, results = trained(run, packed, device)
    assert events(trainer.captured_step) == replayed(9)
    assert events(trainer.captured_predict)[1] == ("capture", 1)
    with monkeypatch.context() as patch:
        patch.setattr(captured, "WARMUP", 10**9)
        shutil.rmtree(packed / run.folder)
        trainer, eager = trained(run, packed, device)
        assert events(trainer.captured_step) == [("eager", 9)]
    assert_same(results, eager, device, "32-true")


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "32-true"),
        *[pytest.param("cuda", p, marks=[pytest.mark.gpu, NO_CARD]) for p in TOLERANCE],
    ],
)
def test_captured_training_agrees_with_the_loop_without_graphs(
    plan: Plan, packed: Path, device: str, precision: str
) -> None:
    """That loop has its own optimizer kernels, and a float as the learning rate of each step."""
    run = skipvit_run(plan, epochs=3, recipe=AUGMENTED, precision=precision)
    trainer, results = trained(run, packed, device)
    assert events(trainer.captured_step)[-1][0] == "replay"
    shutil.rmtree(packed / run.folder)
    trainer, eager = trained(run, packed, device, capture=False)
    assert trainer.captured_step is None
    assert_close(results, eager, TOLERANCE[precision])
    if device == "cuda":
        assert (results["execution"], eager["execution"]) == ("captured", "eager")


@pytest.mark.parametrize("device", BOTH)
def test_the_end_of_skipvits_warmup_is_captured_again(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    run = skipvit_run(plan, epochs=4)
    trainer, results = trained(run, packed, device)
    assert events(trainer.captured_step) == replayed(6) * 2  # two epochs of three steps, twice
    with monkeypatch.context() as patch:
        patch.setattr(captured, "WARMUP", 10**9)
        shutil.rmtree(packed / run.folder)
        assert_same(results, trained(run, packed, device)[1], device, "32-true")


@pytest.mark.parametrize("device", BOTH)
def test_an_interrupted_captured_run_ends_as_one_that_was_not(
    plan: Plan, packed: Path, device: str
) -> None:
    """It stops after each of the first steps, so that some are eager again, others replays."""
    run = skipvit_run(plan, epochs=2, recipe=AUGMENTED)
    straight = trained(run, packed, device)[1]
    shutil.rmtree(packed / run.folder)
    for _ in range(2):
        with pytest.raises(OutOfTime):
            trained(run, packed, device, deadline=0.0)
    results = trained(run, packed, device)[1]
    assert results["interruptions"] == 2
    assert_same(results, straight, device, "32-true")


def test_a_captured_epoch_waits_for_the_device_only_at_its_end(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = skipvit_run(plan, epochs=1, recipe=AUGMENTED)
    fabric = make_fabric("32-true", accelerator="cpu")
    trainer = ClassificationTrainer(run, fabric, packed, Options(capture=True))
    reads = []
    monkeypatch.setattr(trainer, "log_losses", lambda losses: reads.append(len(losses)))
    with SyncLog() as log:
        trainer.train_epoch()
    assert reads == [3]
    assert not log.counts


class Waiting(nn.Module):
    """A small classifier with dropout that asks the device for a value."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x.mean((2, 3)), 0.5, self.training)
        return self.head(x) * (1.0 if x.sum().item() > 0 else 2.0)


@pytest.mark.parametrize("device", BOTH)
def test_a_model_that_cannot_be_captured_trains_eagerly(
    plan: Plan,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
) -> None:
    """With one line for the steps and one for validation; dropout works after the failure."""
    monkeypatch.setattr(classification, "create_model", lambda _, classes, __: Waiting(classes))
    run = small_run(plan, epochs=3, model_args={})
    trainer, results = trained(run, packed, device)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no CUDA graph" in line]
    assert len(lines) == 2
    assert all(line.endswith("; it runs eagerly") for line in lines)
    warmup = captured.WARMUP
    assert events(trainer.captured_step) == [
        ("eager", warmup), ("fallback", 1), ("eager", 9 - warmup),
    ]  # fmt: skip
    monkeypatch.setattr(captured, "WARMUP", 10**9)
    shutil.rmtree(packed / run.folder)
    assert_same(results, trained(run, packed, device)[1], device, "32-true")


def test_what_cannot_be_captured_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def can_capture(kind: type[Trainer], world: int, device: str, capture: bool | None) -> bool:
        fabric = SimpleNamespace(device=torch.device(device), world_size=world, is_global_zero=True)
        trainer: Any = SimpleNamespace(
            fabric=fabric, fixed_shapes=kind.fixed_shapes, options=Options(capture=capture),
            run=SimpleNamespace(id="a", seed=0),
        )  # fmt: skip
        trainer.warn = partial(Trainer.warn, trainer)
        return Trainer.can_capture(trainer)

    assert can_capture(ClassificationTrainer, 1, "cuda", None)
    assert not can_capture(ClassificationTrainer, 1, "cuda", False)
    assert not can_capture(ClassificationTrainer, 1, "cpu", None)
    assert not can_capture(DetectionTrainer, 2, "cpu", None)
    assert not capsys.readouterr().err
    assert not can_capture(DetectionTrainer, 1, "cuda", None)
    assert not can_capture(ClassificationTrainer, 2, "cuda", None)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "run a seed 0: no CUDA graph: images differ in size; it runs eagerly",
        "run a seed 0: no CUDA graph: processes exchange gradients; it runs eagerly",
    ]


@pytest.mark.parametrize("device", BOTH)
def test_dropout_differs_in_each_replay_and_follows_the_seed(device: str) -> None:
    model = nn.Dropout(0.5)
    step = CapturedStep(model, model, pytest.fail)
    ones = torch.ones(1000, device=device)
    torch.manual_seed(0)
    masks = [step(ones) for _ in range(6)]
    assert events(step) == replayed(6)
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        drawn = step(ones)
        torch.manual_seed(seed)
        assert torch.equal(drawn, model(ones))


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "trained parameters": lambda model: model[0].requires_grad_(False),
    "mode": lambda model: model.eval(),
    "dropout rate": lambda model: setattr(model[1], "p", 0.1),
    "parameters elsewhere": lambda model: setattr(
        model[0], "weight", nn.Parameter(model[0].weight.detach().clone())
    ),
}


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_captured_again(device: str, change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(device)
    step = CapturedStep(model, model, pytest.fail)
    x = torch.randn(2, 4, device=device)
    for _ in range(2):  # nothing changes between these epochs
        step.check_settings()
        for _ in range(2):
            step(x)
    assert events(step) == replayed(4)
    before = model_settings(model)
    CHANGES[change](model)
    assert model_settings(model) != before
    step.check_settings()
    step(x)
    assert events(step)[-1] == ("eager", 1)


@pytest.mark.parametrize("device", BOTH)
def test_what_a_model_caches_is_not_captured(device: str) -> None:
    """timm's LeViT keeps its attention biases in evaluation mode until the mode is set."""
    model = levit.Attention(8, 4, 2, resolution=3).to(device)
    nn.init.ones_(model.proj[-1].bn.weight)  # zero in a new model
    model.eval()
    step = CapturedStep(model, model, pytest.fail)
    x = torch.randn(2, 9, 8, device=device)
    with torch.inference_mode():
        for _ in range(captured.WARMUP + 2):
            step(x)
        model.attention_biases.normal_()
        model.eval()
        torch.testing.assert_close(step(x), model(x))
    assert events(step)[-1] == ("replay", 3)


def test_a_batch_of_another_shape_gets_its_own_graph() -> None:
    model = nn.Linear(4, 2)
    step = CapturedStep(model, model, pytest.fail)
    for n in (3, 2) * (captured.WARMUP + 2):
        x = torch.randn(n, 4)
        torch.testing.assert_close(step(x), model(x), rtol=0, atol=0)
    assert [name for name, _ in events(step)].count("capture") == 2


def test_infinite_fp16_gradients_skip_the_step_inside_a_graph(plan: Plan, packed: Path) -> None:
    """The scale of the loss starts far too high and is halved on the device, step by step."""
    run = skipvit_run(plan, epochs=3, recipe={"clip_norm": 1.0}, precision="16-mixed")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    fabric.launch()
    trainer = ClassificationTrainer(run, fabric, packed, Options(capture=True))
    before = trainer.module.head.weight.detach().clone()
    trainer.train_epoch()
    assert events(trainer.captured_step) == replayed(3)
    assert scaler.get_scale() == 2.0**27
    torch.testing.assert_close(trainer.module.head.weight, before, rtol=0, atol=0)
    assert all(torch.isfinite(p).all() for p in trainer.module.parameters())
    scaler._scale.fill_(128.0)  # type: ignore[union-attr]
    trainer.state.step = 0
    trainer.train_epoch()
    assert scaler.get_scale() == 128.0
    assert not torch.equal(trainer.module.head.weight, before)


def test_a_compiled_run_leaves_the_same_files(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backend `eager` traces the model as any backend does, and computes as without it."""
    run = skipvit_run(plan, epochs=1, model_args=VIT)
    plain = trained(run, packed, "cpu", capture=False)[1]
    keys = load_weights(packed / run.folder / "weights.safetensors").keys()
    shutil.rmtree(packed / run.folder)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    results = trained(run, packed, "cpu", capture=False, compile=True)[1]
    assert_same(results, plain, "cpu", "32-true")
    assert load_weights(packed / run.folder / "weights.safetensors").keys() == keys
    assert results["execution"] == "compiled, eager"


def test_a_failed_compilation_is_one_line(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no compiler here")

    run = skipvit_run(plan, epochs=1, model_args=VIT)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(
        HovitError, match=r"torch\.compile failed .*no compiler.*--compile"
    ) as error:
        trained(run, packed, "cpu", capture=False, compile=True)
    assert "\n" not in str(error.value)


def test_too_little_gpu_memory_is_one_line(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(ClassificationTrainer, "compute_loss", full)
    run = skipvit_run(plan, epochs=1, model_args=VIT)
    with pytest.raises(HovitError, match=r"seed 0: not enough memory on the GPU") as error:
        trained(run, packed, "cpu", capture=False)
    assert "\n" not in str(error.value)


# On a card only


@pytest.mark.gpu
@NO_CARD
def test_on_a_card_captured_validation_gives_the_eager_predictions(
    plan: Plan, packed: Path
) -> None:
    run = small_run(plan, epochs=4)
    trainer, _ = trained(run, packed, "cuda")
    assert events(trainer.captured_predict)[-1][0] == "replay"
    captured_rows = trainer.predict(trainer.splits["val"])
    trainer.captured_predict = None
    eager = trainer.predict(trainer.splits["val"])
    assert captured_rows["predicted"].equals(eager["predicted"])
    np.testing.assert_allclose(captured_rows["loss"], eager["loss"], rtol=1e-4)


@pytest.mark.gpu
@NO_CARD
def test_on_a_card_worker_processes_do_not_disturb_the_capture(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that the card cannot hold come through a thread that pins memory meanwhile."""
    run = small_run(plan, epochs=3, recipe=AUGMENTED)
    resident = trained(run, packed, "cuda")[1]
    shutil.rmtree(packed / run.folder)
    monkeypatch.setattr(loader, "_free_memory", lambda _: 0)
    trainer, results = trained(run, packed, "cuda")
    assert not trainer.images.on_device
    assert results["execution"] == "captured"
    assert_same(results, resident, "cuda", "32-true")


@pytest.mark.gpu
@NO_CARD
def test_on_a_card_a_compiled_model_is_captured(plan: Plan, packed: Path) -> None:
    run = skipvit_run(plan, epochs=4, model_args=SKIPPING | {"proj_drop_rate": 0.0})
    plain = trained(run, packed, "cuda")[1]
    shutil.rmtree(packed / run.folder)
    trainer, results = trained(run, packed, "cuda", compile=True)
    assert results["execution"] == "compiled, captured"
    assert [name for name, _ in events(trainer.captured_step)].count("capture") == 2
    assert_same(results, plain, "cuda", "32-true")


@pytest.mark.gpu
@NO_CARD
def test_on_a_card_one_process_of_torchrun_captures(plan: Plan, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    run, env = plan.run("vit_small_patch16_224.pets.deck"), os.environ | {"OMP_NUM_THREADS": "1"}
    hovit = ["-m", "hovit"]
    train = [*hovit, "train", run.id, "--accelerator", "cuda"]
    subprocess.run([sys.executable, *hovit, "data", run.pack.id], cwd=tmp_path, check=True)
    records = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]):
        command = [sys.executable, *launcher, *train]
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
        records.append(read_record(tmp_path / run.folder / "record.json").results)
        shutil.rmtree(tmp_path / run.folder)
    assert [results["execution"] for results in records] == ["captured"] * 2
    assert_same(*records, "cuda", "32-true")


@pytest.mark.gpu
@NO_CARD
def test_on_a_card_the_host_stays_a_few_steps_ahead() -> None:
    ahead = RunAhead(torch.device("cuda"))
    for _ in range(3 * captured.AHEAD):
        ahead.wait()
    assert len(ahead.events) == captured.AHEAD
