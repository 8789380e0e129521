"""Training a classifier: images and classes in; weights, predictions and a record out."""

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..config.runs import Run
from ..config.schema import Recipe
from ..data.loader import PackedImages, augment, eval_batches, make_loader, to_input
from ..data.pack import Packed, open_pack
from ..records.predictions import metrics, predictions_digest, write_predictions
from ..records.record import Record
from ..utils.create_model import create_model
from ..utils.errors import HovitError
from ..utils.files import atomic, file_digest
from .checkpoint import load_weights, save_weights
from .pretrained import load_pretrained
from .trainer import Fabric, Job, Options, Seed

EVAL_BATCH = 64


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
    return Classification.train(run, fabric, root, options)


class Classification(Job):
    """A classifier's run: validated after each epoch, tested once with the best epoch's weights."""

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        super().__init__(run, fabric, root, options)
        self.packed = open_pack(run.pack, root / run.pack.folder)
        self.meta = self.packed.meta
        self.images = PackedImages(self.packed, fabric.device)
        self.splits = limited(self.packed, run)
        self.indices = self.splits["train"]
        torch.manual_seed(run.seed)
        model = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
        if run.weights:
            self.started_from = load_pretrained(model, run, root, options.weights_file)
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # both heads are trained
        self.begin(model, make_optimizer)

    def load(self, batches: list[np.ndarray]) -> Iterable[tuple[Tensor, Tensor]]:
        return make_loader(self.images, batches, self.fabric.device)

    def loss(self, batch: tuple[Tensor, Tensor], seed: Seed) -> Tensor:
        images, labels = (x.to(self.fabric.device, non_blocking=True) for x in batch)
        x = augment(to_input(images, self.run.image_size), self.recipe.augment, seed)
        return training_loss(self.model(x), labels, self.recipe.label_smoothing)

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        return learning_rate(self.recipe, epoch + step / steps)

    def end_epoch(self) -> None:
        """Validate, note the epoch, keep the weights if they are the best so far."""
        loss, top1, _ = self.evaluate("val")
        best = self.state.best
        if best is None or top1 > best["val_top1"]:
            self.save_best(self.state.epoch + 1)
        self.note_epoch(val_loss=loss, val_top1=top1)
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

    def tidy(self) -> None:
        best = self.state.best
        for path in self.folder.glob("best-*.safetensors"):
            if best and path != self.best_weights(best["epoch"]):
                path.unlink()

    def evaluate(self, split: str) -> tuple[float, float, pd.DataFrame]:
        """Loss, top-1 in percent, and the prediction for every image of a split."""
        indices = self.splits[split]
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
                found = [y.double(), logits.argmax(1).double(), losses.double()]
                rows.append(torch.stack(found, dim=1))
                if time.monotonic() > self.options.deadline and world == 1:
                    self.save()  # raises OutOfTime
        every = self.gathered(torch.cat(rows))  # [n, 3]
        label, predicted, losses = every[: len(indices)].T.cpu().numpy()
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
        kept = self.best_weights(best["epoch"])
        self.module.load_state_dict(load_weights(kept))
        self.tell_epoch(self.recipe.epochs - 1)
        loss, top1, predictions = self.evaluate("test")
        results = {
            "top1": top1,
            "loss": loss,
            "loss_error": float(np.std(predictions["loss"]) / len(predictions) ** 0.5),
            "val_top1": best["val_top1"],
            "best_epoch": best["epoch"],
            "images_val": len(self.splits["val"]),
            "images_test": len(self.splits["test"]),
            "weights_sha256": file_digest(kept),
            "predictions_sha256": predictions_digest(predictions),
        }
        record = self.record(results)
        if self.fabric.is_global_zero:
            write_predictions(self.folder / "predictions.csv.gz", predictions)
            with atomic(self.folder / "weights.safetensors") as path:
                shutil.copyfile(kept, path)
            self.leave(record)
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
    """The recipe's optimizer; weight decay spares what timm's own training spares.

    That is biases, norms and other vectors, and what the model's `no_weight_decay` names
    (attention's biases, position embeddings, the class token).
    """
    return create_optimizer_v2(model, recipe.optimizer, recipe.lr, recipe.weight_decay)
