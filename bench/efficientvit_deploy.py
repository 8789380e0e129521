"""Speed of each step of `hovit.models.deploy` on EfficientViT, against timm's fused model.

All forms of a model have the same weights, and their outputs are first compared with timm's (to
1e-4). Each round times all forms in random order. For each form, the script prints its speed over
that of timm's fused model in the same round (median of the ratios, quartiles, n):

    timm            timm's model without changes
    timm fused      the baseline: timm.utils.reparameterize_model
    timm fused cl   the baseline with weights and images in channels-last order
    folded          the model here: BatchNorm and identities folded, activations in place
    folded cl       the same in channels-last order
    deployed        the deploy form: 1 x 1 convolutions as linear layers, that on Q as a product
    ... compiled    after torch.compile (--compile)
    ... graph       on a GPU: a CUDA graph of the same kernels
    vit_base        on a GPU: ViT-B/16 without changes; users report that M0 is no faster at batch 1

A shared machine disturbs single rounds: use the median and its quartiles.

    python bench/efficientvit_deploy.py --model m0 --model m5 --rounds 30
    python bench/efficientvit_deploy.py --model m0 --batch 1 --compile
    python bench/efficientvit_deploy.py --model m0 --batch 1 --compile --accelerator cuda
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import hovit.models  # noqa: F401 (registers)
from hovit.measure.latency import summary
from hovit.models.deploy import deploy
from hovit.utils.device import describe_device, keep_freed_memory, pick_device
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

BASELINE = "timm fused"
TOLERANCE = 1e-4  # relative to the norm of the outputs
MADE_FASTER = (BASELINE, f"{BASELINE} cl", "folded", "deployed")  # also compiled and as CUDA graphs


@torch.no_grad()
def as_trained(model: nn.Module) -> nn.Module:
    """Random BN weights, and BN statistics of images, so that outputs depend on the image."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = None
    model.train()(torch.randn(16, 3, 224, 224))
    return model.eval()


def forms(size: str, device: torch.device) -> dict[str, nn.Module]:
    """All forms of a model with the same weights; names end in `cl` for channels-last."""
    torch.manual_seed(0)
    theirs = as_trained(timm.create_model(f"efficientvit_{size}")).to(device)
    ours = timm.create_model(f"efficientvit_paper_{size}").eval().to(device)
    ours.load_state_dict(theirs.state_dict())
    folded = [deploy(ours, parts=False) for _ in range(2)]
    fused = [reparameterize_model(theirs) for _ in range(2)]
    return {
        "timm": theirs,
        BASELINE: fused[0],
        f"{BASELINE} cl": fused[1].to(memory_format=torch.channels_last),
        "folded": folded[0].to(memory_format=torch.contiguous_format),
        "folded cl": folded[1],
        "deployed": deploy(ours),
    }


def graph(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture the kernels of a model on x as one CUDA graph; call it with the same x only."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # libraries choose kernels and allocate memory
            model(x)
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = model(x)

    def replay(_: Tensor) -> Tensor:
        captured.replay()
        return y

    return replay


def runner(
    name: str, model: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor
) -> Callable[[], Any]:
    """Function that runs one pass of a model, after a check of its outputs.

    Raises:
        HovitError: if the outputs differ from the expected ones.
    """
    error = float((model(x) - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise HovitError(f"{name}: outputs differ by {error:.2g} of their norm")
    return lambda: model(x)


def milliseconds(run: Callable[[], Any], passes: int, device: torch.device) -> float:
    """Wall time of one pass, as the mean of `passes` passes on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(passes):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begin) / passes


@torch.inference_mode()
def compare(size: str, batch: int, options: argparse.Namespace, device: torch.device) -> Any:
    """Milliseconds per pass and speed over the baseline, by form."""
    x = torch.randn(batch, 3, options.image_size, options.image_size, device=device)
    orders = {True: x.contiguous(memory_format=torch.channels_last), False: x}
    models: dict[str, Callable[[Tensor], Tensor]] = {**forms(size, device)}
    expected = models["timm"](x)
    for name in MADE_FASTER:
        if options.compile:
            models[f"{name} compiled"] = torch.compile(models[name])
        if device.type == "cuda":
            models[f"{name} graph"] = graph(models[name], orders[" cl" in name])
    runs = {name: runner(name, m, orders[" cl" in name], expected) for name, m in models.items()}
    if device.type == "cuda":
        vit = timm.create_model("vit_base_patch16_224", img_size=options.image_size)
        vit = vit.eval().to(device)
        runs["vit_base"] = lambda: vit(x)
    for run in runs.values():
        milliseconds(run, 3, device)  # warm-up
    passes = max(1, round(1e3 * options.seconds / milliseconds(runs[BASELINE], 3, device)))
    order, taken = random.Random(0), {name: list[float]() for name in runs}
    for _ in range(options.rounds):
        for name in order.sample(list(runs), len(runs)):
            taken[name].append(milliseconds(runs[name], passes, device))
    pairs = {name: zip(taken[BASELINE], times, strict=True) for name, times in taken.items()}
    return {
        name: {"milliseconds": summary(taken[name]), "speedup": summary([b / t for b, t in pair])}
        for name, pair in pairs.items()
    }


def above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Parser of an option that is a finite number above 0."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < math.inf:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} above 0")
        return value

    return read


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes, batches = [f"m{i}" for i in range(6)], [1, 16]
    parser.add_argument("--model", action="append", choices=sizes, help="model size; repeatable")
    parser.add_argument(
        "--batch", action="append", type=above_zero(int), help="repeatable (default 1 and 16)"
    )
    parser.add_argument(
        "--image-size", type=above_zero(int), default=224, help="pixels per side (default 224)"
    )
    parser.add_argument("--rounds", type=above_zero(int), default=15)
    parser.add_argument(
        "--seconds", type=above_zero(float), default=0.1, help="approximate time of one measurement"
    )
    parser.add_argument(
        "--threads", type=above_zero(int), default=1, help="CPU threads (default 1)"
    )
    parser.add_argument("--compile", action="store_true", help="also time compiled forms")
    parser.add_argument("--accelerator", default="cpu", help="auto, cpu (default) or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench/efficientvit_deploy.json"))
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = pick_device(options.accelerator)
    where = describe_device(device)
    print(
        f"{options.image_size} px, n = {options.rounds}, on {where.name}, {where.threads} threads"
    )
    found: dict[str, Any] = {}
    for size in options.model or sizes:
        for batch in options.batch or batches:
            torch.compiler.reset()
            found[f"{size} batch {batch}"] = rows = compare(size, batch, options, device)
            print(f"\n{size}, batch {batch}: speed over timm's fusion, milliseconds a pass")
            for name, row in rows.items():
                s = row["speedup"]
                quartiles = f"({s['q1']:.2f} to {s['q3']:.2f})"
                taken = row["milliseconds"]["median"]
                print(f"{name:24}{s['median']:6.2f}  {quartiles:16}{taken:9.2f}", flush=True)
    asked = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"options": asked, "device": where.model_dump(), "torch": torch.__version__}
    write_json(options.out, result | {"models": found})
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
