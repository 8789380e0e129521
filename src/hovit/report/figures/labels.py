"""Labels beside the points of a panel, away from points, lines and other labels."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Labels = list[tuple[float, float, str]]  # x, y, text
# Directions to try: beside the point, above and below, at the corners, and between these.
SIDES = (
    *((1, 0), (-1, 0), (0, 1), (0, -1)),
    *((1, 1), (-1, 1), (1, -1), (-1, -1)),
    *((0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1)),
)
NEAR = 5.0  # points between a mark and its label
PAD = 1.5  # pixels that stay free around a label
DASH = 1.5  # pixels: side of the boxes that cover a line


def label_points(
    canvas: "Canvas",
    panels: Iterable[tuple["Axes", Labels]],
    steps: Sequence[float] = (1, 2, 3, 4, 6, 9, 13, 18, 24),
    **style: Any,
) -> list[str]:
    """Write each label next to its point; return the labels that have no room.

    A label further away than the first step gets a thin line to its point. Places where this line
    crosses nothing are preferred. Everything else must be drawn before, because this fixes the
    layout of the figure.

    Args:
        canvas: the figure.
        panels: each panel with its labels, in data coordinates.
        steps: distances to try, as multiples of NEAR.
        style: properties of the text.
    """
    from .style import fix_layout

    fix_layout(canvas)
    scale, crowded = canvas.dpi / 72, []
    at: dict[str, Any] = {
        "textcoords": "offset points",
        "va": "center",
        "ha": "center",
        "in_layout": False,
    }
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#666666", "shrinkB": 2}
    for ax, labels in panels:
        marks, inside = _marks(ax), np.array(ax.bbox.extents)
        for x, y, text in labels:
            note = ax.annotate(text, (x, y), (0, 0), **at, **style)
            box = np.array(note.get_window_extent().extents)
            note.remove()
            found = _free_place(box, inside, marks, steps, scale)
            if found is None:
                crowded.append(text)
                continue
            offset, boxes = found
            arrow = line if len(boxes) > 1 else None
            ax.annotate(text, (x, y), offset, arrowprops=arrow, **at, **style)
            marks = np.concatenate([marks, boxes])
    return crowded


def _free_place(
    box: np.ndarray, inside: np.ndarray, marks: np.ndarray, steps: Sequence[float], scale: float
) -> tuple[tuple[float, float], np.ndarray] | None:
    """The nearest place in a panel where a label and its line overlap no mark, or the label alone.

    Args:
        box: the label, centred on its point, in pixels.
        inside: the panel.
        marks: boxes that neither the label nor its line may overlap.
        steps: distances to try, as multiples of NEAR.
        scale: pixels per point.

    Returns:
        offset from the point, in points; boxes of the label and of its line, in pixels [N, 4].
    """
    point, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    others = marks[~_touch(np.concatenate([point - 1, point + 1]), marks)]
    for step, lines_cross in [(step, cross) for cross in (False, True) for step in steps]:
        for dx, dy in SIDES:
            x = dx * (size[0] / 2 + step * NEAR * scale)
            y = dy * (size[1] / 2 + step * NEAR * scale * (1 if dx == 0 else 0.5))
            shift = np.array([x, y])
            place = np.concatenate([box[:2] + shift - PAD, box[2:] + shift + PAD])[None]  # [1, 4]
            if (place[0, :2] < inside[:2]).any() or (place[0, 2:] > inside[2:]).any():
                continue
            line = _dashes(point, point + shift) if step > steps[0] else np.empty((0, 4))
            line = line[~_touch(place[0], line)]
            if not _overlap(place, marks) and (lines_cross or not _overlap(line, others)):
                return (x / scale, y / scale), np.concatenate([place, line])
    return None


def _touch(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether each of the boxes overlaps a box, bool [N]."""
    return np.all((boxes[:, :2] < box[2:]) & (box[:2] < boxes[:, 2:]), axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> bool:
    """Whether any two boxes of two sets overlap."""
    starts = boxes[:, None, :2] < others[None, :, 2:]
    ends = others[None, :, :2] < boxes[:, None, 2:]
    return bool((starts & ends).all(-1).any())


def _dashes(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Boxes that cover a line, [N, 4]."""
    count = int(np.hypot(*(end - start)) / DASH) + 2
    at = np.linspace(start, end, count)
    return np.concatenate([at - DASH / 2, at + DASH / 2], axis=1)


def _marks(ax: "Axes") -> np.ndarray:
    """Boxes of the marks, lines, error bars, texts and legend of a panel, in pixels [N, 4]."""
    from matplotlib.collections import LineCollection

    scale = ax.figure.dpi / 72
    texts = [text for text in (*ax.texts, ax.get_legend()) if text]
    boxes = [np.array([text.get_window_extent().extents]) for text in texts]
    for line in ax.lines:
        at = line.get_transform().transform(line.get_xydata())
        if line.get_marker() not in ("", "None", None, " "):
            half = line.get_markersize() / 2 * scale
            boxes.append(np.concatenate([at - half, at + half], axis=1))
        if line.get_linestyle() not in ("", "None", None, " "):
            boxes += [_dashes(start, end) for start, end in pairwise(at)]
    for bars in ax.collections:
        if isinstance(bars, LineCollection):
            ends = [ax.transData.transform(each) for each in bars.get_segments()]
            boxes += [np.concatenate([each.min(0) - 1, each.max(0) + 1])[None] for each in ends]
    return np.concatenate([np.empty((0, 4)), *boxes])
