"""Implementations of Jaccard and Euclidean attention, compared with PyTorch's fused dot product.

Three implementations run in turn on the same inputs: `chosen`, the one that `hovit.attention` uses
on the device (FlexAttention on a GPU, blocks on a CPU); `plain`, two matrix products with
elementwise passes between them; and `compiled`, the plain one with `torch.compile`. For each, the
script prints its time over that of `scaled_dot_product_attention` (median of the ratios in each
round, quartiles, n). On a GPU, each is also timed as a CUDA graph.

    python bench/attention_kernels.py
    python bench/attention_kernels.py --accelerator cuda --gradients --precision bfloat16
    python bench/attention_kernels.py --shape 64x6x49x64 --forms jaccard
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hovit.attention import similarity
from hovit.measure.latency import (
    PASSES,
    CapturedPass,
    forward_ms,
    gradients_ms,
    measure_latency,
    summary,
)
from hovit.utils.device import describe_device, keep_freed_memory, pick_device
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

SHAPES = ("1x4x196x64", "32x4x196x64", "64x3x49x32", "2048x3x49x32")  # batch, heads, tokens, width
Compute = Callable[..., Tensor]


class Attention(nn.Module):
    """Attention on q, k and v of one shape and precision, computed by `compute`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, compute: Compute) -> None:
        super().__init__()
        self.shape, self.dtype, self.compute = shape, dtype, compute

    def example_inputs(self, batch: int) -> tuple[Tensor, ...]:
        """The shape holds the batch, so that a window counts as an image."""
        generator = torch.Generator().manual_seed(batch)
        draw = (torch.randn(self.shape, generator=generator) for _ in range(3))
        return tuple(x.to(self.dtype) for x in draw)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.compute(q, k, v)


def computations(form: str, compiled: bool) -> dict[str, Compute]:
    """Name -> function of q, k and v."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return similarity.attention(form, q, k, v, plain=True)

    found: dict[str, Compute] = {
        "chosen": lambda q, k, v: similarity.attention(form, q, k, v),
        "plain": plain,
    }
    return found | ({"compiled": torch.compile(plain, dynamic=False)} if compiled else {})


def measure(
    shape: tuple[int, ...], options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, object]]:
    """Form and computation -> its time over the dot product's."""
    dtype = getattr(torch, options.precision)
    models = {"dot": Attention(shape, dtype, lambda q, k, v: similarity.attention("dot", q, k, v))}
    for form in options.forms:
        for name, compute in computations(form, not options.no_compile).items():
            models[f"{form}, {name}"] = Attention(shape, dtype, compute)
    timer = gradients_ms if options.gradients else forward_ms
    samples = measure_latency(
        models, device, image_size=None, batches=(1,), rounds=options.rounds, warmup=2,
        timer=timer, captured=CapturedPass(PASSES[timer]) if device.type == "cuda" else None,
    )  # fmt: skip
    found: dict[str, dict[str, object]] = {}
    for name in models:
        for key, ms in samples[name].items():
            if name != "dot" and key in samples["dot"]:
                ratio = np.array(ms) / np.array(samples["dot"][key])
                label = name + key.removeprefix("1").replace(" ", ", ")
                found[label] = summary(list(ratio)) | {"dot_ms": summary(samples["dot"][key])}
    return found


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: BATCHxHEADSxTOKENSxWIDTH, as 32x4x196x64")
    return tuple(map(int, text.split("x")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=_shape, nargs="+", default=[_shape(x) for x in SHAPES])
    parser.add_argument("--forms", nargs="+", choices=("jaccard", "euclidean"),
                        default=["jaccard", "euclidean"])  # fmt: skip
    parser.add_argument("--gradients", action="store_true", help="also the gradients of q, k and v")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"),
                        default="float32")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="leave out `compiled`")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu", help="auto, cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench/attention_kernels.json"))
    options = parser.parse_args()
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads: 1 at least")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    keep_freed_memory()
    device = pick_device(options.accelerator)
    results = {}
    for shape in options.shape:
        title = "x".join(map(str, shape))
        results[title] = measure(shape, options, device)
        for name, ratio in results[title].items():
            print(
                f"{title}: {name}: {ratio['median']:.2f} of the dot product's time "
                f"({ratio['q1']:.2f} to {ratio['q3']:.2f}, n = {ratio['n']})"
            )
    about = {
        "device": describe_device(device).model_dump(), "torch": torch.__version__,
        "precision": options.precision, "gradients": options.gradients,
    }  # fmt: skip
    write_json(options.out, about | {"over scaled_dot_product_attention": results})
    print(f"written to {options.out}")


if __name__ == "__main__":
    warnings.filterwarnings("once", ".*does not compile")
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
