"""The records of one source, and the numbers in them with their spread."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.metrics import Quantity, quantity
from ..config.plan import Plan
from ..config.runs import RUNS, Run
from ..config.schema import Row, Study
from ..config.tasks import Task
from ..records.record import Record, read_record
from ..utils.device import Device
from ..utils.errors import HovitError, one_line
from ..utils.files import read_json

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # t at 95 %, by n


def plural(n: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{n} {noun}{'s' * (n != 1)}"


@dataclass(frozen=True)
class Value:
    """A number with its spread.

    Args:
        mean: mean over seeds; for latency the median over rounds.
        spread: standard deviation over seeds (0 for one seed), or the inter-quartile range.
        n: seeds, or rounds; 1 for an exact number.
        noise: how far the number may be off. For training: half the width of a 95 % interval over
            seeds (Student's t), combined with one over test images for accuracy and loss. For
            latency: half the inter-quartile range. For an analysis: as its record states.
        samples: latency of each round, in the order that all rows of a record share.
        paths: the records behind the number.
    """

    mean: float
    spread: float = 0.0
    n: int = 1
    noise: float = 0.0
    samples: tuple[float, ...] = ()
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Results:
    """The records of one source: this run, or the evidence of one device at one scale.

    Args:
        plan: config at the source's scale.
        root: top folder of the artifact.
        base: folder of the records: `results/runs`, or one device's evidence.
        problems: path of a record that is not used -> what is wrong with it.
    """

    plan: Plan
    root: Path = Path()
    base: Path = RUNS
    problems: dict[Path, str] = field(default_factory=dict, compare=False)
    _read: dict[Path, Record | None] = field(default_factory=dict, compare=False, repr=False)

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

    # Records

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
                raise HovitError(f"{place}: other code than the present made it")
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
        runs = self.plan.runs_of(study, row)
        found = [(run, self.record(self.plan.train_task(run))) for run in runs]
        return [(run, record) for run, record in found if record]

    def measured(self, study: Study) -> Record | None:
        """The record of a study's measurements."""
        return self.record(self.plan.measure_task(study))

    def measured_rows(self, study: Study) -> dict[str, dict[str, Any]]:
        """A study's measurements, row by row."""
        return self.rows(self.plan.measure_task(study))

    def evaluated(self, study: Study) -> Record | None:
        """The record of given weights' accuracy on ImageNet, for a study that trains nothing."""
        return self.record(self.plan.evaluate_task(study))

    def analysis(self, analysis_id: str) -> Record | None:
        """The record of an analysis."""
        return self.record(self.plan.analyse_task(self.plan.analysis(analysis_id)))

    def problems_of(self, study: Study) -> list[str]:
        """What is wrong with records that a study's table would use."""
        tasks = [*self.plan.tasks([study]), self.plan.evaluate_task(study)]
        places = [self.place(task.path) for task in tasks if task]
        return [self.problems[place] for place in places if place in self.problems]

    def analysed_rows(self, analysis_id: str) -> dict[str, dict[str, Any]]:
        """What an analysis found, row by row (STUDY/ROW)."""
        return self.rows(self.plan.analyse_task(self.plan.analysis(analysis_id)))

    # Values

    def value(self, study: Study, row: Row, number: Quantity | str) -> Value | None:
        """A number of a row; None if no record has it, or the paper does not report it."""
        parsed = quantity(number) if isinstance(number, str) else number
        if parsed is None:
            return None
        if parsed.reported:
            printed = row.reported.get(parsed.metric.name)
            return Value(float(printed)) if printed and "–" not in printed else None
        if parsed.metric.name == "top1" and not study.trained:
            return self._evaluated_value(study, row)
        if parsed.is_trained:
            return self._trained_value(study, row, parsed.metric.name)
        if parsed.is_counted:
            return self._counted_value(row, parsed.metric.name)
        return self._measured_value(study, row, parsed)

    def _trained_value(self, study: Study, row: Row, metric: str) -> Value | None:
        runs = self.trained(study, row)
        values = [float(r.results[metric]) for _, r in runs if metric in r.results]
        if not values:  # no run, or AP for a size that no object has
            return None
        mean, n = sum(values) / len(values), len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
        noise = STUDENT.get(n, 2.0) * spread / math.sqrt(n)
        if metric in ("top1", "val_top1"):  # all seeds share the images: more seeds do not help
            images = runs[0][1].results["images_val" if metric == "val_top1" else "images_test"]
            noise = math.hypot(noise, _binomial(mean, images))
        if metric == "loss":
            errors = [float(r.results.get("loss_error", 0.0)) for _, r in runs]
            noise = math.hypot(noise, 1.96 * sum(errors) / n)
        paths = tuple(self.place(self.plan.train_task(run).path) for run, _ in runs)
        return Value(mean, spread, n, noise, paths=paths)

    def _evaluated_value(self, study: Study, row: Row) -> Value | None:
        task = self.plan.evaluate_task(study)
        found = self.rows(task).get(row.id)
        if task is None or found is None:
            return None
        noise = _binomial(found["top1"], found["images"])
        return Value(found["top1"], noise=noise, paths=(self.place(task.path),))

    def _measured_value(self, study: Study, row: Row, number: Quantity) -> Value | None:
        task = self.plan.measure_task(study)
        found = self.rows(task).get(row.id)
        if task is None or found is None:
            return None
        paths = (self.place(task.path),)
        latency = found.get("latency", {})
        if number.metric.name == "throughput":
            return _throughput(latency, paths)
        if number.metric.name == "latency":
            batch = latency.get(str(number.batch))
            if batch is None:
                return None
            iqr = batch["q3"] - batch["q1"]
            return Value(batch["median"], iqr, batch["n"], iqr / 2, tuple(batch["ms"]), paths)
        name = "parameters" if number.metric.name == "parameters_m" else number.metric.name
        return Value(float(found[name]), paths=paths) if name in found else None

    def _counted_value(self, row: Row, metric: str) -> Value | None:
        if row.total and row.rule:
            sizes = self.plan.config.datasets[row.rule].split.sizes(row.total)
            by_rule = dict(zip(("images_train", "images_val", "images_test"), sizes, strict=True))
            by_rule["images"] = row.total
            return Value(float(by_rule[metric])) if metric in by_rule else None
        packs = self.plan.packs_of(row.dataset) if row.dataset else []
        path = packs[0].folder / "pack.json" if packs else None
        if path is None or not (self.root / path).exists():
            return None
        images, size = _image_counts(self.root / path.parent)
        limit = self.plan.scale.limit
        used = {split: min(n, getattr(limit, split) or n) for split, n in images.items()}
        counts: dict[str, float] = {f"images_{split}": n for split, n in used.items()}
        counts |= {"images": sum(images.values()), "gigabytes": size / 1e9}
        return Value(float(counts[metric]), paths=(path,))

    def analysed_value(self, analysis_id: str, row_ref: str, name: str) -> Value | None:
        """A number that an analysis found for a row, STUDY/ROW."""
        task = self.plan.analyse_task(self.plan.analysis(analysis_id))
        found = self.analysed_rows(analysis_id).get(row_ref, {})
        if task is None or name not in found:
            return None
        noise = found.get(f"{name}_noise", 0.0)
        return Value(float(found[name]), noise=noise, paths=(self.place(task.path),))

    # Circumstances

    def latency_device(self, study: Study) -> Device | None:
        """The one device of a study's latencies.

        Raises:
            HovitError: naming both, if rows come from two devices.
        """
        task = self.plan.measure_task(study)
        first: tuple[str, Device] | None = None
        for name, row in self.rows(task).items():
            if "device" not in row:
                continue
            device = Device(**row["device"])
            if task and first and first[1] != device:
                raise HovitError(
                    f"{self.place(task.path)}: latency of {first[0]} is from {first[1]} and of "
                    f"{name} from {device}: one table's latencies come from one device"
                )
            first = first or (name, device)
        return first[1] if first else None

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
        """Scale, images and devices of a study's results, in one line."""
        rows = self.plan.rows_run(study)
        found = [run.dataset.title for row in rows for run in self.plan.runs_of(study, row)[:1]]
        devices = {str(r.provenance.device) for row in rows for _, r in self.trained(study, row)}
        if measured := self.measured(study):
            devices.add(str(measured.provenance.device))
        name = "evidence" if self.is_evidence else "this run"
        return ", ".join([f"{name}: {self.plan.scale.id}", *dict.fromkeys(found), *sorted(devices)])


def _throughput(latency: dict[str, dict[str, Any]], paths: tuple[Path, ...]) -> Value | None:
    """Images per second at the largest batch."""
    if not latency:
        return None
    size = max(latency, key=int)
    batch, images = latency[size], 1e3 * int(size)
    spread = images / batch["q1"] - images / batch["q3"]
    samples = tuple(images / ms for ms in batch["ms"])
    return Value(images / batch["median"], spread, batch["n"], spread / 2, samples, paths)


def _binomial(percent: float, images: int) -> float:
    """Half the width of the 95 % interval of an accuracy over so many images, in points."""
    share = percent / 100
    return 196 * math.sqrt(share * (1 - share) / images)


def _image_counts(folder: Path) -> tuple[dict[str, int], int]:
    """A pack's images of each split, and its size in bytes, checked against the files."""
    meta = read_json(folder / "pack.json")
    try:
        splits = pd.read_csv(folder / "manifest.csv", usecols=["split"], dtype=str)["split"]
        images = {name: int((splits == name).sum()) for name in ("train", "val", "test")}
        size = (folder / "images.npy").stat().st_size
    except (OSError, ValueError) as error:
        raise HovitError(f"{folder}: cannot be read ({one_line(error)}); delete it") from None
    if (meta.get("images"), meta.get("bytes")) != (images, size):
        raise HovitError(f"{folder}: pack.json does not match the files; delete it")
    return images, size
