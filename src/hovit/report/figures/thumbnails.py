"""README of the figures, with thumbnails drawn from the committed records."""

from io import BytesIO
from pathlib import Path

from ...utils.files import atomic
from ..results import Results
from ..sources import Sources
from .draw import FIGURES, FOLDER, Figure

README, THUMBNAILS = FOLDER / "README.md", FOLDER / "thumbnails"
WIDTHS = (480, 360, 240)  # pixels
COLOURS = 128
LIMIT = 30_000  # bytes


def figures_section(sources: Sources) -> str:
    """The figures as a Markdown table: thumbnail, content, studies, sources and command.

    Args:
        sources: the committed records, without those of this machine.
    """
    lines = ["| figure | what it shows |", "| :-- | :-- |"]
    for name, figure in FIGURES.items():
        picture = f"![{figure.title}]({THUMBNAILS.name}/{name}.png)"
        found = committed(figure, sources)
        facts = [
            f"**{figure.title}.** {figure.about}",
            f"Studies: {', '.join(f'`{study}`' for study in figure.studies)}",
            f"Thumbnail drawn from: {', '.join(map(_link, found))}" if found else "",
            f"`snakemake --cores all {FOLDER}/{name}.pdf`",
        ]
        cells = picture if found else "no committed results", "<br>".join(filter(None, facts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["", *lines, ""])


def committed(figure: Figure, sources: Sources) -> list[Results]:
    """The committed results that a figure is drawn from; empty if there are none."""
    studies = map(sources.plan.study, figure.studies)
    shown = (
        [results for study in studies for results in sources.timed(study)]
        if figure.all_sources
        else [figure.results(sources)]
    )
    return [results for results in sources.evidence if results in shown]


def _link(results: Results) -> str:
    place = results.folder.relative_to(results.base.parent).as_posix()
    return f"[`{place}`](../{results.folder.as_posix()})"


def thumbnail(sources: Sources, name: str) -> bytes:
    """A figure as a PNG with a palette, at the largest of WIDTHS that fits into LIMIT bytes."""
    from PIL import Image

    content = BytesIO()
    with FIGURES[name].drawn(sources) as canvas:
        canvas.savefig(content, format="png", dpi=2 * WIDTHS[0] / canvas.get_figwidth())
    large = Image.open(content).convert("RGB")
    png = b""
    for width in WIDTHS:
        size = width, round(large.height * width / large.width)
        small = large.resize(size, Image.Resampling.LANCZOS)
        # Maximum coverage keeps rare colours, such as those of a few markers on white.
        small = small.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        content = BytesIO()
        small.save(content, format="png", optimize=True)
        png = content.getvalue()
        if len(png) <= LIMIT:
            break
    return png


def write_thumbnails(sources: Sources, root: Path) -> None:
    """Draw every figure that has committed results, and delete all other thumbnails."""
    names = [name for name, figure in FIGURES.items() if committed(figure, sources)]
    for name in names:
        content = thumbnail(sources, name)
        with atomic(root / THUMBNAILS / f"{name}.png") as path:
            path.write_bytes(content)
    for file in (root / THUMBNAILS).glob("*.png"):
        if file.stem not in names:
            file.unlink()
