"""Parameters, and multiply-adds for one image. Exact, and the same on every machine."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..utils.create_model import create_model
from ..utils.errors import HovitError
from .latency import example_inputs


def cost(
    model: str,
    args: dict[str, Any],
    num_classes: int,
    image_size: int | None,
    part: str | None = None,
    backward: bool = True,
) -> dict[str, int]:
    """What a model costs, before any weight is trained.

    Args:
        model, args: as in the config.
        num_classes, image_size: the setting at which to count.
        part: a submodule whose parameters are counted apart.
        backward: also count what needs a backward pass: what is unused, and `activations`.

    Returns:
        parameters; of them `parameters_unused` (no gradient of the output reaches them) and
        `parameters_used`; `part_parameters`; `macs`, multiply-adds of matrix products and
        convolutions for one image (half of what torch.utils.flop_counter counts); `activations`.

    Raises:
        HovitError: if the model has no such part.
    """
    net = create_model(model, num_classes, image_size, **args)
    total = sum(p.numel() for p in net.parameters())
    result = {"parameters": total, "macs": macs(net, image_size)}
    if backward:
        unused = sum(p.numel() for p in _without_gradient(net, image_size))
        result |= {"parameters_unused": unused, "parameters_used": total - unused}
        result["activations"] = activations(net, image_size)
    if part is not None:
        try:
            module = net.get_submodule(part)
        except AttributeError:
            raise HovitError(f"model {model} has no part {part!r}") from None
        result["part_parameters"] = sum(p.numel() for p in module.parameters())
    return result


def _without_gradient(net: Any, image_size: int | None) -> list[nn.Parameter]:
    # Whether a gradient arrives does not depend on the size; 64 px is quick, if the model takes it.
    fixed = net.pretrained_cfg.get("fixed_input_size")
    size = image_size if fixed or image_size is None else min(image_size, 64)
    net.train()
    net(*(x.requires_grad_() for x in example_inputs(net, 2, size))).sum().backward()
    unused = [p for p in net.parameters() if p.grad is None]
    net.zero_grad()
    return unused


def macs(net: nn.Module, image_size: int | None) -> int:
    """Multiply-adds for one image of `image_size` pixels a side."""
    net.eval()
    device = next(net.parameters(), torch.empty(0)).device
    inputs = [x.to(device) for x in example_inputs(net, 1, image_size)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*inputs)
    return counter.get_total_flops() // 2


def activations(net: nn.Module, image_size: int | None) -> int:
    """Bytes that a training step keeps for the backward pass, for one image in float32.

    What autograd saves besides parameters and the input, each storage once.
    """
    net.eval()  # a batch of one has no statistics
    inputs = example_inputs(net, 1, image_size)
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), *inputs)}
    saved: dict[int, int] = {}
    held = []  # a storage that is freed could lend its address to another

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net(*(x.requires_grad_() for x in inputs))
    return sum(saved.values())
