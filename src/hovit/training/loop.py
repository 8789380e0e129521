"""The training loop: one run from its first batch to its record, however often it is killed.

Every random choice of a step is drawn from (seed, epoch, step). So a run that is continued from its
last checkpoint ends, on a CPU with the same number of threads, with the same metrics to the bit.
"""

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # the same code, inside the larger package
    from lightning.fabric import Fabric  # type: ignore[no-redef]

from ..catalogue import Recipe
from ..data.loader import (
    PackedImages,
    augment,
    epoch_batches,
    eval_batches,
    make_loader,
    step_seed,
    to_input,
)
from ..data.pack import Packed, open_pack
from ..device import describe_device, peak_memory_mb, pick_device
from ..errors import HovitError, OutOfTime
from ..factory import create_model
from ..files import alone, atomic, file_digest, write_text
from ..plan import Run
from ..predictions import metrics, predictions_digest, write_predictions
from ..records import Record, make_provenance, write_record
from ..sources import code_hash
from .checkpoint import load_state, load_weights, save_state, save_weights
from .weights import load_pretrained

EVAL_BATCH = 64
CHECK_EVERY = 20  # steps between looks at the loss: each look waits for the device


@dataclass
class Options:
    """How to run it; nothing here changes the result on a CPU.

    Args:
        deadline: `time.monotonic()` after which to save and stop.
        save_seconds: between checkpoints (the last epoch's end is saved anyway).
        weights_file: what `--weights` named.
        on_step: told (epoch, step, steps) after each batch.
        on_epoch: told of each finished epoch.
    """

    deadline: float = math.inf
    save_seconds: float = 60.0
    weights_file: Path | None = None
    on_step: Callable[[int, int, int], None] = lambda *_: None
    on_epoch: Callable[[dict[str, float]], None] = lambda *_: None


def train(run: Run, fabric: Fabric, root: Path = Path(), options: Options | None = None) -> Record:
    """Train, validate and test one run; leave its record, weights, history and predictions.

    Args:
        run: what to train.
        fabric: launched, with device, precision and processes set.
        root: top of the artifact.
        options: how.

    Returns:
        The record, also written to `run.folder`.

    Raises:
        HovitError: for missing data or weights, a loss that is not finite, or if another process
            trains this very run.
        OutOfTime: at the deadline; the same call continues.
    """
    with alone(root / run.folder) if fabric.is_global_zero else nullcontext():
        job = _Job(run, fabric, root, options or Options())
        job.fit()
        return job.finish()


class _Job:
    """One run under way."""

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        self.run, self.fabric, self.options = run, fabric, options
        self.recipe = run.recipe
        self.folder = root / run.folder
        self.packed = open_pack(run.pack, root / run.pack.folder)
        self.images = PackedImages(self.packed, fabric.device)
        self.code = code_hash("training", run.model)
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)
        self.indices = limited(self.packed, run)
        self.started = self.saved = time.monotonic()

        torch.manual_seed(run.seed)
        model = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
        self.started_from = ""
        if run.weights:
            self.started_from = load_pretrained(model, run, root, options.weights_file)
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # both heads are trained
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            model = convert_sync_batchnorm(model)
        self.module = model
        self.model, self.optimizer = fabric.setup(model, make_optimizer(model, self.recipe))
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.state = load_state(
            self.folder / "state.safetensors",
            [run.spec_hash, self.code, self.packed.meta["fingerprint"], self.started_from],
            self.module,
            self.optimizer,
            self.scaler,
        )

    def fit(self) -> None:
        """All epochs that are still to do."""
        while self.state.epoch < self.recipe.epochs:
            self.train_epoch()
            self.end_epoch()

    def train_epoch(self) -> None:
        """The batches of this epoch that are still to do."""
        epoch, size = self.state.epoch, self.run.image_size
        rank, world = self.fabric.global_rank, self.fabric.world_size
        batches = epoch_batches(
            self.indices["train"], self.recipe.batch_size, self.run.seed, epoch, rank, world
        )
        loader = make_loader(self.images, batches[self.state.step :], self.fabric.device)
        self.tell_epoch(epoch)
        self.model.train()
        recent: list[Tensor] = []
        for step, (images, labels) in enumerate(loader, start=self.state.step):
            seed = (self.run.seed, epoch, step, rank)
            torch.manual_seed(step_seed(seed))  # dropout
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, epoch + step / len(batches))
            x = to_input(images.to(self.fabric.device, non_blocking=True), size)
            x = augment(x, self.recipe.augment, seed)
            y = labels.to(self.fabric.device, non_blocking=True)
            loss = training_loss(self.model(x), y, self.recipe.label_smoothing)
            self.fabric.backward(loss)
            if self.recipe.clip_norm:
                self.fabric.clip_gradients(
                    self.model, self.optimizer, max_norm=self.recipe.clip_norm
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
            recent.append(loss.detach())
            look = len(recent) >= CHECK_EVERY or step + 1 == len(batches)
            # With several processes all must agree that it is time; they ask each other seldom.
            due = self.is_due() if look or self.fabric.world_size == 1 else False
            if look or due:
                self.keep(recent)
                recent = []
            if due:
                self.save()
            self.options.on_step(epoch, step + 1, len(batches))

    def tell_epoch(self, epoch: int) -> None:
        """Tell a model that has a warm-up of its own (SkipViT) which epoch begins."""
        if hasattr(self.module, "set_epoch"):
            self.module.set_epoch(epoch, self.recipe.epochs)

    def keep(self, recent: list[Tensor]) -> None:
        """Take the last losses off the device; one that is not finite ends the run."""
        losses: Any = self.fabric.all_reduce(torch.stack(recent).double(), reduce_op="mean")
        values = losses.tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                step = self.state.step + offset + 1
                raise HovitError(
                    f"run {self.run.id} seed {self.run.seed}: loss is {value} at epoch "
                    f"{self.state.epoch + 1}, step {step}; lower lr, or use 32-true"
                )
        self.state.losses += values
        self.state.step += len(values)

    def is_due(self) -> bool:
        """Whether it is time to save: by the clock, or because the deadline has come."""
        now = time.monotonic()
        due = now - self.saved > self.options.save_seconds or now > self.options.deadline
        return bool(self.fabric.broadcast(due)) if self.fabric.world_size > 1 else due

    def save(self) -> None:
        """Checkpoint; past the deadline, stop."""
        now = time.monotonic()
        self.state.seconds += now - self.started
        self.started = now
        if self.fabric.is_global_zero:
            save_state(
                self.folder / "state.safetensors",
                self.state,
                self.module,
                self.optimizer,
                self.scaler,
            )
            best = self.state.best
            for path in self.folder.glob("best-*.safetensors"):
                if best and path != self.best_weights(best["epoch"]):
                    path.unlink()
        self.fabric.barrier()
        self.saved = time.monotonic()
        if self.saved > self.options.deadline:
            raise OutOfTime

    def end_epoch(self) -> None:
        """Validate, note the epoch, keep the weights if they are the best so far."""
        loss, top1, _ = self.evaluate("val")
        entry = {
            "epoch": self.state.epoch + 1,
            "train_loss": float(np.mean(self.state.losses)),
            "val_loss": loss,
            "val_top1": top1,
        }
        best = self.state.best
        if best is None or top1 > best["val_top1"]:
            self.save_best(entry["epoch"])
        self.state.history.append(entry)
        self.state.epoch += 1
        self.state.step, self.state.losses = 0, []
        self.options.on_epoch(entry)
        if self.state.epoch == self.recipe.epochs or self.is_due():
            self.save()

    def best_weights(self, epoch: float) -> Path:
        """Where the weights of an epoch that was the best so far lie.

        They become `weights.safetensors` only at the end: Snakemake deletes a killed job's outputs.
        """
        return self.folder / f"best-{epoch:.0f}.safetensors"

    def save_best(self, epoch: float) -> None:
        """Keep this epoch's weights; older ones stay until a checkpoint no longer needs them."""
        if self.fabric.is_global_zero:
            save_weights(self.best_weights(epoch), self.module, spec_hash=self.run.spec_hash)
        self.fabric.barrier()

    def evaluate(self, split: str) -> tuple[float, float, pd.DataFrame]:
        """Loss, top-1 in percent, and the prediction for every image of a split."""
        indices = self.indices[split]
        world, rank = self.fabric.world_size, self.fabric.global_rank
        batches = eval_batches(indices, EVAL_BATCH, rank, world)
        self.model.eval()
        rows = []
        with torch.inference_mode():
            for images, labels in make_loader(self.images, batches, self.fabric.device):
                x = to_input(images.to(self.fabric.device), self.run.image_size)
                logits = self.model(x).float()
                y = labels.to(self.fabric.device)
                losses = F.cross_entropy(logits, y, reduction="none")
                rows.append(torch.stack([y.double(), logits.argmax(1).double(), losses.double()]))
                if time.monotonic() > self.options.deadline and world == 1:
                    self.save()  # raises OutOfTime
        mine = torch.cat(rows, dim=1)  # [3, n / world]
        if world > 1:
            every = self.fabric.all_gather(mine)  # [world, 3, n / world]
            mine = every.permute(1, 2, 0).flatten(1)  # type: ignore[union-attr]
        label, predicted, losses = mine[:, : len(indices)].cpu().numpy()
        table = pd.DataFrame(
            {
                "index": indices,
                "label": label.astype(int),
                "predicted": predicted.astype(int),
                "loss": losses,
            }
        )
        loss, top1 = metrics(table)
        if not math.isfinite(loss):
            raise HovitError(
                f"run {self.run.id} seed {self.run.seed}: {split} loss is {loss} after "
                f"{len(self.state.history)} whole epochs; lower lr, or use 32-true"
            )
        return loss, top1, table

    def finish(self) -> Record:
        """Test the best weights once, and write the record."""
        best = self.state.best
        assert best is not None
        self.module.load_state_dict(load_weights(self.best_weights(best["epoch"])))
        self.tell_epoch(self.recipe.epochs - 1)
        loss, top1, predictions = self.evaluate("test")
        seconds = self.state.seconds + time.monotonic() - self.started
        results = {
            "top1": top1,
            "loss": loss,
            "val_top1": best["val_top1"],
            "best_epoch": best["epoch"],
            "epochs": len(self.state.history),
            "images_train": len(self.indices["train"]),
            "images_val": len(self.indices["val"]),
            "images_test": len(self.indices["test"]),
            "interruptions": self.state.interruptions,
            "processes": self.fabric.world_size,
            "started_from_sha256": self.started_from,
            "weights_sha256": file_digest(self.best_weights(best["epoch"])),
            "history": self.state.history,
            "predictions_sha256": predictions_digest(predictions),
        }
        record = Record(
            kind="train",
            id=self.run.id,
            scale=self.run.scale,
            spec=self.run.spec,
            spec_hash=self.run.spec_hash,
            results=results,
            provenance=make_provenance(
                describe_device(self.fabric.device),
                seconds,
                peak_memory_mb(self.fabric.device),
                self.code,
                self.packed.meta,
            ),
        )
        if self.fabric.is_global_zero:
            write_predictions(self.folder / "predictions.csv.gz", predictions)
            history = pd.DataFrame(self.state.history)
            write_text(self.folder / "history.csv", history.to_csv(index=False))
            with atomic(self.folder / "weights.safetensors") as path:
                shutil.copyfile(self.best_weights(best["epoch"]), path)
            write_record(self.folder / "record.json", record)
            # What is left to go on from, and of a process killed while it wrote.
            for pattern in ("state.safetensors", "best-*.safetensors", ".*"):
                for leftover in self.folder.glob(pattern):
                    leftover.unlink()
        self.fabric.barrier()
        return record


def limited(packed: Packed, run: Run) -> dict[str, np.ndarray]:
    """The indices of each split, cut to the scale's limits."""
    indices = {name: all_[: getattr(run.limit, name)] for name, all_ in packed.splits.items()}
    empty = [name for name, some in indices.items() if not len(some)]
    if empty:
        raise HovitError(f"{run.dataset.id}: its {empty[0]} split is empty")
    return indices


def training_loss(logits: Tensor | tuple[Tensor, ...], y: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy; with several heads, the mean of theirs."""
    heads = logits if isinstance(logits, tuple) else (logits,)
    losses = [F.cross_entropy(head.float(), y, label_smoothing=smoothing) for head in heads]
    return torch.stack(losses).mean()


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a (fractional) epoch: linear warm-up, then constant or cosine to 0."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * max(epoch / recipe.warmup_epochs, 1e-3)
    if recipe.schedule == "constant":
        return recipe.lr
    span = recipe.epochs - recipe.warmup_epochs
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / span))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay spares biases, norms and other vectors."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[recipe.optimizer](groups, lr=recipe.lr)


def make_fabric(precision: str, accelerator: str = "auto") -> Fabric:
    """Fabric for one machine, launched; under torchrun it takes rank and world from there.

    Models with weights that nothing reads (the deck's dead kv) need DDP to look for them.

    Raises:
        HovitError: for an accelerator that is not here.
    """
    accelerator = pick_device(accelerator).type
    world = os.environ.get("WORLD_SIZE", "1")
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    strategy = "ddp_find_unused_parameters_true" if devices > 1 else "auto"
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric
