"""README's table and figure of results, from the committed evidence alone."""

from io import BytesIO
from pathlib import Path

from ..config.plan import Plan
from ..config.schema import Claim
from ..utils.errors import HovitError
from ..utils.files import atomic, write_text
from .claims.check import Verdict, check_claim
from .claims.compare import Missing, against, claim_values
from .results import Results, Value
from .sources import Sources, load_sources

README, PICTURE = Path("README.md"), Path("paper/front.png")
BEGIN, END = "<!-- results: made by `hovit readme` -->\n", "<!-- end of results -->\n"
SYSTEMS = {"hovit": "HoViT", "skipvit": "SkipViT", "efficientvit": "EfficientViT"}
# Claims of general interest. results/claims.md has all of them.
HEADLINES = (
    "hovit-fewer-parameters",
    "hovit-fewer-live-parameters",
    "hovit-faster-size-b32",
    "hovit-accuracy",
    "launcher-keeps-class-information",
    "levit-jaccard-slower-b32",
    "levit-euclidean-slower-b32",
    "swin-jaccard-more-accurate",
    "skipvit-gain-d6-55-r11",
    "skipvit-keeps-d6-55-r11",
    "skipvit-fused-loses",
    "efficientvit-m5-mobilenetv3-large-cpu",
    "efficientvit-m5-efficientnet-b0-cpu",
    "efficientvit-ablation-mhsa",
)
# Of the picture: claims whose number is a ratio or a reduction in per cent.
DRAWN = {
    "hovit-faster-size-b32": "HoViT over LeViT, time",
    "levit-jaccard-slower-b32": "LeViT + Jaccard over LeViT, time",
    "levit-euclidean-slower-b32": "LeViT + Euclidean over LeViT, time",
    "swin-jaccard-as-fast-b32": "Swin + Jaccard over Swin, time",
    "skipvit-gain-fused": "SkipViT 6(45%)+fused token over ViT, throughput",
    "skipvit-gain-d6-45-r11": "SkipViT 6(45%)+11 over ViT, throughput",
    "skipvit-gain-d6-55-r11": "SkipViT 6(55%)+11 over ViT, throughput",
    "efficientvit-m5-mobilenetv3-large-cpu": "EfficientViT-M5 over MobileNetV3-L, throughput",
    "efficientvit-m2-mobilevit-xxs-cpu": "EfficientViT-M2 over MobileViT-XXS, throughput",
    "efficientvit-m5-efficientnet-b0-cpu": "EfficientViT-M5 over EfficientNet-B0, throughput",
}


def write_readme(plan: Plan, root: Path = Path()) -> None:
    """Write README's part between its two marks, and the picture that it shows.

    Raises:
        HovitError: if README has no such part, or there is no evidence.
    """
    text = (root / README).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise HovitError(f"{root / README}: needs the lines {BEGIN.strip()} and {END.strip()} once")
    sources = _evidence_alone(plan, root)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with atomic(root / PICTURE) as path:
        path.write_bytes(picture(sources))
    write_text(root / README, before + BEGIN + results_section(sources) + END + after)


def results_section(sources: Sources) -> str:
    """The table with the source of each number, and the picture with its caption, as Markdown."""
    claims = _claims(sources.plan)
    verdicts = [check_claim(sources, *claims[name]) for name in HEADLINES]
    lines = [
        "| | statement | printed | measured | verdict | from |",
        "| :-- | :-- | --: | --: | :-- | :-- |",
        *(_line(verdict) for verdict in verdicts),
    ]
    return "\n".join(
        [
            "",
            *lines,
            "",
            "*Our check* marks a statement that no paper makes. Accuracies are test top-1 on "
            "stand-in images at small size with few epochs, so their verdicts hold for these "
            "images only. `results/claims.md` has all claims, and explains the verdicts.",
            "",
            f"![Ratios in the papers and measured ratios, with the inter-quartile range over "
            f"rounds]({PICTURE})",
            "",
        ]
    )


def _line(v: Verdict) -> str:
    says = v.says + " (*our check*)" * (v.group == "own")
    return (
        f"| {SYSTEMS[v.seed]} | {says} | {v.reported or ''} | {v.shown or '—'} | {v.label} "
        f"| {v.source or v.why} |"
    )


def picture(sources: Sources) -> bytes:
    """Each ratio that a paper prints, with the measured ratio, as PNG."""
    import matplotlib.pyplot as plt

    from .figures import style

    claims = _claims(sources.plan)
    content = BytesIO()
    with plt.rc_context(style.RC):
        canvas, ax = plt.subplots(figsize=(style.WIDTH, 0.26 * len(DRAWN) + 0.8))
        titles = []
        for y, (name, title) in enumerate(DRAWN.items()):
            claim = claims[name][0]
            printed = _ratio(claim, float(claim.reported or "nan"))
            ax.plot(printed, y, "o", mfc="white", mec=style.REPORTED, ms=6, label="paper")
            sides = _sides(sources, claim)
            titles.append(f"{title} ({sides[2]})" if sides else title)
            if sides:
                number, noise = against("ratio", *sides[:2])
                ax.plot([printed, number], [y, y], "-", color="#999999", marker="", lw=0.8)
                ax.errorbar(
                    number, y, xerr=noise, fmt="D", color=style.OURS, ms=4, label="measured"
                )
        ax.axvline(1, color="black", linewidth=0.6)
        ax.set_xscale("log")
        ax.set_xticks([0.5, 0.7, 1, 1.5, 2, 3, 5], ["0.5", "0.7", "1", "1.5", "2", "3", "5"])
        ax.xaxis.set_minor_locator(plt.NullLocator())
        ax.set_yticks(range(len(DRAWN)), titles)
        ax.invert_yaxis()
        ax.set_xlabel("ratio")
        handles, labels = ax.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        ax.legend(unique.values(), unique.keys(), loc="lower right")
        note = "committed evidence; error bars: inter-quartile range over rounds"
        canvas.supxlabel(note, fontsize=5.5, color="#555555")
        canvas.savefig(content, format="png", metadata={"Software": None})
        plt.close(canvas)
    return content.getvalue()


def _ratio(claim: Claim, number: float) -> float:
    """A claim's number as a ratio; a reduction in percent becomes the remaining ratio."""
    return 1 - number / 100 if claim.kind == "reduction" else number


def _sides(sources: Sources, claim: Claim) -> tuple[Value, Value, str] | None:
    """Both sides of a claim and their device, by the first evidence that has them."""
    for results in sources.evidence:
        values = claim_values(results, claim)
        if not isinstance(values, Missing) and len(values) == 2:
            return values[0], values[1], results.base.name
    return None


def _evidence_alone(plan: Plan, root: Path) -> Sources:
    """The committed evidence, without this run."""
    sources = load_sources(plan, root)
    if not sources.evidence:
        raise HovitError(f"{root / 'results/evidence'}: no evidence for README's table of results")
    nothing = Results(plan, root, Path("results/no-run"))
    return Sources(nothing, sources.evidence)


def _claims(plan: Plan) -> dict[str, tuple[Claim, str]]:
    files = plan.config.claims.values()
    return {claim.id: (claim, file.seed) for file in files for claim in file.claims}
