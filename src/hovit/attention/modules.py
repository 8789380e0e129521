"""The attention forms as modules: what some of them learn, and one call for all.

A block projects its input to q, k and v and hands them over, heads side by side:

    create_attention("jaccard", dim=256, heads=4)(q, k, v, x, size, bias)

with q, k, v and x (the block's input) [B, N, dim], `size` the tokens' grid (H, W) with H W = N, and
`bias` [W, heads, N, N] or None. It gives [B, N, dim]; the block's own projection comes after.
"""

import math
from collections.abc import Iterable
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import CHUNK, LEAST_GATE, focus, gated_chunks, gated_recurrence, linear_attention
from .similarity import SIMILARITIES, attention

Size = tuple[int, int]


def to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def from_heads(x: Tensor) -> Tensor:
    """[B, heads, N, d] -> [B, N, heads d]."""
    return x.transpose(1, 2).flatten(2)


def head_width(dim: int, heads: int) -> int:
    """The channels of one head.

    Raises:
        ValueError: where heads would not be equal.
    """
    if not _whole(heads, 1) or dim % heads:
        raise ValueError(f"{dim} channels in {heads!r} heads: heads must be equal")
    return dim // heads


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


class SimilarityAttention(nn.Module):
    """Softmax attention under a similarity.

    Jaccard lies between -1/3 and 1, too flat for a softmax: it has a temperature per head, which is
    learned and begins at sqrt(d) (ours).
    """

    def __init__(self, dim: int, heads: int, similarity: str) -> None:
        super().__init__()
        self.heads = heads
        self.similarity = similarity
        learned = similarity.startswith("jaccard")
        start = torch.full((heads,), math.sqrt(head_width(dim, heads)))
        self.temperature = nn.Parameter(start) if learned else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size, bias: Tensor | None = None
    ) -> Tensor:
        q, k, v = (to_heads(t, self.heads) for t in (q, k, v))
        return from_heads(attention(self.similarity, q, k, v, bias, self.temperature))

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """The attention matrix, [B, heads, N, N], for q and k by heads; for looking at."""
        scores = SIMILARITIES[self.similarity](q, k)
        if self.temperature is not None:
            scores = scores * self.temperature[:, None, None]
        return (scores if bias is None else scores + bias).softmax(-1)


class FocusedAttention(nn.Module):
    """FLatten's attention: phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)) + depthwise conv of v.

    phi(x) = |x| / |x^p| x^p of x = (ReLU(.) + 1e-6) / softplus(scale), over all channels, before
    they are split into heads. The convolution is one for all heads. Constants as in FLatten's code.
    All but the convolution runs in float32 whatever the autocast: float16 has no 1e-12.

    Args:
        dim: channels.
        heads: heads.
        power: p, the focusing factor.
        kernel: of the convolution, in tokens; odd.
        tokens: with it, a learned position of that many tokens is added to k (begins at 0), as
            FLatten does in place of a bias. Without, any number of tokens will do.

    Raises:
        ValueError: for options other than these.
    """

    def __init__(
        self, dim: int, heads: int, power: float = 3.0, kernel: int = 5, tokens: int | None = None
    ) -> None:
        super().__init__()
        width = head_width(dim, heads)
        if not _positive(power):
            raise ValueError(f"power={power!r}: a number above 0")
        if not _whole(kernel, 1) or kernel % 2 == 0:
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
        with torch.autocast(x.device.type, enabled=False):
            q, k = (to_heads(t, self.heads) for t in self.focused(q, k))
            mixed = linear_attention(q, k, v.to(q.dtype))
        local = v.flatten(0, 1).transpose(1, 2).unflatten(2, size)  # [B heads, d, H, W]
        local = self.conv(local).flatten(2).transpose(1, 2).unflatten(0, (-1, self.heads))
        return from_heads(mixed + local).to(x.dtype)

    def focused(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """phi(q) and phi(k), [B, N, dim] each."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        if self.position is not None:
            k = k + self.position
        scale = F.softplus(self.scale.to(wide))
        return [focus((F.relu(t) + 1e-6) / scale, self.power) for t in (q, k)]

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """What each token takes of each, [B, heads, N, N], without the convolution's share."""
        q, k = (to_heads(t, self.heads) for t in self.focused(from_heads(q), from_heads(k)))
        shares = q @ k.transpose(-2, -1)
        return shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)


class GatedAttention(nn.Module):
    """Gated linear attention as the deck writes it (eq. 4-11), tokens in raster order.

    alpha and beta are sigmoid(x W + b)^(1/tau), W of low rank (as in the GLA paper); the output is
    Swish(x W_r + b_r) * LN(o), LN on each head's. All but the projections of x runs in float32
    whatever the autocast.

    Gates under e^-0.9 a token are held there, in chunks or not (ours; chunks need it). At tau = 16
    that is a pre-activation under -14, at 4 under -3.6; at 1 it is one under -0.38, a seventh of
    a new module's gates, so that eq. 4-11 do not hold there.

    Args:
        dim: channels of k and of v.
        heads: heads.
        tau: the root of the gates (16, as in the GLA paper).
        rank: of the gates' projections.
        two_way: add a second scan, from the last token to the first (ours).
        chunk: tokens whose pairs are taken at once, CHUNK at most; changes speed alone. 0: a
            token at a time.

    Raises:
        ValueError: for options other than these.
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
        if not _positive(tau):
            raise ValueError(f"tau={tau!r}: a number above 0")
        if not _whole(rank, 1):
            raise ValueError(f"rank={rank!r}: a whole number, 1 at least")
        if not _whole(chunk, 0) or chunk > CHUNK:
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
        logs = [
            (F.logsigmoid(f(x).to(wide)) / self.tau).clamp(min=LEAST_GATE)
            for f in (self.alpha, self.beta)
        ]
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, *logs = (to_heads(t.to(wide), self.heads) for t in (q, k, v, *logs))
            out = self.scan(q, k, v, logs[0], logs[1])
            if self.two_way:
                q, k, v, *logs = (t.flip(2) for t in (q, k, v, *logs))
                out = out + self.scan(q, k, v, logs[0], logs[1]).flip(2)
            weight, bias = (p.to(wide) for p in self.norm.parameters())
            out = F.layer_norm(out, self.norm.normalized_shape, weight, bias, self.norm.eps)
        return (F.silu(self.gate(x)) * from_heads(out)).to(x.dtype)


ATTENTIONS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(SIMILARITIES, SimilarityAttention),
    "focused": FocusedAttention,
    "gated": GatedAttention,
}
NOT_OPTIONS = ("dim", "heads", "similarity", "tokens")
OPTIONS = {
    name: [option for option in signature(form).parameters if option not in NOT_OPTIONS]
    for name, form in ATTENTIONS.items()
}
ALL_OPTIONS = sorted({option for options in OPTIONS.values() for option in options})


def check_attention(name: str, options: Iterable[str]) -> None:
    """Whether there is such a form with such options.

    Raises:
        ValueError: if not.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention {name!r}: there are {', '.join(ATTENTIONS)}")
    if unknown := [option for option in options if option not in OPTIONS[name]]:
        known = ", ".join(OPTIONS[name]) or "no options"
        raise ValueError(f"attention {name!r} does not take {', '.join(unknown)}; it takes {known}")


def create_attention(
    name: str, dim: int, heads: int, tokens: int | None = None, **options: Any
) -> nn.Module:
    """An attention form by name.

    Args:
        name: one of ATTENTIONS.
        dim, heads: channels, and into how many heads they are split.
        tokens: how many tokens there always are, if that is known.
        options: the form's own (OPTIONS).

    Raises:
        ValueError: for a name, an option or a value of it that there is not.
    """
    check_attention(name, options)
    if name == "focused":
        return FocusedAttention(dim, heads, tokens=tokens, **options)
    if name == "gated":
        return GatedAttention(dim, heads, **options)
    return SimilarityAttention(dim, heads, name)
