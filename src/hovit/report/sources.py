"""Every source of records, read once for each command: this run, and all evidence."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..config.metrics import Quantity, quantity
from ..config.plan import Plan
from ..config.schema import Row, Study
from ..records.evidence import EVIDENCE
from .results import Results, Value

NO_RUN = Path("results/no-run")  # no folder has this name


@dataclass(frozen=True, eq=False)
class Sources:
    """This run and the evidence, the largest scale first.

    A column of a table takes as many numbers as possible from one source. A ratio, a claim and a
    figure take all their numbers from one source, so that they never mix devices or data sets.
    """

    run: Results
    evidence: tuple[Results, ...]

    @property
    def plan(self) -> Plan:
        """Config at this run's scale."""
        return self.run.plan

    @property
    def all(self) -> tuple[Results, ...]:
        """This run, then the evidence."""
        return self.run, *self.evidence

    def evidence_alone(self) -> "Sources":
        """The evidence without this run, and without the images of this machine."""
        run = Results(self.plan, self.run.root, NO_RUN, with_packs=False)
        return Sources(run, tuple(replace(each, with_packs=False) for each in self.evidence))

    def best(
        self, study: Study, number: Quantity, of_run: list[Value | None] | None = None
    ) -> list[tuple[Results, Value] | None]:
        """The source and value of each cell of a column, as many as possible from one source.

        Only numbers of one source can be compared: another scale trains on other images, or for
        longer. The source with the most values is preferred; among equals, the larger scale.

        Args:
            study: its rows are the cells.
            number: what the column shows.
            of_run: this run's value for each row, if this run counts; evidence wins ties.
        """
        found = {r: [r.value(study, row, number) for row in study.rows] for r in self.evidence}
        if of_run:
            found[self.run] = of_run
        ranked = sorted(found, key=lambda results: sum(map(bool, found[results])), reverse=True)
        return [
            next(((results, v) for results in ranked if (v := found[results][i])), None)
            for i in range(len(study.rows))
        ]

    def count(self, study: Study, row: Row, number: Quantity) -> tuple[Results, Value] | None:
        """A count of a row, with its source: of the row's own model, and counted right, if any is.

        Counts are the same on every device.
        """
        found = [(r, value) for r in self.all if (value := r.value(study, row, number))]
        return min(found, key=lambda cell: _doubts(cell[0], cell[1], row, number), default=None)

    def timed(self, study: Study) -> list[Results]:
        """The evidence that has times of a study: for each device, of its largest scale."""
        found: dict[Path, Results] = {}
        for results in self.evidence:
            if any("latency" in row for row in results.measured_rows(study).values()):
                found.setdefault(results.base, results)
        return list(found.values())

    def used(self, study: Study) -> list[Results]:
        """The evidence that some cell of a study's table shows."""
        shown = self.timed(study)
        for metric in study.columns:
            number = quantity(metric)
            if number and number.is_trained:
                shown += [cell[0] for cell in self.best(study, number) if cell]
            elif number and not number.is_timed:
                counts = [self.count(study, row, number) for row in study.rows]
                shown += [cell[0] for cell in counts if cell]
        return [results for results in self.evidence if results in shown]

    def for_figure(
        self, studies: tuple[str, ...], numbers: tuple[str, ...], analyses: tuple[str, ...]
    ) -> Results:
        """The one source of a figure: evidence of a larger scale than this run's, or this run.

        Args:
            studies: whose rows the figure shows.
            numbers: what it shows of each row. The evidence that has most of them is chosen; at
                equal count, that of the largest scale.
            analyses: the evidence must have all of these.
        """
        rank = self.plan.scale.rank
        found = [
            results
            for results in self.evidence
            if results.plan.scale.rank > rank and all(map(results.analysis, analyses))
        ]
        if analyses and not numbers:
            return found[0] if found else self.run
        rows = [(s, row) for s in map(self.plan.study, studies) for row in s.rows]
        counts = [
            sum(bool(results.value(study, row, n)) for study, row in rows for n in numbers)
            for results in found
        ]
        most = max(counts, default=0)
        return found[counts.index(most)] if most else self.run


def _doubts(results: Results, value: Value, row: Row, number: Quantity) -> tuple[bool, bool]:
    stands_in = results.plan.scale.measured_model(row) != str(row.model)
    return stands_in, is_miscounted(results, value, number)


def is_miscounted(results: Results, value: Value | None, number: Quantity) -> bool:
    """Whether a number is a count of multiply-adds without fused attention."""
    return _counts_macs(number) and value is not None and results.miscounts(value.paths)


def _counts_macs(number: Quantity) -> bool:
    return number.metric.name == "macs" and not number.reported


def miscounted_last(
    sources: Iterable[Results], study: Study, row: Row, number: Quantity
) -> list[Results]:
    """The sources, with those last that count the row's multiply-adds without fused attention."""
    if not _counts_macs(number):
        return list(sources)
    values = [(results, results.value(study, row, number)) for results in sources]
    return [r for r, _ in sorted(values, key=lambda each: is_miscounted(each[0], each[1], number))]


def load_sources(plan: Plan, root: Path = Path()) -> Sources:
    """This run's records and all committed evidence."""
    found = []
    for folder in sorted((root / EVIDENCE).glob("*/*")):
        scale = plan.config.scales.get(folder.name)
        if scale and folder.is_dir():
            base = folder.parent.relative_to(root)
            found.append(Results(Plan(plan.config, scale), root, base))
    ranked = sorted(found, key=lambda results: results.plan.scale.rank, reverse=True)
    return Sources(Results(plan, root), tuple(ranked))
