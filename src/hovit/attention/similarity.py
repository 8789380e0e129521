"""Softmax attention under five similarities: softmax(t s(q, k) + bias) v.

Seed: the HoViT deck (seeds/000), "01 Swin Based Approach" and "02 LeViT Based Approach", names
Jaccard and Euclidean and prints J = |A & B| / |A | B| and d = sqrt(sum (x - y)^2). How a set is a
vector, the scale and the temperature are ours; each docstring says its choice.

Scores are matrix products and a few passes over them. Without gradients the passes go over as many
matrices at a time as fit the cores' own caches (`bench/attention_blocks.py` times other sizes, the
study `attention_speed` the whole). `dot` and `sqeuclidean` run in PyTorch's fused kernel.
FlexAttention is not used: on a CPU (torch 2.15) it has no backward pass, and a score_mod that reads
the norms of q and k, compiled for each size by itself, is no faster at batch 32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**19  # scores at a time: 2 MiB in float32, as large as two cores' own caches here


def dot(q: Tensor, k: Tensor) -> Tensor:
    """q . k / sqrt(d): q [..., N, d] and k [..., M, d], dimensions before alike -> [..., N, M]."""
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def euclidean(q: Tensor, k: Tensor) -> Tensor:
    """-|q - k| / sqrt(d), by |q - k|^2 = |q|^2 + |k|^2 - 2 q . k; shapes as for `dot`.

    The divisor is ours, as in `dot`. Where q = k the root's slope is infinite; ours is finite.

    Large terms cancel: in heads of at most 64, independent normal inputs whose mean is at most 8
    times their deviation are right to 1e-5 in float32; at 100 times they are off by 1e-3. Taking
    the mean key off both would mend it, at the price of more passes over q and k. A score that
    should be 0, of a query that is a key, is off by up to 1e-3 of a deviation; the attention of
    normal inputs is then right to 5e-4. float16 bears deviations of up to 100.
    """
    q, k, shape = _stacked(q, k)
    scale = 1 / q.shape[-1]
    norms = _mean_square(q)[..., None] + _mean_square(k)[..., None, :]
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled(q.device.type))
    into = norms if plain else None  # a copy less; neither gradients nor autocast know `out`
    squares = torch.baddbmm(norms, q, k.transpose(-2, -1), alpha=-2 * scale, out=into)
    roots = squares.clamp_(min=_least(squares)).sqrt_()
    return (-roots if roots.requires_grad else roots.neg_()).view(shape)


def sqeuclidean(q: Tensor, k: Tensor) -> Tensor:
    """(|q|^2 - |q - k|^2) / sqrt(d) (ours); shapes as for `dot`.

    The similarity is -|q - k|^2 / sqrt(d). |q|^2 is the same for every key and cancels in the
    softmax: what is left is 2 q . k - |k|^2, dot-product attention with a key bias.

    Large terms cancel here too: a mean of at most twice the deviation is right to 1e-5, one of 100
    times is off by 2e-2. float16 needs |k|^2 under 65,504.
    """
    return 2 * dot(q, k) + _key_bias(k)


def _key_bias(k: Tensor) -> Tensor:
    """-|k|^2 / sqrt(d): [..., M, d] -> [..., 1, M]."""
    return (k * k).sum(-1)[..., None, :] * -(k.shape[-1] ** -0.5)


def jaccard(q: Tensor, k: Tensor) -> Tensor:
    """q . k / (|q|^2 + |k|^2 - q . k), from -1/3 to 1; shapes as for `dot`.

    |A & B| is q . k and |A| is |q|^2 (ours). Zero vectors have 0, not 0 / 0. Both are divided by
    d, so that float16 bears inputs of deviation 0.1 to 100.
    """
    q, k, shape = _stacked(q, k)
    scale = 1 / q.shape[-1]
    shared = torch.baddbmm(q.new_zeros(1), q, k.transpose(-2, -1), beta=0, alpha=scale)
    union = (_mean_square(q)[..., None] + _least(q, scale)) + _mean_square(k)[..., None, :]
    union = union.sub_(shared)
    return (shared / union if shared.requires_grad else shared.div_(union)).view(shape)


def jaccard_minmax(q: Tensor, k: Tensor) -> Tensor:
    """sum_i min(a_i, b_i) / sum_i max(a_i, b_i), a = softplus(q), b = softplus(k) (ours).

    Jaccard of weighted sets: no matrix product, and O(N M d) memory. Likely what made the deck's
    LeViT with Jaccard five times slower than its LeViT. Shapes as for `dot`.
    """
    a, b = F.softplus(q)[..., :, None, :], F.softplus(k)[..., None, :, :]  # [..., N, M, d]
    shared = torch.minimum(a, b).sum(-1)
    return shared / torch.maximum(a, b).sum(-1).clamp(min=_least(shared))


def _stacked(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """q [B, N, d] and k [B, M, d], the dimensions before taken as one; and their scores' shape."""
    lead = q.shape[:-2]
    count = math.prod(lead)
    shape = (*lead, q.shape[-2], k.shape[-2])
    return q.reshape(count, *q.shape[-2:]), k.reshape(count, *k.shape[-2:]), shape


def _mean_square(x: Tensor) -> Tensor:
    """|x|^2 / d over the last dimension, summed and squared in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)  # one pass, where squares are two
    return (norm * x.shape[-1] ** -0.5).square().to(x.dtype)


def _least(x: Tensor, scale: float = 1.0) -> float:
    """What keeps a division by zero and a root's slope finite in x's precision."""
    return max(1e-12 * scale, torch.finfo(x.dtype).tiny)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f for f in (dot, euclidean, sqeuclidean, jaccard, jaccard_minmax)
}


def attention(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Tensor:
    """softmax(temperature * s(q, k) + bias) v.

    Args:
        similarity: a name of SIMILARITIES.
        q: [B, h, N, d].
        k: [B, h, M, d].
        v: [B, h, M, e].
        bias: [W, h, N, M] with W dividing B (1, or the windows of an image in turn).
        temperature: [h].

    Returns:
        [B, h, N, e].
    """
    if similarity in ("dot", "sqeuclidean"):
        return _fused(similarity, q, k, v, bias, temperature)
    score = SIMILARITIES[similarity]
    if temperature is not None:
        temperature = temperature[:, None, None]
    batch, heads, n, d = q.shape
    size = heads * n * k.shape[2] * (d if score is jaccard_minmax else 1)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    step = batch if needs_grad else _step(batch, size, 1 if bias is None else len(bias))

    def part(i: int) -> Tensor:
        now = slice(i, i + step)
        scores = score(q[now], k[now])  # [step, h, N, M]
        if temperature is not None:
            scores = scores * temperature if needs_grad else scores.mul_(temperature)
        if bias is not None:
            near = bias[i % len(bias) :][:step]
            scores = (scores.unflatten(0, (-1, len(near))) + near).flatten(0, 1)
        return scores.softmax(-1).to(v.dtype) @ v[now]

    first = part(0)
    if step == batch:
        return first
    out = first.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)  # the fused kernel's layout
    out[:step] = first
    for i in range(step, batch, step):
        out[i : i + step] = part(i)
    return out


def _fused(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """`dot` and `sqeuclidean` by PyTorch's fused kernel."""
    if bias is not None and len(bias) > 1:
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    keys = None
    if similarity == "sqeuclidean":
        q, keys = 2 * q, _key_bias(k)
    if temperature is not None:
        scale = temperature[:, None, None]
        q, keys = q * scale, None if keys is None else keys * scale
    if keys is not None:
        bias = keys.to(q.dtype) if bias is None else bias + keys
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _step(count: int, size: int, period: int) -> int:
    """How many of `count` images with `size` scores each to take at a time.

    As many as make BLOCK; whole periods of the bias, or a whole fraction of one.
    """
    step = max(1, min(count, BLOCK // size))
    if step >= period:
        return step // period * period
    return next(n for n in range(step, 0, -1) if period % n == 0)
