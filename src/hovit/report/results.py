"""Numbers out of records: one metric of one row, with its spread and where it comes from."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.plan import Plan
from ..config.runs import RUNS, Run
from ..config.schema import Row, Study
from ..config.tasks import Task
from ..records.evidence import EVIDENCE
from ..records.record import Device, Record, read_record
from ..utils.errors import HovitError, one_line
from ..utils.files import read_json

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # t at 95 %, by n
PRECISION = {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}
TRAINED = {"top1", "loss", "val_top1"} | PRECISION
INEXACT = TRAINED | {"latency", "throughput"}
REPORTED_ONLY = {"throughput_cpu"}  # what nothing here measures
COUNTED = {"images", "images_train", "images_val", "images_test", "gigabytes"}


def plural(n: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{n} {noun}{'s' * (n != 1)}"


@dataclass(frozen=True)
class Value:
    """A number with its spread.

    Args:
        mean: over seeds; for latency the median over rounds.
        spread: standard deviation over seeds (0 for one), or the inter-quartile range.
        n: seeds, or rounds; 1 for what is exact.
        noise: how far it may be off. For what is trained: the half width of a 95 % interval over
            seeds (Student's t) and, for accuracy and loss, of one over its images; for latency half
            the inter-quartile range; for an analysis what it says; 0 for what is exact.
        samples: latency's rounds, in the order that the rows of one record share.
        paths: the records behind it.
    """

    mean: float
    spread: float = 0.0
    n: int = 1
    noise: float = 0.0
    samples: tuple[float, ...] = ()
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Results:
    """The records of one plan, read once and checked against it.

    Args:
        plan: the config at a scale.
        root: top of the artifact.
        base: where the scale's records lie: this run's own, or one device's evidence.
        problems: what was found wrong with records; none of them is used.
    """

    plan: Plan
    root: Path = Path()
    base: Path = RUNS
    problems: list[str] = field(default_factory=list, compare=False)
    _read: dict[Path, Record | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_evidence(self) -> bool:
        return self.base != RUNS

    def place(self, path: Path) -> Path:
        """Where a file of the plan (`results/runs/...`) lies among these results."""
        return self.base / path.relative_to(RUNS)

    def record(self, task: Task | None) -> Record | None:
        """The record of a task; None if there is none that can be used.

        A record that is broken or does not match config is named in `problems`; so is a record of
        this run that other code made. Evidence counts row by row (see `row`).
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
            matches = task.accepted(record) if self.is_evidence else \
                record.spec_hash == task.spec_hash  # fmt: skip
            if not matches:
                raise HovitError(f"{place}: its spec does not match config")
            if not self.is_evidence and record.provenance.code != task.code:
                raise HovitError(f"{place}: other code than the present made it")
        except HovitError as error:
            self.problems.append(f"{error}; not used")
            return None
        return record

    def rows(self, task: Task | None) -> dict[str, dict[str, Any]]:
        """What a task's record says of each row that config still has in the same form."""
        record = self.record(task)
        if task is None or record is None:
            return {}
        accepted = task.accepted(record)
        return {name: row for name, row in record.results["rows"].items() if name in accepted}

    def trained(self, study: Study, row: Row) -> list[tuple[Run, Record]]:
        """The row's runs that have a record."""
        runs = self.plan.runs_of(study, row)
        found = [(run, self.record(self.plan.train_task(run))) for run in runs]
        return [(run, record) for run, record in found if record]

    def measured(self, study: Study) -> Record | None:
        """The study's measurements."""
        return self.record(self.plan.measure_task(study))

    def measured_rows(self, study: Study) -> dict[str, dict[str, Any]]:
        """The study's measurements, row by row."""
        return self.rows(self.plan.measure_task(study))

    def evaluated(self, study: Study) -> Record | None:
        """The accuracy of given weights on ImageNet, for a study that trains nothing."""
        return self.record(self.plan.evaluate_task(study))

    def analysis(self, analysis_id: str) -> Record | None:
        """What an analysis found."""
        return self.record(self.plan.analyse_task(self.plan.analysis(analysis_id)))

    def analysed_value(self, analysis_id: str, row_ref: str, name: str) -> Value | None:
        """A number that an analysis found for a row, STUDY/ROW."""
        task = self.plan.analyse_task(self.plan.analysis(analysis_id))
        found = self.rows(task).get(row_ref, {})
        if task is None or name not in found:
            return None
        noise = found.get(f"{name}_noise", 0.0)
        return Value(float(found[name]), noise=noise, paths=(self.place(task.path),))

    def value(self, study: Study, row: Row, metric: str) -> Value | None:
        """A metric of a row: as measured, or with `reported_` before it, as the seed prints it.

        None where there is no record for it, or the seed says nothing.
        """
        if metric.startswith("reported_"):
            printed = row.reported.get(metric.removeprefix("reported_"))  # type: ignore[call-overload]
            return Value(float(printed)) if printed and "–" not in printed else None
        if metric == "top1" and not study.trained:
            return self._evaluated_value(study, row)
        if metric in TRAINED:
            return self._trained_value(study, row, metric)
        if metric in COUNTED:
            return self._counted_value(row, metric)
        return self._measured_value(study, row, metric)

    def _trained_value(self, study: Study, row: Row, metric: str) -> Value | None:
        runs = self.trained(study, row)
        if not runs:
            return None
        values = [float(r.results[metric]) for _, r in runs if metric in r.results]
        if not values:  # AP of a size that no object has
            return None
        mean, n = sum(values) / len(values), len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
        noise = STUDENT.get(n, 2.0) * spread / math.sqrt(n)
        if metric in ("top1", "val_top1"):  # all seeds share these images: more do not sharpen it
            images = runs[0][1].results["images_val" if metric == "val_top1" else "images_test"]
            noise = math.hypot(noise, _binomial(mean, images))
        if metric == "loss":
            errors = [float(r.results.get("loss_error", 0.0)) for _, r in runs]
            noise = math.hypot(noise, 1.96 * sum(errors) / n)
        paths = tuple(self.place(run.folder / "record.json") for run, _ in runs)
        return Value(mean, spread, n, noise, paths=paths)

    def _evaluated_value(self, study: Study, row: Row) -> Value | None:
        task = self.plan.evaluate_task(study)
        found = self.rows(task).get(row.id)
        if task is None or found is None:
            return None
        noise = _binomial(found["top1"], found["images"])
        return Value(found["top1"], noise=noise, paths=(self.place(task.path),))

    def _measured_value(self, study: Study, row: Row, metric: str) -> Value | None:
        task = self.plan.measure_task(study)
        found = self.rows(task).get(row.id)
        if task is None or found is None:
            return None
        paths = (self.place(task.path),)
        if metric == "throughput":
            return self._throughput(found.get("latency", {}), paths)
        if metric.startswith("latency_"):
            batch = found.get("latency", {}).get(metric.removeprefix("latency_"))
            if batch is None:
                return None
            iqr = batch["q3"] - batch["q1"]
            return Value(batch["median"], iqr, batch["n"], iqr / 2, tuple(batch["ms"]), paths)
        metric = "parameters" if metric == "parameters_m" else metric
        return Value(float(found[metric]), paths=paths) if metric in found else None

    @staticmethod
    def _throughput(latency: dict[str, dict[str, Any]], paths: tuple[Path, ...]) -> Value | None:
        """Images a second at the largest batch."""
        if not latency:
            return None
        size = max(latency, key=int)
        batch, images = latency[size], 1e3 * int(size)
        spread = images / batch["q1"] - images / batch["q3"]
        samples = tuple(images / ms for ms in batch["ms"])
        return Value(images / batch["median"], spread, batch["n"], spread / 2, samples, paths)

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
        images, size = _counts(self.root / path.parent)
        limit = self.plan.scale.limit
        used = {split: min(n, getattr(limit, split) or n) for split, n in images.items()}
        counts: dict[str, float] = {f"images_{split}": n for split, n in used.items()}
        counts |= {"images": sum(images.values()), "gigabytes": size / 1e9}
        return Value(float(counts[metric]), paths=(path,))

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

    def weights_from(self, study: Study, row: Row) -> str:
        """What the pretrained part of a row's model started from, in words."""
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

    def batches(self, study: Study) -> list[str]:
        """The latency metrics of a study, one a batch size."""
        return [f"latency_{batch}" for batch in study.batches or self.plan.scale.latency.batches]

    def throughput_batch(self, study: Study) -> int | None:
        """The batch size of a study's throughput: the largest that was timed."""
        rows = self.measured_rows(study).values()
        return max((int(b) for row in rows for b in row.get("latency", {})), default=None)

    def states(self) -> str:
        """These results in a few words, as a column's heading names them."""
        return f"evidence, {self.plan.scale.id}" if self.is_evidence else "this run"

    def where(self, study: Study) -> str:
        """Scale, images and device of a study's results, in one line."""
        rows = self.plan.rows_run(study)
        found = [run.dataset.title for row in rows for run in self.plan.runs_of(study, row)[:1]]
        devices = {str(r.provenance.device) for row in rows for _, r in self.trained(study, row)}
        if measured := self.measured(study):
            devices.add(str(measured.provenance.device))
        name = "evidence" if self.is_evidence else "this run"
        return ", ".join([f"{name}: {self.plan.scale.id}", *dict.fromkeys(found), *sorted(devices)])


def _binomial(percent: float, images: int) -> float:
    """Half the width of the 95 % interval of a share of so many images, in points."""
    share = percent / 100
    return 196 * math.sqrt(share * (1 - share) / images)


def _counts(folder: Path) -> tuple[dict[str, int], int]:
    """A pack's images of each split, and its bytes: as pack.json says, if the files agree."""
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


def find_evidence(plan: Plan, root: Path = Path()) -> list[Results]:
    """The evidence that there is, the largest scale first: one Results a scale and device."""
    found = []
    for folder in sorted((root / EVIDENCE).glob("*/*")):
        scale = plan.config.scales.get(folder.name)
        if scale and folder.is_dir():
            base = folder.parent.relative_to(root)
            found.append(Results(Plan(plan.config, scale), root, base))
    return sorted(found, key=lambda r: r.plan.scale.rank, reverse=True)


def evidence_for(study: Study, evidence: list[Results]) -> Results | None:
    """The evidence that a study's table shows: of the largest scale, and of that the fullest."""

    def rows(results: Results) -> int:
        measured = results.measured(study)
        return (
            sum(bool(results.trained(study, row)) for row in study.rows)
            + bool(measured)
            + bool(not study.trained and results.evaluated(study))
        )

    there = [results for results in evidence if rows(results)]
    return max(there, key=lambda r: (r.plan.scale.rank, rows(r)), default=None)
