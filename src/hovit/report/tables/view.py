"""The Markdown view of a table: reported numbers, the best results, ratios to the baseline.

It shows one number for each metric and device, in tables of at most 100 characters per line. The
CSV has all columns. Results of this run appear only if its scale checks such numbers, because the
accuracy of a smoke run next to a reported one would look like a reproduction.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...config.metrics import METRICS, PRECISION, Metric, Quantity, quantity
from ...config.runs import protocol
from ...config.schema import Study
from ..number import significant
from ..results import PairedValue, Results, Value
from ..sources import Sources, is_miscounted
from .columns import (
    MISCOUNTED,
    MISCOUNTED_NOTE,
    NOTHING,
    baseline_ratio,
    format_printed,
    format_value,
)
from .facts import PRECISIONS, WORKLOADS, timed_size

WIDTH = 100  # characters of a line
Shown = tuple[str, list[str]]  # a column: heading, and the cell of each row
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True)
class Part:
    """One part of the view: counts, accuracy, or the times of one device.

    Args:
        title: one line that states the contents and the origin of the numbers.
        blocks: columns that stay together, left to right.
        labels: labels of the rows.
        footnotes: sources of marked cells.
        compact: leave out rows without a number.
    """

    title: str
    blocks: list[list[Shown]]
    labels: list[str]
    footnotes: tuple[str, ...] = ()
    compact: bool = False

    def lines(self) -> list[str]:
        """The part as Markdown; empty columns are left out, and wide tables are split."""
        filled = [[c for c in block if set(c[1]) != {NOTHING}] for block in self.blocks]
        blocks = [block for block in filled if block]
        if not blocks:
            return []
        if self.compact:
            return replace(self._filled(blocks), compact=False).lines()
        lines = [f"**{self.title}**", ""]
        for columns in self._tables(blocks):
            lines += [*_table(self.labels, columns), ""]
        return lines + [*self.footnotes, ""] * bool(self.footnotes)

    def _filled(self, blocks: list[list[Shown]]) -> "Part":
        """The part with the rows that have a number."""
        columns = [cells for block in blocks for _, cells in block]
        rows = [i for i in range(len(self.labels)) if any(c[i] != NOTHING for c in columns)]
        kept = [[(head, [cells[i] for i in rows]) for head, cells in block] for block in blocks]
        return replace(self, blocks=kept, labels=[self.labels[i] for i in rows])

    def _tables(self, blocks: list[list[Shown]]) -> list[list[Shown]]:
        """Blocks in tables that fit the width; each table repeats the labels."""
        tables: list[list[Shown]] = [[]]
        for block in blocks:
            wide = max(map(len, _table(self.labels, [*tables[-1], *block]))) > WIDTH
            if tables[-1] and wide:
                tables.append([])
            tables[-1] += block
        return tables


def _table(labels: list[str], columns: list[Shown]) -> list[str]:
    body = [[label, *(cells[i] for _, cells in columns)] for i, label in enumerate(labels)]
    header = ["", *(heading for heading, _ in columns)]
    align = [":--", *("--:" for _ in columns)]
    return ["| " + " | ".join(line) + " |" for line in (header, align, *body)]


def view(sources: Sources, study: Study) -> list[str]:
    """The Markdown tables of a study, each with a line that states the origin of its numbers."""
    numbers = [number for name in study.columns if (number := quantity(name))]
    exact = [n for n in numbers if not n.is_inexact and n.metric.is_measured]
    parts = [_counts(sources, study, exact)]
    parts.append(_trained(sources, study, [n for n in numbers if n.is_trained]))
    for number in numbers:
        if number.is_timed:
            parts += _timed(sources, study, number)
    if study.cites:
        parts = [replace(part, compact=True) for part in parts]
    lines = [line for part in parts for line in part.lines()]
    if not sources.run.is_evidence and not sources.plan.scale.judges:
        lines += [_not_shown(sources, study), ""] if _hides(sources, study, numbers) else []
    return lines or ["No numbers yet.", ""]


def _not_shown(sources: Sources, study: Study) -> str:
    scale = sources.plan.scale.id
    return (
        f"Accuracies and times of this run (scale `{scale}`, which tests the pipeline) are in "
        f"[{study.id}.csv]({study.id}.csv) only."
    )


def _hides(sources: Sources, study: Study, numbers: list[Quantity]) -> bool:
    """Whether this run has inexact numbers that the view leaves out."""
    inexact = [number for number in numbers if number.is_inexact]
    return any(sources.run.value(study, row, n) for row in study.rows for n in inexact)


def _labels(
    study: Study, source: Callable[[int], Results | None] = lambda i: None, trained: bool = True
) -> list[str]:
    """Label of each row, with † if it is added here, and with the model that stands in for it.

    Args:
        study: the study.
        source: the source of a row's numbers; None for no source.
        trained: whether the numbers belong to trained models. Otherwise they may belong to the
            paper's model.
    """
    labels = []
    for i, row in enumerate(study.rows):
        results = source(i)
        stand_in = results.plan.scale.models.get(str(row.model)) if results else None
        replaced = stand_in is not None and (trained or stand_in.measured)
        here = f" ({stand_in.label} here)" if stand_in and replaced else ""
        labels.append(row.label + here + " †" * row.ours)
    return labels


def _reported(study: Study, metric: Metric) -> list[str]:
    printed = [row.reported.get(metric.name) for row in study.rows]
    return [format_printed(text) if text else NOTHING for text in printed]


def _counts(sources: Sources, study: Study, numbers: list[Quantity]) -> Part:
    """Reported and counted numbers; counts are the same on every device."""
    blocks, miscounted = [], False
    for number in numbers:
        metric = number.metric
        cells = [sources.count(study, row, number) for row in study.rows]
        wrong = [cell is not None and is_miscounted(*cell, number) for cell in cells]
        miscounted |= any(wrong)
        counted = [
            _count(cell and cell[1], metric) + MISCOUNTED * flag
            for cell, flag in zip(cells, wrong, strict=True)
        ]
        blocks.append([(f"{metric.heading}, reported", _reported(study, metric)),
                       (metric.heading, counted)])  # fmt: skip
    size = "each row's own size" if any(row.image_size for row in study.rows) else ""
    size = size or (f"{study.image_size} px" if study.image_size else "")
    at = ", ".join(filter(None, (size, f"{study.num_classes} classes")))
    title = "Images" if study.kind == "data" else f"Counted at {at}"
    notes = (f"{MISCOUNTED} {MISCOUNTED_NOTE}",)
    return Part(title, blocks, _labels(study), notes * miscounted)


def _count(value: Value | None, metric: Metric) -> str:
    if value is None:
        return NOTHING
    number = value.mean * metric.unit
    return f"{number:,.0f}" if metric.unit == 1 and number == int(number) else significant(number)


def _trained(sources: Sources, study: Study, numbers: list[Quantity]) -> Part:
    """Reported accuracy and loss, and the best results with their spread and n."""
    shown = [(number, _best(sources, study, number)) for number in numbers]
    used = list(dict.fromkeys(cell[0] for _, cells in shown for cell in cells if cell))
    marks = dict(zip(used[1:], MARKS, strict=False))
    blocks = []
    for number, cells in shown:
        heading = number.metric.heading
        several = any(cell and cell[1].n > 1 for cell in cells)
        texts = [
            _accuracy(c[1], number.metric, several) + marks.get(c[0], "") if c else NOTHING
            for c in cells
        ]
        here = " on stand-ins" if any(_stands_in(results, study) for results in used) else ""
        blocks.append([(f"{heading}, reported", _reported(study, number.metric)),
                       (heading + here, texts)])  # fmt: skip
    whose: list[Results | None] = [None] * len(study.rows)
    for _, cells in reversed(shown):
        whose = [cell[0] if cell else other for cell, other in zip(cells, whose, strict=True)]
    title = "Accuracy" + " and loss" * any(n.metric.name == "loss" for n in numbers)
    title += f": {_where(used[0], study)}" if used else ", as reported"
    notes = tuple(f"{mark} {_where(results, study)}  " for results, mark in marks.items())
    return Part(title, blocks, _labels(study, lambda i: whose[i]), notes)


def _best(sources: Sources, study: Study, number: Quantity) -> list[tuple[Results, Value] | None]:
    """As `Sources.best`; this run counts only if its scale checks the metric."""
    run, plan = sources.run, sources.plan
    of_run = [run.value(study, row, number) for row in study.rows]
    accuracy = "top1" if number.metric.name in PRECISION else number.metric.recorded
    if accuracy not in plan.scale.judges:
        evaluated = plan.evaluate_task(study) if run.evaluated(study) else None
        if evaluated is None:
            return sources.best(study, number)
        path = run.place(evaluated.path)  # given weights on ImageNet count at every scale
        of_run = [value if value and path in value.paths else None for value in of_run]
    return sources.best(study, number, of_run)


def _stands_in(results: Results, study: Study) -> bool:
    runs = [run for row in study.rows for run, _ in results.trained(study, row)[:1]]
    return any(run.dataset.stands_for and not run.dataset.is_part for run in runs)


def _accuracy(value: Value, metric: Metric, several: bool) -> str:
    """Mean, ± standard deviation over seeds, and n if some row of the column has several seeds."""
    if isinstance(value, PairedValue) or metric.name == "top1_interval":
        return format_value(value, metric)
    decimals = 2 if metric.name == "loss" else 1
    mean = f"{value.mean:.{decimals}f}"
    if value.n > 1:
        return f"{mean} ± {value.spread:.{decimals}f} ({value.n})"
    return f"{mean} (1)" if several else mean


def _where(results: Results, study: Study) -> str:
    """Scale, images and size of the trained rows of one source, in short."""
    runs = [r for row in study.rows for r, _ in results.trained(study, row)[:1]]
    images = ", ".join(dict.fromkeys(run.dataset.described for run in runs))
    size = f"{runs[0].image_size} px" if runs else ""
    facts = ", ".join(filter(None, (f"scale {results.plan.scale.id}", images, size)))
    seeds = (
        ", mean ± standard deviation (number of random seeds)" if _has_seeds(results, study) else ""
    )
    return f"{kind(results)}, {facts}{seeds}"


def _has_seeds(results: Results, study: Study) -> bool:
    return any(len(results.trained(study, row)) > 1 for row in study.rows)


def kind(results: Results) -> str:
    """`committed results` or `this run`."""
    return "committed results" if results.is_evidence else "this run"


def _timed(sources: Sources, study: Study, number: Quantity) -> list[Part]:
    """Reported and measured times with their ratios, one part for each device."""
    every = sources.timed(study)
    if "latency" in sources.plan.scale.judges and sources.run.measured(study):
        every = [*every, sources.run]
    metric = number.metric
    ratios = _ratios(sources.run, study, Quantity(metric, reported=True))
    reported = [[(f"reported, {metric.symbol}", _reported(study, metric)), ("× reported", ratios)]]
    if metric.name == "throughput" and "throughput_cpu" in study.columns:
        on_cpu = METRICS["throughput_cpu"]
        reported.append([("reported, CPU", _reported(study, on_cpu))])
    if not every:
        return [Part(f"{metric.heading}, as reported", reported, _labels(study))]
    return [_of_device(results, study, number, reported) for results in every]


def _of_device(
    results: Results, study: Study, number: Quantity, reported: list[list[Shown]]
) -> Part:
    blocks, metric = list(reported), number.metric
    latencies = [*results.batches(study), *results.captured(study)]
    for each in latencies if metric.name == "latency" else [number]:
        values = [results.value(study, row, each) for row in study.rows]
        batch = each.batch or results.throughput_batch(study)
        cells = [significant(value.mean) if value else NOTHING for value in values]
        graph = ", CUDA graph" if each.metric.name == "captured" else ""
        blocks.append([(f"batch {batch}{graph}, {metric.symbol}", cells),
                       ("× baseline", _ratios(results, study, each))])  # fmt: skip
    if metric.name == "throughput" and (macs := quantity("macs")):
        blocks.append([("× by MACs", _ratios(results, study, macs, inverse=True))])
    title = f"{metric.heading}: {kind(results)}, {_timing(results, study)}"
    labels = _labels(study, lambda i: results, trained=False)
    marked = any(MISCOUNTED in cell for block in blocks for _, cells in block for cell in cells)
    return Part(title, blocks, labels, (f"{MISCOUNTED} {MISCOUNTED_NOTE}",) * marked)


def _timing(results: Results, study: Study) -> str:
    """Device, size and precision of a study's times, in short."""
    measured, device = results.measured(study), results.latency_device(study)
    if measured is None or device is None:
        return f"scale {results.plan.scale.id}"
    setting = protocol(measured.spec["latency"], device.kind)
    work = WORKLOADS.get(setting.get("workload", "inference"), "")
    precision = PRECISIONS.get(setting["precision"], setting["precision"])
    return ", ".join(
        filter(None, (str(device), work, timed_size(results, study, setting), precision))
    )


def _ratios(results: Results, study: Study, number: Quantity, inverse: bool = False) -> list[str]:
    ratios = [baseline_ratio(results, study, row, number) for row in study.rows]
    marks = [
        MISCOUNTED * is_miscounted(results, results.value(study, row, number), number)
        for row in study.rows
    ]
    return [
        significant(1 / ratio if inverse else ratio) + mark if ratio else NOTHING
        for ratio, mark in zip(ratios, marks, strict=True)
    ]
