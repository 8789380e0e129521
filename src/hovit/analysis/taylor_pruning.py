"""Which channels of Q and K, V and FFN a trained transformer can spare, by Taylor importance.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, section 2.3 and figure 5 (importance: gradient by weight).
Paper: `Importance Estimation for Neural Network Pruning` - https://arxiv.org/abs/1906.10771, whose
first-order gate this is: if a channel goes, the loss changes by d loss / d gate = sum of gradient *
weight. Seed: seeds/002, on parameter efficiency. That channels of all blocks are ranked together,
with no regard to their cost, and that the budget counts parameters, is ours.

Channel c of Q and K is one choice, as their product is what counts. Pruned channels are zeroed:
the outputs are those of a model without them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import attention_blocks

PARTS = ("qk", "v", "ffn")
Channels = dict[tuple[int, str], Tensor]  # (block, part) -> a value for each channel


def taylor_pruning(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    budget: float = 0.75,
    steps: int = 10,
    batch_size: int = 32,
    tune: Callable[[Channels], None] | None = None,
) -> dict[str, Any]:
    """Prune the least important channels, a share at a time; the model itself is pruned.

    Args:
        model: a timm Swin, ViT or DeiT, trained.
        images: [B, 3, H, W], normalised; importance is measured on them, so they are the training
            split's.
        labels: [B], their classes.
        test_images, test_labels: others, alike, for the accuracies.
        budget: share of the channels' parameters that stays, in (0, 1].
        steps: so many times importance is measured, and a like number of channels goes.
        batch_size: images in one gradient.
        tune: called after each step with what is kept, for some training between; or None.

    Returns:
        `qk_kept`, `v_kept`, `ffn_kept`: percent of the channels, mean over blocks; `v_early` and
        `v_late`, the same of V in the first and the last third of the blocks; `kept`, the share of
        parameters; `top1_before`, `top1_after`, percent of the test images; `blocks`, a row for
        each block: `block` (from 1), `qk_ratio`, `v_ratio`, `ffn_ratio` (channels over the
        block's width), `_before` of each, and `_importance`, its mean before anything went.

    Raises:
        ValueError: if the model has no such block, its heads read splits, or the budget or the
            steps are out of range.
    """
    if not 0 < budget <= 1 or steps < 1:
        raise ValueError(f"budget={budget} is in (0, 1] and steps={steps} at least 1")
    model.eval()
    blocks = attention_blocks(model)
    if not all(isinstance(block.attn.qkv, nn.Linear) for block in blocks):
        raise ValueError("Q, K and V have no channels over all of the input: heads read splits")
    kept = all_channels(blocks)
    before = top1(model, test_images, test_labels, batch_size)
    first: Channels = {}
    total = remaining(blocks, kept)
    for step in range(steps):
        importance = channel_importance(model, images, labels, batch_size)
        first = first or importance
        goal = total * (1 - (1 - budget) * (step + 1) / steps)
        drop_least(blocks, kept, importance, goal)
        zero_dropped(blocks, kept)
        if tune:
            tune(kept)
            zero_dropped(blocks, kept)
    return {
        "blocks": [_row(i, block, kept, first) for i, block in enumerate(blocks)],
        **_means(blocks, kept),
        "kept": round(remaining(blocks, kept) / total, 6),
        "top1_before": before,
        "top1_after": top1(model, test_images, test_labels, batch_size),
    }


def all_channels(blocks: list[Any]) -> Channels:
    """Nothing pruned yet: for each block and part, as many True as it has channels."""
    widths = {
        (i, part): block.mlp.fc2.in_features if part == "ffn" else block.attn.proj.in_features
        for i, block in enumerate(blocks)
        for part in PARTS
    }
    return {
        key: torch.ones(n, dtype=torch.bool, device=blocks[key[0]].attn.proj.weight.device)
        for key, n in widths.items()
    }


def channel_importance(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 32
) -> Channels:
    """|sum of gradient * weight| of each channel's gate, mean over batches.

    The gate of Q and K stands behind Q's projection (its rows and bias), those of V and FFN before
    the projection that reads them (its columns).
    """
    blocks = attention_blocks(model)
    total: Channels = {key: torch.zeros(len(on), device=on.device) for key, on in
                       all_channels(blocks).items()}  # fmt: skip
    parts = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    for x, y in parts:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        for i, block in enumerate(blocks):
            q, proj, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc2
            width = proj.in_features
            by_row = (q.weight.grad * q.weight).sum(1)[:width]  # [C]
            if q.bias is not None:
                by_row = by_row + (q.bias.grad * q.bias)[:width]
            total[i, "qk"] += by_row.detach().abs()
            total[i, "v"] += (proj.weight.grad * proj.weight).sum(0).detach().abs()
            total[i, "ffn"] += (fc2.weight.grad * fc2.weight).sum(0).detach().abs()
    model.zero_grad(set_to_none=True)
    return {key: value / len(parts) for key, value in total.items()}


def channel_cost(block: Any, part: str) -> int:
    """Parameters that go with one channel: two vectors of the block's width, and biases."""
    if part == "ffn":
        return block.mlp.fc1.in_features + block.mlp.fc2.out_features + (
            block.mlp.fc1.bias is not None
        )  # fmt: skip
    bias = block.attn.qkv.bias is not None
    if part == "qk":
        return 2 * (block.attn.qkv.in_features + bias)
    return int(block.attn.qkv.in_features + block.attn.proj.out_features + bias)


def remaining(blocks: list[Any], kept: Channels) -> int:
    """Parameters of the channels that are kept."""
    return sum(int(on.sum()) * channel_cost(blocks[i], part) for (i, part), on in kept.items())


def drop_least(blocks: list[Any], kept: Channels, importance: Channels, goal: float) -> None:
    """Take channels out of `kept`, the least important first, until `goal` parameters are left.

    Every part of every block keeps a channel. Of equals, the first goes.
    """
    order = sorted(
        (value, *key, c)
        for key, on in kept.items()
        for c, (value, stays) in enumerate(zip(importance[key].tolist(), on.tolist(), strict=True))
        if stays
    )
    left = remaining(blocks, kept)
    counts = {key: int(on.sum()) for key, on in kept.items()}
    for _, i, part, c in order:
        if left <= goal:
            return
        if counts[i, part] > 1:
            kept[i, part][c] = False
            counts[i, part] -= 1
            left -= channel_cost(blocks[i], part)


@torch.no_grad()
def zero_dropped(blocks: list[Any], kept: Channels) -> None:
    """Zero the weights of the channels that are not kept."""
    for (i, part), on in kept.items():
        off = ~on
        if part == "ffn":
            into, out = blocks[i].mlp.fc1, blocks[i].mlp.fc2
            rows = off
        else:
            into, out = blocks[i].attn.qkv, blocks[i].attn.proj
            none = torch.zeros_like(off)
            rows = torch.cat([off, off, none] if part == "qk" else [none, none, off])
        into.weight[rows] = 0
        if into.bias is not None:
            into.bias[rows] = 0
        if part != "qk":
            out.weight[:, off] = 0


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Accuracy on these images, percent."""
    right = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return round(100 * float(sum(right)) / len(images), 4)


def _means(blocks: list[Any], kept: Channels) -> dict[str, float]:
    """Percent of channels kept, mean over blocks."""

    def mean(part: str, some: range) -> float:
        return round(100 * sum(float(kept[i, part].float().mean()) for i in some) / len(some), 4)

    n, third = len(blocks), max(1, len(blocks) // 3)
    means = {f"{part}_kept": mean(part, range(n)) for part in PARTS}
    return means | {"v_early": mean("v", range(third)), "v_late": mean("v", range(n - third, n))}


def _row(i: int, block: Any, kept: Channels, importance: Channels) -> dict[str, Any]:
    width = block.attn.qkv.in_features
    row: dict[str, Any] = {"block": i + 1}
    for part in PARTS:
        on = kept[i, part]
        row[f"{part}_ratio"] = round(int(on.sum()) / width, 6)
        row[f"{part}_before"] = round(len(on) / width, 6)
        row[f"{part}_importance"] = float(importance[i, part].mean())
    return row
