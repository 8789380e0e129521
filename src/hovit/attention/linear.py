"""Linear attention: the N x N matrix is never formed.

Focused: `FLatten Transformer: Vision Transformer using Focused Linear Attention`
    - https://arxiv.org/abs/2308.00442
Gated: `Gated Linear Attention Transformers with Hardware-Efficient Training`
    - https://arxiv.org/abs/2312.06635
Seed: the HoViT deck (seeds/000), eq. 4-11, which writes the gates as `DiG` does
    - https://arxiv.org/abs/2405.18428
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens whose pairs are taken at once, at most
LEAST_GATE = -0.9  # of a log gate: both together grow k v by e^58 in a chunk; float32 ends at e^88


def focus(x: Tensor, power: float) -> Tensor:
    """|x| / |x^p| x^p for x > 0, over the last dimension: the norm kept, the direction sharpened.

    Computed on x over its largest entry, so that no power overflows. Any shape; zero stays zero.
    """
    largest = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x / largest
    sharp = x**power
    norm = torch.linalg.vector_norm
    ratio = norm(x, dim=-1, keepdim=True) / norm(sharp, dim=-1, keepdim=True).clamp(min=1e-6)
    return sharp * (ratio * largest)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (k^T v) / (q . sum_j k_j): q, k [..., N, d] and not negative, v [..., N, e] -> [..., N, e].

    O(N d e) time; memory linear in N. Both factors of k^T v are divided by sqrt(N), as FLatten's
    code does since May 2024, so that half precision does not overflow.
    """
    n = k.shape[-2]
    state = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)  # [..., d, e]
    total = q @ k.mean(-2, keepdim=True).transpose(-2, -1)  # [..., N, 1]
    return (q @ state) / (total + 1e-6)


def gated_recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, log_beta: Tensor
) -> Tensor:
    """S_t = (alpha_t^T beta_t) * S_(t-1) + k_t^T v_t and o_t = q_t S_t, a token at a time.

    The deck's eq. 5-9 as they stand (its O_t = Q_t^T S_t holds only as Q_t S_t). The reference:
    `gated_chunks` is the same and many times faster.

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
    """What `gated_recurrence` gives, up to `chunk` tokens at a time; arguments as there.

    With A_t and B_t the products of the gates since the chunk began and S the state before it,

        o_t = B_t * ((q_t * A_t) S + sum_(s <= t) ((q_t * A_t) . (k_s / A_s)) v_s / B_s).

    Only S goes from chunk to chunk; all else is done for all chunks at once. A and B are taken
    relative to half of the chunk's whole product, so that k / A times v / B stays under
    e^(-LEAST_GATE chunk) |k| |v| while no log gate is less than LEAST_GATE: float32 then bears
    inputs of up to 1e4.

    How much faster depends on what the recurrence waits for: on a GPU some six launches a token, on
    a CPU memory, which it uses well. `bench/gated_attention.py` times both, and the matrix products
    alone, which bound what is to be had.

    Raises:
        ValueError: for a chunk longer than CHUNK, where float32 might overflow.
    """
    if not 1 <= chunk <= CHUNK:
        raise ValueError(f"chunk={chunk!r}: 1 to {CHUNK} tokens")
    n = q.shape[-2]
    count = -(-n // chunk)
    chunk = -(-n // count)  # no longer than needed: 196 tokens are 4 chunks of 49
    short = count * chunk - n  # a token of zeros adds nothing, and its gate is 1
    q, k, v, log_alpha, log_beta = (
        (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (count, chunk))
        for x in (q, k, v, log_alpha, log_beta)
    )  # [..., count, chunk, .]
    a, b = (_halved(x.cumsum(-2)).exp() for x in (log_alpha, log_beta))
    q, k, v = q * a, k / a, v / b
    out = (q @ k.transpose(-2, -1)).tril() @ v
    if count > 1:
        faded = a[..., -1, :, None] * b[..., -1, None, :]  # [..., count, d, e], by half a chunk
        added = k.transpose(-2, -1) @ v
        states = [torch.zeros_like(added[..., 0, :, :])]
        for c in range(count - 1):
            half = faded[..., c, :, :]
            states.append(half * (half * states[-1] + added[..., c, :, :]))
        out = out + q @ (faded * torch.stack(states, dim=-3))
    return (out * b).flatten(-3, -2)[..., :n, :]


def _halved(sums: Tensor) -> Tensor:
    """Sums of logs over a chunk, less half of the whole sum."""
    return sums - sums[..., -1:, :] / 2
