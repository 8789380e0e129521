"""Time of a training step on channels_last images, relative to contiguous images.

`crop_flip` gives channels_last; `grid_sample`, which it uses, gives contiguous images. Steps
alternate between the two formats in one process, and a ratio compares two adjacent steps, so a slow
phase of the machine affects both. The weights are contiguous, as in training.

Finding (AMD EPYC, 1 thread, fp32, n = 11): ResNet50 0.90, EfficientViT-M0 0.84, M5 0.87, HoViT
0.94, ViT-Ti 1.00. No GPU has been measured.

    python bench/memory_format.py
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import hovit.models  # noqa: F401 (registers)
from hovit.measure.latency import summary
from hovit.training.classification import training_loss
from hovit.utils.create_model import create_model
from hovit.utils.device import describe_device, keep_freed_memory, set_threads

CLASSES = 37
SETTINGS = (  # model, pixels, images of a batch
    ("resnet50", 64, 32),
    ("efficientvit_m0", 64, 32),
    ("efficientvit_m5", 224, 8),
    ("hovit", 224, 8),
    ("vit_tiny_patch16_224", 64, 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if min(options.threads, options.rounds) < 1:
        parser.error("--threads and --rounds: 1 at least")
    keep_freed_memory()  # as `hovit train` does
    set_threads(options.threads)
    cpu = describe_device(torch.device("cpu")).name
    print(f"{cpu}, {options.threads} threads, torch {torch.__version__}, fp32; seconds of CPU time")
    for name, pixels, batch in SETTINGS:
        contiguous, ratios = time_steps(name, pixels, batch, options.rounds)
        seconds, ratio = summary(contiguous), summary(ratios)
        print(
            f"{name}, {pixels} px, batch {batch}: contiguous {seconds['median']:.3f} s, "
            f"channels_last {ratio['median']:.2f} times as long "
            f"(quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}, n = {ratio['n']})",
            flush=True,
        )


def time_steps(name: str, pixels: int, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of steps on contiguous images, and the ratios of channels_last to them."""
    model = create_model(name, CLASSES, pixels).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    labels = torch.arange(batch) % CLASSES
    contiguous = torch.randn(batch, 3, pixels, pixels)
    images = (contiguous, contiguous.contiguous(memory_format=torch.channels_last))
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        first, second = (step(model, optimizer, x, labels) for x in images)
        times.append((first, second))
    return [a for a, _ in times[1:]], [b / a for a, b in times[1:]]  # the first round warms up


def step(model: Any, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Do one training step; CPU seconds."""
    start = time.process_time()
    training_loss(model(images), labels, 0.0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


if __name__ == "__main__":
    main()
