"""Steps of training and validation as CUDA graphs.

A captured step runs no Python: numbers that change from step to step (learning rate, random
numbers, images) are tensors on the device, and the model must not change its structure. A graph is
captured again when the settings of the model change, as at the end of SkipViT's warm-up.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..utils.graphs import GraphedCallable

WARMUP = 3  # eager steps before a capture: lazy initialisation, choice of convolution algorithms
AHEAD = 8  # steps that the host may be ahead of the device
Setting = tuple[str, str, Any]  # module or tensor, attribute, value


def optimizer_args(optimizer: str, device: torch.device) -> dict[str, bool]:
    """Arguments of an optimizer whose step can be captured: fused, with its state on the device.

    A fused optimizer also skips a step with infinite gradients (fp16) without asking the host.

    Args:
        optimizer: `adam`, `adamw` or `sgd`.
        device: device of the model.
    """
    capturable = {} if optimizer == "sgd" else {"capturable": device.type == "cuda"}
    return {"fused": True} | capturable


def share_learning_rate(optimizer: Optimizer, device: torch.device) -> Tensor:
    """Replace the learning rates of all parameter groups by one tensor, float32 []."""
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def model_settings(model: nn.Module) -> set[Setting]:
    """Settings of a model that are fixed when a graph is captured.

    These are the plain attributes of all modules (training mode, dropout rates, SkipViT's
    `dropping`), the set of trained parameters, and the addresses of all parameters and buffers.
    """
    plain = (bool, int, float, str)
    settings: set[Setting] = {
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain)
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        settings |= {(name, "trained", tensor.requires_grad), (name, "at", tensor.data_ptr())}
    return settings


class CapturedStep:
    """A function of tensors that runs as a CUDA graph and is captured again after changes.

    Args:
        fn: the function; returns one tensor.
        model: the model that `fn` uses.
        on_fallback: called with one line if `fn` cannot be captured; it then runs eagerly.
    """

    def __init__(
        self, fn: Callable[..., Tensor], model: nn.Module, on_fallback: Callable[[str], None]
    ) -> None:
        self.graphed = GraphedCallable(
            fn, WARMUP, on_fallback=on_fallback, on_capture=self.clear_caches
        )
        self.model = model
        self.settings: set[Setting] = set()

    def clear_caches(self) -> None:
        """Clear the caches of the model by setting its mode again.

        timm's LeViT caches attention biases in evaluation mode. A graph must compute them, or it
        would keep the biases of the epoch in which it was captured.
        """
        self.model.train(self.model.training)

    def check_settings(self) -> None:
        """Capture again if the settings of the model have changed. Called once per epoch."""
        settings = model_settings(self.model)
        if settings != self.settings:
            self.graphed.reset()
            self.settings = settings

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Result of `fn`, in memory that later calls do not overwrite."""
        return self.graphed(*inputs).clone()


class RunAhead:
    """Keeps the host at most `AHEAD` steps ahead of the device.

    Otherwise the host would submit hundreds of steps, and a run would notice its deadline late. The
    host waits for an earlier step, so that the device never idles.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Wait if the host is too far ahead; call this after each step."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # sleeps: other processes need the core
        event.record()
        self.events.append(event)
        if len(self.events) > AHEAD:
            self.events.popleft().synchronize()


@contextmanager
def benchmark_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape. Has no effect on a CPU."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
