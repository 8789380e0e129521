"""The sweep: within its budget, and in several sittings the same as in one."""

import dataclasses
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Study
from hovit.pipeline.sweep import sweep
from hovit.records.record import read_record
from hovit.training import classification as loop
from hovit.training.trainer import Options

STUDY = {
    "id": "tiny",
    "title": "Two rows",
    "source": {"seed": "ours", "place": "a test"},
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


def run_sweep(plan: Plan, root: Path, deadline: float, log: list[str]) -> list[str]:
    return sweep(
        plan,
        [plan.study("tiny")],
        data_root=root,
        deadline=deadline,
        accelerator="cpu",
        root=root,
        options=lambda _, deadline: Options(deadline=deadline),
        log=log.append,
    )


def outcomes(plan: Plan, root: Path) -> list[object]:
    found = []
    for seeds in plan.runs.values():
        results = read_record(root / seeds[0].folder / "record.json").results
        found.append([results[key] for key in ("top1", "loss", "history")])
    return found


def test_many_short_sittings_end_as_one_long(
    tiny: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    assert run_sweep(tiny, tmp_path / "one", time.monotonic() + 600, log) == []
    assert sum("top-1" in line for line in log) == 2
    assert (tmp_path / "one" / tiny.measure_task(tiny.study("tiny")).path).exists()

    sittings = 0
    clock = {"steps": 0}
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(clock["steps"]))  # a clock of calls

    def tick(deadline: float) -> Options:
        return Options(deadline=deadline, on_step=lambda *_: clock.update(steps=clock["steps"] + 1))

    while True:
        todo = sweep(
            tiny, [tiny.study("tiny")], data_root=tmp_path, deadline=clock["steps"] + 2.5,
            accelerator="cpu", root=tmp_path / "many", options=lambda _, d: tick(d), log=log.append,
        )  # fmt: skip
        sittings += 1
        if not todo:
            break
        assert sittings < 20
    assert sittings > 2  # 3 epochs of 2 steps and 2 runs, 2 or 3 steps a sitting
    assert outcomes(tiny, tmp_path / "many") == outcomes(tiny, tmp_path / "one")


def test_what_is_done_is_not_done_again(tiny: Plan, tmp_path: Path) -> None:
    log: list[str] = []
    run_sweep(tiny, tmp_path, time.monotonic() + 600, log)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    log.clear()
    assert run_sweep(tiny, tmp_path, time.monotonic() + 600, log) == []
    assert log == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == times


def test_no_time_left_does_nothing_and_says_what_is_to_do(tiny: Plan, tmp_path: Path) -> None:
    todo = run_sweep(tiny, tmp_path, time.monotonic() - 1, [])
    assert [job.split()[0] for job in todo] == ["train", "train", "measure"]
    assert not list(tmp_path.rglob("*.json"))


def test_what_is_timed_with_freed_memory_handed_back_comes_before_what_keeps_it(tmp_path):
    plan = load_plan("smoke", ROOT / "config")
    studies = [plan.study(name) for name in ("efficientvit_speed", "efficientvit_allocator")]
    todo = sweep(plan, studies, data_root=tmp_path, deadline=0.0, root=tmp_path)
    assert todo == ["measure efficientvit_allocator", "measure efficientvit_speed"]
