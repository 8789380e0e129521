"""Interleaved latency: each round times every model once, so that drift affects all models alike.

Protocol: evaluation mode, inputs on the device, warm-up, then rounds. A GPU is timed with CUDA
events. A CPU is timed with a monotonic clock, a fixed number of threads, and a process that keeps
the memory it frees (`keep_freed_memory`). The protocol of the EfficientViT paper is the `on_gpu` of
a study.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.errors import HovitError

Samples = dict[str, dict[str, list[float]]]  # model -> batch -> milliseconds


def example_inputs(model: Any, batch: int, image_size: int | None) -> tuple[Tensor, ...]:
    """Random images [B, 3, size, size], or the result of the model's own `example_inputs`."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs(batch)
    assert image_size is not None
    return (torch.randn(batch, 3, image_size, image_size),)


def forward_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of one forward pass."""
    with torch.inference_mode():
        return timed(model, *inputs)


def timed(call: Callable[..., object], *inputs: Tensor) -> float:
    """Milliseconds of one call, by CUDA events if the inputs are on a GPU."""
    if inputs[0].device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*inputs)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    call(*inputs)
    return (time.perf_counter() - begin) * 1e3


def gradients_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of a forward pass and of the gradients of the summed output."""
    model.train()
    wanted = [x.requires_grad_() for x in inputs] + list(model.parameters())

    def call(*inputs: Tensor) -> None:
        torch.autograd.grad(model(*inputs).sum(), wanted, allow_unused=True)

    return timed(call, *inputs)


def half_precision_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of one forward pass in float16, by autocast (weights are cast on use)."""
    with torch.autocast(inputs[0].device.type, torch.float16):
        return forward_ms(model, *inputs)


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
    timer: Callable[..., float] = forward_ms,
    after_round: Callable[[Samples], None] = lambda _: None,
) -> Samples:
    """Time every model at every batch size `rounds` times; each round covers all pairs.

    The order within a round is shuffled, so that a model does not always follow the same one.

    Args:
        models: name -> model; moved to the device and set to evaluation mode.
        device: device to time on.
        image_size: pixels per side, for all models or by name.
        batches: batch sizes.
        rounds: timed passes per model and batch.
        warmup: untimed passes per model and batch before the rounds.
        samples: samples of an interrupted call; the missing rounds are added.
        timer: returns milliseconds of one pass.
        after_round: called with the samples so far.

    Returns:
        Milliseconds: model -> batch -> one number per round.

    Raises:
        HovitError: if the memory of the GPU is too small.
    """
    samples = samples or {name: {str(b): [] for b in batches} for name in models}
    sizes = image_size if isinstance(image_size, Mapping) else dict.fromkeys(models, image_size)
    pairs = [(name, b) for name in models for b in batches]
    for model in models.values():
        model.to(device).eval()
    inputs = Inputs(models, sizes, device)

    def time_pass(name: str, batch: int) -> float:
        try:
            return timer(models[name], *inputs.get(name, batch))
        except torch.OutOfMemoryError:
            raise HovitError(
                f"{name} at batch {batch}: the card's memory is too small; measure on a larger "
                "one, or give the study smaller batches"
            ) from None

    for name, b in pairs:
        for _ in range(warmup):
            time_pass(name, b)
    done = min(len(samples[name][str(b)]) for name, b in pairs)
    for r in range(done, rounds):
        for name, b in random.Random(r).sample(pairs, len(pairs)):
            samples[name][str(b)].append(time_pass(name, b))
        after_round(samples)
    return samples


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
