"""Jaccard and Euclidean attention in one kernel: PyTorch's FlexAttention, compiled.

    - https://arxiv.org/abs/2412.05496

FlexAttention computes softmax(score_mod(q . k / d)) v without an N x M matrix in memory. Both
similarities are functions of q . k, |q|^2 and |k|^2, so score_mod reads the norms of its row and of
its column. Gradients also flow to the norms, the bias and the temperature. The backward kernel
accumulates them with atomic additions, in an order that varies from run to run.

Products, norms and scores are float32, also for half-precision inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .compiled import CompiledFunction

MIN_WIDTH = 16  # fewest channels per head that Triton's matrix product accepts


def epsilon(x: Tensor, scale: float = 1.0) -> float:
    """Smallest denominator for finite quotients and root gradients in the dtype of x."""
    return max(1e-12 * scale, torch.finfo(x.dtype).tiny)


def euclidean(product: Tensor, q_norm: Tensor, k_norm: Tensor, least: float) -> Tensor:
    """-|q - k| / sqrt(d) from q . k / d, |q|^2 / d and |k|^2 / d."""
    return -(q_norm + k_norm - 2 * product).clamp(min=least).sqrt()


def jaccard(product: Tensor, q_norm: Tensor, k_norm: Tensor, least: float) -> Tensor:
    """q . k / (|q|^2 + |k|^2 - q . k) from the same inputs."""
    return product / (q_norm + k_norm + least - product)


SCORES = {"euclidean": euclidean, "jaccard": jaccard}


def similarity_attention(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Tensor:
    """softmax(temperature * s(q, k) + bias) v; arguments as for `similarity.attention`.

    Compile this function: FlexAttention otherwise forms the whole matrix of scores. It has no
    backward pass on a CPU, compiled or not (torch 2.15).
    """
    score, inverse_d = SCORES[similarity], 1 / q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    # Sums, not means: Inductor stores a sum but would recompute a mean for each score.
    q_norm, k_norm = (x.to(wide).square().sum(-1) for x in (q, k))  # [B, h, N] and [B, h, M]
    # In the dtype of q, because the kernels cast the gradients of the products to it.
    least = epsilon(q, inverse_d if similarity == "jaccard" else 1.0)
    if temperature is not None:
        # One copy for each row, because atomic additions to one address run one after another.
        temperature = temperature.to(wide)[:, None].expand(q_norm.shape)
    if bias is not None:
        bias = bias.to(wide)

    def score_mod(product: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        value = score(product, inverse_d * q_norm[b, h, i], inverse_d * k_norm[b, h, j], least)
        if temperature is not None:
            value = value * temperature[b, h, i]
        return value if bias is None else value + bias[b % len(bias), h, i, j]

    # Without this option, fewer than 128 queries use a kernel for few and long sequences.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
    out = flex_attention(q, k, v, score_mod, scale=inverse_d, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


_compiled = CompiledFunction(similarity_attention)


def fused_attention(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Tensor | None:
    """`similarity_attention`, compiled; None for inputs that FlexAttention does not support.

    Each shape compiles on its first call (`CompiledFunction`).
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):  # as for matrix products; autocast skips FlexAttention
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    inputs = [x for x in (q, k, v, bias, temperature) if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_grad and torch.are_deterministic_algorithms_enabled():
        return None  # atomic additions are not deterministic
    if 0 in (*q.shape, *k.shape, *v.shape) or q.dtype == torch.float64:
        return None
    if not q.dtype == k.dtype == v.dtype or min(q.shape[-1], v.shape[-1]) < MIN_WIDTH:
        return None
    return _compiled(similarity, q, k, v, bias, temperature)
