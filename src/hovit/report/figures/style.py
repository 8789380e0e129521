"""One look for every figure: print sizes, and colours that colour-blind readers can tell apart."""

from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure as Canvas
from matplotlib.transforms import Bbox

mpl.use("Agg")

# Okabe and Ito's palette, in an order whose greys differ too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
MANY_MARKERS = [*MARKERS, "p", "<", ">", "h", "*", "d", "H"]
STYLES = ["-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (1, 1))]


def look(n: int) -> dict[str, Any]:
    """Colour, marker and line of the n-th thing that a figure tells apart."""
    return {
        "color": COLOURS[n % len(COLOURS)],
        "marker": MANY_MARKERS[n % len(MANY_MARKERS)],
        "linestyle": STYLES[n % len(STYLES)],
    }


OURS, REPORTED = "#0072B2", "#D55E00"
REPORTED_LOOK: dict[str, Any] = {"color": REPORTED, "marker": "D", "mfc": "white"}
BATCH_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": OURS, "marker": "o"},
    {"color": "#56B4E9", "marker": "s"},
    {"color": "#009E73", "marker": "^"},
)
WIDTH = 7.0  # inches: the text width of a page
SMALL = 7.0  # points

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=STYLES),
    "figure.constrained_layout.use": True,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def fix_layout(canvas: Canvas) -> None:
    """Lay a figure out once, and keep that layout with positions rounded to 1e-6 of its size.

    The solver of the constrained layout adds in an order that depends on memory addresses. Its
    last digits would change some pixels from one process to the next.
    """
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    for ax in canvas.axes:
        ax.set_position(Bbox(ax.get_position(original=True).get_points().round(6)), "original")
        ax.set_position(Bbox(ax.get_position().get_points().round(6)), "active")
    for text in canvas.texts:
        x, y = text.get_position()
        text.set_position((round(x, 6), round(y, 6)))
