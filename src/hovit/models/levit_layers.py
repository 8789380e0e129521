"""Layers of the HoViT deck's LeViT: attention, shrink blocks between stages, conv stages.

Paper: `LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference`
    - https://arxiv.org/abs/2104.01136
Source: the HoViT deck, "02 LeViT Based Approach" and "04 New Ideas".
Upstream: none is published; LinearNorm is timm's (timm/models/levit.py).
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.levit import LinearNorm
from torch import Tensor, nn

from ..attention.forms import get_form
from ..attention.modules import create_attention

HEAD_DIM = 64
Size = tuple[int, int]


def to_grid(x: Tensor, size: Size) -> Tensor:
    """[B, H*W, C] -> [B, C, H, W]."""
    return x.transpose(1, 2).unflatten(2, size)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C]."""
    return x.flatten(2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in heads of 64: q [B, M, C], k and v [B, N, C] -> [B, M, C]."""
    q, k, v = (t.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))  # [B, h, *, 64]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Linear+BN to q, k, v; softmax(q k^T / 8) v; Hardswish; Linear+BN. No attention bias.

    Args:
        dim: channels.
        form: name of another attention form (`hovit.attention`). A form that gates its own output
            has no Hardswish. `focused` adds no position embedding to k, unlike in Swin, because the
            number of tokens is not fixed; its convolution of v is the only position term.
        options: options of the form.
    """

    def __init__(self, dim: int, form: str = "dot", **options: Any) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"embed_dim: {dim} is not a multiple of {HEAD_DIM}, the head width")
        self.qkv = LinearNorm(dim, 3 * dim)
        self.attend = create_attention(form, dim, dim // HEAD_DIM, **options)
        self.act = nn.Identity() if get_form(form).output_gate else nn.Hardswish()
        self.proj = LinearNorm(dim, dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:  # [B, H*W, C] -> [B, H*W, C]
        return self.proj(self.act(self.attend(*self.qkv(x).chunk(3, dim=2), x, size)))


class Mlp(nn.Sequential):
    """Linear+BN to twice the width, Hardswish, dropout, Linear+BN back."""

    def __init__(self, dim: int, drop: float) -> None:
        super().__init__(
            LinearNorm(dim, 2 * dim), nn.Hardswish(), nn.Dropout(drop), LinearNorm(2 * dim, dim)
        )


def checkerboard_mask(size: Size, device: torch.device | None = None) -> Tensor:
    """Booleans, [H*W], true where row + column is even."""
    rows, cols = (torch.arange(n, device=device) for n in size)
    return ((rows[:, None] + cols) % 2 == 0).flatten()


def checkerboard_indices(size: Size, device: torch.device | None = None) -> Tensor:
    """Indices of the tokens where row + column is even, ascending: 25 of 49 at 7 x 7.

    The shape follows from `size` alone, so that the model exports and no call waits for a GPU.
    """
    grid = torch.arange(size[0] * size[1], device=device).view(size)
    return torch.cat([grid[::2, ::2].flatten(), grid[1::2, 1::2].flatten()]).sort().values


class Block(nn.Module):
    """x + attention(x), then x + MLP(x).

    Args:
        dim: channels.
        drop: dropout probability in the MLP.
        checkerboard: `''`; `'mask'` sets the input of the attention to zero where row + column is
            odd (idea 2 of the deck; saves nothing); `'drop'` removes those tokens from the
            attention (our addition).
        attention: keyword arguments of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        drop: float = 0.0,
        checkerboard: str = "",
        attention: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, **attention or {})
        self.mlp = Mlp(dim, drop)
        self.checkerboard = checkerboard

    def forward(self, x: Tensor, size: Size) -> Tensor:  # [B, H*W, C] -> [B, H*W, C]
        if self.checkerboard == "mask":
            x = x + self.attn(x * checkerboard_mask(size, x.device)[:, None], size)
        elif self.checkerboard == "drop":
            kept = checkerboard_indices(size, x.device)
            x = x.index_add(1, kept, self.attn(x[:, kept], size).to(x.dtype))
        else:
            x = x + self.attn(x, size)
        return x + self.mlp(x)


class DeckShrink(nn.Module):
    """Shrink block as published in the deck: [B, H*W, i] -> [B, (H//2)*(W//2), o].

    Two faults of the published code are kept: the result of `kv` is not used, and the tokens are
    reshaped instead of transposed into the grid that the convolution reads.
    """

    def __init__(self, dim: int, out_dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.q = nn.Conv2d(dim, dim, kernel_size=2, stride=2)
        self.kv = LinearNorm(dim, 2 * dim * heads)
        self.act = nn.Hardswish()
        self.proj = LinearNorm(dim, out_dim)
        self.mlp = Mlp(out_dim, drop)

    def queries(self, x: Tensor, size: Size) -> Tensor:
        self.kv(x)  # unused, but part of the published model's cost
        return to_tokens(self.q(x.reshape(x.shape[0], x.shape[2], *size)))

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Size]:
        x = self.proj(self.act(self.queries(x, size)))
        return self.mlp(x), (size[0] // 2, size[1] // 2)


class FixedShrink(DeckShrink):
    """Shrink block without the two faults (our fix): the queries attend to k and v."""

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
    """A shrink block (none in the first stage) and its attention blocks."""

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
    """Idea 1: a stage with its shrink block as `depth` 1 x 1 convolutions, then BN and ReLU.

    The convolutions have a bias, and the resolution stays the same.
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
