"""Best block size, in scores, for Jaccard and Euclidean attention without gradients.

All block sizes run in turn on the same inputs. For each, the script prints its time over the time
of the whole batch in one block (median of the ratios in each round, quartiles, n). The models use
the size `hovit.attention.similarity.BLOCKS`.

    python bench/attention_blocks.py
    python bench/attention_blocks.py --tokens 49 --threads 1
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hovit.attention import similarity
from hovit.measure.latency import measure_latency, summary
from hovit.utils.device import describe_device, keep_freed_memory
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

FORMS = ("jaccard", "euclidean")
WHOLE = 63  # log2 of a size that no batch exceeds


class Blocks(nn.Module):
    """One attention form in blocks of 2^log2 scores."""

    def __init__(self, form: str, log2: int, tokens: int, heads: int = 4, dim: int = 64) -> None:
        super().__init__()
        self.form = form
        self.block = 2**log2
        self.shape = (heads, tokens, dim)

    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *self.shape) for _ in range(3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        similarity.BLOCKS["cpu"] = self.block
        return similarity.attention(self.form, q, k, v)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log2", type=int, nargs="+", default=[17, 18, 19, 20, 21, 22])
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/bench/attention_blocks.json"))
    options = parser.parse_args()
    if min(options.tokens, options.batch, options.rounds, options.threads, *options.log2) < 1:
        parser.error("--log2, --tokens, --batch, --rounds and --threads: 1 at least")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device("cpu")
    found = {}
    for form in FORMS:
        sizes = (WHOLE, *options.log2)
        samples = measure_latency(
            {str(log2): Blocks(form, log2, options.tokens) for log2 in sizes}, device,
            image_size=None, batches=(options.batch,), rounds=options.rounds, warmup=2,
        )  # fmt: skip
        times = {log2: np.array(samples[str(log2)][str(options.batch)]) for log2 in sizes}
        for log2 in options.log2:
            ratio = summary(list(times[log2] / times[WHOLE]))
            found[f"{form}, blocks of 2^{log2}"] = ratio
            print(
                f"{form}, blocks of 2^{log2}: {ratio['median']:.2f} of the whole's time "
                f"({ratio['q1']:.2f} to {ratio['q3']:.2f}, n = {ratio['n']})"
            )
    about = {
        "device": describe_device(device).model_dump(), "torch": torch.__version__,
        "tokens": options.tokens, "batch": options.batch,
    }  # fmt: skip
    write_json(options.out, about | {"over the whole batch at once": found})
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
