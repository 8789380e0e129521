"""The paper's numbers: each a named variable (`paper/variables.yaml`), worked out from records.

A variable names a cell, `STUDY/ROW/METRIC` as claims do, or what two cells come to. It carries
where its number comes from. One that no record gives is "not measured", and says why.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...config.plan import Plan
from ...config.schema import Metric, Ref, Row, Strict, Study
from ...utils.errors import HovitError
from ...utils.yaml_file import load_file
from ..claims.judge import referenced
from ..results import COUNTED, INEXACT, TRAINED, Results, Value, find_evidence, plural
from ..tables.columns import HEADINGS, SCALES, format_printed, format_value

VARIABLES = Path("paper/variables.yaml")
MISSING = "not measured"
KINDS = Literal["value", "ratio", "share", "reduction", "difference"]
CIRCUMSTANCES = ("device", "n", "scale", "dataset", "model")
DECIMALS = {"ratio": 2, "share": 1, "reduction": 1, "difference": 0}


class Variable(Strict):
    """One number of the text.

    kind `value`: of; `ratio`: of / to; `share`: 100 of / to percent; `reduction`:
    100 (1 - of / to) percent; `difference`: of - to.
    """

    of: Ref
    to: Ref | None = None
    kind: KINDS = "value"
    decimals: int | None = None  # None: the metric's own, or the kind's
    unit: str = ""


class Variables(Strict):
    """The file `paper/variables.yaml`."""

    variables: dict[str, Variable]


@dataclass(frozen=True)
class Origin:
    """Where a number comes from: records, the field in them, and under which circumstances."""

    records: tuple[str, ...]
    field: str
    device: str = ""
    n: str = ""
    scale: str = ""
    dataset: str = ""
    model: str = ""  # what stands in for the row's own

    def where(self) -> str:
        """In one line, for the text: scale, images, n, device; what it lacks is left out."""
        scale = f"scale {self.scale}" if self.scale else ""
        model = f"{self.model} in its model's place" if self.model else ""
        return ", ".join(filter(None, (scale, model, self.dataset, self.n, self.device)))


def sources_of(plan: Plan, root: Path = Path()) -> list[Results]:
    """This run's results and all evidence, the largest scale first."""
    found = [Results(plan, root), *find_evidence(plan, root)]
    return sorted(found, key=lambda results: results.plan.scale.rank, reverse=True)


def origin(results: Results, study: Study, row: Row, metric: str, value: Value) -> Origin:
    """Where a cell's number comes from."""
    records = tuple(str(path) for path in value.paths)
    scale = results.plan.scale.id
    if metric.startswith("reported_") or not records:
        key = "reported." + metric.removeprefix("reported_") if "reported_" in metric else "rule"
        return Origin((f"config/studies/{study.id}.yaml",), f"rows.{row.id}.{key}")
    if metric in COUNTED:
        return Origin(records, "images", scale=scale)
    model = results.plan.scale.model_of(row)
    model = "" if model == row.model else model
    if metric in TRAINED:
        trained = results.trained(study, row)
        run = trained[0][0]
        devices = sorted({str(record.provenance.device) for _, record in trained})
        dataset = f"{run.dataset.title} at {run.image_size} px"
        n = f"n = {plural(len(trained), 'seed')}"
        return Origin(records, f"results.{metric}", "; ".join(devices), n, scale, dataset, model)
    device = str(results.latency_device(study) or "") if metric in INEXACT or value.n > 1 else ""
    n = f"median of {plural(value.n, 'round')}" if value.n > 1 else ""
    return Origin(records, f"results.rows.{row.id}.{_field(results, study, metric)}", device, n,
                  scale, model=model)  # fmt: skip


def _field(results: Results, study: Study, metric: str) -> str:
    if metric == "throughput":
        return f"latency.{results.throughput_batch(study)}.median"
    if metric.startswith("latency_"):
        return f"latency.{metric.removeprefix('latency_')}.median"
    return metric.removesuffix("_m")


def resolve(sources: list[Results], name: str, variable: Variable) -> dict[str, Any]:
    """A variable as the paper reads it: `text`, `value`, and where it comes from.

    Args:
        sources: the first that has all its cells, and a scale that judges them, gives the number.
        name: the variable's, for messages.
        variable: what it is.

    Raises:
        HovitError: if it names a row or a metric that its study does not have.
    """
    whys = []
    for results in sources:
        cells, why = _cells(results, name, variable)
        if cells is None:
            whys.append(why)
            continue
        number = _number(variable.kind, *(value.mean for *_, value in cells))
        origins = [origin(results, *cell) for cell in cells]
        entry: dict[str, Any] = {
            "text": _text(variable, number, cells) + variable.unit,
            "value": number,
            "inexact": any(_inexact(metric) for _, _, metric, _ in cells),
            "records": sorted({path for each in origins for path in each.records}),
            "field": "; ".join(dict.fromkeys(each.field for each in origins)),
            "of": _means(variable),
        }
        facts = {
            key: "; ".join(dict.fromkeys(filter(None, (getattr(o, key) for o in origins))))
            for key in CIRCUMSTANCES
        }
        return entry | facts | {"where": Origin((), "", **facts).where()}
    nothing = {"text": MISSING, "why": whys[0], "of": _means(variable), "records": [],
               "inexact": False}  # fmt: skip
    return nothing | dict.fromkeys(("field", "where", *CIRCUMSTANCES), "")


def _inexact(metric: str) -> bool:
    return metric in INEXACT or metric.startswith("latency_")


def _cells(
    results: Results, name: str, variable: Variable
) -> tuple[list[tuple[Study, Row, str, Value]] | None, str]:
    """(the variable's cells, why one is missing)."""
    cells = []
    for ref in filter(None, (variable.of, variable.to)):
        study_id, row_id, metric = ref.split("/")
        study = results.plan.config.studies.get(study_id)
        if study is None:
            return None, f"no study {study_id} in config/studies"
        if row_id not in {row.id for row in study.rows} or not _known(metric):
            raise HovitError(f"{VARIABLES}: {name}: the config has no {ref}")
        value, why = referenced(results, ref, False)
        if value is None:
            return None, why
        if ref == variable.to and not value.mean and variable.kind != "difference":
            return None, f"{ref} is 0"
        cells.append((study, study.row(row_id), metric, value))
    return cells, ""


def _known(metric: str) -> bool:
    metric = metric.removeprefix("reported_")
    batch = metric.removeprefix("latency_")
    return metric in Metric.__args__ or (batch != metric and batch.isdigit())  # type: ignore[attr-defined]


def _number(kind: str, of: float, to: float = 1.0) -> float:
    if kind == "difference":
        return of - to
    if kind in ("share", "reduction"):
        return 100 * (of / to if kind == "share" else 1 - of / to)
    return of / to  # of a value, `to` is 1


def _text(variable: Variable, number: float, cells: list[tuple[Study, Row, str, Value]]) -> str:
    _, row, metric, value = cells[0]
    decimals = variable.decimals
    if variable.kind == "value" and metric.startswith("reported_"):
        return format_printed(str(row.reported[metric.removeprefix("reported_")]))  # type: ignore[index]
    if variable.kind == "value" and decimals is None:
        heading = "latency" if metric.startswith("latency_") else metric
        if heading in HEADINGS:
            return format_value(value, heading)
    if decimals is None:
        decimals = DECIMALS.get(variable.kind, 0)
    scale = SCALES.get(metric, 1.0) if variable.kind in ("value", "difference") else 1.0
    return f"{number * scale:,.{decimals}f}"


def _means(variable: Variable) -> str:
    signs = {"ratio": "{of} ÷ {to}", "share": "{of} in % of {to}",
             "reduction": "{of} less than {to}, in %", "difference": "{of} − {to}"}  # fmt: skip
    return signs.get(variable.kind, "{of}").format(of=variable.of, to=variable.to)


def load_variables(root: Path = Path()) -> dict[str, Variable]:
    """What `paper/variables.yaml` says.

    Raises:
        HovitError: in one line, for whatever is wrong in it.
    """
    found: Variables = load_file(root / VARIABLES, Variables)
    for name, variable in found.variables.items():
        if (variable.kind == "value") != (variable.to is None):
            raise HovitError(f"{VARIABLES}: {name}: `to` belongs to every kind but `value`")
    return found.variables
