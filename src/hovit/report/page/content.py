"""The content of the page, collected from records."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...config.metrics import METRICS, RATIO_HEADING
from ...config.runs import RUNS
from ...config.schema import Row, Study
from ...records.record import Record, read_record
from ...utils.errors import HovitError
from ...utils.files import digest
from ..claims.check import ERRATA, GROUPS, VERDICTS, Verdict, check_all, counts, tally
from ..claims.coverage import REASONS, coverage, coverage_tally
from ..explain import rerun_command
from ..order import NAMES, PAPERS, in_order, paper_of, source_text
from ..readme import findings
from ..results import Results, Value
from ..sources import Sources
from ..tables.columns import NOTHING, Column, Table, format_printed, make_table
from ..tables.facts import describe
from ..tables.write import table_notes

SYMBOLS = dict(zip((*VERDICTS, *ERRATA), "✓↗?≈✗≠–✎=", strict=True))


def collect(sources: Sources) -> dict[str, Any]:
    """Return everything that the template shows; the script reads its `data`."""
    return _Collector(sources).collect()


def source_id(results: Results | None) -> str:
    """Name of a source within keys: `reported`, `run`, or `evidence@DEVICE.SCALE`."""
    if results is None:
        return "reported"
    return f"evidence@{results.base.name}.{results.plan.scale.id}" if results.is_evidence else "run"


@dataclass
class _Collector:
    """Collects values and records while it walks over the studies.

    Args:
        sources: this run and the evidence.
        values: key -> one number of a table.
        records: path -> one record.
    """

    sources: Sources
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def collect(self) -> dict[str, Any]:
        plan = self.sources.plan
        story = in_order(plan.config.studies.values())
        studies = [self.study(study) for study in story]
        verdicts = check_all(self.sources)
        claims = [self.claim(verdict) for verdict in verdicts]
        by_id = {claim["id"]: claim for claim in claims}
        analyses = self.analyses()
        rest = coverage(self.sources)
        problems = [p for results in self.sources.all for p in results.problems.values()]
        data = {
            "scale": plan.scale.id,
            "values": self.values,
            "records": dict(sorted(self.records.items())),
            "studies": {s["id"]: {k: s[k] for k in ("title", "rows", "place", "scope", "contexts")}
                        for s in studies},
            "metrics": _metrics(),
            "claims": by_id,
            "symbols": SYMBOLS,
        }  # fmt: skip
        return {
            "scale": plan.scale,
            "tally": tally(verdicts),
            "counts": counts(verdicts),
            "groups": [
                {"name": group, "title": title, "counts": counts(verdicts, group)}
                for group, title in GROUPS.items()
            ],
            "symbols": SYMBOLS,
            "papers": {
                paper: name
                for paper, name in NAMES.items()
                if any(verdict.paper == paper for verdict in verdicts)
            },
            "claims": claims,
            "not_checkable": [
                entry | {"place": source_text(entry["paper"], entry["place"])}
                for entry in rest["not_checkable"]
            ],
            "reasons": REASONS,
            "rest": coverage_tally(rest),
            "findings": self.findings(),
            "story": [
                {"id": paper, "title": title, "studies": own}
                for paper, title in PAPERS.items()
                if (
                    own := [
                        s
                        for s, study in zip(studies, story, strict=True)
                        if paper_of(study) == paper
                    ]
                )
            ],
            "analyses": analyses,
            "records": data["records"],
            "problems": problems,
            "nothing": NOTHING,
            "data": data,
        }

    def findings(self) -> list[tuple[str, tuple[str, ...], str]]:
        """The findings of the README, from committed records alone; none without such records."""
        if not self.sources.evidence:
            return []
        return findings(self.sources.evidence_alone())

    # Claims

    def claim(self, verdict: Verdict) -> dict[str, Any]:
        """A verdict with its claim."""
        file, claim = next(
            (file, claim)
            for file in self.sources.plan.config.claims.values()
            for claim in file.claims
            if claim.id == verdict.id
        )
        for path in verdict.records:
            self.keep(Path(path))
        place = source_text(verdict.paper, verdict.place)
        parts = {"kind": claim.kind, "of": claim.of, "to": claim.to, "tolerance": claim.tolerance}
        reported = verdict.reported and format_printed(verdict.reported)
        shown = {"reported": reported, "measured": verdict.with_noise_and_n, "label": verdict.label,
                 "records": list(verdict.records), "file": file.id, "place": place}  # fmt: skip
        return asdict(verdict) | parts | shown

    # Tables

    def study(self, study: Study) -> dict[str, Any]:
        """The table of a study, with its facts."""
        try:
            table, refused = make_table(study, self.sources), ""
        except HovitError as error:
            table, refused = Table(study, (), {}), str(error)
        shown = [*table.evidence.values(), self.sources.run]
        letters = {id(results): letter for letter, results in table.evidence.items()}
        return {
            "id": study.id,
            "title": study.title,
            "place": source_text(study.source.paper, study.source.place),
            "trained": study.trained and study.kind == "models",
            "scope": _scope(study),
            "refused": refused,
            "columns": [
                {"heading": c.heading, "source": c.source, "state": c.kind} for c in table.columns
            ],
            "rows": [
                self.row(study, row) | {"cells": [self.cell(study, i, c) for c in table.columns]}
                for i, row in enumerate(study.rows)
            ],
            "facts": [] if refused else [
                {"state": "evidence" if r.is_evidence else "run", "letter": letters.get(id(r), ""),
                 "facts": describe(r, study)} for r in shown],
            "contexts": {source_id(r): self.context(r, study) for r in reversed(shown)},
            "notes": [*table_notes(study), *map(" ".join, table.footnotes.items())],
        }  # fmt: skip

    def context(self, results: Results, study: Study) -> dict[str, Any]:
        """Return what the numbers of a study from one source share: scale, images, runs."""
        plan = results.plan
        data, runs, stand_ins = {}, {}, {}
        for row in study.rows:
            if found := plan.runs_of(study, row):
                images = found[0].dataset
                data[row.id] = f"{images.described}, {found[0].image_size} px"
                if images.stands_for:
                    stand_ins[row.id] = images.described
            if trained := results.trained(study, row):
                paths = [results.place(plan.train_task(run).path) for run, _ in trained]
                runs[row.id] = [self.keep(path) for path in paths]
        if evaluated := results.evaluated(study):
            seen = evaluated.provenance.dataset or {}
            what = f"ImageNet-1k, validation: {seen['images']:,} images"
            data = dict.fromkeys(evaluated.results["rows"], what)
        scale = f"{plan.scale.id}: {plan.scale.title}"
        state = "evidence" if results.is_evidence else "run"
        return {"scale": scale, "state": state, "name": results.name, "data": data, "runs": runs,
                "stand_ins": stand_ins}  # fmt: skip

    def row(self, study: Study, row: Row) -> dict[str, Any]:
        """Return the properties of a row; `system` identifies a model across tables."""
        trained_on = self._papers_images(row.dataset or study.dataset)
        return {
            "id": row.id,
            "label": row.label,
            "ours": row.ours,
            "model": row.model or "",
            "args": row.model_args,
            "system": digest([row.model, row.model_args, row.pretrained])[:12],
            "task": trained_on if study.trained else "ImageNet-1k",
            "base": any(other.baseline == row.id for other in study.rows),
        }

    def _papers_images(self, role: str) -> str:
        """Return the images of the paper: at the largest scale, or those that they stand in for."""
        config = self.sources.plan.config
        scales = sorted(config.scales.values(), key=lambda s: s.rank, reverse=True)
        for scale in scales:
            if role in scale.datasets:
                images = config.datasets[scale.datasets[role]]
                return images.stands_for or images.title
        return role

    def cell(self, study: Study, i: int, column: Column) -> dict[str, str]:
        """Return the text of a cell and the key of its number in `values`; "" without a number."""
        text, row, results = column.cells[i], study.rows[i], column.results[i]
        if text == NOTHING:
            return {"text": text, "key": "", "mark": ""}
        number = column.number
        metric, source = number.metric.name, source_id(results)
        batch = f"_{number.batch}" if number.batch else ""
        key = f"{study.id}/{row.id}/{metric}{batch}{':ratio' * column.ratio}/{source}"
        value: dict[str, Any] = {
            "text": text, "number": _number(text), "study": study.id, "row": row.id,
            "metric": metric, "batch": number.batch, "ratio": column.ratio, "source": source,
        }  # fmt: skip
        if column.ratio:
            pair = (row.id, row.baseline)
            value["of"] = [f"{study.id}/{each}/{metric}{batch}/{source}" for each in pair]
            value["inverse"] = column.inverse
        found = results.value(study, row, number) if results else None
        if found and not column.ratio:
            value |= _spread(found, number.metric.unit)
        if results:
            value["records"] = self.sources_of(results, study, row, column)
        self.values[key] = value
        return {"text": text, "key": key, "mark": column.mark(i)}

    def sources_of(self, results: Results, study: Study, row: Row, column: Column) -> list[str]:
        """The records behind a number; for a ratio also those of the baseline."""
        rows = [row, study.row(row.baseline)] if column.ratio and row.baseline else [row]
        values = [results.value(study, each, column.number) for each in rows]
        paths = dict.fromkeys(path for value in values if value for path in value.paths)
        return [self.keep(path) for path in paths]

    # Records

    def keep(self, path: Path) -> str:
        """Add a record to the page; return its name."""
        name = path.as_posix()
        if name not in self.records:
            if path.name == "pack.json":
                command = rerun_command(self.sources.plan, name)
                self.records[name] = {"kind": "pack", "id": path.parent.name, "rerun": command}
            else:
                self.records[name] = self._record(path)
        return name

    def _record(self, path: Path) -> dict[str, Any]:
        record = read_record(self.sources.run.root / path)
        whose = next(
            results
            for results in self.sources.all
            if path.is_relative_to(results.base) and results.plan.scale.id == record.scale
        )
        planned = RUNS / path.relative_to(whose.base)
        made = record.provenance
        return {
            "kind": record.kind,
            "id": record.id,
            "scale": record.scale,
            "state": "evidence" if whose.is_evidence else "run",
            "commit": made.commit,
            "dirty": made.dirty,
            "device": str(made.device),
            "made": made.made,
            "rerun": rerun_command(whose.plan, planned.as_posix()),
            "spec_hash": record.spec_hash,
            "sha256": record.sha256,
            "spec": record.spec,
            "results": _summary(record),
            "history": record.results.get("history", []),
            "provenance": made.model_dump(mode="json"),
        }

    # Analyses

    def analyses(self) -> list[dict[str, Any]]:
        """Return every analysis with its record: of this run, or else of the first evidence."""
        found = []
        for name, analysis in self.sources.plan.config.analyses.items():
            entry: dict[str, Any] = {
                "id": name,
                "title": analysis.title,
                "place": source_text(analysis.source.paper, analysis.source.place),
                "path": "",
                "published": {key: ", ".join(map(str, each))
                              for key, each in analysis.published.items()},
            }  # fmt: skip
            for results in self.sources.all:
                task = results.plan.analyse_task(analysis)
                if task and results.record(task):
                    entry |= {"path": self.keep(results.place(task.path)), "name": results.name}
                    break
            found.append(entry)
        return found


def _number(text: str) -> float | None:
    """The first number of a cell, for sorting and drawing."""
    found = re.match(r"-?[0-9,]+(\.[0-9]+)?(e[-+]?[0-9]+)?", text.replace("−", "-"))
    return float(found[0].replace(",", "")) if found else None


def _spread(value: Value, unit: float) -> dict[str, Any]:
    """Mean with all digits, n, spread and noise, in the unit of the heading."""
    exact: dict[str, Any] = {"number": value.mean * unit, "n": value.n}
    if value.n > 1:
        exact["spread"] = value.spread * unit
    return exact | ({"noise": value.noise * unit} if value.noise else {})


def _metrics() -> dict[str, dict[str, str]]:
    """Metric -> heading and kind; the ratio to a baseline has a heading of its own."""
    found = {m.name: {"heading": m.heading, "kind": m.kind} for m in METRICS.values()}
    return found | {"ratio": {"heading": RATIO_HEADING, "kind": "exact"}}


def _scope(study: Study) -> str:
    """Image size and number of classes for which the models of a study are counted."""
    size = f"{study.image_size} px, " if study.image_size else ""
    return f"counted at {size}{study.num_classes} classes, on no images"


def _summary(record: Record) -> dict[str, Any]:
    """The results of a record, without the history and the times of single rounds."""
    if record.kind != "measure":
        return {key: found for key, found in record.results.items() if key != "history"}
    rows = {}
    for name, row in record.results["rows"].items():
        timed = {
            column: {
                batch: {key: found for key, found in each.items() if key != "ms"}
                for batch, each in row[column].items()
            }
            for column in ("latency", "captured")
            if column in row
        }
        rows[name] = row | timed
    return record.results | {"rows": rows}
