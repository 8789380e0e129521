"""The paper: `results/paper/*.json` from records, then `paper/paper.pdf`, by Typst.

The text is `paper/**/*.typ` and holds no numbers. `variables.json` has each number by its name,
`tables.json` every study's table with the record behind each cell; `figures.json`, `claims.json`,
`coverage.json` and `costs.json` hold the rest. The same records and text give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...config.plan import Plan
from ...config.schema import Study
from ...utils.errors import HovitError, one_line
from ...utils.files import atomic, write_json
from ...utils.plural import plural
from ..claims.check import Verdict, check_all, counts
from ..claims.coverage import REASONS, coverage
from ..figures.common import seeds
from ..figures.draw import FIGURES, FOLDER
from ..order import NAMES, source_text
from ..results import Results
from ..sources import Sources, load_sources
from ..tables.columns import NOTHING, Column, Table, format_printed, make_table
from ..tables.facts import describe
from ..tables.write import table_notes
from .variables import Origin, by_scale, load_variables, origin, resolve

OUT = Path("results/paper")
TEXT = Path("paper/paper.typ")
PDF = Path("paper/paper.pdf")
FILES = ("variables", "tables", "figures", "claims", "coverage", "costs")
STAND_INS = "Models that stand in"  # a key of `describe`


def write_paper(plan: Plan, root: Path = Path()) -> None:
    """Write what the text reads, and compile it to `paper/paper.pdf`.

    Raises:
        HovitError: if a variable names something that config does not have, or the text names
            something that `paper/variables.yaml` does not have.
    """
    write_paper_from(load_sources(plan, root), root)


def write_paper_from(sources: Sources, root: Path = Path()) -> None:
    """As `write_paper`, from sources that are read already."""
    plan, verdicts = sources.plan, check_all(sources)
    costs = [line for results in by_scale(sources) for line in _costs(results)]
    rest = coverage(sources)
    tables = {study.id: paper_table(sources, study) for study in plan.config.studies.values()}
    named = {
        name: resolve(by_scale(sources), name, variable)
        for name, variable in load_variables(root).items()
    }
    clash = sorted(named.keys() & (facts := _facts(plan, verdicts, tables, costs, rest)).keys())
    if clash:
        raise HovitError(f"paper/variables.yaml: {clash[0]}: the name is taken")
    for name, value in {
        "variables": named | facts,
        "tables": tables,
        "figures": _figures(sources, root),
        "claims": {v.id: _claim(v) for v in verdicts},
        "coverage": {
            "reasons": REASONS,
            "not_checkable": [
                entry | {"from": source_text(entry["paper"], entry["place"])}
                for entry in rest["not_checkable"]
            ],
        },
        "costs": {"lines": costs},
    }.items():
        write_json(root / OUT / f"{name}.json", value)
    compile_text(root)


def compile_text(root: Path = Path()) -> None:
    """Compile `paper/paper.typ` with the fonts of Typst's wheel and a fixed timestamp.

    Raises:
        HovitError: with Typst's message, in one line.
    """
    import typst

    try:
        content = typst.compile(
            root / TEXT, root=root, format="pdf", font_paths=[], ignore_system_fonts=True,
            timestamp=0,
        )  # fmt: skip
    except RuntimeError as error:  # the base class of typst.TypstError
        said = str(getattr(error, "message", "") or one_line(error))
        said = said.removeprefix("panicked with: ").strip('"').replace("\n", " ")
        raise HovitError(f"{TEXT}: {said}") from None
    with atomic(root / PDF) as path:
        path.write_bytes(content)


def paper_table(sources: Sources, study: Study) -> dict[str, Any]:
    """A study's table for the paper, with the origin of each cell.

    It shows one measurement of each number: evidence if its scale is larger than this run's, and
    times of one device only. `results/tables/` shows all.
    """
    rank = sources.plan.scale.rank
    larger = tuple(each for each in sources.evidence if each.plan.scale.rank > rank)
    table = make_table(study, Sources(sources.run, larger))
    columns = _chosen(table)
    origins = [[_origins(study, column, i) for i in range(len(study.rows))] for column in columns]
    return {
        "title": study.title,
        "from": source_text(study.source.paper, study.source.place),
        "columns": [{"heading": c.heading, "source": _label(c)} for c in columns],
        "rows": [
            {"label": row.label, "ours": row.ours, "cells": [_cell(c, i) for c in columns]}
            for i, row in enumerate(study.rows)
        ],
        "facts": _about(table, columns),
        "notes": table_notes(study),
        "measured": any(map(_is_judged, columns)),
        "origins": [[[asdict(o) for o in cell] for cell in column] for column in origins],
        "sources": _grouped(study, columns, origins),
    }


def _chosen(table: Table) -> list[Column]:
    """Of columns that show the same number: evidence before this run, the first device only."""
    evidence = [column for column in table.columns if column.kind == "evidence"]
    device = next((_sources(column)[0] for column in evidence if _is_timed(column)), None)
    kept = [c for c in evidence if not _is_timed(c) or device in _sources(c)]
    better = {(c.number.metric.name, c.ratio, c.inverse) for c in kept}
    return [
        c
        for c in table.columns
        if c.kind == "reported"
        or any(c is each for each in kept)
        or (c.kind == "run" and (c.number.metric.name, c.ratio, c.inverse) not in better)
    ]


def _sources(column: Column) -> list[Results]:
    """The sources of a column's numbers, each once."""
    return list({id(results): results for results in column.results if results}.values())


def _is_judged(column: Column) -> bool:
    """Whether it holds trained or timed numbers, at a scale that checks such numbers."""
    metric = "latency" if column.number.is_timed else column.number.metric.recorded
    return any(metric in results.plan.scale.judges for results in _sources(column))


def _is_timed(column: Column) -> bool:
    """Whether it holds times, or a ratio between rows of one source."""
    return column.number.is_timed or column.ratio


def _cell(column: Column, i: int) -> str:
    mark = column.mark(i) if len(_sources(column)) > 1 else ""
    return column.cells[i] + (f" ({mark})" if mark else "")


def _label(column: Column) -> list[str]:
    """The lines under a column's heading: which source, and at which batch size."""
    if column.kind == "reported":
        return ["reported"]
    if not column.number.is_inexact and not column.number.is_counted:
        return ["by MACs"] if column.ratio else ["counted"]
    scales = list(dict.fromkeys(results.plan.scale.id for results in _sources(column)))
    label = " and ".join(scales)
    return [label, f"batch {column.number.batch}"] if column.number.batch else [label]


def _origins(study: Study, column: Column, i: int) -> list[Origin]:
    """The origin of a cell's number; for a ratio also that of its baseline."""
    row, results = study.rows[i], column.results[i]
    if column.cells[i] == NOTHING:
        return []
    rows = (row, study.row(row.baseline)) if column.ratio and row.baseline else (row,)
    if results is None:
        file = (f"config/studies/{study.id}.yaml",)
        metric = column.number.metric.name
        return [Origin(file, f"rows.{each.id}.reported.{metric}") for each in rows]
    found = []
    for each in rows:
        value = results.value(study, each, column.number)
        assert value is not None, (study.id, each.id, str(column.number))
        found.append(origin(results, study, each, column.number, value))
    return found


def _about(table: Table, columns: list[Column]) -> list[str]:
    """Short facts under a table: scale, images, device and n of each source, and its stand-ins.

    `results/tables/STUDY.md` has the full provenance.
    """
    study = table.study
    every = {id(results): results for column in columns for results in _sources(column)}
    marked = any(len(_sources(column)) > 1 for column in columns)
    letters = {id(results): letter for letter, results in table.evidence.items() if marked}
    facts: list[str] = []
    for key, results in every.items():
        mark = f"({letters[key]}) " if key in letters else ""
        facts.append(mark + "; ".join([results.where(study), *seeds(results, [study])]))
        if stand_ins := describe(results, study).get(STAND_INS):
            facts.append(f"{STAND_INS}: {stand_ins}".replace("`", ""))
    many = sum(len(results.problems_of(study)) for results in every.values())
    if many:
        facts.append(f"{plural(many, 'record')} not used, named in results/tables/{study.id}.md")
    facts += [f"{mark} {text}" for mark, text in table.footnotes.items()]
    return list(dict.fromkeys(facts))


def _grouped(
    study: Study, columns: list[Column], origins: list[list[list[Origin]]]
) -> list[dict[str, Any]]:
    """Lines of the appendix: columns whose cells come from the same records share a line."""
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


def _figures(sources: Sources, root: Path) -> dict[str, Any]:
    """Each figure's file and its caption; provenance is in the figure itself."""
    found = {}
    for name, figure in FIGURES.items():
        if not set(figure.studies) <= set(sources.plan.config.studies):
            continue
        path = FOLDER / f"{name}.pdf"
        found[name] = {
            "title": figure.title,
            "about": figure.about,
            "studies": list(figure.studies),
            "file": f"/{path}" if (root / path).exists() else "",
        }
    return found


def _claim(verdict: Verdict) -> dict[str, Any]:
    reported = verdict.reported and format_printed(verdict.reported)
    shown = {
        "measured": verdict.with_noise_and_n,
        "reported": reported,
        "label": verdict.label,
        "name": NAMES[verdict.paper],
    }
    return asdict(verdict) | shown | {"from": source_text(verdict.paper, verdict.place)}


def _costs(results: Results) -> list[dict[str, Any]]:
    """Time and memory of a source's records: training, measuring and analysing, by device."""
    plan = results.plan
    found = []
    for run in plan.all_runs:
        record = results.record(plan.train_task(run))
        found += [("training", record)] if record else []
    for study in plan.config.studies.values():
        measured = results.measured(study)
        found += [("measuring", measured)] if measured else []
    for analysis in plan.config.analyses.values():
        task = plan.analyse_task(analysis)
        analysed = results.record(task) if task else None
        found += [("analysing", analysed)] if analysed else []
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
    verdicts: Sequence[Verdict],
    tables: dict[str, Any],
    costs: list[dict[str, Any]],
    rest: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Variables that count over everything rather than name a cell."""
    claims = ("results/claims.json",)
    disputed = [v.verdict for v in verdicts if v.group == "paper" and v.is_disputed]
    numbers = {
        "claims": (sum(counts(verdicts).values()), claims),
        "own-checks": (sum(counts(verdicts, "own").values()), claims),
        "errata": (counts(verdicts, "errata")["erratum"], claims),
        "claims-disputed": (len(disputed), claims),
        "claims-contradicted-once": (disputed.count("contradicted"), claims),
        "not-checkable": (len(rest["not_checkable"]), claims),
        "reported-cells": (len(rest["cells"]), claims),
        "tables": (len(tables), ("config/studies",)),
        "cells": (sum(bool(c) for t in tables.values() for col in t["origins"] for c in col),
                  ("results/paper/tables.json",)),
        "records": (sum(line["records"] for line in costs), ("results/paper/costs.json",)),
        "hours": (sum(line["hours"] for line in costs), ("results/paper/costs.json",)),
    }  # fmt: skip
    for name, number in counts(verdicts).items():
        numbers[f"claims-{name.replace(' ', '-')}"] = (number, claims)
    return {
        name: {"text": f"{number:,.1f}" if name == "hours" else f"{number:,}", "value": number,
               "records": list(records), "field": "counted", "device": "", "n": "",
               "scale": plan.scale.id, "dataset": "", "where": "", "inexact": False, "of": name}
        for name, (number, records) in numbers.items()
    }  # fmt: skip
