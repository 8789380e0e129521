"""Figures, drawn from records alone, with the numbers of the papers."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.plan import Plan
from ...utils.errors import HovitError
from ...utils.files import atomic
from ..results import Results
from ..sources import Sources, load_sources
from . import analysis_figures
from .attention_figures import (
    attention_curves,
    attention_latency,
    attention_length,
    attention_maps,
)
from .hovit_figures import IDEAS, accuracy_latency, five_ideas, training_curves
from .launcher_figures import generated_images
from .pareto import pareto
from .skipvit_figures import kept_patches, skipvit_accuracy, skipvit_speed, skipvit_warmup

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FOLDER = Path("figures")


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        title: for captions and lists.
        studies: the studies that it reads.
        plot: draws it from one source, or from `Sources` if `all_sources`.
        numbers: what it shows of each row; they decide which source is chosen.
        analyses: the analyses that it reads.
        all_sources: whether it shows each source apart from the others.
    """

    title: str
    studies: tuple[str, ...]
    plot: Callable[[Any], "Canvas"]
    numbers: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()
    all_sources: bool = False

    @property
    def about(self) -> str:
        """What it shows, for captions: the docstring of `plot`."""
        return re.sub(r"\s+", " ", self.plot.__doc__ or "").strip()

    def results(self, sources: Sources) -> Results:
        """The source that it is drawn from."""
        return sources.for_figure(self.studies, self.numbers, self.analyses)

    @contextmanager
    def drawn(self, sources: Sources) -> Iterator["Canvas"]:
        """The figure in the style of all figures; closed afterwards."""
        import matplotlib.pyplot as plt

        from . import style

        with plt.rc_context(style.RC):
            canvas = self.plot(sources if self.all_sources else self.results(sources))
            style.fix_layout(canvas)
            try:
                yield canvas
            finally:
                plt.close(canvas)


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
    with FIGURES[name].drawn(sources) as canvas:
        for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
            content = BytesIO()  # in memory: on a full disk, matplotlib fails in other ways
            canvas.savefig(content, format=suffix[1:], metadata=metadata)
            with atomic(root / FOLDER / f"{name}{suffix}") as path:
                path.write_bytes(content.getvalue())


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
    "generated_images": Figure(
        "Image that the Launcher generates from a photograph",
        ("launcher_imagenet",),
        generated_images,
        analyses=("generated_images",),
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
    "pareto": Figure(
        "Every system under one protocol", ("pareto",), pareto, TIMES_AND_TOP1, all_sources=True
    ),
}
