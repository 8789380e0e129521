"""The paper: `results/paper/*.json` from records, and from them `paper/paper.pdf`, by Typst.

The text is `paper/**/*.typ`. It holds no number: `variables.json` has each by its name,
`tables.json` every study's table with the record behind each cell, `figures.json`, `claims.json`,
`ledger.json` and `costs.json` the rest. The same records and text give the same bytes.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...config.plan import Plan
from ...config.schema import Study
from ...utils.errors import HovitError, one_line
from ...utils.files import atomic, write_json
from ..claims.coverage import REASONS, ledger
from ..claims.judge import VERDICTS, Verdict, judge_all, say
from ..figures.attention_figures import seeds
from ..figures.draw import FIGURES, FOLDER, _best
from ..results import COUNTED, INEXACT, TRAINED, Results, evidence_for, find_evidence, plural
from ..tables.columns import NOTHING, Column, columns_of
from ..tables.write import describe
from .variables import Origin, load_variables, origin, resolve, sources_of

OUT = Path("results/paper")
TEXT = Path("paper/paper.typ")
PDF = Path("paper/paper.pdf")
FILES = ("variables", "tables", "figures", "claims", "ledger", "costs")
OF_TRAINING = {"Data", "Images", "Trained on", "Recipe", "Seeds", "Pretrained weights from"}
OF_TIMING = {"Latency", "Throughput"}


def write_paper(plan: Plan, root: Path = Path()) -> None:
    """Write what the text reads, and compile it to `paper/paper.pdf`.

    Raises:
        HovitError: if a variable names what the config does not have, or the text what
            `paper/variables.yaml` does not.
    """
    verdicts = judge_all(plan, root)
    sources = sources_of(plan, root)
    costs = [line for results in sources for line in _costs(results)]
    rest = ledger(plan, root)
    tables = {study.id: table(plan, study, root) for study in plan.config.studies.values()}
    named = {name: resolve(sources, name, v) for name, v in load_variables(root).items()}
    clash = sorted(named.keys() & (facts := _facts(plan, verdicts, tables, costs, rest)).keys())
    if clash:
        raise HovitError(f"paper/variables.yaml: {clash[0]}: the name is taken")
    for name, value in {
        "variables": named | facts,
        "tables": tables,
        "figures": _figures(plan, root),
        "claims": {v.id: _claim(v) for v in verdicts},
        "ledger": {"reasons": REASONS, "not_checkable": rest["not_checkable"]},
        "costs": {"lines": costs},
    }.items():
        write_json(root / OUT / f"{name}.json", value)
    compile_text(root)


def compile_text(root: Path = Path()) -> None:
    """Compile `paper/paper.typ` with the fonts of Typst's wheel, at no time of day.

    Raises:
        HovitError: with what Typst says is wrong, in one line.
    """
    import typst

    try:
        content = typst.compile(
            root / TEXT, root=root, format="pdf", font_paths=[], ignore_system_fonts=True,
            timestamp=0,
        )  # fmt: skip
    except RuntimeError as error:  # typst.TypstError is one
        said = str(getattr(error, "message", "") or one_line(error))
        said = said.removeprefix("panicked with: ").strip('"').replace("\n", " ")
        raise HovitError(f"{TEXT}: {said}") from None
    with atomic(root / PDF) as path:
        path.write_bytes(content)


def table(plan: Plan, study: Study, root: Path = Path()) -> dict[str, Any]:
    """A study's table for the page, and where each cell comes from.

    Of each metric it has what was reported and one measurement: the larger scale's, where evidence
    has it (`results/tables/` shows all).
    """
    this = Results(plan, root)
    evidence = evidence_for(study, find_evidence(plan, root))
    larger = evidence and evidence.plan.scale.rank > plan.scale.rank
    sources = [evidence, this] if evidence and larger else [this]
    columns = _chosen(columns_of(study, sources), sources)
    origins = [[_origins(study, column, i) for i in range(len(study.rows))] for column in columns]
    return {
        "title": study.title,
        "seed": study.source.seed,
        "place": study.source.place,
        "columns": [{"heading": c.heading, "source": _label(c)} for c in columns],
        "rows": [
            {"label": row.label, "ours": row.ours, "cells": [c.cells[i] for c in columns]}
            for i, row in enumerate(study.rows)
        ],
        "facts": _about(sources, study, columns),
        "notes": [*study.notes, *(f"{row.label}: {row.note}" for row in study.rows if row.note)],
        "measured": any(map(_judged, columns)),
        "origins": [[[asdict(o) for o in cell] for cell in column] for column in origins],
        "sources": _grouped(study, columns, origins),
    }


def _judged(column: Column) -> bool:
    """Whether it holds what is trained or timed, at a scale that judges such numbers."""
    metric = "latency" if _timed(column) else column.metric
    return column.results is not None and metric in column.results.plan.scale.judges


def _timed(column: Column) -> bool:
    return column.metric.startswith("latency") or column.metric == "throughput"


def _chosen(columns: list[Column], sources: list[Results]) -> list[Column]:
    """Of columns that say the same at two scales, the first source's."""
    best = {(c.metric, c.ratio) for c in columns if c.results is sources[0]}
    return [
        column
        for column in columns
        if column.results is None
        or column.results is sources[0]
        or (column.metric, column.ratio) not in best
    ]


def _label(column: Column) -> list[str]:
    """What stands under a column's heading, a line each: whose, and at which batch."""
    if column.results is None:
        return ["reported"]
    timed = column.metric.startswith("latency_")
    if not timed and column.metric not in INEXACT | COUNTED:
        return ["by MACs"] if column.ratio else ["counted"]
    scale = column.results.plan.scale.id
    return [scale, f"batch {column.metric.removeprefix('latency_')}"] if timed else [scale]


def _origins(study: Study, column: Column, i: int) -> list[Origin]:
    """Of a cell: its number's, and for a ratio its baseline's too; none for an empty cell."""
    row = study.rows[i]
    if column.cells[i] == NOTHING:
        return []
    rows = (row, study.row(row.baseline)) if column.ratio and row.baseline else (row,)
    if column.results is None:
        file = (f"config/studies/{study.id}.yaml",)
        return [Origin(file, f"rows.{each.id}.reported.{column.metric}") for each in rows]
    found = []
    for each in rows:
        value = column.results.value(study, each, column.metric)
        assert value is not None, (study.id, each.id, column.metric)
        found.append(origin(column.results, study, each, column.metric, value))
    return found


def _about(sources: list[Results], study: Study, columns: list[Column]) -> list[dict[str, str]]:
    """What stands under a table of where its columns come from; what two say alike stands once."""
    facts: dict[tuple[str, str], None] = {}
    for results in sources:
        own = [column for column in columns if column.results is results]
        metrics, timed = {column.metric for column in own}, any(map(_timed, own))
        trained = bool(metrics & TRAINED)
        drop = {"Commit"} | (set() if trained else OF_TRAINING) | (set() if timed else OF_TIMING)
        if not (trained or timed or metrics & COUNTED):
            drop.add("Scale")
        told = {k: text.replace("`", "") for k, text in describe(results, study).items()}
        facts |= dict.fromkeys((name, told[name]) for name in told if name not in drop)
    if many := sum(len(results.problems) for results in sources):
        facts[("Not used", f"{plural(many, 'record')}, named in results/tables/{study.id}.md")] = (
            None
        )
    return [{"name": name, "text": text} for name, text in facts]


def _grouped(
    study: Study, columns: list[Column], origins: list[list[list[Origin]]]
) -> list[dict[str, Any]]:
    """The appendix's lines: columns whose cells come from the same records stand together."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for column, cells in zip(columns, origins, strict=True):
        paths = tuple(tuple(sorted({p for o in cell for p in o.records})) for cell in cells)
        fields = {
            o.field.replace(f".{row.id}.", ".ROW.")
            for row, cell in zip(study.rows, cells, strict=True)
            for o in cell[:1]
        }
        name = f"{column.heading} ({', '.join(_label(column))}): {', '.join(sorted(fields))}"
        groups.setdefault(paths, []).append(name)
    lines = []
    for paths, names in groups.items():
        rows: dict[tuple[str, ...], list[str]] = {}
        for row, each in zip(study.rows, paths, strict=True):
            if each:
                rows.setdefault(each, []).append(row.label)
        filled = sum(map(bool, paths))
        records = [
            {"rows": "" if len(labels) == filled else ", ".join(labels), "records": list(each)}
            for each, labels in rows.items()
        ]
        lines.append({"columns": names, "records": records})
    return lines


def _figures(plan: Plan, root: Path) -> dict[str, Any]:
    """Each figure's file, and its caption: what it shows, and of what."""
    found = {}
    for name, figure in FIGURES.items():
        if not set(figure.studies) <= set(plan.config.studies):
            continue
        results = _best(plan, figure, root)
        studies = [plan.study(study) for study in figure.studies]
        facts = list(dict.fromkeys(results.where(study) for study in studies))
        facts += seeds(results, studies)
        path = FOLDER / f"{name}.pdf"
        found[name] = {
            "title": figure.title,
            "about": re.sub(r"\s+", " ", figure.draw.__doc__ or "").strip(),
            "facts": facts,
            "studies": list(figure.studies),
            "file": f"/{path}" if (root / path).exists() else "",
        }
    return found


def _claim(verdict: Verdict) -> dict[str, Any]:
    measured = "" if verdict.measured is None else say(verdict.measured)
    return asdict(replace(verdict, measured=None)) | {"measured": measured}


def _costs(results: Results) -> list[dict[str, Any]]:
    """What a scale's records took: by device, the runs trained and the measurements."""
    plan = results.plan
    found = []
    for run in plan.all_runs:
        record = results.record(plan.train_task(run))
        found += [("training", record)] if record else []
    for study in plan.config.studies.values():
        measured = results.measured(study)
        found += [("measuring", measured)] if measured else []
    lines: dict[tuple[str, str], list[Any]] = {}
    for what, record in found:
        lines.setdefault((what, str(record.provenance.device)), []).append(record)
    costs = []
    for (what, device), records in sorted(lines.items()):
        numbers = {
            "hours": sum(r.provenance.seconds for r in records) / 3600,
            "longest": max(r.provenance.seconds for r in records) / 60,
            "memory": max(r.provenance.peak_memory_mb for r in records) / 1000,
        }
        shown = {key: f"{number:,.1f}" for key, number in numbers.items()}
        costs.append({"scale": plan.scale.id, "what": what, "device": device,
                      "records": len(records), "shown": shown, **numbers})  # fmt: skip
    return costs


def _facts(
    plan: Plan,
    verdicts: list[Verdict],
    tables: dict[str, Any],
    costs: list[dict[str, Any]],
    rest: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The variables that are counted over everything, and not in one cell."""
    claims = ("results/claims.json",)
    numbers = {
        "claims": (len(verdicts), claims),
        "not-checkable": (len(rest["not_checkable"]), claims),
        "reported-cells": (len(rest["cells"]), claims),
        "tables": (len(tables), ("config/studies",)),
        "cells": (sum(bool(c) for t in tables.values() for col in t["origins"] for c in col),
                  ("results/paper/tables.json",)),
        "records": (sum(line["records"] for line in costs), ("results/paper/costs.json",)),
        "hours": (sum(line["hours"] for line in costs), ("results/paper/costs.json",)),
    }  # fmt: skip
    for name in VERDICTS:
        key = f"claims-{name.replace(' ', '-')}"
        numbers[key] = (sum(v.verdict == name for v in verdicts), claims)
    return {
        name: {"text": f"{number:,.1f}" if name == "hours" else f"{number:,}", "value": number,
               "records": list(records), "field": "counted", "device": "", "n": "",
               "scale": plan.scale.id, "dataset": "", "where": "", "inexact": False, "of": name}
        for name, (number, records) in numbers.items()
    }  # fmt: skip
