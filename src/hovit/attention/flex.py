"""Jaccard and Euclidean attention in one kernel: PyTorch's FlexAttention, compiled.

    - https://arxiv.org/abs/2412.05496

FlexAttention computes softmax(score_mod(q . k / d)) v without an N x M matrix in memory. Both
similarities are functions of q . k, |q|^2 and |k|^2, so score_mod reads the norms of its row and of
its column. Gradients pass through the norms, the bias and the temperature: the backward kernel adds
up theirs by atomic additions, in an order that varies from run to run.

Products, norms and scores are float32, also for half-precision inputs.
"""

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

Kernel = Callable[..., Tensor]
MIN_WIDTH = 16  # channels of a head that Triton's matrix product needs
_kernels: dict[tuple[Any, ...], Kernel | None] = {}  # None: FlexAttention cannot take it


def epsilon(x: Tensor, scale: float = 1.0) -> float:
    """Lower bound that keeps divisions and gradients of roots finite in the dtype of x."""
    return max(1e-12 * scale, torch.finfo(x.dtype).tiny)


def euclidean(product: Tensor, q_norm: Tensor, k_norm: Tensor, least: float) -> Tensor:
    """-|q - k| / sqrt(d) from q . k / d, |q|^2 / d and |k|^2 / d."""
    return -(q_norm + k_norm - 2 * product).clamp(min=least).sqrt()


def jaccard(product: Tensor, q_norm: Tensor, k_norm: Tensor, least: float) -> Tensor:
    """q . k / (|q|^2 + |k|^2 - q . k) from the same three."""
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

    To be compiled: without, FlexAttention forms the whole matrix of scores. On a CPU, compiled or
    not, it has no backward pass (torch 2.15).
    """
    score, inverse_d = SCORES[similarity], 1 / q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    # Sums, which Inductor keeps in memory; it would compute a mean again for each score.
    q_norm, k_norm = (x.to(wide).square().sum(-1) for x in (q, k))  # [B, h, N] and [B, h, M]
    # By the dtype of q, because the kernels cast the gradients of the products to it.
    least = epsilon(q, inverse_d if similarity == "jaccard" else 1.0)
    if temperature is not None:
        # One copy for each row: atomic additions to one address wait for each other.
        temperature = temperature.to(wide)[:, None].expand(q_norm.shape)
    if bias is not None:
        bias = bias.to(wide)

    def score_mod(product: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        value = score(product, inverse_d * q_norm[b, h, i], inverse_d * k_norm[b, h, j], least)
        if temperature is not None:
            value = value * temperature[b, h, i]
        return value if bias is None else value + bias[b % len(bias), h, i, j]

    # The kernel for fewer than 128 queries splits the keys, for few and long sequences.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
    out = flex_attention(q, k, v, score_mod, scale=inverse_d, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


def fused_attention(
    similarity: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Tensor | None:
    """`similarity_attention` compiled for these shapes, or None where FlexAttention cannot take it.

    The first call with new shapes compiles for some seconds, and tries the backward pass if
    gradients are needed. A failure is remembered and warned of once.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):  # as for matrix products; autocast skips FlexAttention
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    inputs = (q, k, v, bias, temperature)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not _is_possible(q, k, v, needs_grad):
        return None
    if torch.compiler.is_compiling():  # the whole model: this kernel is a part of it
        return similarity_attention(similarity, *inputs)
    tensors = tuple(x if x is None else (x.shape, x.dtype, x.requires_grad) for x in inputs)
    modes = (needs_grad, torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device))
    key = (similarity, q.device, tensors, modes)
    if key not in _kernels:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a CUDA graph cannot record a compilation
        _kernels[key] = _compile(similarity, inputs, needs_grad)
    kernel = _kernels[key]
    return None if kernel is None else kernel(similarity, *inputs)


def _is_possible(q: Tensor, k: Tensor, v: Tensor, needs_grad: bool) -> bool:
    """Whether it is worth a try to compile for these inputs."""
    if torch._C._are_functorch_transforms_active():  # vmap over models
        return False
    if needs_grad and torch.are_deterministic_algorithms_enabled():  # atomic additions are not
        return False
    if 0 in (*q.shape, *k.shape, *v.shape) or q.dtype == torch.float64:
        return False
    return q.dtype == k.dtype == v.dtype and min(q.shape[-1], v.shape[-1]) >= MIN_WIDTH


def _compile(similarity: str, inputs: tuple[Tensor | None, ...], needs_grad: bool) -> Kernel | None:
    """Compile and try; None, with a warning, if that fails."""
    # Dynamo keeps up to 8 versions for each code object, and searches them in turn.
    code = similarity_attention.__code__.replace(co_name=f"{similarity}_attention")
    function = FunctionType(code, globals(), closure=similarity_attention.__closure__)
    kernel = torch.compile(function, dynamic=False, fullgraph=True)
    trial = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
    try:
        out = kernel(similarity, *trial)
        if needs_grad:
            wanted = [x for x in trial if x is not None and x.requires_grad]
            torch.autograd.grad(out, wanted, torch.ones_like(out))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Dynamo, Triton or the C compiler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        q, k = inputs[:2]
        assert q is not None
        assert k is not None
        warnings.warn(
            f"{similarity} attention of {[*q.shape]} and {[*k.shape]}, {q.dtype} on {q.device}, "
            f"runs as matrix products: FlexAttention fails: {reason}",
            stacklevel=3,
        )
        return None
    return kernel
