"""Labels beside the points of a panel, away from points, lines and other labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
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
    *((0.25, 1), (-0.25, 1), (0.25, -1), (-0.25, -1)),
)
NEAR = 5.0  # points between a mark and its label
PAD = 1.5  # pixels that stay free around a label
DASH = 1.5  # pixels: side of the boxes that cover a line
PLACES = 40  # of a label that a search considers
TRIES = 100  # of a search


def label_points(
    canvas: "Canvas",
    panels: Iterable[tuple["Axes", Labels]],
    steps: Sequence[float] = (1, 3, 4, 5, 6, 7.5, 9, 11, 13, 15, 18, 21),
    **style: Any,
) -> list[str]:
    """Write each label next to its point; return the labels that have no room.

    A label further away than the first step gets a thin line to its point, which crosses nothing.
    Everything else must be drawn before, because this fixes the layout of the figure.

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
        marks, inside, places = _marks(ax), np.array(ax.bbox.extents), []
        for x, y, text in labels:
            note = ax.annotate(text, (x, y), (0, 0), **at, **style)
            box = np.array(note.get_window_extent().extents)
            note.remove()
            found = _free_places(box, inside, marks, steps, scale)
            places.append(list(islice(found, PLACES)))
        for (x, y, text), place in zip(labels, _choose(places), strict=True):
            if place is None:
                crowded.append(text)
                continue
            arrow = line if place.length else None
            ax.annotate(text, (x, y), place.offset, arrowprops=arrow, **at, **style)
    return crowded


@dataclass(frozen=True)
class _Place:
    """Where a label stands.

    Args:
        offset: from the point, in points.
        boxes: the label with room around it, and its line: x0, y0, x1, y1 in pixels [N, 4].
    """

    offset: tuple[float, float]
    boxes: np.ndarray

    @property
    def length(self) -> int:
        """Length of the line; 0 if the label is near its point."""
        return len(self.boxes) - 1


def _choose(places: list[list[_Place]]) -> list[_Place | None]:
    """One place of each label, so that no two overlap; None where there is no room.

    Args:
        places: the places of each label that overlap no mark, the best first.
    """
    every = [place for own in places for place in own]
    if not every:
        return [None] * len(places)
    owner = np.repeat(np.arange(len(places)), [len(own) for own in places])  # [P]
    boxes = np.concatenate([place.boxes for place in every])
    first = np.cumsum([0, *(len(place.boxes) for place in every[:-1])])  # box of each place

    @cache
    def clashes(p: int) -> np.ndarray:
        """Whether each place overlaps a place, bool [P]."""
        hit = np.any([_touch(box, boxes) for box in every[p].boxes], axis=0)
        return np.logical_or.reduceat(hit, first)

    left = {i for i, own in enumerate(places) if own}
    free = np.ones(len(every), bool)
    while (chosen := _search(owner, clashes, free, left, {}, iter(range(TRIES)))) is None:
        left.remove(min(left, key=lambda i: len(places[i])))
    return [every[chosen[i]] if i in chosen else None for i in range(len(places))]


def _search(
    owner: np.ndarray,
    clashes: Callable[[int], np.ndarray],
    free: np.ndarray,
    left: set[int],
    chosen: dict[int, int],
    tries: Iterator[int],
) -> dict[int, int] | None:
    """Backtracking search for a place of each label; None if it finds no solution.

    Args:
        owner: the label of each place, int [P]; a label's best place comes first.
        clashes: place -> whether it overlaps each place, bool [P].
        free: whether each place overlaps no chosen one, bool [P].
        left: the labels without a place.
        chosen: label -> place, for the other labels.
        tries: those that are left.
    """
    if not left:
        return chosen
    label = min(sorted(left), key=lambda i: free[owner == i].sum())
    others = left - {label}
    for p, _ in zip(np.flatnonzero(free & (owner == label)), tries):  # noqa: B905
        still = free & ~clashes(int(p))
        if others <= set(owner[still]):
            chosen_too = chosen | {label: int(p)}
            found = _search(owner, clashes, still, others, chosen_too, tries)
            if found is not None:
                return found
    return None


def _free_places(
    box: np.ndarray, inside: np.ndarray, marks: np.ndarray, steps: Sequence[float], scale: float
) -> Iterator[_Place]:
    """The places in a panel where a label and its line overlap no mark, the nearest first.

    Args:
        box: the label, centred on its point, in pixels.
        inside: the panel.
        marks: boxes that neither the label nor its line may overlap.
        steps: distances to try, as multiples of NEAR.
        scale: pixels per point.
    """
    point, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    others = marks[~_touch(np.concatenate([point - 1, point + 1]), marks)]
    for step in steps:
        for dx, dy in SIDES:
            x = dx * (size[0] / 2 + step * NEAR * scale)
            y = dy * (size[1] / 2 + step * NEAR * scale * (1 if abs(dx) < 1 else 0.5))
            shift = np.array([x, y])
            place = np.concatenate([box[:2] + shift - PAD, box[2:] + shift + PAD])[None]  # [1, 4]
            if (place[0, :2] < inside[:2]).any() or (place[0, 2:] > inside[2:]).any():
                continue
            line = _dashes(point, point + shift) if step > steps[0] else np.empty((0, 4))
            line = line[~_touch(place[0], line)]
            if not _overlap(place, marks) and not _overlap(line, others):
                yield _Place((x / scale, y / scale), np.concatenate([place, line]))


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
