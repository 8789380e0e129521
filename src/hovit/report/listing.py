"""`hovit list`: studies, runs with the tables that cite them, and analyses."""

from collections.abc import Sequence
from pathlib import Path

from ..config.plan import Plan
from ..config.runs import RUNS
from ..config.schema import Analysis, Study
from ..records.evidence import EVIDENCE


def list_studies(plan: Plan) -> str:
    """Every study: id, rows, title."""
    return _titles("studies", [(s, len(s.rows)) for s in plan.config.studies.values()])


def list_analyses(plan: Plan) -> str:
    """Every analysis: id, rows, title."""
    return _titles("analyses", [(a, len(a.of)) for a in plan.config.analyses.values()])


def _titles(what: str, found: Sequence[tuple[Study | Analysis, int]]) -> str:
    width = max((len(each.id) for each, _ in found), default=0)
    lines = [f"  {each.id:<{width}}  {rows:>3} rows  {each.title}" for each, rows in found]
    return "\n".join([f"{what} ({len(found)})", *lines])


def list_runs(plan: Plan, root: Path = Path()) -> str:
    """Every run of the scale: seeds done here, seeds in evidence, pack, tables."""
    cited: dict[str, list[str]] = {}
    for study in plan.config.studies.values():
        for run in {run.id for row in study.rows for run in plan.runs_of(study, row)}:
            cited.setdefault(run, []).append(study.id)
    here, evidence = [root / RUNS], sorted((root / EVIDENCE).glob("*/"))
    width = max(map(len, plan.runs))
    lines = [f"runs at scale {plan.scale.id} ({len(plan.runs)}): seeds done here, and in evidence"]
    for run_id, by_seed in plan.runs.items():
        records = [run.folder.relative_to(RUNS) / "record.json" for run in by_seed.values()]
        done, given = (
            sum(any((base / record).exists() for base in bases) for record in records)
            for bases in (here, evidence)
        )
        seeds, pack = len(records), next(iter(by_seed.values())).pack.id
        lines.append(
            f"  {run_id:<{width}}  {done}/{seeds}  {given}/{seeds}  {pack:<22} "
            f"{', '.join(cited[run_id])}"
        )
    return "\n".join(lines)
