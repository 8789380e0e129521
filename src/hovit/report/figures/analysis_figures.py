"""Figures on EfficientViT's motivating studies, with the paper's own points."""

from typing import TYPE_CHECKING, Any

from ...config.schema import Study
from ..results import Results
from .common import TOP1_BARS, say_unmeasured, source_name, state

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FAMILIES = {"swin": "Swin", "deit": "DeiT"}
SHARES = (0, 20, 40, 50, 60, 80, 100)
# Operator classes: grey fills are bound by compute, hatches by memory.
COMPUTE_FILLS = ("0.35", "0.6", "0.8")
MEMORY_HATCHES = ("////", "....", "xxxx", "----", "||||", "++++")
PARTS = {"qk_ratio": "Q and K", "v_ratio": "V", "ffn_ratio": "FFN"}


def mhsa_share(results: Results) -> "Canvas":
    """Accuracy by the share of attention layers: reported above, measured below."""
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("mhsa_share")
    canvas, axes = plt.subplots(2, 2, figsize=(style.WIDTH * 0.8, 3.6), sharex=True)
    for column, (name, title) in zip(axes.T, FAMILIES.items(), strict=True):
        for ax, metric, i in ((column[0], "reported_top1", 1), (column[1], "top1", 0)):
            points = [
                (share, value)
                for share in SHARES
                if (value := results.value(study, study.row(f"{name}_{share}"), metric))
            ]
            if points:
                at, values = zip(*points, strict=True)
                noise = [v.noise for v in values] if metric == "top1" else None
                ax.errorbar(at, [v.mean for v in values], noise, capsize=2, **style.look(i))
            ax.axvspan(20, 40, color="#DDDDDD", alpha=0.5, linewidth=0)
        column[0].set_title(f"{title}-1.25×")
        column[1].set_xlabel("Attention layers, %")
    axes[0][0].set_ylabel("Top-1, %\npaper, ImageNet")
    axes[1][0].set_ylabel(f"Top-1, %\n{source_name(results, study)}")
    state(canvas, results, [study], [TOP1_BARS])
    return canvas


def head_similarity(results: Results) -> "Canvas":
    """Largest similarity between heads of each block, for whole features and head splits."""
    import matplotlib.pyplot as plt

    from . import style

    study, found, published = _of(results, "head_similarity")
    source = source_name(results, study)
    canvas, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 2.8), sharey=True)
    for ax, (name, title) in zip(axes, FAMILIES.items(), strict=True):
        for i, (row, label) in enumerate((("50", "whole features"), ("splits", "head splits"))):
            ref = f"mhsa_share/{name}_{row}"
            look = {"color": style.COLOURS[i], "marker": style.MARKERS[i]}
            if ref in found:
                blocks = found[ref]["blocks"]
                ax.plot([b["block"] for b in blocks], [b["similarity"] for b in blocks],
                        linestyle="-", label=f"{source}: {label}", **look)  # fmt: skip
            ax.plot(range(1, len(published[ref]) + 1), published[ref], linestyle=":",
                    markerfacecolor="none", label=f"paper: {label}", **look)  # fmt: skip
        ax.set_title(f"{title}-1.25×")
        ax.set_xlabel("Block")
    axes[0].set_ylabel("Largest cosine similarity, %")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=4)
    state(canvas, results, [study])
    return canvas


def taylor_pruning(results: Results) -> "Canvas":
    """Channels relative to the width of the block, before and after pruning."""
    import matplotlib.pyplot as plt

    from . import style

    study, found, published = _of(results, "taylor_pruning")
    source = source_name(results, study)
    canvas, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 2.6))
    for ax, (part, title) in zip(axes, PARTS.items(), strict=True):
        for i, (name, family) in enumerate(FAMILIES.items()):
            blocks = found.get(f"mhsa_share/{name}", {}).get("blocks", [])
            ax.plot([b["block"] for b in blocks], [b[part] for b in blocks],
                    label=f"{source}: {family}-T", **style.look(2 * i))  # fmt: skip
        ax.plot(range(1, len(published[part]) + 1), published[part],
                label="paper: Swin-T", **style.look(1))  # fmt: skip
        ax.axhline(4 if part == "ffn_ratio" else 1, color="black", linewidth=0.8)
        ax.set_ylim(bottom=0)
        ax.set_xticks(range(2, 13, 2))
        ax.set_title(title)
        ax.set_xlabel("Block")
    axes[0].set_ylabel("Channels kept, × width")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=3)
    state(canvas, results, [study])
    return canvas


def runtime_breakdown(results: Results) -> "Canvas":
    """Run time by class of operator, compute-bound classes first."""
    import matplotlib.pyplot as plt

    from . import style

    study, found, published = _of(results, "runtime_breakdown")
    canvas, ax = plt.subplots(figsize=(style.WIDTH * 0.8, 2.8))
    if not found:
        say_unmeasured(ax)
    left = [0.0] * len(found)
    groups = [(r["class"], r["memory_bound"]) for r in next(iter(found.values()))["classes"]] \
        if found else []  # fmt: skip
    fills, hatches = iter(COMPUTE_FILLS), iter(MEMORY_HATCHES)
    for group, bound in groups:
        shares = [_share(row, group) for row in found.values()]
        fill, hatch = ("white", next(hatches)) if bound else (next(fills), "")
        ax.barh(range(len(found)), shares, left=left, label=group, height=0.7, color=fill,
                hatch=hatch, edgecolor="black", linewidth=0.5)  # fmt: skip
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for i, ref in enumerate(found):
        for share in published.get(ref, ()):
            ax.plot([100 - share] * 2, [i - 0.45, i + 0.45], color=style.REPORTED, linewidth=2.5,
                    marker="", label=f"paper: {share} % bound by memory")  # fmt: skip
    names = [study.row(ref.split("/")[1]).label for ref in found]
    ax.set_yticks(range(len(found)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    record = results.analysis("runtime_breakdown")
    where = f"; timed on {record.provenance.device}" if record else ""
    ax.set_xlabel(f"Run time, % (hatched: bound by memory{where})")
    canvas.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    state(canvas, results, [study])
    return canvas


def _share(row: dict[str, Any], group: str) -> float:
    return next(float(r["share"]) for r in row["classes"] if r["class"] == group)


def _of(results: Results, analysis: str) -> tuple[Study, dict[str, Any], dict[str, Any]]:
    """(study of the rows, results by row, numbers of the paper)."""
    published: dict[str, Any] = dict(results.plan.analysis(analysis).published)
    return (
        results.plan.study("mhsa_share"),
        results.analysed_rows(analysis),
        published,
    )
