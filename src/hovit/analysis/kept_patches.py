"""Which patches of an image SkipViT keeps, layer by layer.

Seed: SkipViT (seeds/001), "Identifying Important Patches"; the pictures are ours.
"""

from typing import Any

from torch import Tensor

from ..models import skipvit


def kept_patches(model: Any, images: Tensor) -> dict[str, Any]:
    """The patches that are active after each layer that drops some.

    Args:
        model: a SkipViT of square images whose schedule drops.
        images: [B, 3, H, W], normalised.

    Returns:
        `layers`, counted from 1; `kept`, for each image and layer rows of '1' (kept) and '0'.

    Raises:
        ValueError: if the model drops nothing.
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
