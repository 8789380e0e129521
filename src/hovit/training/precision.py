"""Autocast on a CPU, with depthwise convolutions in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

try:
    from lightning_fabric.plugins.precision import MixedPrecision
except ModuleNotFoundError:  # the same code, packaged with the rest of Lightning
    from lightning.fabric.plugins.precision import MixedPrecision  # type: ignore[no-redef]


class CPUAutocast(MixedPrecision):
    """Fabric's `bf16-mixed` on a CPU, with depthwise convolutions in float32.

    PyTorch's backward pass of a depthwise convolution is slow in bfloat16: in float32, a training
    step of EfficientNet-Lite0 takes half the time (`bench/training_step.py`). Outputs are bfloat16,
    as those of all convolutions.
    """

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with super().forward_context(), Float32Depthwise():
            yield


class Float32Depthwise(TorchFunctionMode):
    """Under autocast on a CPU, compute depthwise `conv2d` in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and torch.is_autocast_enabled("cpu"):
            func = _conv2d
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.conv2d`, in float32 if each group has one input channel."""
    rest: Any = (stride, padding, dilation, groups)
    if groups == 1 or weight.shape[1] > 1:
        return torch.conv2d(input, weight, bias, *rest)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return torch.conv2d(input.float(), weight.float(), bias, *rest).to(dtype)
