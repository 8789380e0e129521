"""`hovit explain`: from a table's cell to its records, spec and commit, and how to re-make it."""

from ..catalogue import Row, Study
from ..errors import HovitError
from ..files import digest
from ..plan import Plan
from ..records import read_record
from .values import COUNTED, TRAINED, Results, evidence_for, find_evidence


def explain(plan: Plan, table: str, row_id: str, column: str) -> str:
    """Trace one cell.

    Args:
        plan: the catalogue at a scale.
        table, row_id: study and row.
        column: a metric of the study; `latency` may name a batch, as in `latency_1`.

    Raises:
        HovitError: for a table, row or column that is not there.
    """
    study = plan.study(table)
    row = study.row(row_id)
    results = Results(plan)
    timed = results.batches(study)
    columns = [m for c in study.columns for m in (timed if c == "latency" else [c])]
    if column not in columns:
        raise HovitError(f"table {table} has no column {column!r}; it has {', '.join(columns)}")
    value = results.value(study, row, column)
    printed = row.reported.get(column.split("_")[0] if "latency" in column else column)  # type: ignore[call-overload]
    lines = [
        f"{study.title} / {row.label} / {column}",
        f"  seed      {study.source.seed}, {study.source.place}",
        f"  reported  {printed or 'nothing'}",
        f"  this run  {_number(value.mean, value.spread, value.n) if value else 'no record yet'}",
        f"  row       config/studies/{study.id}.yaml, rows: id: {row.id}",
    ]
    if column in COUNTED:
        lines += _counted(plan, row)
    elif column in TRAINED:
        lines += _trained(plan, study, row)
    else:
        target = plan.measured(study)
        spec = digest(plan.measure_spec(study))
        lines += _record(results, str(target), spec)
        lines.append("  (interleaved over the table's rows, so all of them are measured again)")
    best = evidence_for(study, find_evidence(plan))
    value = best.value(study, row, column) if best and column not in COUNTED else None
    if best and value:
        lines.append(f"  evidence  {_number(value.mean, value.spread, value.n)}, {best.states()}")
        lines += [f"  record    {path}" for path in value.paths]
    return "\n".join(lines)


def _number(mean: float, spread: float, n: int) -> str:
    return f"{mean:,.6g}" + (f" (spread {spread:.4g}, n = {n})" if n > 1 else "")


def _trained(plan: Plan, study: Study, row: Row) -> list[str]:
    runs = plan.runs_of(study, row)
    if not runs:
        return [f"  nothing is trained for it at scale {plan.scale.id}: no such data there"]
    lines = []
    for run in runs:
        lines += _record(Results(plan), str(run.folder / "record.json"), run.spec_hash)
    return lines


def _counted(plan: Plan, row: Row) -> list[str]:
    if row.rule:
        return [f"  by rule   {row.total:,} images, split as config/datasets/{row.rule}.yaml says"]
    return [
        line
        for pack in plan.packs_of(row.dataset)
        for line in (
            f"  record    {pack.folder / 'pack.json'}",
            f"  spec      {pack.spec_hash}",
            f"  re-make   {remake_command(plan, str(pack.folder / 'pack.json'))}",
        )
    ]


def _record(results: Results, path: str, spec_hash: str) -> list[str]:
    lines = [f"  record    {path}", f"  spec      {spec_hash}"]
    full, remake = results.root / path, remake_command(results.plan, path)
    try:
        record = read_record(full) if full.exists() else None
    except HovitError as error:
        return [*lines, f"            cannot be used: {error}", f"  re-make   {remake}"]
    if record:
        made = record.provenance
        if record.spec_hash != spec_hash:
            lines.append(f"            (the record is of another spec: {record.spec_hash})")
        lines += [
            f"  commit    {made.commit}{' with uncommitted changes' * made.dirty}",
            f"  made      {made.made} on {made.device} in {made.seconds:,.1f} s",
        ]
    else:
        lines.append("            (not there yet)")
    return [*lines, f"  re-make   {remake}"]


def remake_command(plan: Plan, path: str) -> str:
    """The command that makes one file again, and nothing that it does not need."""
    config = [f"scale={plan.scale.id}"] if plan.scale.id != "smoke" else []
    config += [f"weights='{plan.weights_file}'"] if plan.weights_file else []
    settings = f" --config {' '.join(config)}" if config else ""
    return f"snakemake --cores all --force '{path}'{settings}"
