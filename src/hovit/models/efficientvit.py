"""EfficientViT M0-M5, with a switch for every row of the paper's ablation.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027 (Table 1: the family; Table 6 and Fig. 7: the ablation)
Upstream: https://github.com/microsoft/Cream/tree/main/EfficientViT
Seed: the article on EfficientViT (seeds/002).

As the paper has it, a model's weights are those of timm's `efficientvit_m0` ... `efficientvit_m5`,
name by name and shape by shape. Table 6 names its rows in a word or two; what a switch leaves open
is ours, and `Switches` says so. `hovit.models.deploy` makes the form that is timed.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    LayerNorm2d,
    SqueezeExcite,
    resize_rel_pos_bias_table_levit,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

NORMS: dict[str, Any] = {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}
ACTS: dict[str, Any] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}
PATCH = 16  # pixels a side of a token of the first stage
STEM = 8  # the first convolution has this part of the first stage's channels


@dataclass(frozen=True)
class Switches:
    """What Table 6 (its row in brackets) and Fig. 7 change. The defaults are the paper's model.

    Args:
        layout: `'sandwich'`: N FFNs, attention, N FFNs. `'swin'` [2]: attention, then N FFNs. Each
            FFN keeps its DWConv in both (ours); so does the subsample block its own two.
        num_ffn: N of each block [3, 4]; the subsample block keeps one on either side (ours).
        attention: `'cga'`: each head reads its own share of the channels. `'mhsa'` [5]: each reads
            all of them, and nothing cascades.
        cascade: add a head's output to the next one's share [6].
        qk_dim: of Q and K, for each head. 0 [7]: C / H, as V has it.
        v_ratio: V's channels over C (Fig. 7). Where a head's output is then not as wide as the next
            one's share, its first channels are added, or it is filled up with zeros (ours).
        ffn_ratio: hidden channels over C, in every FFN [8].
        dwconv: a 3 x 3 depthwise convolution before every FFN [9]; the one on Q stays (ours).
        norm: `'bn'` or `'ln'` [10], over channels, everywhere.
        act: `'relu'` or `'hardswish'` [11], everywhere but in the squeeze-excite gate.

    Raises:
        ValueError: for a value that there is not.
    """

    layout: str = "sandwich"
    num_ffn: int = 1
    attention: str = "cga"
    cascade: bool = True
    qk_dim: int = 16
    v_ratio: float = 1.0
    ffn_ratio: float = 2.0
    dwconv: bool = True
    norm: str = "bn"
    act: str = "relu"

    def __post_init__(self) -> None:
        known = {
            "layout": ("sandwich", "swin"),
            "attention": ("cga", "mhsa"),
            "norm": tuple(NORMS),
            "act": tuple(ACTS),
            "cascade": (True, False),
            "dwconv": (True, False),
        }
        for name, values in known.items():
            value = getattr(self, name)
            if (type(value), value) not in [(type(each), each) for each in values]:  # 1 == True
                raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, values))}")
        for name in ("num_ffn", "qk_dim", "v_ratio", "ffn_ratio"):
            value = getattr(self, name)
            if name == "qk_dim" and (type(value), value) == (int, 0):
                continue
            whole = name in ("num_ffn", "qk_dim")
            if not _positive(value, int if whole else int | float):
                raise ValueError(f"{name}={value!r}: a {'whole ' * whole}number above 0")


def _positive(value: Any, kind: Any = int) -> bool:
    """Whether it is a finite number above 0, and no truth value."""
    number = isinstance(value, kind) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def check_stages(
    embed_dim: tuple[int, ...], depth: tuple[int, ...], num_heads: tuple[int, ...]
) -> None:
    """Refuse what is not one whole number a stage.

    Raises:
        ValueError: naming the argument.
    """
    for name, values in (("embed_dim", embed_dim), ("depth", depth), ("num_heads", num_heads)):
        if not isinstance(values, tuple | list) or not all(map(_positive, values)):
            raise ValueError(f"{name}={values!r}: a whole number above 0 for each stage")
        if not values or len(values) != len(embed_dim):
            stages = f"embed_dim={tuple(embed_dim)} has {len(embed_dim)}"
            raise ValueError(f"{name}={tuple(values)}: a number for each stage, and {stages}")
    if embed_dim[0] < STEM:
        raise ValueError(f"embed_dim={tuple(embed_dim)}: the first has {STEM} channels at least")


class ConvNorm(nn.Sequential):
    """A convolution without bias, and its norm; `zero` starts the norm's weight at 0."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        switches: Switches,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = NORMS[switches.norm](out_dim)
        if zero:
            nn.init.zeros_(self.bn.weight)


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class FFN(nn.Module):
    """1 x 1 to the hidden width, activation, 1 x 1 back."""

    def __init__(self, dim: int, switches: Switches, zero: bool) -> None:
        super().__init__()
        hidden = round(dim * switches.ffn_ratio)
        if hidden < 1:
            raise ValueError(f"ffn_ratio={switches.ffn_ratio!r}: of {dim} channels none is left")
        self.pw1 = ConvNorm(dim, hidden, switches)
        self.act = ACTS[switches.act]()
        self.pw2 = ConvNorm(hidden, dim, switches, zero=zero)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return self.pw2(self.act(self.pw1(x)))


def token_interaction(dim: int, switches: Switches, zero: bool) -> nn.Module:
    """The DWConv before an FFN, with its residual."""
    if not switches.dwconv:
        return nn.Identity()
    return Residual(ConvNorm(dim, dim, switches, kernel=3, groups=dim, zero=zero))


def widen(x: Tensor, channels: int) -> Tensor:
    """[B, c, H, W] -> [B, channels, H, W]: zeros after the last, or the last left out."""
    if x.shape[1] == channels:
        return x
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


class CascadedGroupAttention(nn.Module):
    """Self-attention whose heads follow one another (eq. 2-4); with `'mhsa'`, the usual kind.

    Head j reads the j-th share of the channels, plus the output of head j - 1; a depthwise
    convolution runs over its Q; a bias is learned for every distance in rows and columns.

    Args:
        dim: channels C.
        heads: H.
        window: rows, and columns, of the map that it attends over.
        kernels: of the convolution on Q, a head each.
        switches: see there.
    """

    attention_bias_idxs: Tensor

    def __init__(
        self, dim: int, heads: int, window: int, kernels: tuple[int, ...], switches: Switches
    ) -> None:
        super().__init__()
        if dim % heads or heads > len(kernels) or not all(_positive(k) and k % 2 for k in kernels):
            raise ValueError(
                f"num_heads={heads} for {dim} channels and kernels={tuple(kernels)}: "
                "heads divide the channels, and each has a kernel of odd size"
            )
        self.heads = heads
        self.window = window
        self.shared_input = switches.attention == "mhsa"
        self.cascade = switches.cascade and not self.shared_input
        self.qk_dim = switches.qk_dim or dim // heads
        self.v_dim = max(1, round(switches.v_ratio * dim / heads))
        self.scale = self.qk_dim**-0.5
        share, qk = dim if self.shared_input else dim // heads, self.qk_dim
        self.qkvs = nn.ModuleList(
            ConvNorm(share, 2 * qk + self.v_dim, switches) for _ in range(heads)
        )
        self.dws = nn.ModuleList(
            ConvNorm(qk, qk, switches, kernel=k, groups=qk) for k in kernels[:heads]
        )
        self.proj = nn.Sequential(
            ACTS[switches.act](), ConvNorm(heads * self.v_dim, dim, switches, zero=True)
        )
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        row, col = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, cols = ((p.reshape(-1, 1) - p.reshape(1, -1)).abs() for p in (row, col))
        self.register_buffer("attention_bias_idxs", rows * window + cols, persistent=False)

    def bias(self) -> Tensor:
        """[H, N, N]: what every pair of the N = window^2 tokens has added to its score."""
        return self.attention_biases[:, self.attention_bias_idxs]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, window, window] -> the same
        shares = [x] * self.heads if self.shared_input else x.chunk(self.heads, dim=1)
        bias = self.bias()
        outs: list[Tensor] = []
        for j, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            feat = shares[j]
            if j and self.cascade:
                feat = feat + widen(outs[-1], feat.shape[1])
            q, k, v = qkv(feat).split((self.qk_dim, self.qk_dim, self.v_dim), dim=1)
            q, k, v = dw(q).flatten(2) * self.scale, k.flatten(2), v.flatten(2)  # [B, d, N]
            scores = q.transpose(1, 2) @ k + bias[j]  # [B, N, N]
            out = v @ scores.softmax(dim=-1).transpose(1, 2)  # [B, v_dim, N]
            outs.append(out.unflatten(2, x.shape[2:]))
        return self.proj(torch.cat(outs, dim=1))


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, C, H, W] -> [B windows, C, window, window], filled up with zeros below and right."""
    below, right = (-n % window for n in x.shape[2:])
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    x = x.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # [B, C, nH, w, nW, w]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def from_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B windows, C, window, window] -> [B, C, H, W] of that size."""
    rows, cols = (-(-n // x.shape[2]) for n in size)
    x = x.unflatten(0, (-1, rows, cols)).permute(0, 3, 1, 4, 2, 5)  # [B, C, nH, w, nW, w]
    return x.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


class WindowAttention(nn.Module):
    """The attention on a map of its window's size, or on each window of another map."""

    def __init__(self, attn: CascadedGroupAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        window, size = self.attn.window, (x.shape[2], x.shape[3])
        if size == (window, window):
            return self.attn(x)
        return from_windows(self.attn(to_windows(x, window)), size)


class Block(nn.Sequential):
    """DWConv and FFN, N times; attention; DWConv and FFN, N times. Each with its residual."""

    def __init__(self, dim: int, attn: CascadedGroupAttention, switches: Switches) -> None:
        super().__init__()

        def ffns(side: int) -> None:
            for n in range(switches.num_ffn):
                name = f"{side}_{n + 1}" if n else f"{side}"  # timm's names for N = 1
                self.add_module(f"dw{name}", token_interaction(dim, switches, zero=True))
                self.add_module(f"ffn{name}", Residual(FFN(dim, switches, zero=True)))

        if switches.layout == "sandwich":
            ffns(0)
        self.mixer = Residual(WindowAttention(attn))
        ffns(1)


class InvertedResidual(nn.Module):
    """What halves the map: 1 x 1 to 4 C, depthwise 3 x 3 of stride 2, squeeze-excite, 1 x 1."""

    def __init__(self, dim: int, out_dim: int, switches: Switches) -> None:
        super().__init__()
        hidden, act = 4 * dim, ACTS[switches.act]
        self.conv1 = ConvNorm(dim, hidden, switches)
        self.act = act()
        self.conv2 = ConvNorm(hidden, hidden, switches, kernel=3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden, rd_ratio=0.25, act_layer=act)
        self.conv3 = ConvNorm(hidden, out_dim, switches)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', ceil(H / 2), ceil(W / 2)]
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class Subsample(nn.Sequential):
    """The sandwich with an inverted residual in attention's place."""

    def __init__(self, dim: int, out_dim: int, switches: Switches) -> None:
        super().__init__()

        def ffn(dim: int) -> nn.Module:
            return nn.Sequential(
                token_interaction(dim, switches, zero=False),
                Residual(FFN(dim, switches, zero=True)),
            )

        self.res1 = ffn(dim)
        self.patchmerge = InvertedResidual(dim, out_dim, switches)
        self.res2 = ffn(out_dim)


class Stage(nn.Sequential):
    """The subsample block (none in the first stage), then the blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)


class PatchEmbed(nn.Sequential):
    """Four 3 x 3 convolutions of stride 2, activations between: a token of C for 16 x 16 pixels."""

    def __init__(self, in_chans: int, dim: int, switches: Switches) -> None:
        super().__init__()
        widths = [in_chans, dim // STEM, dim // 4, dim // 2, dim]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            self.add_module(f"conv{i}", ConvNorm(before, after, switches, kernel=3, stride=2))
            if i < 4:
                self.add_module(f"relu{i}", ACTS[switches.act]())


class Head(nn.Sequential):
    """Norm, dropout, Linear."""

    def __init__(self, dim: int, num_classes: int, norm: str, drop: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim) if norm == "bn" else nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop)
        self.linear = nn.Linear(dim, num_classes)
        trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)


class EfficientViT(nn.Module):
    """Patch embedding, three stages, mean over the map, norm and Linear.

    Args:
        img_size: pixels, height and width. The smaller side sets how large a window is where the
            map is smaller than `window_size`; images of any other size are split into such windows.
        in_chans: channels of the image.
        num_classes: outputs; 0 leaves the pooled features.
        embed_dim, depth, num_heads: C, L, H of each stage (Table 1).
        window_size: rows, and columns, of an attention window, at most.
        kernels: of the depthwise convolutions on Q, a head each, in every stage.
        drop_rate: dropout before the classifier.
        global_pool: `'avg'`, or `''` for the map itself.
        switches: fields of `Switches`.

    Raises:
        ValueError: for any of these that does not fit, naming it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: tuple[int, ...] = (64, 128, 192),
        depth: tuple[int, ...] = (1, 2, 3),
        num_heads: tuple[int, ...] = (4, 4, 4),
        window_size: int = 7,
        kernels: tuple[int, ...] = (5, 5, 5, 5),
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **switches: Any,
    ) -> None:
        super().__init__()
        if unknown := set(switches) - {field.name for field in fields(Switches)}:
            raise ValueError(f"EfficientViT has no switch {', '.join(sorted(unknown))}")
        self.switches = Switches(**switches)
        check_stages(embed_dim, depth, num_heads)
        if not _positive(window_size):
            raise ValueError(f"window_size={window_size!r}: a whole number above 0")
        resolution = min(to_2tuple(img_size)) // PATCH
        if resolution < 1:
            raise ValueError(f"img_size={img_size}: {PATCH} pixels a side at least")
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim[0], self.switches)
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, (dim, blocks, heads) in enumerate(zip(embed_dim, depth, num_heads, strict=True)):
            down: nn.Module = nn.Identity()
            if i:
                down = Subsample(embed_dim[i - 1], dim, self.switches)
                resolution = (resolution + 1) // 2
            args = (dim, heads, min(window_size, resolution), kernels, self.switches)
            attns = [CascadedGroupAttention(*args) for _ in range(blocks)]
            self.stages.append(Stage(down, [Block(dim, attn, self.switches) for attn in attns]))
            info = {"num_chs": dim, "reduction": PATCH * 2**i, "module": f"stages.{i}"}
            self.feature_info.append(info)
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: attention's biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def get_classifier(self) -> nn.Module:
        """The Linear of the head."""
        return self.head.linear if isinstance(self.head, Head) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; `num_classes=0` leaves the features.

        Raises:
            ValueError: for a pooling other than `'avg'` or `''`, or classes without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"global_pool={pool!r}: 'avg', or '' (none) with num_classes=0")
        self.global_pool = pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            head = Head(self.num_features, num_classes, self.switches.norm, self.drop_rate)
            self.head = head.to(next(self.patch_embed.parameters()).device).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C3, H / 64, W / 64], every halving rounded up."""
        return self.stages(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C3, h, w] -> [B, classes]."""
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def resize_biases(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of another image size: attention's biases are interpolated to the model's windows."""
    wanted = model.state_dict()
    resized = dict(state_dict)
    for name, biases in state_dict.items():  # [heads, window^2]
        if name.endswith("attention_biases") and biases.shape != wanted[name].shape:
            size = (wanted[name].shape[1], wanted[name].shape[0])
            resized[name] = resize_rel_pos_bias_table_levit(biases.T, size).T.contiguous()
    return resized


def _cfg(timm_name: str) -> dict[str, Any]:
    """timm's description of the same model; its weights are the authors', and fit."""
    return {
        "hf_hub_id": timm.get_pretrained_cfg_value(timm_name, "hf_hub_id"),
        "license": "mit",
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (4, 4),
        "num_classes": 1000,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head.linear",
    }


default_cfgs = generate_default_cfgs(
    {f"efficientvit_paper_m{i}": _cfg(f"efficientvit_m{i}") for i in range(6)}
)

FAMILY: dict[str, dict[str, tuple[int, ...]]] = {  # Table 1; the kernels are upstream's code
    "m0": {"embed_dim": (64, 128, 192), "depth": (1, 2, 3), "num_heads": (4, 4, 4)},
    "m1": {"embed_dim": (128, 144, 192), "depth": (1, 2, 3), "num_heads": (2, 3, 3)},
    "m2": {"embed_dim": (128, 192, 224), "depth": (1, 2, 3), "num_heads": (4, 3, 2)},
    "m3": {"embed_dim": (128, 240, 320), "depth": (1, 2, 3), "num_heads": (4, 3, 4)},
    "m4": {"embed_dim": (128, 256, 384), "depth": (1, 2, 3), "num_heads": (4, 4, 4)},
    "m5": {"embed_dim": (192, 288, 384), "depth": (1, 3, 4), "num_heads": (3, 3, 4)},
}
KERNELS = {"m0": (5, 5, 5, 5), "m3": (5, 5, 5, 5)}


def _efficientvit(size: str, pretrained: bool, **kwargs: Any) -> EfficientViT:
    args: dict[str, Any] = {**FAMILY[size], "kernels": KERNELS.get(size, (7, 5, 3, 3))}
    return build_model_with_cfg(
        EfficientViT,
        f"efficientvit_paper_{size}",
        pretrained,
        pretrained_filter_fn=resize_biases,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2)},
        **args | kwargs,
    )


@register_model
def efficientvit_paper_m0(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """2.3 M parameters, 79 M multiply-adds as published."""
    return _efficientvit("m0", pretrained, **kwargs)


@register_model
def efficientvit_paper_m1(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """3.0 M parameters, 167 M multiply-adds as published."""
    return _efficientvit("m1", pretrained, **kwargs)


@register_model
def efficientvit_paper_m2(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """4.2 M parameters, 201 M multiply-adds as published."""
    return _efficientvit("m2", pretrained, **kwargs)


@register_model
def efficientvit_paper_m3(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """6.9 M parameters, 263 M multiply-adds as published."""
    return _efficientvit("m3", pretrained, **kwargs)


@register_model
def efficientvit_paper_m4(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """8.8 M parameters, 299 M multiply-adds as published."""
    return _efficientvit("m4", pretrained, **kwargs)


@register_model
def efficientvit_paper_m5(pretrained: bool = False, **kwargs: Any) -> EfficientViT:
    """12.4 M parameters, 522 M multiply-adds as published."""
    return _efficientvit("m5", pretrained, **kwargs)
