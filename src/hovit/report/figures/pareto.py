"""Speed of every system against its size and accuracy, with Pareto fronts, for each device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config.schema import Row, Study
from ..results import Results
from ..sources import Sources
from .common import device_name, say_unmeasured, write_facts
from .labels import label_points

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

    One pair of rows for each device. Reported and measured accuracies have panels of their own,
    because they come from different images. A line is the Pareto front of one data set; the
    numbers name its systems. A panel needs two points.
    """
    import matplotlib.pyplot as plt

    from . import style

    study = sources.plan.study("pareto")
    shown = sources.timed(study) or [sources.run]
    high = 0.8 + 2.0 * 2 * len(shown)
    canvas, axes = plt.subplots(
        2 * len(shown), 4, figsize=(style.WIDTH, high), sharex="col", sharey="row", squeeze=False,
        width_ratios=(1, 1, 1.2, 1.2),
    )  # fmt: skip
    numbers: dict[str, int] = {}  # label of a system on a front -> its number
    labels = []
    for i, results in enumerate(shown):
        for j, speed in enumerate(SPEEDS):
            for ax, front in _panels(axes[2 * i + j], results, study, speed):
                named = [(numbers.setdefault(p.label, len(numbers) + 1), p) for p in front]
                labels.append((ax, [(p.x, p.y, str(number)) for number, p in named]))
    if not any(ax.get_visible() for ax in axes.flat):
        axes[0][0].set_visible(True)
        say_unmeasured(axes[0][0])
    titles = (*SIZES.values(), "Top-1, %, as reported", "Top-1, %, measured")
    for column, title in zip(axes.T, titles, strict=True):
        for lowest in [ax for ax in column if ax.get_visible()][-1:]:
            lowest.set_xlabel(title)
            lowest.tick_params(labelbottom=True)
    timed = {
        family_of(row)
        for results in shown
        for row in study.rows
        if any(results.value(study, row, speed) for speed in SPEEDS)
    }
    keys = [
        plt.Line2D([], [], label=family, **_look(family), markerfacecolor=style.COLOURS[i])
        for i, family in enumerate(FAMILIES)
        if family in timed
    ]
    canvas.legend(handles=keys, loc="outside upper center", ncols=6)
    facts = [_where(results, study) for results in shown]
    facts.append("a line: Pareto front of one data set")
    write_facts(canvas, [f"{number}: {label}" for label, number in numbers.items()], facts)
    label_points(canvas, labels, fontsize=5)
    return canvas


def _where(results: Results, study: Study) -> str:
    size = results.plan.scale.latency.image_size or study.image_size
    name = results.plan.scale.id if results.is_evidence else results.name
    return f"{name}: {results.latency_device(study)}, fp32, eager, {size} px"


def _panels(
    axes: Any, results: Results, study: Study, speed: str
) -> list[tuple["Axes", list[Point]]]:
    """One row of panels: a speed against each size, and against accuracy; return their fronts."""
    batch = results.throughput_batch(study)
    name = device_name(results, study) if results.is_evidence else results.name
    axes[0].set_ylabel(f"{name}\n{SPEEDS[speed].format(batch=batch)}")
    axes[0].set_yscale("log")
    _plain_ticks(axes[0].yaxis, (1, 2, 5))
    for ax, size in zip(axes, SIZES, strict=False):
        _scatter(ax, size_points(results, study, size, speed))
        ax.set_xscale("log")
        _plain_ticks(ax.xaxis, (1, 3))
    found = []
    points = accuracy_points(results, study, speed)
    for ax, is_reported in zip(axes[2:], (True, False), strict=True):
        own = [point for point in points if point.reported == is_reported]
        _scatter(ax, own)
        ax.set_xlim(0, 100)
        ax.set_xticks(range(0, 101, 20))
        fronts: dict[Point, None] = {}
        for line, data in zip(FRONT_STYLES, sorted({point.data for point in own}), strict=False):
            fronts |= dict.fromkeys(_draw_front(ax, own, data, line, speed == "throughput"))
        if ax.get_visible():
            ax.legend(loc="best", fontsize=5)
            found.append((ax, list(fronts)))
    return found


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
    return "ImageNet" if on_imagenet else "Oxford-IIIT Pet"


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
    """Plot the points; hide a panel of fewer than two."""
    ax.set_visible(len(points) > 1)
    for point in points:
        look = _look(point.family)
        ax.plot(point.x, point.y, markersize=3.5, **look)


def _look(family: str) -> dict[str, Any]:
    from . import style

    return style.look(list(FAMILIES).index(family)) | {"linestyle": ""}


def _draw_front(
    ax: "Axes", points: list[Point], data: str, line: str, larger_is_faster: bool
) -> list[Point]:
    """Draw the front of one data set, and return its points."""
    front = pareto_front([p for p in points if p.data == data], larger_is_faster)
    ax.plot([p.x for p in front], [p.y for p in front], line, color="#444444", linewidth=0.8,
            marker="", zorder=1, label=data)  # fmt: skip
    return front


def _plain_ticks(axis: Any, digits: tuple[int, ...]) -> None:
    """Plain numbers that begin with these digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
