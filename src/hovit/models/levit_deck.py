"""LeViT as the HoViT deck built it, and the deck's five ideas on it.

Paper: `LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference`
    - https://arxiv.org/abs/2104.01136
Seed: the HoViT slide deck (seeds/000), slides "02 LeViT Based Approach" and "04 New Ideas".

The deck's model is not the LeViT authors' (that one is timm's `levit_256`): one Linear makes q, k
and v, heads are 64 wide, there is no attention bias, and the downsampling "shrink" block computes
keys and values that nothing reads. `levit_deck` keeps all of this, because the deck's numbers
describe it; `levit_deck_fixed` is what it meant (ours). `attention="jaccard"`, say, puts another
form of `hovit.attention` into every block (slides "LeViT + ...").

No layer knows the input's size, so any image of at least 64 x 64 pixels will do.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.levit import LinearNorm, NormLinear, Stem16
from torch import Tensor, nn

from ..attention.modules import ALL_OPTIONS, check_attention, create_attention

HEAD_DIM = 64
Size = tuple[int, int]


def to_grid(x: Tensor, size: Size) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W], every token at its place."""
    return x.transpose(1, 2).unflatten(2, size)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]."""
    return x.flatten(2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in heads of 64: q [B, M, C], k and v [B, N, C] -> [B, M, C]."""
    q, k, v = (t.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))  # [B, h, *, 64]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """One Linear+BN to q, k, v; softmax(q k^T / 8) v; Hardswish; Linear+BN. No attention bias.

    Args:
        dim: channels.
        form: another attention by name (`hovit.attention`). `gated` brings a gate of its own, which
            takes Hardswish's place.
        options: the form's own.
    """

    def __init__(self, dim: int, form: str = "dot", **options: Any) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"embed_dim: {dim} is no multiple of {HEAD_DIM}, as wide as a head")
        self.qkv = LinearNorm(dim, 3 * dim)
        self.attend = create_attention(form, dim, dim // HEAD_DIM, **options)
        self.act = nn.Identity() if form == "gated" else nn.Hardswish()
        self.proj = LinearNorm(dim, dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:  # [B, H*W, C] -> [B, H*W, C]
        return self.proj(self.act(self.attend(*self.qkv(x).chunk(3, dim=2), x, size)))


class Mlp(nn.Sequential):
    """Linear+BN to twice the width, Hardswish, dropout, Linear+BN back."""

    def __init__(self, dim: int, drop: float) -> None:
        super().__init__(
            LinearNorm(dim, 2 * dim), nn.Hardswish(), nn.Dropout(drop), LinearNorm(2 * dim, dim)
        )


@lru_cache(maxsize=64)
def checkerboard(size: Size, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The board of a grid: ([H*W] booleans, true where row + column is even; their indices).

    Made once a size and device, on the CPU, so that no pass waits for a device.
    """
    with torch.inference_mode(False):
        rows, cols = (torch.arange(n, device="cpu") for n in size)
        mask = ((rows[:, None] + cols) % 2 == 0).flatten()
        return mask.to(device), mask.nonzero()[:, 0].to(device)


class Block(nn.Module):
    """x + attention(x), then x + MLP(x).

    Args:
        dim: channels.
        drop: dropout probability in the MLP.
        board: `''`; `'mask'`, which zeroes the attention's input where row + column is odd (the
            deck's idea 2: nothing is saved); or `'drop'`, which leaves those tokens out (ours).
        attention: the attention's arguments.
    """

    def __init__(
        self, dim: int, drop: float = 0.0, board: str = "", attention: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, **attention or {})
        self.mlp = Mlp(dim, drop)
        self.board = board

    def forward(self, x: Tensor, size: Size) -> Tensor:  # [B, H*W, C] -> [B, H*W, C]
        if self.board == "mask":
            mask, _ = checkerboard(size, x.device)
            x = x + self.attn(x * mask[:, None], size)
        elif self.board == "drop":
            _, kept = checkerboard(size, x.device)  # 25 of 49 tokens at 7 x 7
            x = x.index_add(1, kept, self.attn(x[:, kept], size).to(x.dtype))
        else:
            x = x + self.attn(x, size)
        return x + self.mlp(x)


class DeckShrink(nn.Module):
    """The shrink as published: [B, H*W, i] -> [B, (H//2)*(W//2), o].

    Its `kv` is computed and thrown away, and the tokens are reshaped, not transposed, into the
    grid that the convolution sees: both are the deck's own, and both are kept.
    """

    def __init__(self, dim: int, out_dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.q = nn.Conv2d(dim, dim, kernel_size=2, stride=2)
        self.kv = LinearNorm(dim, 2 * dim * heads)
        self.act = nn.Hardswish()
        self.proj = LinearNorm(dim, out_dim)
        self.mlp = Mlp(out_dim, drop)

    def queries(self, x: Tensor, size: Size) -> Tensor:
        self.kv(x)  # the published code pays for it, and so do we
        return to_tokens(self.q(x.reshape(x.shape[0], x.shape[2], *size)))

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        x = self.proj(self.act(self.queries(x, size)))
        return self.mlp(x), (size[0] // 2, size[1] // 2)


class FixedShrink(DeckShrink):
    """The shrink as meant (ours): tokens in their places, and the queries attend to k and v."""

    def __init__(self, dim: int, out_dim: int, heads: int, drop: float) -> None:
        super().__init__(dim, out_dim, heads, drop)
        self.kv = LinearNorm(dim, 2 * dim)

    def queries(self, x: Tensor, size: Size) -> Tensor:
        return attend(to_tokens(self.q(to_grid(x, size))), *self.kv(x).chunk(2, dim=2))


class ConvShrink(nn.Module):
    """Idea 4: Conv2d 3 x 3, stride 2, padding 1, with bias, then Hardswish; no BN."""

    def __init__(self, dim: int, out_dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size=3, stride=2, padding=1)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        x = self.act(self.conv(to_grid(x, size)))
        return to_tokens(x), (x.shape[2], x.shape[3])


SHRINKS = {"deck": DeckShrink, "fixed": FixedShrink, "conv": ConvShrink}


class AttentionStage(nn.Module):
    """A shrink (none in the first stage) and its attention blocks."""

    def __init__(self, shrink: nn.Module | None, blocks: list[Block]) -> None:
        super().__init__()
        self.shrink = shrink
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        if self.shrink is not None:
            x, size = self.shrink(x, size)
        for block in self.blocks:
            x = block(x, size)
        return x, size


class ConvStage(nn.Module):
    """Idea 1: a stage and its shrink as `depth` 1 x 1 convolutions with bias, then BN and ReLU.

    The resolution stays what it was: nothing downsamples.
    """

    def __init__(self, dim: int, out_dim: int, depth: int) -> None:
        super().__init__()
        widths = [dim, *[out_dim] * depth]
        self.convs = nn.Sequential(
            *(nn.Conv2d(i, o, 1) for i, o in pairwise(widths)),
            nn.BatchNorm2d(out_dim),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        return to_tokens(self.convs(to_grid(x, size))), size


class LevitDeck(nn.Module):
    """The deck's LeViT: stem to 1/16, three stages, mean over tokens, two heads.

    Args:
        num_classes: outputs; 0 leaves the pooled features.
        depths: blocks per stage.
        shrink: `'deck'`, `'fixed'` or `'conv'`, between the stages.
        conv_stages: stages, counted from 0, that are 1 x 1 convolutions instead (idea 1).
        board: `'mask'` or `'drop'` for the second stage's attention (idea 2).
        drop_rate: dropout in MLPs and heads (idea 5).
        attention: the form of attention in every block, and below its options (`power` of
            `focused`, say); the shrinks keep theirs.

    Raises:
        ValueError: for an attention or an argument that there is not, an attention that has no grid
            to convolve (`focused` with `board='drop'`), or attention on a width that is no multiple
            of 64; from `forward`, for an image under 64 pixels a side.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: tuple[int, ...] = (256, 384, 512),
        depths: tuple[int, ...] = (3, 3, 2),
        shrink: str = "deck",
        conv_stages: tuple[int, ...] = (),
        board: str = "",
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        attention: str = "dot",
        **attention_options: Any,
    ) -> None:
        super().__init__()
        if unknown := [name for name in attention_options if name not in ALL_OPTIONS]:
            raise ValueError(f"LevitDeck takes no {', '.join(unknown)}")
        check_attention(attention, attention_options)
        if attention == "focused" and board == "drop":
            raise ValueError("attention='focused' needs every token in its place: not board='drop'")
        form = {"form": attention, **attention_options}
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.drop_rate = drop_rate
        self.distilled_training = False
        self.stem = Stem16(in_chans, embed_dim[0], act_layer=nn.Hardswish)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(embed_dim, depths, strict=True)):
            previous = embed_dim[max(i - 1, 0)]
            if i in conv_stages:
                self.stages.append(ConvStage(previous, width, depth))
                continue
            down = SHRINKS[shrink](previous, width, width // HEAD_DIM, drop_rate) if i else None
            blocks = [Block(width, drop_rate, board if i == 1 else "", form) for _ in range(depth)]
            self.stages.append(AttentionStage(down, blocks))
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The class head and the distillation head."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads (BN, dropout, Linear); `num_classes=0` leaves the features.

        Raises:
            ValueError: for a pooling other than `'avg'` or `''`.
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool={global_pool!r}: 'avg' or '' (none) is supported")
            self.global_pool = global_pool
        self.num_classes = num_classes
        device = next(self.stem.parameters()).device
        self.head, self.head_dist = (
            NormLinear(self.num_features, num_classes, drop=self.drop_rate, device=device)
            if num_classes > 0
            else nn.Identity()
            for _ in range(2)
        )
        self.head.train(self.training)
        self.head_dist.train(self.training)

    def set_distilled_training(self, enable: bool = True) -> None:
        """With `enable`, a forward pass in training mode gives both heads' logits (as in timm)."""
        self.distilled_training = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C] tokens of the last stage."""
        if min(x.shape[-2:]) < 64:
            raise ValueError(f"image of {tuple(x.shape[-2:])} pixels: 64 x 64 at least")
        x = self.stem(x)  # [B, 256, H/16, W/16]
        size = (x.shape[2], x.shape[3])
        x = to_tokens(x)
        for stage in self.stages:
            x, size = stage(x, size)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, C] tokens -> [B, classes], the mean of both heads (ours; the deck is silent)."""
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
    """timm's description of a model of this family; there are no published weights to point to."""
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


default_cfgs = generate_default_cfgs(
    {
        name: deck_cfg()
        for name in (
            "levit_deck",
            "levit_deck_fixed",
            "levit_deck_conv1",
            "levit_deck_conv2",
            "levit_deck_conv3",
            "levit_deck_checkerboard",
            "levit_deck_checkerboard_drop",
            "levit_deck_2blocks",
            "levit_deck_conv_shrink",
            "levit_deck_dropout",
        )
    }
)


@register_model
def levit_deck(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """As published: 3 + 3 + 2 blocks, dead kv and scrambled shrink included."""
    return build_model_with_cfg(LevitDeck, "levit_deck", pretrained, **kwargs)


@register_model
def levit_deck_fixed(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """As meant (ours): the shrink attends, on tokens in their places."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_fixed", pretrained, **{"shrink": "fixed"} | kwargs
    )


@register_model
def levit_deck_conv1(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 1: the first stage as 1 x 1 convolutions."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_conv1", pretrained, **{"conv_stages": (0,)} | kwargs
    )


@register_model
def levit_deck_conv2(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 1: the second stage and its shrink as 1 x 1 convolutions."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_conv2", pretrained, **{"conv_stages": (1,)} | kwargs
    )


@register_model
def levit_deck_conv3(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 1: the third stage and its shrink as 1 x 1 convolutions."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_conv3", pretrained, **{"conv_stages": (2,)} | kwargs
    )


@register_model
def levit_deck_checkerboard(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 2: a checkerboard mask on the input of the second stage's attention."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_checkerboard", pretrained, **{"board": "mask"} | kwargs
    )


@register_model
def levit_deck_checkerboard_drop(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 2 carried out (ours): the masked tokens stay out of the second stage's attention."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_checkerboard_drop", pretrained, **{"board": "drop"} | kwargs
    )


@register_model
def levit_deck_2blocks(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 3: 2 + 2 + 2 blocks."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_2blocks", pretrained, **{"depths": (2, 2, 2)} | kwargs
    )


@register_model
def levit_deck_conv_shrink(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 4: convolutions in place of the shrinks."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_conv_shrink", pretrained, **{"shrink": "conv"} | kwargs
    )


@register_model
def levit_deck_dropout(pretrained: bool = False, **kwargs: Any) -> LevitDeck:
    """Idea 5: dropout in MLPs and heads (p = 0.1 unless told; the deck gives no number)."""
    return build_model_with_cfg(
        LevitDeck, "levit_deck_dropout", pretrained, **{"drop_rate": 0.1} | kwargs
    )
