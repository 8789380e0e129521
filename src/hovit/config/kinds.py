"""Kinds of analysis and what is special about each. The functions are in `hovit.analysis`."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AnalysisKind:
    """Properties of one kind of analysis.

    Args:
        shows_images: its figure shows photographs, so it takes those that the scale names.
        uses_training_images: it takes labelled training images as well as test images.
        measures_time: its numbers are times, not properties of a trained model.
        args: what `args` may set, with types.
    """

    shows_images: bool = False
    uses_training_images: bool = False
    measures_time: bool = False
    args: Mapping[str, str] = field(default_factory=dict)


ANALYSIS_KINDS = {
    "attention_maps": AnalysisKind(shows_images=True, args={"block": "int"}),
    "generated_images": AnalysisKind(shows_images=True),
    "head_similarity": AnalysisKind(),
    "kept_patches": AnalysisKind(shows_images=True),
    "runtime_breakdown": AnalysisKind(measures_time=True, args={"repeats": "int"}),
    "taylor_pruning": AnalysisKind(
        uses_training_images=True, args={"budget": "float", "steps": "int", "batch_size": "int"}
    ),
}
