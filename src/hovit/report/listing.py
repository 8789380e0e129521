"""`hovit list`: the studies, and the runs with the tables that cite them."""

from ..plan import Plan


def list_studies(plan: Plan) -> str:
    """Every study: id, rows, title."""
    studies = plan.catalogue.studies.values()
    width = max(len(study.id) for study in studies)
    lines = [f"studies ({len(studies)})"]
    lines += [f"  {s.id:<{width}}  {len(s.rows):>3} rows  {s.title}" for s in studies]
    return "\n".join(lines)


def list_runs(plan: Plan) -> str:
    """Every run of the scale: done or not, seeds, pack, tables."""
    cited: dict[str, list[str]] = {}
    for study in plan.catalogue.studies.values():
        for run in {run.id for row in study.rows for run in plan.runs_of(study, row)}:
            cited.setdefault(run, []).append(study.id)
    width = max(map(len, plan.runs))
    lines = [f"runs at scale {plan.scale.id} ({len(plan.runs)})"]
    for run_id, seeds in plan.runs.items():
        done = sum((run.folder / "record.json").exists() for run in seeds.values())
        pack = next(iter(seeds.values())).pack.id
        lines.append(
            f"  {run_id:<{width}}  {done}/{len(seeds)} done  {pack:<22} {', '.join(cited[run_id])}"
        )
    return "\n".join(lines)
