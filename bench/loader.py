"""Does training wait for its input? Speed of the loader, and of training on real and fixed input.

Measured, in images a second, over the pack of the `hovit` study's dataset at a scale:

1. the loader alone: batches off the pack (`fetch`), and batches made into the network's input on
   the device, augmentation included (`input`);
2. training a model, by rounds of STEPS steps that take turns: `real` input from the pack, then the
   baseline, `synthetic`: one fixed batch that is already on the device. Forward, loss, backward,
   clipping and optimizer are the training loop's, at the scale's size, batch and precision.

Told of each: median and quartiles over the rounds. `real / synthetic` is of each round and its
neighbour, so that a machine that slows down hits both; 1 means that input costs nothing. On a CPU,
where nothing runs ahead, `input share` is also told: what part of the `real` rounds' own time went
by in making input. Another process's load hits both parts of it, so on a busy machine that is the
figure to trust: real / synthetic should come to 1 less it.

Where worker processes read ahead (accelerator, pack too large for it), up to four batches are ready
when a real round starts, so STEPS should be well above four.

    python bench/loader.py
    python bench/loader.py --scale mini --data-root ../shared/data --model levit_deck
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import load_plan
from hovit.config.runs import Run
from hovit.data.loader import PackedImages, augment, epoch_batches, make_loader, step_seed, to_input
from hovit.data.pack import open_pack, prepare
from hovit.measure.latency import summary
from hovit.training.classification import limit_splits, make_optimizer, training_loss
from hovit.training.trainer import make_fabric
from hovit.utils.create_model import create_model
from hovit.utils.device import describe_device
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

Step = tuple[tuple[int, ...], Tensor, Tensor]  # (seed, epoch, step, rank), images, labels


def endless(
    run: Run, images: PackedImages, train: np.ndarray, device: torch.device
) -> Iterator[Step]:
    """Epoch after epoch of batches off the pack, on the device, still uint8."""
    epoch = 0
    while True:
        batches = epoch_batches(train, run.recipe.batch_size, run.seed, epoch)
        for step, (x, y) in enumerate(make_loader(images, batches, device)):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            yield (run.seed, epoch, step, 0), x, y
        epoch += 1


def as_input(run: Run, batches: Iterator[Step]) -> Iterator[Step]:
    """The same, as the network's input."""
    for seed, x, y in batches:
        yield seed, augment(to_input(x, run.image_size), run.recipe.augment, seed), y


def trainer(run: Run, fabric: Any) -> Callable[[Step], None]:
    """One training step of a new model, as the training loop does it."""
    torch.manual_seed(run.seed)
    net = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
    if hasattr(net, "set_distilled_training"):
        net.set_distilled_training(True)
    model, optimizer = fabric.setup(net, make_optimizer(net, run.recipe))
    model.train()

    def step(batch: Step) -> None:
        seed, x, y = batch
        torch.manual_seed(step_seed(seed))
        fabric.backward(training_loss(model(x), y, run.recipe.label_smoothing))
        if run.recipe.clip_norm:
            fabric.clip_gradients(model, optimizer, max_norm=run.recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def speed(
    batches: Iterator[Step],
    steps: int,
    act: Callable[[Step], None],
    device: torch.device,
    shares: list[float] | None = None,
) -> float:
    """Images a second of `steps` batches, until the device has done them.

    `shares` gets the part of the time that went by before the batches were there.
    """
    images, waited = 0, 0.0
    _wait(device)
    begin = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        act(batch)
        images += len(batch[2])
    _wait(device)
    seconds = time.perf_counter() - begin
    if shares is not None:
        shares.append(waited / seconds)
    return images / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat(batch: Step) -> Iterator[Step]:
    while True:
        yield batch


def rounds(kinds: dict[str, Callable[[], float]], n: int) -> dict[str, list[float]]:
    """Each kind `n` times, taking turns; a first round of each is thrown away."""
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(n + 1):
        for kind, measure in kinds.items():
            value = measure()
            if i:
                taken[kind].append(value)
    return taken


def show(name: str, figures: dict[str, Any], unit: str = " images/s") -> None:
    median, q1, q3 = (f"{figures[key]:,.4g}" for key in ("median", "q1", "q3"))
    print(f"  {name:18} {median}{unit} ({q1} to {q3})", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument(
        "--model", action="append", help="of the hovit study; again for more (default hovit)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of each round (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench/loader.json"))
    options = parser.parse_args(argv)

    plan = load_plan(options.scale)
    study = plan.study("hovit")
    runs = {row.model: plan.runs_of(study, row)[0] for row in plan.rows_run(study)}
    models = options.model or ["hovit"]
    if unknown := set(models) - set(runs):
        raise HovitError(f"--model {unknown.pop()}: not of {', '.join(map(str, runs))}")

    torch.set_num_threads(options.threads)
    run = runs[models[0]]
    fabric = make_fabric(run.precision, accelerator=options.accelerator)
    device = fabric.device
    prepare(run.pack, options.data_root)
    packed = open_pack(run.pack)
    images, train = PackedImages(packed, device), limit_splits(packed, run)["train"]
    where = describe_device(device)
    result: dict[str, Any] = {
        "scale": plan.scale.id,
        "device": where.model_dump(),
        "torch": torch.__version__,
        "pack": {key: packed.meta[key] for key in ("id", "pixels", "fingerprint")},
        "images_train": len(train),
        "image_size": run.image_size,
        "batch_size": run.recipe.batch_size,
        "precision": run.precision,
        "steps": options.steps,
        "training": {},
    }
    print(
        f"{run.pack.id} at {run.image_size} px, batch {run.recipe.batch_size}, {run.precision}, "
        f"n = {options.rounds} rounds of {options.steps} steps\non {where}, threads {where.threads}"
    )

    def nothing(_: Step) -> None:
        pass

    # A thousand batches of the loader take about as long as one round of training.
    fetch = endless(run, images, train, device)
    made = as_input(run, endless(run, images, train, device))
    many = options.steps * 5
    taken = rounds(
        {
            "fetch": lambda: speed(fetch, many, nothing, device),
            "input": lambda: speed(made, many, nothing, device),
        },
        options.rounds,
    )
    result["loader"] = {kind: summary(values) for kind, values in taken.items()}
    print("loader alone")
    for kind, figures in result["loader"].items():
        show(kind, figures)

    for name in models:
        step = trainer(runs[name], fabric)
        real = as_input(run, endless(run, images, train, device))
        fixed = repeat(next(real))
        shares: list[float] = []
        taken = rounds(
            {
                "real": lambda: speed(real, options.steps, step, device, shares),  # noqa: B023
                "synthetic": lambda: speed(fixed, options.steps, step, device),  # noqa: B023
            },
            options.rounds,
        )
        ratios = [a / b for a, b in zip(taken["real"], taken["synthetic"], strict=True)]
        figures = {kind: summary(values) for kind, values in taken.items()}
        figures["ratio"] = summary(ratios)
        if device.type == "cpu":
            figures["input_share"] = summary(shares[1:])
        result["training"][name] = figures
        print(f"training {name}")
        show("real", figures["real"])
        show("synthetic", figures["synthetic"])
        show("real / synthetic", figures["ratio"], "")
        if "input_share" in figures:
            show("input share", figures["input_share"], "")
    write_json(options.out, result)
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
