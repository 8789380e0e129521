"""Figures on HoViT: training curves, the five ideas, accuracy against latency."""

import re
from typing import TYPE_CHECKING

from ...config.plan import Plan
from ...config.schema import Row, Study
from ...utils.plural import plural
from ..results import Results, Value
from ..tables.columns import baseline_ratio
from .attention_figures import latency_dots
from .common import RATIO_BARS, SEED_BARS, curve, source_name, state

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

IDEAS = ("conv_stage", "checkerboard", "depth", "conv_shrink", "dropout", "hovit")


def _circumstances(results: Results, timed: bool = True) -> list[str]:
    """Image size and epochs of the trained models, and the image size of the latencies."""
    study = results.plan.study("hovit")
    runs = [run for row in study.rows for run in results.plan.runs_of(study, row)]
    facts = [f"trained at {runs[0].image_size} px"] if runs else []
    *fewer, most = sorted({run.recipe.epochs for run in runs}) or [0]
    facts += [" or ".join([*map(str, fewer), plural(most, "epoch")])] if runs else []
    record = results.measured(study)
    if timed and record:
        facts.append(f"timed at {record.spec['latency']['image_size']} px")
    return facts


def _spread(value: Value) -> float:
    return value.spread if value.n > 1 else 0.0


def training_curves(results: Results) -> "Canvas":
    """Losses and validation accuracy by epoch: LeViT, HoViT, without and with the Launcher."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from . import style

    study = results.plan.study("hovit")
    sets = [[r for r in study.rows if str(r.model).startswith("l_") == it] for it in (False, True)]
    shown = [rows for rows in sets if any(results.trained(study, r) for r in rows)] or sets
    size = (style.WIDTH, 0.3 + 1.95 * len(shown))
    canvas, axes = plt.subplots(len(shown), 3, figsize=size, sharex=True, squeeze=False)
    columns = (("train_loss", "Training loss"), ("val_loss", "Validation loss"),
               ("val_top1", "Validation top-1, %"))  # fmt: skip
    for line, rows in enumerate(shown):
        for column, (key, title) in enumerate(columns):
            ax = axes[line][column]
            for row in rows:
                names = [_family(r) for r in study.rows]
                look = style.look(names.index(_family(row)))
                curve(ax, results, study, row, key, row.label, look)
            ax.set_title("" if line else title)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[line][0].set_ylabel("From scratch" if rows is sets[0] else "With the Launcher")
        axes[line][2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    for ax in axes[-1]:
        ax.set_xlabel("Epoch")
    state(canvas, results, [study], _circumstances(results, timed=False))
    return canvas


def _family(row: Row) -> str:
    """Label of a row without the Launcher's prefix, so that both have the same look."""
    label = re.sub("^L_ ?", "", row.label)
    return label[0].upper() + label[1:]


def five_ideas(results: Results) -> "Canvas":
    """Latency of each idea relative to its baseline, then reported and measured accuracy.

    The two accuracies have axes of their own, because they come from different images. Error bars:
    half the interquartile range of the ratios over rounds; standard deviation over random seeds.
    """
    import matplotlib.pyplot as plt

    from . import style

    rows = _idea_rows(results.plan)
    size = (style.WIDTH, 0.2 * len(rows) + 1.3)
    canvas, axes = plt.subplots(
        1, 3, figsize=size, sharey=True, gridspec_kw={"width_ratios": [1.6, 1, 1]}
    )
    latency_dots(axes[0], results, results.plan.study("hovit"), rows)
    axes[0].set_xlabel("Latency, × its baseline (left is faster)")
    for ax, number in zip(axes[1:], ("reported_top1", "top1"), strict=True):
        _idea_accuracies(ax, results, rows, number)
    axes[0].set_yticks(range(len(rows))[::-1], [row.label for _, row in rows])
    for ax in axes:
        ax.grid(axis="x", visible=False)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.1)
    facts = [*_circumstances(results), RATIO_BARS, SEED_BARS]
    state(canvas, results, [results.plan.study(name) for name in IDEAS], facts)
    return canvas


def _idea_accuracies(
    ax: "Axes", results: Results, rows: list[tuple[Study, Row]], number: str
) -> None:
    """Accuracy of one source: `reported_top1` or `top1`."""
    import numpy as np

    from . import style

    is_reported = number == "reported_top1"
    look = style.REPORTED_LOOK if is_reported else {"color": style.OURS, "marker": "o"}
    found = [results.value(study, row, number) for study, row in rows]
    means = [v.mean if v else np.nan for v in found]
    spreads = [_spread(v) if v else 0 for v in found]
    ax.errorbar(means, np.arange(len(rows))[::-1], xerr=spreads, linestyle="", **look)
    ax.set_title(_images(results, is_reported))
    ax.set_xlabel("Test top-1, %")
    ends = [v.mean + spread for v, spread in zip(found, spreads, strict=True) if v]
    ax.set_xlim(0, 1.05 * max(ends, default=100))


def _images(results: Results, is_reported: bool) -> str:
    """Whose accuracy, and on which images, in two lines."""
    runs = results.plan.runs_of(study := results.plan.study("hovit"), study.row("hovit"))
    images = runs[0].dataset if runs else None
    paper = (images.stands_for or images.title) if images else ""
    whose, title = (
        ("deck", paper)
        if is_reported
        else (source_name(results, study), images.title if images else "")
    )
    return f"{whose}\n{title}"


def _idea_rows(plan: Plan) -> list[tuple[Study, Row]]:
    """Baselines, then each idea, without and with the Launcher; every model once."""
    seen: set[str] = set()
    rows = []
    for launched in (False, True):
        for study in (plan.study(name) for name in IDEAS):
            for row in study.rows:
                key = f"{row.model}{row.model_args}"
                if str(row.model).startswith("l_") == launched and key not in seen:
                    seen.add(key)
                    rows.append((study, row))
    return rows


def accuracy_latency(results: Results) -> "Canvas":
    """Accuracy against latency relative to LeViT: reported (left) and measured (right).

    Each has axes of its own, because the accuracies come from different images. Error bars:
    standard deviation over random seeds.
    """
    import matplotlib.pyplot as plt

    from . import style

    canvas, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 5.0))
    last = results.batches(results.plan.study("hovit"))[-1]
    for line, launched in zip(axes, (False, True), strict=True):
        rows = [
            (study, row)
            for study, row in _idea_rows(results.plan)
            if str(row.model).startswith("l_") == launched
        ]
        base = "L_LeViT (deck)" if launched else "LeViT (deck)"
        line[0].set_ylabel(f"{'With the Launcher' if launched else 'From scratch'}\nTest top-1, %")
        for ax, before, latency in zip(
            line, ("reported_", ""), ("latency", str(last)), strict=True
        ):
            _panel(ax, results, rows, before + latency, f"{before}top1")
            batch = "batch not stated" if before else f"batch {last.batch}"
            ax.set_xlabel(f"Latency, × {base} ({batch})")
            if not launched:
                ax.set_title(_images(results, bool(before)))
    facts = [*_circumstances(results), SEED_BARS]
    state(canvas, results, [results.plan.study(name) for name in IDEAS], facts)
    found = [dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)) for ax in axes.flat]
    keys = {label: handle for panel in reversed(found) for label, handle in panel.items()}
    canvas.legend(keys.values(), keys.keys(), loc="outside right center")
    return canvas


def _panel(
    ax: "Axes", results: Results, rows: list[tuple[Study, Row]], latency: str, top1: str
) -> None:
    """Plot every row with both numbers. A model looks the same in all panels."""
    from . import style

    families = list(dict.fromkeys(_family(row) for _, row in _idea_rows(results.plan)))
    for study, row in rows:
        if point := _point(results, study, row, latency, top1):
            x, value = point
            look = style.look(families.index(_family(row))) | {"linestyle": ""}
            ax.errorbar(x, value.mean, _spread(value) or None, label=_family(row), **look)
    ax.margins(0.1, 0.1)


def _point(
    results: Results, study: Study, row: Row, latency: str, top1: str
) -> tuple[float, Value] | None:
    """(latency relative to the baseline, accuracy); None if either is missing."""
    own, value = (results.value(study, row, metric) for metric in (latency, top1))
    ratio = baseline_ratio(results, study, row, latency) if row.baseline else 1.0
    return (ratio, value) if own and value and ratio else None
