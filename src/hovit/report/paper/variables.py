"""Numbers in the paper's text: named variables (`paper/variables.yaml`), computed from records.

A variable names a cell, `STUDY/ROW/METRIC` as claims do, or combines two cells. It carries the
origin of its number. Without a record it is "not measured" and says why.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...config.metrics import Quantity, quantity
from ...config.schema import Ref, Row, Study
from ...utils.errors import HovitError
from ...utils.plural import plural
from ...utils.strict import Strict
from ...utils.yaml_file import load_file
from ..claims.compare import Missing, against, referenced
from ..number import minus, significant
from ..results import Results, Value
from ..sources import Sources, miscounted_last
from ..tables.columns import format_printed, format_value

VARIABLES = Path("paper/variables.yaml")
MISSING = "not measured"
Combination = Literal["value", "ratio", "share", "reduction", "difference", "range"]
CIRCUMSTANCES = ("device", "n", "scale", "dataset", "model")
DECIMALS = {"ratio": 2, "share": 1, "reduction": 1, "difference": 0}


class Variable(Strict):
    """One number of the text. A ratio of times, and a reduction, have their noise.

    kind `value`: of; `ratio`: of / to; `share`: 100 of / to percent; `reduction`:
    100 (1 - of / to) percent; `difference`: of - to; `range`: the smallest and the largest of / to
    of the studies that have both rows and measure them themselves.
    """

    of: Ref
    to: Ref | None = None
    kind: Combination = "value"
    decimals: int | None = None  # None: the metric's own, or the kind's
    unit: str = ""
    scale: str | None = None  # None: the largest that has all cells


class Variables(Strict):
    """The file `paper/variables.yaml`."""

    variables: dict[str, Variable]


@dataclass(frozen=True)
class Origin:
    """Where a number comes from: records, the field in them, and the circumstances."""

    records: tuple[str, ...]
    field: str
    device: str = ""
    n: str = ""
    scale: str = ""
    dataset: str = ""
    model: str = ""  # stands in for the row's own

    def where(self) -> str:
        """Scale, stand-in model, images, n and device in one line, as far as they are known."""
        scale = f"scale {self.scale}" if self.scale else ""
        model = f"stand-in model {self.model}" if self.model else ""
        return ", ".join(filter(None, (scale, model, self.dataset, self.n, self.device)))


@dataclass(frozen=True)
class Cell:
    """A number of a row, with its value."""

    study: Study
    row: Row
    number: Quantity
    value: Value


def by_scale(sources: Sources) -> list[Results]:
    """This run and the evidence, the largest scale first."""
    return sorted(sources.all, key=lambda results: results.plan.scale.rank, reverse=True)


def origin(results: Results, study: Study, row: Row, number: Quantity, value: Value) -> Origin:
    """Where the number of a cell comes from."""
    records = tuple(str(path) for path in value.paths)
    scale = results.plan.scale.id
    if number.reported or not records:
        key = f"reported.{number.metric.name}" if number.reported else "rule"
        return Origin((f"config/studies/{study.id}.yaml",), f"rows.{row.id}.{key}")
    if number.is_counted:
        return Origin(records, "images", scale=scale)
    of = results.plan.scale
    model = of.model_of(row) if number.is_trained else of.measured_model(row)
    model = "" if model == row.model else model
    trained = results.trained(study, row) if number.is_trained else []
    if trained:
        run = trained[0][0]
        devices = sorted({str(record.provenance.device) for _, record in trained})
        dataset = f"{run.dataset.title} at {run.image_size} px"
        n = f"n = {plural(len(trained), 'seed')}"
        field = f"results.{number.metric.recorded}"
        return Origin(records, field, "; ".join(devices), n, scale, dataset, model)
    timed = number.is_inexact or value.n > 1
    device = str(results.latency_device(study) or "") if timed else ""
    batch = number.batch or results.throughput_batch(study)
    n = f"batch {batch}, median of {plural(value.n, 'round')}" if value.n > 1 else ""
    field = f"results.rows.{row.id}.{_field(results, study, number)}"
    return Origin(records, field, device, n, scale, model=model)


def _field(results: Results, study: Study, number: Quantity) -> str:
    """The field of a measurement that holds a number."""
    if number.metric.name == "throughput":
        return f"latency.{results.throughput_batch(study)}.median"
    if number.batch:
        return f"{number.metric.name}.{number.batch}.median"
    return number.metric.name.removesuffix("_m")


def resolve(sources: list[Results], name: str, variable: Variable) -> dict[str, Any]:
    """A variable for the text: `text`, `value`, and the origin of the number.

    Args:
        sources: the first that has all cells of the variable, at a scale that checks them (or at
            the scale of the variable), gives the number. For an accuracy or loss, the source with
            the most rows of the study is the first, as in tables, so that sentences compare numbers
            of one source. For multiply-adds, sources that leave fused attention out are the last.
        name: name of the variable, for messages.
        variable: the variable.

    Raises:
        HovitError: if the variable names a row or metric that its study does not have.
    """
    reasons = []
    for results in _best_first(sources, variable):
        if variable.scale not in (None, results.plan.scale.id):
            continue
        cells = _cells(results, name, variable)
        if isinstance(cells, Missing):
            reasons.append(cells.why)
        elif variable.kind == "range":
            return _range(results, variable, cells)
        else:
            return _entry(results, variable, cells)
    why = (*reasons, f"no records of scale {variable.scale}")[0]
    nothing = {"text": MISSING, "why": why, "of": _meaning(variable), "records": [],
               "inexact": False}  # fmt: skip
    return nothing | dict.fromkeys(("field", "where", *CIRCUMSTANCES), "")


def _best_first(sources: list[Results], variable: Variable) -> list[Results]:
    """Sort the sources of a variable that is an accuracy, a loss or a count; see `resolve`."""
    study_id, row_id, metric = variable.of.split("/")
    study = sources[0].plan.config.studies.get(study_id)
    number = quantity(metric)
    if study is None or number is None or number.reported:
        return sources
    if number.is_trained:
        rows = {r: sum(bool(r.value(study, row, number)) for row in study.rows) for r in sources}
        return sorted(sources, key=lambda r: (rows[r], r.is_evidence), reverse=True)
    row = next((row for row in study.rows if row.id == row_id), study.rows[0])
    return miscounted_last(sources, study, row, number)


def _entry(results: Results, variable: Variable, cells: list[Cell]) -> dict[str, Any]:
    """A variable's text, value and origin, from one source."""
    number = _combine(variable.kind, *(cell.value.mean for cell in cells))
    origins = [origin(results, c.study, c.row, c.number, c.value) for c in cells]
    entry: dict[str, Any] = {
        "text": _text(variable, number, cells) + variable.unit,
        "value": number,
        "inexact": any(cell.number.is_inexact and not cell.number.reported for cell in cells),
        "records": sorted({path for each in origins for path in each.records}),
        "field": "; ".join(dict.fromkeys(each.field for each in origins)),
        "of": _meaning(variable),
    }
    facts = {
        key: "; ".join(dict.fromkeys(filter(None, (getattr(o, key) for o in origins))))
        for key in CIRCUMSTANCES
    }
    return entry | facts | {"where": Origin((), "", **facts).where()}


def _range(results: Results, variable: Variable, cells: list[Cell]) -> dict[str, Any]:
    """The smallest and the largest ratio of the same two models over the studies of one source."""
    found: list[dict[str, Any]] = []
    number = cells[0].number
    ids = [cell.row.id for cell in cells]
    models = [(cell.row.model, cell.row.model_args) for cell in cells]
    for study in results.plan.config.studies.values():
        rows = [row for each in ids for row in study.rows if row.id == each and not row.same_as]
        values = [results.value(study, row, number) for row in rows]
        if [(row.model, row.model_args) for row in rows] == models and all(values):
            pairs = zip(rows, values, strict=True)
            own = [Cell(study, row, number, value) for row, value in pairs if value]
            found.append(_entry(results, variable.model_copy(update={"kind": "ratio"}), own))
    low, high = (f"{each(one['value'] for one in found):.2f}" for each in (min, max))
    records = sorted({path for one in found for path in one["records"]})
    text = low if low == high else f"{low} to {high}"
    return found[0] | {"text": text + variable.unit, "records": records, "of": _meaning(variable)}


def _cells(results: Results, name: str, variable: Variable) -> list[Cell] | Missing:
    """The cells of a variable, or why one of them is missing."""
    cells = []
    for ref in filter(None, (variable.of, variable.to)):
        study_id, row_id, metric = ref.split("/")
        study = results.plan.config.studies.get(study_id)
        if study is None:
            return Missing(f"no study {study_id} in config/studies")
        number = quantity(metric)
        if row_id not in {row.id for row in study.rows} or number is None:
            raise HovitError(f"{VARIABLES}: {name}: config has no {ref}")
        value = referenced(results, ref, False)
        if isinstance(value, Missing):
            return value
        if ref == variable.to and not value.mean and variable.kind != "difference":
            return Missing(f"{ref} is 0")
        cells.append(Cell(study, study.row(row_id), number, value))
    return cells


def _combine(kind: str, of: float, to: float = 1.0) -> float:
    if kind == "difference":
        return of - to
    if kind in ("share", "reduction"):
        return 100 * (of / to if kind == "share" else 1 - of / to)
    return of / to  # for a value, `to` is 1


def _text(variable: Variable, number: float, cells: list[Cell]) -> str:
    first = cells[0]
    metric, decimals = first.number.metric, variable.decimals
    if variable.kind == "value" and first.number.reported:
        return format_printed(str(first.row.reported[metric.name]))
    if variable.kind == "value" and decimals is None:
        return format_value(first.value, metric)
    if decimals is None:
        decimals = DECIMALS.get(variable.kind, 0)
    unit = metric.unit if variable.kind in ("value", "difference") else 1.0
    text = f"{number * unit:,.{decimals}f}"
    if variable.kind in ("ratio", "reduction") and all(c.value.samples for c in cells):
        text += f" ± {significant(against(variable.kind, *(c.value for c in cells))[1], 2)}"
    return minus(text)


def _meaning(variable: Variable) -> str:
    signs = {"ratio": "{of} ÷ {to}", "range": "{of} ÷ {to}, in each study",
             "share": "{of} in % of {to}", "reduction": "{of} less than {to}, in %",
             "difference": "{of} − {to}"}  # fmt: skip
    return signs.get(variable.kind, "{of}").format(of=variable.of, to=variable.to)


def load_variables(root: Path = Path()) -> dict[str, Variable]:
    """The variables of `paper/variables.yaml`.

    Raises:
        HovitError: in one line, if the file is wrong.
    """
    found: Variables = load_file(root / VARIABLES, Variables)
    for name, variable in found.variables.items():
        if (variable.kind == "value") != (variable.to is None):
            raise HovitError(f"{VARIABLES}: {name}: `to` belongs to every kind but `value`")
    return found.variables
