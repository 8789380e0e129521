"""`hovit explain`: trace a table's cell to its records, spec and commit."""

from collections.abc import Iterable

from ..config.metrics import METRICS, Quantity, quantity
from ..config.plan import Plan
from ..config.schema import Analysis, Row, Study
from ..config.tasks import Task
from ..records.record import read_record
from ..utils.errors import HovitError
from ..utils.plural import plural
from .results import Results, Value
from .sources import Sources, load_sources
from .tables.facts import timed_pixels

NONE = "no record yet"


def explain(plan: Plan, name: str, row_id: str = "", column: str = "") -> str:
    """Trace one cell of a table, or one number of an analysis.

    Args:
        plan: config at a scale.
        name: a study or an analysis.
        row_id: a row of the study; for an analysis STUDY/ROW, or nothing for all of it.
        column: a metric of the study; `latency` may name a batch, as in `latency_1`. For an
            analysis, a number that it found for the row.

    Raises:
        HovitError: if there is no such study, analysis, row or column.
    """
    sources = load_sources(plan)
    if name in plan.config.analyses:
        return "\n".join(_analysis(sources, plan.analysis(name), row_id, column))
    study = plan.study(name)
    if not (row_id and column):
        raise HovitError(f"name both a row and a column: `hovit explain {name} ROW COLUMN`")
    return "\n".join(_cell(sources, study, study.row(row_id), column))


def _cell(sources: Sources, study: Study, row: Row, column: str) -> list[str]:
    number = _number_of(sources, study, column)
    value = sources.run.value(study, row, number)
    printed = row.reported.get(number.metric.name)
    lines = [
        f"{study.title} / {row.label} / {column}",
        f"  source    {study.source.paper}, {study.source.place}",
        f"  reported  {printed + _unit(number) if printed else 'nothing'}",
        f"  this run  {_shown(sources.run, study, row, number, value) if value else NONE}",
        f"  row       config/studies/{study.id}.yaml, rows: id: {row.id}",
    ]
    if number.is_counted:
        return lines + _image_counts(sources.plan, row)
    lines += _records(sources.run, study, row, number)
    for results in _evidence(sources, study, row, number):
        value = results.value(study, row, number)
        assert value is not None
        shown = _shown(results, study, row, number, value)
        lines.append(f"  committed {shown}, {results.name}")
        lines += _records(results, study, row, number)
    return lines


def _number_of(sources: Sources, study: Study, column: str) -> Quantity:
    """The number that a column shows.

    Raises:
        HovitError: if the study has no such column.
    """
    number = quantity(column)
    latencies = sources.run.batches(study) if "latency" in study.columns else []
    latencies += [each for source in sources.timed(study) for each in source.captured(study)]
    is_column = number and not number.reported and number.metric.name in study.columns
    if number and (number in latencies or (is_column and number.metric.name != "latency")):
        return number
    if number and is_column and number.batch:
        return number
    others = [name for name in study.columns if name != "latency"]
    allowed = ", ".join([*others, *map(str, latencies)])
    raise HovitError(f"table {study.id} has no column {column!r}; it has {allowed}")


def _evidence(sources: Sources, study: Study, row: Row, number: Quantity) -> Iterable[Results]:
    """The committed results that the table shows: for times of each device, else the best."""
    if number.is_timed:
        return [r for r in sources.timed(study) if r.value(study, row, number)]
    if number.is_inexact:
        best = sources.best(study, number)[study.rows.index(row)]
    else:
        best = sources.evidence_alone().count(study, row, number)
    return [best[0]] if best else []


def _unit(number: Quantity) -> str:
    """The unit after a number, with a space before it."""
    return f" {number.metric.symbol}" if number.metric.symbol else ""


def _shown(results: Results, study: Study, row: Row, number: Quantity, value: Value) -> str:
    """A value with its unit, batch and image size, and with spread and n unless it is exact."""
    unit = number.metric.unit
    text = f"{value.mean * unit:,.6g}{_unit(number)}"
    if unit == 1 and value.mean == int(value.mean):
        text = f"{value.mean:,.0f}{_unit(number)}"
    where = _circumstances(results, study, row, number)
    text += f" at {where}" if where else ""
    if not number.is_timed and not (study.trained and number.is_trained):
        return text
    spread = f"spread {value.spread * unit:.4g}, " if value.n > 1 else ""
    what = "round" if number.is_timed else "seed"
    return f"{text} ({spread}n = {plural(value.n, what)})"


def _circumstances(results: Results, study: Study, row: Row, number: Quantity) -> str:
    """Batch and image size of a time, images of an accuracy, image size and classes of a count."""
    if number.is_timed:
        batch = number.batch or results.throughput_batch(study)
        graph = "as a CUDA graph" if number.metric.name == "captured" else ""
        facts = (f"batch {batch}", timed_pixels(results, study, row), graph)
        return ", ".join(filter(None, facts))
    runs = results.plan.runs_of(study, row)
    if number.is_trained and runs:
        return f"{runs[0].image_size} px on {runs[0].dataset.title}"
    if number.is_counted or number.is_trained:
        return ""
    size = row.image_size or study.image_size
    return ", ".join(filter(None, (f"{size} px" * bool(size), f"{study.num_classes} classes")))


def _records(results: Results, study: Study, row: Row, number: Quantity) -> list[str]:
    """The records behind a cell, or why there can be none."""
    plan = results.plan
    if row.model is None:
        return ["  nothing is run for it: the row has reported numbers only"]
    if number.is_trained and study.trained:
        return _training(results, study, row)
    if number.is_trained:
        evaluate = plan.evaluate_task(study)
        if number.metric.recorded == "top1" and evaluate and results.record(evaluate):
            return _record(results, evaluate)
        return [
            "  nothing is trained for it; this evaluates given weights on ImageNet:",
            f"  hovit evaluate {study.id} IMAGENET --weights FOLDER",
        ]
    if not METRICS[number.metric.name].is_measured:
        return ["  nothing is measured for it: the study's notes say who reported it"]
    measure = plan.measure_task(study)
    if measure is None:
        return [f"  nothing is measured for it at scale {plan.scale.id}: no images for it"]
    how = "interleaved over" if number.is_timed else "one record has"
    again = f"            ({how} the table's rows, so all of them are measured again)"
    return [*_record(results, measure), again]


def _training(results: Results, study: Study, row: Row) -> list[str]:
    """The records of a row's runs; for evidence only those that exist."""
    plan = results.plan
    runs = plan.runs_of(study, row)
    if results.is_evidence:
        runs = [run for run, _ in results.trained(study, row)]
    elif not runs:
        role = row.dataset or study.dataset
        return [f"  nothing is trained for it at scale {plan.scale.id}: no images for {role}"]
    return [line for run in runs for line in _record(results, plan.train_task(run))]


def _analysis(sources: Sources, analysis: Analysis, row_ref: str, name: str) -> list[str]:
    if row_ref and row_ref not in analysis.of:
        raise HovitError(
            f"analysis {analysis.id} has no row {row_ref!r}; it has {', '.join(analysis.of)}"
        )
    lines = [
        " / ".join(filter(None, (analysis.title, row_ref, name))),
        f"  source    {analysis.source.paper}, {analysis.source.place}",
        f"  rows      config/analyses/{analysis.id}.yaml: {', '.join(analysis.of)}",
    ]
    best = next((each for each in sources.evidence if each.analysis(analysis.id)), None)
    for results in (sources.run, best) if best else (sources.run,):
        found = _found(results, analysis, row_ref, name)
        head = f"committed {found}, {results.name}" if results.is_evidence else f"this run  {found}"
        lines.append(f"  {head}")
        task = results.plan.analyse_task(analysis)
        if task is None:
            scale = results.plan.scale.id
            lines.append(f"  nothing is analysed at scale {scale}: no images for it")
            continue
        lines += _record(results, task)
    return lines


def _found(results: Results, analysis: Analysis, row_ref: str, name: str) -> str:
    """The number that is asked for; without a name, how many rows the analysis has."""
    rows = results.analysed_rows(analysis.id)
    if not rows:
        return NONE
    if not (row_ref and name):
        return plural(len(rows), "row")
    found = rows.get(row_ref, {})
    numbers = [key for key, value in found.items() if isinstance(value, int | float)]
    if found and name not in numbers:
        raise HovitError(
            f"analysis {analysis.id} has no number {name!r}; it has {', '.join(numbers) or 'none'}"
        )
    return f"{found[name]:,.6g}" if found else NONE


def _image_counts(plan: Plan, row: Row) -> list[str]:
    """Where the counts of images come from: a rule, or packs."""
    if row.rule:
        return [f"  by rule   {row.total:,} images, split as config/datasets/{row.rule}.yaml says"]
    return [
        line
        for pack in plan.packs_of(row.dataset)
        for line in (
            f"  record    {pack.folder / 'pack.json'}",
            f"  spec      {pack.spec_hash}",
            f"  re-run    {rerun_command(plan, str(pack.folder / 'pack.json'))}",
        )
    ]


def _record(results: Results, task: Task) -> list[str]:
    """A task's record: its path, spec, commit, device, and the command that makes it again.

    The command makes evidence again under `results/runs`, at the scale of the evidence.
    """
    place, again = results.place(task.path), rerun_command(results.plan, str(task.path))
    lines = [f"  record    {place}"]
    full = results.root / place
    try:
        record = read_record(full) if full.exists() else None
    except HovitError as error:
        return [*lines, f"            cannot be used: {error}", f"  re-run    {again}"]
    if record:
        made = record.provenance
        lines.append(f"  spec      {record.spec_hash}")
        if record.spec_hash != task.spec_hash and not results.is_evidence:
            lines.append(f"            (config has another spec now: {task.spec_hash})")
        lines += [
            f"  commit    {made.commit}{' with uncommitted changes' * made.dirty}",
            f"  made      {made.made} on {made.device} in {made.seconds:,.1f} s",
        ]
    else:
        lines += ["            (not there yet)", f"  spec      {task.spec_hash}"]
    return [*lines, f"  re-run    {again}"]


def rerun_command(plan: Plan, path: str) -> str:
    """The command that makes one file again, and only what it needs."""
    config = [f"scale={plan.scale.id}"] if plan.scale.id != "smoke" else []
    config += [f"weights='{plan.weights_file}'"] if plan.weights_file else []
    if "/evaluation/" in path:
        config = [*config, "imagenet=IMAGENET"] + ["weights=FOLDER"] * (not plan.weights_file)
    settings = f" --config {' '.join(config)}" if config else ""
    return f"snakemake --cores all --force '{path}'{settings}"
