"""Kinds of analysis and what is special about each. The functions are in `hovit.analysis`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AnalysisKind:
    """Properties of one kind of analysis.

    Args:
        shows_images: its figure shows photographs, so it takes those that the scale names.
        uses_training_images: it takes labelled training images as well as test images.
        measures_time: its numbers are times, not properties of a trained model.
    """

    shows_images: bool = False
    uses_training_images: bool = False
    measures_time: bool = False


ANALYSIS_KINDS = {
    "attention_maps": AnalysisKind(shows_images=True),
    "generated_images": AnalysisKind(shows_images=True),
    "head_similarity": AnalysisKind(),
    "kept_patches": AnalysisKind(shows_images=True),
    "runtime_breakdown": AnalysisKind(measures_time=True),
    "taylor_pruning": AnalysisKind(uses_training_images=True),
}
