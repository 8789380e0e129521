"""Figures, drawn from records alone, with the numbers of the papers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.plan import Plan
from ...config.schema import Row, Study
from ...utils.errors import HovitError
from ...utils.files import atomic
from ..record_source import plural
from ..results import Results, Value
from ..sources import Sources, load_sources
from ..tables.columns import baseline_ratio
from . import analysis_figures
from .attention_figures import (
    attention_curves,
    attention_latency,
    attention_length,
    attention_maps,
    ratio_error,
    seeds,
)
from .skipvit_figures import kept_patches, skipvit_accuracy, skipvit_speed, skipvit_warmup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

FOLDER = Path("figures")
IDEAS = ("conv_stage", "checkerboard", "depth", "conv_shrink", "dropout", "hovit")


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        title: for captions and lists.
        studies: the studies that it reads.
        plot: draws it from one source.
        numbers: what it shows of each row; they decide which source is chosen.
        analyses: the analyses that it reads.
    """

    title: str
    studies: tuple[str, ...]
    plot: Callable[[Results], "Canvas"]
    numbers: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()

    def results(self, sources: Sources) -> Results:
        """The source that it is drawn from."""
        return sources.for_figure(self.studies, self.numbers, self.analyses)


def draw(plan: Plan, name: str, root: Path = Path()) -> None:
    """Draw a figure to `figures/NAME.pdf` and `.png`; the same records give the same bytes.

    Raises:
        HovitError: if there is no such figure.
    """
    draw_from(load_sources(plan, root), name, root)


def draw_from(sources: Sources, name: str, root: Path = Path()) -> None:
    """As `draw`, from sources that are read already."""
    if name not in FIGURES:
        raise HovitError(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    import matplotlib.pyplot as plt

    from . import style

    figure = FIGURES[name]
    with plt.rc_context(style.RC):
        canvas = figure.plot(figure.results(sources))
        for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
            content = BytesIO()  # in memory: on a full disk, matplotlib fails in other ways
            canvas.savefig(content, format=suffix[1:], metadata=metadata)
            with atomic(root / FOLDER / f"{name}{suffix}") as path:
                path.write_bytes(content.getvalue())
        plt.close(canvas)


def _state(canvas: "Canvas", results: Results, study: Study, latency: bool = True) -> None:
    """Write scale, data, seeds and device under the figure."""
    plan = results.plan
    runs = [run for row in plan.rows_run(study) for run in plan.runs_of(study, row)]
    studies = [plan.study(name) for name in IDEAS] if latency else []
    devices = {str(results.latency_device(each)) for each in studies} - {"None"}
    device = " and ".join(sorted(devices))
    parts = [results.name + f", {plan.scale.id}" * (not results.is_evidence)]
    if runs:
        parts += [f"{runs[0].dataset.title}, {runs[0].image_size} px"]
        parts += [plural(runs[0].recipe.epochs, "epoch")]
        parts += seeds(results, [study])
    if device:
        parts += [f"latency on {device}, at {_timed_size(results, study)} px"]
    canvas.supxlabel(" · ".join(parts), fontsize=6, color="#555555")


def _timed_size(results: Results, study: Study) -> int:
    """Image size of a study's latencies, in pixels, as its record states it."""
    record = results.measured(study)
    assert record is not None
    return int(record.spec["latency"]["image_size"])


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
                _curve(ax, results, study, row, key, style.look(names.index(_family(row))))
            ax.set_title("" if line else title)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[line][0].set_ylabel("From scratch" if rows is sets[0] else "With the Launcher")
        axes[line][2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    for ax in axes[-1]:
        ax.set_xlabel("Epoch")
    _state(canvas, results, study, latency=False)
    return canvas


def _family(row: Row) -> str:
    """Label of a row without the Launcher's prefix, so that both have the same look."""
    label = re.sub("^L_ ?", "", row.label)
    return label[0].upper() + label[1:]


def _curve(
    ax: "Axes", results: Results, study: Study, row: Row, key: str, look: dict[str, Any]
) -> None:
    """Plot the mean over seeds, and their range as a band."""
    import numpy as np

    histories = [record.results["history"] for _, record in results.trained(study, row)]
    if not histories:
        return
    values = np.array([[epoch[key] for epoch in history] for history in histories])
    epochs = np.arange(1, values.shape[1] + 1)
    many = values.shape[1] > 12
    every = len(epochs) if many else 1
    (line,) = ax.plot(epochs, values.mean(0), label=row.label, markevery=every, **look)
    if len(values) > 1:
        ax.fill_between(
            epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0
        )


def five_ideas(results: Results) -> "Canvas":
    """Latency of each idea relative to its baseline, and accuracy.

    Error bars: half the inter-quartile range of the rounds' ratios; standard deviation over seeds.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    from . import style

    rows = _idea_rows(results.plan)
    y = np.arange(len(rows))[::-1]
    size = (style.WIDTH, 0.2 * len(rows) + 1.1)
    canvas, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True)
    looks: dict[str, dict[str, Any]] = {
        "reported_latency": {"color": style.REPORTED, "marker": "D", "mfc": "white"},
        "latency_1": {"color": style.OURS, "marker": "o"},
        "latency_32": {"color": "#56B4E9", "marker": "s"},
    }
    names = {"reported_latency": "deck (batch not stated)"}
    batches = map(str, results.batches(results.plan.study("hovit")))
    for metric in ("reported_latency", *batches):
        ratios = [baseline_ratio(results, study, row, metric) for study, row in rows]
        label = names.get(metric, f"{results.name}, batch {metric.removeprefix('latency_')}")
        look = looks.get(metric, {"color": "#009E73", "marker": "^"})
        errors = [ratio_error(results, study, row, metric) for study, row in rows]
        means = [r if r else np.nan for r in ratios]
        left.errorbar(means, y, xerr=errors, linestyle="", elinewidth=0.8, label=label, **look)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("Latency, × its baseline (left is faster)")
    for label, metric, look in (
        ("deck", "reported_top1", looks["reported_latency"]),
        (results.name, "top1", looks["latency_1"]),
    ):
        found = [results.value(study, row, metric) for study, row in rows]
        means = [v.mean if v else np.nan for v in found]
        spreads = [_spread(v) if v else 0 for v in found]
        right.errorbar(means, y, xerr=spreads, linestyle="", label=label, **look)
    right.set_xlabel("Test top-1, %")
    right.set_xlim(left=0)
    left.set_yticks(y, [row.label for _, row in rows])
    for ax in (left, right):
        ax.grid(axis="x", visible=False)
        ax.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
            handletextpad=0.1,
            columnspacing=0.8,
        )
    _state(canvas, results, results.plan.study("hovit"))
    return canvas


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
    """Accuracy against latency relative to LeViT. Hollow points: the deck; filled points: measured.

    A line joins the two points of a model.
    """
    import matplotlib.pyplot as plt

    from . import style

    canvas, axes = plt.subplots(1, 2, figsize=(style.WIDTH, 3.6))
    last = str(results.batches(results.plan.study("hovit"))[-1])
    looks: dict[str, dict[str, Any]] = {}
    for ax, launched in zip(axes, (False, True), strict=True):
        for study, row in _idea_rows(results.plan):
            if str(row.model).startswith("l_") != launched:
                continue
            label = _family(row)
            found = (
                _point(results, study, row, "reported_latency", "reported_top1"),
                _point(results, study, row, last, "top1"),
            )
            if found == (None, None):
                continue
            look = looks.setdefault(label, style.look(len(looks)) | {"linestyle": ""})
            for point, fill in zip(found, ("white", look["color"]), strict=True):
                if point:
                    x, value = point
                    spread = _spread(value) or None
                    ax.errorbar(x, value.mean, spread, mfc=fill, **look)
            if all(found):
                ends = [point for point in found if point]
                ax.plot([x for x, _ in ends], [v.mean for _, v in ends], color=look["color"],
                        marker="", linestyle=":", linewidth=0.8)  # fmt: skip
        base = "L_LeViT (deck)" if launched else "LeViT (deck)"
        ax.set_xlabel(f"Latency, × {base}")
        ax.set_title("With the Launcher" if launched else "From scratch")
    axes[0].set_ylabel("Test top-1, %")
    keys = [plt.Line2D([], [], label=label, **look) for label, look in looks.items()]
    keys += [
        plt.Line2D([], [], color="#555555", marker="o", linestyle="", mfc=fill, label=label)
        for fill, label in (
            ("white", "hollow: the deck (batch not stated)"),
            ("#555555", f"filled: {results.name}, batch {last.removeprefix('latency_')}"),
        )
    ]
    canvas.legend(handles=keys, loc="outside right center")
    _state(canvas, results, results.plan.study("hovit"))
    return canvas


def _point(
    results: Results, study: Study, row: Row, latency: str, top1: str
) -> tuple[float, Value] | None:
    """(latency relative to the baseline, accuracy); None if either is missing."""
    own, value = (results.value(study, row, metric) for metric in (latency, top1))
    ratio = baseline_ratio(results, study, row, latency) if row.baseline else 1.0
    return (ratio, value) if own and value and ratio else None


TIMES_AND_TOP1 = ("latency_1", "top1")
FIGURES = {
    "training_curves": Figure(
        "Training curves of LeViT and HoViT", ("hovit",), training_curves, ("top1",)
    ),
    "five_ideas": Figure("The deck's five ideas", IDEAS, five_ideas, TIMES_AND_TOP1),
    "accuracy_latency": Figure("Accuracy against latency", IDEAS, accuracy_latency, TIMES_AND_TOP1),
    "attention_curves": Figure(
        "Losses of every attention",
        ("levit_attention", "swin_similarity"),
        attention_curves,
        ("top1",),
    ),
    "attention_latency": Figure(
        "Latency of every attention",
        ("levit_attention", "swin_similarity", "attention_speed"),
        attention_latency,
        ("latency_1",),
    ),
    "attention_maps": Figure(
        "Attention of one token",
        ("levit_attention",),
        attention_maps,
        analyses=("attention_maps",),
    ),
    "mhsa_share": Figure(
        "Accuracy by the share of attention",
        ("mhsa_share",),
        analysis_figures.mhsa_share,
        ("top1",),
    ),
    "head_similarity": Figure(
        "Similarity of heads",
        ("mhsa_share",),
        analysis_figures.head_similarity,
        analyses=("head_similarity",),
    ),
    "taylor_pruning": Figure(
        "Channels that Taylor pruning keeps",
        ("mhsa_share",),
        analysis_figures.taylor_pruning,
        analyses=("taylor_pruning",),
    ),
    "runtime_breakdown": Figure(
        "Run time by class of operator",
        ("mhsa_share",),
        analysis_figures.runtime_breakdown,
        analyses=("runtime_breakdown",),
    ),
    "attention_length": Figure(
        "Growth with the number of tokens",
        ("attention_length",),
        attention_length,
        ("latency_1", "activations"),
    ),
    "skipvit_speed": Figure(
        "Speed-up of skipping: implied and reached", ("skipvit",), skipvit_speed, ("throughput",)
    ),
    "skipvit_accuracy": Figure(
        "SkipViT: accuracy and speed", ("skipvit",), skipvit_accuracy, ("throughput", "top1")
    ),
    "skipvit_warmup": Figure(
        "SkipViT: with and without a warm-up", ("skipvit_warmup",), skipvit_warmup, ("top1",)
    ),
    "kept_patches": Figure(
        "Patches that SkipViT keeps", ("skipvit",), kept_patches, analyses=("kept_patches",)
    ),
}
