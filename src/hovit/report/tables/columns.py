"""A table's columns: what is reported, evidence and this run's, cell by cell, as text."""

from dataclasses import dataclass

from ...config.schema import Row, Study
from ..results import INEXACT, Results, Value

NOTHING = "—"

# Metric -> (heading, decimals)
HEADINGS = {
    "parameters": ("Parameters", 0),
    "parameters_m": ("Parameters, M", 1),
    "parameters_unused": ("Unused", 0),
    "part_parameters": ("Of the part", 0),
    "macs": ("MACs, G", 3),
    "activations": ("Kept for backward, MB", 2),
    "top1": ("Top-1, %", 2),
    "loss": ("Loss", 4),
    "val_top1": ("Val top-1, %", 2),
    "ap": ("AP", 1),
    "ap50": ("AP50", 1),
    "ap75": ("AP75", 1),
    "ap_small": ("AP small", 1),
    "ap_medium": ("AP medium", 1),
    "ap_large": ("AP large", 1),
    "latency": ("Latency, ms", 2),
    "throughput": ("Images/s", 1),
    "throughput_cpu": ("Images/s, CPU", 1),
    "ratio": ("× baseline", 2),
    "images": ("Images", 0),
    "images_train": ("Training", 0),
    "images_val": ("Validation", 0),
    "images_test": ("Test", 0),
    "gigabytes": ("GB", 3),
}


SCALES = {
    "parameters_m": 1e-6,
    "macs": 1e-9,
    "activations": 1e-6,
}  # from a record's unit to the heading's


@dataclass(frozen=True)
class Column:
    """One column: a heading, what is under it (`reported`, `this run` …), and each row's cell.

    Args:
        metric: what `Results.value` calls it.
        results: whose; None for what the seed reported.
        ratio: over the row's baseline.
    """

    heading: str
    source: str
    cells: tuple[str, ...]
    metric: str
    results: Results | None = None
    ratio: bool = False


def format_value(value: Value, metric: str) -> str:
    """A value as a table shows it: mean, and ± spread where there are several seeds."""
    scale, decimals = SCALES.get(metric, 1.0), HEADINGS[metric][1]
    if metric == "gigabytes":
        return f"{value.mean:.3g}"
    text = f"{value.mean * scale:,.{decimals}f}"
    several = value.spread and metric not in ("latency", "throughput")
    return f"{text} ± {value.spread:.{decimals}f}" if several else text


def format_printed(printed: str) -> str:
    """A number as the seed prints it, with thousands set apart and its own decimals."""
    if "–" in printed or "." in printed:
        return printed
    return f"{int(printed):,}"


def columns_of(study: Study, sources: list[Results]) -> list[Column]:
    """The table's columns after the first, left to right; what nobody has is left out.

    Args:
        study: the table.
        sources: this run, and before it the evidence if there is any.
    """
    columns = []
    for metric in study.columns:
        heading = HEADINGS[metric][0]
        printed = [row.reported.get(metric) for row in study.rows]
        cells = tuple(format_printed(p) if p else NOTHING for p in printed)
        columns.append(Column(heading, "reported", cells, metric))
        if metric == "latency":
            columns += _latency_columns(study, sources)
            continue
        # What is exact is the same everywhere: this run's count stands for all.
        for results in sources if metric in INEXACT else sources[-1:]:
            values = [results.value(study, row, metric) for row in study.rows]
            cells = tuple(format_value(v, metric) if v else NOTHING for v in values)
            columns.append(Column(heading, results.states(), cells, metric, results))
        if metric == "throughput":
            columns += _speedup_columns(study, sources)
    return [column for column in columns if set(column.cells) != {NOTHING}]


def _latency_columns(study: Study, sources: list[Results]) -> list[Column]:
    columns = []
    for results in sources:
        results.latency_device(study)  # refuses two devices
        for metric in results.batches(study):
            values = [results.value(study, row, metric) for row in study.rows]
            cells = tuple(format_value(v, "latency") if v else NOTHING for v in values)
            source = _batch_of(results, metric)
            columns.append(Column(HEADINGS["latency"][0], source, cells, metric, results))
    ratios: list[tuple[Results | None, str, str]] = [(None, "latency", "reported")]
    ratios += [(r, metric, _batch_of(r, metric)) for r in sources for metric in r.batches(study)]
    for whose, metric, source in ratios:
        name = metric if whose else f"reported_{metric}"
        found = [baseline_ratio(whose or sources[-1], study, row, name) for row in study.rows]
        cells = tuple(f"{ratio:.2f}" if ratio else NOTHING for ratio in found)
        columns.append(Column(HEADINGS["ratio"][0], source, cells, metric, whose, ratio=True))
    return columns


def _speedup_columns(study: Study, sources: list[Results]) -> list[Column]:
    """Throughput over the baseline's: as reported, as multiply-adds imply, and as measured."""
    reported = [
        baseline_ratio(sources[-1], study, row, "reported_throughput") for row in study.rows
    ]
    found: list[tuple[str, list[float | None], str, Results | None]] = []
    found.append(("reported", reported, "throughput", None))
    for results in sources:
        macs = [baseline_ratio(results, study, row, "macs") for row in study.rows]
        implied = [1 / ratio if ratio else None for ratio in macs]
        measured = [baseline_ratio(results, study, row, "throughput") for row in study.rows]
        states = results.states()
        found.append((f"{states}, implied by MACs", implied, "macs", results))
        found.append((states, measured, "throughput", results))
    columns = []
    for source, ratios, metric, whose in found:
        cells = tuple(f"{r:.3f}" if r else NOTHING for r in ratios)
        columns.append(Column(HEADINGS["ratio"][0], source, cells, metric, whose, ratio=True))
    return columns


def _batch_of(results: Results, metric: str) -> str:
    batch = f"batch {metric.removeprefix('latency_')}"
    return f"{results.states()}, {batch}" if results.is_evidence else batch


def baseline_ratio(results: Results, study: Study, row: Row, metric: str) -> float | None:
    """A row's value over its baseline row's; None where either is missing."""
    if row.baseline is None:
        return None
    own = results.value(study, row, metric)
    base = results.value(study, study.row(row.baseline), metric)
    return own.mean / base.mean if own and base else None
