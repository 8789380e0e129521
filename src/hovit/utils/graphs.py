"""Replay a call as a CUDA graph: one launch in place of one launch per kernel.

A small model at a small batch is bound by the time that Python and the driver need to launch its
kernels. A CUDA graph records the launches once and replays them together. Each replay reads and
writes the same addresses, so inputs are copied into static tensors, and outputs are static tensors
that the next replay overwrites.

    step = GraphedCallable(train_step)      # train_step(images, labels) -> loss
    for images, labels in loader:
        loss = step(images, labels)         # eager at first, then captured, then replayed
        losses.append(loss.clone())

On a CPU there are no graphs. The same class then calls the function, with the same static inputs
and outputs and the same `events`, so that code around it can be tested without a GPU. It also
refuses to capture a function that reads a value from the device (`.item()`, `nonzero`, a boolean
index), as CUDA does.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .errors import one_line

# Operators that make the host wait, because their result or its shape depends on values on the
# device. In inference mode a dispatch mode sees `item`, otherwise its `_local_scalar_dense`.
SYNCHRONISING = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}
    | {"unique_consecutive", "equal", "repeat_interleave.Tensor", "item", "is_nonzero"}
)
Signature = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class SyncLog(TorchDispatchMode):
    """Counts operators that make the host wait for the device (`SYNCHRONISING`).

    It also sees the operators of the backward pass. On a CPU it shows where a function would wait
    on a GPU, except for copies to the host (`.cpu()`, `.tolist()`), which a CPU does not need.

        with SyncLog() as log:
            model(x).sum().backward()
        assert not log.counts
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONISING or f"{name}.{func._overloadname}" in SYNCHRONISING:
            self.counts[name] += 1
        elif name in ("index", "index_put", "index_put_") and _has_boolean(*args[1:3]):
            self.counts["boolean index"] += 1
        return func(*args, **(kwargs or {}))


def _has_boolean(indices: Sequence[Tensor | None], values: Tensor | None = None) -> bool:
    """Whether the number of indexed elements depends on a mask. A single value only fills."""
    fills = values is not None and values.numel() == 1
    return not fills and any(i is not None and i.dtype is torch.bool for i in indices)


class _Captured:
    """One graph, or on a CPU its stand-in: static inputs and outputs for one signature."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = tuple(x.detach().clone() for x in inputs)
        self.calls = 0  # eager calls so far
        self.syncs: Counter[str] = Counter()  # operators or warnings of waits in those calls
        self.replayable = False
        self.graph: Any = None
        self.outputs: Any = None

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Copy inputs into the static ones."""
        for static, x in zip(self.inputs, inputs, strict=True):
            if static is not x:
                static.copy_(x, non_blocking=True)


class GraphedCallable:
    """A function of tensors that is captured as a CUDA graph after a few eager calls.

    Each call runs the function exactly once: `warmup` calls run eagerly on a side stream, the next
    call captures (without running anything) and replays, and all later calls replay. Warm-up calls
    of a training step are therefore ordinary steps, and nothing has to be undone.

    Inputs of another shape, dtype or device get their own graph, after their own warm-up. All
    graphs share a memory pool. A function that cannot be captured stays eager; `reason` then says
    why, and `on_fallback` is called with it once.

    A captured function runs in Python only during the capture, so it must not branch on values of
    tensors, count in Python, or read changing Python numbers (keep a learning rate in a tensor).
    It must contain `autocast` blocks as a whole. A training step starts with
    `zero_grad(set_to_none=True)`, so that gradients are in the memory of the graph. Random numbers
    come from the default generator of the device, or from `generators`; they differ in each replay,
    and `torch.manual_seed` before a replay has its usual effect.

    Args:
        fn: the function; takes tensors, returns any structure of tensors or None.
        warmup: eager calls before the capture, at least 1: libraries initialise themselves there.
        generators: CUDA generators that `fn` draws from, except for the default one.
        on_fallback: called with one line if `fn` cannot be captured.
        on_capture: called just before each capture, to clear what eager calls cached in Python.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        warmup: int = 3,
        generators: Sequence[torch.Generator] = (),
        on_fallback: Callable[[str], None] = lambda _: None,
        on_capture: Callable[[], None] = lambda: None,
    ) -> None:
        if warmup < 1:
            raise ValueError(f"warmup={warmup!r}: at least one eager call before the capture")
        self.fn = fn
        self.warmup = warmup
        self.generators = tuple(generators)
        self.on_fallback = on_fallback
        self.on_capture = on_capture
        self.events: list[tuple[str, int]] = []  # see `note`
        self.reason = ""  # why the function stays eager
        self._captured: dict[Signature, _Captured] = {}
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the function once. Its outputs are detached, and the next call overwrites them."""
        if self.reason:
            self.note("eager")
            return _detached(self.fn(*inputs))
        held = self._held(inputs)
        held.load(inputs)
        if held.calls < self.warmup:
            return _detached(self._run_eager(held))
        if not held.replayable and not self._capture(held):
            self.note("eager")
            return _detached(self.fn(*held.inputs))
        return self._replay(held)

    def prepare(self, *inputs: Tensor) -> bool:
        """Warm up and capture now; for functions without side effects.

        Returns:
            whether later calls replay a graph; if not, `reason` says why.
        """
        held = self._held(inputs)
        held.load(inputs)
        while held.calls < self.warmup:
            self._run_eager(held)
        return not self.reason and (held.replayable or self._capture(held))

    def replay(self, *inputs: Tensor) -> Any:
        """Replay the graph of these inputs without copying them: for timing, after `prepare`."""
        return self._replay(self._held(inputs))

    def reset(self) -> None:
        """Forget all graphs, for a function that changed; the next calls warm up again."""
        self._captured.clear()
        self._pool = None
        self.reason = ""

    def note(self, event: str) -> None:
        """Append to `events`, run-length encoded: [("eager", 3), ("capture", 1), ("replay", 9)]."""
        same = bool(self.events) and self.events[-1][0] == event
        count = self.events.pop()[1] if same else 0
        self.events.append((event, count + 1))

    def _held(self, inputs: Sequence[Tensor]) -> _Captured:
        signature = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if signature not in self._captured:
            self._captured[signature] = _Captured(inputs)
        return self._captured[signature]

    def _run_eager(self, held: _Captured) -> Any:
        held.calls += 1
        held.syncs.clear()  # the last call counts, because earlier ones may fill caches
        self.note("eager")
        if not _on_cuda(held.inputs):
            with SyncLog() as log:
                outputs = self.fn(*held.inputs)
            held.syncs += log.counts
            return outputs
        # Graphs cannot capture the default stream, and autograd remembers a parameter's stream.
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), _sync_warnings(held.syncs):
            outputs = self.fn(*held.inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _capture(self, held: _Captured) -> bool:
        """Capture the function. If that fails, store the reason and return False."""
        self.on_capture()
        try:
            if held.syncs:  # not tried: a capture that fails may break later random numbers
                raise RuntimeError(f"the host waits for the device: {', '.join(held.syncs)}")
            if _on_cuda(held.inputs):
                self._capture_cuda(held)
        except RuntimeError as error:
            first: BaseException = error  # the end of a failed capture raises another one
            while first.__context__ is not None:
                first = first.__context__
            self.reason = one_line(first)
            self._captured.clear()
            self.note("fallback")
            self.on_fallback(f"no CUDA graph: {self.reason}")
            return False
        held.replayable = True
        self.note("capture")
        return True

    def _capture_cuda(self, held: _Captured) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # A loader's thread may allocate or pin memory meanwhile: only this thread is restricted.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                held.outputs = _detached(self.fn(*held.inputs))
        except RuntimeError:
            held.outputs = None
            # The default generator stays in capture mode until another capture succeeds.
            with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device="cuda")
            raise
        held.graph = graph

    def _replay(self, held: _Captured) -> Any:
        self.note("replay")
        if held.graph is not None:
            held.graph.replay()
            return held.outputs
        outputs = _detached(self.fn(*held.inputs))  # a CPU, where nothing is recorded
        if held.outputs is None:
            held.outputs = outputs
            return outputs
        for static, new in zip(tree_leaves(held.outputs), tree_leaves(outputs), strict=True):
            if isinstance(static, Tensor):
                static.copy_(new)
        return held.outputs


@contextmanager
def _sync_warnings(syncs: Counter[str]) -> Iterator[None]:
    """Count the places where PyTorch waits for a GPU, and pass on other warnings."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for each in caught:
        if "synchronizing CUDA operation" in str(each.message):
            syncs[f"{Path(each.filename).name}, line {each.lineno}"] += 1
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _on_cuda(inputs: Sequence[Tensor]) -> bool:
    return any(x.is_cuda for x in inputs)


def _detached(outputs: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)
