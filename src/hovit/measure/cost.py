"""Parameters, multiply-adds and activations for one image: exact, the same on every machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..utils.create_model import create_model
from ..utils.errors import HovitError
from .latency import example_inputs


def _flash_attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


# Up to torch 2.11 the counter passes over this kernel, and fused attention on a CPU counts 0.
FLASH_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_attention_flops,
}


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
        backward: also count what needs the graph of a backward pass: what is unused, and
            `activations`. Without it nothing is computed: shapes alone pass through the model.

    Returns:
        parameters; of them `parameters_unused` (no gradient of the output reaches them) and
        `parameters_used`; `part_parameters`; `macs`, multiply-adds of matrix products and
        convolutions for one image (half of what torch.utils.flop_counter counts); `activations`.

    Raises:
        HovitError: if the model has no such part.
    """
    if backward:
        net = create_model(model, num_classes, image_size, **args)
        counted = _count_training(net, image_size)
    else:
        with fake_model(model, args, num_classes, image_size) as net:
            counted = {"macs": macs(net, image_size)}
    total = sum(p.numel() for p in net.parameters())
    result = {"parameters": total} | counted
    if part is not None:
        try:
            module = net.get_submodule(part)
        except AttributeError:
            raise HovitError(f"model {model} has no part {part!r}") from None
        result["part_parameters"] = sum(p.numel() for p in module.parameters())
    return result


@contextmanager
def fake_model(
    model: str, args: dict[str, Any], num_classes: int, image_size: int | None
) -> Iterator[Any]:
    """Yield a model of fake tensors: only shapes pass through it, and nothing is computed."""
    with torch.device("meta"):
        net = create_model(model, num_classes, image_size, **args)
    # Fake tensors of the CPU, not of `meta`: autocast and type promotion need a real device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield net.to_empty(device="cpu")


def macs(net: nn.Module, image_size: int | None) -> int:
    """Multiply-adds for one image of `image_size` pixels a side."""
    training = net.training
    net.eval()
    device = next(net.parameters(), torch.empty(0)).device
    inputs = [x.to(device) for x in example_inputs(net, 1, image_size)]
    with _counter() as counter, torch.no_grad():
        net(*inputs)
    net.train(training)
    return counter.get_total_flops() // 2


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FLASH_ON_CPU)


def _count_training(net: nn.Module, image_size: int | None) -> dict[str, int]:
    """Multiply-adds, unused parameters and activations, by one forward pass of one image.

    Activations are the bytes that autograd saves for the backward pass in float32 besides
    parameters and the input, each storage once. On real tensors, because which attention kernel
    runs, and so what it saves, depends on strides that fake tensors do not reproduce.
    """
    net.eval()  # a batch of one has no statistics
    inputs = example_inputs(net, 1, image_size)
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), *inputs)}
    saved: dict[int, int] = {}
    held = []  # a storage that is freed could lend its address to another

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        # A graph that saves its own tensors is never freed, nor are the weights.
        return tensor.detach()

    with _counter() as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = net(*(x.requires_grad_() for x in inputs))
    reached = _leaves(output)
    total = sum(p.numel() for p in net.parameters())
    used = sum(p.numel() for p in net.parameters() if id(p) in reached)
    return {
        "macs": counter.get_total_flops() // 2,
        "parameters_unused": total - used,
        "parameters_used": used,
        "activations": sum(saved.values()),
    }


def _leaves(output: Tensor) -> set[int]:
    """ids of the tensors to which backward would give a gradient of `output`."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found
