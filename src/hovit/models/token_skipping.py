"""SkipViT's algorithm on plain tensors: score the tokens, choose, take them out, put them back.

Seed: SkipViT (seeds/001), "Identifying Important Patches" and "Skip Connection For Tokens".
Paper: https://arxiv.org/abs/2401.15293. Where the seed is silent (the softmax row's mean over
heads, the kept tokens' order, the fused token's weights) it follows EViT, on which it builds:
https://arxiv.org/abs/2202.07800.

A sequence is [B, N, C]: first `prefix` tokens that are never ranked (the class token, registers),
then the active patches, last `suffix` tokens that are never ranked either (fused ones). An index
is [B, K], ascending, into that sequence. Counts are Python's integers and nothing waits for a
device. Rows are moved whole (`index_select`, `index_copy`): on a CPU that is two to three times
faster, both ways, than `gather` and `scatter` over every element (bench/skipvit.py).
"""

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the class token, the first of N, attends to: one row of attention, mean over heads.

    The rest of the N x N scores is never made: a fused kernel beside this has them.

    Args:
        q, k: [B, heads, N, d].
        scale: of the dot product, d ** -0.5.

    Returns:
        [B, N] in float32, each row's sum 1.
    """
    row = (q[:, :, :1] * scale) @ k.transpose(-2, -1)  # [B, heads, 1, N]
    return row.float().softmax(-1).mean(dim=(1, 2))


def choose(scores: Tensor, keep: int, prefix: int, suffix: int = 0) -> Tensor:
    """The index of the `keep` patches that score highest, and of all that is never ranked.

    Equal scores keep the earlier token, so that the choice is the same on every device.

    Args:
        scores: [B, N].

    Returns:
        [B, prefix + keep + suffix], ascending: kept tokens stay in their original order.
    """
    n = scores.shape[1]
    order = scores[:, prefix : n - suffix].argsort(dim=1, descending=True, stable=True)
    kept = order[:, :keep].sort(dim=1).values + prefix
    every = torch.arange(n, device=scores.device).expand(scores.shape[0], n)
    return torch.cat([every[:, :prefix], kept, every[:, n - suffix :]], dim=1)


def _rows(index: Tensor, n: int) -> Tensor:
    """[B, K] into sequences of n -> [B * K] into all their rows."""
    starts = torch.arange(index.shape[0], device=index.device) * n
    return (index + starts[:, None]).flatten()


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of an index: [B, N, C] and [B, K] -> [B, K, C]."""
    taken = x.flatten(0, 1).index_select(0, _rows(index, x.shape[1]))
    return taken.unflatten(0, index.shape)


def put_back(x: Tensor, index: Tensor, kept: Tensor) -> Tensor:
    """The sequence that `take` left, with the taken tokens as they are now: the skip connection.

    A token that was dropped is at its original position with the features it left with.

    Args:
        x: [B, N, C], the sequence when tokens were dropped.
        index: [B, K], those that were kept.
        kept: [B, K, C], what has become of them.

    Returns:
        [B, N, C].
    """
    rows = _rows(index, x.shape[1])
    return x.flatten(0, 1).index_copy(0, rows, kept.flatten(0, 1)).unflatten(0, x.shape[:2])


def fuse(x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """The one token that the dropped ones become: the sum of score * token over them.

    As in EViT the scores are the class token's attention and are not made to sum to 1 again.

    Args:
        x: [B, N, C].
        index: [B, K], those that are kept.
        scores: [B, N].

    Returns:
        [B, 1, C].
    """
    weights = scores.scatter(1, index, 0.0).to(x.dtype)  # [B, N], 0 for the kept
    return weights[:, None] @ x
