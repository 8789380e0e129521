"""`results/claims.md` and `results/claims.json`: every claim with its verdict."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ...config.plan import Plan
from ...utils.files import write_json, write_text
from ..order import PAPERS, in_order, paper_of
from ..sources import Sources, load_sources
from ..tables.columns import format_printed
from .check import GROUPS, Verdict, check_all, counts, tally, tally_of
from .coverage import coverage, coverage_lines, coverage_tally

ABOUT = """\
- **reproduced**: the number is within the tolerance of the reported one; a claim without a number
  has the reported direction, by more than the noise.
- **direction only**: in the reported direction, but the effect is larger or smaller.
- **provisional**: beyond the noise, but with only one random seed. The verdict that this seed
  suggests follows.
- **within noise**: the effect here is not larger than the noise, or the number is as close to the
  reported one as the noise allows.
- **contradicted**: in the opposite direction; or an effect where the paper reports none; or another
  number where the claim is the number itself, or a count.
- **not comparable**: a reported accuracy, or an analysis of a trained model, on images that stand
  in for those of the paper. Comparisons of two models on such images are judged.
- **not measured**: there is no record; the reason is stated.

Noise is half of a 95 % interval over random seeds and test images (accuracy and loss), or half the
interquartile range of the ratios over rounds (times). The variance over seeds is pooled over
models with the same recipe and images (of this run: in the same study). The noise of a time is
that of one record; separate processes differ more (`bench/allocator.py`). If other committed
results have the numbers of a claim, such as those of another device, the reason also states what
they give. Models that were tested on the same images are compared image by image. The p of the
exact McNemar test refers to these trained models alone; the noise also contains other seeds. Times
are compared only by ratio and rank, because the device differs from that of the paper."""


def write_claims(plan: Plan, root: Path = Path()) -> str:
    """Write `results/claims.json` and `.md`; return the tally."""
    return write_claims_from(load_sources(plan, root), root)


def write_claims_from(sources: Sources, root: Path = Path()) -> str:
    """As `write_claims`, from sources that are read already."""
    plan, verdicts = sources.plan, check_all(sources)
    rest = coverage(sources)
    scale = {"id": plan.scale.id, "title": plan.scale.title}
    claims = [asdict(verdict) | {"label": verdict.label} for verdict in verdicts]
    content = {"scale": scale, "tally": tally(verdicts), "claims": claims, **rest}
    write_json(root / "results/claims.json", content)
    lines = [
        "# Claims of the papers, checked against records",
        "",
        f"This run: scale `{plan.scale.id}` ({plan.scale.title}).",
        "",
        *_summary(verdicts),
        "",
        ABOUT,
        "",
    ]
    for group, heading in (("paper", ""), ("own", "Checks added here: "), ("errata", "Errata: ")):
        found = [verdict for verdict in verdicts if verdict.group == group]
        lines += _sections(plan, found, heading, by_study=group == "paper")
    lines += coverage_lines(rest, [v.paper for v in verdicts if v.group == "paper"])
    write_text(root / "results/claims.md", "\n".join([*lines, ""]))
    return f"{tally(verdicts)}\n{coverage_tally(rest)}"


def _summary(verdicts: Sequence[Verdict]) -> list[str]:
    """The number of each verdict, one line for each group."""
    return [
        f"- **{sum(counts(verdicts, group).values())} {title}**: {tally_of(verdicts, group)}."
        for group, title in GROUPS.items()
    ]


def _sections(plan: Plan, verdicts: Sequence[Verdict], heading: str, by_study: bool) -> list[str]:
    """The verdicts of one group: a section for each paper, and for claims one for each study."""
    lines: list[str] = []
    studies = in_order(plan.config.studies.values())
    for paper, title in PAPERS.items():
        own = [study for study in studies if paper_of(study) == paper]
        found = [(study, [v for v in verdicts if v.study == study.id]) for study in own]
        found = [(study, some) for study, some in found if some]
        if not found:
            continue
        lines += [f"## {heading}{title}", ""]
        for study, some in found:
            link = f"[`{study.id}`](tables/{study.id}.md)"
            lines += [f"### {study.title} ({link})", ""] if by_study else []
            lines += [line for verdict in some for line in verdict_lines(verdict)]
            lines += [""] if by_study else []
        lines += [] if by_study else [""]
    return lines


def verdict_lines(verdict: Verdict) -> list[str]:
    """One verdict as a list item: the sentence, the numbers and their origin."""
    numbers = []
    if verdict.reported:
        numbers.append(f"reported {format_printed(verdict.reported)} {verdict.unit}".strip())
    if verdict.shown:
        how = "computed" if verdict.group == "errata" else "measured"
        numbers.append(f"{how} {verdict.with_noise_and_n}")
    place = f"place: {verdict.place.rstrip('.')}"
    facts = [", ".join(numbers), verdict.source, verdict.why, place]
    text = ". ".join(fact[:1].upper() + fact[1:] for fact in facts if fact)
    return [f"- **{verdict.label}** `{verdict.id}`: {verdict.says}.", f"  {text}."]
