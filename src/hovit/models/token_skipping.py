"""The algorithm of SkipViT on plain tensors: score tokens, choose, drop them, put them back.

Paper: `SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection`
    - https://arxiv.org/abs/2401.15293
Source: the SkipViT poster, "Identifying Important Patches" and "Skip Connection For Tokens". Where
it is silent (mean of the softmax row over heads, order of the kept tokens) we follow EViT, on which
it builds
    - https://arxiv.org/abs/2202.07800
We do the same for the weights of the fused token. The poster calls it a weighted average, but in
EViT the weights are not normalised (`fuse`).
Upstream: none is published.

A sequence is [B, N, C]: `prefix` tokens that are never ranked (class token, registers), then the
active patches, then `suffix` tokens that are never ranked either (fused tokens). An index is
[B, K], ascending, into that sequence. Counts are Python integers, so no call waits for a GPU.
Whole rows are moved (`index_select`, `index_copy`). On a CPU, forward and backward are two to three
times faster than `gather` and `scatter` over every element (bench/skipvit.py).
"""

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the class token (the first of N) to all tokens, mean over heads.

    Computes only this row of the N x N attention matrix.

    Args:
        q, k: [B, heads, N, d].
        scale: softmax scale, d ** -0.5.

    Returns:
        [B, N] in float32; each row sums to 1.
    """
    row = (q[:, :, :1] * scale) @ k.transpose(-2, -1)  # [B, heads, 1, N]
    return row.float().softmax(-1).mean(dim=(1, 2))


def choose(scores: Tensor, keep: int, prefix: int, suffix: int = 0) -> Tensor:
    """Index of the `keep` patches with the highest scores, and of all prefix and suffix tokens.

    Of equal scores the earlier token is kept, so that the choice is the same on every device.

    Args:
        scores: [B, N].

    Returns:
        [B, prefix + keep + suffix], ascending.
    """
    n = scores.shape[1]
    ranked = scores[:, prefix : n - suffix]
    if torch.onnx.is_in_onnx_export():  # no stable sort there; its TopK keeps the earlier index
        best = ranked.topk(keep, dim=1).indices
    else:
        best = ranked.argsort(dim=1, descending=True, stable=True)[:, :keep]
    kept = best.sort(dim=1).values + prefix
    all_tokens = torch.arange(n, device=scores.device).expand(scores.shape[0], n)
    return torch.cat([all_tokens[:, :prefix], kept, all_tokens[:, n - suffix :]], dim=1)


def _rows(index: Tensor, n: int) -> Tensor:
    """Index into sequences of n tokens, [B, K] -> index into all B * n rows, [B * K]."""
    starts = torch.arange(index.shape[0], device=index.device) * n
    return (index + starts[:, None]).flatten()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Select the tokens of an index: [B, N, C] and [B, K] -> [B, K, C]."""
    rows = x.flatten(0, 1).index_select(0, _rows(index, x.shape[1]))
    return rows.unflatten(0, index.shape)


def put_back(x: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """Inverse of `take`: write the kept tokens back into the sequence (the skip connection).

    Dropped tokens keep their original position and the features that they had when dropped.

    Args:
        x: [B, N, C], the sequence before the drop.
        index: [B, K], the kept tokens.
        kept: [B, K, C], their current features.

    Returns:
        [B, N, C].
    """
    rows = _rows(index, x.shape[1])
    return x.flatten(0, 1).index_copy(0, rows, kept.flatten(0, 1)).unflatten(0, x.shape[:2])


def fuse(x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """Fuse the dropped tokens into one: the sum of score * token.

    As in EViT, the scores are the attention of the class token and are not renormalised.

    Args:
        x: [B, N, C].
        index: [B, K], the kept tokens.
        scores: [B, N].

    Returns:
        [B, 1, C].
    """
    weights = scores.scatter(1, index, 0.0).to(x.dtype)  # [B, N], 0 for kept tokens
    return weights[:, None] @ x
