"""Costs against hand counts, the latency protocol with a made-up clock, and a study's record."""

import gc
import json
import platform
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import Plan, load_plan
from hovit.config.runs import protocol
from hovit.config.schema import Latency, OnGpu
from hovit.measure import latency as latency_module
from hovit.measure.cost import FLASH_ON_CPU, _count_training, _counter, cost, macs
from hovit.measure.latency import (
    CapturedPass,
    forward_ms,
    forward_pass,
    gradients_ms,
    measure_latency,
    summary,
    timed,
)
from hovit.pipeline import measure as study_module
from hovit.pipeline.measure import measure_study
from hovit.pipeline.timing_process import time_in_processes
from hovit.records.record import Device, read_record
from hovit.utils.device import describe_device, keep_freed_memory, pick_device
from hovit.utils.errors import HovitError, OutOfTime
from hovit.utils.files import alone, digest, read_json, read_sealed, write_sealed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_core():
    torch.set_num_threads(1)


# Cost --------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self, num_classes=1000, in_chans=3, width=8):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.dead = nn.Linear(7, 11)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


default_cfgs = generate_default_cfgs({"tiny_of_test_measure": {"input_size": (3, 32, 32)}})


@register_model
def tiny_of_test_measure(pretrained=False, **kwargs):
    return build_model_with_cfg(Tiny, "tiny_of_test_measure", pretrained, **kwargs)


def test_cost_of_a_tiny_model_by_hand():
    assert cost("tiny_of_test_measure", {"width": 10}, 5, 32, part="norm") == {
        "parameters": 280 + 20 + 88 + 55,
        "parameters_unused": 88,
        "parameters_used": 280 + 20 + 55,
        "part_parameters": 20,
        "macs": 16 * 16 * 27 * 10 + 10 * 5,
        "activations": 4 * (16 * 16 * 10 + 10),  # the norm's input and the head's
    }


def test_without_a_backward_pass_only_what_a_forward_pass_tells():
    found = cost("tiny_of_test_measure", {"width": 10}, 5, 32, backward=False)
    assert found == {"parameters": 443, "macs": 16 * 16 * 27 * 10 + 10 * 5}


def test_without_a_backward_pass_nothing_is_computed(monkeypatch):
    seen = []
    forward = Tiny.forward
    monkeypatch.setattr(Tiny, "forward", lambda self, x: seen.append(x) or forward(self, x))
    cost("tiny_of_test_measure", {}, 5, 4096, backward=False)
    assert [(type(x), x.shape) for x in seen] == [(FakeTensor, (1, 3, 4096, 4096))]


def evidence_of_costs():
    """Every sixth row of each committed measurement on a CPU, with what its record counts.

    The records of the H200 are by torch 2.11, which counts no multiply-add of fused attention on a
    CPU.
    """
    for path in sorted((ROOT / "results/evidence/amd-epyc").glob("*/measure/*.json")):
        record = json.loads(path.read_text())
        spec = record["spec"]
        for name, row in list(spec["rows"].items())[::6]:
            size = row.get("image_size", spec["image_size"])
            setting = (row["model"], row["model_args"], spec["num_classes"], size, row["part"])
            yield pytest.param(setting, record["results"]["rows"][name], id=f"{path.stem}/{name}")


@pytest.mark.parametrize(("setting", "row"), list(evidence_of_costs()))
def test_costs_are_those_of_the_committed_records(setting, row):
    found = cost(*setting, backward="activations" in row)
    if "gated" in setting[1].values():  # what its newer implementation keeps is another amount
        found.pop("activations", None)
    assert found == {key: row[key] for key in found}
    assert {"parameters", "macs"} <= set(found)


def test_fused_attention_is_counted_whatever_the_version_of_torch():
    q = torch.randn(1, 2, 5, 8)
    with _counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 5 * 5 * 8)
    assert FLASH_ON_CPU[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu]


def test_what_takes_no_image_is_measured_by_its_own_inputs():
    small, large = (
        cost("attention_layer", {"form": "focused", "side": side}, 2, None) for side in (8, 16)
    )
    assert small["parameters"] == large["parameters"]
    assert large["activations"] / small["activations"] == pytest.approx(4, rel=0.1)
    dot = [cost("attention_layer", {"side": side}, 2, None)["macs"] for side in (8, 16)]
    assert dot == [2 * 64**2 * 256, 2 * 256**2 * 256]


def test_part_is_optional_and_must_exist():
    assert "part_parameters" not in cost("tiny_of_test_measure", {}, 5, 32)
    with pytest.raises(HovitError, match=r"tiny_of_test_measure has no part 'nosuch\.0'"):
        cost("tiny_of_test_measure", {}, 5, 32, part="nosuch.0")


def test_cost_of_levit_deck():
    found = cost("levit_deck", {}, 37, 224, part="stages.0")
    assert found.pop("activations") > 4 * 14 * 14 * 256
    assert found == {
        "parameters": 15_733_482,
        "parameters_unused": 3_164_160,
        "parameters_used": 12_569_322,
        "part_parameters": 1_583_616,
        "macs": 1_101_251_840,
    }


def test_cost_at_another_size_and_of_a_model_of_fixed_size():
    small, large = (cost("levit_deck", {}, 37, size) for size in (64, 224))
    assert small["macs"] < large["macs"]
    assert small["parameters_unused"] == large["parameters_unused"]
    launcher = cost("l_hovit", {}, 37, 224, part="backbone")
    assert launcher["parameters"] == launcher["parameters_used"] == 47_723_133
    assert launcher["part_parameters"] == 4_937_962


def test_macs_of_levit_deck_are_the_decks():
    """Ours without attention's matrix products are its layers'; as torchinfo counts, 33.33 G."""
    model = timm.create_model("levit_deck", num_classes=37).eval()
    layers = torchinfo = 0

    def add(layer, _, out):
        nonlocal layers, torchinfo
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        if isinstance(layer, nn.Linear | nn.Conv2d):
            channels = 1 if isinstance(layer, nn.Conv2d) else -1
            positions = out.numel() // out.shape[channels]
            layers += layer.weight.numel() * positions
            torchinfo += own * positions  # with the bias
        else:  # BN, by rows of its output: the deck flattened its tokens before
            torchinfo += own * out.shape[0]

    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(add)
    ours = macs(model, 224)
    matmuls = sum(
        depth * 2 * tokens**2 * width
        for depth, tokens, width in ((3, 14**2, 256), (3, 7**2, 384), (2, 3**2, 512))
    )
    assert ours - matmuls == layers
    assert round(32 * torchinfo / 1e9, 2) == 33.33
    assert (ours - matmuls) / torchinfo == pytest.approx(1, abs=0.005)  # BN and biases


def test_models_of_any_share_of_attention_have_the_multiply_adds_that_their_table_says():
    rows = {row.id: row for row in load_plan("smoke", ROOT / "config").study("mhsa_share").rows}
    counts = {
        name: cost(row.model, row.model_args, 1000, 224, backward=False)["macs"]
        for name, row in rows.items()
    }
    for name, row in rows.items():
        if row.baseline:
            assert counts[name] == pytest.approx(counts[row.baseline] / 1.25, rel=0.04), name


def test_macs_leave_no_trace():
    model = Tiny(5).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    macs(model, 32)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


# Latency -----------------------------------------------------------------------------------------


class Clock:
    """A timer that remembers whom it timed, and gives every pass a number of its own."""

    def __init__(self, models):
        self.names = {id(model): name for name, model in models.items()}
        self.passes = []

    def __call__(self, model, x):
        assert not model.training
        assert x.shape == (x.shape[0], 3, 16, 16)
        self.passes.append((self.names[id(model)], str(x.shape[0])))
        return float(len(self.passes))


class Counting(nn.Module):
    """x and y in, w x out; counts its passes and those of its gradient."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.passes, self.gradients = [], []

    def forward(self, x, y):
        self.passes.append(self.training)
        out = self.w * x
        out.register_hook(lambda gradient: self.gradients.append(gradient.clone()))
        return out


def test_gradients_are_taken_and_thrown_away():
    model, inputs = Counting(), (torch.ones(2, 3), torch.ones(2))
    for _ in range(2):
        assert gradients_ms(model, *inputs) > 0
    assert model.passes == [True, True]
    assert len(model.gradients) == 2
    assert all(torch.equal(each, torch.ones(2, 3)) for each in model.gradients)
    assert model.w.grad is None
    assert inputs[0].grad is None


def interleave(samples=None, rounds=4, warmup=2, **kwargs):
    models = {name: nn.Identity() for name in "abc"}
    clock = Clock(models)
    result = measure_latency(models, CPU, image_size=16, batches=(1, 4), rounds=rounds,
                             warmup=warmup, samples=samples, timer=clock, **kwargs)  # fmt: skip
    jobs, skip = 3 * 2, 3 * 2 * warmup
    timed = clock.passes[skip:]
    return result, clock.passes[:skip], [timed[i : i + jobs] for i in range(0, len(timed), jobs)]


JOBS = sorted((name, batch) for name in "abc" for batch in "14")


def test_every_round_times_every_model_and_batch_once_in_another_order():
    _, _, rounds = interleave(rounds=5)
    assert [sorted(r) for r in rounds] == [JOBS] * 5
    assert len({tuple(r) for r in rounds}) == 5


def test_warmup_is_not_counted():
    samples, warmup, rounds = interleave()
    assert sorted(warmup) == sorted(JOBS * 2)
    assert {len(samples[name][batch]) for name, batch in JOBS} == {4}
    for r, order in enumerate(rounds):
        for i, (name, batch) in enumerate(order):
            assert samples[name][batch][r] == 12 + 6 * r + i + 1


def test_samples_go_on():
    _, _, uninterrupted = interleave()
    old = {name: {b: [-1.0, -2.0] for b in "14"} for name in "abc"}
    samples, _, rounds = interleave(samples=old)
    assert rounds == uninterrupted[2:]
    for name, batch in JOBS:
        assert samples[name][batch][:2] == [-1.0, -2.0]
        assert len(samples[name][batch]) == 4


def test_after_round_sees_whole_rounds():
    seen = []
    interleave(
        after_round=lambda s: seen.append({len(v) for by in s.values() for v in by.values()})
    )
    assert seen == [{1}, {2}, {3}, {4}]


def test_summary():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert summary([1.0, 2.0]) == {"median": 1.5, "q1": 1.25, "q3": 1.75, "n": 2}


def test_pick_device(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == ("cuda" if there else "cpu")
        assert pick_device("cpu").type == "cpu"
    for name in ("cuda", "nosuch"):
        with pytest.raises(HovitError, match=name):
            pick_device(name)


def test_cpu_milliseconds(monkeypatch):
    ticks = iter([1.0, 1.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert forward_ms(nn.Identity(), torch.zeros(1)) == 250.0


def test_cuda_milliseconds_are_between_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            log.append(("record", self))

        def synchronize(self):
            log.append(("synchronize", self))

        def elapsed_time(self, end):
            log.append(("elapsed", self, end))
            return 12.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    on_a_card = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    ms = forward_ms(lambda _: log.append(("forward", torch.is_inference_mode_enabled())), on_a_card)
    assert ms == 12.5
    start, end = log[0][1], log[2][1]
    assert start is not end
    assert log == [
        ("record", start),
        ("forward", True),
        ("record", end),
        ("synchronize", end),
        ("elapsed", start, end),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_latency_on_a_card():
    models = {"tiny": Tiny()}
    samples = measure_latency(
        models, torch.device("cuda"), image_size=64, batches=(1, 8), rounds=3, warmup=2
    )
    assert models["tiny"].head.weight.is_cuda
    for batch in ("1", "8"):
        assert len(samples["tiny"][batch]) == 3
        assert min(samples["tiny"][batch]) > 0


# A study -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_plan():
    """`smoke` with three rounds at 64 px; three rows of the study `depth`, two of them alike."""
    plan = load_plan("smoke")
    latency = Latency(batches=(1,), rounds=3, warmup=1, threads=1, image_size=64)
    study = plan.study("depth")
    rows = {row.id: row for row in study.rows}
    blocks = rows["blocks_222"].model_copy(update={"part": "stages.2"})
    again = blocks.model_copy(update={"id": "again", "part": None})
    study = study.model_copy(update={"rows": (rows["levit_deck"], blocks, again)})
    return Plan(plan.config, plan.scale.model_copy(update={"latency": latency})), study


@pytest.fixture
def measure(tiny_plan, tmp_path, monkeypatch):
    """measure_study with a clock that ticks 1, 2, 3, ...; warm-up of the two models takes 1 and 2.

    Each call's clock begins at `begin`; with `dies_at`, the pass of that number is a crash.
    """
    plan, study = tiny_plan

    def run(begin=0, dies_at=None, study=study, **kwargs):
        passes = [0]

        def clock(model, x):
            passes[0] += 1
            if passes[0] == dies_at:
                raise KeyboardInterrupt
            return float(begin + passes[0])

        monkeypatch.setattr(study_module, "_timer", lambda _: clock)
        return measure_study(plan.measure_task(study), CPU, root=tmp_path, **kwargs)

    run.plan, run.study = plan, study
    run.path = tmp_path / plan.measure_task(study).path
    run.partial = run.path.with_suffix(".partial.json")
    return run


def test_a_study_leaves_a_valid_record(measure):
    measure()
    record = read_record(measure.path)
    assert (record.kind, record.id, record.scale) == ("measure", "depth", "smoke")
    assert record.spec == measure.plan.measure_task(measure.study).spec
    assert record.spec_hash == digest(record.spec)
    rows = record.results["rows"]
    assert set(rows) == {"levit_deck", "blocks_222", "again"}
    assert rows["levit_deck"]["parameters"] == 15_733_482
    assert rows["blocks_222"]["part_parameters"] == 4_208_640 + 4_211_072
    here = describe_device(CPU)
    assert here.threads == 1
    assert record.provenance.device == here
    for row in rows.values():
        assert Device(**row["device"]) == here
        assert set(row["latency"]) == {"1"}
        assert row["latency"]["1"] == summary(row["latency"]["1"]["ms"]) | {
            "ms": row["latency"]["1"]["ms"]
        }
        assert row["latency"]["1"]["n"] == 3
    assert rows["again"]["latency"] == rows["blocks_222"]["latency"]
    both = rows["again"]["latency"]["1"]["ms"] + rows["levit_deck"]["latency"]["1"]["ms"]
    assert sorted(both) == [3, 4, 5, 6, 7, 8]  # one model is timed once, after two warm-up passes
    assert not measure.partial.exists()


@pytest.fixture
def on_gpu(tiny_plan):
    """The study's throughput: at batch 1 on a CPU, in half precision at 4 on a GPU."""
    changed = {"columns": ("throughput",), "on_gpu": OnGpu(batch=4, precision="fp16 autocast")}
    return tiny_plan[0], tiny_plan[1].model_copy(update=changed)


def test_a_gpu_may_have_batches_and_a_precision_of_its_own(on_gpu):
    settings = on_gpu[0].measure_task(on_gpu[1]).spec["latency"]
    assert (settings["batches"], settings["precision"]) == ([1], "fp32")
    assert protocol(settings, "cpu") == settings
    card = protocol(settings, "cuda")
    assert (card["batches"], card["precision"]) == ([4], "fp16 autocast")
    assert card["rounds"] == settings["rounds"]


def test_on_a_cpu_the_gpus_batches_are_not_timed(on_gpu, tmp_path):
    rows = measure_study(on_gpu[0].measure_task(on_gpu[1]), CPU, root=tmp_path).results["rows"]
    assert {*rows["levit_deck"]["latency"]} == {"1"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_the_gpus_batches_are_timed(on_gpu, tmp_path):
    rows = measure_study(
        on_gpu[0].measure_task(on_gpu[1]), torch.device("cuda"), root=tmp_path
    ).results["rows"]
    assert {*rows["levit_deck"]["latency"]} == {"4"}


def test_autocast_computes_in_half_precision():
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(super().forward(x).dtype)
            return x

    head = Head(3, 2)
    timer = study_module._timer({"precision": "fp16 autocast"})
    assert timer(head, torch.randn(1, 3)) > 0
    assert seen == [torch.float16]
    assert head.weight.dtype == torch.float32
    assert study_module._timer({"precision": "fp32"}) is forward_ms


def test_a_batch_too_large_for_the_card_is_one_line():
    def full(model, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with pytest.raises(HovitError, match="tiny at batch 4096: the GPU memory is too small"):
        measure_latency({"tiny": Tiny()}, CPU, image_size=16, batches=(4096,), rounds=1, warmup=1,
                        timer=full)  # fmt: skip


def test_the_real_clock_is_the_default(tiny_plan, tmp_path):
    plan, study = tiny_plan
    rows = measure_study(plan.measure_task(study), CPU, root=tmp_path).results["rows"]
    assert all(ms > 0 for row in rows.values() for ms in row["latency"]["1"]["ms"])


def test_a_study_without_latency_times_nothing(measure):
    study = measure.study.model_copy(update={"columns": ("parameters",)})
    record = measure(study=study, dies_at=1)
    assert not any({"latency", "device"} & set(row) for row in record.results["rows"].values())


def samples_of(path):
    return {m: by["1"] for m, by in read_json(path)["samples"].items()}


def test_a_deadline_stops_between_rounds_and_the_same_call_goes_on(measure):
    for rounds, begin in ((1, 0), (2, 100)):
        with pytest.raises(OutOfTime):
            measure(begin, deadline=0)
        assert {len(ms) for ms in samples_of(measure.partial).values()} == {rounds}
        assert not measure.path.exists()
    first_two = samples_of(measure.partial)
    assert sorted(ms for of in first_two.values() for ms in of) == [3, 4, 103, 104]
    rows = measure(200).results["rows"]
    for model, kept in first_two.items():
        ms = rows[model]["latency"]["1"]["ms"]
        assert ms[:2] == kept
        assert len(ms) == 3
        assert ms[2] in (203, 204)
    assert not measure.partial.exists()


def test_a_crash_loses_its_round_only(measure):
    with pytest.raises(KeyboardInterrupt):
        measure(dies_at=6)  # within the second round
    kept = samples_of(measure.partial)
    assert sorted(ms for of in kept.values() for ms in of) == [3, 4]
    rows = measure(100).results["rows"]
    for model, of in kept.items():
        assert rows[model]["latency"]["1"]["ms"][:1] == of
        assert len(rows[model]["latency"]["1"]["ms"]) == 3


def edit_partial(measure, **changes):
    with pytest.raises(OutOfTime):
        measure(deadline=0)
    write_sealed(measure.partial, read_sealed(measure.partial) | changes)


def test_what_another_device_began_is_refused(measure):
    other = Device(kind="cuda", name="NVIDIA Imaginary", driver="1.2", threads=7)
    edit_partial(measure, device=other.model_dump())
    before = measure.partial.read_bytes()
    with pytest.raises(HovitError) as error:
        measure()
    line = str(error.value)
    assert all(
        s in line for s in (str(measure.partial), "NVIDIA Imaginary", str(describe_device(CPU)))
    )
    assert measure.partial.read_bytes() == before
    assert not measure.path.exists()


def test_what_a_processor_with_other_instructions_began_is_refused(measure):
    """Virtual machines may give both processors the same name."""
    here = describe_device(CPU)
    other = here.model_copy(update={"cpu_capability": "VSX"})
    edit_partial(measure, device=other.model_dump())
    with pytest.raises(HovitError) as error:
        measure()
    assert f"begun on {other}, but this is {here}; a table" in str(error.value)


@pytest.mark.parametrize("key", ["spec_hash", "code"])
def test_what_was_begun_for_another_spec_or_by_other_code_is_begun_anew(measure, key):
    edit_partial(measure, **{key: "0" * 64})
    rows = measure(100).results["rows"]
    assert min(ms for row in rows.values() for ms in row["latency"]["1"]["ms"]) > 100


def test_a_broken_partial_file_is_named(measure):
    measure.partial.parent.mkdir(parents=True)
    measure.partial.write_text(json.dumps({"samples": {}})[:-3])
    with pytest.raises(HovitError, match=r"depth\.partial\.json: not readable as JSON"):
        measure()


# Freed memory ------------------------------------------------------------------------------------

PASSES = """
import resource, sys, torch
from hovit.utils.device import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    torch.zeros(2**24)  # 64 MiB, more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(13)][8:]  # settled by then
steps = sorted(after - before for before, after in zip(counts, counts[1:]))
print(steps[len(steps) // 2])  # the system may reclaim pages during one pass
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_a_process_that_keeps_freed_memory_soon_faults_no_page_in():
    faults = {}
    for way in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", PASSES, way], capture_output=True, text=True, check=True
        )
        faults[way] = int(done.stdout)
    assert faults["kept"] < 16 < faults["returned"]


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_the_protocol_says_what_becomes_of_freed_memory():
    plan = load_plan("smoke", ROOT / "config")
    spec = plan.measure_task(plan.study("hovit")).spec
    assert spec["latency"]["memory"] == "kept"


def test_a_study_may_be_timed_with_freed_memory_returned_but_not_after_it_is_kept(
    monkeypatch, tmp_path
):
    plan = load_plan("smoke", ROOT / "config")
    study = plan.study("efficientvit_allocator")
    assert plan.measure_task(study).spec["latency"]["memory"] == "returned"
    monkeypatch.setattr("hovit.utils.device.freed_memory_kept", True)
    with pytest.raises(HovitError, match=r"this process already keeps it; .* `hovit measure"):
        measure_study(plan.measure_task(study), CPU, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("keep", [True, False])
def test_measuring_keeps_freed_memory_where_its_record_says_so(keep, monkeypatch, tmp_path):
    plan = load_plan("smoke", ROOT / "config")
    family = plan.study("efficientvit_speed")
    study = family.model_copy(
        update={"id": "one", "rows": family.rows[:1], "batches": (1,), "keep_memory": keep}
    )
    called = []
    monkeypatch.setattr("hovit.utils.device.freed_memory_kept", False)
    monkeypatch.setattr(study_module, "keep_freed_memory", lambda: called.append(True))
    record = measure_study(plan.measure_task(study), CPU, tmp_path)
    assert bool(called) == keep == (record.spec["latency"]["memory"] == "kept")


# Protocol on a GPU, shown on a CPU ---------------------------------------------------------------


def a_card(monkeypatch, cost_ms):
    """CUDA events whose clock a call moves on by `cost_ms`; returns a call and its log."""
    clock, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing=False):
            self.at = None

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    def call(*_):
        clock[0] += cost_ms
        calls.append("pass")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return call, calls


@pytest.mark.parametrize("cost_ms", [0.02, 0.7, 9.0, 25.0])
def test_a_sample_on_a_card_takes_ten_milliseconds(monkeypatch, cost_ms):
    call, calls = a_card(monkeypatch, cost_ms)
    on_a_card = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert timed(call, on_a_card) == pytest.approx(cost_ms)
    *_, last = "".join("s" if c == "synchronize" else "p" for c in calls).split("s")[:-1]
    assert 10 <= len(last) * cost_ms <= max(10 + 3 * cost_ms, 12)


def test_a_model_on_a_card_warms_up_for_a_third_of_a_second(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def call():
        now[0] += 0.07
        return 1.0

    for device, warmup, took in (("cuda", 3, 5), ("cuda", 9, 9), ("cpu", 3, 3)):
        now[0] = 0.0
        latency_module._warm_up(call, warmup, torch.device(device))
        assert round(now[0] / 0.07) == took


def test_captured_passes_are_timed_in_the_same_rounds():
    models = {"a": Tiny(), "b": Tiny()}
    captured = CapturedPass(forward_pass)
    samples = measure_latency(
        models, CPU, image_size=16, batches=(1, 2), rounds=3, warmup=1, captured=captured
    )
    assert all({*by} == {"1", "1 captured", "2", "2 captured"} for by in samples.values())
    assert all(len(ms) == 3 for by in samples.values() for ms in by.values())
    for model in models.values():
        events = captured.graphs[id(model)].events
        assert [name for name, _ in events] == ["eager", "capture", "eager", "capture", "replay"]
        assert events[-1] == ("replay", 6)


def test_a_pass_that_cannot_be_captured_is_timed_eagerly_only():
    class Waits(Tiny):
        def forward(self, x):
            return super().forward(x) * float(x.sum() > 0)

    samples = measure_latency(
        {"waits": Waits(), "tiny": Tiny()}, CPU, image_size=16, batches=(1,), rounds=2, warmup=1,
        captured=CapturedPass(forward_pass),
    )  # fmt: skip
    assert {*samples["waits"]} == {"1"}
    assert {*samples["tiny"]} == {"1", "1 captured"}


def test_gradients_can_be_captured():
    samples = measure_latency(
        {"tiny": Tiny()}, CPU, image_size=16, batches=(2,), rounds=1, warmup=1,
        timer=gradients_ms, captured=CapturedPass(latency_module.PASSES[gradients_ms]),
    )  # fmt: skip
    assert {*samples["tiny"]} == {"2", "2 captured"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_passes_and_memory_on_a_card():
    peaks = {}
    samples = measure_latency(
        {"tiny": Tiny()}, torch.device("cuda"), image_size=64, batches=(1, 8), rounds=3, warmup=1,
        captured=CapturedPass(forward_pass), peaks=peaks,
    )  # fmt: skip
    assert {*samples["tiny"]} == {"1", "1 captured", "8", "8 captured"}
    assert 0 < peaks["tiny"]["1"] < peaks["tiny"]["8"]


# Several processes -------------------------------------------------------------------------------


def test_processes_share_the_rounds(tiny_plan, tmp_path):
    plan, study = tiny_plan
    latency = plan.scale.latency.model_copy(update={"processes": 2})
    task = Plan(plan.config, plan.scale.model_copy(update={"latency": latency})).measure_task(study)
    assert task.spec["latency"]["processes"] == 2
    assert "processes" not in plan.measure_task(study).spec["latency"]
    with pytest.raises(OutOfTime):
        measure_study(task, CPU, root=tmp_path, deadline=0)
    record = measure_study(task, CPU, root=tmp_path)
    assert record.results["protocol"] == "cpu-clock"
    for row in record.results["rows"].values():
        (found,) = row["latency"].values()
        assert found["n"] == 3
        assert len(found["processes"]) == 2
        assert found["processes"][0] == summary(found["ms"][:2])["median"]
        assert found["processes"][1] == pytest.approx(found["ms"][2], abs=1e-4)
        assert Device(**row["device"]) == describe_device(CPU)
    assert [path.name for path in (tmp_path / task.path).parent.iterdir()] == ["depth.json"]


def test_a_timing_process_ends_with_its_parent(tiny_plan, tmp_path):
    plan, study = tiny_plan
    path = tmp_path / "x.partial.json"
    job = {"spec": plan.measure_task(study).spec, "begun": {"spec_hash": "a", "code": "b"},
           "partial": str(path), "rounds": 10**6, "left": None}  # fmt: skip
    command = [sys.executable, "-m", "hovit.pipeline.timing_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None
        process.stdin.close()  # as the system does for a killed parent
        assert process.wait(timeout=60) == 1


def test_two_processes_do_not_measure_one_study(tiny_plan, tmp_path):
    task = tiny_plan[0].measure_task(tiny_plan[1])
    with alone(tmp_path / task.path.with_suffix("")), pytest.raises(HovitError, match="in use by"):
        measure_study(task, CPU, root=tmp_path)


def test_a_process_that_fails_is_one_line(tmp_path):
    spec = {"latency": {"rounds": 2, "processes": 2, "threads": 1, "memory": "returned"}}
    with pytest.raises(HovitError, match=r"^x\.process0\.partial\.json: KeyError: 'image_size'$"):
        time_in_processes(spec | {"rows": {}}, {}, tmp_path / "x.partial.json", float("inf"))


def test_counting_frees_the_weights() -> None:
    net = timm.create_model("levit_deck", depth=(1, 1, 1))
    weights = [weakref.ref(parameter) for parameter in net.parameters()]
    _count_training(net, 64)
    del net
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]
