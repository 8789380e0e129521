"""Head similarity: cosine similarity of the attention maps of a block's heads.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, section 2.2 and figure 4.
The paper leaves two details open. We take as a map the whole attention matrix of an image (in Swin
all of its windows), and the maximum per image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .blocks import attention_layers, attention_weights


def head_similarity(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Largest cosine similarity of each head with another head, averaged by block.

    Attention weights are nonnegative, so heads with uniform attention count as similar.

    Args:
        model: a timm Swin, ViT or DeiT, or a model made of their blocks.
        images: [B, 3, H, W], normalised.

    Returns:
        `blocks`: one row per block with two or more heads: `block` (from 1), `heads`, `similarity`
        in percent (mean over heads and images). `mean`: mean over these blocks. `mean_noise`: half
        width of its 95 % interval over images.

    Raises:
        ValueError: if no attention layer has two heads.
    """
    layers = attention_layers(model)
    similarity = similarity_by_layer(model, layers, images)
    if not similarity:
        raise ValueError("no block has two heads to compare")
    rows = [
        {
            "block": i + 1,
            "heads": layers[i].num_heads,
            "similarity": round(100 * float(values.mean()), 4),
        }
        for i, values in sorted(similarity.items())
    ]
    by_image = 100 * torch.stack([v.mean(1) for v in similarity.values()]).mean(0)  # [B]
    error = float(by_image.std()) / len(images) ** 0.5 if len(images) > 1 else 0.0
    return {
        "blocks": rows,
        "mean": round(float(by_image.mean()), 4),
        "mean_noise": round(1.96 * error, 4),
    }


def similarity_by_layer(model: nn.Module, layers: list[Any], images: Tensor) -> dict[int, Tensor]:
    """Layer index -> `largest_similarity` [B, heads], for layers with two or more heads."""
    similarity: dict[int, Tensor] = {}

    def capture(index: int, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        similarity[index] = largest_similarity(attention_weights(attn, args[0], mask), len(images))

    hooks = [
        attn.register_forward_pre_hook(
            lambda attn, args, kwargs, i=i: capture(i, attn, args, kwargs), with_kwargs=True
        )
        for i, attn in enumerate(layers)
        if attn.num_heads > 1
    ]
    try:
        with torch.inference_mode():
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return similarity


def largest_similarity(weights: Tensor, images: int) -> Tensor:
    """Largest cosine similarity of each head with another head, per image.

    Args:
        weights: [images * windows, heads, N, N]; the windows of an image are adjacent.
        images: number of images.

    Returns:
        [images, heads].
    """
    maps = weights.view(images, -1, *weights.shape[1:]).transpose(1, 2)  # [B, heads, windows, N, N]
    maps = nn.functional.normalize(maps.flatten(2).float(), dim=-1)
    cosine = maps @ maps.mT  # [B, heads, heads]
    diagonal = torch.eye(cosine.shape[-1], dtype=torch.bool, device=cosine.device)
    return cosine.masked_fill(diagonal, -torch.inf).amax(-1)
