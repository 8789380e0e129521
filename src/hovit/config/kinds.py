"""Kinds of analysis and their properties. The functions are in `hovit.analysis`."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AnalysisKind:
    """Properties of one kind of analysis.

    Args:
        shows_images: the figure shows photographs, from the dataset that the scale names.
        uses_training_images: uses labelled training images as well as test images.
        measures_time: the numbers are times, not properties of a trained model.
        args: name -> type of each argument that `args` may set.
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
