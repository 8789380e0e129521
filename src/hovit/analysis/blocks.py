"""Attention layers and blocks of timm's Swin, ViT and DeiT, found by their attributes."""

from typing import Any

from torch import Tensor, nn


def attention_layers(model: nn.Module) -> list[Any]:
    """All attention modules (with `qkv`, `proj`, `num_heads`) of a model, from the input."""
    parts = ("qkv", "proj", "num_heads")
    return [m for m in model.modules() if all(hasattr(m, part) for part in parts)]


def attention_blocks(model: nn.Module) -> list[Any]:
    """All blocks with `attn` (with `qkv`, `proj`, `num_heads`) and `mlp`, from the input.

    Returns modules, typed as `Any` because timm's attributes are not typed.

    Raises:
        ValueError: if there is none.
    """
    blocks = [
        m
        for m in model.modules()
        if all(hasattr(getattr(m, "attn", None), part) for part in ("qkv", "proj", "num_heads"))
        and hasattr(getattr(m, "mlp", None), "fc2")
    ]
    if not blocks:
        raise ValueError("no block with attn.qkv and mlp.fc2: give a timm Swin, ViT or DeiT")
    return blocks


def attention_weights(attn: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T + bias + mask) of a timm attention module, before dropout.

    Args:
        attn: timm's `Attention` or `WindowAttention`.
        x: [B, N, C], its input; in Swin B counts windows.
        mask: [windows, N, N], mask of shifted windows in Swin, or None.

    Returns:
        [B, heads, N, N]; rows sum to 1.
    """
    batch, tokens, _ = x.shape
    q, k, _ = attn.qkv(x).view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    scores = attn.scale * q @ k.mT  # [B, heads, N, N]
    if hasattr(attn, "relative_position_bias_table"):
        scores = scores + attn._get_rel_pos_bias()
    if mask is not None:
        windows = mask.shape[0]
        scores = scores.view(-1, windows, *scores.shape[1:]) + mask[:, None]
        scores = scores.flatten(0, 1)
    return scores.softmax(-1)
