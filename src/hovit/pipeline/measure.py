"""Measure a study: the cost of every row, and the interleaved latency of all rows."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config.runs import protocol
from ..config.tasks import MeasureTask
from ..measure.cost import cost
from ..measure.latency import (
    CAPTURED,
    PASSES,
    PROTOCOLS,
    CapturedPass,
    Samples,
    Timer,
    TrainingStep,
    forward_ms,
    gradients_ms,
    half_precision_ms,
    measure_latency,
    summary,
)
from ..records.record import Device, Record, git_state, write_record
from ..utils import device as device_module
from ..utils.create_model import create_model
from ..utils.device import describe_device, keep_freed_memory, peak_memory_mb
from ..utils.errors import HovitError, OutOfTime
from ..utils.files import alone, read_sealed, write_sealed
from .timing_process import partial_files, time_in_processes


def measure_study(
    task: MeasureTask,
    device: torch.device,
    root: Path = Path(),
    deadline: float = math.inf,
) -> Record:
    """Measure all rows of a study and write their record; a killed call resumes.

    Args:
        task: which study, at which scale.
        device: where latency is measured (ONNX Runtime's always on the CPU). On a CPU, the study
            or the scale sets the number of threads.
        root: top folder of the artifact.
        deadline: `time.monotonic()` after which to stop.

    Raises:
        OutOfTime: at the deadline; the same call resumes.
        HovitError: if an interrupted measurement started on another device, its file changed,
            another process measures the study, or this process already keeps freed memory and the
            study wants it returned.
    """
    with alone(root / task.path.with_suffix("")):
        return _measure(task, device, root, deadline)


def _measure(task: MeasureTask, device: torch.device, root: Path, deadline: float) -> Record:
    begin = time.monotonic()
    git_state()  # the record states the commit at the start
    study, spec = task.study, task.spec
    device = torch.device("cpu") if study.workload == "onnx" else device
    if device.type == "cuda":  # the peak of an earlier study is not that of this one
        torch.cuda.reset_peak_memory_stats(device)
    _set_up(task)
    rows = count_study(task, root)
    where = describe_device(device)
    partial = _partial_path(task, root)
    results: dict[str, Any] = {"rows": rows}
    if spec["latency"]:
        results["protocol"] = PROTOCOLS[device.type]
        for name, timed in _latency(task, rows, device, where, partial, deadline).items():
            rows[name] = rows[name] | {"device": where.model_dump()} | timed
    seconds = time.monotonic() - begin
    record = task.make_record(results, where, seconds, peak_memory_mb(device))
    write_record(root / task.path, record)
    for path in (partial, *(partial_files(spec, partial) if spec["latency"] else ())):
        path.unlink(missing_ok=True)
    return record


def count_study(task: MeasureTask, root: Path = Path()) -> dict[str, Any]:
    """Count parameters, multiply-adds and activations of every row, and save them.

    Counts do not depend on the device. An interrupted measurement resumes with them, and so does
    one on another machine that is given the file, so that no time of a rented card is spent on
    counting.

    Returns:
        row -> counts, from the saved file if it has them.
    """
    study, spec, partial = task.study, task.spec, _partial_path(task, root)
    saved = _read_partial(partial, _identity(task))
    if "costs" not in saved:
        backward = study.trained or "activations" in study.columns
        costs = {name: _cost(row, spec, backward) for name, row in spec["rows"].items()}
        saved = _identity(task) | {"costs": costs}
        write_sealed(partial, saved)
    return dict(saved["costs"])


def _partial_path(task: MeasureTask, root: Path) -> Path:
    """File of a measurement that has begun."""
    return root / task.path.with_suffix(".partial.json")


def _identity(task: MeasureTask) -> dict[str, Any]:
    """Hashes of spec and code; a measurement resumes only with the same ones."""
    return {"spec_hash": task.spec_hash, "code": task.code}


def _read_partial(partial: Path, begun: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement that has begun; empty if there is none of this spec and this code."""
    if not partial.exists():
        return {}
    saved = read_sealed(partial)
    return saved if all(saved.get(key) == begun[key] for key in ("spec_hash", "code")) else {}


def _set_up(task: MeasureTask) -> None:
    """Set seed, precision and threads of this process."""
    study = task.study
    if not study.keep_memory and device_module.freed_memory_kept:
        raise HovitError(
            f"{study.id}: freed memory must be returned, but this process already keeps it; run "
            f"the same command again, or `hovit measure {study.id}`"
        )
    torch.manual_seed(0)
    # With TF32, convolutions would run in lower precision than the linear layers they replace.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(study.threads or task.scale.latency.threads)


def _cost(row: dict[str, Any], spec: dict[str, Any], backward: bool) -> dict[str, Any]:
    size, classes = row.get("image_size", spec["image_size"]), spec["num_classes"]
    return dict(cost(row["model"], row["model_args"], classes, size, row["part"], backward))


def _latency(
    task: MeasureTask,
    costs: Mapping[str, Any],
    device: torch.device,
    where: Device,
    partial: Path,
    deadline: float,
) -> dict[str, dict[str, Any]]:
    """Times of each row: `latency` by batch, and on a GPU `captured` and `peak_memory_mb`.

    If several processes time the rows, `processes` of a batch lists their medians.
    """
    begun = _identity(task) | {"costs": dict(costs), "device": where.model_dump()}
    peaks: dict[str, dict[str, float]] = {}
    if device.type == "cpu" and task.spec["latency"].get("processes", 1) > 1:
        parts = time_in_processes(task.spec, begun, partial, deadline)
    else:
        if task.study.keep_memory:  # only now: counting needs larger blocks
            keep_freed_memory()
        parts = [time_models(task.spec, begun, device, partial, deadline, peaks)]
    rows: dict[str, dict[str, Any]] = {}
    for name, timed in _timed_rows(task.spec, device).items():
        rows[name] = {"latency": {}}
        for key in parts[0][timed]:
            each = [part[timed][key] for part in parts]
            values = [ms for part in each for ms in part]
            found = summary(values) | {"ms": values}
            if len(parts) > 1:
                found["processes"] = [summary(part)["median"] for part in each]
            column = "captured" if key.endswith(CAPTURED) else "latency"
            rows[name].setdefault(column, {})[key.removesuffix(CAPTURED)] = found
        if timed in peaks:
            rows[name]["peak_memory_mb"] = peaks[timed]
    return rows


def _timed_rows(spec: dict[str, Any], device: torch.device) -> dict[str, str]:
    """Row -> the first row with the same model and size; only that one is timed."""
    size = protocol(spec["latency"], device.type)["image_size"]
    first: dict[str, str] = {}
    return {
        name: first.setdefault(
            json.dumps([row["model"], row["model_args"], row.get("latency_size", size)]), name
        )
        for name, row in spec["rows"].items()
    }


def time_models(
    spec: dict[str, Any],
    begun: dict[str, Any],
    device: torch.device,
    partial: Path,
    deadline: float,
    peaks: dict[str, dict[str, float]] | None = None,
) -> Samples:
    """Interleaved latency of a spec's rows in this process; rows of the same model are timed once.

    Args:
        spec: spec of the measurement.
        begun: identifies the measurement of the samples: spec hash, code and device.
        device: device to time on.
        partial: where samples are kept after each round.
        deadline: `time.monotonic()` after which to stop.
        peaks: filled on a GPU: row -> batch -> peak memory in MB.

    Raises:
        OutOfTime: at the deadline; the same call resumes.
        HovitError: if `partial` is of another device.
    """
    settings = protocol(spec["latency"], device.type)
    rows = {name: spec["rows"][name] for name in dict.fromkeys(_timed_rows(spec, device).values())}
    sizes = {name: row.get("latency_size", settings["image_size"]) for name, row in rows.items()}
    models = {
        name: create_model(row["model"], spec["num_classes"], sizes[name], **row["model_args"])
        for name, row in rows.items()
    }

    def after_round(so_far: Samples) -> None:
        write_sealed(partial, begun | {"samples": so_far})
        if time.monotonic() > deadline:
            raise OutOfTime

    timer = _timer(settings)
    make_pass = PASSES.get(timer) if device.type == "cuda" else None
    return measure_latency(
        models,
        device,
        image_size=sizes,
        batches=tuple(settings["batches"]),
        rounds=settings["rounds"],
        warmup=settings["warmup"],
        samples=_resume(partial, begun),
        timer=timer,
        captured=CapturedPass(make_pass) if make_pass else None,
        peaks=peaks,
        after_round=after_round,
    )


def _timer(settings: Mapping[str, Any]) -> Timer:
    workload = settings.get("workload", "inference")
    if workload == "training":
        return TrainingStep()
    if workload == "gradients":
        return gradients_ms
    if workload == "onnx":
        from ..measure.onnx_runtime import (
            OnnxPass,  # not needed, and not quick to import, for the others
        )

        return OnnxPass()
    return half_precision_ms if settings["precision"] == "fp16 autocast" else forward_ms


def _resume(partial: Path, begun: dict[str, Any]) -> Samples | None:
    """Samples of an interrupted measurement on this device, if there is one."""
    saved = _read_partial(partial, begun)
    if "samples" not in saved:
        return None
    if saved["device"] != begun["device"]:
        there, here = Device(**saved["device"]), Device(**begun["device"])
        updated = there.name == here.name and there.driver != here.driver
        driver = f", driver {there.driver} there and {here.driver} here" * updated
        raise HovitError(
            f"{partial}: begun on {there}, but this is {here}{driver}; a table needs all latencies "
            "from one device: continue there, or delete the file"
        )
    samples: Samples = saved["samples"]
    return samples
