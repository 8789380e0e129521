"""Speed of every system against its size and accuracy, with Pareto fronts, for each device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config.schema import Row, Study
from ..results import Results
from ..sources import Sources
from .attention_figures import say_unmeasured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Family -> the cited studies of its rows; rows with the Launcher form another family.
FAMILIES = {
    "LeViT and HoViT": ("hovit", "conv_stage", "checkerboard", "depth", "conv_shrink"),
    "Launcher": ("launcher",),
    "attentions": ("levit_attention",),
    "SkipViT": ("skipvit",),
    "EfficientViT": ("efficientvit_speed",),
    "compared models": ("efficientvit_imagenet", "backbones"),
}
SPEEDS = {"latency_1": "Latency at batch 1, ms", "throughput": "Images/s at batch {batch}"}
SIZES = {"parameters_m": "Parameters, M", "macs": "Multiply-adds, G"}
FRONT_STYLES = ["-", "--", "-.", ":"]
LABEL_ROOM = (60, 8)  # width and height of a label, in pixels


@dataclass(frozen=True)
class Point:
    """One system in a panel.

    Args:
        x, y: size or accuracy, and speed.
        label: label of its row.
        family: key of FAMILIES.
        data: data set of the accuracy; empty for a size.
        reported: whether the accuracy is the paper's.
    """

    x: float
    y: float
    label: str
    family: str
    data: str = ""
    reported: bool = False


def pareto(sources: Sources) -> "Canvas":
    """Latency and throughput against parameters, multiply-adds and accuracy.

    One pair of rows for each device. In the panels of accuracy, a line is the Pareto front of one
    data set; filled points are measured here, hollow points reported by the papers.
    """
    import matplotlib.pyplot as plt

    from . import style

    study = sources.plan.study("pareto")
    shown = sources.timed(study) or [sources.run]
    high = 0.8 + 2.0 * 2 * len(shown)
    canvas, axes = plt.subplots(
        2 * len(shown), 3, figsize=(style.WIDTH, high), sharex="col", squeeze=False,
        width_ratios=(1, 1, 1.7),
    )  # fmt: skip
    for i, results in enumerate(shown):
        for j, speed in enumerate(SPEEDS):
            _panels(axes[2 * i + j], results, study, speed)
    for ax, label in zip(axes[-1], (*SIZES.values(), "Top-1, %"), strict=True):
        ax.set_xlabel(label)
    keys = [
        plt.Line2D([], [], label=family, **_look(family), markerfacecolor=style.COLOURS[i])
        for i, family in enumerate(FAMILIES)
    ]
    canvas.legend(handles=keys, loc="outside upper center", ncols=6)
    facts = [_where(results, study) for results in shown]
    facts.append("filled: measured; hollow: as reported; a line: the front of one data set")
    canvas.supxlabel(" · ".join(facts), fontsize=5.5, color="#555555", wrap=True)
    return canvas


def _where(results: Results, study: Study) -> str:
    size = results.plan.scale.latency.image_size or study.image_size
    return f"{results.name}: {results.latency_device(study)}, fp32, eager, {size} px"


def _panels(axes: Any, results: Results, study: Study, speed: str) -> None:
    """One row of panels: a speed against each size, and against accuracy."""
    batch = results.throughput_batch(study)
    label = f"{results.base.name if results.is_evidence else results.name}\n"
    axes[0].set_ylabel(label + SPEEDS[speed].format(batch=batch))
    for ax, size in zip(axes, SIZES, strict=False):
        _scatter(ax, size_points(results, study, size, speed))
        ax.set_xscale("log")
        ax.set_yscale("log")
        _plain_ticks(ax.xaxis)
        _plain_ticks(ax.yaxis)
    points = accuracy_points(results, study, speed)
    _scatter(axes[2], points)
    axes[2].set_yscale("log")
    axes[2].set_xlim(-4, 125)  # room for the labels of the most accurate systems
    axes[2].set_xticks(range(0, 101, 20))
    _plain_ticks(axes[2].yaxis)
    labelled: list[tuple[float, float]] = []
    for i, data in enumerate(sorted({point.data for point in points})):
        front = pareto_front([p for p in points if p.data == data], speed == "throughput")
        _draw_front(axes[2], front, data, FRONT_STYLES[i % len(FRONT_STYLES)], labelled)
    if points:
        axes[2].legend(loc="best", fontsize=5)


def size_points(results: Results, study: Study, size: str, speed: str) -> list[Point]:
    """The rows that have both numbers, in the units of the axes."""
    points = []
    for row in study.rows:
        x, y = (results.value(study, row, number) for number in (size, speed))
        if x and y:
            unit = 1e-6 if size == "parameters_m" else 1e-9
            points.append(Point(x.mean * unit, y.mean, row.label, family_of(row)))
    return points


def accuracy_points(results: Results, study: Study, speed: str) -> list[Point]:
    """Every accuracy of the rows that have a speed: measured from this source, and reported."""
    points = []
    for row in study.rows:
        y = results.value(study, row, speed)
        if y is None:
            continue
        family, runs = family_of(row), results.plan.runs_of(study, row)
        if runs and (top1 := results.value(study, row, "top1")):
            points.append(Point(top1.mean, y.mean, row.label, family, runs[0].dataset.title))
        study_id, row_id = (row.trained_as or row.same_as or "/").split("/")
        cited = results.plan.study(study_id)
        printed = results.value(cited, cited.row(row_id), "reported_top1")
        if printed:
            data = _reported_data(cited, cited.row(row_id))
            points.append(Point(printed.mean, y.mean, row.label, family, data, reported=True))
    return points


def _reported_data(cited: Study, row: Row) -> str:
    """Data set of a paper's accuracy."""
    on_imagenet = not cited.trained or (row.dataset or cited.dataset) == "imagenet"
    return "ImageNet, as reported" if on_imagenet else "Oxford-IIIT Pet, as reported"


def family_of(row: Row) -> str:
    """Key of FAMILIES for a row."""
    study_id = (row.same_as or "").split("/")[0]
    if row.id.startswith("l_"):
        return "Launcher"
    return next(family for family, studies in FAMILIES.items() if study_id in studies)


def pareto_front(points: Iterable[Point], larger_is_faster: bool) -> list[Point]:
    """The points that no other point beats in both accuracy and speed, by rising accuracy."""
    front: list[Point] = []
    sign = -1 if larger_is_faster else 1
    for point in sorted(points, key=lambda p: (-p.x, sign * p.y)):
        if not front or sign * point.y < sign * front[-1].y:
            front.append(point)
    return front[::-1]


def _scatter(ax: "Axes", points: list[Point]) -> None:
    if not points:
        say_unmeasured(ax)
    for point in points:
        look = _look(point.family)
        fill = "white" if point.reported else look["color"]
        ax.plot(point.x, point.y, markersize=3.5, **look, markerfacecolor=fill)


def _look(family: str) -> dict[str, Any]:
    from . import style

    return style.look(list(FAMILIES).index(family)) | {"linestyle": ""}


def _draw_front(
    ax: "Axes", front: list[Point], data: str, line: str, labelled: list[tuple[float, float]]
) -> None:
    """Draw a front and, where there is room, the names of its systems.

    Args:
        ax: the panel.
        front: its points.
        data: data set of the accuracies.
        line: style of the line.
        labelled: positions of the labels so far, in pixels; the new ones are added.
    """
    ax.plot([p.x for p in front], [p.y for p in front], line, color="#444444", linewidth=0.8,
            marker="", zorder=1, label=data)  # fmt: skip
    for point in front[::-1]:
        x, y = ax.transData.transform((point.x, point.y))
        wide, high = LABEL_ROOM
        if all(abs(x - left) > wide or abs(y - low) > high for left, low in labelled):
            labelled.append((x, y))
            ax.annotate(point.label, (point.x, point.y), (4, 0), fontsize=4.5, va="center",
                        textcoords="offset points")  # fmt: skip


def _plain_ticks(axis: Any) -> None:
    """Powers of ten as plain numbers, with 2 and 5 between them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
