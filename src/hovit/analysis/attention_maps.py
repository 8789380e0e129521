"""Attention map of one token: a row of the attention matrix.

Source: the HoViT deck, which compares similarities by loss and time. The maps are our addition.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..attention.modules import Size, to_heads


def attention_maps(model: nn.Module, images: Tensor, block: int = 0) -> dict[str, Any]:
    """Attention from the central token of the first image to all tokens, averaged over heads.

    Args:
        model: a model whose blocks use a module of `hovit.attention` that has `weights`. In a
            Swin, the map is that of the first window.
        images: [B, 3, H, W], normalised.
        block: index of the attention module, counted from the input.

    Returns:
        `map`: [height, width] attention weights, which sum to 1. `entropy`: entropy of these
        weights in nats; the logarithm of the number of tokens for uniform attention.

    Raises:
        ValueError: if the model has no such module.
    """
    layers = [m for m in model.modules() if hasattr(m, "weights") and hasattr(m, "heads")]
    if block >= len(layers):
        raise ValueError(f"no attention {block} with weights: there are {len(layers)}")
    captured: list[tuple[Tensor, Size]] = []

    def capture(layer: Any, args: tuple[Any, ...]) -> None:
        q, k, _, _, size, *rest = args
        heads = (to_heads(t[:1], layer.heads) for t in (q, k))
        captured.append((layer.weights(*heads, rest[0] if rest else None)[0], size))

    hook = layers[block].register_forward_pre_hook(capture)
    try:
        with torch.inference_mode():
            model.eval()(images[:1])
    finally:
        hook.remove()
    weights, (height, width) = captured[0]  # [heads, N, N]
    row = weights.float().mean(0)[(height // 2) * width + width // 2]
    entropy = -(row * row.clamp(min=1e-12).log()).sum()
    values = [[round(float(x), 6) for x in line] for line in row.view(height, width)]
    return {"map": values, "entropy": round(float(entropy), 6)}
