"""Records of made-up numbers, valid in every other way."""

from pathlib import Path
from typing import Any

import pandas as pd

from hovit.config.plan import Plan
from hovit.config.runs import Run, protocol
from hovit.config.tasks import TrainTask
from hovit.detection.evaluate import write_detections
from hovit.records.predictions import metrics, predictions_digest, write_predictions
from hovit.records.record import Device, Provenance, Record, make_provenance, write_record
from hovit.utils.files import digest

CPU = Device(kind="cpu", name="Test CPU", threads=2)
GPU = Device(kind="cuda", name="Test GPU", driver="1.2", threads=2)


def provenance(device: Device, code: str) -> Provenance:
    """Of a clean commit, whatever the working tree is like."""
    return make_provenance(device, 1.0, 1.0, code).model_copy(update={"dirty": False})


def made_up_predictions(top1: float, images: int = 1100) -> pd.DataFrame:
    """So many predictions, about this per cent of them right."""
    right = round(images * top1 / 100)
    return pd.DataFrame(
        {
            "index": range(images),
            "label": [i % 7 for i in range(images)],
            "predicted": [i % 7 if i < right else 9 for i in range(images)],
            "loss": [0.1 + i / 3 for i in range(images)],
        }
    )


def train_record(run: Run, top1: float) -> Record:
    history = [
        {
            "epoch": e,
            "train_loss": 3.0 / e,
            "val_loss": 3.2 / e,
            "val_top1": min(top1, 100.0) * e / 3,
        }
        for e in (1, 2, 3)
    ]
    if run.is_detector:
        return _record(run, detection_results(top1))
    predictions = made_up_predictions(top1)
    results = {
        "top1": metrics(predictions)[1], "loss": metrics(predictions)[0],
        "val_top1": history[-1]["val_top1"],
        "best_epoch": 3, "epochs": 3,
        "images_train": 5144, "images_val": 1102, "images_test": 1100, "history": history,
        "predictions_sha256": predictions_digest(predictions),
    }  # fmt: skip
    return _record(run, results)


def _record(run: Run, results: dict[str, Any]) -> Record:
    return Record(
        kind="train", id=run.id, scale=run.scale, spec=run.to_spec(), spec_hash=run.spec_hash,
        results=results, provenance=provenance(CPU, TrainTask(run).code),
    )  # fmt: skip


def detection_results(ap: float) -> dict[str, Any]:
    """AP by size and overlap, spread around `ap`; nothing was found."""
    history = [{"epoch": e, "train_loss": 2.0 / e} for e in (1, 2, 3)]
    spread = {"ap": 0, "ap50": 20, "ap75": 2, "ap_small": -9, "ap_medium": 1, "ap_large": 9}
    return {name: ap + more for name, more in spread.items()} | {
        "epochs": 3, "images_train": 117266, "images_val": 0, "images_test": 5000,
        "history": history, "detections": 0, "detections_sha256": digest([]),
        "annotations_sha256": "0" * 64,
    }  # fmt: skip


def measure_record(plan: Plan, study_id: str, device: Device = CPU) -> Record:
    study = plan.study(study_id)
    spec = plan.measure_task(study).spec
    code = plan.measure_task(study).code
    rows = {}
    for i, name in enumerate(spec["rows"]):
        rows[name] = {"parameters": 1000 + i, "parameters_unused": 0, "parameters_used": 1000 + i,
                      "macs": 2_000_000_000, "part_parameters": 7}  # fmt: skip
        if spec["latency"]:
            rows[name]["device"] = device.model_dump()
            rows[name]["latency"] = {
                str(b): {
                    "median": 10.0 + i,
                    "q1": 9.9 + i,
                    "q3": 10.1 + i,
                    "n": 30,
                    "ms": [10.0 + i + (r % 3 - 1) / 10 for r in range(30)],
                }
                for b in protocol(spec["latency"], device.kind)["batches"]
            }
    return Record(
        kind="measure", id=study_id, scale=plan.scale.id, spec=spec, spec_hash=digest(spec),
        results={"rows": rows}, provenance=provenance(device, code),
    )  # fmt: skip


ANALYSED: dict[str, dict[str, Any]] = {
    "attention_maps": {"map": [[0.25, 0.25], [0.25, 0.25]], "entropy": 1.386294},
    "generated_images": {
        "small_images": ["AGSWyP+A"], "shape": [3, 1, 2], "low": -1.0, "high": 1.0,
        "kernel": [[[[0.1, 0.2], [0.3, 0.4]]] * 3] * 3, "bias": [0.0, 0.1, 0.2], "varying": 40.0,
    },
    "head_similarity": {"blocks": [{"block": 1, "heads": 3, "similarity": 60.0}], "mean": 60.0},
    "kept_patches": {"layers": [6], "kept": [[["10", "01"]]]},
    "taylor_pruning": {
        "blocks": [{"block": 1, "qk_ratio": 0.5, "v_ratio": 0.9, "ffn_ratio": 2.0}],
        "qk_kept": 50.0, "v_kept": 90.0, "ffn_kept": 50.0, "v_early": 95.0, "v_late": 85.0,
    },
    "runtime_breakdown": {
        "classes": [{"class": "matmul", "memory_bound": False, "ms": 3.0, "share": 60.0},
                    {"class": "copy", "memory_bound": True, "ms": 2.0, "share": 40.0}],
        "memory_bound_share": 40.0,
    },
}  # fmt: skip


def analysis_record(plan: Plan, analysis_id: str) -> Record:
    """What each kind of analysis finds, made up: flat maps of two by two tokens, and so on."""
    analysis = plan.analysis(analysis_id)
    spec = plan.analyse_task(analysis).spec
    found = ANALYSED[analysis.kind] | {"images": [0]}
    rows = {ref: found | {"weights_sha256": "0" * 64} for ref in spec["runs"]}
    return Record(
        kind="analysis", id=analysis_id, scale=plan.scale.id, spec=spec, spec_hash=digest(spec),
        results={"rows": rows}, provenance=provenance(CPU, plan.analyse_task(analysis).code),
    )  # fmt: skip


def write_all(plan: Plan, root: Path, base: str = "results/runs") -> None:
    """A whole run of the artifact: run number i at seed s is right in (20 + i + s) per cent."""
    top = root / base
    for i, seeds in enumerate(plan.runs.values()):
        for seed, run in seeds.items():
            folder = top / run.folder.relative_to("results/runs")
            write_record(folder / "record.json", train_record(run, 20.0 + i + seed))
            if run.is_detector:
                write_detections(folder / "detections.json.gz", [])
            else:
                predictions = made_up_predictions(20.0 + i + seed)
                write_predictions(folder / "predictions.csv.gz", predictions)
    for study in plan.config.studies.values():
        if task := plan.measure_task(study):
            path = top / task.path.relative_to("results/runs")
            write_record(path, measure_record(plan, study.id))
    for name, analysis in plan.config.analyses.items():
        if task := plan.analyse_task(analysis):
            path = top / task.path.relative_to("results/runs")
            write_record(path, analysis_record(plan, name))
