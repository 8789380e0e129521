"""`hovit explain`: from a table's cell to its records, spec and commit, and how to re-make it."""

from ..config.plan import Plan
from ..config.schema import Analysis, Row, Study
from ..config.tasks import Task
from ..records.record import read_record
from ..utils.errors import HovitError
from .results import (
    COUNTED,
    REPORTED_ONLY,
    TRAINED,
    Results,
    Value,
    evidence_for,
    find_evidence,
    plural,
)

NONE = "no record yet"


def explain(plan: Plan, name: str, row_id: str = "", column: str = "") -> str:
    """Trace one cell of a table, or what an analysis found.

    Args:
        plan: the config at a scale.
        name: a study or an analysis.
        row_id: of a study a row; of an analysis STUDY/ROW, or nothing for the analysis as a whole.
        column: a metric of the study; `latency` may name a batch, as in `latency_1`. Of an
            analysis a number that it found of the row.

    Raises:
        HovitError: for a study, analysis, row or column that is not there.
    """
    if name in plan.config.analyses:
        return _analysis(plan, plan.analysis(name), row_id, column)
    study = plan.study(name)
    if not (row_id and column):
        raise HovitError(f"a cell has a row and a column: `hovit explain {name} ROW COLUMN`")
    return _cell(plan, study, study.row(row_id), column)


def _cell(plan: Plan, study: Study, row: Row, column: str) -> str:
    results = Results(plan)
    timed = results.batches(study)
    columns = [m for c in study.columns for m in (timed if c == "latency" else [c])]
    if column not in columns:
        raise HovitError(f"table {study.id} has no column {column!r}; it has {', '.join(columns)}")
    value = results.value(study, row, column)
    printed = row.reported.get(column.split("_")[0] if "latency" in column else column)  # type: ignore[call-overload]
    lines = [
        f"{study.title} / {row.label} / {column}",
        f"  seed      {study.source.seed}, {study.source.place}",
        f"  reported  {printed or 'nothing'}",
        f"  this run  {_number(value, study, column) if value else NONE}",
        f"  row       config/studies/{study.id}.yaml, rows: id: {row.id}",
    ]
    if column in COUNTED:
        return "\n".join(lines + _counted(plan, row))
    lines += _made(results, study, row, column)
    best = evidence_for(study, find_evidence(plan))
    value = best.value(study, row, column) if best else None
    if best and value:
        lines.append(f"  evidence  {_number(value, study, column)}, {best.states()}")
        lines += _made(best, study, row, column)
    return "\n".join(lines)


def _number(value: Value, study: Study, column: str) -> str:
    """With its spread and how many there are of it, if it is not exact."""
    timed = column.startswith(("latency", "throughput"))
    if not timed and not (study.trained and column in TRAINED):
        return f"{value.mean:,.6g}"
    spread = f"spread {value.spread:.4g}, " if value.n > 1 else ""
    return f"{value.mean:,.6g} ({spread}n = {plural(value.n, 'round' if timed else 'seed')})"


def _made(results: Results, study: Study, row: Row, column: str) -> list[str]:
    """The records behind a cell, of evidence those that there are; or why there can be none."""
    plan = results.plan
    if row.model is None:
        return ["  nothing is run for it: the row has the seed's numbers alone"]
    if column in TRAINED:
        if not study.trained:
            evaluate = plan.evaluate_task(study)
            if column != "top1" or evaluate is None or results.record(evaluate) is None:
                return [
                    "  nothing is trained for it; given weights, ImageNet's accuracy is evaluated:",
                    f"  hovit evaluate {study.id} IMAGENET --weights FOLDER",
                ]
            return _record(results, evaluate)
        runs = plan.runs_of(study, row)
        if results.is_evidence:
            runs = [run for run, _ in results.trained(study, row)]
        elif not runs:
            role = row.dataset or study.dataset
            return [f"  nothing is trained for it at scale {plan.scale.id}: no images for {role}"]
        return [line for run in runs for line in _record(results, plan.train_task(run))]
    if column in REPORTED_ONLY:
        return ["  nothing is measured for it: the study's notes say who reported it"]
    measure = plan.measure_task(study)
    if measure is None:
        return [f"  nothing is measured for it at scale {plan.scale.id}: no images for it"]
    timed = column.startswith(("latency", "throughput"))
    how = "interleaved over" if timed else "one record has"
    return [
        *_record(results, measure),
        f"            ({how} the table's rows, so all of them are measured again)",
    ]


def _analysis(plan: Plan, analysis: Analysis, row_ref: str, name: str) -> str:
    if row_ref and row_ref not in analysis.of:
        raise HovitError(
            f"analysis {analysis.id} is not of {row_ref!r}; it is of {', '.join(analysis.of)}"
        )
    this = Results(plan)
    best = next((each for each in find_evidence(plan) if each.analysis(analysis.id)), None)
    lines = [
        " / ".join(filter(None, (analysis.title, row_ref, name))),
        f"  seed      {analysis.source.seed}, {analysis.source.place}",
        f"  of        config/analyses/{analysis.id}.yaml: {', '.join(analysis.of)}",
    ]
    for results in (this, best) if best else (this,):
        found = _found(results, analysis, row_ref, name)
        head = f"evidence  {found}, {results.states()}" if results.is_evidence else \
            f"this run  {found}"  # fmt: skip
        lines.append(f"  {head}")
        task = results.plan.analyse_task(analysis)
        if task is None:
            lines.append(f"  nothing is analysed at scale {plan.scale.id}: no images for it")
            continue
        lines += _record(results, task)
    return "\n".join(lines)


def _found(results: Results, analysis: Analysis, row_ref: str, name: str) -> str:
    """What an analysis found, in a few words: the number that is asked for, or of how many rows."""
    record = results.analysis(analysis.id)
    if record is None:
        return NONE
    rows = record.results["rows"]
    if not (row_ref and name):
        return plural(len(rows), "row")
    found = rows.get(row_ref, {})
    numbers = [key for key, value in found.items() if isinstance(value, int | float)]
    if found and name not in numbers:
        raise HovitError(
            f"analysis {analysis.id} has no number {name!r}; it has {', '.join(numbers) or 'none'}"
        )
    return f"{found[name]:,.6g}" if found else NONE


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


def _record(results: Results, task: Task) -> list[str]:
    """A task's record: its path, spec, commit, device, and the command that makes it again.

    The command makes evidence again under `results/runs`, at the scale of the evidence.
    """
    place, remake = results.place(task.path), remake_command(results.plan, str(task.path))
    lines = [f"  record    {place}", f"  spec      {task.spec_hash}"]
    full = results.root / place
    try:
        record = read_record(full) if full.exists() else None
    except HovitError as error:
        return [*lines, f"            cannot be used: {error}", f"  re-make   {remake}"]
    if record:
        made = record.provenance
        if record.spec_hash != task.spec_hash:
            lines.append(f"            (the record has another spec: {record.spec_hash})")
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
    if "/evaluation/" in path:
        config = [*config, "imagenet=IMAGENET"] + ["weights=FOLDER"] * (not plan.weights_file)
    settings = f" --config {' '.join(config)}" if config else ""
    return f"snakemake --cores all --force '{path}'{settings}"
