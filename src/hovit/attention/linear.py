"""Linear attention: the N x N matrix is never formed.

Focused: `FLatten Transformer: Vision Transformer using Focused Linear Attention`
    - https://arxiv.org/abs/2308.00442
Gated: `Gated Linear Attention Transformers with Hardware-Efficient Training`
    - https://arxiv.org/abs/2312.06635
Seed: the HoViT deck (seeds/000), eq. 4-11, which writes the gates as `DiG` does
    - https://arxiv.org/abs/2405.18428
"""

import torch
from torch import Tensor

CHUNK = 32  # tokens whose pairs are taken at once
LEAST_GATE = -1.25  # of a log gate: over a chunk e^(-40), which float32 holds with room


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
    """What `gated_recurrence` gives, a chunk of tokens at a time; arguments as there.

    With A_t and B_t the products of the gates since the chunk began and S the state before it,

        o_t = B_t * ((q_t * A_t) S + sum_(s <= t) ((q_t * A_t) . (k_s / A_s)) v_s / B_s).

    Only S goes from chunk to chunk, so all else is done for all chunks at once. 1 / A_s must not
    overflow: a chunk's log gates must sum to more than -80 (see LEAST_GATE).
    """
    n = q.shape[-2]
    short = -n % chunk
    q, k, v, log_alpha, log_beta = (
        torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(-2, (-1, chunk))
        for x in (q, k, v, log_alpha, log_beta)
    )  # [..., n_chunks, chunk, .]; a padded token adds nothing, and its gate is 1
    sum_a, sum_b = log_alpha.cumsum(-2), log_beta.cumsum(-2)
    q, k, v = q * sum_a.exp(), k * (-sum_a).exp(), v * (-sum_b).exp()
    pairs = (q @ k.transpose(-2, -1)).tril()  # [..., n_chunks, chunk, chunk]
    added = k.transpose(-2, -1) @ v  # [..., n_chunks, d, e]
    faded = sum_a[..., -1, :, None].exp() * sum_b[..., -1, None, :].exp()
    state, before = torch.zeros_like(added[..., 0, :, :]), []
    for c in range(added.shape[-3]):
        before.append(state)
        state = faded[..., c, :, :] * (state + added[..., c, :, :])
    out = sum_b.exp() * (pairs @ v + q @ torch.stack(before, dim=-3))
    return out.flatten(-3, -2)[..., :n, :]
