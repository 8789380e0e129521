"""Swin and DeiT with a chosen share of attention layers, or with per-head channel splits.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, sections 2.1 and 2.2 (figures 3 and 4).
Upstream: none is published for this analysis; Swin and DeiT are timm's.

How the attention layers are placed is our choice: evenly over the depth, attention first. A share
of 1/2 is therefore timm's model with its own order of layers.
"""

from functools import partial
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .build import build_model


class AttentionLayer(nn.Module):
    """The attention half of a timm block: x + attention(norm(x))."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        block.norm2 = block.mlp = block.drop_path2 = block.ls2 = None
        self.block = block

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Resize the windows of a Swin block; arguments as in timm."""
        self.block.set_input_size(*args, **kwargs)

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """[B, H, W, C] in Swin, [B, N, C] in DeiT -> the same; `mask` as in timm's ViT."""
        block: Any = self.block
        if hasattr(block, "_attn"):
            return x + block.drop_path1(block._attn(block.norm1(x)))
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **mask)))


class FeedForwardLayer(nn.Module):
    """The feed-forward half of a timm block: x + MLP(norm(x))."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = block.norm2, block.mlp, block.drop_path2
        self.scale = getattr(block, "ls2", nn.Identity())

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the layer works on any number of tokens."""

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        """[B, ..., C] -> the same; `mask` has no effect."""
        return x + self.drop_path(self.scale(self.mlp(self.norm(x))))


class SplitQKV(nn.Module):
    """Projection to Q, K and V in which each head reads its own split of the channels.

    Args:
        dim: channels of the input, and of each of Q, K and V.
        heads: number of splits.
        bias: whether it has a bias.

    Weights start with timm's standard deviation of 0.02. As each output reads C/heads channels
    instead of C, q and k are smaller at the start, and attention is flatter.
    """

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(heads, dim // heads, 3 * dim // heads))
        self.bias = nn.Parameter(torch.zeros(3 * dim)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, 3 C], in timm's order: Q of all heads, K, V."""
        splits = x.unflatten(-1, (self.heads, -1))  # [B, N, heads, C/heads]
        out = torch.einsum("bnhi,hio->bnho", splits, self.weight)
        out = out.unflatten(-1, (3, -1)).transpose(2, 3).flatten(2)  # [B, N, 3, heads, d]
        return out if self.bias is None else out + self.bias


def attention_layout(layers: int, share: float) -> list[bool]:
    """For each layer, whether it is attention: round(layers * share) of them, evenly spaced.

    Raises:
        ValueError: if `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"mhsa_share={share} is not in [0, 1]")
    n = round(layers * share)
    return [i * n % layers < n for i in range(layers)]


def with_mhsa_share(
    name: str, mhsa_share: float = 0.5, head_splits: bool = False, **kwargs: Any
) -> Any:
    """Build a timm Swin, ViT or DeiT with this share of attention layers; the others are FFNs.

    The number of layers, attention and FFN together, stays that of timm's model.

    Args:
        name: timm's name of the model.
        mhsa_share: attention layers over all layers; 0.5 is the original.
        head_splits: each head reads its own split of the channels (section 2.2).
        kwargs: arguments of timm's model.

    Raises:
        ValueError: for a share outside [0, 1], or another architecture.
    """
    model: Any = timm.create_model(name, **kwargs)
    is_swin = hasattr(model, "layers")
    if not is_swin and not isinstance(getattr(model, "blocks", None), nn.Sequential):
        raise ValueError(f"{name} is neither Swin, ViT nor DeiT")
    depths = [len(stage.blocks) for stage in model.layers] if is_swin else [len(model.blocks)]
    layout = attention_layout(2 * sum(depths), mhsa_share)
    if mhsa_share != 0.5:  # at 0.5 timm's blocks stay whole
        stages = [[layout.pop(0) for _ in range(2 * depth)] for depth in depths]
        # Enough blocks to supply the attention layers and the FFNs of each stage.
        blocks = [max(sum(stage), len(stage) - sum(stage)) for stage in stages]
        depth = {"depths": tuple(blocks)} if is_swin else {"depth": blocks[0]}
        model = timm.create_model(name, **kwargs | depth)
        for stage, is_attention in zip(model.layers if is_swin else [model], stages, strict=True):
            stage.blocks = nn.Sequential(*split_blocks(list(stage.blocks), is_attention))
        if not is_swin:
            info = model.feature_info[0]
            model.feature_info = [
                info | {"module": f"blocks.{i}"} for i in range(len(model.blocks))
            ]
    return _split_heads(model) if head_splits else model


def _split_heads(model: Any) -> Any:
    for attn in [m for m in model.modules() if hasattr(m, "qkv")]:
        qkv = SplitQKV(attn.proj.in_features, attn.num_heads, attn.qkv.bias is not None)
        attn.qkv = qkv.to(attn.proj.weight)  # its device and dtype
    return model


def split_blocks(blocks: list[Any], is_attention: list[bool]) -> list[nn.Module]:
    """Split blocks into attention and FFN layers, and arrange them in this order.

    The k-th attention layer comes from the k-th block, so that Swin's shifts alternate; likewise
    the FFN layers.
    """
    ffns = iter([FeedForwardLayer(block) for block in blocks])  # first: AttentionLayer drops them
    attentions = iter([AttentionLayer(block) for block in blocks])
    return [next(attentions) if attention else next(ffns) for attention in is_attention]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "fixed_input_size": True,
        "pool_size": None,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "first_conv": "patch_embed.proj",
    } | kwargs


BASES = {
    "mhsa_swin_tiny": "swin_tiny_patch4_window7_224",
    "mhsa_deit_tiny": "deit_tiny_patch16_224",
}
default_cfgs = generate_default_cfgs(
    {
        "mhsa_swin_tiny": _cfg(classifier="head.fc"),
        "mhsa_deit_tiny": _cfg(classifier="head"),
    }
)


def _mhsa(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model(
        partial(with_mhsa_share, BASES[variant]),
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def mhsa_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Swin-T with `mhsa_share` and `head_splits`; `embed_dim` sets the width."""
    return _mhsa("mhsa_swin_tiny", pretrained, **kwargs)


@register_model
def mhsa_deit_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """DeiT-T with `mhsa_share` and `head_splits`; `embed_dim` sets the width."""
    return _mhsa("mhsa_deit_tiny", pretrained, **kwargs)
