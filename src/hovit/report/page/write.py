"""`hovit page`: one self-contained web page of all claims, tables, curves and records.

It reads records only, loads nothing from anywhere, and the same records give the same bytes. The
parts lie under `web/`: Jinja2's template, the style, and the script that sorts, filters and draws.
"""

import base64
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...config.plan import Plan
from ...config.runs import RUNS
from ...config.schema import Row, Study
from ...records.record import Record, read_record
from ...utils.code_hash import code_hash
from ...utils.errors import HovitError
from ...utils.files import digest, file_digest, write_text
from ..claims.coverage import REASONS, ledger, ledger_tally
from ..claims.judge import VERDICTS, Verdict, judge_all, say, tally
from ..explain import remake_command
from ..results import COUNTED, TRAINED, Results, Value, evidence_for, find_evidence
from ..tables.columns import HEADINGS, NOTHING, SCALES, Column, columns_of, format_printed
from ..tables.write import describe

PAGE = Path("results/index.html")
WEB = Path(__file__).parent / "web"
SCRIPTS = ("tables.js", "detail.js", "charts.js", "curves.js", "analyses.js")
SYMBOLS = dict(zip(VERDICTS, "✓✗≈–", strict=True))


def page_code() -> str:
    """sha256, in hex, of all that decides how the page looks."""
    files = [Path(__file__), *sorted(WEB.iterdir())]
    return digest([code_hash("report"), *(file_digest(path) for path in files if path.is_file())])


def write_page(plan: Plan, root: Path = Path()) -> None:
    """Write `results/index.html`.

    A record that cannot be used is named on the page and left out; a table that is refused says so.
    """
    write_text(root / PAGE, render(Content(plan, root).collect()))


def render(content: dict[str, Any]) -> str:
    """The page, from what `Content.collect` gives."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    style = (WEB / "page.css").read_text(encoding="utf-8")
    script = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("page.html").render(
        content,
        style=Markup(style),
        script=Markup(script),
        data=Markup(_embedded(content["data"])),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def _code(text: str) -> str:
    """Escaped, with what stands in backticks as `<code>`."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _embedded(data: dict[str, Any]) -> str:
    """JSON that no string in it can end the script element with."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _csp_hash(text: str) -> str:
    """As a Content-Security-Policy names an inline element that may stand."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def state_of(results: Results | None) -> str:
    """`reported`, `evidence` or `run`: whose a number is."""
    return "reported" if results is None else "evidence" if results.is_evidence else "run"


@dataclass
class Content:
    """Everything that the page shows, collected from a plan and the records of it.

    Args:
        plan: the config at this run's scale.
        root: top of the artifact.
    """

    plan: Plan
    root: Path = Path()
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = Results(self.plan, self.root)
        self.evidence = find_evidence(self.plan, self.root)

    def collect(self) -> dict[str, Any]:
        """What the template needs; its `data` is what the script reads."""
        studies = [self._study(study) for study in self.plan.config.studies.values()]
        verdicts = judge_all(self.plan, self.root)
        claims = [self._claim(verdict) for verdict in verdicts]
        analyses = self._analyses()
        rest = ledger(self.plan, self.root)
        problems = [p for results in (self.run, *self.evidence) for p in results.problems]
        data = {
            "scale": self.plan.scale.id,
            "values": self.values,
            "records": dict(sorted(self.records.items())),
            "studies": {s["id"]: {k: s[k] for k in ("title", "rows", "place", "scope", "contexts")}
                        for s in studies},
            "metrics": _metrics(),
            "claims": {claim["id"]: claim for claim in claims},
            "symbols": SYMBOLS,
        }  # fmt: skip
        return {
            "scale": self.plan.scale,
            "tally": tally(verdicts),
            "counts": {name: sum(v.verdict == name for v in verdicts) for name in VERDICTS},
            "symbols": SYMBOLS,
            "seeds": sorted({verdict.seed for verdict in verdicts}),
            "claims": claims,
            "not_checkable": rest["not_checkable"],
            "reasons": REASONS,
            "rest": ledger_tally(rest),
            "studies": studies,
            "analyses": analyses,
            "records": data["records"],
            "problems": list(dict.fromkeys(problems)),
            "nothing": NOTHING,
            "data": data,
        }

    def _claim(self, verdict: Verdict) -> dict[str, Any]:
        file, claim = next(
            (file, c) for file in self.plan.config.claims.values() for c in file.claims
            if c.id == verdict.id
        )  # fmt: skip
        for path in verdict.records:
            self._keep(Path(path))
        measured = "" if verdict.measured is None else say(verdict.measured)
        parts = {"kind": claim.kind, "of": claim.of, "to": claim.to, "tolerance": claim.tolerance}
        reported = verdict.reported and format_printed(verdict.reported)
        shown = {"reported": reported, "measured": measured, "records": list(verdict.records),
                 "file": file.id}  # fmt: skip
        return asdict(verdict) | parts | shown

    def _study(self, study: Study) -> dict[str, Any]:
        best = evidence_for(study, self.evidence)
        sources = [best, self.run] if best else [self.run]
        try:
            columns, refused = columns_of(study, sources), ""
        except HovitError as error:
            columns, refused = [], str(error)
        rows = [
            self._row(study, row) | {"cells": [self._cell(study, row, i, c) for c in columns]}
            for i, row in enumerate(study.rows)
        ]
        facts = {} if refused else {state_of(r): describe(r, study) for r in sources}
        return {
            "id": study.id,
            "title": study.title,
            "place": f"{study.source.seed}: {study.source.place}",
            "trained": study.trained and study.kind == "models",
            "scope": _scope(study),
            "refused": refused,
            "columns": [{"heading": c.heading, "source": c.source, "state": state_of(c.results)}
                        for c in columns],
            "rows": rows,
            "facts": facts,
            "contexts": {state_of(r): self._context(r, study) for r in sources},
            "notes": [*study.notes, *(f"{r.label}: {r.note}" for r in study.rows if r.note)],
        }  # fmt: skip

    def _context(self, results: Results, study: Study) -> dict[str, Any]:
        """What a study's numbers from one source share: scale, images, where their runs lie."""
        plan = results.plan
        data, runs = {}, {}
        for row in study.rows:
            if found := plan.runs_of(study, row):
                images = found[0].dataset
                stands = f" (stands in for {images.stands_for})" if images.stands_for else ""
                data[row.id] = f"{images.title}{stands}, {found[0].image_size} px"
            if trained := results.trained(study, row):
                runs[row.id] = [self._keep(results.place(run.folder / "record.json"))
                                for run, _ in trained]  # fmt: skip
        if not study.trained and (evaluated := results.evaluated(study)):
            seen = evaluated.provenance.dataset or {}
            what = f"ImageNet-1k, validation: {seen['images']:,} images"
            data = dict.fromkeys(evaluated.results["rows"], what)
        scale = f"{plan.scale.id}: {plan.scale.title}"
        return {"scale": scale, "states": results.states(), "data": data, "runs": runs}

    def _row(self, study: Study, row: Row) -> dict[str, Any]:
        """What a row is; `system` is the same for the same model, wherever it stands."""
        return {
            "id": row.id,
            "label": row.label,
            "ours": row.ours,
            "model": row.model or "",
            "args": row.model_args,
            "system": digest([row.model, row.model_args, row.pretrained])[:12],
            "task": self._seeds_images(row.dataset or study.dataset)
            if study.trained
            else "ImageNet-1k",
            "base": any(other.baseline == row.id for other in study.rows),
        }

    def _seeds_images(self, role: str) -> str:
        """What the seed itself used: the largest scale's images, or what they stand for."""
        scales = sorted(self.plan.config.scales.values(), key=lambda s: s.rank, reverse=True)
        for scale in scales:
            if role in scale.datasets:
                images = self.plan.config.datasets[scale.datasets[role]]
                return images.stands_for or images.title
        return role

    def _cell(self, study: Study, row: Row, at: int, column: Column) -> dict[str, str]:
        """A cell's text, and the key of its number among `values`; none for what is not there."""
        text = column.cells[at]
        if text == NOTHING:
            return {"text": text, "key": ""}
        name = column.metric + ":ratio" * column.ratio
        state = state_of(column.results)
        key = f"{study.id}/{row.id}/{name}/{state}"
        value: dict[str, Any] = {"text": text, "number": _number(text)}
        if column.ratio:
            value["of"] = [f"{study.id}/{each}/{column.metric}/{state}"
                           for each in (row.id, row.baseline)]  # fmt: skip
            value["inverse"] = column.metric == "macs"
        found = column.results.value(study, row, column.metric) if column.results else None
        if found and not column.ratio:
            value |= _spread(found, column.metric)
        if column.results:
            value["records"] = self._sources(column.results, study, row, column)
        self.values[key] = value
        return {"text": text, "key": key}

    def _sources(self, results: Results, study: Study, row: Row, column: Column) -> list[str]:
        """The records behind a number; of a ratio, the baseline's too."""
        rows = [row, study.row(row.baseline)] if column.ratio and row.baseline else [row]
        values = [results.value(study, each, column.metric) for each in rows]
        paths = dict.fromkeys(path for value in values if value for path in value.paths)
        return [self._keep(path) for path in paths]

    def _keep(self, path: Path) -> str:
        """Take a record onto the page; its name there."""
        name = path.as_posix()
        if name not in self.records:
            if path.name == "pack.json":
                command = remake_command(self.plan, name)
                self.records[name] = {"kind": "pack", "id": path.parent.name, "remake": command}
            else:
                self.records[name] = self._record(path)
        return name

    def _record(self, path: Path) -> dict[str, Any]:
        record = read_record(self.root / path)
        whose = next(r for r in (self.run, *self.evidence) if path.is_relative_to(r.base)
                     and r.plan.scale.id == record.scale)  # fmt: skip
        planned = RUNS / path.relative_to(whose.base)
        made = record.provenance
        return {
            "kind": record.kind,
            "id": record.id,
            "scale": record.scale,
            "state": state_of(whose),
            "commit": made.commit,
            "dirty": made.dirty,
            "device": str(made.device),
            "made": made.made,
            "remake": remake_command(whose.plan, planned.as_posix()),
            "spec_hash": record.spec_hash,
            "sha256": record.sha256,
            "spec": record.spec,
            "results": _summary(record),
            "history": record.results.get("history", []),
            "provenance": made.model_dump(mode="json"),
        }

    def _analyses(self) -> list[dict[str, Any]]:
        """Every analysis with what it found: this run, or else the first evidence."""
        found = []
        for name, analysis in self.plan.config.analyses.items():
            entry: dict[str, Any] = {
                "id": name,
                "title": analysis.title,
                "place": f"{analysis.source.seed}: {analysis.source.place}",
                "path": "",
                "published": {key: ", ".join(map(str, each))
                              for key, each in analysis.published.items()},
            }  # fmt: skip
            for results in (self.run, *self.evidence):
                task = results.plan.analyse_task(analysis)
                if task and results.record(task):
                    path = self._keep(results.place(task.path))
                    entry |= {"path": path, "states": results.states()}
                    break
            found.append(entry)
        return found


def _number(text: str) -> float | None:
    """What a cell is sorted and drawn by: its first number, in the heading's unit."""
    found = re.match(r"-?[0-9,]+(\.[0-9]+)?(e[-+]?[0-9]+)?", text)
    return float(found[0].replace(",", "")) if found else None


def _spread(value: Value, metric: str) -> dict[str, Any]:
    """n, spread and noise, in the heading's unit; and the mean with all its digits."""
    unit = SCALES.get(metric, 1.0)
    exact = {"number": value.mean * unit, "n": value.n}
    if value.n > 1:
        exact["spread"] = value.spread * unit
    return exact | ({"noise": value.noise * unit} if value.noise else {})


def _metrics() -> dict[str, dict[str, str]]:
    """Metric -> heading, and whether it is trained, timed, counted, or exact."""
    kinds = dict.fromkeys(TRAINED, "trained") | dict.fromkeys(COUNTED, "counted")
    kinds |= {"latency": "timed", "throughput": "timed"}
    return {
        name: {"heading": heading, "kind": kinds.get(name, "exact")}
        for name, (heading, _) in HEADINGS.items()
    }


def _scope(study: Study) -> str:
    """At what its models are counted."""
    size = f"{study.image_size} px, " if study.image_size else ""
    return f"counted at {size}{study.num_classes} classes, on no images"


def _summary(record: Record) -> dict[str, Any]:
    """A record's results without the history and the rounds, which are drawn or summed up."""
    if record.kind != "measure":
        return {key: found for key, found in record.results.items() if key != "history"}
    rows = {}
    for name, row in record.results["rows"].items():
        latency = {
            batch: {key: found for key, found in each.items() if key != "ms"}
            for batch, each in row.get("latency", {}).items()
        }
        rows[name] = row | ({"latency": latency} if latency else {})
    return {"rows": rows}
