"""Attention forms as modules, created by name.

A block projects its input to q, k and v and passes them on, heads side by side:

    create_attention("jaccard", dim=256, heads=4)(q, k, v, x, size, bias)

q, k, v and x (the input of the block) are [B, N, dim], `size` is the grid of tokens (H, W) with
H W = N, and `bias` is [W, heads, N, N] or None. The output is [B, N, dim]. The block then applies
its own output projection.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import get_form
from .linear import (
    CHUNK,
    compiled_focused_attention,
    focused_attention,
    focused_features,
    gated_chunks,
    gated_recurrence,
)
from .similarity import SIMILARITIES, attention

Size = tuple[int, int]


def to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def from_heads(x: Tensor) -> Tensor:
    """[B, heads, N, d] -> [B, N, heads d]."""
    return x.transpose(1, 2).flatten(2)


def head_width(dim: int, heads: int) -> int:
    """Channels of one head.

    Raises:
        ValueError: if `heads` does not divide `dim`.
    """
    if not _is_int(heads, 1) or dim % heads:
        raise ValueError(f"{dim} channels in {heads!r} heads: heads must be equal")
    return dim // heads


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and value >= minimum


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def full_precision(x: Tensor) -> Any:
    """Context without autocast on the device of x; the meta device has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class SimilarityAttention(nn.Module):
    """Softmax attention with a similarity in place of the dot product.

    Jaccard lies between -1/3 and 1, too flat for a softmax. It therefore gets a learned temperature
    for each head, initialised to sqrt(d) (our choice).

    Args:
        dim: channels.
        heads: heads.
        similarity: a key of SIMILARITIES.
        plain: compute Jaccard and Euclidean by matrix products and elementwise passes over the
            whole batch, on every device (`similarity.attention`).

    Raises:
        ValueError: if a value is not as described.
    """

    def __init__(self, dim: int, heads: int, similarity: str, plain: bool = False) -> None:
        super().__init__()
        if not isinstance(plain, bool):
            raise ValueError(f"plain={plain!r}: true or false")
        self.heads = heads
        self.similarity = similarity
        self.plain = plain
        start = torch.full((heads,), math.sqrt(head_width(dim, heads)))
        self.temperature = nn.Parameter(start) if get_form(similarity).temperature else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size, bias: Tensor | None = None
    ) -> Tensor:
        q, k, v = (to_heads(t, self.heads) for t in (q, k, v))
        out = attention(self.similarity, q, k, v, bias, self.temperature, self.plain)
        return from_heads(out)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention matrix for q and k, [B, heads, N, d] each -> [B, heads, N, N]."""
        scores = SIMILARITIES[self.similarity](q, k)
        if self.temperature is not None:
            scores = scores * self.temperature[:, None, None]
        return (scores if bias is None else scores + bias).softmax(-1)


class FocusedAttention(nn.Module):
    """FLatten's attention: phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)) + depthwise conv of v.

    phi(x) = |x| / |x^p| x^p of x = (ReLU(.) + 1e-6) / softplus(scale), over all channels, before
    the split into heads. All heads share one convolution. Constants are those of FLatten's code.
    Everything but the convolution runs in float32 even under autocast: float16 cannot represent
    1e-12.

    Args:
        dim: channels.
        heads: heads.
        power: p, the focusing factor.
        kernel: kernel size of the convolution in tokens, odd.
        tokens: number of tokens. With it, a learned position embedding is added to k (initialised
            to 0), as FLatten does in place of a bias. Without it, any number of tokens works.

    Raises:
        ValueError: if a value is not as described.
    """

    def __init__(
        self, dim: int, heads: int, power: float = 3.0, kernel: int = 5, tokens: int | None = None
    ) -> None:
        super().__init__()
        width = head_width(dim, heads)
        if not _is_positive(power):
            raise ValueError(f"power={power!r}: a number above 0")
        if not _is_int(kernel, 1) or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel!r}: an odd number of tokens")
        self.heads = heads
        self.power = power
        self.scale = nn.Parameter(torch.zeros(dim))
        self.position = nn.Parameter(torch.zeros(tokens, dim)) if tokens else None
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size, bias: Tensor | None = None
    ) -> Tensor:
        v = to_heads(v, self.heads)
        with full_precision(x):
            q, k, wide_v, scale, position = self._wide(q, k, v)
            inputs = (q, k, wide_v, scale, position, self.power)
            mixed = compiled_focused_attention(*inputs) if x.is_cuda else None
            if mixed is None:
                mixed = focused_attention(*inputs)
        local = v.flatten(0, 1).transpose(1, 2).unflatten(2, size)  # [B heads, d, H, W]
        local = self.conv(local).flatten(2).transpose(1, 2).unflatten(0, (-1, self.heads))
        return from_heads(mixed + local).to(x.dtype)

    def _wide(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """q, k, v, scale and position in float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        inputs = (q, k, v, self.scale, self.position)
        return tuple(x if x is None else x.to(wide) for x in inputs)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention matrix without the convolution: [B, heads, N, d] -> [B, heads, N, N]."""
        q, k, _, scale, position = self._wide(from_heads(q), from_heads(k), q)
        features = focused_features(q, k, scale, position, self.power)
        q, k = (to_heads(x, self.heads) for x in features)
        scores = q @ k.transpose(-2, -1)
        return scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)


class GatedAttention(nn.Module):
    """Gated linear attention as in the HoViT deck (eq. 4-11), tokens in raster order.

    alpha and beta are sigmoid(x W + b)^(1/tau) with low-rank W, as in the GLA paper. The output is
    Swish(x W_r + b_r) * LN(o), with LN on each head. Everything but the projections of x runs in
    float32 even under autocast.

    Gates have no floor, one token at a time; in chunks it is e^-20, which float32 does not tell
    from 0 beside 1 (`gated_chunks`).

    Args:
        dim: channels of k and of v.
        heads: heads.
        tau: root of the gates (16, as in the GLA paper).
        rank: rank of the gate projections.
        two_way: add a second scan, from the last token to the first (our addition).
        chunk: tokens per chunk, at most CHUNK. Affects only speed. 0 processes one token at a time.

    Raises:
        ValueError: if a value is not as described.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tau: float = 16.0,
        rank: int = 16,
        two_way: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        width = head_width(dim, heads)
        if not _is_positive(tau):
            raise ValueError(f"tau={tau!r}: a number above 0")
        if not _is_int(rank, 1):
            raise ValueError(f"rank={rank!r}: a whole number, 1 at least")
        if not _is_int(chunk, 0) or chunk > CHUNK:
            raise ValueError(f"chunk={chunk!r}: 1 to {CHUNK} tokens, or 0 for one at a time")
        self.heads = heads
        self.tau = tau
        self.two_way = two_way
        self.scan = partial(gated_chunks, chunk=chunk) if chunk else gated_recurrence
        self.alpha, self.beta = (
            nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim)) for _ in range(2)
        )
        self.gate = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size, bias: Tensor | None = None
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        logs = [F.logsigmoid(f(x).to(wide)) / self.tau for f in (self.alpha, self.beta)]
        with full_precision(x):
            q, k, v, *logs = (to_heads(t.to(wide), self.heads) for t in (q, k, v, *logs))
            out = self.scan(q, k, v, logs[0], logs[1])
            if self.two_way:
                q, k, v, *logs = (t.flip(2) for t in (q, k, v, *logs))
                out = out + self.scan(q, k, v, logs[0], logs[1]).flip(2)
            weight, bias = (p.to(wide) for p in self.norm.parameters())
            out = F.layer_norm(out, self.norm.normalized_shape, weight, bias, self.norm.eps)
        return (F.silu(self.gate(x)) * from_heads(out)).to(x.dtype)


def check_attention(name: str, options: Iterable[str]) -> None:
    """Check the name and the option names of a form.

    Raises:
        ValueError: for an unknown form, or an option that it does not take.
    """
    known = get_form(name).options
    if unknown := [option for option in options if option not in known]:
        takes = ", ".join(known) or "no options"
        raise ValueError(f"attention {name!r} does not take {', '.join(unknown)}; it takes {takes}")


def create_attention(
    name: str, dim: int, heads: int, tokens: int | None = None, **options: Any
) -> nn.Module:
    """Create an attention form by name.

    Args:
        name: a key of ATTENTION_FORMS.
        dim: channels.
        heads: number of heads; divides `dim`.
        tokens: number of tokens, if it is always the same.
        options: options of the form.

    Raises:
        ValueError: for an unknown name or option, or a value that an option does not take.
    """
    check_attention(name, options)
    if name == "focused":
        return FocusedAttention(dim, heads, tokens=tokens, **options)
    if name == "gated":
        return GatedAttention(dim, heads, **options)
    return SimilarityAttention(dim, heads, name, **options)
