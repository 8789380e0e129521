"""The attention blocks of any timm Swin, ViT or DeiT, found by their parts."""

from typing import Any

from torch import Tensor, nn


def attention_layers(model: nn.Module) -> list[Any]:
    """The attention Modules (`qkv`, `proj`, `num_heads`) of any model, from the input."""
    parts = ("qkv", "proj", "num_heads")
    return [m for m in model.modules() if all(hasattr(m, part) for part in parts)]


def attention_blocks(model: nn.Module) -> list[Any]:
    """The blocks that hold `attn` (with `qkv`, `proj`, `num_heads`) and `mlp`, from the input.

    Gives Modules; `Any`, because timm's parts are not typed.

    Raises:
        ValueError: if there is none, as in a model that is neither Swin nor ViT.
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
    """softmax(q k^T + bias + mask) of a timm attention, before dropout.

    Args:
        attn: timm's `Attention` or `WindowAttention`.
        x: [B, N, C], what goes into it; B counts windows in Swin.
        mask: [windows, N, N], Swin's mask of shifted windows; or None.

    Returns:
        [B, heads, N, N]; rows add up to 1.
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
