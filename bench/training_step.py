"""Time of a training step on a CPU, relative to PyTorch's defaults.

- fp32: `crop_flip` gives channels_last images; `grid_sample`, which it uses, gives contiguous ones.
- bf16: PyTorch's autocast computes convolutions and matrix products in bfloat16; `CPUAutocast`
  computes those in float32 that are slow in bfloat16.

Steps of the four kinds alternate in one process, and a ratio compares two adjacent steps, so a slow
phase of the machine affects both. Images are channels_last in bf16. The weights are contiguous, as
in training.

Finding (AMD EPYC with AVX512-BF16, 1 thread, n = 7, quartiles within 0.02 of the median):
channels_last takes 0.91 of the time for ResNet50, 0.84 (M0) and 0.87 (M5) for EfficientViT, 0.94
for HoViT, 0.73 for EfficientNet-Lite0, 1.00 for a ViT. `CPUAutocast` takes 0.52 for
EfficientNet-Lite0, 0.70 for L_LeViT behind it, 0.78 (M0) and 0.81 (M5) for EfficientViT, and 1.00
for models without depthwise convolutions.

Finding (AMD EPYC with AVX2, without AVX512, 1 thread, n = 3, quartiles within 0.01 of the median):
`CPUAutocast` takes 0.09 for EfficientNet-Lite0, 0.11 for L_LeViT behind it, 0.12 for
EfficientViT-M0 and 0.13 for HoViT. No GPU has been measured.

    python bench/training_step.py
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import hovit.models  # noqa: F401 (registers)
from hovit.measure.latency import summary
from hovit.training.classification import training_loss
from hovit.training.precision import CPUAutocast
from hovit.utils.create_model import create_model
from hovit.utils.device import describe_device, keep_freed_memory, set_threads

CLASSES = 37
LITE0 = {"front": "tf_efficientnet_lite0"}
SETTINGS: tuple[tuple[str, dict[str, Any], int, int], ...] = (  # ..., pixels, images of a batch
    ("resnet50", {}, 64, 32),
    ("efficientvit_m0", {}, 64, 32),
    ("efficientvit_m5", {}, 224, 8),
    ("hovit", {}, 224, 8),
    ("vit_tiny_patch16_224", {}, 64, 32),
    ("front_linear", LITE0, 224, 8),
    ("l_levit_deck", LITE0, 224, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [name for name, *_ in SETTINGS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if min(options.threads, options.rounds) < 1:
        parser.error("--threads and --rounds: 1 at least")
    keep_freed_memory()  # as `hovit train` does
    set_threads(options.threads)
    print(f"{describe_device(torch.device('cpu'))}; torch {torch.__version__}; seconds of CPU time")
    for name, args, pixels, batch in SETTINGS:
        if name not in options.models:
            continue
        model = create_model(name, CLASSES, pixels, **args).train()
        times = time_steps(model, pixels, batch, options.rounds)
        print(f"{name}, {pixels} px, batch {batch}:", flush=True)
        report("fp32, channels_last", times[1], "contiguous", times[0])
        report("bf16, CPUAutocast", times[3], "torch.autocast", times[2])


def report(name: str, times: list[float], other_name: str, others: list[float]) -> None:
    ratio = summary([a / b for a, b in zip(times, others, strict=True)])
    print(
        f"  {name}: {summary(times)['median']:.3f} s, {other_name}: "
        f"{summary(others)['median']:.3f} s, ratio {ratio['median']:.2f} "
        f"(quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}, n = {ratio['n']})",
        flush=True,
    )


def time_steps(model: Any, pixels: int, batch: int, rounds: int) -> list[list[float]]:
    """Seconds of each step: fp32 contiguous, fp32 channels_last, bf16, bf16 by CPUAutocast."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    labels = torch.arange(batch) % CLASSES
    contiguous = torch.randn(batch, 3, pixels, pixels)
    images = contiguous.contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(rounds + 1):
        times.append(
            [
                step(model, optimizer, contiguous, labels, nullcontext()),
                step(model, optimizer, images, labels, nullcontext()),
                step(model, optimizer, images, labels, torch.autocast("cpu", torch.bfloat16)),
                step(model, optimizer, images, labels, CPUAutocast().forward_context()),
            ]
        )
    return [list(kind) for kind in zip(*times[1:], strict=True)]  # the first round warms up


def step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: AbstractContextManager[Any],
) -> float:
    """Do one training step; CPU seconds."""
    start = time.process_time()
    with precision:
        logits = model(images).float()
    training_loss(logits, labels, 0.0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


if __name__ == "__main__":
    main()
