"""Patches that SkipViT keeps, layer by layer.

Source: the SkipViT poster, "Identifying Important Patches". The pictures are our addition.
"""

from typing import Any

from torch import Tensor

from ..models import skipvit


def kept_patches(model: Any, images: Tensor) -> dict[str, Any]:
    """Active patches after each layer that drops patches.

    Args:
        model: a SkipViT for square images.
        images: [B, 3, H, W], normalised.

    Returns:
        `layers`: the layers that drop patches, counted from 1. `kept`: for each image and layer,
        rows of '1' (kept) and '0' (dropped).

    Raises:
        ValueError: if the model drops no patches.
    """
    if not getattr(model, "ratios", None):
        raise ValueError("this model drops no patches")
    kept = skipvit.kept_patches(model, images)  # [B, depth, patches]
    layers = list(model.schedule.layers)
    side = round(kept.shape[2] ** 0.5)
    return {
        "layers": layers,
        "kept": [
            [
                ["".join(str(int(x)) for x in line) for line in image[layer - 1].view(side, side)]
                for layer in layers
            ]
            for image in kept
        ],
    }
