"""One study's measurements: every row's cost, and the latency of all rows, interleaved."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import device as device_module
from ..catalogue import Study
from ..device import describe_device, keep_freed_memory, peak_memory_mb
from ..errors import HovitError, OutOfTime
from ..factory import create_model
from ..files import digest, read_sealed, write_sealed
from ..plan import Plan, protocol
from ..records import Device, Record, make_provenance, write_record
from ..sources import code_hash
from .cost import cost
from .latency import (
    Samples,
    TrainingStep,
    forward_ms,
    gradients_ms,
    half_precision_ms,
    measure_latency,
    summary,
)


def study_code(plan: Plan, study: Study) -> str:
    """The hash of the sources behind a study's measurements."""
    return digest([code_hash("measure", model) for model in plan.models(study)])


def measure_study(
    plan: Plan,
    study: Study,
    device: torch.device,
    root: Path = Path(),
    deadline: float = math.inf,
) -> Record:
    """Measure all rows of a study and write their record; a killed call goes on where it was.

    Args:
        plan: the catalogue at a scale.
        study: whose rows.
        device: where latency is measured (ONNX Runtime's: always on the CPU); with a CPU, threads
            are set as the study or else the scale says.
        root: top of the artifact.
        deadline: `time.monotonic()` after which to stop.

    Raises:
        OutOfTime: at the deadline; the same call goes on.
        HovitError: if an interrupted measurement was begun on another device, its file changed, or
            this process keeps freed memory already and the study wants it handed back.
    """
    begin = time.monotonic()
    device = torch.device("cpu") if study.workload == "onnx" else device
    torch.manual_seed(0)
    if not study.keep_memory and device_module.freed_memory_kept:
        raise HovitError(
            f"{study.id} is timed with freed memory handed back, and this process keeps it by now: "
            f"the same command again, or `hovit measure {study.id}`"
        )
    # Else convolutions alone would run in TF32, and HoViT's ideas put them in place of linears.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    spec = plan.measure_spec(study)
    torch.set_num_threads(study.threads or plan.scale.latency.threads)
    code = study_code(plan, study)
    backward = study.trained or "activations" in study.columns
    rows = {name: _cost(row, spec, backward) for name, row in spec["rows"].items()}
    where = describe_device(device)
    partial = root / plan.measured(study).with_suffix(".partial.json")
    if spec["latency"]:
        if study.keep_memory:  # not sooner: counting needs other, larger blocks
            keep_freed_memory()
        samples = _latency(spec, device, where, partial, code, deadline)
        for name, by_batch in samples.items():
            rows[name]["device"] = where.model_dump()
            rows[name]["latency"] = {b: summary(v) | {"ms": v} for b, v in by_batch.items()}
    record = Record(
        kind="measure",
        id=study.id,
        scale=plan.scale.id,
        spec=spec,
        spec_hash=digest(spec),
        results={"rows": rows},
        provenance=make_provenance(
            where,
            time.monotonic() - begin,
            peak_memory_mb(device),
            code,
        ),
    )
    write_record(root / plan.measured(study), record)
    partial.unlink(missing_ok=True)
    return record


def _cost(row: dict[str, Any], spec: dict[str, Any], backward: bool) -> dict[str, Any]:
    size, classes = row.get("image_size", spec["image_size"]), spec["num_classes"]
    return dict(cost(row["model"], row["model_args"], classes, size, row["part"], backward))


def _latency(
    spec: dict[str, Any],
    device: torch.device,
    where: Device,
    partial: Path,
    code: str,
    deadline: float,
) -> Samples:
    """Interleaved latency of the rows; rows that are one and the same model are timed once."""
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
    begun = {"spec_hash": digest(spec), "code": code, "device": where.model_dump()}

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
        from .onnx_runtime import OnnxPass  # not needed, and not quick to import, for the others

        return OnnxPass()
    return half_precision_ms if settings["precision"] == "fp16 autocast" else forward_ms


def _resume(partial: Path, begun: dict[str, Any]) -> Samples | None:
    if not partial.exists():
        return None
    saved = read_sealed(partial)
    if any(saved.get(key) != begun[key] for key in ("spec_hash", "code")):
        return None
    if saved["device"] != begun["device"]:
        there, here = Device(**saved["device"]), Device(**begun["device"])
        driver = f", driver {there.driver} there and {here.driver} here" * (there.name == here.name)
        raise HovitError(
            f"{partial}: begun on {there}, but this is {here}{driver}; one table's latencies come "
            "from one device: go on there, or delete the file"
        )
    return saved["samples"]
