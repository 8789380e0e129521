"""Linear attention: memory linear in the number of tokens, no N x N matrix.

Focused: `FLatten Transformer: Vision Transformer using Focused Linear Attention`
    - https://arxiv.org/abs/2308.00442
Gated: `Gated Linear Attention Transformers with Hardware-Efficient Training`
    - https://arxiv.org/abs/2312.06635
Source: the HoViT deck, eq. 4-11. It writes the gates as `DiG` does
    - https://arxiv.org/abs/2405.18428
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .compiled import CompiledFunction

CHUNK = 64  # maximum number of tokens per chunk
# Least log of a product of gates over a chunk. Up to here k v / (A B) stays in range: float32
# overflows at e^88, float64 at e^709, and inputs of 1e4 take e^19.
LEAST_PRODUCT = {torch.float32: -58.0, torch.float64: -640.0}
CHUNK_64 = 32  # tokens per chunk in float64: gates down to e^-20 are exact


def focus(x: Tensor, power: float) -> Tensor:
    """|x| / |x^p| x^p for x > 0, over the last dimension: same norm, sharper direction.

    x is divided by its largest entry first, so that no power overflows. Takes any shape; zero
    vectors stay zero.
    """
    largest = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x / largest
    sharp = x**power
    norm = torch.linalg.vector_norm
    ratio = norm(x, dim=-1, keepdim=True) / norm(sharp, dim=-1, keepdim=True).clamp(min=1e-6)
    return sharp * (ratio * largest)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (k^T v) / (q . sum_j k_j) for non-negative q and k.

    Takes O(N d e) time and memory linear in N. k^T v and the sum are divided by N.

    Args:
        q, k: [..., N, d], not negative.
        v: [..., N, e].

    Returns:
        [..., N, e].
    """
    n = k.shape[-2]
    state = k.transpose(-2, -1) @ (v * (1 / n))  # [..., d, e]
    total = q @ k.mean(-2, keepdim=True).transpose(-2, -1)  # [..., N, 1]
    return (q @ state) / (total + 1e-6)


def focused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    position: Tensor | None,
    power: float,
) -> Tensor:
    """`linear_attention` of phi(q) and phi(k).

    phi(x) is `focus` of (ReLU(x) + 1e-6) / softplus(scale), over all channels, before the split
    into heads.

    Args:
        q, k: [B, N, C].
        v: [B, heads, N, C / heads].
        scale: [C].
        position: [N, C], added to k, or None.
        power: the focusing factor.

    Returns:
        [B, heads, N, C / heads].
    """
    q, k = focused_features(q, k, scale, position, power)
    q, k = (x.unflatten(-1, (v.shape[1], -1)).transpose(1, 2) for x in (q, k))
    return linear_attention(q, k, v)


def focused_features(
    q: Tensor, k: Tensor, scale: Tensor, position: Tensor | None, power: float
) -> tuple[Tensor, Tensor]:
    """phi(q) and phi(k) of `focused_attention`, [B, N, C] each."""
    if position is not None:
        k = k + position
    scale = F.softplus(scale)
    return focus((F.relu(q) + 1e-6) / scale, power), focus((F.relu(k) + 1e-6) / scale, power)


compiled_focused_attention = CompiledFunction(focused_attention)


def gated_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, log_beta: Tensor
) -> Tensor:
    """S_t = (alpha_t^T beta_t) * S_(t-1) + k_t^T v_t and o_t = q_t S_t, one token at a time.

    Eq. 5-9 of the deck (O_t = Q_t^T S_t there has the wrong shape; it means Q_t S_t). This is the
    reference; `gated_chunks` computes the same many times faster.

    Args:
        q, k: [..., N, d].
        v: [..., N, e].
        log_alpha: [..., N, d], log alpha.
        log_beta: [..., N, e], log beta.

    Returns:
        o, [..., N, e].
    """
    alpha, beta = log_alpha.exp(), log_beta.exp()
    state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[-2]):
        gate = alpha[..., t, :, None] * beta[..., t, None, :]
        state = gate * state + k[..., t, :, None] * v[..., t, None, :]
        out.append((q[..., t, None, :] @ state).squeeze(-2))
    return torch.stack(out, dim=-2)


def gated_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, log_beta: Tensor, chunk: int = CHUNK
) -> Tensor:
    """`gated_recurrence` in chunks of up to `chunk` tokens; same arguments and result.

    With A_t and B_t the products of the gates since the start of the chunk and S the state before
    the chunk,

        o_t = B_t * ((q_t * A_t) S + sum_(s <= t) ((q_t * A_t) . (k_s / A_s)) v_s / B_s).

    Only S passes from chunk to chunk; everything else runs for all chunks at once. A and B are
    divided by the square root of their product over the whole chunk, so that k / A times v / B
    stays under |k| |v| over that product. float32 therefore allows a product of gates of e^-58 in
    a chunk. With smaller gates the chunks are computed in float64 and are shorter, which takes 2.7
    times as long on a CPU. There a gate is exact down to e^-20 (2e-9, less than the rounding of
    float32) and clamped below.

    On a CPU the gates themselves decide on the precision. On a GPU reading them would make the
    host wait, so it is float64, which data-centre GPUs multiply as fast as float32.

    The speed-up depends on the device: the recurrence is bound by about six kernel launches per
    token on a GPU, and by memory on a CPU. `bench/gated_attention.py` times both, and the matrix
    products alone as a bound.

    Raises:
        ValueError: for a chunk longer than CHUNK.
    """
    if not 1 <= chunk <= CHUNK:
        raise ValueError(f"chunk={chunk!r}: 1 to {CHUNK} tokens")
    inputs = (q, k, v, log_alpha, log_beta)
    if q.dtype != torch.float64 and _fits_float32(log_alpha, log_beta, chunk):
        return _chunks(*inputs, chunk)
    chunk = min(chunk, CHUNK_64)
    least = LEAST_PRODUCT[torch.float64] / chunk
    run = _compiled_chunks_64 if q.is_cuda else _chunks_64
    out = run(*inputs, chunk, least)
    return _chunks_64(*inputs, chunk, least) if out is None else out


def _fits_float32(log_alpha: Tensor, log_beta: Tensor, chunk: int) -> bool:
    """Whether no product of gates over a chunk is too small for float32; False if unknown."""
    if isinstance(log_alpha, FakeTensor) or log_alpha.is_meta:
        return True  # no values, only shapes
    if log_alpha.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch.onnx.is_in_onnx_export():
        return False
    with torch.no_grad():
        gates = (_in_chunks(x.detach(), chunk).sum(-2) for x in (log_alpha, log_beta))
        # By NumPy, because PyTorch's `item` is what a CUDA graph forbids, and logs of it look for.
        return all(x.numpy().min(initial=0.0) >= LEAST_PRODUCT[torch.float32] for x in gates)


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """[..., N, d] -> [..., count, chunk, d] in equal chunks: 196 tokens are 4 chunks of 49.

    Tokens of zeros at the end add nothing, and their gate is 1.
    """
    n = x.shape[-2]
    count = -(-n // chunk)
    chunk = -(-n // count)
    padding = count * chunk - n
    return (F.pad(x, (0, 0, 0, padding)) if padding else x).unflatten(-2, (count, chunk))


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, log_beta: Tensor, chunk: int
) -> Tensor:
    """`gated_chunks` in the dtype of its arguments."""
    n = q.shape[-2]
    q, k, v, log_alpha, log_beta = (_in_chunks(x, chunk) for x in (q, k, v, log_alpha, log_beta))
    count = q.shape[-3]
    a, b = (_centred(x.cumsum(-2)).exp() for x in (log_alpha, log_beta))
    q, k, v = q * a, k / a, v / b
    out = (q @ k.transpose(-2, -1)).tril() @ v
    if count > 1:
        # [..., count, d, e]: square root of each chunk's product of gates
        half_gates = a[..., -1, :, None] * b[..., -1, None, :]
        added = k.transpose(-2, -1) @ v
        states = [torch.zeros_like(added[..., 0, :, :])]
        for c in range(count - 1):
            half = half_gates[..., c, :, :]
            states.append(half * (half * states[-1] + added[..., c, :, :]))
        out = out + q @ (half_gates * torch.stack(states, dim=-3))
    return (out * b).flatten(-3, -2)[..., :n, :]


def _chunks_64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    chunk: int,
    least: float,
) -> Tensor:
    """`_chunks` in float64, with log gates of at least `least`."""
    a, b = (x.double().clamp(min=least) for x in (log_alpha, log_beta))
    return _chunks(q.double(), k.double(), v.double(), a, b, chunk).to(q.dtype)


_compiled_chunks_64 = CompiledFunction(_chunks_64)


def _centred(sums: Tensor) -> Tensor:
    """Cumulative sums over a chunk, [..., chunk, d], minus half of the total."""
    return sums - sums[..., -1:, :] / 2
