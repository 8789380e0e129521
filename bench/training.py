"""Training speed of the trainer, compared with a plain loop in the style of timm's train script.

Measures images/s of the same model, batch size, precision and optimizer, in alternating rounds of
STEPS steps within one process:

- `plain`: timm's loader with WORKERS processes (PIL transforms on the packed images, normalisation
  on the device), autocast, optimizer, and a read of the loss every 50 steps.
- `eager`: the trainer without CUDA graphs: input from the pack, resized and augmented on the
  device. On a CPU it always runs so.
- `captured`: the same, with each step as a CUDA graph (GPU only).
- `compiled`: with `torch.compile`, and captured on a GPU (only with --compile).

A ratio compares two adjacent rounds, so that a slow phase of the machine affects both. CPU seconds
per 1,000 images include this process; those of `plain` also include all work of the loader's
workers, which can prepare two batches each during the other rounds. On a busy machine, only the
ratios and the CPU seconds are reliable. Batches prepared in advance favour `plain` in images/s.

Finding (HoViT at 64 px, batch 32, fp32, AMD EPYC with AVX2, 1 thread): `eager` is 1.05 times as
fast as `plain` (quartiles 1.05 to 1.12, n = 5 rounds of 6 steps) and takes 0.93 of its CPU seconds
(0.86 to 0.93). In an earlier profile, the model's kernels took 90 % of a step and the optimizer
9 %. No GPU has been measured.

    python bench/training.py --device cpu --steps 8
    python bench/training.py --device cuda --scale proxy --steps 200 --compile
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torch.utils.data import Dataset

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import load_plan
from hovit.config.runs import Run
from hovit.data.pack import Packed, open_pack, prepare
from hovit.measure.latency import summary
from hovit.training.classification import (
    ClassificationTrainer,
    limit_splits,
    make_optimizer,
    training_loss,
)
from hovit.training.trainer import Options, make_fabric
from hovit.utils.create_model import create_model
from hovit.utils.device import describe_device, pick_device
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
READ_EVERY = 50  # steps between reads of the loss, timm's --log-interval
ENDLESS = 10**6  # images of the plain loop's data set


class PilImages(Dataset[tuple[Any, int]]):
    """Images of a pack in the form of timm's ImageDataset: one PIL image and its label."""

    def __init__(self, packed: Packed, indices: np.ndarray) -> None:
        self.packed, self.indices = packed, np.resize(indices, ENDLESS)
        self.transform: Callable[[Image.Image], Any] = lambda image: image  # set by timm

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        index = self.indices[i]
        image = Image.fromarray(self.packed.images[index])
        return self.transform(image), int(self.packed.labels[index])


def plain_loop(
    run: Run, packed: Packed, indices: np.ndarray, device: torch.device, workers: int
) -> Callable[[int], None]:
    """Function that trains `steps` steps, as timm's train script does."""
    loader = create_loader(
        PilImages(packed, indices),  # type: ignore[arg-type]  # what timm's loader reads of it
        (3, run.image_size, run.image_size), run.recipe.batch_size,
        is_training=True, no_aug=run.recipe.augment == "none", num_workers=workers, device=device,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    torch.manual_seed(run.seed)
    model = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    model.to(device).train()
    optimizer = make_optimizer(model, run.recipe)
    dtype = AUTOCAST[run.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    batches: Iterator[Any] = iter(loader)

    def train(steps: int) -> None:
        for step in range(steps):
            x, y = next(batches)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = training_loss(model(x), y, run.recipe.label_smoothing)
            scaler.scale(loss).backward()
            if norm := run.recipe.clip_norm:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step % READ_EVERY == 0:
                loss.item()

    return train


def our_trainer(run: Run, fabric: Any, root: Path, options: Options) -> Callable[[int], None]:
    """Function that trains `steps` steps, as one epoch of `hovit train` does."""
    trainer = ClassificationTrainer(run, fabric, root, options)
    images = trainer.indices

    def train(steps: int) -> None:
        trainer.indices = np.resize(images, steps * run.recipe.batch_size)
        trainer.state.step, trainer.state.losses = 0, []
        trainer.train_epoch()

    return train


def worker_seconds() -> float:
    """CPU seconds of the running children: the workers of the plain loop."""
    total = 0.0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(
    loops: dict[str, Callable[[int], None]], images: int, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Images/s and CPU seconds per 1,000 images of each round; the first round is discarded."""
    taken: dict[str, dict[str, list[float]]] = {name: {"speed": [], "cpu": []} for name in loops}
    worked = 0.0  # CPU seconds of the workers until the last round of the plain loop
    for i in range(options.rounds + 1):
        order = list(loops.items())
        for name, loop in order if i % 2 else order[::-1]:
            cpu, begin = time.process_time(), time.perf_counter()
            loop(options.steps)
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
            if name == "plain":
                before, worked = worked, worker_seconds()
                cpu += worked - before
            if i:
                taken[name]["speed"].append(images / seconds)
                taken[name]["cpu"].append(cpu / images * 1000)
    return taken


def chosen_run(options: argparse.Namespace, device: torch.device) -> Run:
    """The run of the hovit study with this model, at the batch and precision asked for."""
    plan = load_plan(options.scale)
    study = plan.study("hovit")
    runs = {row.model: plan.runs_of(study, row)[0] for row in plan.rows_run(study)}
    if options.model not in runs:
        raise HovitError(f"--model {options.model}: one of {', '.join(map(str, runs))}")
    run = runs[options.model]
    recipe = {"batch_size": options.batch, "optimizer": "adamw", "augment": options.augment}
    default = "bf16-mixed" if device.type == "cuda" else "32-true"
    changes = {
        "recipe": run.recipe.model_copy(update=recipe),
        "precision": options.precision or default,
    }
    return run.model_copy(update=changes)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--model", default="hovit", help="model of the hovit study")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--augment", default="none", choices=["none", "crop_flip"])
    parser.add_argument("--precision", choices=AUTOCAST, help="default: bf16-mixed on a GPU")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="steps per round (default 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--workers", type=int, default=4, help="workers of the plain loop (default 4, as timm)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/bench/training.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = pick_device(options.device)
    options.device = device.type
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # as timm's train script, for all loops
    run = chosen_run(options, device)
    prepare(run.pack, options.data_root)
    packed = open_pack(run.pack)
    fabric = make_fabric(run.precision, accelerator=device.type)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)  # nothing of a real run is read
        (root / run.pack.folder).parent.mkdir(parents=True)
        (root / run.pack.folder).symlink_to(run.pack.folder.absolute())
        kinds = {"eager": Options(capture=False)}
        if device.type == "cuda":
            kinds["captured"] = Options()
        if options.compile:
            kinds["compiled"] = Options(compile=True)
        train = limit_splits(packed, run)["train"]
        loops = {"plain": plain_loop(run, packed, train, fabric.device, options.workers)}
        loops |= {name: our_trainer(run, fabric, root, kind) for name, kind in kinds.items()}
        taken = measure(loops, options.steps * options.batch, options)
    report(run, taken, options, describe_device(fabric.device))


def report(
    run: Run, taken: dict[str, dict[str, list[float]]], options: argparse.Namespace, where: Any
) -> None:
    """Print and write speeds, CPU seconds and ratios to the plain loop."""
    print(
        f"{run.model} at {run.image_size} px, batch {options.batch}, {run.precision}, augmentation "
        f"{options.augment}, n = {options.rounds} rounds of {options.steps} steps\non {where}"
    )
    plain, results = taken["plain"], {}
    for name, each in taken.items():
        result = {"speed": summary(each["speed"]), "cpu": summary(each["cpu"])}
        for key in ("speed", "cpu"):
            pairs = zip(each[key], plain[key], strict=True)
            result[f"{key}_ratio"] = summary([a / b for a, b in pairs])
        results[name] = result
        texts = {
            key: "{median:,.4g} ({q1:,.4g} to {q3:,.4g})".format(**value)
            for key, value in result.items()
        }
        print(f"  {name:9} {texts['speed']} images/s, {texts['speed_ratio']} x plain")
        print(f"  {'':9} {texts['cpu']} CPU s per 1,000 images, {texts['cpu_ratio']} x plain")
    write_json(
        options.out,
        {
            "device": where.model_dump(), "torch": torch.__version__, "model": run.model,
            "image_size": run.image_size, "batch_size": options.batch, "precision": run.precision,
            "augment": options.augment, "rounds": options.rounds, "steps": options.steps,
            "workers": options.workers, "loops": results,
        },
    )  # fmt: skip
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
