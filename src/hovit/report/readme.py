"""Findings, results, checklist and thumbnails in Markdown, from the committed records alone."""

from io import BytesIO
from pathlib import Path
from string import Formatter

from ..config.plan import Plan
from ..config.runs import Run
from ..config.schema import Claim
from ..records.evidence import slug
from ..records.record import Record, read_record
from ..utils.errors import HovitError
from ..utils.files import atomic, write_text
from ..utils.generated import around
from .abbreviations import spelled_out
from .claims.check import Verdict, check_all, check_claim, tally
from .claims.compare import Missing, against, claim_values
from .figures import thumbnails
from .number import significant
from .order import NAMES
from .results import Value
from .sources import Sources, load_sources

README, ARTIFACT, PICTURE = Path("README.md"), Path("ARTIFACT.md"), Path("paper/front.png")
COMMAND = "hovit readme"
# Claims of general interest. results/claims.md has all of them.
HEADLINES = (
    "hovit-fewer-parameters",
    "hovit-fewer-live-parameters",
    "hovit-faster-size-b32",
    "hovit-accuracy",
    "hovit-more-accurate-than-levit-256",
    "launcher-keeps-class-information",
    "levit-jaccard-slower-b32",
    "levit-euclidean-slower-b32",
    "swin-jaccard-more-accurate",
    "skipvit-gain-d6-55-r11",
    "skipvit-keeps-d6-55-r11",
    "skipvit-fused-loses",
    "efficientvit-m5-mobilenetv3-large-cpu",
    "efficientvit-m5-efficientnet-b0-cpu",
    "efficientvit-m5-efficientnet-b0-allocator",
    "efficientvit-ablation-mhsa",
)
# What to know before a claim is checked again.
REMARKS = dict.fromkeys(
    ("levit-jaccard-slower-b32", "levit-euclidean-slower-b32"),
    "; the record is from commit 873d407, which uses matrix products: measure at that commit, "
    "because later code runs a fused kernel on a GPU",
)
# `{CLAIM}` is the measured number of a claim with its noise, `{CLAIM:printed}` that of the paper,
# `{CLAIM:n}` the number of rounds or random seeds, and `{CLAIM:verdict}` the verdict with them.
FINDINGS = (
    "**HoViT's size and speed reproduce, but its baseline has unused weights.** HoViT has "
    "{hovit-fewer-parameters} fewer parameters than the LeViT of the deck (printed: "
    "{hovit-fewer-parameters:printed}). It takes {hovit-faster-size-b32} less time at batch 32 and "
    "{hovit-faster-size-b1} at batch 1 (printed: {hovit-faster-size-b32:printed}; "
    "{hovit-faster-size-b32:n}). Kernel launches, not arithmetic, set these times: LeViT takes "
    "{levit-32-images-as-one} as long for 32 images as for one. At batch 256, HoViT takes "
    "{hovit-faster-size-b256} less time ({hovit-faster-size-b256:n}). A fifth of the "
    "weights of that LeViT are never used: of the parameters that an output depends on, HoViT "
    "saves {hovit-fewer-live-parameters}. Against a LeViT that uses all its weights, it takes "
    "{hovit-faster-than-fixed-b256} less time at batch 256.",
    "**The slowdown of Jaccard and Euclidean attention depends on implementation and device.** "
    "At batch 32 on a GPU, LeViT with Jaccard attention takes {levit-jaccard-slower-b32} as long "
    "as LeViT (printed: {levit-jaccard-slower-b32:printed}) with matrix products, and "
    "{levit-minmax-slower} as a sum of minima divided by a sum of maxima (added here). "
    "Euclidean attention takes {levit-euclidean-slower-b32} (printed: "
    "{levit-euclidean-slower-b32:printed}; {levit-euclidean-slower-b32:n}). On a CPU, in blocks "
    "that fit the cache, they take {levit-jaccard-slower-cpu} and {levit-euclidean-slower-cpu} "
    "({levit-jaccard-slower-cpu:n}).",
    "**SkipViT's speed-up is larger than reported.** With the schedule "
    "`6(55%)+11` (layer 6 drops 55 % of the patches, which return before layer 11), training is "
    "{skipvit-gain-d6-55-r11} as fast as that of ViT-S without dropping (printed: "
    "{skipvit-gain-d6-55-r11:printed}; {skipvit-gain-d6-55-r11:n}).",
    "**The speed of EfficientViT-M5 depends on the device.** Its throughput over that of "
    "MobileNetV3-Large is {efficientvit-m5-mobilenetv3-large-cpu} on a CPU (printed: "
    "{efficientvit-m5-mobilenetv3-large-cpu:printed}; {efficientvit-m5-mobilenetv3-large-cpu:n}) "
    "and {efficientvit-m5-mobilenetv3-large-gpu} on a GPU (printed: "
    "{efficientvit-m5-mobilenetv3-large-gpu:printed}; {efficientvit-m5-mobilenetv3-large-gpu:n}). "
    "On the CPU, the process keeps freed memory; with the default allocator of glibc, the ratio is "
    "{efficientvit-m5-mobilenetv3-large-allocator}. Relative to EfficientNet-B0, it is "
    "{efficientvit-m5-efficientnet-b0-cpu} with memory kept and "
    "{efficientvit-m5-efficientnet-b0-allocator} with that allocator (printed: "
    "{efficientvit-m5-efficientnet-b0-cpu:printed}).",
    "**The Launcher can lose class information; how much depends on the backbone and the front.** "
    "Each comparison is with a linear head on the same front, over the random seeds that both "
    "models have. On pet photographs (156 test images for each seed; 90 of them show three of the "
    "37 breeds, and a model that always predicts one of these has a top-1 of 19.2 %), "
    "behind a frozen EfficientNet-Lite0 with ImageNet weights, L_HoViT has a top-1 of "
    "{imagenet-l-hovit-frozen-keeps-frozen} ({imagenet-l-hovit-frozen-keeps-frozen:verdict}), "
    "L_LeViT (as published) {imagenet-l-levit-deck-frozen-keeps-frozen} "
    "({imagenet-l-levit-deck-frozen-keeps-frozen:verdict}), "
    "L_LeViT (fixed) {imagenet-l-levit-deck-fixed-frozen-keeps-frozen} "
    "({imagenet-l-levit-deck-fixed-frozen-keeps-frozen:verdict}), and L_LeViT-256 (from timm) "
    "{imagenet-l-levit-256-frozen-keeps-frozen} "
    "({imagenet-l-levit-256-frozen-keeps-frozen:verdict}); the table `launcher_imagenet` has the "
    "other backbones. With that front trained as well, as in "
    "the deck, L_LeViT has {imagenet-l-levit-deck-keeps} ({imagenet-l-levit-deck-keeps:verdict}), "
    "and L_HoViT {imagenet-l-hovit-keeps} ({imagenet-l-hovit-keeps:verdict}). On "
    "Tiny-ImageNet-37, behind a ResNet50 that was pretrained on Tiny ImageNet at 64 px, L_LeViT "
    "has {launcher-keeps-class-information} ({launcher-keeps-class-information:verdict}).",
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


class _Number:
    """A claim's number in a finding; the format is `printed`, `n`, `verdict` or empty."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def __format__(self, spec: str) -> str:
        v = self.verdict
        if spec == "printed":
            return f"{v.reported} {v.unit}".strip()
        if spec == "n":
            return v.n
        if spec == "verdict":
            n = "" if v.verdict == "provisional" else v.n  # its label says that there is one seed
            return ", ".join(filter(None, (v.label, n)))
        return v.with_noise or "(not measured)"


def findings(sources: Sources) -> list[tuple[str, tuple[str, ...], str]]:
    """(Markdown text, its claims, sources of its numbers) of each finding."""
    claims = _claims(sources.plan)
    found = []
    for text in FINDINGS:
        names = dict.fromkeys(name for _, name, _, _ in Formatter().parse(text) if name)
        if not set(names) <= set(claims):  # a config without these claims
            continue
        verdicts = {name: check_claim(sources, *claims[name]) for name in names}
        filled = text.format_map({name: _Number(v) for name, v in verdicts.items()})
        where = "; ".join(dict.fromkeys(v.source for v in verdicts.values() if v.source))
        found.append((filled, tuple(names), where))
    return found


def findings_section(sources: Sources) -> str:
    """The findings as a numbered list, with the sources of the numbers of each."""
    lines = [
        f"{number}. {text} <sub>{where}</sub>"
        for number, (text, _, where) in enumerate(findings(sources), start=1)
    ]
    return "\n".join(["", *lines, ""])


def results_section(sources: Sources) -> str:
    """The table with the source of each number, and the picture with its caption, as Markdown."""
    claims = _claims(sources.plan)
    verdicts = [check_claim(sources, *claims[name]) for name in HEADLINES]
    every = check_all(sources)
    disputed = sum(verdict.is_disputed for verdict in every if verdict.group == "paper")
    lines = [
        "| | statement | printed | measured | noise (n) | verdict | from |",
        "| :-- | :-- | --: | --: | :-- | :-- | :-- |",
        *(_line(verdict) for verdict in verdicts),
    ]
    return "\n".join(
        [
            "",
            *lines,
            "",
            "*Added here* marks a statement that no paper makes. "
            + (f"{meanings}. " if (meanings := spelled_out(v.says for v in verdicts)) else "")
            + "The noise of a time is half the "
            "interquartile range of the ratios over rounds; the rounds of one process vary less "
            "than separate processes do (`bench/allocator.py`). The noise of an accuracy is half "
            "of a 95 % interval over random seeds and test images. Accuracies are test "
            "top-1 on stand-in images at small size with few epochs, so their verdicts hold for "
            "these images only.",
            "",
            f"These are {len(HEADLINES)} statements of general interest. `results/claims.md` lists "
            f"and explains all claims: {tally(every)}. For {disputed} claims of the papers, "
            "committed records of another device or scale give another verdict; "
            "`results/claims.md` names both.",
            "",
            f"![Ratios in the papers and measured ratios, with half the interquartile range "
            f"over rounds]({PICTURE})",
            "",
        ]
    )


def _line(v: Verdict) -> str:
    says = v.says + " (*added here*)" * (v.group == "own")
    noise = f"± {significant(v.noise)} {v.unit} ({v.n})" if v.noise else ""
    return (
        f"| {NAMES[v.paper]} | {says} | {v.reported or ''} | {v.shown or '—'} | {noise} "
        f"| {v.label} | {v.source or v.why} |"
    )


def checklist_section(sources: Sources) -> str:
    """The headlines as a table for reviewers: expected value, tolerance, command and minutes."""
    claims = _claims(sources.plan)
    verdicts = [check_claim(sources, *claims[name]) for name in HEADLINES]
    lines = [
        "| claim | table | printed | expected | equal if within | command | minutes |",
        "| :-- | :-- | --: | --: | :-- | :-- | --: |",
        *(_check_line(sources, v) for v in verdicts if v.records),
    ]
    return "\n".join(["", *lines, ""])


def _check_line(sources: Sources, v: Verdict) -> str:
    records = [read_record(sources.run.root / path) for path in v.records]
    first = records[0]
    counted = v.source.startswith("counted")
    if counted:
        command = f"`make table T={v.study}`"
    elif first.kind == "measure":
        command = f"`hovit measure {v.study} --scale {first.scale}`"
    else:
        trainings = _trainings(sources, records)
        records = [record for _, record in trainings]
        command = _commands([run for run, _ in trainings])
    equal = f"± {significant(v.margin)} {v.unit}" if v.margin else "exact"
    if v.noise:
        equal += f" (noise: {significant(v.noise)})"
    minutes = sum(record.provenance.seconds for record in records) / 60
    rounded = f"{minutes:.0f}" if minutes >= 0.5 else "< 1"
    taken = "1" if counted else f"{rounded} ({first.provenance.device.name})"
    says = v.says + REMARKS.get(v.id, "")
    return (
        f"| {says} (`{v.id}`) | `{v.study}` | {v.reported or ''} | {v.shown} | {equal} "
        f"| {command} | {taken} |"
    )


def _trainings(sources: Sources, records: list[Record]) -> list[tuple[Run, Record]]:
    """The runs of these records, after the runs that they start from, each with its record."""
    found: dict[tuple[str, int], tuple[Run, Record]] = {}
    for record in records:
        results = next(
            r for r in sources.evidence
            if r.plan.scale.id == record.scale and r.base.name == slug(record.provenance.device)
        )  # fmt: skip
        run = results.plan.run(record.id, record.spec["seed"])
        upstream = results.plan.upstream(run)
        if upstream and (before := results.record(results.plan.train_task(upstream))):
            found[upstream.id, upstream.seed] = upstream, before
        found[run.id, run.seed] = run, record
    return list(found.values())


def _commands(runs: list[Run]) -> str:
    """The commands that pack the images and train each run, with its random seeds."""
    packs = dict.fromkeys(run.pack.id for run in runs)
    commands = [f"`hovit data {pack} --data-root DATA`" for pack in packs]
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.id, []).append(str(run.seed))
    for name, of in seeds.items():
        command = f"`hovit train {name} --scale {runs[0].scale} --seed {of[0]}`"
        commands.append(command + (f" (and {', '.join(of[1:])})" if of[1:] else ""))
    return "<br>".join(commands)


PARTS = {
    "findings": (README, findings_section),
    "results": (README, results_section),
    "checklist": (ARTIFACT, checklist_section),
    "figures": (thumbnails.README, thumbnails.figures_section),
}


def write_readme(plan: Plan, root: Path = Path()) -> None:
    """Write the parts of each file between their marks, README's picture and the thumbnails.

    Raises:
        HovitError: if a part is missing, or there are no committed records.
    """
    texts = {file: (root / file).read_text(encoding="utf-8") for file, _ in PARTS.values()}
    for part, (file, _) in PARTS.items():
        around(texts[file], part, COMMAND, root / file)  # before anything is computed
    sources = evidence_alone(plan, root)
    for part, (file, section) in PARTS.items():
        before, after = around(texts[file], part, COMMAND, root / file)
        texts[file] = before + section(sources) + after
    with atomic(root / PICTURE) as path:
        path.write_bytes(picture(sources))
    thumbnails.write_thumbnails(sources, root)
    for file, text in texts.items():
        write_text(root / file, text)


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
        note = "committed evidence; error bars: ± half the interquartile range over rounds"
        canvas.supxlabel(note, fontsize=5.5, color="#555555")
        style.fix_layout(canvas)
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
            (device,) = results.devices(values[0].paths)
            return values[0], values[1], device
    return None


def evidence_alone(plan: Plan, root: Path) -> Sources:
    """The committed evidence alone.

    Raises:
        HovitError: if there is none.
    """
    sources = load_sources(plan, root)
    if not sources.evidence:
        raise HovitError(f"{root / 'results/evidence'}: no evidence for README's table of results")
    return sources.evidence_alone()


def _claims(plan: Plan) -> dict[str, tuple[Claim, str]]:
    files = plan.config.claims.values()
    return {claim.id: (claim, file.paper) for file in files for claim in file.claims}
