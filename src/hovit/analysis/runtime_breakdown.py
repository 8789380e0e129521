"""Where a model's time goes: operators bound by memory against those bound by computing.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, section 2.1: reshaping, element-wise addition, copying and
normalisation are bound by memory. Seed: seeds/002, on memory access. That softmax and activation
functions count with the element-wise ones is ours. A fused attention is one operator, softmax and
all, which timm's ViTs have and its Swin has not: it is off while a model is analysed, so that every
model's softmax counts alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CLASSES: dict[str, tuple[str, ...]] = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_addmm_activation", "dot",
               "mkldnn_linear", "_flash_attention", "_efficient_attention", "matmul", "linear"),
    "convolution": ("conv", "mkldnn_convolution", "cudnn_convolution", "_convolution", "thnn_conv",
                    "slow_conv", "convolution", "_conv_depthwise", "_slow_conv"),
    "normalisation": ("native_layer_norm", "layer_norm", "native_batch_norm", "batch_norm",
                      "cudnn_batch_norm", "_batch_norm", "native_group_norm", "group_norm"),
    "copy": ("copy_", "_to_copy", "to", "contiguous", "clone", "cat", "roll", "index", "gather",
             "constant_pad_nd", "fill_", "zero_", "stack", "repeat", "pad"),
    "reshape": ("view", "reshape", "_reshape_alias", "_unsafe_view", "permute", "transpose", "t",
                "expand", "unsqueeze", "squeeze", "select", "slice", "split", "chunk", "unbind",
                "flatten", "as_strided", "narrow", "unflatten", "split_with_sizes", "resolve"),
    "element-wise": ("add", "add_", "sub", "mul", "mul_", "div", "div_", "gelu", "relu", "relu_",
                     "hardswish", "hardswish_", "silu", "softmax", "_softmax", "sigmoid", "exp",
                     "pow", "mean", "sum", "clamp", "clamp_min", "where", "masked_fill", "sqrt",
                     "threshold", "clamp_min_", "neg", "rsub", "max", "dropout"),
}  # fmt: skip
MEMORY_BOUND = ("normalisation", "copy", "reshape", "element-wise")
PREFIXES = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_conv_depthwise",
            "_slow_conv", "slow_conv", "thnn_conv")  # fmt: skip


def operator_class(name: str) -> str:
    """The class of an operator by its name, `aten::add_` for one; `other` if there is none."""
    short = name.removeprefix("aten::")
    for group, names in CLASSES.items():
        if short in names or short.startswith(tuple(n for n in names if n in PREFIXES)):
            return group
    return "other"


def runtime_breakdown(model: nn.Module, images: Tensor, repeats: int = 3) -> dict[str, Any]:
    """Time by class of operator, over some passes after one to warm up.

    Args:
        model: any; the classes know what vision transformers and CNNs are made of.
        images: [B, 3, H, W] on the model's device; on a GPU the kernels' time counts.
        repeats: passes.

    Returns:
        `classes`, a row for each: `class`, `memory_bound`, `ms` a pass and `share` in percent of
        all but `other`; `other_ms`, what belongs to no class (framework, unknown operators);
        `memory_bound_share`, percent; and `memory_bound_share_noise`, half the inter-quartile
        range over passes (0 for one).

    Raises:
        ValueError: if no operator that ran is known, or there is no pass to time.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is at least 1")
    model.eval()
    with torch.inference_mode(), _attention_not_fused(model):
        model(images)
        passes = [_profiled(model, images) for _ in range(repeats)]
    spent = {group: sum(each[group] for each in passes) / repeats for group in passes[0]}
    known = _known(spent)
    if not all(_known(each) for each in passes):
        raise ValueError("no operator of a known class ran")
    rows = [
        {
            "class": group,
            "memory_bound": group in MEMORY_BOUND,
            "ms": round(spent[group], 6),
            "share": round(100 * spent[group] / known, 4),
        }
        for group in CLASSES
    ]
    shares = [_bound_share(each) for each in passes]
    low, _, high = np.percentile(shares, [25, 50, 75])
    return {
        "classes": rows,
        "other_ms": round(spent["other"], 6),
        "memory_bound_share": round(_bound_share(spent), 4),
        "memory_bound_share_noise": round(float(high - low) / 2, 4),
    }


@contextmanager
def _attention_not_fused(model: nn.Module) -> Iterator[None]:
    """Without fused attention in any module of timm's that says whether it has it."""
    fused: list[Any] = [
        module for module in model.modules() if getattr(module, "fused_attn", False)
    ]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _profiled(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Milliseconds of one pass by class of operator."""
    cuda = images.is_cuda
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=kinds, acc_events=True) as profiler:
        model(images)
        if cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys((*CLASSES, "other"), 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # a kernel's time counts with what launched it
            time = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[operator_class(event.key)] += time / 1000
    return spent


def _known(spent: dict[str, float]) -> float:
    return sum(ms for group, ms in spent.items() if group != "other")


def _bound_share(spent: dict[str, float]) -> float:
    """Percent of the known classes' time that is bound by memory."""
    return 100 * sum(spent[group] for group in MEMORY_BOUND) / _known(spent)
