"""A CUDA graph for a CPU: records the operators of a function, and runs them again at a replay."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hovit.utils.graphs import SYNCHRONISING, GraphedCallable


class RecordedGraph(TorchDispatchMode):
    """Records the operators that run inside a `with` block, backward and optimizer included.

    As on a card, a replay runs no Python of the recorded function: it reads and writes the tensors
    of the recording. Python numbers and branches stay as they were, random operators draw new
    numbers from the default generator, and a tensor read from outside must keep its address. The
    recording itself also computes, unlike a capture, so that the first replay has nothing to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.fresh = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in SYNCHRONISING:
            raise RuntimeError(f"a graph cannot wait for the device: {func}")
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(outputs)))
        return outputs

    def replay(self) -> None:
        """Run the operators again, with their results in the tensors of the recording."""
        if self.fresh:
            self.fresh = False
            return
        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                for old, new in zip(recorded, _tensors(func(*args, **kwargs)), strict=True):
                    if new.data_ptr() != old.data_ptr():  # neither a view nor in place
                        old.copy_(new)


class RecordedCallable(GraphedCallable):
    """`GraphedCallable` with recorded graphs on a CPU."""

    def _capture(self, held: Any) -> bool:
        captured = super()._capture(held)
        if captured and held.graph is None:
            graph = RecordedGraph()
            with graph:
                outputs = self.fn(*held.inputs)
            held.outputs = tree_map(torch.Tensor.detach, outputs)
            held.graph = graph
        return captured


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def capture(fn: Callable[..., Any], *inputs: Tensor, warmup: int = 3) -> GraphedCallable:
    """Warm up and capture a function without side effects.

    Args:
        fn: the function.
        inputs: example inputs; the graph keeps copies of them, into which later calls copy theirs.
        warmup: eager calls before the capture.
    """
    graphed = GraphedCallable(fn, warmup)
    graphed.prepare(*inputs)
    return graphed
