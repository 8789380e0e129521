"""Runtime of memory-bound and compute-bound operators.

Paper: `EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention`
    - https://arxiv.org/abs/2305.07027, section 2.1: reshaping, element-wise addition, copying and
normalisation are memory-bound. We count softmax and activation functions as element-wise. Fused
attention is a single operator that includes softmax; timm's ViTs use it and its Swin does not. It
is disabled during the analysis, so that softmax counts alike in all models.
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
    """Class of an operator name such as `aten::add_`, or `other`."""
    short = name.removeprefix("aten::")
    for group, names in CLASSES.items():
        if short in names or short.startswith(tuple(n for n in names if n in PREFIXES)):
            return group
    return "other"


def runtime_breakdown(model: nn.Module, images: Tensor, repeats: int = 3) -> dict[str, Any]:
    """Time by operator class, averaged over passes after one warm-up pass.

    Args:
        model: a vision transformer or CNN.
        images: [B, 3, H, W] on the device of the model. On a GPU, kernel time counts.
        repeats: number of passes.

    Returns:
        `classes`: one row per class: `class`, `memory_bound`, `ms` per pass, `share` in percent of
        all classes but `other`. `other_ms`: time of unknown operators and the framework.
        `memory_bound_share`: percent. `memory_bound_share_noise`: half the interquartile range over
        passes (0 for one pass).

    Raises:
        ValueError: if `repeats` is below 1, or no known operator ran.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    model.eval()
    with torch.inference_mode(), _attention_not_fused(model):
        model(images)
        passes = [_profiled(model, images) for _ in range(repeats)]
    if not all(_known(each) for each in passes):
        raise ValueError("no operator of a known class ran")
    spent = {group: sum(each[group] for each in passes) / repeats for group in passes[0]}
    shares = [_bound_share(each) for each in passes]
    low, _, high = np.percentile(shares, [25, 50, 75])
    return {
        "classes": _rows(spent),
        "other_ms": round(spent["other"], 6),
        "memory_bound_share": round(_bound_share(spent), 4),
        "memory_bound_share_noise": round(float(high - low) / 2, 4),
    }


def _rows(spent: dict[str, float]) -> list[dict[str, Any]]:
    known = _known(spent)
    return [
        {
            "class": group,
            "memory_bound": group in MEMORY_BOUND,
            "ms": round(spent[group], 6),
            "share": round(100 * spent[group] / known, 4),
        }
        for group in CLASSES
    ]


@contextmanager
def _attention_not_fused(model: nn.Module) -> Iterator[None]:
    """Disable fused attention in all of timm's attention modules."""
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
    """Milliseconds of one pass by operator class."""
    cuda = images.is_cuda
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, acc_events=True) as profiler:
        model(images)
        if cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys((*CLASSES, "other"), 0.0)
    for event in profiler.key_averages():
        # The time of a kernel counts for the operator that launched it.
        if event.device_type == DeviceType.CPU:
            time = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[operator_class(event.key)] += time / 1000
    return spent


def _known(spent: dict[str, float]) -> float:
    """Milliseconds of known classes."""
    return sum(ms for group, ms in spent.items() if group != "other")


def _bound_share(spent: dict[str, float]) -> float:
    """Memory-bound share of the time of known classes, in percent."""
    return 100 * sum(spent[group] for group in MEMORY_BOUND) / _known(spent)
