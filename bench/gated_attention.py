"""Speed-up of gated attention in chunks over the recurrence, and its upper bound.

Three computations run in turn on the same inputs: the recurrence, the chunks and, as a bound, only
the matrix products of the chunks. For the last two, the script prints the speed-up over the
recurrence (median of the ratios in each round, quartiles, n).

These changes to the chunks gave no speed-up (AMD EPYC, 2 threads, fp32): longer chunks, cumulative
sums as products with a triangular matrix, in-place passes. Processing a few images at a time is not
used: at batch 32 it is faster on one thread and slower on two.

    python bench/gated_attention.py
    python bench/gated_attention.py --batches 1 --tokens 196 4096 --accelerator cuda
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hovit.attention.linear import CHUNK, gated_chunks, gated_recurrence
from hovit.measure.latency import measure_latency, summary
from hovit.utils.device import describe_device, keep_freed_memory, pick_device
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json


class Scan(nn.Module):
    """Base class: inputs of the scan for a batch of images."""

    def __init__(self, tokens: int, heads: int = 4, dim: int = 64) -> None:
        super().__init__()
        self.shape = (heads, tokens, dim)

    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        q, k, v = (torch.randn(batch, *self.shape) for _ in range(3))
        gates = (-0.1 * torch.rand(batch, *self.shape) for _ in range(2))
        return q, k, v, *gates


class Recurrence(Scan):
    def forward(self, *inputs: Tensor) -> Tensor:
        return gated_recurrence(*inputs)


class Chunks(Scan):
    def forward(self, *inputs: Tensor) -> Tensor:
        q, k, v, log_alpha, log_beta = inputs
        return gated_chunks(q, k, v, log_alpha, log_beta)


class Products(Scan):
    """The four matrix products of the chunks: q k^T, its product with v, k^T v, and q S."""

    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        heads, tokens, dim = self.shape
        count = -(-tokens // CHUNK)
        chunk = -(-tokens // count)
        each = batch * heads * count
        state = torch.randn(each, dim, dim)
        return (*(torch.randn(each, chunk, dim) for _ in range(3)), state)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return q @ k.mT @ v, k.mT @ v, q @ state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[196])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu", help="auto, cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench/gated_attention.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = pick_device(options.accelerator)
    scans = (Recurrence, Chunks, Products)
    found = {}
    for tokens in options.tokens:
        samples = measure_latency(
            {scan.__name__: scan(tokens) for scan in scans}, device, image_size=None,
            batches=tuple(options.batches), rounds=options.rounds, warmup=2,
        )  # fmt: skip
        for batch in map(str, options.batches):
            base = np.array(samples["Recurrence"][batch])
            ratios = {
                scan.__name__: summary(list(base / np.array(samples[scan.__name__][batch])))
                for scan in scans[1:]
            }
            found[f"{tokens} tokens, batch {batch}"] = ratios
            for name, ratio in ratios.items():
                print(
                    f"{tokens} tokens, batch {batch}: {name} {ratio['median']:.1f} times as fast "
                    f"({ratio['q1']:.1f} to {ratio['q3']:.1f}, n = {ratio['n']})"
                )
    about = {"device": describe_device(device).model_dump(), "torch": torch.__version__}
    write_json(options.out, about | {"recurrence over": found})
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
