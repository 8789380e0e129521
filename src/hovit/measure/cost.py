"""Parameters, and multiply-adds for one image. Exact, and the same on every machine."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import HovitError
from ..factory import create_model


def cost(
    model: str, args: dict[str, Any], num_classes: int, image_size: int, part: str | None = None
) -> dict[str, int]:
    """What a model costs, before any weight is trained.

    Args:
        model, args: as in the catalogue.
        num_classes, image_size: the setting at which to count.
        part: a submodule whose parameters are counted apart.

    Returns:
        parameters; of them `parameters_unused` (no gradient of the output reaches them) and
        `parameters_used`; `part_parameters`; `macs`, multiply-adds of matrix products and
        convolutions for one image (half of what torch.utils.flop_counter counts).

    Raises:
        HovitError: if the model has no such part.
    """
    net = create_model(model, num_classes, image_size, **args)
    total = sum(p.numel() for p in net.parameters())
    unused = sum(p.numel() for p in _without_gradient(net, image_size))
    result = {
        "parameters": total,
        "parameters_unused": unused,
        "parameters_used": total - unused,
        "macs": macs(net, image_size),
    }
    if part is not None:
        try:
            module = net.get_submodule(part)
        except AttributeError:
            raise HovitError(f"model {model} has no part {part!r}") from None
        result["part_parameters"] = sum(p.numel() for p in module.parameters())
    return result


def _without_gradient(net: Any, image_size: int) -> list[nn.Parameter]:
    # Whether a gradient arrives does not depend on the size; 64 px is quick, if the model takes it.
    size = image_size if net.pretrained_cfg.get("fixed_input_size") else min(image_size, 64)
    net.train()
    net(torch.randn(2, 3, size, size)).sum().backward()
    unused = [p for p in net.parameters() if p.grad is None]
    net.zero_grad()
    return unused


def macs(net: nn.Module, image_size: int) -> int:
    """Multiply-adds for one image of `image_size` pixels a side."""
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        device = next(net.parameters()).device
        net(torch.zeros(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops() // 2
