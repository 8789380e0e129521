"""Softmax attention under five similarities: softmax(t s(q, k) + bias) v.

Source: the HoViT deck, "01 Swin Based Approach" and "02 LeViT Based Approach". It names Jaccard
and Euclidean and prints J = |A & B| / |A | B| and d = sqrt(sum (x - y)^2). How a vector
represents a set, the softmax scale and the temperature are our choices, stated in each docstring.

Scores are matrix products followed by a few elementwise passes. `dot` and `sqeuclidean` run in
PyTorch's fused kernel, and on a GPU so do `jaccard` and `euclidean` (`flex`). `attention` chooses.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import flex
from .flex import epsilon
from .forms import get_form

# Scores per block, by device. On a CPU 2 MiB in float32, two cores' L2 caches on our machine. On a
# GPU blocks would run one after another; 1 GiB only bounds the memory of `jaccard_minmax`.
BLOCKS = {"cpu": 2**19, "cuda": 2**28}


def dot(q: Tensor, k: Tensor) -> Tensor:
    """q . k / sqrt(d): q [..., N, d] and k [..., M, d], same leading dimensions -> [..., N, M]."""
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def euclidean(q: Tensor, k: Tensor) -> Tensor:
    """-|q - k| / sqrt(d), by |q - k|^2 = |q|^2 + |k|^2 - 2 q . k; shapes as for `dot`.

    We divide by sqrt(d), as `dot` does. The gradient is infinite at q = k; it is clamped.

    Large terms cancel. With at most 64 channels per head and independent normal inputs, float32 is
    accurate to 1e-5 if the mean is at most 8 standard deviations, and to 1e-3 if it is 100.
    Subtracting the mean key from both would help, but needs more passes over q and k. The score of
    a query that equals a key should be 0 and is off by up to 1e-3 standard deviations; attention is
    then accurate to 5e-4. float16 handles standard deviations of up to 100.
    """
    q, k, shape = _stacked(q, k)
    inverse_d = 1 / q.shape[-1]
    norms = _mean_square(q)[..., None] + _mean_square(k)[..., None, :]
    # Writing into `norms` saves a copy; neither autograd nor autocast supports `out`.
    in_place = not (torch.is_grad_enabled() or torch.is_autocast_enabled(q.device.type))
    out = norms if in_place else None
    squares = torch.baddbmm(norms, q, k.transpose(-2, -1), alpha=-2 * inverse_d, out=out)
    roots = squares.clamp_(min=epsilon(squares)).sqrt_()
    return (-roots if roots.requires_grad else roots.neg_()).view(shape)


def sqeuclidean(q: Tensor, k: Tensor) -> Tensor:
    """(|q|^2 - |q - k|^2) / sqrt(d) (our addition); shapes as for `dot`.

    The similarity is -|q - k|^2 / sqrt(d). |q|^2 is the same for every key and cancels in the
    softmax. This leaves 2 q . k - |k|^2: dot-product attention with a key bias.

    Large terms cancel here too: the result is accurate to 1e-5 if the mean is at most 2 standard
    deviations, and to 2e-2 if it is 100. float16 needs |k|^2 under 65,504.
    """
    return 2 * dot(q, k) + _key_bias(k)


def _key_bias(k: Tensor) -> Tensor:
    """-|k|^2 / sqrt(d): [..., M, d] -> [..., 1, M]."""
    return (k * k).sum(-1)[..., None, :] * -(k.shape[-1] ** -0.5)


def jaccard(q: Tensor, k: Tensor) -> Tensor:
    """q . k / (|q|^2 + |k|^2 - q . k), from -1/3 to 1; shapes as for `dot`.

    |A & B| is q . k and |A| is |q|^2 (our choice). Zero vectors give 0, not 0 / 0. Both terms are
    divided by d, so that float16 handles inputs with a standard deviation of 0.1 to 100.
    """
    q, k, shape = _stacked(q, k)
    inverse_d = 1 / q.shape[-1]
    intersection = torch.baddbmm(q.new_zeros(1), q, k.transpose(-2, -1), beta=0, alpha=inverse_d)
    union = (_mean_square(q)[..., None] + epsilon(q, inverse_d)) + _mean_square(k)[..., None, :]
    union = union.sub_(intersection)
    scores = intersection / union if intersection.requires_grad else intersection.div_(union)
    return scores.view(shape)


def jaccard_minmax(q: Tensor, k: Tensor) -> Tensor:
    """sum_i min(a_i, b_i) / sum_i max(a_i, b_i), a = softplus(q), b = softplus(k) (our addition).

    Jaccard similarity of weighted sets, without a matrix product and with O(N M d) memory. It
    probably explains why the deck reports LeViT with Jaccard as five times slower than LeViT.
    Shapes as for `dot`.
    """
    a, b = F.softplus(q)[..., :, None, :], F.softplus(k)[..., None, :, :]  # [..., N, M, d]
    intersection = torch.minimum(a, b).sum(-1)
    return intersection / torch.maximum(a, b).sum(-1).clamp(min=epsilon(intersection))


def _stacked(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Flatten the leading dimensions: q [B, N, d], k [B, M, d], and the shape of the scores."""
    lead = q.shape[:-2]
    count = math.prod(lead)
    shape = (*lead, q.shape[-2], k.shape[-2])
    return q.reshape(count, *q.shape[-2:]), k.reshape(count, *k.shape[-2:]), shape


def _mean_square(x: Tensor) -> Tensor:
    """|x|^2 / d over the last dimension, computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)  # one pass; squares need two
    return (norm * x.shape[-1] ** -0.5).square().to(x.dtype)


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
    plain: bool = False,
) -> Tensor:
    """softmax(temperature * s(q, k) + bias) v.

    Args:
        similarity: a key of SIMILARITIES.
        q: [B, h, N, d].
        k: [B, h, M, d].
        v: [B, h, M, e].
        bias: [W, h, N, M], where W divides B (1, or the number of windows of an image).
        temperature: [h].
        plain: matrix products and elementwise passes over the whole batch on every device.

    Returns:
        [B, h, N, e].
    """
    form = get_form(similarity)
    if form.fused:
        return _fused(similarity, q, k, v, bias, temperature)
    # A GPU is bound by launches and by memory: one kernel does it all. A CPU has no FlexAttention
    # with gradients (torch 2.15), and without them it is no faster than blocks that stay in the
    # L2 caches. With gradients all passes are kept for the backward pass, so blocks save nothing.
    if q.is_cuda and not plain and similarity in flex.SCORES:
        out = flex.fused_attention(similarity, q, k, v, bias, temperature)
        if out is not None:
            return out
    inputs = [x for x in (q, k, v, bias, temperature) if x is not None]
    if plain or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return _products(similarity, q, k, v, bias, temperature)
    return _blocks(similarity, q, k, v, bias, temperature)


def _products(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """`attention` by two matrix products with elementwise passes between them."""
    scores = SIMILARITIES[similarity](q, k)  # [B, h, N, M]
    if temperature is not None:
        temperature = temperature[:, None, None]
        needs_grad = scores.requires_grad or (torch.is_grad_enabled() and temperature.requires_grad)
        scores = scores * temperature if needs_grad else scores.mul_(temperature)
    if bias is not None:
        scores = (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)
    return scores.softmax(-1).to(v.dtype) @ v


def _blocks(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """`_products` for a few images at a time; without gradients."""
    batch, heads, n, d = q.shape
    size = heads * n * k.shape[2] * (d if get_form(similarity).pairwise else 1)
    limit = BLOCKS.get(q.device.type, BLOCKS["cuda"])
    step = _step(batch, size, 1 if bias is None else len(bias), limit)

    def block(i: int) -> Tensor:
        rows = slice(i, i + step)
        window = None if bias is None else bias[i % len(bias) :][:step]
        return _products(similarity, q[rows], k[rows], v[rows], window, temperature)

    first = block(0)
    if step == batch:
        return first
    out = first.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)  # as the fused kernel
    out[:step] = first
    for i in range(step, batch, step):
        out[i : i + step] = block(i)
    return out


def _fused(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """`dot` and `sqeuclidean` in PyTorch's fused kernel."""
    if bias is not None and len(bias) > 1:
        bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    key_bias = None
    if similarity == "sqeuclidean":
        q, key_bias = 2 * q, _key_bias(k)
    if temperature is not None:
        temperature = temperature[:, None, None]
        q, key_bias = q * temperature, None if key_bias is None else key_bias * temperature
    if key_bias is not None:
        bias = key_bias.to(q.dtype) if bias is None else bias + key_bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _step(count: int, size: int, period: int, limit: int) -> int:
    """Images per block, out of `count` images with `size` scores each.

    As many as fit into `limit`, rounded to whole periods of the bias or a divisor of one.
    """
    step = max(1, min(count, limit // size))
    if step >= period:
        return step // period * period
    return next(n for n in range(step, 0, -1) if period % n == 0)
