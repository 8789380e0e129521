"""Training speed of SkipViT and timm's ViT: the share of saved computation that becomes speed.

One step is forward, cross-entropy, backward and AdamW on synthetic images on the device. Each
schedule of Table 1 of the poster alternates with the baseline, timm's ViT of the same shape, step
by step and in alternating order. For each schedule, the script prints the speed-up implied by the
floating-point operations (`torch.utils.flop_counter`, forward and backward), the measured speed-up
(median of the ratios of the pairs, quartiles, n), the measured share of the implied gain, and the
poster's speed-up (Ascend 910A, ViT-S). A shared machine disturbs single steps: use the median and
its quartiles.

Findings (ViT-Ti/16, batch 64, fp32, AMD EPYC, 2 threads):

- Tokens are dropped and returned as whole rows (`index_select`, `index_copy`), which is two to
  three times as fast as `gather` and `scatter` over every element, in both directions.
- Ranking computes only the scores of the class token, in addition to the fused kernel, in place of
  all N x N scores.
- The measured speed-up exceeds the implied one if the allocator maps large activations again in
  every step: with 6(55%)+11, a step takes 319,000 page faults in the baseline and 123,000 in
  SkipViT. With `MALLOC_MMAP_MAX_=0` neither has page faults, and the measured speed-up is 1.269 for
  an implied 1.272 (without: 1.301; n = 7 rounds, a busy machine). This script therefore keeps freed
  memory.

    python bench/skipvit.py --model tiny --rounds 15
    python bench/skipvit.py --model small --batch 256 --precision bf16-mixed --compile --steps 20
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hovit.models  # noqa: F401 (registers)
from hovit.measure.latency import summary
from hovit.models.schedule import Schedule
from hovit.utils.device import describe_device, keep_freed_memory, pick_device
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

POSTER = {  # Table 1: throughput gained over ViT-S's 4,503 images/s, in percent
    "6(45%)+fused": 10.23,
    "4,7(30%,30%)+10": 13.1,
    "4,7(30%,30%)+11": 16.09,
    "6,8(35%,35%)+10": 4.62,
    "6,8(35%,35%)+11": 7.45,
    "6(45%)+11": 9.8,
    "6(50%)+11": 11.51,
    "6(55%)+11": 13.23,
}
DEPTH = 12  # layers of tiny, small and base alike
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def trainer(model: nn.Module, x: Tensor, y: Tensor, precision: str) -> Callable[[], None]:
    """Function that runs one training step of a model."""
    dtype = AUTOCAST[precision]
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype is torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def step() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Wall time of `steps` steps, until the device has finished them."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return time.perf_counter() - begin


def build(options: argparse.Namespace, schedule: str | None) -> nn.Module:
    """SkipViT with a schedule, or timm's ViT if it is None; all have the same weights."""
    torch.manual_seed(0)
    name = f"vit_{options.model}_patch{options.patch}_224"
    size: dict[str, Any] = {"img_size": options.image_size}
    if schedule is not None:
        name, size["schedule"] = f"skip{name}", schedule
    return timm.create_model(name, **size).train()


def check(schedules: list[str], options: argparse.Namespace) -> None:
    """Check that every schedule drops tokens.

    Raises:
        HovitError: if one is invalid or drops none.
    """
    patches = (options.image_size // options.patch) ** 2
    for text in schedules:
        try:
            kept = Schedule.parse(text, DEPTH).kept(patches)
        except ValueError as error:
            raise HovitError(f"--schedule: {error}") from None
        if min(kept, default=patches) == patches:
            raise HovitError(f"--schedule {text!r}: drops none of {patches} patches; drop more")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=["tiny", "small", "base"])
    parser.add_argument("--patch", type=int, default=16, choices=[8, 16])
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side (default 224)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of each schedule (default 9)")
    parser.add_argument("--steps", type=int, default=1, help="steps per measurement (default 1)")
    parser.add_argument(
        "--schedule", action="append", help="repeatable (default: the poster's schedules)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--precision", default="32-true", choices=list(AUTOCAST))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench/skipvit.json"))
    options = parser.parse_args(argv)

    schedules = options.schedule or list(POSTER)
    check(schedules, options)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = pick_device(options.accelerator)
    shape = (3, options.image_size, options.image_size)
    x = torch.randn(options.batch, *shape, device=device)
    y = torch.randint(1000, (options.batch,), device=device)
    implied: dict[str | None, int] = {}
    steps: dict[str | None, Callable[[], None]] = {}
    for schedule in (None, *schedules):
        model = build(options, schedule).to(device)
        implied[schedule] = flops(model, x[:1])
        if options.compile:
            model = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
        steps[schedule] = trainer(model, x, y, options.precision)

    where = describe_device(device)
    kind = f"ViT-{options.model}/{options.patch} at {options.image_size} px, batch {options.batch}"
    how = f"{options.precision}, {'compiled' if options.compile else 'eager'}"
    print(f"{kind}, {how}, n = {options.rounds}\non {where}, threads {where.threads}", flush=True)
    for step in steps.values():  # warm-up
        seconds(step, 2, device)
    taken: dict[str, list[tuple[float, float]]] = {schedule: [] for schedule in schedules}
    for i in range(options.rounds):
        for schedule in schedules:
            pair = (None, schedule) if i % 2 else (schedule, None)
            times = {s: seconds(steps[s], options.steps, device) for s in pair}
            taken[schedule].append((times[None], times[schedule]))

    baseline = [options.steps * options.batch / b for pairs in taken.values() for b, _ in pairs]
    print(f"baseline {np.median(baseline):.4g} images/s (n = {len(baseline)})")
    print(f"{'schedule':18}{'implied':>9}{'reached':>9}  (quartiles)      of gain poster")
    rows: dict[str, Any] = {}
    for schedule, pairs in taken.items():
        speedup = summary([b / s for b, s in pairs])
        promised = implied[None] / implied[schedule]
        share = (speedup["median"] - 1) / (promised - 1)
        rows[schedule] = {"implied": promised, "reached": speedup, "share_of_gain": share}
        quartiles = f"({speedup['q1']:.3f} to {speedup['q3']:.3f})"
        reported = f"{1 + POSTER[schedule] / 100:.4f}" if schedule in POSTER else "-"
        print(
            f"{schedule:18}{promised:9.3f}{speedup['median']:9.3f}  {quartiles:17}{share:6.0%}"
            f"{reported:>9}"
        )
    asked = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"options": asked, "device": where.model_dump(), "torch": torch.__version__}
    write_json(options.out, result | {"baseline": summary(baseline), "schedules": rows})
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
