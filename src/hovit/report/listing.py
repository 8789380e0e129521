"""`hovit list`: studies, runs with the tables that cite them, and analyses."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from ..config.plan import Plan
from ..config.runs import RUNS
from ..config.schema import Analysis, Study
from ..records.evidence import EVIDENCE
from ..utils.errors import HovitError
from .order import in_order


def list_studies(plan: Plan) -> str:
    """Every study by paper and story: id, rows, title."""
    return _titles("studies", [(s, len(s.rows)) for s in in_order(plan.config.studies.values())])


def list_analyses(plan: Plan) -> str:
    """Every analysis: id, rows, title."""
    return _titles("analyses", [(a, len(a.of)) for a in plan.config.analyses.values()])


def _titles(what: str, found: Sequence[tuple[Study | Analysis, int]]) -> str:
    width = max((len(each.id) for each, _ in found), default=0)
    lines = [
        f"  {each.id:<{width}}  {rows:>3} {'row ' if rows == 1 else 'rows'}  {each.title}"
        for each, rows in found
    ]
    return "\n".join([f"{what} ({len(found)})", *lines])


def list_runs(plan: Plan, root: Path = Path()) -> str:
    """Every run of the scale: seeds done here, seeds in committed results, pack, tables."""
    cited: dict[str, list[str]] = {}
    for study in plan.config.studies.values():
        for run in {run.id for row in study.rows for run in plan.runs_of(study, row)}:
            cited.setdefault(run, []).append(study.id)
    here, evidence = [root / RUNS], sorted((root / EVIDENCE).glob("*/"))
    width = max(map(len, plan.runs))
    lines = [f"runs at scale {plan.scale.id} ({len(plan.runs)}): seeds done, and committed"]
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


def count_runs(plan: Plan) -> str:
    """The number of runs in one line, and how to list them."""
    return f"runs at scale {plan.scale.id}: {len(plan.runs)} (`hovit list --runs` names them)"


def unknown_name(plan: Plan, name: str) -> HovitError:
    """An error that names the nearest studies, analyses and runs."""
    every = (
        ("studies", plan.config.studies),
        ("analyses", plan.config.analyses),
        ("runs", plan.runs),
    )
    near = [f"{kind} {', '.join(nearest(name, names))}" for kind, names in every if names]
    scale = plan.scale.id
    return HovitError(
        f"no study, analysis or run {name!r} at scale {scale}; nearest: {'; '.join(near)}"
    )


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The n names that are most alike; those that contain the name come first."""

    def likeness(other: str) -> tuple[bool, float]:
        return name.lower() in other.lower(), SequenceMatcher(None, name, other).ratio()

    return sorted(names, key=likeness, reverse=True)[:n]
