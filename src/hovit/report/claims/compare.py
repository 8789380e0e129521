"""Compare the numbers of a claim, from one source of records, with the paper."""

import math
from dataclasses import dataclass
from typing import Literal

from ...config.kinds import ANALYSIS_KINDS
from ...config.metrics import Quantity, quantity
from ...config.schema import Claim, Row, Study, split_ref
from ...utils.plural import plural
from ..noise import half_iqr
from ..number import minus, significant
from ..results import PairedValue, Results, Value
from ..tables.columns import format_p

NO_RECORD = "no record"
DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}
WORDS = {"top1": "accuracy", "val_top1": "accuracy", "loss": "losses", "latency": "times"}
DECIDED = ("reproduced", "direction only", "contradicted")
COMPARISONS = ("less", "greater", "keeps")


@dataclass(frozen=True)
class Missing:
    """The reason why a source has no number for a claim.

    Args:
        why: the reason.
        verdict: `not measured`, or `not comparable` if there is a number but its images are not
            those of the paper.
        is_general: whether the source lacks all numbers of this kind, so that the reason of another
            source is more specific.
    """

    why: str
    verdict: Literal["not measured", "not comparable"] = "not measured"
    is_general: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a comparison.

    Args:
        verdict: one of `check.VERDICTS`; for errata one of `check.ERRATA`.
        why: the reason, with the numbers.
        measured: the number that is compared with the paper's; None if there is none.
        shown: the measured number, or both numbers of a comparison, with the unit.
        detail: `larger` or `smaller` effect, or the verdict that one random seed suggests.
        noise: of the number or of the difference, in its unit; 0 if exact.
        n: how many rounds or random seeds there are, in words.
        margin: largest difference that counts as equal, in the unit of `measured`; 0 if exact.
    """

    verdict: str
    why: str
    measured: float | None = None
    shown: str = ""
    detail: str = ""
    noise: float = 0.0
    n: str = ""
    margin: float = 0.0

    @property
    def label(self) -> str:
        """The verdict for readers: `direction only (larger)`, `provisional (one seed): ...`."""
        if self.verdict == "provisional":
            return f"provisional (one seed): {self.detail}"
        return f"{self.verdict} ({self.detail})" if self.detail else self.verdict


def referenced(
    results: Results, ref: str, absolute: bool, stand_ins: bool = False
) -> Value | Missing:
    """The number that a reference names, if the scale of the source checks such numbers.

    Args:
        results: the source.
        ref: STUDY/ROW/METRIC, or ANALYSIS:STUDY/ROW/NAME.
        absolute: whether the number itself is compared with that of the paper. An absolute accuracy
            requires the images of the paper.
        stand_ins: whether numbers on images that stand in for those of the paper count, too.
    """
    analysis_id, study_id, row_id, metric = split_ref(ref)
    study, scale = results.plan.study(study_id), results.plan.scale
    row = study.row(row_id)
    none = Missing(NO_RECORD, is_general=True)
    if analysis_id:
        needed = "latency" if _measures_time(results, analysis_id) else "top1"
        if needed not in scale.judges:
            return Missing(f"scale {scale.id} does not check analyses", is_general=True)
        found = results.analysed_value(analysis_id, f"{study_id}/{row_id}", metric)
        if found and not stand_ins and not _measures_time(results, analysis_id):
            return _other_images(results, study, row, "the analysed model was trained on") or found
        return found or none
    number = quantity(metric)
    if number is None:
        return none
    checked = "latency" if number.is_timed else number.metric.recorded
    if _is_measured(number) and checked not in scale.judges:
        return Missing(f"scale {scale.id} does not check {WORDS[checked]}", is_general=True)
    value = results.value(study, row, number)
    if value and absolute and not stand_ins and number.is_trained and _is_measured(number):
        return _other_images(results, study, row, "measured on") or value
    return value or none


def _other_images(results: Results, study: Study, row: Row, how: str) -> Missing | None:
    """The reason if a row uses stand-in images; None if it uses the images of the paper."""
    runs = results.plan.runs_of(study, row)
    if not runs or not runs[0].dataset.stands_for:
        return None
    images = runs[0].dataset
    top1 = results.value(study, row, "top1")
    accuracy = f" ({row.label}: {top1.mean:.1f} % top-1)" if top1 and how != "measured on" else ""
    relation = images.relation if images.is_part else f"which {images.relation}"
    why = f"{how} {images.title}, {relation}{accuracy}"
    return Missing(why, verdict="not comparable")


def _is_measured(number: Quantity) -> bool:
    return number.is_inexact and not number.reported


def _measures_time(results: Results, analysis_id: str) -> bool:
    return ANALYSIS_KINDS[results.plan.analysis(analysis_id).kind].measures_time


def claim_values(results: Results, claim: Claim, stand_ins: bool = False) -> list[Value] | Missing:
    """The numbers that a claim compares, or the reason why one of them is missing.

    Without `stand_ins`, numbers on images that stand in for those of the paper are missing, too, if
    the claim requires those of the paper.
    """
    values, absolute = [], claim.kind in ("value", "difference")
    for ref in filter(None, (claim.of, claim.to)):
        value = referenced(results, ref, absolute, stand_ins)
        if isinstance(value, Missing):
            return value
        values.append(value)
    if claim.device and (other := _other_device(results, claim)):
        return Missing(other)
    if claim.kind in ("ratio", "reduction") and not values[1].mean:
        return Missing(f"{claim.to} is 0")
    return values


def with_noise(claim: Claim, outcome: Outcome) -> str:
    """The number that is compared with a reported one, ± its noise; or both of a comparison."""
    if not (claim.reported and outcome.noise):
        return outcome.shown
    unit = units(claim)[1]
    number = outcome.shown.removesuffix(unit).strip()
    return f"{number} ± {significant(outcome.noise)} {unit}".strip()


def with_noise_and_n(claim: Claim, outcome: Outcome) -> str:
    """As `with_noise`, with the number of rounds or random seeds.

    Of a comparison, the reason of the verdict states them.
    """
    counts = f" ({outcome.n})" if claim.reported and outcome.n else ""
    return with_noise(claim, outcome) + counts


def _other_device(results: Results, claim: Claim) -> str:
    """The reason if the times are from another kind of device than the claim names; else empty."""
    device = results.latency_device(results.plan.study(split_ref(claim.of)[1]))
    if device and device.kind == claim.device:
        return ""
    return f"timed on {device or 'no device'}, but the claim is about {DEVICES[claim.device or '']}"


def is_exact(claim: Claim) -> bool:
    """Whether all numbers of a claim are printed, or are the same on every device."""
    numbers = [quantity(split_ref(ref)[3]) for ref in (claim.of, claim.to) if ref]
    return not any(number is None or _is_measured(number) for number in numbers)


def compare(results: Results, claim: Claim, values: list[Value]) -> Outcome:
    """Compare the numbers of a claim with the paper; return the verdict and the reason."""
    paired = _paired(results, claim)
    number, noise = (paired.mean, paired.noise) if paired else measured_number(claim, values)
    counts = _counts(claim, values, paired)
    if claim.reported is None:
        verdict, why = _compare_two(claim, number, noise, counts)
        detail = ""
    else:
        verdict, why, detail = _compare_reported(claim, number, noise)
    why = "; ".join(filter(None, (why, _pairs(paired) if paired else "")))
    if verdict in DECIDED and _has_one_seed(results, claim, values, paired):
        detail = f"{verdict} ({detail})" if detail else verdict
        verdict = "provisional"
    shown = _shown(claim, number, values, paired)
    if is_exact(claim):
        return Outcome(verdict, why, number, shown, detail)
    noise *= 1.0 if claim.reported else _factor(claim)
    margin = tolerance(claim) + noise
    return Outcome(verdict, why, number, shown, detail, noise, counts, margin)


def _counts(claim: Claim, values: list[Value], paired: PairedValue | None) -> str:
    """The number of rounds or random seeds of each side; empty for an analysis of one model."""
    if split_ref(claim.of)[0]:
        return ""
    if paired:
        return plural(paired.n, "random seed")
    what = "rounds" if values[0].samples else "random seeds"
    counts = list(dict.fromkeys(value.n for value in values))
    if len(counts) == 1:
        return plural(counts[0], what[:-1])
    return f"{' and '.join(map(str, counts))} {what}"


def tolerance(claim: Claim) -> float:
    """Tolerance of a claim; by default one unit of the last digit of the reported number."""
    return claim.tolerance if claim.tolerance is not None else last_digit(claim.reported or "")


def measured_number(claim: Claim, values: list[Value]) -> tuple[float, float]:
    """(number to compare with the paper, its noise), without pairing test images."""
    if claim.to is None:
        named = quantity(split_ref(claim.of)[3])
        unit = named.metric.unit if named else 1.0  # as tables and papers print it
        return values[0].mean * unit, values[0].noise * unit
    return against(claim.kind, *values)


def _paired(results: Results, claim: Claim) -> PairedValue | None:
    """The difference of two accuracies over the same test images; None without such pairs."""
    if claim.to is None or claim.kind not in (*COMPARISONS, "difference"):
        return None
    refs = split_ref(claim.of), split_ref(claim.to)
    if any(analysis or metric != "top1" for analysis, _, _, metric in refs):
        return None
    (_, study, row, _), (_, other_study, other, _) = refs
    first, second = map(results.plan.study, (study, other_study))
    return results.paired_difference(first, first.row(row), second, second.row(other))


def _pairs(paired: PairedValue) -> str:
    """The number of test images that two rows classify differently, and the p value."""
    only, seeds = ("only ", "") if paired.n == 1 else ("", " in more seeds")
    return (
        f"on the same test images, {only}the first is right{seeds} for {paired.better:,} and "
        f"{only}the second for {paired.worse:,} ({format_p(paired.p)}, exact McNemar test)"
    )


def against(kind: str, a: Value, b: Value) -> tuple[float, float]:
    """Compare two values in the way of this kind of claim: (number, its noise)."""
    if kind in (*COMPARISONS, "difference"):
        if _same_rounds(a, b):
            return a.mean - b.mean, ratio_noise(a, b) * b.mean
        return a.mean - b.mean, math.hypot(a.noise, b.noise)
    ratio, noise = a.mean / b.mean, ratio_noise(a, b)
    return (ratio, noise) if kind == "ratio" else (100 * (1 - ratio), 100 * noise)


def _same_rounds(a: Value, b: Value) -> bool:
    """Whether both were timed in the same rounds, so that drift of the machine cancels."""
    return bool(a.samples) and a.paths == b.paths and len(a.samples) == len(b.samples)


def ratio_noise(a: Value, b: Value) -> float:
    """Half the interquartile range of the rounds' ratios; without rounds, from both noises."""
    if _same_rounds(a, b):
        return half_iqr([x / y for x, y in zip(a.samples, b.samples, strict=True)])
    if not a.mean:
        return a.noise / abs(b.mean)
    return abs(a.mean / b.mean) * math.hypot(a.noise / a.mean, b.noise / b.mean)


def _compare_two(claim: Claim, difference: float, noise: float, counts: str) -> tuple[str, str]:
    """(verdict, why) of a claim that says which of two is larger."""
    if claim.kind == "keeps":
        lost = -difference - (claim.tolerance or 0.0)
        sure = lost > noise or lost + noise <= 0
        verdict = ("reproduced" if lost <= 0 else "contradicted") if sure else "within noise"
    elif abs(difference) <= noise:
        verdict = "within noise"
    else:
        holds = difference < 0 if claim.kind == "less" else difference > 0
        verdict = "reproduced" if holds else "contradicted"
    unit = units(claim)[1]
    factor, symbol = _factor(claim), f" {unit}" if unit else ""
    if not noise:
        return verdict, ""
    why = f"differences up to {significant(noise * factor)}{symbol} are noise"
    return verdict, why + (f" ({counts})" if counts else "")


def _compare_reported(claim: Claim, number: float, noise: float) -> tuple[str, str, str]:
    """(verdict, why, detail) of a claim with a reported number."""
    low, high = printed_range(claim.reported or "nan")
    off = max(low - number, number - high, 0.0)
    allowed = tolerance(claim)
    agrees = off <= allowed + 1e-9
    if claim.group == "errata":
        return ("consistent" if agrees else "erratum"), "", ""
    if agrees or is_exact(claim):
        return ("reproduced" if agrees else "contradicted"), "", ""
    limit = f"differences up to {significant(allowed + noise)} count as equal"
    if off <= allowed + noise:
        return "within noise", limit, ""
    if claim.kind == "value":  # the claim is the number itself
        return "contradicted", limit, ""
    none = 1.0 if claim.kind == "ratio" else 0.0
    expected = low - none if low > none else high - none
    if abs(expected) <= allowed:  # the claim is that there is no effect
        return "contradicted", limit, ""
    effect = (number - none) * math.copysign(1.0, expected)
    if effect > noise:
        return "direction only", limit, "larger" if effect > abs(expected) else "smaller"
    return ("contradicted" if effect < -noise else "within noise"), limit, ""


def _has_one_seed(
    results: Results, claim: Claim, values: list[Value], paired: PairedValue | None
) -> bool:
    """Whether the pairs or a trained side of a claim have only one random seed."""
    if paired is not None and paired.n == 1:
        return True
    refs = filter(None, (claim.of, claim.to))
    for ref, value in zip(refs, values, strict=True):
        analysis_id, study_id, _, metric = split_ref(ref)
        if analysis_id:  # an analysis uses the model of one seed
            trained = not _measures_time(results, analysis_id)
        else:
            number = quantity(metric)
            trained = number is not None and number.is_trained and not number.reported
            trained = trained and results.plan.study(study_id).trained
        if trained and value.n == 1:
            return True
    return False


def _factor(claim: Claim) -> float:
    """Factor from the unit of a record to the unit of the heading."""
    number = quantity(split_ref(claim.of)[3])
    return number.metric.unit if number else 1.0


def units(claim: Claim) -> tuple[str, str]:
    """(unit of each number, unit of their difference); kind `value` uses the second."""
    analysis_id, _, _, metric = split_ref(claim.of)
    number = quantity(metric)
    symbol = number.metric.symbol if number and not analysis_id else "%"
    if claim.kind == "ratio":
        return symbol, "×"
    if claim.kind == "reduction":
        return symbol, "%"
    return symbol, symbol if symbol != "%" or claim.kind == "value" else "points"


def _shown(claim: Claim, number: float, values: list[Value], paired: PairedValue | None) -> str:
    """The measured number with its unit; for a comparison, the two numbers that it compares."""
    each, unit = units(claim)
    if claim.kind in COMPARISONS:
        sides = paired.sides if paired else [value.mean for value in values]
        numbers = [side * _factor(claim) for side in sides]
        whole = is_exact(claim) and all(number == int(number) for number in numbers)
        pair = " against ".join(f"{n:,.0f}" if whole else significant(n) for n in numbers)
        return f"{pair} {each}".strip()
    decimals = len((claim.reported or "").partition("–")[0].partition(".")[2])
    if claim.group == "errata":
        decimals = max(decimals, 4) if number != int(number) else 0
    full, short = f"{number:,.{decimals}f}", significant(number)
    return minus(f"{max(full, short, key=len)} {unit}".strip())


def printed_range(printed: str) -> tuple[float, float]:
    """(lowest, highest) of a printed number or range."""
    low, _, high = printed.partition("–")
    return float(low), float(high or low)


def last_digit(printed: str) -> float:
    """One unit of the last decimal of a printed number; 0 for a whole one."""
    decimals = len(printed.partition("–")[0].partition(".")[2])
    return 10.0**-decimals if decimals else 0.0
