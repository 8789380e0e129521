"""Swin and DeiT with another share of attention layers, or with heads that read a split each.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, sections 2.1 and 2.2 (figures 3 and 4).
Seed: seeds/002, on memory and computation. How the attention layers are spread is ours: evenly over
the depth, attention first, so that a share of 1/2 is timm's model with its own order.
"""

from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn


class AttentionLayer(nn.Module):
    """The attention half of a timm block: x + attention(norm(x))."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        block.norm2 = block.mlp = block.drop_path2 = block.ls2 = None
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] in Swin, [B, N, C] in DeiT -> the same."""
        block: Any = self.block
        if hasattr(block, "_attn"):
            return x + block.drop_path1(block._attn(block.norm1(x)))
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))


class FeedForwardLayer(nn.Module):
    """The other half: x + MLP(norm(x))."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = block.norm2, block.mlp, block.drop_path2
        self.scale = getattr(block, "ls2", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., C] -> the same."""
        return x + self.drop_path(self.scale(self.mlp(self.norm(x))))


class SplitQKV(nn.Module):
    """Q, K and V of each head from a split of the channels of its own.

    Args:
        dim: channels in and, for each of Q, K and V, out.
        heads: splits.
        bias: as the Linear's that it replaces.
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


def places(layers: int, share: float) -> list[bool]:
    """Which of so many layers are attention: round(layers * share) of them, evenly spread.

    Raises:
        ValueError: if share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"mhsa_share={share} is in [0, 1]")
    n = round(layers * share)
    return [i * n % layers < n for i in range(layers)]


def with_mhsa_share(
    name: str, mhsa_share: float = 0.5, head_splits: bool = False, **kwargs: Any
) -> Any:
    """A timm Swin, ViT or DeiT whose layers are attention to this share, the rest FFN.

    Its depth, in layers of either kind, is the original's. With `head_splits`, each head reads a
    split of the channels (section 2.2).

    Args:
        name: timm's.
        mhsa_share: attention layers over all layers; 0.5 is the original.
        head_splits: see above.
        kwargs: timm's, of the width for one.

    Raises:
        ValueError: for a share that is not in [0, 1], or a model of another kind.
    """
    plain: Any = timm.create_model(name, **kwargs)
    swin = hasattr(plain, "layers")
    if not swin and not isinstance(getattr(plain, "blocks", None), nn.Sequential):
        raise ValueError(f"{name} is neither Swin, ViT nor DeiT")
    places(1, mhsa_share)  # refuses what is no share
    if mhsa_share == 0.5:  # timm's own order: its blocks stay whole
        return _split_heads(plain) if head_splits else plain
    depths = [len(stage.blocks) for stage in plain.layers] if swin else [len(plain.blocks)]
    attends = iter(places(2 * sum(depths), mhsa_share))
    slots = [[next(attends) for _ in range(2 * depth)] for depth in depths]
    most = [max(sum(each), len(each) - sum(each)) for each in slots]
    model: Any = timm.create_model(
        name, **kwargs | ({"depths": tuple(most)} if swin else {"depth": most[0]})
    )
    for stage, each in zip(model.layers if swin else [model], slots, strict=True):
        stage.blocks = nn.Sequential(*halves(list(stage.blocks), each))
    return _split_heads(model) if head_splits else model


def _split_heads(model: Any) -> Any:
    for attn in [m for m in model.modules() if hasattr(m, "qkv")]:
        attn.qkv = SplitQKV(attn.proj.in_features, attn.num_heads, attn.qkv.bias is not None)
    return model


def halves(blocks: list[Any], attends: list[bool]) -> list[nn.Module]:
    """The k-th attention is the k-th block's, so that Swin's shifts alternate; FFN likewise."""
    forward = [FeedForwardLayer(block) for block in blocks]  # before attention lets go of them
    attention = [AttentionLayer(block) for block in blocks]
    taken = [0, 0]
    layers: list[nn.Module] = []
    for attend in attends:
        layers.append((attention if attend else forward)[taken[attend]])
        taken[attend] += 1
    return layers


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
    } | kwargs


default_cfgs = generate_default_cfgs(
    {
        "mhsa_swin_tiny": _cfg(first_conv="patch_embed.proj", classifier="head.fc"),
        "mhsa_deit_tiny": _cfg(first_conv="patch_embed.proj", classifier="head"),
    }
)


def _named(base: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    if pretrained:
        raise ValueError("no weights are published for another share of attention")
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("pretrained_cfg")}
    return with_mhsa_share(base, **kwargs)


@register_model
def mhsa_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Swin-T with `mhsa_share` and `head_splits`; `embed_dim` narrows it."""
    return _named("swin_tiny_patch4_window7_224", pretrained, kwargs)


@register_model
def mhsa_deit_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """DeiT-T with `mhsa_share` and `head_splits`; `embed_dim` narrows it."""
    return _named("deit_tiny_patch16_224", pretrained, kwargs)
