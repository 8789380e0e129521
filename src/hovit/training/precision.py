"""Autocast on a CPU; operations that are slow in bfloat16 run in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

try:
    from lightning_fabric.plugins.precision import MixedPrecision
except ModuleNotFoundError:  # the same code, packaged with the rest of Lightning
    from lightning.fabric.plugins.precision import MixedPrecision  # type: ignore[no-redef]

# The convolutions and matrix products that autocast computes in bfloat16.
OPERATIONS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
    F.scaled_dot_product_attention,
)


class CPUAutocast(MixedPrecision):
    """Fabric's `bf16-mixed` on a CPU; operations that are slow in bfloat16 run in float32.

    PyTorch's backward pass of a depthwise convolution is slow in bfloat16 on any CPU: in float32,
    a training step of EfficientNet-Lite0 takes half the time. A CPU for which oneDNN has no
    bfloat16 (x86 without AVX512) is slow in all convolutions and matrix products: in float32, a
    step takes a tenth of the time (`bench/training_step.py`). Outputs are bfloat16 either way.
    """

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.everything = not has_fast_bfloat16()

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with super().forward_context(), Float32Operations(self.everything):
            yield


class Float32Operations(TorchFunctionMode):
    """Under autocast on a CPU, compute slow operations in float32 and return bfloat16.

    Args:
        everything: all convolutions and matrix products; False: only depthwise `conv2d`.
    """

    def __init__(self, everything: bool) -> None:
        super().__init__()
        self.everything = everything

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.everything:
            slow = func in OPERATIONS
        else:
            slow = func is torch.conv2d and _is_depthwise(*args, **kwargs)
        if slow and any(map(_is_float64, (*args, *kwargs.values()))):
            slow = False  # autocast leaves float64 alone, too
        if not slow or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            args = [_to_float32(x) for x in args]
            kwargs = {name: _to_float32(x) for name, x in kwargs.items()}
            return func(*args, **kwargs).to(dtype)


def has_fast_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this CPU; if not, PyTorch uses plain loops."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_depthwise(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether a convolution has several groups with one input channel each."""
    return weight.shape[1] == 1 and input.shape[-3] > 1


def _is_float64(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float64


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
