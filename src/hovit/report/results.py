"""The numbers in the records of one source, with their spread."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.metrics import Quantity, quantity
from ..config.schema import Row, Study
from ..utils.errors import HovitError, one_line
from ..utils.files import read_json
from .paired import mcnemar, pair
from .record_source import RecordSource

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # t at 95 %, by n


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

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a trained number."""
        return self.mean - self.noise, self.mean + self.noise


@dataclass(frozen=True)
class PairedValue(Value):
    """A difference in top-1 between two rows over the same test images, in points.

    Its `noise` is half the width of a 95 % interval over random seeds and test images.

    Args:
        better, worse: test images that only this row, or only the other row, classifies correctly,
            counted over all seeds.
    """

    better: int = 0
    worse: int = 0

    @property
    def p(self) -> float:
        """p of the exact McNemar test over the test images of these trained models."""
        return mcnemar(self.better, self.worse)


@dataclass(frozen=True, eq=False)
class Results(RecordSource):
    """The numbers in the records of one source."""

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
        values = [float(r.results[metric]) for _, r in runs if metric in r.results]
        if not values:  # no run, or AP for a size that no object has
            return None
        mean, spread, noise = _over_seeds(values)
        n = len(values)
        if metric in ("top1", "val_top1"):  # all seeds share the images: more seeds do not help
            images = runs[0][1].results["images_val" if metric == "val_top1" else "images_test"]
            noise = math.hypot(noise, _binomial(mean, images))
        if metric == "loss":
            errors = [float(r.results.get("loss_error", 0.0)) for _, r in runs]
            noise = math.hypot(noise, 1.96 * sum(errors) / n)
        paths = tuple(self.place(self.plan.train_task(run).path) for run, _ in runs)
        return Value(mean, spread, n, noise, paths=paths)

    def paired_difference(
        self, study: Study, row: Row, other_study: Study, other: Row
    ) -> PairedValue | None:
        """Top-1 of a row minus that of another row, over the same test images.

        Uses the random seeds that both rows have. If that is one seed, the noise includes the
        spread of a row with more seeds. None if there is no such seed, or if the two were not
        tested on the same images.
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
        mean, spread, noise = _over_seeds(pairs.differences)
        if len(tables) == 1:
            top1 = [[float(record.results["top1"]) for _, record in each] for each in rows]
            noise = math.hypot(*(_over_seeds(values)[2] for values in top1))
        noise = math.hypot(noise, pairs.image_noise)
        return PairedValue(
            mean, spread, len(tables), noise, paths=tuple(paths),
            better=pairs.better, worse=pairs.worse,
        )  # fmt: skip

    def _evaluated_value(self, study: Study, row: Row) -> Value | None:
        task = self.plan.evaluate_task(study)
        found = self.rows(task).get(row.id)
        if task is None or found is None:
            return None
        noise = _binomial(found["top1"], found["images"])
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
            return Value(batch["median"], iqr, batch["n"], iqr / 2, tuple(batch["ms"]), paths)
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


def _over_seeds(values: list[float]) -> tuple[float, float, float]:
    """(mean, standard deviation, half the width of a 95 % interval by Student's t)."""
    mean, n = sum(values) / len(values), len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
    return mean, spread, STUDENT.get(n, 2.0) * spread / math.sqrt(n)


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
