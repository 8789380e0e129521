"""SkipViT: timm's ViT, of whose middle layers only the tokens matter that the class token looks at.

Seed: SkipViT (seeds/001). Paper: `SkipViT: Speeding Up Vision Transformers with a Token-Level Skip
Connection`
    - https://arxiv.org/abs/2401.15293
No code was published. The algorithm is `token_skipping`, the notation `schedule`; this is the glue
to timm. Ours, after EViT (https://arxiv.org/abs/2202.07800), where the seed is silent: tokens are
dropped between a layer's attention and its FFN, and two drops compound.

    timm.create_model("skipvit_small_patch16_224", schedule="6(45%)+11")
"""

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from .schedule import Schedule, keep_count
from .token_skipping import choose, class_attention, fuse, put_back, take


class SkipViT(VisionTransformer):
    """timm's ViT that skips tokens. Its modules, parameters and their names are timm's.

    With an empty schedule, in the warm-up, and where a ratio is too small to drop one token, it
    is timm's to the bit. Otherwise it drops, in training and at evaluation alike. The warm-up is
    of training alone: the epochs are compared as the model that is used in the end (ours).

    Args:
        schedule: in the seed's notation (`Schedule.parse`); `''` drops nothing.
        warmup: the part of all epochs in which nothing is dropped (seed: 15 of 100, that is 0.15).
            It counts once `set_epoch` is told; a model that never was told an epoch drops.
        kwargs: timm's.

    Raises:
        ValueError: for a schedule that is none or does not fit the depth, a warm-up outside 0 to 1,
            or a ViT without a class token or with other blocks than timm's plain ones.
    """

    def __init__(self, schedule: str = "", warmup: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(warmup, int | float) or not 0 <= warmup <= 1:
            raise ValueError(f"warmup={warmup!r}: a part of all epochs, from 0 to 1")
        self.schedule = Schedule.parse(schedule, len(self.blocks))
        self.ratios = dict(zip(self.schedule.layers, self.schedule.ratios, strict=True))
        self.warmup = warmup
        self.dropping = True
        blocks: list[Any] = [self.blocks[layer - 1] for layer in self.schedule.layers]
        if blocks and not self.has_class_token:
            raise ValueError(f"schedule={schedule!r} needs a class token: its attention chooses")
        if any(type(b) is not Block or type(b.attn) is not Attention for b in blocks):
            raise ValueError(f"schedule={schedule!r} needs timm's plain Block and Attention")

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Drop from epoch `warmup * epochs` on, rounded to the nearest (a half up; ours).

        A function of its arguments alone: after a resume it is what it would have been.

        Args:
            epoch: the one that begins, counted from 0.
            epochs: all of them.
        """
        self.dropping = epoch >= math.floor(Fraction(str(self.warmup)) * epochs + Fraction(1, 2))

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, 3, H, W] -> [B, N, C] tokens of the last layer: fewer than ViT's if none returned."""
        if not self._drops():
            return super().forward_features(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise ValueError("a model that drops tokens takes no attention mask")
        return self.norm(self._skip(self._embed(x)))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, while nothing is dropped.

        Raises:
            ValueError: while it drops: a layer in between has no grid of features.
        """
        if self._drops():
            raise ValueError("no grid of features in a layer that skips tokens: use schedule=''")
        return super().forward_intermediates(x, *args, **kwargs)

    def _drops(self) -> bool:
        return bool(self.ratios) and (self.dropping or not self.training)

    def _embed(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C], the first layer's input."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def _skip(self, x: Tensor, indices: dict[int, Tensor] | None = None) -> Tensor:
        """All layers, [B, N, C] -> [B, N', C]; `indices` is given each dropping layer's."""
        left: list[tuple[Tensor, Tensor]] = []  # the sequence and its index, drop by drop
        fused = 0  # fused tokens so far, at the end; they are never ranked (ours)
        for layer, block in enumerate(self.blocks, start=1):
            if layer == self.schedule.back:
                while left:
                    x = put_back(*left.pop(), x)
            patches = x.shape[1] - self.num_prefix_tokens - fused
            keep = keep_count(patches, self.ratios.get(layer, Fraction(0)))
            if keep == patches:
                x = checkpoint(block, x) if self.grad_checkpointing else block(x)
                continue
            whole, index, x = self._drop(x, block, keep, fused)  # x [B, prefix + keep + fused, C]
            if self.schedule.fused:
                fused += 1
            else:
                left.append((whole, index))
            if indices is not None:
                indices[layer] = index
        return x

    def _drop(self, x: Tensor, block: Any, keep: int, fused: int) -> tuple[Tensor, Tensor, Tensor]:
        """A layer that drops: the sequence after its attention, the index of what is kept, and that
        (and what fuses the rest) after its FFN."""
        out, scores = _attend(block.attn, block.norm1(x), self.schedule.fused)
        x = x + block.drop_path1(block.ls1(out))  # [B, N, C]
        index = choose(scores, keep, self.num_prefix_tokens, fused)
        kept = take(x, index)
        if self.schedule.fused:
            kept = torch.cat([kept, fuse(x, index, scores)], dim=1)
        return x, index, kept + block.drop_path2(block.ls2(block.mlp(block.norm2(kept))))


def _attend(attn: Any, x: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """timm's attention in a fused kernel, and beside it the class token's row.

    Args:
        attn: timm's `Attention`.
        x: [B, N, C], normed.
        differentiable: whether gradients pass through the row; choosing needs none.

    Returns:
        [B, N, C], and scores [B, N].
    """
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d] each
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    out = attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    if not differentiable:
        q, k = q.detach(), k.detach()
    return out, class_attention(q, k, attn.scale)


@torch.no_grad()
def kept_patches(model: SkipViT, x: Tensor) -> Tensor:
    """Which patches of each image every layer's FFN works on.

    Args:
        model: in evaluation mode.
        x: [B, 3, H, W], normalised.

    Returns:
        [B, depth, patches] booleans, patches in raster order.

    Raises:
        ValueError: for a model in training mode, whose dropout would choose along.
    """
    if model.training:
        raise ValueError("kept_patches needs the model in evaluation mode: model.eval()")
    x, schedule = model._embed(x), model.schedule
    indices: dict[int, Tensor] = {}
    model._skip(x, indices)
    prefix, (batch, n, _) = model.num_prefix_tokens, x.shape
    kept = torch.ones(batch, len(model.blocks), n - prefix, dtype=torch.bool, device=x.device)
    places = torch.arange(n, device=x.device).expand(batch, n)  # of each token, in the whole
    for layer, index in indices.items():
        places = places.gather(1, index)
        active = torch.zeros(batch, n, dtype=torch.bool, device=x.device).scatter(1, places, True)
        kept[:, layer - 1 : schedule.back and schedule.back - 1] = active[:, None, prefix:]
        if schedule.fused:
            places = F.pad(places, (0, 1))  # a fused token is at no patch; place 0 is the class's
    return kept


default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "pool_size": None,
            "num_classes": 1000,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in (
            "skipvit_tiny_patch16_224",
            "skipvit_tiny_patch8_224",
            "skipvit_small_patch16_224",
            "skipvit_small_patch8_224",
            "skipvit_base_patch16_224",
        )
    }
)
TINY: dict[str, Any] = {"embed_dim": 192, "num_heads": 3}
SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}


@register_model
def skipvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_tiny_patch16_224`."""
    return build_model_with_cfg(SkipViT, "skipvit_tiny_patch16_224", pretrained, **TINY | kwargs)


@register_model
def skipvit_tiny_patch8_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """The same with patches of 8 pixels."""
    args = {**TINY, "patch_size": 8}
    return build_model_with_cfg(SkipViT, "skipvit_tiny_patch8_224", pretrained, **args | kwargs)


@register_model
def skipvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_small_patch16_224`: the seed's."""
    return build_model_with_cfg(SkipViT, "skipvit_small_patch16_224", pretrained, **SMALL | kwargs)


@register_model
def skipvit_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_small_patch8_224`."""
    args = {**SMALL, "patch_size": 8}
    return build_model_with_cfg(SkipViT, "skipvit_small_patch8_224", pretrained, **args | kwargs)


@register_model
def skipvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_base_patch16_224`, whose width and heads are its class's defaults."""
    return build_model_with_cfg(SkipViT, "skipvit_base_patch16_224", pretrained, **kwargs)
