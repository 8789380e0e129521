"""The numbers in the records of one source, with their spread."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.metrics import Quantity, quantity
from ..config.runs import Run
from ..config.schema import Row, Study
from ..records.predictions import right_by_class
from ..records.record import Record
from ..utils.errors import HovitError, one_line
from ..utils.files import read_json
from .noise import NORMAL, binomial_noise, per_class_noise, pooled_variance, seed_noise
from .paired import mcnemar, pair
from .record_source import RecordSource


@dataclass(frozen=True)
class Value:
    """A number with its spread.

    Args:
        mean: mean over random seeds; for latency the median over rounds.
        spread: standard deviation over seeds (0 for one seed), or the interquartile range.
        n: seeds, or rounds; 1 for an exact number.
        noise: how far the number may be off. For training: half the width of a 95 % interval over
            random seeds, combined with one over test images for accuracy and loss. The variance
            over seeds is pooled over rows with the same recipe and images
            (`Results.seed_variance`). For latency:
            half the interquartile range. For an analysis: as its record states.
        seed_noise: the part of the noise that random seeds cause.
        samples: latency of each round, in the order that all rows of a record share.
        paths: the records behind the number.
    """

    mean: float
    spread: float = 0.0
    n: int = 1
    noise: float = 0.0
    seed_noise: float = 0.0
    samples: tuple[float, ...] = ()
    paths: tuple[Path, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a trained number."""
        return self.mean - self.noise, self.mean + self.noise


@dataclass(frozen=True)
class PairedValue(Value):
    """A difference in top-1 between two rows over the same test images, in points.

    Its `noise` is half the width of a 95 % interval over random seeds and test images.

    Args:
        sides: top-1 of the row and of the other one, over the seeds that both have.
        better: test images that this row classifies correctly in more seeds than the other row.
        worse: test images that it classifies correctly in fewer seeds.
    """

    sides: tuple[float, float] = (0.0, 0.0)
    better: int = 0
    worse: int = 0

    @property
    def p(self) -> float:
        """p of the exact McNemar test, with one outcome for each test image."""
        return mcnemar(self.better, self.worse)


@dataclass(frozen=True, eq=False)
class Results(RecordSource):
    """The numbers in the records of one source."""

    _seed_variances: dict[tuple[str, str, str, str], tuple[float, int]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def value(self, study: Study, row: Row, number: Quantity | str) -> Value | None:
        """A number of a row; None if no record has it, or the paper does not report it."""
        parsed = quantity(number) if isinstance(number, str) else number
        if parsed is None:
            return None
        if parsed.reported:
            printed = row.reported.get(parsed.metric.name)
            return Value(float(printed)) if printed and "–" not in printed else None
        if row.same_as and parsed.is_trained:
            study_id, row_id = (row.trained_as or row.same_as).split("/")
            study = self.plan.study(study_id)
            return self.value(study, study.row(row_id), parsed)
        if parsed.metric.name == "top1_difference":
            if row.baseline is None:
                return None
            return self.paired_difference(study, row, study, study.row(row.baseline))
        if parsed.metric.name == "top1_per_class":
            return self._trained_value(study, row, parsed.metric.name)
        if parsed.metric.recorded == "top1" and not study.trained:
            evaluated = self._evaluated_value(study, row)
            return evaluated or self._trained_value(study, row, "top1")
        if parsed.is_trained:
            return self._trained_value(study, row, parsed.metric.recorded)
        if parsed.is_counted:
            return self._counted_value(row, parsed.metric.name)
        return self._measured_value(study, row, parsed)

    def _trained_value(self, study: Study, row: Row, metric: str) -> Value | None:
        runs = self.trained(study, row)
        values = self._numbers(runs, metric)
        if not values:  # no run, or AP for a size that no object has
            return None
        mean, spread = _over_seeds(values)
        n = len(values)
        over_seeds = seed_noise(*self.seed_variance(study, row, metric), n)
        over_images = 0.0
        if metric in ("top1", "val_top1"):
            over_images = binomial_noise(mean, self._distinct_images(runs, metric))
        if metric == "top1_per_class":
            counts = self._right_by_class(runs)
            over_images = statistics.fmean(per_class_noise(c["right"], c["images"]) for c in counts)
        if metric == "loss":
            errors = [float(r.results.get("loss_error", 0.0)) for _, r in runs]
            over_images = NORMAL * sum(errors) / n
        paths = tuple(self.place(self.plan.train_task(run).path) for run, _ in runs)
        noise = math.hypot(over_seeds, over_images)
        return Value(mean, spread, n, noise, over_seeds, paths=paths)

    def _numbers(self, runs: list[tuple[Run, Record]], metric: str) -> list[float]:
        """A metric of each run that has it: from its record, or from its test predictions."""
        if metric != "top1_per_class":
            return [float(r.results[metric]) for _, r in runs if metric in r.results]
        counts = self._right_by_class(runs)
        return [100.0 * float((each["right"] / each["images"]).mean()) for each in counts]

    def _right_by_class(self, runs: list[tuple[Run, Record]]) -> list[pd.DataFrame]:
        """The test images of each class, and those classified correctly, of each run."""
        tables = [self.predictions(run) for run, _ in runs]
        return [right_by_class(table) for table in tables if table is not None]

    def _distinct_images(self, runs: list[tuple[Run, Record]], metric: str) -> int:
        """The number of different images behind an accuracy: more seeds help only with more."""
        run, record = runs[0]
        if metric == "val_top1":
            return int(record.results["images_val"])
        images: set[int] = set()
        if run.dataset.split.per_run:
            for each, _ in runs:
                if (table := self.predictions(each)) is not None:
                    images.update(table["index"])
        return max(len(images), int(record.results["images_test"]))

    def seed_variance(self, study: Study, row: Row, metric: str) -> tuple[float, int]:
        """The variance of a metric over random seeds, and its degrees of freedom.

        It is pooled over the rows that share the row's recipe and images. A row with one seed
        therefore has the seed noise of the others, and one with two is not judged by two numbers
        alone. In evidence, these are rows of all studies, so a run has the same noise in every
        table. In this run, they are rows of the study, because its table is made as soon as its own
        runs are trained. Where each seed draws its own test images, the variance contains what this
        causes, so that the noise is too large rather than too small.
        """
        run = self.plan.runs_of(study, row)[0]
        pool = "" if self.is_evidence else study.id
        key = pool, run.recipe.model_dump_json(), run.role, metric
        if key not in self._seed_variances:
            studies = self.plan.config.studies.values() if self.is_evidence else [study]
            self._seed_variances[key] = self._pooled_variance(studies, run, metric)
        return self._seed_variances[key]

    def _pooled_variance(
        self, studies: Iterable[Study], run: Run, metric: str
    ) -> tuple[float, int]:
        groups: dict[str, list[float]] = {}
        for study in studies:
            for row in study.rows:
                runs = self.plan.runs_of(study, row)
                alike = runs and (runs[0].recipe, runs[0].role) == (run.recipe, run.role)
                if alike and runs[0].id not in groups:
                    groups[runs[0].id] = self._numbers(self.trained(study, row), metric)
        return pooled_variance(groups.values())

    def paired_difference(
        self, study: Study, row: Row, other_study: Study, other: Row
    ) -> PairedValue | None:
        """Top-1 of a row minus that of another row, over the same test images.

        Uses the random seeds that both rows have. None if there is no such seed, or if the two
        were not tested on the same images. The noise combines the pooled variance over seeds of
        both rows with the noise over test images of the pairs.
        """
        rows = self.trained(study, row), self.trained(other_study, other)
        others = {run.seed: run for run, _ in rows[1]}
        tables, paths = [], []
        for run, _ in rows[0]:
            second = others.get(run.seed)
            if second is None or second.dataset.to_spec() != run.dataset.to_spec():
                continue
            predictions = [self.predictions(each) for each in (run, second)]
            if predictions[0] is None or predictions[1] is None:
                continue
            tables.append((run.seed, predictions[0], predictions[1]))
            paths += [self.place(self.plan.train_task(each).path) for each in (run, second)]
        if (pairs := pair(tables)) is None:
            return None
        mean, spread = _over_seeds(pairs.differences)
        sides = ((study, row), (other_study, other))
        n = len(tables)
        over_seeds = math.hypot(
            *(seed_noise(*self.seed_variance(*side, "top1"), n) for side in sides)
        )
        noise = math.hypot(over_seeds, pairs.image_noise)
        return PairedValue(
            mean, spread, n, noise, over_seeds, paths=tuple(paths),
            sides=pairs.accuracies, better=pairs.better, worse=pairs.worse,
        )  # fmt: skip

    def _evaluated_value(self, study: Study, row: Row) -> Value | None:
        task = self.plan.evaluate_task(study)
        found = self.rows(task).get(row.id)
        if task is None or found is None:
            return None
        noise = binomial_noise(found["top1"], found["images"])
        return Value(found["top1"], noise=noise, paths=(self.place(task.path),))

    def _measured_value(self, study: Study, row: Row, number: Quantity) -> Value | None:
        found = self.measured_rows(study).get(row.id)
        if found is None:
            return None
        paths = self._measured_paths(study, row)
        if number.metric.name == "throughput":
            size = self.throughput_batch(study) if study.cites else None
            return _throughput(found.get("latency", {}), paths, size)
        if number.metric.name in ("latency", "captured"):
            batch = found.get(number.metric.name, {}).get(str(number.batch))
            if batch is None:
                return None
            iqr = batch["q3"] - batch["q1"]
            ms = tuple(batch["ms"])
            return Value(batch["median"], iqr, batch["n"], iqr / 2, samples=ms, paths=paths)
        name = "parameters" if number.metric.name == "parameters_m" else number.metric.name
        return Value(float(found[name]), paths=paths) if name in found else None

    def _measured_paths(self, study: Study, row: Row) -> tuple[Path, ...]:
        """The record of a row's measurements: the study's own, or that of the row it cites."""
        task = self.plan.measure_task(study)
        if row.same_as and row.id not in self.rows(task):
            task = self.plan.measure_task(self.plan.study(row.same_as.split("/")[0]))
        return (self.place(task.path),) if task else ()

    def _counted_value(self, row: Row, metric: str) -> Value | None:
        if row.total and row.rule:
            sizes = self.plan.config.datasets[row.rule].split.sizes(row.total)
            by_rule = dict(zip(("images_train", "images_val", "images_test"), sizes, strict=True))
            by_rule["images"] = row.total
            return Value(float(by_rule[metric])) if metric in by_rule else None
        packs = self.plan.packs_of(row.dataset) if row.dataset else []
        file = self.packed(packs[0], "pack.json") if packs else None
        if file is None:
            return None
        images, size = _image_counts(file.parent)
        limit = self.plan.scale.limit
        used = {split: min(n, getattr(limit, split) or n) for split, n in images.items()}
        counts: dict[str, float] = {f"images_{split}": n for split, n in used.items()}
        counts |= {"images": sum(images.values()), "gigabytes": size / 1e9}
        return Value(float(counts[metric]), paths=(file.relative_to(self.root),))

    def analysed_value(self, analysis_id: str, row_ref: str, name: str) -> Value | None:
        """A number that an analysis found for a row, STUDY/ROW."""
        task = self.plan.analyse_task(self.plan.analysis(analysis_id))
        found = self.analysed_rows(analysis_id).get(row_ref, {})
        if task is None or name not in found:
            return None
        noise = found.get(f"{name}_noise", 0.0)
        return Value(float(found[name]), noise=noise, paths=(self.place(task.path),))


def _over_seeds(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation over random seeds; 0 for one seed)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _throughput(
    latency: dict[str, dict[str, Any]], paths: tuple[Path, ...], batch_size: int | None = None
) -> Value | None:
    """Images per second at a batch size; by default at the largest."""
    size = str(batch_size) if batch_size else max(latency, key=int, default="")
    if size not in latency:
        return None
    batch, images = latency[size], 1e3 * int(size)
    spread = images / batch["q1"] - images / batch["q3"]
    samples = tuple(images / ms for ms in batch["ms"])
    median, n = images / batch["median"], batch["n"]
    return Value(median, spread, n, spread / 2, samples=samples, paths=paths)


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
