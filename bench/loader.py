"""Throughput of the data loader, and of training on real and synthetic input.

Measures images/s on the pack of the `hovit` study's data set at a scale:

1. loader alone: reading batches from the pack (`fetch`), and turning them into model input on the
   device, augmentation included (`input`);
2. training a model, in alternating rounds of STEPS steps: with `real` input from the pack, and with
   `synthetic` input, one fixed batch on the device, as the baseline. Forward, loss, backward,
   clipping and optimizer are those of the training loop, at the size, batch and precision of the
   scale.

Prints median and quartiles over rounds. `real / synthetic` is computed per pair of adjacent rounds,
so that a slow phase of the machine affects both; 1 means that input costs nothing. On a CPU, where
nothing is prefetched, `input share` is the part of a `real` round spent on making input. Other load
on the machine affects the input and the rest of a round alike, so this share is more reliable on a
busy machine; real / synthetic should be about 1 - input share.

If workers prefetch (on a GPU that cannot hold the pack), up to four batches are ready when a real
round starts, so STEPS should be well above four.

    python bench/loader.py
    python bench/loader.py --scale mini --data-root ../shared/data --model levit_deck

With `--files FOLDER` (train/CLASS/*.JPEG, as ImageNet), it measures reading images in place
instead: decoding, random resized crop to `--size` pixels (bicubic) and flip, to a uint8 batch. It
prints images per CPU second of one process, in alternating rounds over the same files, without
workers:

- `here`: hovit.data.image_files and hovit.data.augmented;
- `ImageFolder`: torchvision's ImageFolder with its own transforms, the baseline;
- `decode_jpeg`: the same, with torchvision.io.decode_jpeg and transforms on tensors.

    python bench/loader.py --files data/imagenet --size 224
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import load_plan
from hovit.config.runs import Run
from hovit.data.augmented import RATIO, SCALE, AugmentedImages, load_images, with_positions
from hovit.data.image_files import ImageFiles, list_split
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
    """Yield batches of the pack on the device, as uint8, epoch after epoch."""
    epoch = 0
    while True:
        batches = epoch_batches(train, run.recipe.batch_size, run.seed, epoch)
        for step, (x, y) in enumerate(make_loader(images, batches, device)):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            yield (run.seed, epoch, step, 0), x, y
        epoch += 1


def as_input(run: Run, batches: Iterator[Step]) -> Iterator[Step]:
    """Turn batches into model input."""
    for seed, x, y in batches:
        yield seed, augment(to_input(x, run.image_size), run.recipe.augment, seed), y


def trainer(run: Run, fabric: Any) -> Callable[[Step], None]:
    """Return a function that does one training step of a new model, as the training loop does."""
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
    """Images/s over `steps` batches, until the device has finished.

    Appends to `shares` the part of the time spent waiting for batches.
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
    """Measure each kind `n` times in alternation, after one discarded round of each."""
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


def bench_loader(
    run: Run, images: PackedImages, train: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Throughput of the loader alone."""
    device = torch.device(options.device)
    fetch = endless(run, images, train, device)
    made = as_input(run, endless(run, images, train, device))
    many = options.steps * 5  # these steps are short

    def nothing(_: Step) -> None:
        pass

    taken = rounds(
        {
            "fetch": lambda: speed(fetch, many, nothing, device),
            "input": lambda: speed(made, many, nothing, device),
        },
        options.rounds,
    )
    print("loader alone")
    result = {kind: summary(values) for kind, values in taken.items()}
    for kind, figures in result.items():
        show(kind, figures)
    return result


def bench_training(
    run: Run, fabric: Any, images: PackedImages, train: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Throughput of training one model on real and on synthetic input."""
    device = torch.device(options.device)
    step = trainer(run, fabric)
    real = as_input(run, endless(run, images, train, device))
    fixed = repeat(next(real))
    shares: list[float] = []
    taken = rounds(
        {
            "real": lambda: speed(real, options.steps, step, device, shares),
            "synthetic": lambda: speed(fixed, options.steps, step, device),
        },
        options.rounds,
    )
    ratios = [a / b for a, b in zip(taken["real"], taken["synthetic"], strict=True)]
    figures = {kind: summary(values) for kind, values in taken.items()}
    figures["ratio"] = summary(ratios)
    if device.type == "cpu":
        figures["input_share"] = summary(shares[1:])
    print(f"training {run.model}")
    show("real", figures["real"])
    show("synthetic", figures["synthetic"])
    show("real / synthetic", figures["ratio"], "")
    if "input_share" in figures:
        show("input share", figures["input_share"], "")
    return figures


def bench_files(options: argparse.Namespace) -> dict[str, Any]:
    """Images per CPU second: read in place here, and by torchvision's loaders."""
    torch.set_num_threads(1)
    size, train = options.size, options.files / "train"
    crop = {"scale": SCALE, "ratio": RATIO, "interpolation": v2.InterpolationMode.BICUBIC}
    steps = [v2.RandomResizedCrop(size, **crop), v2.RandomHorizontalFlip()]
    plain = ImageFolder(str(train), v2.Compose([*steps, v2.PILToTensor()]))
    tensors = ImageFolder(str(train), v2.Compose(steps), loader=read_tensor)
    located = list(list_split(options.files, "train"))
    table = pd.DataFrame(located).assign(label=0, split="train")
    files = ImageFiles(options.files, table, size, {})
    here = AugmentedImages(files, "crop_flip", size, (0, 0))
    chosen = np.random.default_rng(0).permutation(len(plain))[: options.images]
    batches = np.array_split(chosen, max(1, len(chosen) // 64))

    def run_here() -> float:
        return rate(load_images(here, with_positions(batches, 0, 64), size, torch.device("cpu")))

    def run(folder: ImageFolder) -> float:
        return rate(DataLoader(folder, batch_sampler=[batch.tolist() for batch in batches]))

    taken = rounds(
        {
            "here": run_here,
            "ImageFolder": lambda: run(plain),
            "decode_jpeg": lambda: run(tensors),
        },
        options.rounds,
    )
    print(f"{len(chosen)} of {len(plain)} images of {train}, {size} px, one process")
    figures = {kind: summary(values) for kind, values in taken.items()}
    for kind in ("ImageFolder", "decode_jpeg"):
        pairs = zip(taken["here"], taken[kind], strict=True)
        figures[f"here / {kind}"] = summary([a / b for a, b in pairs])
    for kind, each in figures.items():
        show(kind, each, "" if "/" in kind else " images per CPU second")
    return figures


def read_tensor(path: str) -> Tensor:
    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def rate(batches: Iterable[Any]) -> float:
    """Images per CPU second of this process."""
    begin, images = time.process_time(), 0
    for _, labels in batches:
        images += len(labels)
    return images / (time.process_time() - begin)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument(
        "--model", action="append", help="model of the hovit study; repeatable (default hovit)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="steps per round (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--files", type=Path, help="folder with train/CLASS/*.JPEG")
    parser.add_argument("--size", type=int, default=224, help="crop size of --files, in pixels")
    parser.add_argument("--images", type=int, default=512, help="images of --files per round")
    parser.add_argument("--out", type=Path, default=Path("results/bench/loader.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.files:
        where = describe_device(torch.device("cpu"))
        print(f"on {where}")
        result: dict[str, Any] = {"device": where.model_dump(), "files": bench_files(options)}
        write_json(options.out.with_stem("files"), result)
        return
    plan = load_plan(options.scale)
    study = plan.study("hovit")
    runs = {row.model: plan.runs_of(study, row)[0] for row in plan.rows_run(study)}
    models = options.model or ["hovit"]
    if unknown := set(models) - set(runs):
        raise HovitError(f"--model {unknown.pop()}: must be one of {', '.join(map(str, runs))}")

    torch.set_num_threads(options.threads)
    run = runs[models[0]]
    fabric = make_fabric(run.precision, accelerator=options.accelerator)
    options.device = fabric.device
    prepare(run.pack, options.data_root)
    packed = open_pack(run.pack)
    images, train = PackedImages(packed, fabric.device), limit_splits(packed, run)["train"]
    where = describe_device(fabric.device)
    print(
        f"{run.pack.id} at {run.image_size} px, batch {run.recipe.batch_size}, {run.precision}, "
        f"n = {options.rounds} rounds of {options.steps} steps\non {where}, threads {where.threads}"
    )
    result = {
        "scale": plan.scale.id,
        "device": where.model_dump(),
        "torch": torch.__version__,
        "pack": {key: packed.meta[key] for key in ("id", "pixels", "fingerprint")},
        "images_train": len(train),
        "image_size": run.image_size,
        "batch_size": run.recipe.batch_size,
        "precision": run.precision,
        "steps": options.steps,
        "loader": bench_loader(run, images, train, options),
        "training": {
            name: bench_training(runs[name], fabric, images, train, options) for name in models
        },
    }
    write_json(options.out, result)
    print(f"written to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except HovitError as error:
        sys.exit(f"error: {error}")
