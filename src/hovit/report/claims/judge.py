"""The seeds' claims, judged by the records. A verdict is computed, never typed.

`results/verdicts.json` is what they came to when somebody last read and accepted them, with every
number that the config says the seeds reported: whatever differs from it is named.
"""

import math
import re
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...config.plan import Plan
from ...config.schema import Claim, Config, split_ref
from ...utils.errors import HovitError
from ...utils.files import read_json, write_json, write_text
from ..results import INEXACT, TRAINED, Results, Value, find_evidence
from ..tables.columns import SCALES
from .coverage import last_digit, ledger, ledger_lines, ledger_tally

VERDICTS = ("reproduced", "contradicted", "within noise", "not measured")
ACCEPTED = Path("results/verdicts.json")
TIMED = ("runtime_breakdown",)  # kinds of analysis that take times
KINDS = {"cpu": "a CPU", "cuda": "a GPU"}


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
    rest = [re.sub(r"no record of \S+", "no record", v.why) for v in verdicts[1:]]
    none = replace(verdicts[0], why="; ".join(dict.fromkeys([verdicts[0].why, *rest])))
    return next((v for v in verdicts if v.verdict != "not measured"), none)


def _judge_by(results: Results, claim: Claim, seed: str) -> Verdict:
    source = results.where(results.plan.study(split_ref(claim.of)[1]))

    def verdict(name: str, measured: float | None, why: str, *values: Value) -> Verdict:
        records = sorted({str(path) for value in values for path in value.paths})
        if measured is not None:
            notes = [claim.note, *_stand_ins(results, claim), *_accuracies(results, claim)]
            why = ". ".join([why, *filter(None, notes)])
        return Verdict(
            claim.id, seed, claim.says, claim.place, claim.reported, name, measured, why, source,
            tuple(records),
        )  # fmt: skip

    values = []
    for ref in (claim.of, claim.to):
        if ref is None:
            continue
        value, missing = referenced(results, ref, claim.kind in ("value", "difference"))
        if value is None:
            return verdict("not measured", None, missing)
        values.append(value)
    if claim.device and (where := _elsewhere(results, claim)):
        return verdict("not measured", None, where, *values)
    if claim.kind in ("ratio", "reduction") and not values[1].mean:
        return verdict("not measured", None, f"{claim.to} is 0", *values)
    if claim.to is None:
        unit = SCALES.get(split_ref(claim.of)[3], 1.0)  # as a table has it, and the seed
        number, noise = values[0].mean * unit, values[0].noise * unit
    else:
        number, noise = against(claim.kind, *values)
    if claim.reported is None:
        name, why = _direction(claim, number, noise, *values)
        return verdict(name, number, why, *values)
    low, high = _range(claim.reported)
    off = max(low - number, number - high, 0.0)
    tolerance = claim.tolerance if claim.tolerance is not None else last_digit(claim.reported)
    holds = off <= tolerance + 1e-9
    name = "reproduced" if holds else "within noise" if off <= tolerance + noise else "contradicted"
    allowed = f" ± {tolerance:g}" if tolerance else ""
    return verdict(name, number, f"{say(number)} against {claim.reported}{allowed}", *values)


def _stand_ins(results: Results, claim: Claim) -> list[str]:
    """What the scale trains and times in the place of the claim's models, in words."""
    refs = [split_ref(ref) for ref in (claim.of, claim.to) if ref]
    found = [ref for ref in refs if not ref[3].startswith("reported_")]
    named = {str(results.plan.study(study).row(row).model) for _, study, row, _ in found}
    there = results.plan.scale.models
    return [f"{there[name].model} stands in for {name}" for name in sorted(named & set(there))]


def _accuracies(results: Results, claim: Claim) -> list[str]:
    """How right the models are that an analysis looked into: of a poor one it tells little."""
    rows = {split_ref(ref)[:3] for ref in (claim.of, claim.to) if ref}
    found = []
    for analysis_id, study_id, row_id in sorted(rows):
        if not analysis_id or results.plan.analysis(analysis_id).kind in TIMED:
            continue
        study = results.plan.study(study_id)
        row = study.row(row_id)
        if top1 := results.value(study, row, "top1"):
            classes = results.plan.runs_of(study, row)[0].dataset.num_classes
            found.append(f"{row.label} is right in {top1.mean:.1f} % ({classes} classes)")
    return found


def _elsewhere(results: Results, claim: Claim) -> str:
    """Where the times were taken, if not on the kind of device that the sentence names."""
    device = results.latency_device(results.plan.study(split_ref(claim.of)[1]))
    if device and device.kind == claim.device:
        return ""
    return f"timed on {device or 'no device'}, but said of {KINDS[claim.device or '']}"


def against(kind: str, a: Value, b: Value) -> tuple[float, float]:
    """(a held against b as the claim's kind does it, the noise of that)."""
    if kind in ("less", "greater", "keeps", "difference"):
        if a.samples and len(a.samples) == len(b.samples):  # rounds in pairs: drift cancels
            return a.mean - b.mean, ratio_noise(a, b) * b.mean
        return a.mean - b.mean, math.hypot(a.noise, b.noise)
    ratio, noise = a.mean / b.mean, ratio_noise(a, b)
    return (ratio, noise) if kind == "ratio" else (100 * (1 - ratio), 100 * noise)


def ratio_noise(a: Value, b: Value) -> float:
    """Half the inter-quartile range of the rounds' ratios; without rounds, by both noises."""
    if a.samples and len(a.samples) == len(b.samples):
        ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return (high - low) / 2
    if not a.mean:
        return a.noise / abs(b.mean)
    return abs(a.mean / b.mean) * math.hypot(a.noise / a.mean, b.noise / b.mean)


def _direction(
    claim: Claim, difference: float, noise: float, a: Value, b: Value
) -> tuple[str, str]:
    """(verdict, why) of a claim about which is larger."""
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


def referenced(results: Results, ref: str, absolute: bool) -> tuple[Value | None, str]:
    """(value, why there is none); an absolute accuracy needs the seed's own images."""
    analysis_id, study_id, row_id, metric = split_ref(ref)
    study = results.plan.study(study_id)
    scale = results.plan.scale
    if analysis_id:  # of time, or of trained models: as far as their accuracy can be judged
        timed = results.plan.analysis(analysis_id).kind in TIMED
        if ("latency" if timed else "top1") not in scale.judges:
            return None, f"scale {scale.id} does not judge analyses"
        found = results.analysed_value(analysis_id, f"{study_id}/{row_id}", metric)
        return found, f"no record of {ref} at scale {scale.id}"
    judged = "latency" if metric.startswith("latency_") or metric == "throughput" else metric
    if judged in INEXACT - scale.judges:
        return None, f"scale {scale.id} does not judge {judged}"
    row = study.row(row_id)
    runs = results.plan.runs_of(study, row)
    if absolute and metric in TRAINED and runs and runs[0].dataset.stands_for:
        images = runs[0].dataset
        return None, f"{images.title} stands in for {images.stands_for}"
    return results.value(study, row, metric), f"no record of {ref} at scale {scale.id}"


def say(number: float) -> str:
    """Whole numbers whole, others to four decimals."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,.4f}"


def _range(printed: str) -> tuple[float, float]:
    low, _, high = printed.partition("–")
    return float(low), float(high or low)


def judge_all(plan: Plan, root: Path = Path()) -> list[Verdict]:
    """Every claim of the config, judged at this scale."""
    sources = [Results(plan, root), *find_evidence(plan, root)]
    return [
        judge(sources, claim, file.seed)
        for file in plan.config.claims.values()
        for claim in file.claims
    ]


def tally(verdicts: list[Verdict]) -> str:
    """How many of each verdict, in one line."""
    counts = [(name, sum(v.verdict == name for v in verdicts)) for name in VERDICTS]
    return ", ".join(f"{n} {name}" for name, n in counts)


def reported_numbers(config: Config) -> dict[str, str]:
    """Every number that the config says a seed printed, by its place."""
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
    """Write `results/verdicts.json`: these verdicts have been read, and are what is expected."""
    verdicts = {v.id: v.verdict for v in judge_all(plan, root)}
    write_json(root / ACCEPTED, {"reported": reported_numbers(plan.config), "verdicts": verdicts})


def check_accepted(plan: Plan, root: Path = Path()) -> list[str]:
    """A line for every verdict, and every reported number, that is not what was accepted.

    Raises:
        HovitError: if `results/verdicts.json` is missing or is no such file.
    """
    accepted = read_json(root / ACCEPTED)
    found = {
        "reported": reported_numbers(plan.config),
        "verdicts": {v.id: v.verdict for v in judge_all(plan, root)},
    }
    if any(not isinstance(accepted.get(part), dict) for part in found):
        raise HovitError(f"{root / ACCEPTED}: not what `hovit claims --accept` writes")
    return [
        f"{name}: {now.get(name, 'gone')}, but accepted was {accepted[part].get(name, 'nothing')}"
        for part, now in found.items()
        for name in sorted(now | accepted[part])
        if now.get(name) != accepted[part].get(name)
    ]


def write_claims(plan: Plan, root: Path = Path()) -> str:
    """Write `results/claims.json` and `.md`; gives the tally."""
    verdicts = judge_all(plan, root)
    rest = ledger(plan, root)
    scale = {"id": plan.scale.id, "title": plan.scale.title}
    write_json(
        root / "results/claims.json",
        {"scale": scale, "tally": tally(verdicts), "claims": [asdict(v) for v in verdicts], **rest},
    )
    lines = [
        "# Claims of the seeds, judged by this run's records",
        "",
        f"Scale `{plan.scale.id}`: {plan.scale.title}. {tally(verdicts)}.",
        "",
        "Latency is judged by ratios and ranks only: the device is another than the seed's. A "
        "difference is noise where it is smaller than a 95 % interval over seeds and test images "
        "(accuracy and loss), or than half the inter-quartile range of the rounds' ratios "
        "(latency). An analysis is of one trained model; its noise is of its images, or of its "
        "passes. Where a claim only compares, what was measured is the difference.",
        "",
        "| verdict | claim | place | reported | measured | why | by |",
        "| :-- | :-- | :-- | --: | --: | :-- | :-- |",
    ]
    for v in verdicts:
        measured = "" if v.measured is None else say(v.measured)
        cells = (f"**{v.verdict}**", v.says, v.place, v.reported or "", measured, v.why,
                 v.source)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    more = ledger_lines(rest, [v.seed for v in verdicts])
    write_text(root / "results/claims.md", "\n".join([*lines, *more, ""]))
    return f"{tally(verdicts)}\n{ledger_tally(rest)}"
