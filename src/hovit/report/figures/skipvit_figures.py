"""Figures on SkipViT: speed-up, accuracy, warm-up, kept patches."""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.schema import Row, Study
from ..results import Results, Value
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

CURVES = {"train_loss": "Training loss", "val_loss": "Validation loss",
          "val_top1": "Validation top-1, %"}  # fmt: skip
DIFFERENCE_BARS = (
    "bars: 95 % interval of the difference to the baseline, over seeds and the same test images"
)
KEPT, LEFT_OUT = "#0072B2", "#C8C8C8"  # patches


def _ratios(results: Results, study: Study, row: Row) -> dict[str, float | None]:
    """Throughput relative to the baseline: reported, implied by multiply-adds, measured."""
    macs = baseline_ratio(results, study, row, "macs")
    measured = f"measured, {source_name(results, study)}"
    return {
        "poster (Ascend 910A)": baseline_ratio(results, study, row, "reported_throughput"),
        "implied by multiply-adds": 1 / macs if macs else None,
        measured: baseline_ratio(results, study, row, "throughput"),
    }


def skipvit_speed(results: Results) -> "Canvas":
    """Training throughput of each schedule, relative to the baseline."""
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("skipvit")
    rows = [row for row in study.rows if row.baseline]
    canvas, ax = plt.subplots(figsize=(style.WIDTH * 0.75, 3.0))
    bars = [_ratios(results, study, row) for row in rows]
    looks: tuple[dict[str, Any], ...] = (
        {"color": style.REPORTED, "hatch": "//"},
        {"color": "#BBBBBB"},
        {"color": style.OURS},
    )
    errors = [ratio_error(results, study, row, "throughput") for row in rows]
    for i, (label, look) in enumerate(zip(bars[0], looks, strict=True)):
        if not any(bar[label] for bar in bars):
            continue
        at = np.arange(len(rows)) + (i - 1) * 0.27
        ratios = [(bar[label] or np.nan) - 1 for bar in bars]
        noise = errors if i == len(looks) - 1 else None
        ax.barh(at, ratios, 0.25, left=1, label=label, xerr=noise,
                error_kw={"elinewidth": 0.8}, **look)  # fmt: skip
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [row.label for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("Training images/s, relative to the baseline")
    ax.grid(axis="y", visible=False)
    canvas.legend(loc="outside upper center", ncols=3)
    state(canvas, results, [study], [RATIO_BARS])
    return canvas


def skipvit_accuracy(results: Results) -> "Canvas":
    """Accuracy against throughput, relative to the baseline: reported and measured points.

    Error bars: 95 % interval of the difference, over seeds and the same test images.
    """
    import matplotlib.pyplot as plt

    from . import style

    study = results.plan.study("skipvit")
    canvas, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 2.8))
    paper = study.rows[0].label.removesuffix(" baseline")
    trained, timed = _models(results, study.rows[0], paper)
    panels = (
        ("reported_", "Poster", paper, paper),
        ("", f"Measured: {source_name(results, study)}", trained, timed),
    )
    for ax, (before, title, accurate, fast) in zip(axes, panels, strict=True):
        _points(ax, results, study, before)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(title)
        ax.set_xlabel(f"Training images/s of {fast}, × baseline")
        ax.set_ylabel(f"Top-1 of {accurate},\npoints over baseline")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside right center")
    more = [f"{trained} stands in for {paper}"] if trained != paper else []
    state(canvas, results, [study], [*more, DIFFERENCE_BARS])
    return canvas


def _models(results: Results, row: Row, paper: str) -> tuple[str, str]:
    """Names of the models that were trained and timed for a row: the paper's, or its stand-in."""
    stand_in = results.plan.scale.models.get(str(row.model))
    if stand_in is None:
        return paper, paper
    return stand_in.label, stand_in.label if stand_in.measured else paper


def _points(ax: "Axes", results: Results, study: Study, before: str) -> None:
    from . import style

    if not results.value(study, study.rows[0], f"{before}top1"):
        return
    for i, row in enumerate(study.rows):
        look = style.look(i) | {"linestyle": "", "elinewidth": 0.8}
        if row.baseline is None:
            ax.errorbar(1, 0, label="baseline", **look)
            continue
        ratio = baseline_ratio(results, study, row, f"{before}throughput")
        if ratio and (difference := _difference(results, study, row, before)):
            # What the poster prints has no noise.
            ax.errorbar(ratio, difference.mean, difference.noise or None, label=row.label, **look)


def _difference(results: Results, study: Study, row: Row, before: str) -> Value | None:
    """Top-1 of a row minus its baseline's: as printed, or over the same test images."""
    if not before:
        return results.value(study, row, "top1_difference")
    rows = (row, study.row(row.baseline or ""))
    own, base = (results.value(study, each, "reported_top1") for each in rows)
    return Value(own.mean - base.mean) if own and base else None


def skipvit_warmup(results: Results) -> "Canvas":
    """Training by epoch, with and without a warm-up; a line where dropping begins."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from . import style

    study = results.plan.study("skipvit_warmup")
    canvas, axes = plt.subplots(1, len(CURVES), figsize=(style.WIDTH, 2.4))
    for ax, (key, title) in zip(axes, CURVES.items(), strict=True):
        for i, row in enumerate(study.rows):
            epochs = curve(ax, results, study, row, key, row.label, style.look(i))
            if begins := _full_epochs(row, epochs):
                ax.axvline(begins + 0.5, color="black", linewidth=0.8, linestyle=":")
        ax.set_title(title)
        ax.set_xlabel("Epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=2)
    state(canvas, results, [study])
    return canvas


def _full_epochs(row: Row, epochs: int) -> int:
    """The epochs in which nothing is dropped, as the model rounds them (`SkipViT.set_epoch`)."""
    warmup = Fraction(str(row.model_args.get("warmup", 0)))
    return math.floor(warmup * epochs + Fraction(1, 2))


def kept_patches(results: Results) -> "Canvas":
    """Patches of test images that remain after each layer that drops patches.

    The photographs are shown above where they are packed.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    from . import style

    columns = _kept(results)
    has_photograph = any(image is not None for _, image, _ in columns)
    high = has_photograph + max((len(layers) for *_, layers in columns), default=1)
    size = (style.WIDTH, 0.4 + 1.2 * high)
    canvas, axes = plt.subplots(high, max(1, len(columns)), figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    if not columns:
        say_unmeasured(axes[0][0])
    for (label, image, layers), column in zip(columns, axes.T, strict=False):
        if image is not None:
            column[0].imshow(image)
            column[0].set_title(label, fontsize=6)
        for ax, (layer, mask) in zip(column[has_photograph:], layers.items(), strict=False):
            _masked(ax, image, mask)
            title = f"after layer {layer}"
            first = ax is column[0]
            ax.set_title(f"{label}\n{title}" if first else title, fontsize=6)
    colours = {"left out": LEFT_OUT} | ({} if has_photograph else {"kept": KEPT})
    keys = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=label)
        for label, colour in colours.items()
    ]
    canvas.legend(handles=keys, loc="outside upper center", ncols=len(keys))
    study = results.plan.study("skipvit")
    state(canvas, results, [study], photographs(results, "kept_patches"))
    return canvas


def _kept(results: Results) -> list[tuple[str, "np.ndarray | None", dict[int, np.ndarray]]]:
    """(schedule, photograph if packed, {layer: mask of kept patches}) of each test image."""
    study, analysis = results.plan.study("skipvit"), results.plan.analysis("kept_patches")
    columns = []
    for ref, row in results.analysed_rows("kept_patches").items():
        task = results.plan.analyse_task(analysis)
        assert task is not None  # a record of it was found
        label = study.row(ref.split("/")[1]).label
        for index, masks in zip(row["images"], row["kept"], strict=True):
            layers = {
                layer: np.array([[int(c) for c in line] for line in mask])
                for layer, mask in zip(row["layers"], masks, strict=True)
            }
            columns.append((label, photograph(results, task.packs[ref], index), layers))
    return columns


def _masked(ax: "Axes", image: "np.ndarray | None", mask: np.ndarray) -> None:
    """An image's kept patches in a frame, the others in grey; without the image, in one colour."""
    from matplotlib.colors import to_rgb

    kept, left_out = (np.round(255 * np.array(to_rgb(colour))) for colour in (KEPT, LEFT_OUT))
    each = 1 if image is None else image.shape[0] // mask.shape[0]
    large = np.kron(mask, np.ones((each, each)))[..., None]
    pixels = kept if image is None else image[: large.shape[0], : large.shape[1]]
    ax.imshow(np.where(large, pixels, left_out).astype(np.uint8))
    ax.set_axis_on()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(True)
