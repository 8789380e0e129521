"""Linear attention: memory linear in the number of tokens, no N x N matrix.

Focused: `FLatten Transformer: Vision Transformer using Focused Linear Attention`
    - https://arxiv.org/abs/2308.00442
Gated: `Gated Linear Attention Transformers with Hardware-Efficient Training`
    - https://arxiv.org/abs/2312.06635
Source: the HoViT deck (seeds/000), eq. 4-11. It writes the gates as `DiG` does
    - https://arxiv.org/abs/2405.18428
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # maximum number of tokens per chunk
MIN_LOG_GATE = -0.9  # two gates scale k v by up to e^58 in a chunk; float32 overflows at e^88


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

    Takes O(N d e) time and memory linear in N. Both factors of k^T v are divided by sqrt(N), as in
    FLatten's code since May 2024, so that half precision does not overflow.

    Args:
        q, k: [..., N, d], not negative.
        v: [..., N, e].

    Returns:
        [..., N, e].
    """
    n = k.shape[-2]
    state = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)  # [..., d, e]
    total = q @ k.mean(-2, keepdim=True).transpose(-2, -1)  # [..., N, 1]
    return (q @ state) / (total + 1e-6)


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
    stays under e^(-MIN_LOG_GATE chunk) |k| |v| as long as no log gate is less than MIN_LOG_GATE.
    float32 then handles inputs of up to 1e4.

    The speed-up depends on the device: the recurrence is bound by about six kernel launches per
    token on a GPU, and by memory on a CPU. `bench/gated_attention.py` times both, and the matrix
    products alone as a bound.

    Raises:
        ValueError: for a chunk longer than CHUNK, where float32 might overflow.
    """
    if not 1 <= chunk <= CHUNK:
        raise ValueError(f"chunk={chunk!r}: 1 to {CHUNK} tokens")
    n = q.shape[-2]
    count = -(-n // chunk)
    chunk = -(-n // count)  # equal chunks: 196 tokens are 4 chunks of 49
    padding = count * chunk - n  # tokens of zeros add nothing, and their gate is 1
    q, k, v, log_alpha, log_beta = (
        (F.pad(x, (0, 0, 0, padding)) if padding else x).unflatten(-2, (count, chunk))
        for x in (q, k, v, log_alpha, log_beta)
    )  # [..., count, chunk, .]
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


def _centred(sums: Tensor) -> Tensor:
    """Cumulative sums over a chunk, [..., chunk, d], minus half of the total."""
    return sums - sums[..., -1:, :] / 2
