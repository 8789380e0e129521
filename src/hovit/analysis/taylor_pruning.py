"""Pruning of Q/K, V and FFN channels of a trained transformer by Taylor importance.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, section 2.3 and figure 5 (importance: gradient by weight).
Paper: `Importance Estimation for Neural Network Pruning` - https://arxiv.org/abs/1906.10771
    - first-order criterion on a gate: removing a channel changes the loss by about
      d loss / d gate = sum of gradient * weight.
The paper leaves details open. We rank the channels of all blocks together regardless of their cost,
our budget counts parameters, and the model is not fine-tuned between the steps or afterwards.

Channel c of Q and of K are pruned together, because only their product matters. Pruned channels are
set to zero, which gives the outputs of a model without them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .blocks import attention_blocks

PARTS = ("qk", "v", "ffn")
Channels = dict[tuple[int, str], Tensor]  # (block, part) -> one value per channel


def taylor_pruning(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    budget: float = 0.75,
    steps: int = 10,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Prune the least important channels of a model in place, in several steps.

    Args:
        model: a trained timm Swin, ViT or DeiT.
        images: [B, 3, H, W], normalised training images, on which importance is measured.
        labels: [B], their classes.
        test_images, test_labels: images and classes for the accuracies.
        budget: share of the channels' parameters to keep, in (0, 1].
        steps: number of pruning steps; each measures importance anew and prunes an equal share.
        batch_size: images per gradient.

    Returns:
        `qk_kept`, `v_kept`, `ffn_kept`: percent of channels kept, mean over blocks. `v_early`,
        `v_late`: the same for V in the first and last third of the blocks. `kept`: share of
        parameters kept. `top1_before`, `top1_after`: accuracy in percent on the test images.
        `blocks`: one row per block: `block` (from 1), `qk_ratio`, `v_ratio`, `ffn_ratio` (channels
        divided by the width of the block), each also as `_before`, and `_importance`, the mean
        importance before pruning.

    Raises:
        ValueError: if the model has no such block, its heads read splits of the input, or `budget`
            or `steps` is out of range.
    """
    if not 0 < budget <= 1 or steps < 1:
        raise ValueError(f"budget={budget} must be in (0, 1] and steps={steps} at least 1")
    model.eval()
    blocks = attention_blocks(model)
    if not all(isinstance(block.attn.qkv, nn.Linear) for block in blocks):
        raise ValueError("Q, K and V have no channels over all of the input: heads read splits")
    before = top1(model, test_images, test_labels, batch_size)
    initial = channel_importance(model, images, labels, batch_size)
    kept, total = all_channels(blocks), remaining(blocks, all_channels(blocks))
    for step in range(steps):
        importance = channel_importance(model, images, labels, batch_size) if step else initial
        goal = total * (1 - (1 - budget) * (step + 1) / steps)
        drop_least(blocks, kept, importance, goal)
        zero_dropped(blocks, kept)
    return {
        "blocks": [_row(i, block, kept, initial) for i, block in enumerate(blocks)],
        **_means(blocks, kept),
        "kept": round(remaining(blocks, kept) / total, 6),
        "top1_before": before,
        "top1_after": top1(model, test_images, test_labels, batch_size),
    }


def all_channels(blocks: list[Any]) -> Channels:
    """Mask of kept channels of an unpruned model: all True."""
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
    """Importance |sum of gradient * weight| of each channel, averaged over batches.

    The sum runs over the rows and bias of the Q projection for Q/K, and over the columns of the
    next projection for V and FFN.
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
    """Parameters of one channel: two vectors as wide as the block, and biases."""
    if part == "ffn":
        return block.mlp.fc1.in_features + block.mlp.fc2.out_features + (
            block.mlp.fc1.bias is not None
        )  # fmt: skip
    bias = block.attn.qkv.bias is not None
    if part == "qk":
        return 2 * (block.attn.qkv.in_features + bias)
    return int(block.attn.qkv.in_features + block.attn.proj.out_features + bias)


def remaining(blocks: list[Any], kept: Channels) -> int:
    """Number of parameters of the kept channels."""
    return sum(int(on.sum()) * channel_cost(blocks[i], part) for (i, part), on in kept.items())


def drop_least(blocks: list[Any], kept: Channels, importance: Channels, goal: float) -> None:
    """Remove channels from `kept`, least important first, until `goal` parameters are left.

    Each part of each block keeps at least one channel. On a tie the first channel is removed.
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
    """Set the weights of pruned channels to zero."""
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
    """Accuracy on these images in percent."""
    right = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return round(100 * float(sum(right)) / len(images), 4)


def _means(blocks: list[Any], kept: Channels) -> dict[str, float]:
    """Percent of channels kept, averaged over blocks."""

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
