"""Labels beside the points of a panel, where they overlap neither points nor other labels."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.transforms import Bbox

Labels = list[tuple[float, float, str]]  # x, y, text
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
NEAR = 5.0  # points between a mark and its label
PAD = 1.0  # pixels that stay free around a label


def label_points(
    canvas: "Canvas",
    panels: Iterable[tuple["Axes", Labels]],
    steps: Sequence[float] = (1, 2, 3, 4, 6, 9, 13),
    **style: Any,
) -> list[str]:
    """Write each label next to its point; return the labels that have no room.

    A label further away than the first step gets a thin line to its point. Everything else must
    be drawn before, because this fixes the layout of the figure.

    Args:
        canvas: the figure.
        panels: each panel with its labels, in data coordinates.
        steps: distances to try, as multiples of NEAR.
        style: properties of the text.
    """
    from .style import fix_layout

    fix_layout(canvas)
    crowded = []
    for ax, labels in panels:
        taken = _marks(ax)
        for x, y, text in labels:
            note = ax.annotate(text, (x, y), (0, 0), textcoords="offset points", va="center",
                               ha="center", in_layout=False, **style)  # fmt: skip
            box = note.get_window_extent()
            note.remove()
            found = _free_place(box, ax.bbox, taken, steps, canvas.dpi / 72)
            if found is None:
                crowded.append(text)
                continue
            offset, placed, is_far = found
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#888888", "shrinkB": 2}
            ax.annotate(text, (x, y), offset, textcoords="offset points", va="center", ha="center",
                        in_layout=False, arrowprops=line if is_far else None,
                        **style)  # fmt: skip
            taken.append(placed)
    return crowded


def _free_place(
    box: "Bbox", inside: "Bbox", taken: list["Bbox"], steps: Sequence[float], scale: float
) -> tuple[tuple[float, float], "Bbox", bool] | None:
    """(offset in points, box in pixels, whether it is far) of the first free place.

    Args:
        box: the label, centred on its point, in pixels.
        inside: the panel.
        taken: boxes that the label must not overlap.
        steps: distances to try, as multiples of NEAR.
        scale: pixels per point.
    """
    for step in steps:
        for dx, dy in SIDES:
            x = dx * (box.width / 2 + step * NEAR * scale)
            y = dy * (box.height / 2 + step * NEAR * scale * (1 if dx == 0 else 0.5))
            placed = box.translated(x, y)
            within = inside.x0 <= placed.x0 and placed.x1 <= inside.x1
            within = within and inside.y0 <= placed.y0 and placed.y1 <= inside.y1
            if within and not any(placed.padded(PAD).overlaps(each) for each in taken):
                return (x / scale, y / scale), placed, step > steps[0]
    return None


def _marks(ax: "Axes") -> list["Bbox"]:
    """Boxes of the marks, error bars, labels and legend of a panel, in pixels."""
    from matplotlib.collections import LineCollection
    from matplotlib.transforms import Bbox

    scale = ax.figure.dpi / 72
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    if legend := ax.get_legend():
        boxes.append(legend.get_window_extent())
    for line in ax.lines:
        if line.get_marker() not in ("", "None", None, " "):
            half = line.get_markersize() / 2 * scale
            at = ax.transData.transform(line.get_xydata())
            boxes += [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in at]
    for bars in ax.collections:
        if isinstance(bars, LineCollection):
            ends = [ax.transData.transform(each) for each in bars.get_segments()]
            boxes += [Bbox([each.min(0) - 1, each.max(0) + 1]) for each in ends]
    return boxes
