"""A study's table: CSV for programs, Markdown for people, LaTeX (booktabs) for the paper."""

from pathlib import Path

import pandas as pd

from ...config.metrics import Quantity, quantity
from ...config.plan import Plan
from ...config.schema import Row, Study
from ...utils.files import write_text
from ..abbreviations import spelled_out
from ..order import PAPERS, in_order, paper_of
from ..results import PairedValue, Results, Value
from ..sources import Sources, is_miscounted, load_sources
from .columns import MISCOUNTED_NOTE, Table, make_table
from .facts import describe
from .latex import to_latex
from .view import view

TABLES = Path("results/tables")
# Facts of this run that each line of the CSV repeats.
IN_CSV = ("Scale", "Data", "Trained on", "Seeds", "Latency", "Commit")


def write_table(plan: Plan, study: Study, root: Path = Path()) -> None:
    """Write `results/tables/STUDY.csv`, `.md` and `.tex`.

    The table names a record that cannot be used, and leaves it out.

    Raises:
        HovitError: if latencies come from two devices.
    """
    write_table_from(load_sources(plan, root), study, root)


def write_table_from(sources: Sources, study: Study, root: Path = Path()) -> None:
    """As `write_table`, from sources that are read already."""
    table = make_table(study, sources)
    facts = table_facts(sources, table)
    stem = root / TABLES / study.id
    write_text(stem.with_suffix(".csv"), to_csv(sources, table, facts))
    write_text(stem.with_suffix(".md"), to_markdown(sources, table))
    write_text(stem.with_suffix(".tex"), to_latex(table, facts))


def table_facts(sources: Sources, table: Table) -> dict[str, str]:
    """Facts about this run, about committed results by letter, and unused records."""
    facts = describe(sources.run, table.study)
    for letter, results in table.evidence.items():
        told = "; ".join(
            f"{key.lower()}: {text}" for key, text in describe(results, table.study).items()
        )
        facts[f"Committed results {letter}"] = f"{told}; records: `{results.folder}`"
    if problems := _problems(sources, table.study):
        facts["Not used"] = problems
    return facts | table.footnotes


def _problems(sources: Sources, study: Study) -> str:
    return "; ".join(p for results in sources.all for p in results.problems_of(study))


def to_csv(sources: Sources, table: Table, facts: dict[str, str]) -> str:
    """One line for each row with plain numbers: reported, value, spread and n of every metric.

    All are in the unit of the metric's heading. Columns of evidence start with `evidence_`; those
    of times also name the device, because a table may have evidence from several devices. A count
    is from any source; the column `METRIC_from` names its record.
    """
    study = table.study
    numbers = {name: number for name in study.columns if (number := quantity(name))}
    best = {n: sources.best(study, number) for n, number in numbers.items() if number.is_trained}
    lines = []
    for i, row in enumerate(study.rows):
        runs = sources.plan.runs_of(study, row)
        line: dict[str, object] = {
            "row": row.id,
            "label": row.label,
            "model": row.model or "",
            "run": runs[0].id if runs else "",
            "ours": row.ours,
            "weights": sources.run.weights_from(study, row),
        }
        for name, number in numbers.items():
            line[f"{name}_reported"] = row.reported.get(name, "")
            if not number.is_inexact:
                line |= _count(sources, study, row, number)
                continue
            if number.is_timed:
                line |= _evidence_times(sources, study, row, number)
            else:
                line |= _evidence_accuracy(best[name][i], study, row, number)
            line |= _numbers(sources.run, study, row, number, "")
        line |= {name.lower().replace(" ", "_"): facts.get(name, "") for name in IN_CSV}
        line["evidence"] = "; ".join(str(results.folder) for results in table.evidence.values())
        lines.append(line)
    return pd.DataFrame(lines, dtype=object).to_csv(index=False)  # integers stay integers


def _count(sources: Sources, study: Study, row: Row, number: Quantity) -> dict[str, object]:
    """A count of a row, and the path of its record."""
    cell = sources.count(study, row, number)
    if cell is None:
        return {str(number): "", f"{number}_from": ""}
    results, value = cell
    whole = number.metric.unit == 1 and value.mean == int(value.mean)
    count = int(value.mean) if whole else _in_unit(value.mean, number)
    note = f" ({MISCOUNTED_NOTE.lower()})" * is_miscounted(results, value, number)
    paths = "; ".join(map(str, value.paths))
    return {str(number): count, f"{number}_from": paths + note}


def _in_unit(mean: float, number: Quantity) -> float:
    """A number in the unit of its metric's heading, without digits that the factor adds."""
    return mean if number.metric.unit == 1 else float(f"{mean * number.metric.unit:.12g}")


def _evidence_times(
    sources: Sources, study: Study, row: Row, number: Quantity
) -> dict[str, object]:
    """The times of every device."""
    found: dict[str, object] = {}
    for results in sources.timed(study):
        found |= _numbers(results, study, row, number, f"evidence_{results.base.name}_")
    return found


def _evidence_accuracy(
    best: tuple[Results, Value] | None, study: Study, row: Row, number: Quantity
) -> dict[str, object]:
    """The chosen evidence for an accuracy or a loss, with its folder."""
    if best is None:
        return {f"evidence_{number}": "", f"evidence_{number}_from": ""}
    numbers = _numbers(best[0], study, row, number, "evidence_")
    return numbers | {f"evidence_{number}_from": str(best[0].folder)}


def _numbers(
    results: Results, study: Study, row: Row, number: Quantity, before: str
) -> dict[str, object]:
    """A number with its spread and n; latency for each batch size, eager and captured."""
    found: dict[str, object] = {}
    timed = [*results.batches(study), *results.captured(study)]
    for each in timed if number.metric.name == "latency" else [number]:
        value = results.value(study, row, each)
        found[f"{before}{each}"] = value and value.mean
        if value and value.n > 1:
            spread = "iqr" if number.is_timed else "sd"
            found |= {f"{before}{each}_{spread}": value.spread, f"{before}{each}_n": value.n}
        if value and number.metric.derived_from:
            low, high = value.interval
            if not isinstance(value, PairedValue):  # a percentage
                low, high = max(low, 0.0), min(high, 100.0)
            found |= {f"{before}{each}_low": low, f"{before}{each}_high": high}
        if isinstance(value, PairedValue):
            counts = {"better": value.better, "worse": value.worse, "p": value.p}
            found |= {f"{before}{each}_{name}": count for name, count in counts.items()}
    return found


def to_markdown(sources: Sources, table: Table) -> str:
    """The tables of at most 100 characters a line, then notes and full provenance."""
    study = table.study
    notes = [f"- {note}" for note in table_notes(study)]
    if any(row.ours for row in study.rows):
        notes.append("- † added here: the paper has no such row.")
    notes += _baselines(study)
    notes.append(f"- All columns and digits: [{study.id}.csv]({study.id}.csv).")
    place = study.source.place.removeprefix("paper, ")
    source = f"Source: {PAPERS[study.source.paper]}, {place}."
    lines = [f"# {study.title}", "", source, "", *view(sources, study), *notes, ""]
    return "\n".join([*lines, "## Provenance", "", *_provenance(sources, table), ""])


def _baselines(study: Study) -> list[str]:
    """A note that names the baseline of each row; none without baselines."""
    rows: dict[str, list[str]] = {}
    for row in study.rows:
        if row.baseline:
            rows.setdefault(study.row(row.baseline).label, []).append(row.label)
    if not rows:
        return []
    first, *others = rows
    return [
        f"- × is the ratio to {first}{', with these exceptions:' if others else '.'}",
        *(f"  - to {base} for {'; '.join(rows[base])}." for base in others),
    ]


def _provenance(sources: Sources, table: Table) -> list[str]:
    """The facts of each source of numbers, one line for each fact."""
    study, run = table.study, sources.run
    told = {f"Committed results {key}": results for key, results in table.evidence.items()}
    if study.kind == "data" or _has_records(run, study):
        told = {"This run": run} | told
    lines = []
    for name, results in told.items():
        lines.append(f"- **{name}**" + f": `{results.folder}`" * results.is_evidence)
        lines += [f"  - {key}: {text}" for key, text in describe(results, study).items()]
    if "This run" not in told:
        lines.append(f"- **This run** (scale `{run.plan.scale.id}`): no records of this table")
    if problems := _problems(sources, study):
        lines.append(f"- **Not used**: {problems}")
    return lines


def _has_records(results: Results, study: Study) -> bool:
    if results.measured(study) or results.evaluated(study):
        return True
    return any(results.trained(study, row) for row in study.rows)


def table_notes(study: Study) -> list[str]:
    """Notes of the study, then of its rows, then what the abbreviations in its labels mean."""
    of_rows = [f"{row.label}: {row.note}" for row in study.rows if row.note]
    meanings = spelled_out(row.label for row in study.rows)
    return [*study.notes, *of_rows, *([f"{meanings}."] if meanings else [])]


def write_index(plan: Plan, root: Path = Path()) -> None:
    """Write `results/tables/index.md`: every table by paper and story, with files and figures."""
    from ..figures.draw import FIGURES

    lines = ["# Tables", "", f"This run: scale `{plan.scale.id}` ({plan.scale.title}).", ""]
    paper = ""
    for study in in_order(plan.config.studies.values()):
        if paper_of(study) != paper:
            paper = paper_of(study)
            lines += ["", f"## {PAPERS[paper]}", ""]
        files = " ".join(f"[{ext}]({study.id}.{ext})" for ext in ("csv", "tex"))
        figures = [
            f"[{name}](../../figures/{name}.png)"
            for name, figure in FIGURES.items()
            if study.id in figure.studies
        ]
        shown = f"; figures: {', '.join(figures)}" if figures else ""
        place = f"{study.source.place} ({files}{shown})"
        lines += [f"- [{study.title}]({study.id}.md) `{study.id}`", f"  {place}"]
    lines += [
        "",
        "The claims of the papers, checked by these records: [claims.md](../claims.md).",
        "",
    ]
    write_text(root / TABLES / "index.md", "\n".join(lines))
