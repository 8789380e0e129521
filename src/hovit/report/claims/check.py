"""Check the claims of the papers against records. Verdicts are computed, never typed by hand.

`results/verdicts.json` holds the last accepted verdicts, and every number that config states as
reported by a paper. `hovit claims --check` lists all differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ...config.metrics import quantity
from ...config.plan import Plan
from ...config.schema import Claim, ClaimGroup, Config, split_ref
from ...utils.errors import HovitError
from ...utils.files import read_json, write_json
from ..order import NAMES
from ..results import Results, Value
from ..sources import Sources, load_sources, miscounted_last
from .compare import (
    NO_RECORD,
    Missing,
    Outcome,
    claim_values,
    compare,
    is_exact,
    units,
    with_noise,
    with_noise_and_n,
)

VERDICTS = (
    "reproduced", "direction only", "provisional", "within noise", "contradicted",
    "not comparable", "not measured",
)  # fmt: skip
ERRATA = ("erratum", "consistent")  # outcomes of `group: errata`, and "not measured"
GROUPS: dict[ClaimGroup, str] = {
    "paper": "claims of the papers",
    "own": "checks added here",
    "errata": "checks of arithmetic in the papers",
}
ACCEPTED = Path("results/verdicts.json")


@dataclass(frozen=True, kw_only=True)
class Verdict(Outcome):
    """The outcome of one claim, with what the claim says and where its numbers are from.

    Args:
        paper: id of the paper.
        group: a claim of the paper, a check added here, or a check of the paper's arithmetic.
        unit: unit of `measured` and `reported`.
        source: origin of the numbers: counted now, this run, or committed results.
        records: paths of the records that the verdict is based on.
        others: (what it gives, its verdict) of each other source that has all numbers.
        with_noise: the measured number ± its noise; of a comparison, the two numbers.
        with_noise_and_n: the same, with the number of rounds or random seeds.
    """

    id: str
    paper: str
    group: ClaimGroup
    study: str
    says: str
    place: str
    reported: str | None
    unit: str
    source: str
    records: tuple[str, ...]
    others: tuple[tuple[str, str], ...]
    with_noise: str
    with_noise_and_n: str

    @property
    def is_disputed(self) -> bool:
        """Whether the records of another source give another verdict."""
        return any(label.split(" (")[0] != self.verdict for _, label in self.others)


def check_claim(sources: Sources, claim: Claim, paper: str) -> Verdict:
    """Check one claim against this run, or else the first committed results that have its numbers.

    All numbers of a verdict come from one source, so devices and data sets are never mixed. Sources
    that count multiply-adds without fused attention are the last. The reason also names what each
    other source gives, such as the records of another device.
    """
    missing: list[Missing] = []
    turn = _in_turn(sources, claim)
    for i, results in enumerate(turn):
        values = claim_values(results, claim)
        if not isinstance(values, Missing):
            others = () if is_exact(claim) else _others(turn[i + 1 :], claim)
            return _decided(results, claim, paper, values, others)
        missing.append(values)
    for results, each in zip(turn, missing, strict=True):
        if each.verdict == "not comparable":
            return _not_comparable(results, claim, paper, each.why)
    reasons = dict.fromkeys(each.why for each in missing if not each.is_general)
    here = "" if missing[0].why == NO_RECORD else f"; this run: {missing[0].why}"
    why = "; ".join(reasons) or f"no committed results{here}"
    return _verdict(claim, paper, Outcome("not measured", why))


def _not_comparable(results: Results, claim: Claim, paper: str, why: str) -> Verdict:
    """The verdict from a source whose images stand in for those of the paper, with its numbers."""
    values = claim_values(results, claim, stand_ins=True)
    if isinstance(values, Missing):
        return _verdict(claim, paper, Outcome("not comparable", why))
    outcome = compare(results, claim, values)
    why = ". ".join([why, *_stand_ins(results, claim)])
    here = replace(outcome, verdict="not comparable", why=why, measured=None, detail="")
    return _verdict(claim, paper, here, _source(results, claim, values), _paths(values))


def _paths(values: Sequence[Value]) -> tuple[str, ...]:
    """The records that hold these numbers."""
    return tuple(sorted({str(path) for value in values for path in value.paths}))


def _in_turn(sources: Sources, claim: Claim) -> Sequence[Results]:
    """The sources in the order in which a claim asks them."""
    analysis_id, study_id, row_id, metric = split_ref(claim.of)
    number = quantity(metric)
    if analysis_id or number is None:
        return sources.all
    study = sources.plan.study(study_id)
    return miscounted_last(sources.all, study, study.row(row_id), number)


def _others(sources: Sequence[Results], claim: Claim) -> tuple[tuple[str, str], ...]:
    """(what it gives, its verdict) of each source that has all numbers of a claim."""
    found = []
    for results in sources:
        values = claim_values(results, claim)
        if not isinstance(values, Missing):
            outcome = compare(results, claim, values)
            source = _source(results, claim, values)
            shown = with_noise_and_n(claim, outcome)
            found.append((f"{source[0].upper()}{source[1:]} give {shown}", outcome.label))
    return tuple(found)


def _decided(
    results: Results,
    claim: Claim,
    paper: str,
    values: list[Value],
    others: tuple[tuple[str, str], ...],
) -> Verdict:
    """The verdict from a source that has all numbers."""
    outcome = compare(results, claim, values)
    also = [f"{what}: {label}" for what, label in others]
    notes = [outcome.why, claim.note, *_stand_ins(results, claim), *also]
    return _verdict(
        claim,
        paper,
        replace(outcome, why=". ".join(filter(None, notes))),
        source=_source(results, claim, values),
        records=_paths(values),
        others=others,
    )


def _verdict(
    claim: Claim,
    paper: str,
    outcome: Outcome,
    source: str = "",
    records: tuple[str, ...] = (),
    others: tuple[tuple[str, str], ...] = (),
) -> Verdict:
    return Verdict(
        **vars(outcome),
        id=claim.id,
        paper=paper,
        group=claim.group,
        study=split_ref(claim.of)[1],
        says=claim.says,
        place=claim.place,
        reported=claim.reported,
        unit=units(claim)[1],
        source=source,
        records=records,
        others=others,
        with_noise=with_noise(claim, outcome),
        with_noise_and_n=with_noise_and_n(claim, outcome),
    )


def _source(results: Results, claim: Claim, values: list[Value]) -> str:
    """Origin of a verdict: `counted now`, `this run (...)` or `committed results (...)`."""
    if not any(value.paths for value in values):
        return "computed from printed numbers" if _all_printed(claim) else "counted now"
    scale = f"scale {results.plan.scale.id}"
    if is_exact(claim):  # the same on every device
        return f"counted, committed results ({scale})" if results.is_evidence else "counted now"
    paths = {path for value in values for path in value.paths}
    facts = [scale, *_images(results, claim), *results.devices(paths)]
    kind = "committed results" if results.is_evidence else "this run"
    return f"{kind} ({', '.join(facts)})"


def _all_printed(claim: Claim) -> bool:
    numbers = [quantity(split_ref(ref)[3]) for ref in (claim.of, claim.to) if ref]
    return all(number is not None and number.reported for number in numbers)


def _images(results: Results, claim: Claim) -> list[str]:
    """The images that the compared models were trained on; none for counts and times."""
    found: dict[str, None] = {}
    for ref in filter(None, (claim.of, claim.to)):
        analysis_id, study_id, row_id, metric = split_ref(ref)
        number = quantity(metric)
        study = results.plan.study(study_id)
        if analysis_id or (number and number.is_trained and study.trained):
            runs = results.plan.runs_of(study, study.row(row_id))
            found |= dict.fromkeys(run.dataset.title for run in runs)
    return list(found)


def _stand_ins(results: Results, claim: Claim) -> list[str]:
    """Notes on the models that the scale trains or times in place of the models of the claim."""
    models, named = results.plan.scale.models, set()
    for ref in filter(None, (claim.of, claim.to)):
        analysis_id, study_id, row_id, metric = split_ref(ref)
        number = quantity(metric)
        stand_in = models.get(str(results.plan.study(study_id).row(row_id).model))
        trained = bool(analysis_id) or (number is not None and number.is_trained)
        if stand_in and (trained or stand_in.measured) and not (number and number.reported):
            named.add(str(results.plan.study(study_id).row(row_id).model))
    return [f"{models[name].model} stands in for {name}" for name in sorted(named)]


@lru_cache(maxsize=1)  # the claims, the page and the paper of one report check the same sources
def check_all(sources: Sources) -> tuple[Verdict, ...]:
    """Check every claim in config, paper by paper."""
    papers = list(NAMES)
    files = sorted(sources.plan.config.claims.values(), key=lambda file: papers.index(file.paper))
    return tuple(check_claim(sources, claim, file.paper) for file in files for claim in file.claims)


def counts(verdicts: Sequence[Verdict], group: ClaimGroup = "paper") -> dict[str, int]:
    """The number of each verdict in a group, in the order of VERDICTS or ERRATA."""
    found = [verdict.verdict for verdict in verdicts if verdict.group == group]
    names = VERDICTS if group != "errata" else (*ERRATA, "not measured")
    return {name: found.count(name) for name in names}


def tally(verdicts: Sequence[Verdict]) -> str:
    """The number of each verdict in one line, group by group."""
    parts = []
    for group, title in GROUPS.items():
        number = sum(counts(verdicts, group).values())
        parts.append(f"{number} {title}: {tally_of(verdicts, group)}")
    return "; ".join(parts)


def tally_of(verdicts: Sequence[Verdict], group: ClaimGroup) -> str:
    """The number of each verdict in one group; `none` if it is empty."""
    found = [(n, name) for name, n in counts(verdicts, group).items() if n]
    words = [f"{n} {'errata' if name == 'erratum' and n > 1 else name}" for n, name in found]
    return ", ".join(words) or "none"


def reported_numbers(config: Config) -> dict[str, str]:
    """Every number that config states as reported by a paper, by its reference."""
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
    """Accept the current verdicts: write `results/verdicts.json`."""
    verdicts = {v.id: v.label for v in check_all(load_sources(plan, root))}
    write_json(root / ACCEPTED, {"reported": reported_numbers(plan.config), "verdicts": verdicts})


def check_accepted(plan: Plan, root: Path = Path()) -> list[str]:
    """List every verdict and every reported number that differs from the accepted one.

    Raises:
        HovitError: if `results/verdicts.json` is missing or not readable.
    """
    accepted = read_json(root / ACCEPTED)
    found = {
        "reported": reported_numbers(plan.config),
        "verdicts": {v.id: v.label for v in check_all(load_sources(plan, root))},
    }
    if any(not isinstance(accepted.get(part), dict) for part in found):
        raise HovitError(f"{root / ACCEPTED}: not a file that `hovit claims --accept` writes")
    return [
        f"{name}: {now.get(name, 'missing')}; accepted: {accepted[part].get(name, 'nothing')}"
        for part, now in found.items()
        for name in sorted(now | accepted[part])
        if now.get(name) != accepted[part].get(name)
    ]
