"""Tasks: train, measure, evaluate, analyse. Each task leaves one record.

A task defines the path of its record, the spec of the record, the sources that it depends on
(`code`) and the files that it reads. Snakemake, `hovit sweep`, `hovit explain`, evidence and
reports use tasks. No torch is needed here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..records.record import Kind, Record, make_provenance, read_record
from ..utils.code_hash import record_code
from ..utils.device import Device
from ..utils.errors import HovitError
from ..utils.files import digest
from ..utils.strict import json_value
from .runs import RUNS, Pack, Run
from .schema import Analysis, Row, Scale, Study

IMAGENET_VAL = "imagenet-1k/val"


@dataclass(frozen=True)
class Task(ABC):
    """Work that leaves one record."""

    kind: ClassVar[Kind]

    @property
    @abstractmethod
    def id(self) -> str:
        """Name of what the task works on: a run, a study or an analysis."""

    @property
    @abstractmethod
    def scale_id(self) -> str:
        """Scale of the task."""

    @property
    def path(self) -> Path:
        """Its record, relative to the top folder of the artifact."""
        return RUNS / self.scale_id / self.kind / f"{self.id}.json"

    @property
    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Everything that decides the results, as JSON values."""

    @abstractmethod
    def rows(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The spec of each result row, without the measurement settings.

        Evidence is accepted row by row: a row of a record counts if its spec equals that of
        this task.
        """

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files that must exist before the task starts."""
        return ()

    @cached_property
    def spec_hash(self) -> str:
        """sha256 of the spec."""
        return digest(self.spec)

    @cached_property
    def code(self) -> str:
        """sha256 of the sources that can change the results."""
        return record_code(self.kind, self.spec)

    def is_done(self, root: Path = Path()) -> bool:
        """Whether the record exists and has this spec and code."""
        try:
            record = read_record(root / self.path)
        except HovitError:
            return False
        return record.spec_hash == self.spec_hash and record.provenance.code == self.code

    def accepted(self, record: Record) -> frozenset[str]:
        """The rows of a record that match rows of this task; other rows are ignored."""
        if record.kind != self.kind:
            return frozenset()
        try:
            theirs, ours = self.rows(record.spec), self.rows(self.spec)
        except (KeyError, TypeError, AttributeError):  # the spec of something else
            return frozenset()
        return frozenset(name for name, row in theirs.items() if ours.get(name) == row)

    def make_record(
        self,
        results: dict[str, Any],
        device: Device,
        seconds: float,
        peak_memory_mb: float,
        dataset: dict[str, Any] | None = None,
    ) -> Record:
        """The record of finished work.

        Args:
            results: results of the task.
            device: where it ran.
            seconds: wall time.
            peak_memory_mb: most memory in use, in MB.
            dataset: pack.json of the images, or their fingerprint.
        """
        return Record(
            kind=self.kind,
            id=self.id,
            scale=self.scale_id,
            spec=self.spec,
            spec_hash=self.spec_hash,
            results=results,
            provenance=make_provenance(device, seconds, peak_memory_mb, self.code, dataset),
        )


@dataclass(frozen=True)
class TrainTask(Task):
    """Train and test one run."""

    run: Run
    kind = "train"

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def scale_id(self) -> str:
        return self.run.scale

    @property
    def path(self) -> Path:
        return self.run.folder / "record.json"

    @property
    def weights(self) -> Path:
        """Its trained weights."""
        return self.run.folder / "weights.safetensors"

    @cached_property
    def spec(self) -> dict[str, Any]:
        return self.run.to_spec()

    def rows(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        return {"": dict(spec)}

    @property
    def inputs(self) -> tuple[Path, ...]:
        start = self.run.weights
        if start is None or start.run is None:
            return self.run.pack.files
        upstream = RUNS / self.run.scale / start.run / f"seed{start.seed}"
        return *self.run.pack.files, upstream / "weights.safetensors"

    def __str__(self) -> str:
        return f"train {self.run.id} seed {self.run.seed}"


@dataclass(frozen=True)
class StudyTask(Task):
    """A task on all rows of a study."""

    study: Study
    scale: Scale

    @property
    def id(self) -> str:
        return self.study.id

    @property
    def scale_id(self) -> str:
        return self.scale.id


@dataclass(frozen=True)
class MeasureTask(StudyTask):
    """Count a study's parameters and multiply-adds, and time its models in turn."""

    kind = "measure"

    @property
    def models(self) -> list[str]:
        """The models that are measured."""
        return sorted({row["model"] for row in self.spec["rows"].values()})

    @cached_property
    def spec(self) -> dict[str, Any]:
        study = self.study
        timed = {"latency", "throughput"} & set(study.columns)
        return {
            "study": study.id,
            "num_classes": study.num_classes,
            "image_size": study.image_size,
            "latency": self._latency() if timed else None,
            "rows": {
                row.id: self._row(row)
                for row in study.rows
                if row.model and study.runs_at(self.scale, row)
            },
        }

    def _latency(self) -> dict[str, Any]:
        """How latency is measured."""
        study = self.study
        latency = self.scale.latency.model_dump(mode="json")
        if latency["processes"] == 1:  # specs from before this setting do not state it
            del latency["processes"]
        if study.batches:
            latency["batches"] = list(study.batches)
        if study.threads:
            latency["threads"] = study.threads
        if study.workload != "inference":
            latency["workload"] = study.workload
        if study.on_gpu:
            on_gpu = study.on_gpu
            latency["on_gpu"] = {"batches": [on_gpu.batch], "precision": on_gpu.precision}
        return latency | {
            "image_size": self._timed_size(study.image_size),
            "precision": "fp32",
            "memory": "kept" if study.keep_memory else "returned",
        }

    def _row(self, row: Row) -> dict[str, Any]:
        model = self.scale.measured_model(row)
        args = json_value(row.model_args)  # as the record has them: `accepted` compares
        spec = {"model": model, "model_args": args, "part": row.part}
        if row.image_size is None:
            return spec
        return spec | {
            "image_size": row.image_size,
            "latency_size": self._timed_size(row.image_size),
        }

    def _timed_size(self, size: int | None) -> int | None:
        """Size at which a model made for `size` is timed at this scale, in pixels."""
        most = self.scale.latency.image_size
        return min(most, size) if most and size else size

    def rows(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        workload = (spec["latency"] or {}).get("workload", "inference")
        found = {}
        for name, row in spec["rows"].items():
            shared = {"num_classes": spec["num_classes"], "image_size": spec["image_size"]}
            own = {key: value for key, value in row.items() if key != "latency_size"}
            stated = {key: value for key, value in (shared | own).items() if value is not None}
            found[name] = stated | {"workload": workload}
        return found

    def __str__(self) -> str:
        return f"measure {self.study.id}"


@dataclass(frozen=True)
class EvaluateTask(StudyTask):
    """Evaluate given weights of a study that trains nothing, on ImageNet's validation images."""

    kind = "evaluation"

    @cached_property
    def spec(self) -> dict[str, Any]:
        rows = {
            row.id: {"model": row.model, "model_args": json_value(row.model_args), "tag": row.tag}
            for row in self.study.rows
            if row.model
        }
        return {"study": self.study.id, "dataset": IMAGENET_VAL, "rows": rows}

    def rows(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row | {"dataset": spec["dataset"]} for name, row in spec["rows"].items()}

    def __str__(self) -> str:
        return f"evaluate {self.study.id}"


@dataclass(frozen=True)
class AnalyseTask(Task):
    """Analyse trained models, for a figure.

    Args:
        analysis: what to compute.
        scale: the scale.
        runs: STUDY/ROW -> the analysed run.
        packs: STUDY/ROW -> the images on which it is analysed.
    """

    analysis: Analysis
    scale: Scale
    runs: Mapping[str, Run]
    packs: Mapping[str, Pack]
    kind = "analysis"

    @property
    def id(self) -> str:
        return self.analysis.id

    @property
    def scale_id(self) -> str:
        return self.scale.id

    @cached_property
    def spec(self) -> dict[str, Any]:
        photographs = {
            ref: pack.spec_hash for ref, pack in self.packs.items() if pack != self.runs[ref].pack
        }
        return ({"photographs": photographs} if photographs else {}) | {
            "kind": self.analysis.kind,
            "images": self.analysis.images,
            "args": json_value(self.analysis.args),
            "runs": {ref: run.spec_hash for ref, run in self.runs.items()},
            "models": {ref: run.model for ref, run in self.runs.items()},
        }

    def rows(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        shared = {key: spec[key] for key in ("kind", "images", "args")}
        photographs = spec.get("photographs", {})
        return {
            ref: shared | {"run": run, "photographs": photographs.get(ref)}
            for ref, run in spec["runs"].items()
        }

    @property
    def inputs(self) -> tuple[Path, ...]:
        tasks = [TrainTask(run) for run in self.runs.values()]
        runs = [path for task in tasks for path in (task.weights, task.path)]
        return *runs, *(pack.files[1] for pack in self.packs.values())

    def __str__(self) -> str:
        return f"analyse {self.analysis.id}"
