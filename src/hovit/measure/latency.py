"""Latency, interleaved: every round times each model once, so that drift hits all alike.

The protocol (ours; that of EfficientViT's seed is a study's `on_gpu`): eval mode, inputs on the
device, warm-up, then rounds. CUDA events on a GPU; on a CPU a monotonic clock, with a fixed number
of threads, in a process that keeps the memory it frees (`keep_freed_memory`).
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
    """What a model takes: images [B, 3, size, size], or what its own `example_inputs` gives."""
    if hasattr(model, "example_inputs"):
        return model.example_inputs(batch)
    assert image_size is not None
    return (torch.randn(batch, 3, image_size, image_size),)


def forward_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of one forward pass."""
    with torch.inference_mode():
        return timed(model, *inputs)


def timed(call: Callable[..., object], *inputs: Tensor) -> float:
    """Milliseconds of one call: by CUDA events where the inputs are on a card."""
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
    """Milliseconds of a forward pass and of all gradients of its outputs' sum."""
    model.train()
    wanted = [x.requires_grad_() for x in inputs] + list(model.parameters())

    def call(*inputs: Tensor) -> None:
        torch.autograd.grad(model(*inputs).sum(), wanted, allow_unused=True)

    return timed(call, *inputs)


def half_precision_ms(model: nn.Module, *inputs: Tensor) -> float:
    """Milliseconds of one forward pass in float16, by autocast: weights are cast on use."""
    with torch.autocast(inputs[0].device.type, torch.float16):
        return forward_ms(model, *inputs)


class TrainingStep:
    """Times whole optimiser steps: forward, cross-entropy, backward, AdamW, gradients cleared."""

    def __init__(self) -> None:
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def __call__(self, model: Any, x: Tensor) -> float:
        """Milliseconds of one step on images x [B, 3, H, W] of random labels."""
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
    """Time every model, at every batch size, `rounds` times; each round goes over all of them.

    The order inside a round is shuffled, so no model always follows the same one.

    Args:
        models: name -> model; they are put on the device in eval mode.
        device: where.
        image_size: pixels a side, for all models or for each.
        batches: batch sizes.
        rounds: timed passes for each model and batch.
        warmup: untimed passes before, for each model and batch.
        samples: what an interrupted call has already; rounds are added up to `rounds`.
        timer: gives milliseconds of one pass.
        after_round: told of the samples so far.

    Returns:
        milliseconds: model -> batch -> one number a round.
    """
    samples = samples or {name: {str(b): [] for b in batches} for name in models}
    sizes = image_size if isinstance(image_size, Mapping) else dict.fromkeys(models, image_size)
    jobs = [(name, b) for name in models for b in batches]
    for model in models.values():
        model.to(device).eval()

    inputs: dict[object, tuple[Tensor, ...]] = {}

    def once(name: str, batch: int) -> float:
        own = hasattr(models[name], "example_inputs")
        key = (name if own else sizes[name], batch)  # models of one size see the same images
        if key not in inputs:
            some = example_inputs(models[name], batch, sizes[name])
            inputs[key] = tuple(x.to(device) for x in some)
        try:
            return timer(models[name], *inputs[key])
        except torch.OutOfMemoryError:
            raise HovitError(
                f"{name} at batch {batch}: the card's memory is too small; measure on a larger "
                "one, or give the study smaller batches"
            ) from None

    for name, b in jobs:
        for _ in range(warmup):
            once(name, b)
    done = min(len(samples[name][str(b)]) for name, b in jobs)
    for r in range(done, rounds):
        for name, b in random.Random(r).sample(jobs, len(jobs)):
            samples[name][str(b)].append(once(name, b))
        after_round(samples)
    return samples


def summary(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and n of some milliseconds."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": round(float(median), 4),
        "q1": round(float(low), 4),
        "q3": round(float(high), 4),
        "n": len(values),
    }
