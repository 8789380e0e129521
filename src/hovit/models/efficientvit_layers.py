"""Layers of EfficientViT, with a switch for every row of the paper's ablation.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027 (section 3; Table 6 and Fig. 7: the ablation)
Upstream: https://github.com/microsoft/Cream/tree/main/EfficientViT

Table 6 describes each row in a few words. `Switches` documents the details that we chose.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SqueezeExcite, trunc_normal_
from torch import Tensor, nn

NORMS: dict[str, Any] = {"bn": nn.BatchNorm2d, "ln": LayerNorm2d}
ACTS: dict[str, Any] = {"relu": nn.ReLU, "hardswish": nn.Hardswish}
STEM = 8  # the first convolution has 1/8 of the channels of the first stage


@dataclass(frozen=True)
class Switches:
    """Ablation switches: rows of Table 6 (row number in brackets) and Fig. 7.

    The defaults give the paper's model.

    Args:
        layout: `'sandwich'`: N FFNs, attention, N FFNs. `'swin'` [2]: attention, then N FFNs. Each
            FFN keeps its DWConv in both layouts, as do the two in the subsample block (our choice).
        num_ffn: N of each block [3, 4]; the subsample block keeps one on each side (our choice).
        attention: `'cga'`: each head reads its own split of the channels. `'mhsa'` [5]: each head
            reads all channels, without a cascade.
        cascade: add the output of a head to the input of the next one [6].
        qk_dim: channels of Q and K for each head. 0 [7]: C / H, as for V.
        v_ratio: channels of V over C (Fig. 7). If the output of a head is then wider than the input
            of the next one, its first channels are added; if narrower, it is padded with zeros (our
            choice).
        ffn_ratio: hidden channels over C, in every FFN [8].
        dwconv: a 3 x 3 depthwise convolution before every FFN [9]; the one on Q stays (our choice).
        norm: `'bn'` or `'ln'` [10], over channels, everywhere.
        act: `'relu'` or `'hardswish'` [11], everywhere except in the squeeze-excite gate.

    Raises:
        ValueError: for a value other than these.
    """

    layout: Literal["sandwich", "swin"] = "sandwich"
    num_ffn: int = 1
    attention: Literal["cga", "mhsa"] = "cga"
    cascade: bool = True
    qk_dim: int = 16
    v_ratio: float = 1.0
    ffn_ratio: float = 2.0
    dwconv: bool = True
    norm: Literal["bn", "ln"] = "bn"
    act: Literal["relu", "hardswish"] = "relu"

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
            if not is_positive(value, int if whole else int | float):
                raise ValueError(f"{name}={value!r}: a {'whole ' * whole}number above 0")


def is_positive(value: Any, kind: Any = int) -> bool:
    """Whether `value` is a finite number above 0, and not a bool."""
    number = isinstance(value, kind) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def check_stages(
    embed_dim: tuple[int, ...], depth: tuple[int, ...], num_heads: tuple[int, ...]
) -> None:
    """Check that each argument is one whole number per stage.

    Raises:
        ValueError: if one is not; it names the argument.
    """
    for name, values in (("embed_dim", embed_dim), ("depth", depth), ("num_heads", num_heads)):
        if not isinstance(values, tuple | list) or not all(map(is_positive, values)):
            raise ValueError(f"{name}={values!r}: a whole number above 0 for each stage")
        if not values or len(values) != len(embed_dim):
            stages = f"embed_dim={tuple(embed_dim)} has {len(embed_dim)}"
            raise ValueError(f"{name}={tuple(values)}: a number for each stage, and {stages}")
    if embed_dim[0] < STEM:
        raise ValueError(f"embed_dim={tuple(embed_dim)}: the first has {STEM} channels at least")


class ConvNorm(nn.Sequential):
    """Convolution without bias, then norm; `zero` initialises the weight of the norm to 0."""

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
    """1 x 1 conv to the hidden width, activation, 1 x 1 conv back."""

    def __init__(self, dim: int, switches: Switches, zero: bool) -> None:
        super().__init__()
        hidden = round(dim * switches.ffn_ratio)
        if hidden < 1:
            raise ValueError(f"ffn_ratio={switches.ffn_ratio!r}: no hidden channel for {dim}")
        self.pw1 = ConvNorm(dim, hidden, switches)
        self.act = ACTS[switches.act]()
        self.pw2 = ConvNorm(hidden, dim, switches, zero=zero)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return self.pw2(self.act(self.pw1(x)))


def token_interaction(dim: int, switches: Switches, zero: bool) -> nn.Module:
    """The depthwise convolution before an FFN, with its residual."""
    if not switches.dwconv:
        return nn.Identity()
    return Residual(ConvNorm(dim, dim, switches, kernel=3, groups=dim, zero=zero))


def fit_channels(x: Tensor, channels: int) -> Tensor:
    """[B, c, H, W] -> [B, channels, H, W]: pad with zeros or cut the last channels."""
    if x.shape[1] == channels:
        return x
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


class CascadedGroupAttention(nn.Module):
    """Self-attention with sequential heads (eq. 2-4), or multi-head attention with `'mhsa'`.

    Head j reads the j-th split of the channels plus the output of head j - 1. A depthwise
    convolution runs over its Q. A bias is learned for every distance in rows and columns.

    Args:
        dim: channels C.
        heads: H.
        window: height and width of the map.
        kernels: kernel size of the convolution on Q, for each head.
        switches: ablation switches.

    Raises:
        ValueError: if `heads` does not divide `dim`, or a head has no odd kernel size.
    """

    attention_bias_idxs: Tensor

    def __init__(
        self, dim: int, heads: int, window: int, kernels: tuple[int, ...], switches: Switches
    ) -> None:
        super().__init__()
        if (
            dim % heads
            or heads > len(kernels)
            or not all(is_positive(k) and k % 2 for k in kernels)
        ):
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
        split, qk = dim if self.shared_input else dim // heads, self.qk_dim
        self.qkvs = nn.ModuleList(
            ConvNorm(split, 2 * qk + self.v_dim, switches) for _ in range(heads)
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
        """Bias of the scores for every pair of the N = window^2 tokens, [H, N, N]."""
        return self.attention_biases[:, self.attention_bias_idxs]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, window, window] -> the same
        splits = [x] * self.heads if self.shared_input else x.chunk(self.heads, dim=1)
        bias = self.bias()
        outs: list[Tensor] = []
        for j, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            feat = splits[j]
            if j and self.cascade:
                feat = feat + fit_channels(outs[-1], feat.shape[1])
            q, k, v = qkv(feat).split((self.qk_dim, self.qk_dim, self.v_dim), dim=1)
            q, k, v = dw(q).flatten(2) * self.scale, k.flatten(2), v.flatten(2)  # [B, d, N]
            scores = q.transpose(1, 2) @ k + bias[j]  # [B, N, N]
            out = v @ scores.softmax(dim=-1).transpose(1, 2)  # [B, v_dim, N]
            outs.append(out.unflatten(2, x.shape[2:]))
        return self.proj(torch.cat(outs, dim=1))


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, C, H, W] -> [B windows, C, window, window], padded with zeros at the bottom and right."""
    below, right = (-n % window for n in x.shape[2:])
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    x = x.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # [B, C, nH, w, nW, w]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def from_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B windows, C, window, window] -> [B, C, H, W] with (H, W) = `size`, without padding."""
    rows, cols = (-(-n // x.shape[2]) for n in size)
    x = x.unflatten(0, (-1, rows, cols)).permute(0, 3, 1, 4, 2, 5)  # [B, C, nH, w, nW, w]
    return x.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


class WindowAttention(nn.Module):
    """Attention over the whole map if it has the size of a window, else over each window."""

    def __init__(self, attn: CascadedGroupAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        window, size = self.attn.window, (x.shape[2], x.shape[3])
        if size == (window, window):
            return self.attn(x)
        return from_windows(self.attn(to_windows(x, window)), size)


class Block(nn.Sequential):
    """N times DWConv and FFN, attention, N times DWConv and FFN; each with a residual."""

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
    """Downsampling: 1 x 1 to 4 C, depthwise 3 x 3 with stride 2, squeeze-excite, 1 x 1."""

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
    """Subsample block: the sandwich layout with an inverted residual in place of attention."""

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
    """Four 3 x 3 convolutions of stride 2 with activations between: 16 x 16 pixels to a token."""

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
