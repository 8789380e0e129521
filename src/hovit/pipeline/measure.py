"""Measure a study: the cost of every row, and the interleaved latency of all rows."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config.runs import protocol
from ..config.tasks import MeasureTask
from ..measure.cost import cost
from ..measure.latency import (
    Samples,
    TrainingStep,
    forward_ms,
    gradients_ms,
    half_precision_ms,
    measure_latency,
    summary,
)
from ..records.record import Device, Record, write_record
from ..utils import device as device_module
from ..utils.create_model import create_model
from ..utils.device import describe_device, keep_freed_memory, peak_memory_mb
from ..utils.errors import HovitError, OutOfTime
from ..utils.files import read_sealed, write_sealed


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
        HovitError: if an interrupted measurement started on another device, its file changed, or
            this process already keeps freed memory and the study wants it returned.
    """
    begin = time.monotonic()
    study, spec = task.study, task.spec
    device = torch.device("cpu") if study.workload == "onnx" else device
    _set_up(task)
    rows = count_study(task, root)
    where = describe_device(device)
    partial = _partial_path(task, root)
    if spec["latency"]:
        if study.keep_memory:  # only now: counting needs larger blocks
            keep_freed_memory()
        samples = _latency(task, rows, device, where, partial, deadline)
        for name, by_batch in samples.items():
            rows[name] = rows[name] | {"device": where.model_dump()}
            rows[name]["latency"] = {b: summary(v) | {"ms": v} for b, v in by_batch.items()}
    seconds = time.monotonic() - begin
    record = task.make_record({"rows": rows}, where, seconds, peak_memory_mb(device))
    write_record(root / task.path, record)
    partial.unlink(missing_ok=True)
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
    """What a measurement that has begun must share with one that resumes it."""
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
            f"{study.id}: wants freed memory returned, but this process already keeps it: run the "
            f"same command again, or `hovit measure {study.id}`"
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
) -> Samples:
    """Interleaved latency of the rows; rows of the same model are timed once."""
    spec = task.spec
    settings = protocol(spec["latency"], device.type)
    same: dict[str, list[str]] = {}
    for name, row in spec["rows"].items():
        size = row.get("latency_size", settings["image_size"])
        same.setdefault(json.dumps([row["model"], row["model_args"], size]), []).append(name)
    sizes = {names[0]: json.loads(key)[2] for key, names in same.items()}
    models = {
        name: create_model(row["model"], spec["num_classes"], sizes[name], **row["model_args"])
        for name, row in spec["rows"].items()
        if name in sizes
    }
    begun = _identity(task) | {"costs": dict(costs), "device": where.model_dump()}

    def after_round(so_far: Samples) -> None:
        write_sealed(partial, begun | {"samples": so_far})
        if time.monotonic() > deadline:
            raise OutOfTime

    samples = measure_latency(
        models,
        device,
        image_size=sizes,
        batches=tuple(settings["batches"]),
        rounds=settings["rounds"],
        warmup=settings["warmup"],
        samples=_resume(partial, begun),
        timer=_timer(settings),
        after_round=after_round,
    )
    return {name: samples[names[0]] for names in same.values() for name in names}


def _timer(settings: Mapping[str, Any]) -> Callable[..., float]:
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
        driver = f", driver {there.driver} there and {here.driver} here" * (there.name == here.name)
        raise HovitError(
            f"{partial}: begun on {there}, but this is {here}{driver}; one table's latencies come "
            "from one device: go on there, or delete the file"
        )
    samples: Samples = saved["samples"]
    return samples
