"""How alike the heads of a block look: cosine similarity of their attention maps.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, section 2.2 and figure 4.
Seed: seeds/002, on computation redundancy. That a map is an image's whole matrix, all of its
windows in Swin, and that the maximum is taken image by image, is ours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .blocks import attention_layers, attention_weights


def head_similarity(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """For each block, each head's largest cosine similarity with another head, averaged.

    Attention weights are never negative, so heads that look everywhere alike count as alike.

    Args:
        model: a timm Swin, ViT or DeiT, or one made of its blocks.
        images: [B, 3, H, W], normalised.

    Returns:
        `blocks`, a row for each block of two heads or more: `block` (from 1), `heads` and
        `similarity` in percent, mean over heads and images; `mean`, over those blocks; and
        `mean_noise`, the half width of its 95 % interval over images.

    Raises:
        ValueError: if the model has no attention of two heads.
    """
    layers = attention_layers(model)
    found: dict[int, Tensor] = {}

    def look(index: int, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        found[index] = largest_similarity(attention_weights(attn, args[0], mask), len(images))

    hooks = [
        attn.register_forward_pre_hook(
            lambda attn, args, kwargs, i=i: look(i, attn, args, kwargs), with_kwargs=True
        )
        for i, attn in enumerate(layers)
        if attn.num_heads > 1
    ]
    if not hooks:
        raise ValueError("no block has two heads to compare")
    try:
        with torch.inference_mode():
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    rows = [
        {
            "block": i + 1,
            "heads": layers[i].num_heads,
            "similarity": round(100 * float(each.mean()), 4),
        }
        for i, each in sorted(found.items())
    ]
    by_image = 100 * torch.stack([each.mean(1) for each in found.values()]).mean(0)  # [B]
    error = float(by_image.std()) / len(images) ** 0.5 if len(images) > 1 else 0.0
    return {
        "blocks": rows,
        "mean": round(float(by_image.mean()), 4),
        "mean_noise": round(1.96 * error, 4),
    }


def largest_similarity(weights: Tensor, images: int) -> Tensor:
    """Each head's largest cosine similarity with another head, by image.

    Args:
        weights: [images * windows, heads, N, N], an image's windows one after the other.
        images: how many.

    Returns:
        [images, heads].
    """
    maps = weights.view(images, -1, *weights.shape[1:]).transpose(1, 2)  # [B, heads, windows, N, N]
    maps = nn.functional.normalize(maps.flatten(2).float(), dim=-1)
    alike = maps @ maps.mT  # [B, heads, heads]
    itself = torch.eye(alike.shape[-1], dtype=torch.bool, device=alike.device)
    return alike.masked_fill(itself, -torch.inf).amax(-1)
