"""Pure functions compiled by `torch.compile` for a GPU, with a fallback.

On a GPU, each operation of an elementwise chain costs one kernel launch and one pass over memory.
Compilation fuses the chain into a few kernels. On a CPU, compilation made none of the functions
here faster, so they run eagerly there.
"""

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


class CompiledFunction:
    """A function of tensors, compiled for each signature on its first call.

    The first call takes some seconds to compile, and also runs the backward pass if gradients are
    needed. If compilation fails, it warns once and does not try this signature again.

    Args:
        function: takes tensors, None, numbers and strings, and returns a tensor; not a closure.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.kernels: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}

    def __call__(self, *args: Any) -> Tensor | None:
        """The result, or None where the function cannot be compiled."""
        if torch._C._are_functorch_transforms_active():  # vmap over models
            return None
        if torch.compiler.is_compiling():  # the whole model is compiled, with this function
            return self.function(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        signature = tuple(
            (x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x
            for x in args
        )
        autocast = torch.is_autocast_enabled(tensors[0].device.type)
        key = (signature, needs_grad, torch.is_inference_mode_enabled(), autocast)
        if key not in self.kernels:
            if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # a CUDA graph cannot record a compilation
            self.kernels[key] = self._compile(args, needs_grad)
        kernel = self.kernels[key]
        return None if kernel is None else kernel(*args)

    def _compile(self, args: tuple[Any, ...], needs_grad: bool) -> Callable[..., Tensor] | None:
        """Compile the function and run it once; None if that fails."""
        # A new code object: Dynamo keeps up to 8 versions of each, and searches them in turn.
        name = self.function.__name__
        code = self.function.__code__.replace(co_name=f"{name}_{len(self.kernels)}")
        function = FunctionType(code, self.function.__globals__)
        kernel: Callable[..., Tensor] = torch.compile(function, dynamic=False, fullgraph=True)
        trial = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args
        ]
        try:
            out = kernel(*trial)
            if needs_grad:
                wanted = [x for x in trial if isinstance(x, Tensor) and x.requires_grad]
                torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Dynamo, Triton or the C compiler
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            shapes = " and ".join(str([*x.shape]) for x in trial[:3] if isinstance(x, Tensor))
            warnings.warn(
                f"{name} of {shapes} runs eagerly, because it does not compile: {reason}",
                stacklevel=4,
            )
            return None
        return kernel
