"""The seeds' claims, judged by the records. A verdict is computed, never typed."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..catalogue import Claim
from ..files import write_json, write_text
from ..plan import Plan
from .values import INEXACT, Results, Value, find_evidence

VERDICTS = ("reproduced", "contradicted", "within noise", "not measured")


@dataclass(frozen=True)
class Verdict:
    """One claim's outcome.

    Args:
        verdict: one of VERDICTS.
        measured: the number held against the seed's, or None.
        why: in words, with the numbers.
        source: this run, or which evidence.
        records: behind it.
    """

    id: str
    seed: str
    says: str
    place: str
    reported: str | None
    verdict: str
    measured: float | None
    why: str
    source: str
    records: tuple[str, ...]


def judge(sources: list[Results], claim: Claim, seed: str) -> Verdict:
    """Hold one claim against the records: this run's, or else the first evidence that can tell."""
    verdicts = [_judge_by(results, claim, seed) for results in sources]
    return next((v for v in verdicts if v.verdict != "not measured"), verdicts[0])


def _judge_by(results: Results, claim: Claim, seed: str) -> Verdict:
    scale = results.plan.scale.id
    source = f"evidence, scale {scale}" if results.is_evidence else f"this run, scale {scale}"

    def verdict(name: str, measured: float | None, why: str, *values: Value) -> Verdict:
        records = sorted({str(path) for value in values for path in value.paths})
        why = f"{why}. {claim.note}" if claim.note else why
        return Verdict(
            claim.id, seed, claim.says, claim.place, claim.reported, name, measured, why, source,
            tuple(records),
        )  # fmt: skip

    values = []
    for ref in (claim.of, claim.to):
        if ref is None:
            continue
        value, missing = _value(results, ref)
        if value is None:
            return verdict("not measured", None, missing)
        values.append(value)
    if claim.kind in ("less", "greater"):
        return verdict(*_compare(claim.kind, *values), *values)
    number = _number(claim.kind, values)
    low, high = _range(str(claim.reported))
    off = max(low - number, number - high, 0.0)
    noise = values[0].noise if claim.kind == "value" else 0.0
    tolerance = claim.tolerance if claim.tolerance is not None else _last_digit(str(claim.reported))
    holds = off <= tolerance + 1e-9
    name = "reproduced" if holds else "within noise" if off <= noise else "contradicted"
    allowed = f" ± {tolerance:g}" if tolerance else ""
    return verdict(name, number, f"{_say(number)} against {claim.reported}{allowed}", *values)


def _value(results: Results, ref: str) -> tuple[Value | None, str]:
    """(value, why there is none)."""
    study_id, row_id, metric = ref.split("/")
    study = results.plan.study(study_id)
    scale = results.plan.scale
    judged = "latency" if metric.startswith("latency_") else metric
    if judged in INEXACT - scale.judges:
        return None, f"scale {scale.id} does not judge {judged}"
    value = results.value(study, study.row(row_id), metric)
    return value, f"no record of {ref} at scale {scale.id}"


def _compare(kind: str, a: Value, b: Value) -> tuple[str, float, str]:
    difference = a.mean - b.mean
    noise = math.hypot(a.noise, b.noise)
    holds = difference < 0 if kind == "less" else difference > 0
    name = "within noise" if abs(difference) <= noise else "reproduced" if holds else "contradicted"
    why = f"{_say(a.mean)} against {_say(b.mean)}, n = {a.n} and {b.n}"
    return name, difference, why + (f"; differences up to {noise:.3g} are noise" if noise else "")


def _number(kind: str, values: list[Value]) -> float:
    if kind == "value":
        return values[0].mean
    ratio = values[0].mean / values[1].mean
    return ratio if kind == "ratio" else 100 * (1 - ratio)


def _say(number: float) -> str:
    """Whole numbers whole, others to four decimals."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,.4f}"


def _last_digit(printed: str) -> float:
    """One unit of the last decimal of a printed number; 0 for a whole one."""
    decimals = len(printed.partition(".")[2])
    return 10.0**-decimals if decimals else 0.0


def _range(printed: str) -> tuple[float, float]:
    low, _, high = printed.partition("–")
    return float(low), float(high or low)


def judge_all(plan: Plan, root: Path = Path()) -> list[Verdict]:
    """Every claim of the catalogue, judged at this scale."""
    sources = [Results(plan, root), *find_evidence(plan, root)]
    return [
        judge(sources, claim, file.seed)
        for file in plan.catalogue.claims.values()
        for claim in file.claims
    ]


def tally(verdicts: list[Verdict]) -> str:
    """How many of each verdict, in one line."""
    counts = [(name, sum(v.verdict == name for v in verdicts)) for name in VERDICTS]
    return ", ".join(f"{n} {name}" for name, n in counts)


def write_claims(plan: Plan, root: Path = Path()) -> str:
    """Write `results/claims.json` and `.md`; gives the tally."""
    verdicts = judge_all(plan, root)
    scale = {"id": plan.scale.id, "title": plan.scale.title}
    write_json(
        root / "results/claims.json",
        {"scale": scale, "tally": tally(verdicts), "claims": [asdict(v) for v in verdicts]},
    )
    lines = [
        "# Claims of the seeds, judged by this run's records",
        "",
        f"Scale `{plan.scale.id}`: {plan.scale.title}. {tally(verdicts)}.",
        "",
        "Latency is judged by ratios and ranks only: the device is another than the seed's.",
        "",
        "| verdict | claim | place | reported | measured | why | by |",
        "| :-- | :-- | :-- | --: | --: | :-- | :-- |",
    ]
    for v in verdicts:
        measured = "" if v.measured is None else _say(v.measured)
        cells = (f"**{v.verdict}**", v.says, v.place, v.reported or "", measured, v.why,
                 v.source)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    write_text(root / "results/claims.md", "\n".join([*lines, ""]))
    return tally(verdicts)
