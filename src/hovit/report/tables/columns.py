"""The columns of a table: reported numbers, evidence and this run's, cell by cell, as text."""

from dataclasses import dataclass
from typing import Literal

from ...config.metrics import RATIO_DECIMALS, RATIO_HEADING, Metric, Quantity, quantity
from ...config.schema import Row, Study
from ..number import minus
from ..results import PairedValue, Results, Value
from ..sources import Sources, is_miscounted

NOTHING = "—"
MISCOUNTED = "¹"  # marks a count of multiply-adds
MISCOUNTED_NOTE = "Without fused attention, which PyTorch 2.11 does not count"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Kind = Literal["reported", "evidence", "run"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        heading: metric and unit.
        source: what stands under the heading: `reported`, `evidence a, batch 1`, `this run` ...
        kind: reported, evidence or this run.
        number: what each cell shows.
        cells: text of each row.
        results: for each row, the source of its number; None for reported or missing numbers.
        marks: for each row, the letter of its evidence, if evidence differs between rows.
        ratio: whether cells are ratios to the row's baseline.
        inverse: whether that ratio is inverted: baseline over row.
    """

    heading: str
    source: str
    kind: Kind
    number: Quantity
    cells: tuple[str, ...]
    results: tuple[Results | None, ...]
    marks: tuple[str, ...] = ()
    ratio: bool = False
    inverse: bool = False

    def mark(self, i: int) -> str:
        """The letter of a cell's evidence, or nothing."""
        return self.marks[i] if self.marks else ""


@dataclass(frozen=True)
class Table:
    """A study's columns, and the evidence in them by letter.

    Args:
        study: the study.
        columns: left to right, after the column of labels. Empty columns are left out.
        evidence: letter -> source.
    """

    study: Study
    columns: tuple[Column, ...]
    evidence: dict[str, Results]

    @property
    def footnotes(self) -> dict[str, str]:
        """Mark after a number -> what it says."""
        marked = any(MISCOUNTED in cell for column in self.columns for cell in column.cells)
        return {MISCOUNTED: MISCOUNTED_NOTE} if marked else {}


def format_value(value: Value, metric: Metric) -> str:
    """A value as a table shows it: mean, and ± spread over seeds, or a 95 % interval."""
    if metric.name == "gigabytes":
        return f"{value.mean:.3g}"
    low, high = value.interval
    if metric.name == "top1_interval":
        return f"{max(low, 0):.{metric.decimals}f} to {min(high, 100):.{metric.decimals}f}"
    text = f"{value.mean * metric.unit:,.{metric.decimals}f}"
    if isinstance(value, PairedValue):
        ends = f"{low:.{metric.decimals}f} to {high:.{metric.decimals}f}"
        return minus(f"{text} ({ends}), {format_p(value.p)}")
    over_seeds = value.spread and metric.kind != "timed"
    return f"{text} ± {value.spread:.{metric.decimals}f}" if over_seeds else text


def format_p(p: float) -> str:
    """A p-value with two digits: `p = 0.031`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def format_printed(printed: str) -> str:
    """A reported number with its own decimals, and thousands separated."""
    if "–" in printed or "." in printed:
        return minus(printed)
    return f"{int(printed):,}"


def make_table(study: Study, sources: Sources, with_run: bool = True) -> Table:
    """All columns of a study.

    Args:
        study: the study.
        sources: this run and the evidence.
        with_run: whether to show this run's inexact numbers as well.
    """
    letters = dict(zip(LETTERS, sources.used(study), strict=False))
    builder = _Builder(study, sources, letters, with_run)
    columns = []
    for name in study.columns:
        number = quantity(name)
        assert number is not None  # config is checked
        columns.append(builder.reported(number))
        if name == "latency":
            columns += builder.latency()
        elif name == "throughput":
            columns += builder.throughput(number)
        elif number.is_trained:
            columns += builder.trained(number)
        else:
            columns.append(builder.counted(number))
    kept = tuple(column for column in columns if set(column.cells) != {NOTHING})
    return Table(study, kept, letters)


@dataclass(frozen=True)
class _Builder:
    study: Study
    sources: Sources
    letters: dict[str, Results]
    with_run: bool

    def reported(self, number: Quantity) -> Column:
        """What the paper reports."""
        printed = [row.reported.get(number.metric.name) for row in self.study.rows]
        cells = tuple(format_printed(p) if p else NOTHING for p in printed)
        reported = Quantity(number.metric, reported=True)
        nobody = (None,) * len(cells)
        return Column(number.metric.heading, "reported", "reported", reported, cells, nobody)

    def of_one(self, number: Quantity, results: Results, source: str, kind: Kind) -> Column:
        """A number of each row, all from one source."""
        values = [results.value(self.study, row, number) for row in self.study.rows]
        cells = tuple(format_value(v, number.metric) if v else NOTHING for v in values)
        whose = tuple(results if value else None for value in values)
        return Column(number.metric.heading, source, kind, number, cells, whose)

    def counted(self, number: Quantity) -> Column:
        """A count of each row; it is the same on every device, so evidence does not repeat it."""
        found = [self.sources.count(self.study, row, number) for row in self.study.rows]
        cells = tuple(
            format_value(cell[1], number.metric) + MISCOUNTED * is_miscounted(*cell, number)
            if cell else NOTHING
            for cell in found
        )  # fmt: skip
        whose = tuple(cell[0] if cell else None for cell in found)
        of_run = any(results is self.sources.run for results in whose)
        marks = tuple(self._letter(results) for results in whose)
        kind: Kind = "run" if of_run else "evidence"
        return Column(number.metric.heading, "counted", kind, number, cells, whose, marks)

    def trained(self, number: Quantity) -> list[Column]:
        """Evidence for each cell, and this run's number."""
        best = self.sources.best(self.study, number)
        cells = tuple(format_value(cell[1], number.metric) if cell else NOTHING for cell in best)
        whose = tuple(cell[0] if cell else None for cell in best)
        marks = tuple(self._letter(results) for results in whose)
        evidence = Column(
            number.metric.heading, "evidence", "evidence", number, cells, whose, marks
        )
        run = self.of_one(number, self.sources.run, "this run", "run")
        return [evidence, run] if self.with_run else [evidence]

    def latency(self) -> list[Column]:
        """Latency by source and batch size, then the ratios to the baseline likewise."""
        timed = self._timed()
        columns = []
        for results, source, kind in timed:
            results.latency_device(self.study)  # refuses two devices
            for number in (*results.batches(self.study), *results.captured(self.study)):
                columns.append(self.of_one(number, results, _with_batch(source, number), kind))
        reported = quantity("reported_latency")
        assert reported is not None
        columns.append(self._ratio(reported, None, "reported", "reported"))
        for results, source, kind in timed:
            for number in (*results.batches(self.study), *results.captured(self.study)):
                columns.append(self._ratio(number, results, _with_batch(source, number), kind))
        return columns

    def throughput(self, number: Quantity) -> list[Column]:
        """Throughput by source, then its ratio to the baseline: reported, implied, measured."""
        macs, reported = quantity("macs"), Quantity(number.metric, reported=True)
        assert macs is not None
        timed = self._timed()
        columns = [self.of_one(number, results, source, kind) for results, source, kind in timed]
        columns.append(self._ratio(reported, None, "reported", "reported", decimals=3))
        for results, source, kind in timed:
            implied = f"{source}, implied by MACs"
            columns.append(self._ratio(macs, results, implied, kind, decimals=3, inverse=True))
            columns.append(self._ratio(number, results, source, kind, decimals=3))
        return columns

    def _timed(self) -> list[tuple[Results, str, Kind]]:
        """The sources of times: evidence by device, then this run."""
        found: list[tuple[Results, str, Kind]] = [
            (results, f"evidence {self._letter(results)}", "evidence")
            for results in self.sources.timed(self.study)
        ]
        return found + [(self.sources.run, "this run", "run")] * self.with_run

    def _ratio(
        self,
        number: Quantity,
        results: Results | None,
        source: str,
        kind: Kind,
        decimals: int = RATIO_DECIMALS,
        inverse: bool = False,
    ) -> Column:
        """A number of each row over its baseline's, both from one source."""
        whose = results or self.sources.run  # a reported number is the same in all
        ratios = [baseline_ratio(whose, self.study, row, number) for row in self.study.rows]
        if inverse:
            ratios = [1 / ratio if ratio else None for ratio in ratios]
        cells = tuple(
            f"{ratio:.{decimals}f}"
            + MISCOUNTED * is_miscounted(whose, whose.value(self.study, row, number), number)
            if ratio else NOTHING
            for ratio, row in zip(ratios, self.study.rows, strict=True)
        )  # fmt: skip
        sources = tuple(results if ratio else None for ratio in ratios)
        return Column(
            RATIO_HEADING, source, kind, number, cells, sources, ratio=True, inverse=inverse
        )

    def _letter(self, results: Results | None) -> str:
        return next((key for key, each in self.letters.items() if each is results), "")


def _with_batch(source: str, number: Quantity) -> str:
    captured = ", captured" if number.metric.name == "captured" else ""
    return f"{source}, batch {number.batch}{captured}"


def baseline_ratio(
    results: Results, study: Study, row: Row, number: Quantity | str
) -> float | None:
    """A row's value over its baseline's; None where either is missing."""
    if row.baseline is None:
        return None
    own = results.value(study, row, number)
    base = results.value(study, study.row(row.baseline), number)
    return own.mean / base.mean if own and base else None
