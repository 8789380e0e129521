"""Figures on attention variants: training curves, latency, and growth with the number of tokens."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.schema import Row, Study
from ..results import Results
from ..tables.columns import baseline_ratio
from .common import (
    RATIO_BARS,
    curve,
    photograph,
    photographs,
    ratio_error,
    say_unmeasured,
    source_name,
    state,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

LOSSES = {"train_loss": "training", "val_loss": "validation"}
LENGTH_FORMS = {"dot": "dot product (SDPA)", "jaccard": "Jaccard", "focused": "focused",
                "gated": "gated, chunks"}  # fmt: skip


def attention_curves(results: Results) -> "Canvas":
    """Training and validation loss of every attention variant, in LeViT and in Swin."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from . import style

    studies = [results.plan.study(name) for name in ("levit_attention", "swin_similarity")]
    cells = [(study, _rows(results, study)) for study in studies]
    cells = [(s, [r for r in rows if results.trained(s, r)] or rows) for s, rows in cells]
    lines = [(s, rows[i : i + 4]) for s, rows in cells for i in range(0, len(rows), 4)]
    canvas, axes = plt.subplots(
        len(lines), 4, figsize=(style.WIDTH, 1.7 * len(lines)), sharex=True, squeeze=False
    )
    first = {study.id: line[0] for (study, _), line in zip(lines[::-1], axes[::-1], strict=True)}
    for (study, rows), line in zip(lines, axes, strict=True):
        for ax, row in zip(line, rows, strict=False):
            for i, (key, name) in enumerate(LOSSES.items()):
                curve(ax, results, study, row, key, name, style.look(i))
            ax.set_title(row.label, fontsize=style.SMALL)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.sharey(first[study.id])
        for ax in line[len(rows) :]:
            ax.set_visible(False)
        line[0].set_ylabel("Loss")
    for ax in axes[-1]:
        ax.set_xlabel("Epoch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=2)
    state(canvas, results, studies)
    return canvas


def _rows(results: Results, study: Study) -> list[Row]:
    """The rows of attention variants and of the attention that they replace."""
    return [r for r in study.rows if r.model not in ("levit_deck_fixed", "levit_256")]


def attention_latency(results: Results) -> "Canvas":
    """Latency of each attention relative to dot-product attention, in models and alone.

    All panels have the same logarithmic axis. Error bars: half the interquartile range of the
    ratios over rounds.
    """
    import matplotlib.pyplot as plt

    from . import style

    studies = [
        results.plan.study(name)
        for name in ("levit_attention", "swin_similarity", "attention_speed")
    ]
    canvas, axes = plt.subplots(1, 3, figsize=(style.WIDTH, 3.6), sharex=True)
    titles = ("In LeViT", "In Swin (CIFAR-10)", "Attention alone")
    keys: dict[str, Any] = {}
    for ax, study, title in zip(axes, studies, titles, strict=True):
        metrics = ("reported_latency", *map(str, results.batches(study)))
        rows = [
            row
            for row in _rows(results, study)
            if row.baseline and any(baseline_ratio(results, study, row, m) for m in metrics)
        ]
        dots = latency_dots(ax, results, study, [(study, row) for row in rows])
        keys |= dots
        ax.set_yticks(range(len(rows))[::-1], [_short(row.label) for row in rows], fontsize=5.5)
        ax.set_title(title)
    _ratio_axis(axes[0])
    axes[0].margins(x=0.08)
    axes[1].set_xlabel("Latency relative to dot-product attention (logarithmic)")
    canvas.legend(keys.values(), keys.keys(), loc="outside upper center", ncols=len(keys),
                  handletextpad=0.2, columnspacing=1.5)  # fmt: skip
    state(canvas, results, studies, [RATIO_BARS])
    return canvas


def latency_dots(
    ax: "Axes", results: Results, study: Study, rows: list[tuple[Study, Row]]
) -> dict[str, Any]:
    """Plot the ratio of each row's latency to its baseline: reported, then at each batch size.

    Args:
        ax: the panel; the first row is at the top.
        results: the source of the measured ratios.
        study: decides the batch sizes.
        rows: rows with their studies.

    Returns:
        label -> handle, for the legend; only of series with a ratio.
    """
    from . import style

    name = source_name(results, study)
    series = [("reported_latency", "deck (batch not stated)", style.REPORTED_LOOK)]
    for number, look in zip(results.batches(study), style.BATCH_LOOKS, strict=False):
        series.append((str(number), f"{name}, batch {number.batch}", look))
    known = []
    for metric, label, look in series:
        ratios = [baseline_ratio(results, of, row, metric) or np.nan for of, row in rows]
        if not np.isnan(ratios).all():
            known.append((metric, label, look, ratios))
    y = np.arange(len(rows))[::-1]
    shifts = 0.1 * np.arange(len(known) - 1, -len(known), -2)  # so that no mark hides another
    handles = {}
    for shift, (metric, label, look, ratios) in zip(shifts, known, strict=True):
        errors = [ratio_error(results, of, row, metric) for of, row in rows]
        handles[label] = ax.errorbar(ratios, y + shift, xerr=errors, linestyle="", elinewidth=0.8,
                                     label=label, **look)  # fmt: skip
    ax.axvline(1, color="black", linewidth=0.8, marker="")
    return handles


def _ratio_axis(ax: "Axes") -> None:
    """A logarithmic axis of ratios with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _short(label: str) -> str:
    return label.replace("LeViT + ", "").replace("Swin + ", "").replace(" tokens", "")


def attention_length(results: Results) -> "Canvas":
    """Time and memory of one image by the number of tokens."""
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("attention_length")
    metric = results.batches(study)[0]
    canvas, axes = plt.subplots(1, 2, figsize=(style.WIDTH * 0.75, 2.6))
    for i, (form, label) in enumerate(LENGTH_FORMS.items()):
        rows = [row for row in study.rows if row.id.startswith(f"{form}_")]
        for ax, name, scale in ((axes[0], metric, 1.0), (axes[1], "activations", 1e-6)):
            points = [
                (int(row.id.rpartition("_")[2]), value.mean * scale)
                for row in rows
                if (value := results.value(study, row, name))
            ]
            if points:
                ax.plot(*zip(*points, strict=True), label=label, **style.look(i))
    for ax, title in zip(axes, ("Latency, ms", "Kept for backward, MB"), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("Tokens")
        ax.set_ylabel(title)
    axes[0].legend()
    state(canvas, results, [study])
    return canvas


def attention_maps(results: Results) -> "Canvas":
    """Attention of the middle token (cross) of one test image in each trained variant.

    The colours show the attention relative to uniform attention, on one scale for all maps.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    from . import style

    study, analysis = results.plan.study("levit_attention"), results.plan.analysis("attention_maps")
    found = results.analysed_rows("attention_maps")
    image, tokens = None, 0
    if found:
        ref, row = next(iter(found.items()))
        task = results.plan.analyse_task(analysis)
        assert task is not None  # a record of it was found
        image = photograph(results, task.packs[ref], row["images"][0])
        tokens = len(row["map"]) * len(row["map"][0])
    count = max(1, len(found) + (image is not None))
    canvas, axes = plt.subplots(1, count, figsize=(style.WIDTH, 1.6), squeeze=False)
    for ax in axes[0]:
        ax.set_axis_off()
    if image is not None:
        axes[0][0].imshow(image)
        axes[0][0].set_title("test image", fontsize=5.5)
    if found:
        maps = {ref: tokens * np.array(row["map"]) for ref, row in found.items()}
        norm = LogNorm(1 / 8, 8, clip=True)
        for ax, (ref, relative) in zip(axes[0][-len(found) :], maps.items(), strict=True):
            shown = ax.imshow(relative, cmap="magma", norm=norm)
            height, width = relative.shape
            ax.plot(width // 2, height // 2, marker="+", color="white", markersize=5)
            label = _short(study.row(ref.split("/")[1]).label)
            ax.set_title(f"{label}\nentropy {found[ref]['entropy']:.2f}", fontsize=5.5)
        bar = canvas.colorbar(shown, ax=axes, pad=0.01, aspect=12, shrink=0.8, extend="both",
                              ticks=[1 / 8, 1 / 2, 1, 2, 8], format="{x:g}")  # fmt: skip
        bar.ax.minorticks_off()
        bar.set_label("× uniform attention", fontsize=5.5)
        bar.ax.tick_params(labelsize=5.5)
        title = f"entropy in nats; of uniform attention over {tokens} tokens: {np.log(tokens):.2f}"
        canvas.suptitle(title, fontsize=6)
    else:
        say_unmeasured(axes[0][0])
    state(canvas, results, [study], photographs(results, "attention_maps"))
    return canvas
