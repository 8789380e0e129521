"""Claims of the papers, judged by records. A verdict is computed, never typed.

`results/verdicts.json` holds the verdicts that somebody last read and accepted, and every number
that config says the papers report. `hovit claims --check` names whatever differs.
"""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...config.kinds import ANALYSIS_KINDS
from ...config.metrics import quantity
from ...config.plan import Plan
from ...config.schema import Claim, Config, split_ref
from ...utils.errors import HovitError
from ...utils.files import read_json, write_json, write_text
from ..results import PairedValue, Results, Value
from ..sources import Sources, load_sources
from ..tables.columns import format_p
from .coverage import coverage, coverage_lines, coverage_tally, last_digit

VERDICTS = ("reproduced", "contradicted", "within noise", "not measured")
ACCEPTED = Path("results/verdicts.json")
DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one claim.

    Args:
        verdict: one of VERDICTS.
        measured: the number that is compared with the paper's, or None.
        why: the reason, with the numbers.
        source: this run, or the evidence that decided.
        records: the records behind it.
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


@dataclass(frozen=True)
class Missing:
    """Why a source has no number for a claim."""

    why: str


def judge(sources: Sources, claim: Claim, paper: str) -> Verdict:
    """Judge one claim by this run, or else by the first evidence that can tell.

    All numbers of a verdict come from one source, so devices and data sets are never mixed.
    """
    verdicts = [_judge_by(results, claim, paper) for results in sources.all]
    for verdict in verdicts:
        if verdict.verdict != "not measured":
            return verdict
    reasons = "; ".join(dict.fromkeys(verdict.why for verdict in verdicts))
    return replace(verdicts[0], why=reasons)


def _judge_by(results: Results, claim: Claim, paper: str) -> Verdict:
    """The verdict by one source."""
    values = claim_values(results, claim)
    if isinstance(values, Missing):
        name, measured, why, found = "not measured", None, values.why, []
    else:
        name, measured, why = _compare(claim, values, _paired(results, claim))
        notes = [claim.note, *_stand_ins(results, claim), *_accuracies(results, claim)]
        why, found = ". ".join([why, *filter(None, notes)]), values
    return Verdict(
        id=claim.id,
        seed=paper,
        says=claim.says,
        place=claim.place,
        reported=claim.reported,
        verdict=name,
        measured=measured,
        why=why,
        source=results.where(results.plan.study(split_ref(claim.of)[1])),
        records=tuple(sorted({str(path) for value in found for path in value.paths})),
    )


def claim_values(results: Results, claim: Claim) -> list[Value] | Missing:
    """The numbers that a claim compares, or why one of them is missing."""
    values = []
    for ref in filter(None, (claim.of, claim.to)):
        value = referenced(results, ref, claim.kind in ("value", "difference"))
        if isinstance(value, Missing):
            return value
        values.append(value)
    if claim.device and (other := _other_device(results, claim)):
        return Missing(other)
    if claim.kind in ("ratio", "reduction") and not values[1].mean:
        return Missing(f"{claim.to} is 0")
    return values


def _paired(results: Results, claim: Claim) -> PairedValue | None:
    """The difference that a claim about two accuracies judges, if the test images are the same."""
    if claim.to is None or claim.kind not in ("less", "greater", "keeps", "difference"):
        return None
    refs = split_ref(claim.of), split_ref(claim.to)
    if any(analysis or metric != "top1" for analysis, _, _, metric in refs):
        return None
    (_, study, row, _), (_, other_study, other, _) = refs
    first, second = map(results.plan.study, (study, other_study))
    return results.paired_difference(first, first.row(row), second, second.row(other))


def _compare(
    claim: Claim, values: list[Value], paired: PairedValue | None
) -> tuple[str, float, str]:
    """(verdict, the number that is compared, why)."""
    if claim.to is None:
        named = quantity(split_ref(claim.of)[3])
        unit = named.metric.unit if named else 1.0  # as tables and papers print it
        number, noise = values[0].mean * unit, values[0].noise * unit
    else:
        number, noise = (paired.mean, paired.noise) if paired else against(claim.kind, *values)
    if claim.reported is None:
        name, why = _direction(claim, number, noise, *values)
        return name, number, why + (f"; {_pairs(paired)}" if paired else "")
    low, high = _range(claim.reported)
    off = max(low - number, number - high, 0.0)
    tolerance = claim.tolerance if claim.tolerance is not None else last_digit(claim.reported)
    holds = off <= tolerance + 1e-9
    name = "reproduced" if holds else "within noise" if off <= tolerance + noise else "contradicted"
    allowed = f" ± {tolerance:g}" if tolerance else ""
    return name, number, f"{say(number)} against {claim.reported}{allowed}"


def _pairs(paired: PairedValue) -> str:
    """How many test images two rows classify differently, and the test's p."""
    return (
        f"of the same test images, {paired.better:,} are right only with the first and "
        f"{paired.worse:,} only with the second ({format_p(paired.p)}, exact McNemar test)"
    )


def _stand_ins(results: Results, claim: Claim) -> list[str]:
    """The models that the scale trains and times in place of the claim's."""
    refs = [split_ref(ref) for ref in (claim.of, claim.to) if ref]
    measured = [ref for ref in refs if not ((q := quantity(ref[3])) and q.reported)]
    named = {str(results.plan.study(study).row(row).model) for _, study, row, _ in measured}
    models = results.plan.scale.models
    return [f"{models[name].model} stands in for {name}" for name in sorted(named & set(models))]


def _accuracies(results: Results, claim: Claim) -> list[str]:
    """Caveat: an analysis depends on the accuracy of the analysed model."""
    rows = {split_ref(ref)[:3] for ref in (claim.of, claim.to) if ref}
    found = []
    for analysis_id, study_id, row_id in sorted(rows):
        if not analysis_id or _measures_time(results, analysis_id):
            continue
        study = results.plan.study(study_id)
        row = study.row(row_id)
        if top1 := results.value(study, row, "top1"):
            classes = results.plan.runs_of(study, row)[0].dataset.num_classes
            found.append(f"{row.label} has {top1.mean:.1f} % top-1 ({classes} classes)")
    return found


def _measures_time(results: Results, analysis_id: str) -> bool:
    return ANALYSIS_KINDS[results.plan.analysis(analysis_id).kind].measures_time


def _other_device(results: Results, claim: Claim) -> str:
    """The device of the times, if it is not of the kind that the claim names."""
    device = results.latency_device(results.plan.study(split_ref(claim.of)[1]))
    if device and device.kind == claim.device:
        return ""
    return f"timed on {device or 'no device'}, but the claim is about {DEVICES[claim.device or '']}"


def against(kind: str, a: Value, b: Value) -> tuple[float, float]:
    """Compare two values as a claim of this kind does: (number, its noise)."""
    if kind in ("less", "greater", "keeps", "difference"):
        if _is_paired(a, b):
            return a.mean - b.mean, ratio_noise(a, b) * b.mean
        return a.mean - b.mean, math.hypot(a.noise, b.noise)
    ratio, noise = a.mean / b.mean, ratio_noise(a, b)
    return (ratio, noise) if kind == "ratio" else (100 * (1 - ratio), 100 * noise)


def _is_paired(a: Value, b: Value) -> bool:
    """Whether both were timed in the same rounds, so that drift cancels."""
    return bool(a.samples) and len(a.samples) == len(b.samples)


def ratio_noise(a: Value, b: Value) -> float:
    """Half the inter-quartile range of the rounds' ratios; without rounds, from both noises."""
    if _is_paired(a, b):
        ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return (high - low) / 2
    if not a.mean:
        return a.noise / abs(b.mean)
    return abs(a.mean / b.mean) * math.hypot(a.noise / a.mean, b.noise / b.mean)


def _direction(
    claim: Claim, difference: float, noise: float, a: Value, b: Value
) -> tuple[str, str]:
    """(verdict, why) of a claim that says which of two is larger."""
    if claim.kind == "keeps":
        lost = -difference - (claim.tolerance or 0.0)
        sure = lost > noise or lost + noise <= 0
        name = ("reproduced" if lost <= 0 else "contradicted") if sure else "within noise"
    elif abs(difference) <= noise:
        name = "within noise"
    else:
        holds = difference < 0 if claim.kind == "less" else difference > 0
        name = "reproduced" if holds else "contradicted"
    why = f"{say(a.mean)} against {say(b.mean)}, n = {a.n} and {b.n}"
    return name, why + (f"; differences up to {noise:.3g} are noise" if noise else "")


def referenced(results: Results, ref: str, absolute: bool) -> Value | Missing:
    """The number that a reference names, if the source's scale may judge it.

    Args:
        results: the source.
        ref: STUDY/ROW/METRIC, or ANALYSIS:STUDY/ROW/NAME.
        absolute: whether the number itself is compared with the paper's. An absolute accuracy
            needs the paper's own images.
    """
    analysis_id, study_id, row_id, metric = split_ref(ref)
    study, scale = results.plan.study(study_id), results.plan.scale
    none = Missing("no record")
    if analysis_id:
        needed = "latency" if _measures_time(results, analysis_id) else "top1"
        if needed not in scale.judges:
            return Missing(f"scale {scale.id} does not judge analyses")
        return results.analysed_value(analysis_id, f"{study_id}/{row_id}", metric) or none
    number = quantity(metric)
    if number is None:
        return none
    judged = "latency" if number.is_timed else number.metric.recorded
    if number.is_inexact and not number.reported and judged not in scale.judges:
        return Missing(f"scale {scale.id} does not judge {judged}")
    row = study.row(row_id)
    runs = results.plan.runs_of(study, row)
    if absolute and number.is_trained and not number.reported and runs:
        images = runs[0].dataset
        if images.stands_for:
            return Missing(f"{images.title} stands in for {images.stands_for}")
    return results.value(study, row, number) or none


def say(number: float) -> str:
    """A whole number without decimals, any other with four."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,.4f}"


def _range(printed: str) -> tuple[float, float]:
    low, _, high = printed.partition("–")
    return float(low), float(high or low)


def judge_all(sources: Sources) -> list[Verdict]:
    """Judge every claim in config."""
    return [
        judge(sources, claim, file.seed)
        for file in sources.plan.config.claims.values()
        for claim in file.claims
    ]


def tally(verdicts: list[Verdict]) -> str:
    """The number of each verdict, in one line."""
    counts = [(name, sum(v.verdict == name for v in verdicts)) for name in VERDICTS]
    return ", ".join(f"{n} {name}" for name, n in counts)


def reported_numbers(config: Config) -> dict[str, str]:
    """Every number that config says a paper reports, by its place."""
    rows = {
        f"{study.id}/{row.id}/{metric}": number
        for study in config.studies.values()
        for row in study.rows
        for metric, number in row.reported.items()
    }
    claims = {
        claim.id: claim.reported
        for file in config.claims.values()
        for claim in file.claims
        if claim.reported is not None
    }
    return rows | claims


def accept(plan: Plan, root: Path = Path()) -> None:
    """Write `results/verdicts.json`: somebody has read these verdicts, and expects them."""
    verdicts = {v.id: v.verdict for v in judge_all(load_sources(plan, root))}
    write_json(root / ACCEPTED, {"reported": reported_numbers(plan.config), "verdicts": verdicts})


def check_accepted(plan: Plan, root: Path = Path()) -> list[str]:
    """A line for every verdict and every reported number that differs from the accepted one.

    Raises:
        HovitError: if `results/verdicts.json` is missing or not readable.
    """
    accepted = read_json(root / ACCEPTED)
    found = {
        "reported": reported_numbers(plan.config),
        "verdicts": {v.id: v.verdict for v in judge_all(load_sources(plan, root))},
    }
    if any(not isinstance(accepted.get(part), dict) for part in found):
        raise HovitError(f"{root / ACCEPTED}: not a file that `hovit claims --accept` writes")
    return [
        f"{name}: {now.get(name, 'gone')}, but accepted was {accepted[part].get(name, 'nothing')}"
        for part, now in found.items()
        for name in sorted(now | accepted[part])
        if now.get(name) != accepted[part].get(name)
    ]


ABOUT = (
    "Latency is judged by ratios and ranks only, because the device differs from the paper's. A "
    "difference is noise if it is smaller than a 95 % interval over seeds and test images "
    "(accuracy and loss), or than half the inter-quartile range of the rounds' ratios (latency). "
    "Two accuracies on the same test images are compared image by image. An analysis looks at one "
    "trained model; its noise is over its images or passes. Where a claim only compares, "
    "*measured* is the difference."
)


def write_claims(plan: Plan, root: Path = Path()) -> str:
    """Write `results/claims.json` and `.md`; return the tally."""
    sources = load_sources(plan, root)
    verdicts = judge_all(sources)
    rest = coverage(sources)
    scale = {"id": plan.scale.id, "title": plan.scale.title}
    write_json(
        root / "results/claims.json",
        {"scale": scale, "tally": tally(verdicts), "claims": [asdict(v) for v in verdicts], **rest},
    )
    lines = [
        "# Claims of the papers, judged by records",
        "",
        f"Scale `{plan.scale.id}`: {plan.scale.title}. {tally(verdicts)}.",
        "",
        ABOUT,
        "",
        "| verdict | claim | place | reported | measured | why | by |",
        "| :-- | :-- | :-- | --: | --: | :-- | :-- |",
    ]
    for v in verdicts:
        measured = "" if v.measured is None else say(v.measured)
        cells = (
            f"**{v.verdict}**", v.says, v.place, v.reported or "", measured, v.why, v.source
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += coverage_lines(rest, [v.seed for v in verdicts])
    write_text(root / "results/claims.md", "\n".join([*lines, ""]))
    return f"{tally(verdicts)}\n{coverage_tally(rest)}"
