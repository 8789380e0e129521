"""The sweep: within its budget, and in several sittings the same as in one."""

import dataclasses
import io
import itertools
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.numpy import save_file
from typer.testing import CliRunner

from hovit.cli import app
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Study
from hovit.config.tasks import Task, TrainTask
from hovit.data.pack import prepare
from hovit.pipeline import pool
from hovit.pipeline.export import Export, parse_size, unpack_records
from hovit.pipeline.schedule import Schedule, finished_steps, order_tasks, total_steps
from hovit.pipeline.sweep import all_tasks, sweep
from hovit.records.evidence import records_in
from hovit.records.record import read_record
from hovit.training import classification as loop
from hovit.utils.errors import HovitError

STUDY = {
    "id": "tiny",
    "title": "Two rows",
    "source": {"paper": "ours", "place": "a test"},
    "columns": ["parameters", "top1", "latency"],
    "rows": [
        {"id": "a", "label": "A", "model": "levit_deck", "model_args": SMALL, "ours": True},
        {"id": "b", "label": "B", "model": "hovit", "model_args": {"depth": [1, 1, 1]},
         "ours": True},
    ],
}  # fmt: skip


@pytest.fixture
def tiny(plan: Plan) -> Plan:
    """A plan of one study with two rows on 64 digits."""
    study = Study.model_validate(STUDY)
    limit = plan.scale.limit.model_copy(update={"train": 64, "val": 32, "test": 32})
    latency = plan.scale.latency.model_copy(update={"rounds": 3, "batches": (1,), "warmup": 1})
    return dataclasses.replace(
        plan,
        config=plan.config.model_copy(update={"studies": {"tiny": study}}),
        scale=plan.scale.model_copy(
            update={"limit": limit, "latency": latency, "epoch_factor": 0.06}
        ),
        _tasks={},
    )


def run_sweep(plan: Plan, root: Path, deadline: float, log: list[str], **kwargs: Any) -> list[str]:
    return sweep(
        plan,
        [plan.study("tiny")],
        data_root=root,
        deadline=deadline,
        accelerator="cpu",
        root=root,
        log=log.append,
        **kwargs,
    )


def outcomes(plan: Plan, root: Path) -> list[object]:
    found = []
    for seeds in plan.runs.values():
        results = read_record(root / seeds[0].folder / "record.json").results
        values = [results[key] for key in ("top1", "loss", "history")]
        found.append([*values, results.get("execution")])
    return found


def test_many_short_sittings_end_as_one_long(
    tiny: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    assert run_sweep(tiny, tmp_path / "one", time.monotonic() + 600, log) == []
    assert sum(", loss" in line for line in log) == 2
    assert (tmp_path / "one" / tiny.measure_task(tiny.study("tiny")).path).exists()

    sittings = 0
    calls = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(calls)))  # a clock of calls
    while run_sweep(tiny, tmp_path / "many", next(calls) + 12, log):
        sittings += 1
        assert sittings < 40
    assert sittings > 2
    assert outcomes(tiny, tmp_path / "many") == outcomes(tiny, tmp_path / "one")


def test_what_is_done_is_not_done_again(tiny: Plan, tmp_path: Path) -> None:
    log: list[str] = []
    run_sweep(tiny, tmp_path, time.monotonic() + 600, log)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    log.clear()
    assert run_sweep(tiny, tmp_path, time.monotonic() + 600, log) == []
    assert log == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == times


def test_after_an_unexpected_error_a_new_process_does_the_rest(
    tiny: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a CUDA error, which every later call in its process raises again."""
    log: list[str] = []
    first = tiny.train_task(next(iter(tiny.runs.values()))[0])

    def fail(*_: Any) -> str:
        raise RuntimeError("one line\nand more")

    monkeypatch.setattr(pool, "do_task", fail)  # in this process only
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    todo = run_sweep(tiny, tmp_path, time.monotonic() + 600, log)
    assert todo == [f"{first} (failed)"]  # the other tasks are done
    assert any(line.strip().startswith("failed: RuntimeError: one line") for line in log)


def test_no_time_left_does_nothing_and_says_what_is_to_do(tiny: Plan, tmp_path: Path) -> None:
    todo = run_sweep(tiny, tmp_path, time.monotonic() - 1, [])
    assert [job.split()[0] for job in todo] == ["train", "train", "measure"]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_compiled_run_says_so_in_its_record(
    tiny: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """As with `hovit train --compile`, in this process and in others; no compiler is needed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # in the processes that the sweep starts
    for compile in (True, False) if jobs == 1 else (True,):
        root = tmp_path / str(compile)
        options = {"compile": compile, "jobs": jobs, "only": "train"}
        assert run_sweep(tiny, root, time.monotonic() + 600, [], **options) == []
        for seeds in tiny.runs.values():
            results = read_record(root / seeds[0].folder / "record.json").results
            assert results.get("execution") == ("compiled, eager" if compile else None)


@pytest.mark.parametrize("option", ["--compile", "--no-compile", None])
def test_the_option_reaches_the_sweep(monkeypatch: pytest.MonkeyPatch, option: str | None) -> None:
    given: list[bool] = []

    def note(*_: Any, compile: bool, **__: Any) -> list[str]:
        given.append(compile)
        return []

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("hovit.pipeline.sweep.sweep", note)
    arguments = ["sweep", "--study", "hovit", "--budget", "1m", *([option] if option else [])]
    assert CliRunner().invoke(app, arguments).output == "all done\n"
    assert given == [option == "--compile"]


def test_what_is_timed_with_freed_memory_handed_back_comes_before_what_keeps_it(tmp_path):
    plan = load_plan("smoke", ROOT / "config")
    studies = [plan.study(name) for name in ("efficientvit_speed", "efficientvit_allocator")]
    todo = sweep(plan, studies, data_root=tmp_path, deadline=0.0, root=tmp_path)
    assert todo == ["measure efficientvit_allocator", "measure efficientvit_speed"]


# Order and time --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy() -> Plan:
    return load_plan("proxy", ROOT / "config")


def names(tasks: list[Task]) -> list[str]:
    return [str(task) for task in tasks]


def test_priority_takes_studies_in_order_and_the_first_seed_of_all_rows_first(proxy: Plan) -> None:
    studies = [proxy.study("launcher"), proxy.study("hovit")]
    ordered = names(order_tasks(proxy, studies, priority=True, only="train", done=True))
    first = [name for name in ordered if name.endswith("seed 0")]
    assert ordered[: len(first)] == first
    assert {name.split()[1] for name in first} == {name.split()[1] for name in ordered}
    own = [f"train {runs[0].id} seed 0" for row in studies[0].rows
           if (runs := proxy.runs_of(studies[0], row))]  # fmt: skip
    assert [name for name in first if name in own] == own
    assert first.index(own[-1]) < first.index("train hovit.pets.deck seed 0")
    pretraining = "train resnet50.pretrain.pretrain seed 0"
    assert first.index(pretraining) < first.index("train l_levit_deck.pets.deck seed 0")
    assert sorted(ordered) == sorted(names(order_tasks(proxy, studies, only="train", done=True)))


def test_only_leaves_out_the_other_kind_of_task(proxy: Plan) -> None:
    studies = [proxy.study("hovit")]
    assert names(order_tasks(proxy, studies, only="measure", done=True)) == ["measure hovit"]
    both = names(order_tasks(proxy, studies, done=True))
    assert both[-1] == "measure hovit"
    assert both[:-1] == names(order_tasks(proxy, studies, only="train", done=True))


def schedule_of(plan: Plan, study: str, tmp_path: Path, deadline: float, **kwargs: Any) -> Schedule:
    tasks = order_tasks(plan, [plan.study(study)], priority=True)
    return Schedule(plan, tasks, deadline, tmp_path, must_finish=True, **kwargs)


def train_for(schedule: Schedule, start: float, per_step: float, setup: float = 2.0) -> Task:
    """Start the next task and report two steps of it."""
    task = schedule.next(start)
    assert isinstance(task, TrainTask)
    steps = total_steps(task.run)
    assert steps
    schedule.begin(task, start)
    schedule.report(task, 1, steps, start + setup)
    schedule.report(task, 101, steps, start + setup + 100 * per_step)
    return task


def test_a_run_that_cannot_finish_is_held_back(proxy: Plan, tmp_path: Path) -> None:
    run = proxy.run("hovit.pets.deck")
    steps = total_steps(run)
    assert steps == run.recipe.epochs * 160  # 5,144 images at batch 32, the rest is dropped
    enough = 2.0 + 0.01 * steps  # set-up and all steps at 10 ms
    for time_left, starts in ((enough + 1, True), (enough - 1, False)):
        schedule = schedule_of(proxy, "dropout", tmp_path, deadline=1000 + time_left)
        first = train_for(schedule, 0.0, per_step=0.01)
        assert isinstance(first, TrainTask)
        assert schedule.predict(first.run) == pytest.approx(enough)
        assert (schedule.next(1000.0) is not None) == starts
        assert len(schedule.waiting) + len(schedule.running) == 6 * 3 + 1  # and the measurement


def test_a_checkpoint_shortens_what_is_left_to_do(
    proxy: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = schedule_of(proxy, "dropout", tmp_path, deadline=1010.0)
    train_for(schedule, 0.0, per_step=0.01)
    assert schedule.next(1000.0) is None
    begun = proxy.run("levit_deck_fixed.pets.deck")
    whole = total_steps(begun)
    assert whole
    path = tmp_path / begun.folder / "state.safetensors"
    path.parent.mkdir(parents=True)
    epochs = begun.recipe.epochs
    save_file({}, path, {"hovit": json.dumps({"epoch": epochs - 2, "step": 7})})
    assert finished_steps(begun, tmp_path) == whole - 2 * 160 + 7
    task = schedule.next(1000.0)
    assert isinstance(task, TrainTask)
    assert task.run == begun


def test_the_slowest_similar_run_counts(proxy: Plan, tmp_path: Path) -> None:
    schedule = schedule_of(proxy, "hovit", tmp_path, deadline=1e9)
    pretraining = schedule.next(0.0)
    assert isinstance(pretraining, TrainTask)
    slow, fast = (train_for(schedule, 0.0, per_step) for per_step in (0.03, 0.01))
    assert isinstance(slow, TrainTask)
    assert isinstance(fast, TrainTask)
    other_seed = proxy.run(fast.run.id, 1)
    assert schedule.predict(other_seed) == pytest.approx(2 + 0.01 * total_steps(fast.run))
    unknown = proxy.run("hovit.pets.deck")
    assert schedule.predict(unknown) == pytest.approx(2 + 0.03 * total_steps(unknown))


def test_a_run_waits_for_the_one_it_starts_from(proxy: Plan, tmp_path: Path) -> None:
    schedule = schedule_of(proxy, "launcher", tmp_path, 1e9)
    started = []
    while task := schedule.next(0.0):
        started.append(task)
    assert isinstance(started[0], TrainTask)
    assert started[0].run.id == "resnet50.pretrain.pretrain"
    assert all(task.run.weights is None for task in started)  # type: ignore[attr-defined]
    assert any(task.run.weights for task in schedule.waiting if isinstance(task, TrainTask))
    schedule.end(started[0], "done", 1.0)
    task = schedule.next(1.0)
    assert isinstance(task, TrainTask)
    assert task.run.weights is not None


def test_a_run_does_not_start_from_one_that_failed(proxy: Plan, tmp_path: Path) -> None:
    """The folder of the failed run may hold weights of an earlier spec."""
    schedule = schedule_of(proxy, "launcher", tmp_path, 1e9)
    first = schedule.next(0.0)
    assert isinstance(first, TrainTask)
    assert first.run.id == "resnet50.pretrain.pretrain"
    schedule.end(first, "failed", 1.0)
    while task := schedule.next(1.0):
        assert isinstance(task, TrainTask)
        assert task.run.weights is None


def test_a_measurement_has_the_machine_to_itself(proxy: Plan, tmp_path: Path) -> None:
    study = proxy.study("hovit")
    tasks = order_tasks(proxy, [study], tmp_path, only="measure")
    run = proxy.train_task(proxy.run("hovit.pets.deck"))
    schedule = Schedule(proxy, [run, *tasks], 1e9, tmp_path)
    assert schedule.next(0.0) == run
    assert schedule.next(0.0) is None  # while a run trains
    schedule.end(run, "done", 1.0)
    assert schedule.next(1.0) == tasks[0]
    schedule.waiting.append(proxy.train_task(proxy.run("hovit.pets.deck", 1)))
    assert schedule.next(1.0) is None  # while it measures


# Several processes -----------------------------------------------------------------------------


def test_processes_share_the_work_and_export_it(tiny: Plan, tmp_path: Path) -> None:
    log: list[str] = []
    here, there = tmp_path / "here", tmp_path / "there"
    assert run_sweep(tiny, here, time.monotonic() + 600, log) == []
    log.clear()
    file = tmp_path / "out.tgz"
    export = Export(file, all_tasks(tiny, [tiny.study("tiny")]), there)
    assert run_sweep(tiny, there, time.monotonic() + 600, log, jobs=2, export=export) == []
    assert outcomes(tiny, there) == outcomes(tiny, here)
    starts = [i for i, line in enumerate(log) if line.startswith("start train")]
    ends = [i for i, line in enumerate(log) if line.startswith("done train")]
    assert len(starts) == len(ends) == 2
    assert max(starts) < min(ends)  # at the same time
    measured = [log.index(line) for line in log if line.endswith("measure tiny")]
    assert min(measured) > max(ends)  # alone

    unpack_records(file, tmp_path / "unpacked")
    taken = {p.relative_to(tmp_path / "unpacked") for p in records_in(tmp_path / "unpacked")}
    assert taken == {p.relative_to(there) for p in records_in(there)}
    assert len(taken) == 3
    for path in taken:
        assert (tmp_path / "unpacked" / path).read_bytes() == (there / path).read_bytes()


def test_a_worker_that_dies_fails_its_task_only(
    tiny: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, killed = pool._send, []

    def send_and_kill(worker: pool.Worker, task: Task, settings: pool.Settings) -> pool.Worker:
        worker = send(worker, task, settings)
        if not killed:
            worker.process.kill()
            killed.append(f"{task} (failed)")
        return worker

    monkeypatch.setattr(pool, "_send", send_and_kill)
    log: list[str] = []
    assert run_sweep(tiny, tmp_path, time.monotonic() + 600, log, jobs=2) == killed
    assert any("its process died (out of memory?)" in line for line in log)


# Export ----------------------------------------------------------------------------------------


def stop_half_way(plan: Plan, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Train with too little time; return all tasks of the study."""
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: float(next(calls)))
        assert run_sweep(plan, root, next(calls) + 12, [])
    return all_tasks(plan, [plan.study("tiny")])


def test_the_state_of_a_detector_has_no_best_weights(tiny: Plan, tmp_path: Path) -> None:
    task = next(
        task for task in all_tasks(tiny, [tiny.study("tiny")]) if isinstance(task, TrainTask)
    )
    path = tmp_path / task.run.folder / "state.safetensors"
    path.parent.mkdir(parents=True)
    history = [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}]
    save_file({"x": torch.zeros(1).numpy()}, path, {"hovit": json.dumps({"history": history})})
    file = tmp_path / "out.tgz"
    assert Export(file, [task], tmp_path, states=True).write() == []
    with tarfile.open(file) as tar:
        assert tar.getnames() == [(task.run.folder / "state.safetensors").as_posix()]


def test_samples_of_all_processes_travel(tiny: Plan, tmp_path: Path) -> None:
    task = tiny.measure_task(tiny.study("tiny"))
    assert task is not None
    names = {"tiny.partial.json", "tiny.process0.partial.json", "tiny.process1.partial.json"}
    (tmp_path / task.path).parent.mkdir(parents=True)
    for name in names | {"tiny_2.partial.json"}:
        (tmp_path / task.path).with_name(name).write_text("{}")
    file = tmp_path / "out.tgz"
    assert Export(file, [task], tmp_path, states=True).write() == []
    with tarfile.open(file) as tar:
        assert set(tar.getnames()) == {task.path.with_name(n).as_posix() for n in names}


def test_an_export_that_cannot_be_written_stops_nothing(
    tiny: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    export = Export(tmp_path / "file/out.tgz", [], tmp_path)
    export.refresh()
    export._last = 0.0
    export.refresh()
    assert capsys.readouterr().err.count("warning: not exported, ") == 1  # said once
    with pytest.raises(HovitError, match="cannot be written"):
        export.write()


def test_states_travel_and_the_run_goes_on(
    tiny: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = stop_half_way(tiny, tmp_path / "card", monkeypatch)
    file = tmp_path / "out.tgz"
    assert Export(file, tasks, tmp_path / "card", states=True).write() == []
    with tarfile.open(file) as tar:
        names = tar.getnames()
    shutil.unpack_archive(file, tmp_path / "next", "gztar")
    (state,) = [name for name in names if name.endswith("state.safetensors")]
    run = next(t.run for t in tasks if isinstance(t, TrainTask) and str(t.run.folder) in state)
    begun = finished_steps(run, tmp_path / "card")
    assert begun > 0
    shutil.copytree(tmp_path / "card/data", tmp_path / "next/data")
    assert finished_steps(run, tmp_path / "next") == begun
    assert run_sweep(tiny, tmp_path / "next", time.monotonic() + 600, []) == []
    record = read_record(tmp_path / "next" / run.folder / "record.json")
    assert record.results["interruptions"] == 1

    total = file.stat().st_size
    left_out = Export(file, tasks, tmp_path / "card", states=True, max_size=total // 2).write()
    assert len(left_out) == 1
    assert str(tasks[-1]).split()[0] == "train"
    assert file.stat().st_size <= total // 2
    Export(file, tasks, tmp_path / "card").write()
    with tarfile.open(file) as tar:
        assert not [name for name in tar.getnames() if name.endswith(".safetensors")]


def test_a_foreign_or_broken_export_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "out.tgz"
    path.write_bytes(b"no archive")
    with pytest.raises(HovitError, match="not a readable export"):
        unpack_records(path, tmp_path)
    for name in ("../results/runs/record.json", "/tmp/record.json"):
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
        with pytest.raises(HovitError, match="is not a path inside an export"):
            unpack_records(path, tmp_path / "target")
    assert not (tmp_path / "results").exists()
    data = random.Random(0).randbytes(100_000)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("results/runs/smoke/a/seed0/record.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(HovitError, match="not a readable export"):
        unpack_records(path, tmp_path / "target")


@pytest.mark.parametrize(
    ("text", "size"), [("60M", 60_000_000), ("1.5GB", 1_500_000_000), ("7", 7)]
)
def test_a_size_in_words(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "60 apples", "-3M", "M"])
def test_no_size(text: str) -> None:
    with pytest.raises(HovitError, match="--max-size"):
        parse_size(text)


REFUSE = """
import importlib.abc, importlib.util, sys

class Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    names = {"snakemake", "dvc", "typst", "pytest", "hypothesis", "sklearn", "matplotlib", "onnx",
             "onnxruntime", "pycocotools", "moto", "jinja2"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.util.spec_from_loader(name, self)
    def exec_module(self, module):
        raise ModuleNotFoundError(f"{module.__name__} is refused")

sys.meta_path.insert(0, Refuse())
"""


def test_a_sweep_needs_few_packages(tiny: Plan, tmp_path: Path) -> None:
    """It runs where Snakemake, DVC, typst and pytest are missing; the images are packed."""
    prepare(tiny.run("hovit-depth=_1__1__1_.pets.deck").pack, tmp_path, tmp_path / "packed")
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(dataclasses.replace(tiny, _tasks={})))
    code = REFUSE + (
        "import pickle, time; from pathlib import Path\n"
        "import hovit.models; from hovit.pipeline.sweep import sweep, all_tasks\n"
        "from hovit.pipeline.export import Export\n"
        "plan = pickle.loads(Path('plan.pickle').read_bytes())\n"
        "study = plan.study('tiny')\n"
        "study = study.model_copy(update={'rows': study.rows[:1]})\n"
        "export = Export(Path('out.tgz'), all_tasks(plan, [study]))\n"
        "assert sweep(plan, [study], data_root=Path(), deadline=time.monotonic() + 600,\n"
        "             accelerator='cpu', export=export) == []"
    )
    pack = tiny.run("hovit-depth=_1__1__1_.pets.deck").pack
    (tmp_path / pack.folder).parent.mkdir(parents=True)
    (tmp_path / "packed").rename(tmp_path / pack.folder)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out.tgz").stat().st_size > 1000
