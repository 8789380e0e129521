"""LeViT as the HoViT deck built it, and the deck's five ideas on it.

Paper: `LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference`
    - https://arxiv.org/abs/2104.01136
Source: the HoViT deck, "02 LeViT Based Approach" and "04 New Ideas".
Upstream: none is published; the stem and the heads are timm's (timm/models/levit.py).

The deck's model differs from LeViT (timm's `levit_256`): one Linear produces q, k and v, heads are
64 wide, there is no attention bias, and the shrink blocks between the stages compute keys and
values that they do not use. `levit_deck` keeps all of this, because the deck's numbers describe it.
`levit_deck_fixed` is our corrected version. `attention="jaccard"`, for example, puts another form
of `hovit.attention` into every block (slides "LeViT + ...").

The models take images of any size from 64 x 64 pixels.
"""

from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.levit import NormLinear, Stem16
from torch import Tensor, nn

from ..attention.forms import ATTENTION_OPTIONS, FormName, get_form
from ..attention.modules import check_attention
from .build import build_model
from .levit_layers import HEAD_DIM, SHRINKS, AttentionStage, Block, ConvStage, to_grid, to_tokens


class LevitDeck(nn.Module):
    """The deck's LeViT: stem to 1/16, three stages, mean over tokens, two heads.

    Args:
        num_classes: outputs; with 0 the model returns pooled features.
        in_chans: channels of the image.
        embed_dim: channels of each stage, multiples of 64.
        depth: blocks of each stage.
        shrink: the blocks between the stages: `'deck'`, `'fixed'` or `'conv'`.
        conv_stages: stages, counted from 0, that are 1 x 1 convolutions instead (idea 1).
        checkerboard: `'mask'` or `'drop'` for the attention of the second stage (idea 2).
        drop_rate: dropout in MLPs and heads (idea 5).
        global_pool: `'avg'`, or `''` to return tokens.
        attention: attention form of every block. Shrink blocks keep dot-product attention.
        device, dtype: of parameters and buffers.
        attention_options: options of the attention form (`power` of `focused`, for example).

    Raises:
        ValueError: for an unknown attention form or argument, for a form that needs the whole grid
            with `checkerboard='drop'`, or for attention in a width that is not a multiple of 64;
            `forward` raises it for images smaller than 64 x 64 pixels.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: tuple[int, ...] = (256, 384, 512),
        depth: tuple[int, ...] = (3, 3, 2),
        shrink: Literal["deck", "fixed", "conv"] = "deck",
        conv_stages: tuple[int, ...] = (),
        checkerboard: Literal["", "mask", "drop"] = "",
        drop_rate: float = 0.0,
        global_pool: Literal["", "avg"] = "avg",
        attention: FormName = "dot",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        if unknown := [name for name in attention_options if name not in ATTENTION_OPTIONS]:
            raise ValueError(f"LevitDeck takes no {', '.join(unknown)}")
        check_attention(attention, attention_options)
        if get_form(attention).needs_grid and checkerboard == "drop":
            raise ValueError(
                f"attention={attention!r} convolves over all tokens: not with checkerboard='drop'"
            )
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.global_pool: str = global_pool
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.distilled_training = False
        self.grad_checkpointing = False
        self.stem = Stem16(in_chans, embed_dim[0], act_layer=nn.Hardswish)
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        form = {"form": attention, **attention_options}
        reduction = 16
        for i, (dim, blocks) in enumerate(zip(embed_dim, depth, strict=True)):
            previous = embed_dim[max(i - 1, 0)]
            if i in conv_stages:
                self.stages.append(ConvStage(previous, dim, blocks))
            else:
                down = SHRINKS[shrink](previous, dim, dim // HEAD_DIM, drop_rate) if i else None
                where = checkerboard if i == 1 else ""
                layers = [Block(dim, drop_rate, where, form) for _ in range(blocks)]
                self.stages.append(AttentionStage(down, layers))
                reduction *= 2 if i else 1
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.reset_classifier(num_classes)
        self.to(device=device, dtype=dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices without weight decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, as in timm's LeViT."""
        blocks = [
            (r"^stages\.(\d+)\.(?:shrink|convs)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The class head and the distillation head."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the heads (BN, dropout, Linear); with `num_classes=0` remove them.

        Raises:
            ValueError: for a pooling other than `'avg'` or `''`, or classes without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"global_pool={pool!r}: 'avg', or '' (none) with num_classes=0")
        self.global_pool, self.num_classes = pool, num_classes
        self.head, self.head_dist = (self._head(num_classes) for _ in range(2))

    def _head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = NormLinear(self.num_features, num_classes, drop=self.drop_rate)
        return head.to(next(self.stem.parameters())).train(self.training)  # its device and dtype

    def set_distilled_training(self, enable: bool = True) -> None:
        """With `enable`, a forward pass in training mode returns the logits of both heads."""
        self.distilled_training = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, as in timm.

        Args:
            x: [B, 3, H, W].
            indices: the last n stages if an int, these stages if a list, all if None.
            norm: not used, as no stage is followed by a norm.
            stop_early: skip the stages after the last chosen one.
            output_fmt: `'NCHW'`.
            intermediates_only: return only the list.

        Returns:
            the tokens of the last stage, [B, N, C], and a list of [B, C, H, W].
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        wanted, last = feature_take_indices(len(self.stages), indices)
        features = []
        x, size = self._embed(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x, size = self._run(stage, x, size)
            if i in wanted:
                features.append(to_grid(x, size))
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one of `indices`, and the heads; as in timm."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        pruned = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return wanted

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, H, W] -> tokens [B, N, C] and their grid (H/16, W/16)."""
        if min(x.shape[-2:]) < 64:
            raise ValueError(f"image of {tuple(x.shape[-2:])} pixels: 64 x 64 at least")
        x = self.stem(x)
        return to_tokens(x), (x.shape[2], x.shape[3])

    def _run(self, stage: nn.Module, x: Tensor, size: tuple[int, int]) -> Any:
        return checkpoint(stage, x, size) if self.grad_checkpointing else stage(x, size)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C], the tokens of the last stage."""
        x, size = self._embed(x)
        for stage in self.stages:
            x, size = self._run(stage, x, size)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, C] -> [B, classes], the mean of both heads (our choice; not in the deck)."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        if pre_logits:
            return x
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training:
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))


def deck_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's configuration of a model of this family. There are no published weights."""
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": False,
        "pool_size": None,
        "num_classes": 1000,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "stem.conv1.linear",
        "classifier": ("head.linear", "head_dist.linear"),
    } | kwargs


MODEL_ARGS: dict[str, dict[str, Any]] = {
    "levit_deck": {},
    "levit_deck_fixed": {"shrink": "fixed"},
    "levit_deck_conv1": {"conv_stages": (0,)},
    "levit_deck_conv2": {"conv_stages": (1,)},
    "levit_deck_conv3": {"conv_stages": (2,)},
    "levit_deck_checkerboard": {"checkerboard": "mask"},
    "levit_deck_checkerboard_drop": {"checkerboard": "drop"},
    "levit_deck_2blocks": {"depth": (2, 2, 2)},
    "levit_deck_conv_shrink": {"shrink": "conv"},
    "levit_deck_dropout": {"drop_rate": 0.1},
}
default_cfgs = generate_default_cfgs({name: deck_cfg() for name in MODEL_ARGS})


def create_levit_deck(variant: str, pretrained: bool, **kwargs: Any) -> LevitDeck:
    """Build a variant through timm; `kwargs` override its arguments."""
    return build_model(
        LevitDeck,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **MODEL_ARGS.get(variant, {}) | kwargs,
    )


@register_model
def levit_deck(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """As published: 3 + 3 + 2 blocks, with the faults of the shrink blocks."""
    return create_levit_deck("levit_deck", pretrained, **kwargs)


@register_model
def levit_deck_fixed(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Our corrected version: the shrink blocks attend, on tokens in their places."""
    return create_levit_deck("levit_deck_fixed", pretrained, **kwargs)


@register_model
def levit_deck_conv1(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 1: the first stage as 1 x 1 convolutions."""
    return create_levit_deck("levit_deck_conv1", pretrained, **kwargs)


@register_model
def levit_deck_conv2(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 1: the second stage with its shrink block as 1 x 1 convolutions."""
    return create_levit_deck("levit_deck_conv2", pretrained, **kwargs)


@register_model
def levit_deck_conv3(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 1: the third stage with its shrink block as 1 x 1 convolutions."""
    return create_levit_deck("levit_deck_conv3", pretrained, **kwargs)


@register_model
def levit_deck_checkerboard(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 2: a checkerboard mask on the input of the second stage's attention."""
    return create_levit_deck("levit_deck_checkerboard", pretrained, **kwargs)


@register_model
def levit_deck_checkerboard_drop(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 2 with savings (our addition): the second stage's attention drops the masked tokens."""
    return create_levit_deck("levit_deck_checkerboard_drop", pretrained, **kwargs)


@register_model
def levit_deck_2blocks(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 3: 2 + 2 + 2 blocks."""
    return create_levit_deck("levit_deck_2blocks", pretrained, **kwargs)


@register_model
def levit_deck_conv_shrink(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 4: convolutions in place of the shrink blocks."""
    return create_levit_deck("levit_deck_conv_shrink", pretrained, **kwargs)


@register_model
def levit_deck_dropout(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 5: dropout in MLPs and heads (p = 0.1 by default; the deck gives no number)."""
    return create_levit_deck("levit_deck_dropout", pretrained, **kwargs)
