"""The records of one source: this run, or the evidence of one device at one scale."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.metrics import Quantity, quantity
from ..config.plan import Plan
from ..config.runs import PREDICTIONS, RUNS, Pack, Run, protocol
from ..config.schema import Row, Study
from ..config.tasks import Task, TrainTask
from ..records.predictions import predictions_digest, read_predictions
from ..records.record import Record, read_record
from ..utils.device import Device
from ..utils.errors import HovitError
from ..utils.plural import plural

# What a row of a measurement has besides exact counts.
TIMED_KEYS = ("latency", "captured", "peak_memory_mb", "device")

# Records of this commit were counted with PyTorch 2.11, which leaves fused attention out of the
# multiply-adds. Since then, counts do not depend on the version.
MISCOUNTED = "873d4071e2db2a4c36a7d5a5cbc5499450958056"

SAME_LATENCY = 0.03  # relative difference between an eager pass and a CUDA graph


@dataclass(frozen=True, eq=False)
class RecordSource:
    """The records of one source: this run, or the evidence of one device at one scale.

    Args:
        plan: config at the source's scale.
        root: top folder of the artifact.
        base: folder of the records: `results/runs`, or one device's evidence.
        with_packs: whether to show and count the packed images of this machine.
        problems: path of a record that is not used -> what is wrong with it.
    """

    plan: Plan
    root: Path = Path()
    base: Path = RUNS
    with_packs: bool = True
    problems: dict[Path, str] = field(default_factory=dict, compare=False)
    _read: dict[Path, Record | None] = field(default_factory=dict, compare=False, repr=False)
    _trained: dict[tuple[str, str], list[tuple[Run, Record]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    _measured: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    _predictions: dict[Path, pd.DataFrame | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def is_evidence(self) -> bool:
        """Whether another machine made the records."""
        return self.base != RUNS

    @property
    def folder(self) -> Path:
        """Folder of the records at the source's scale."""
        return self.base / self.plan.scale.id

    @property
    def name(self) -> str:
        """Short name: `this run`, or scale and device of evidence (`proxy, nvidia-h200`)."""
        return f"{self.plan.scale.id}, {self.base.name}" if self.is_evidence else "this run"

    def place(self, path: Path) -> Path:
        """Path of a file in this source, for a task's path under `results/runs`."""
        return self.base / path.relative_to(RUNS)

    def packed(self, pack: Pack, file: str) -> Path | None:
        """A file of a pack; None if it is not on this machine, or packs are not used."""
        path = self.root / pack.folder / file
        return path if self.with_packs and path.exists() else None

    def record(self, task: Task | None) -> Record | None:
        """The record of a task; None if there is none that can be used.

        `problems` names a record that is broken or does not match config, and a record of this run
        that other code made.
        """
        if task is None:
            return None
        place = self.place(task.path)
        if place not in self._read:
            self._read[place] = self._checked(place, task)
        return self._read[place]

    def _checked(self, place: Path, task: Task) -> Record | None:
        if not (self.root / place).exists():
            return None
        try:
            record = read_record(self.root / place)
            same = record.spec_hash == task.spec_hash
            if not (task.accepted(record) if self.is_evidence else same):
                raise HovitError(f"{place}: its spec does not match config")
            if not self.is_evidence and record.provenance.code != task.code:
                raise HovitError(f"{place}: made by other code than the current code")
        except HovitError as error:
            self.problems[place] = f"{error}; not used"
            return None
        return record

    def rows(self, task: Task | None) -> dict[str, dict[str, Any]]:
        """The results of a task's record, for each row that config still has in the same form."""
        record = self.record(task)
        if task is None or record is None:
            return {}
        accepted = task.accepted(record)
        return {name: row for name, row in record.results["rows"].items() if name in accepted}

    def trained(self, study: Study, row: Row) -> list[tuple[Run, Record]]:
        """The runs of a row that have a record."""
        key = study.id, row.id
        if key not in self._trained:
            runs = self.plan.runs_of(study, row)
            found = [(run, self.record(self.plan.train_task(run))) for run in runs]
            self._trained[key] = [(run, record) for run, record in found if record]
        return self._trained[key]

    def predictions(self, run: Run) -> pd.DataFrame | None:
        """Test predictions of a classifier; None if its record or its predictions cannot be used.

        `problems` names predictions that are missing, broken, or not those of the record.
        """
        record = self.record(self.plan.train_task(run))
        if record is None or run.is_detector:
            return None
        place = self.place(run.folder / PREDICTIONS)
        if place not in self._predictions:
            self._predictions[place] = self._checked_predictions(place, record)
        return self._predictions[place]

    def _checked_predictions(self, place: Path, record: Record) -> pd.DataFrame | None:
        try:
            table = read_predictions(self.root / place)
            if predictions_digest(table) != record.results.get("predictions_sha256"):
                raise HovitError(f"{place}: not the predictions of its record")
        except HovitError as error:
            self.problems[place] = f"{error}; not used"
            return None
        return table

    def measured(self, study: Study) -> Record | None:
        """The record of a study's measurements."""
        return self.record(self.plan.measure_task(study))

    def miscounts(self, paths: Iterable[Path]) -> bool:
        """Whether one of these records, once read, counts multiply-adds without fused attention."""
        read = (self._read.get(path) for path in paths)
        return any(record and record.provenance.commit == MISCOUNTED for record in read)

    def measured_rows(self, study: Study) -> dict[str, dict[str, Any]]:
        """A study's measurements, row by row.

        A row that has none takes those of the row that it cites, where the protocol is the same.
        """
        if study.id not in self._measured:
            self._measured[study.id] = self._find_measured_rows(study)
        return self._measured[study.id]

    def _find_measured_rows(self, study: Study) -> dict[str, dict[str, Any]]:
        rows = self.rows(self.plan.measure_task(study))
        for row in study.rows:
            if (
                row.same_as
                and row.id not in rows
                and (cited := self._cited_row(study, row.same_as))
            ):
                rows[row.id] = cited
        return rows

    def _cited_row(self, study: Study, ref: str) -> dict[str, Any]:
        """Measurements of another study's row, with latencies of this study's protocol only.

        The protocol: inference in fp32 with freed memory kept, at the batch sizes of this study,
        in the version of the first cited record and, on a CPU, with this study's number of threads.
        """
        study_id, row_id = ref.split("/")
        task = self.plan.measure_task(self.plan.study(study_id))
        record, found = self.record(task), self.rows(task).get(row_id, {})
        row = {key: found[key] for key in found if key not in TIMED_KEYS}
        if record is None or not found.get("latency"):
            return row
        device = Device(**found["device"])
        setting = protocol(record.spec["latency"], device.kind)
        latency = self.plan.scale.latency
        same = (
            setting.get("workload", "inference") == study.workload
            and setting["precision"].startswith("fp32")
            and setting["memory"] in ("kept", "freed memory kept, where the C library is glibc")
            and (device.kind == "cuda" or device.threads == (study.threads or latency.threads))
            and record.results.get("protocol") == self._cited_protocol(study)
        )
        wanted = {str(batch) for batch in study.batches or latency.batches}
        times = {batch: each for batch, each in found["latency"].items() if batch in wanted}
        return row | {"latency": times, "device": found["device"]} if same and times else row

    def _cited_protocol(self, study: Study) -> Any:
        """The version of the latency protocol of the first cited record."""
        records = (self.measured(self.plan.study(name)) for name in study.cites)
        return next((r.results.get("protocol") for r in records if r), None)

    def evaluated(self, study: Study) -> Record | None:
        """The record of given weights' accuracy on ImageNet, for a study that trains nothing."""
        return self.record(self.plan.evaluate_task(study))

    def analysis(self, analysis_id: str) -> Record | None:
        """The record of an analysis."""
        return self.record(self.plan.analyse_task(self.plan.analysis(analysis_id)))

    def problems_of(self, study: Study) -> list[str]:
        """What is wrong with records that a study's table would use."""
        tasks = [*self.plan.tasks([study]), self.plan.evaluate_task(study)]
        paths = [task.path for task in tasks if task]
        paths += [task.run.folder / PREDICTIONS for task in tasks if isinstance(task, TrainTask)]
        places = [self.place(path) for path in paths]
        return [self.problems[place] for place in places if place in self.problems]

    def analysed_rows(self, analysis_id: str) -> dict[str, dict[str, Any]]:
        """What an analysis found, row by row (STUDY/ROW)."""
        return self.rows(self.plan.analyse_task(self.plan.analysis(analysis_id)))

    # Circumstances

    def latency_device(self, study: Study) -> Device | None:
        """The one device of a study's latencies.

        Raises:
            HovitError: naming both, if rows come from two devices.
        """
        task = self.plan.measure_task(study)
        first: tuple[str, Device] | None = None
        for name, row in self.measured_rows(study).items():
            if "device" not in row:
                continue
            device = Device(**row["device"])
            if device.kind == "cuda":  # CPU threads do not matter
                device = device.model_copy(update={"threads": 1})
            if first and first[1] != device:
                where = self.place(task.path) if task else study.id
                raise HovitError(
                    f"{where}: latency of {first[0]} is from {first[1]} and of "
                    f"{name} from {device}: a table needs all latencies from one device"
                )
            first = first or (name, device)
        return first[1] if first else None

    def devices(self, paths: Iterable[Path]) -> list[str]:
        """The devices of records that were read; for a measurement, those of its latencies.

        An accuracy has no number of threads, so the device of a training run is its name alone.
        """
        found = set()
        for record in filter(None, (self._read.get(path) for path in paths)):
            device = record.provenance.device
            rows = record.results.get("rows", {}).values() if record.kind == "measure" else ()
            timed = {str(Device(**row["device"])) for row in rows if "device" in row}
            found |= timed or {device.name if record.kind == "train" else str(device)}
        return sorted(found)

    def batches(self, study: Study) -> list[Quantity]:
        """The latencies of a study, one for each batch size: as its record has them, or planned."""
        measured = {
            int(batch)
            for row in self.measured_rows(study).values()
            for batch in row.get("latency", {})
        }
        planned = study.batches or self.plan.scale.latency.batches
        found = [quantity(f"latency_{batch}") for batch in sorted(measured) or planned]
        return [number for number in found if number]

    def captured(self, study: Study) -> list[Quantity]:
        """The latencies as CUDA graphs, at the batch sizes where one differs from the eager one."""
        differ = {
            int(batch)
            for row in self.measured_rows(study).values()
            for batch, graph in row.get("captured", {}).items()
            if abs(graph["median"] / row["latency"][batch]["median"] - 1) > SAME_LATENCY
        }
        return [found for b in sorted(differ) if (found := quantity(f"captured_{b}"))]

    def throughput_batch(self, study: Study) -> int | None:
        """Batch size of a study's throughput: the largest that was timed."""
        rows = self.measured_rows(study).values()
        return max((int(b) for row in rows for b in row.get("latency", {})), default=None)

    def weights_from(self, study: Study, row: Row) -> str:
        """Where the pretrained weights of a row come from, in words."""
        runs = self.plan.runs_of(study, row)
        if not runs or runs[0].weights is None:
            return ""
        upstream = self.plan.upstream(runs[0])
        if upstream is None:
            return str(runs[0].weights)
        record = self.record(self.plan.train_task(upstream))
        how = f"{upstream.dataset.title}, {plural(upstream.recipe.epochs, 'epoch')}"
        if record:
            how += f", test top-1 {record.results['top1']:.1f} %"
            weights = record.results.get("weights_sha256")
            started = {r.results.get("started_from_sha256") for _, r in self.trained(study, row)}
            if started - {weights}:
                how += "; trained again since"
        return f"run {upstream.id} ({how})"

    def where(self, study: Study) -> str:
        """Scale, images and devices of a study's results, in one line; threads belong to times."""
        trained = [pair for row in self.plan.rows_run(study) for pair in self.trained(study, row)]
        found = [run.dataset.title for run, _ in trained]
        devices = {record.provenance.device.name for _, record in trained}
        if timed := self.latency_device(study):
            devices = devices - {timed.name} | {str(timed)}
        name = "committed results" if self.is_evidence else "this run"
        return ", ".join([f"{name}: {self.plan.scale.id}", *dict.fromkeys(found), *sorted(devices)])
