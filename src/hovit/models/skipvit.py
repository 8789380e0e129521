"""SkipViT: a ViT whose middle layers process only the tokens with high class attention.

Paper: `SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection`
    - https://arxiv.org/abs/2401.15293
Source: the SkipViT poster.
Upstream: no code is published; the ViT is timm's (timm/models/vision_transformer.py).

The algorithm is in `token_skipping`, the notation in `schedule`; this file connects them to timm.
Where the poster is silent we follow EViT (https://arxiv.org/abs/2202.07800): tokens are dropped
between the attention and the FFN of a layer, and a second drop applies to the remaining tokens.

    timm.create_model("skipvit_small_patch16_224", schedule="6(45%)+11")
"""

import math
from fractions import Fraction
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from .build import build_model
from .schedule import NOTATION, Schedule, keep_count
from .token_skipping import choose, class_attention, fuse, put_back, take


class SkipViT(VisionTransformer):
    """timm's ViT with token skipping. Modules, parameters and their names are those of timm.

    With an empty schedule, during warm-up, and where a ratio is too small to drop one token, its
    outputs are bit-identical to timm's. Otherwise it drops tokens in training and in evaluation.
    The warm-up affects training only, so that every epoch is validated as the final model runs
    (our choice).

    Args:
        schedule: in the poster's notation (`Schedule.parse`); `''` drops nothing.
        warmup: fraction of all epochs in which nothing is dropped (poster: 15 of 100, or 0.15). It
            takes effect through `set_epoch`; without such a call the model drops tokens.
        kwargs: arguments of timm's ViT.

    Raises:
        ValueError: for an invalid schedule or one that does not fit the depth, a warm-up outside 0
            to 1, a ViT without a class token or with other blocks than timm's plain ones.
    """

    def __init__(
        self,
        schedule: Annotated[str, NOTATION, "6(45%)+11"] = "",
        warmup: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(warmup, int | float) or not 0 <= warmup <= 1:
            raise ValueError(f"warmup={warmup!r}: a fraction of all epochs, from 0 to 1")
        self.schedule = Schedule.parse(schedule, len(self.blocks))
        self.ratios = dict(zip(self.schedule.layers, self.schedule.ratios, strict=True))
        self.warmup = warmup
        self.dropping = True
        blocks: list[Any] = [self.blocks[layer - 1] for layer in self.schedule.layers]
        if blocks and not self.has_class_token:
            raise ValueError(f"schedule={schedule!r} needs a class token to rank the patches")
        if any(type(b) is not Block or type(b.attn) is not Attention for b in blocks):
            raise ValueError(f"schedule={schedule!r} needs timm's plain Block and Attention")

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Drop from epoch `warmup * epochs` on, rounded to the nearest epoch.

        Halves are rounded up, which is our choice. The result depends only on the arguments, so a
        resumed run behaves the same.

        Args:
            epoch: the epoch that begins, counted from 0.
            epochs: number of all epochs.
        """
        self.dropping = epoch >= math.floor(Fraction(str(self.warmup)) * epochs + Fraction(1, 2))

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, 3, H, W] -> [B, N, C], the tokens of the last layer; fewer if none return."""
        if not self._drops():
            return super().forward_features(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise ValueError("a model that drops tokens takes no attention mask")
        return self.norm(self._skip(self._embed(x)))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Features of chosen layers, as in timm, while no tokens are dropped.

        Raises:
            RuntimeError: if the model drops tokens: the layers then have no grid of features.
        """
        if self._drops():
            raise RuntimeError(_NO_FEATURES)
        return super().forward_intermediates(x, *args, **kwargs)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """Remove layers that are not needed for features, as in timm.

        Raises:
            RuntimeError: if the model has a schedule.
        """
        if self.ratios:
            raise RuntimeError(_NO_FEATURES)
        return super().prune_intermediate_layers(*args, **kwargs)

    def _drops(self) -> bool:
        return bool(self.ratios) and (self.dropping or not self.training)

    def _embed(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C], the input of the first layer."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def _skip(self, x: Tensor, indices: dict[int, Tensor] | None = None) -> Tensor:
        """Run all layers, [B, N, C] -> [B, N', C].

        Args:
            x: output of `_embed`.
            indices: filled with the index of kept tokens of each layer that drops.
        """
        dropped: list[tuple[Tensor, Tensor]] = []  # whole sequence and kept index, per drop
        fused = 0  # fused tokens at the end of the sequence; never ranked (our choice)
        for layer, block in enumerate(self.blocks, start=1):
            if layer == self.schedule.back:
                while dropped:
                    x = put_back(*dropped.pop(), x)
            patches = x.shape[1] - self.num_prefix_tokens - fused
            keep = keep_count(patches, self.ratios.get(layer, Fraction(0)))
            if keep == patches:
                x = checkpoint(block, x) if self.grad_checkpointing else block(x)
                continue
            whole, index, x = self._drop(x, block, keep, fused)  # x [B, prefix + keep + fused, C]
            if self.schedule.fused:
                fused += 1
            else:
                dropped.append((whole, index))
            if indices is not None:
                indices[layer] = index
        return x

    def _drop(self, x: Tensor, block: Any, keep: int, fused: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer that drops tokens.

        Returns:
            the sequence after attention [B, N, C], the index of kept tokens [B, K], and the kept
            (and fused) tokens after the FFN [B, K (+ 1), C].
        """
        out, scores = _attend(block.attn, block.norm1(x), self.schedule.fused)
        x = x + block.drop_path1(block.ls1(out))  # [B, N, C]
        index = choose(scores, keep, self.num_prefix_tokens, fused)
        kept = take(x, index)
        if self.schedule.fused:
            kept = torch.cat([kept, fuse(x, index, scores)], dim=1)
        return x, index, kept + block.drop_path2(block.ls2(block.mlp(block.norm2(kept))))


_NO_FEATURES = "features_only not implemented for SkipViT models that drop tokens: use schedule=''"


def _attend(attn: Any, x: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """timm's attention in a fused kernel, and the attention of the class token.

    Args:
        attn: timm's `Attention`.
        x: [B, N, C], after the norm.
        differentiable: whether gradients pass through the scores; ranking needs none.

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
    """Patches that the FFN of each layer processes.

    Args:
        model: in evaluation mode.
        x: [B, 3, H, W], normalised.

    Returns:
        [B, depth, patches] booleans, patches in raster order.

    Raises:
        ValueError: if the model is in training mode: dropout would affect the ranking.
    """
    if model.training:
        raise ValueError("kept_patches needs the model in evaluation mode: model.eval()")
    x, schedule = model._embed(x), model.schedule
    indices: dict[int, Tensor] = {}
    model._skip(x, indices)
    prefix, (batch, n, _) = model.num_prefix_tokens, x.shape
    kept = torch.ones(batch, len(model.blocks), n - prefix, dtype=torch.bool, device=x.device)
    positions = torch.arange(n, device=x.device).expand(batch, n)  # in the whole sequence
    for layer, index in indices.items():
        positions = positions.gather(1, index)
        active = torch.zeros(batch, n, dtype=torch.bool, device=x.device)
        active = active.scatter(1, positions, True)
        kept[:, layer - 1 : schedule.back and schedule.back - 1] = active[:, None, prefix:]
        if schedule.fused:
            positions = F.pad(positions, (0, 1))  # a fused token is no patch: position 0
    return kept


TINY: dict[str, Any] = {"embed_dim": 192, "num_heads": 3}
SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}
MODEL_ARGS: dict[str, dict[str, Any]] = {
    "skipvit_tiny_patch16_224": TINY,
    "skipvit_tiny_patch8_224": TINY | {"patch_size": 8},
    "skipvit_small_patch16_224": SMALL,
    "skipvit_small_patch8_224": SMALL | {"patch_size": 8},
    "skipvit_base_patch16_224": {},
}
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
        for name in MODEL_ARGS
    }
)


def _skipvit(variant: str, pretrained: bool, **kwargs: Any) -> SkipViT:
    return build_model(
        SkipViT,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **MODEL_ARGS[variant] | kwargs,
    )


@register_model
def skipvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_tiny_patch16_224`."""
    return _skipvit("skipvit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def skipvit_tiny_patch8_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """The same with patches of 8 pixels."""
    return _skipvit("skipvit_tiny_patch8_224", pretrained, **kwargs)


@register_model
def skipvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_small_patch16_224`: the model of the poster."""
    return _skipvit("skipvit_small_patch16_224", pretrained, **kwargs)


@register_model
def skipvit_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_small_patch8_224`."""
    return _skipvit("skipvit_small_patch8_224", pretrained, **kwargs)


@register_model
def skipvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> SkipViT:
    """On timm's `vit_base_patch16_224`, with timm's default width and heads."""
    return _skipvit("skipvit_base_patch16_224", pretrained, **kwargs)
