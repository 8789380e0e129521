"""Interleaved latency: each round times every model once, so that drift affects all models alike.

Protocol: evaluation mode, inputs on the device, warm-up, then rounds. PROTOCOLS names its versions.

On a GPU a sample is the mean of as many passes as take MIN_SAMPLE_MS between two CUDA events, and
each model warms up for MIN_WARM_UP_S: single passes measure clocks that are not up, and gaps in
which the device waits for Python. A pass is also timed as a CUDA graph (`CapturedPass`): what the
device needs without Python.

A CPU is timed one pass at a time with a monotonic clock, a fixed number of threads, and a process
that keeps the memory it frees (`keep_freed_memory`). Ratios between models move by up to 15 % from
process to process, so a scale may ask for several (`pipeline/timing_process.py`).

The protocol of the EfficientViT paper is the `on_gpu` of a study.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.errors import HovitError
from ..utils.graphs import GraphedCallable

Samples = dict[str, dict[str, list[float]]]  # model -> batch -> milliseconds
Timer = Callable[..., float]  # (model, *inputs) -> milliseconds of one pass
# Version of the protocol by device, as records state it. Records without one are older: on a GPU
# a sample was a single pass, after a few passes of warm-up.
PROTOCOLS = {"cuda": "cuda-events-10ms", "cpu": "cpu-clock"}
MIN_SAMPLE_MS = 10.0
MIN_WARM_UP_S = 0.3
CAPTURED = " captured"  # ends the key of a batch that is replayed as a CUDA graph


def example_inputs(model: Any, batch: int, image_size: int | None) -> tuple[Tensor, ...]:
    """Random images [B, 3, size, size], or the result of the model's own `example_inputs`."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs(batch)
    assert image_size is not None
    return (torch.randn(batch, 3, image_size, image_size),)


def timed(call: Callable[..., object], *inputs: Tensor) -> float:
    """Milliseconds of one call: on a CPU of a single one, on a GPU the mean of MIN_SAMPLE_MS."""
    if inputs[0].device.type != "cuda":
        begin = time.perf_counter()
        call(*inputs)
        return (time.perf_counter() - begin) * 1e3
    passes = 1
    while (total := _between_events(call, inputs, passes)) < MIN_SAMPLE_MS:
        passes = max(passes + 1, math.ceil(1.1 * passes * MIN_SAMPLE_MS / max(total, 1e-3)))
    return total / passes


def _between_events(call: Callable[..., object], inputs: tuple[Tensor, ...], passes: int) -> float:
    """Milliseconds of `passes` calls in a row on a GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(passes):
        call(*inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def forward_pass(model: nn.Module) -> Callable[..., object]:
    """A forward pass without gradients."""

    def call(*inputs: Tensor) -> object:
        with torch.inference_mode():
            return model(*inputs)

    return call


def half_precision_pass(model: nn.Module) -> Callable[..., object]:
    """A forward pass in float16, by autocast (weights are cast on use)."""

    def call(*inputs: Tensor) -> object:
        with torch.inference_mode(), torch.autocast(inputs[0].device.type, torch.float16):
            return model(*inputs)

    return call


def gradients_pass(model: nn.Module) -> Callable[..., object]:
    """A forward pass and the gradients of the summed output, in training mode."""
    model.train()
    parameters = list(model.parameters())

    def call(*inputs: Tensor) -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(model(*leaves).sum(), [*leaves, *parameters], allow_unused=True)

    return call


def forward_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of one forward pass."""
    return timed(forward_pass(model), *inputs)


def half_precision_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of one forward pass in float16."""
    return timed(half_precision_pass(model), *inputs)


def gradients_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of a forward pass and of the gradients of the summed output."""
    return timed(gradients_pass(model), *inputs)


PASSES = {
    forward_ms: forward_pass,
    half_precision_ms: half_precision_pass,
    gradients_ms: gradients_pass,
}


class CapturedPass:
    """Times passes replayed as a CUDA graph.

    Args:
        make_pass: as `forward_pass`: the pass of a model.
    """

    def __init__(self, make_pass: Callable[[nn.Module], Callable[..., object]]) -> None:
        self.make_pass = make_pass
        self.graphs: dict[int, GraphedCallable] = {}  # by id of the model

    def prepare(self, model: nn.Module, *inputs: Tensor) -> bool:
        """Capture the pass for these inputs; False if it cannot be captured."""
        if id(model) not in self.graphs:
            self.graphs[id(model)] = GraphedCallable(self.make_pass(model))
        return self.graphs[id(model)].prepare(*inputs)

    def __call__(self, model: nn.Module, *inputs: Tensor) -> float:
        """Milliseconds of one replay, after `prepare`."""
        return timed(self.graphs[id(model)].replay, *inputs)


class TrainingStep:
    """Times whole optimizer steps: forward, cross-entropy, backward, AdamW, zero_grad."""

    def __init__(self) -> None:
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def __call__(self, model: Any, x: Tensor) -> float:
        """Milliseconds of one step on images x [B, 3, H, W] with random labels."""
        if id(model) not in self.optimizers:
            self.optimizers[id(model)] = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model.train()
        labels = torch.randint(model.num_classes, x.shape[:1]).to(x.device)

        def step(x: Tensor) -> None:
            torch.nn.functional.cross_entropy(model(x), labels).backward()
            self.optimizers[id(model)].step()
            self.optimizers[id(model)].zero_grad()

        return timed(step, x)


def measure_latency(
    models: Mapping[str, nn.Module],
    device: torch.device,
    *,
    image_size: int | Mapping[str, int | None] | None,
    batches: tuple[int, ...],
    rounds: int,
    warmup: int,
    samples: Samples | None = None,
    timer: Timer = forward_ms,
    captured: CapturedPass | None = None,
    peaks: dict[str, dict[str, float]] | None = None,
    after_round: Callable[[Samples], None] = lambda _: None,
) -> Samples:
    """Time every model at every batch size `rounds` times; each round covers all pairs.

    The order within a round is shuffled, so that a model does not always follow the same one.

    Args:
        models: name -> model; moved to the device and set to evaluation mode.
        device: device to time on.
        image_size: pixels per side, for all models or by name.
        batches: batch sizes.
        rounds: samples per model and batch.
        warmup: untimed samples per model and batch before the rounds, at least; on a GPU they also
            take MIN_WARM_UP_S.
        samples: samples of an interrupted call; the missing rounds are added.
        timer: returns milliseconds of one pass.
        captured: also time passes as CUDA graphs, where they can be captured.
        peaks: filled on a GPU: model -> batch -> peak memory in MB of weights, inputs and a pass.
        after_round: called with the samples so far.

    Returns:
        Milliseconds: model -> batch -> one number per round; a captured pass: `BATCH captured`.

    Raises:
        HovitError: if the memory of the GPU is too small.
    """
    sizes = image_size if isinstance(image_size, Mapping) else dict.fromkeys(models, image_size)
    for model in models.values():
        model.to(device).eval()
    inputs = Inputs(models, sizes, device)
    timers: dict[tuple[str, str], tuple[Timer, int]] = {}

    def time_pass(name: str, key: str) -> float:
        time_one, batch = timers[name, key]
        with _one_line_if_full(name, batch):
            return time_one(models[name], *inputs.get(name, batch))

    for name in models:
        for b in batches:
            timers[name, str(b)] = timer, b
            with _peak_memory(models[name], inputs.get(name, b), peaks, name, b):
                _warm_up(partial(time_pass, name, str(b)), warmup, device)
            with _one_line_if_full(name, b):
                if captured and captured.prepare(models[name], *inputs.get(name, b)):
                    timers[name, f"{b}{CAPTURED}"] = captured, b
    samples = samples or {}
    for name, key in timers:
        samples.setdefault(name, {}).setdefault(key, [])
    done = min(len(samples[name][key]) for name, key in timers)
    for r in range(done, rounds):
        for name, key in random.Random(r).sample(list(timers), len(timers)):
            samples[name][key].append(time_pass(name, key))
        after_round(samples)
    return samples


def _warm_up(call: Callable[[], float], passes: int, device: torch.device) -> None:
    """Call `passes` times, and on a GPU for MIN_WARM_UP_S."""
    least = MIN_WARM_UP_S if device.type == "cuda" else 0.0
    begin, done = time.monotonic(), 0
    while done < passes or time.monotonic() - begin < least:
        call()
        done += 1


@contextmanager
def _one_line_if_full(name: str, batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise HovitError(
            f"{name} at batch {batch}: the GPU memory is too small; measure on a larger GPU, or "
            "give the study smaller batches"
        ) from None


@contextmanager
def _peak_memory(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    peaks: dict[str, dict[str, float]] | None,
    name: str,
    batch: int,
) -> Iterator[None]:
    """Note the peak memory of the passes within: of this model alone, others are on the GPU too."""
    device = inputs[0].device
    if peaks is None or device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    own = sum(x.nbytes for x in (*model.parameters(), *model.buffers(), *inputs))
    peak = torch.cuda.max_memory_allocated(device) - before + own
    peaks.setdefault(name, {})[str(batch)] = round(peak / 1e6, 1)


class Inputs:
    """Example inputs on the device, shared by models of the same image size."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        sizes: Mapping[str, int | None],
        device: torch.device,
    ) -> None:
        self.models, self.sizes, self.device = models, sizes, device
        self.made: dict[tuple[object, int], tuple[Tensor, ...]] = {}

    def get(self, name: str, batch: int) -> tuple[Tensor, ...]:
        """Inputs of a model at a batch size."""
        has_own = hasattr(self.models[name], "example_inputs")
        key = (name if has_own else self.sizes[name], batch)
        if key not in self.made:
            inputs = example_inputs(self.models[name], batch, self.sizes[name])
            self.made[key] = tuple(x.to(self.device) for x in inputs)
        return self.made[key]


def summary(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and number of samples."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": round(float(median), 4),
        "q1": round(float(low), 4),
        "q3": round(float(high), 4),
        "n": len(values),
    }
