"""Training a classifier on packed images."""

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..config.runs import Run
from ..config.schema import Recipe
from ..data.augmented import (
    AugmentedImages,
    ImageSource,
    PackedSource,
    changes_batch,
    load_images,
    mix_batch,
    with_positions,
)
from ..data.features import FrontFeatures
from ..data.image_files import CentralCrops, ImageFiles, open_images
from ..data.loader import (
    PackedImages,
    augment,
    crop_flip,
    draw_crops,
    eval_batches,
    make_loader,
    to_input,
)
from ..data.pack import Packed
from ..data.split import splits_of, stratified_order
from ..records.predictions import metrics, predictions_digest, write_predictions
from ..records.record import Record
from ..utils.create_model import create_model
from ..utils.errors import HovitError
from ..utils.files import atomic, file_digest
from .checkpoint import load_weights, save_weights
from .pretrained import load_pretrained
from .trainer import Fabric, Options, StepSeed, Trainer

EVAL_BATCH = 64


def train(run: Run, fabric: Fabric, root: Path = Path(), options: Options | None = None) -> Record:
    """Train, validate and test one run; write its record, weights, history and predictions.

    Args:
        run: the run.
        fabric: a launched Fabric; it sets device, precision and processes.
        root: top folder of the artifact.
        options: deadline, checkpoints and progress.

    Returns:
        The record, also written to `run.folder`.

    Raises:
        HovitError: for missing data or weights, a loss that is not finite, or if another process
            trains the same run.
        OutOfTime: at the deadline. The same call resumes.
    """
    return ClassificationTrainer.run_to_record(run, fabric, root, options)


class ClassificationTrainer(Trainer):
    """Validates after each epoch and tests the weights of the best epoch once."""

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        super().__init__(run, fabric, root, options)
        packed = open_images(run.pack, root / run.pack.folder)
        self.meta = packed.meta
        self.images: PackedImages | CentralCrops | FrontFeatures
        self.mixes = changes_batch(self.recipe)
        self.source: ImageSource | None = None  # None: batches are augmented on the device
        if isinstance(packed, ImageFiles):
            self.images, self.source = packed.images, packed
        else:
            self.images = PackedImages(packed, fabric.device)
            if self.recipe.augment == "randaugment":
                self.source = PackedSource(packed.images, packed.labels)
        self.splits = limit_splits(packed, run)
        self.indices = self.splits["train"]
        torch.manual_seed(run.seed)
        model = create_model(run.model, run.dataset.num_classes, run.image_size, **run.model_args)
        if run.weights:
            self.pretrained_sha256 = load_pretrained(model, run, root, options.weights_file)
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # trains both heads
        if self.recipe.frozen_front:
            freeze_front(model, run)
        self.setup(model, make_optimizer)
        self.captured_predict = (
            self.capture(self.predict_batch, self.tested) if self.captures else None
        )
        if self.recipe.frozen_front:
            assert isinstance(self.images, PackedImages)  # no such recipe trains on files
            self.images = FrontFeatures(self.module, self.images, run.image_size, fabric.device)

    def load_batches(self, batches: list[np.ndarray]) -> Iterable[tuple[Tensor, Tensor]]:
        if self.source is None:
            return make_loader(self.images, batches, self.fabric.device)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        size, seed = self.run.image_size, (self.run.seed, self.state.epoch)
        images = AugmentedImages(self.source, self.recipe.augment, size, seed)
        draws = with_positions(batches, self.state.step, self.recipe.batch_size, rank, world)
        return load_images(images, draws, size, self.fabric.device, world=world)

    def load_evaluation(self, batches: list[np.ndarray]) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield batches for validation and test, given the image indices of each."""
        size, device, world = self.run.image_size, self.fabric.device, self.fabric.world_size
        if isinstance(self.images, CentralCrops):
            return load_images(self.images, batches, size, device, world=world)
        return make_loader(self.images, batches, device)

    def step_inputs(self, batch: tuple[Tensor, Tensor], seed: StepSeed) -> tuple[Tensor, ...]:
        """Images or features [B, ...], labels, and if the recipe crops, random numbers [4, B].

        Random erasing, mixup and CutMix draw on the host, so a captured step gets their results.
        """
        device, recipe = self.fabric.device, self.recipe
        images, labels = (x.to(device, non_blocking=True) for x in batch)
        if self.mixes:
            x = self.model_input(images)
            if self.source is None:
                x = augment(x, recipe.augment, seed)
            return mix_batch(x, labels, recipe, self.run.dataset.num_classes, seed)
        if self.source is not None or recipe.augment == "none":
            return images, labels
        return images, labels, draw_crops(len(labels), seed, device)

    def compute_loss(self, images: Tensor, labels: Tensor, crops: Tensor | None = None) -> Tensor:
        x = images if self.mixes else self.model_input(images)
        if crops is not None:
            x = crop_flip(x, crops)
        return training_loss(self.model(x), labels, self.recipe.label_smoothing)

    def model_input(self, batch: Tensor) -> Tensor:
        """Normalised images of a batch, or its features as they are if the front is frozen."""
        return batch if batch.ndim == 2 else to_input(batch, self.run.image_size)

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        return learning_rate(self.recipe, epoch + step / steps)

    @property
    def tested(self) -> nn.Module:
        """The module that is validated, tested and saved: the averaged weights if there are any."""
        return self.ema.module if self.ema else self.module

    def infer(self, x: Tensor) -> Tensor:
        """Logits of the tested module, in the precision of the run."""
        if self.ema is None:
            return self.model(x)
        with self.fabric.autocast():
            return self.ema.module(x)

    def end_epoch(self) -> None:
        if self.ema:
            self.ema.synchronise()
        loss, top1, _ = self.evaluate("val")
        best = self.state.best
        if best is None or top1 > best["val_top1"]:
            self.save_best_weights(self.state.epoch + 1)
        self.log_epoch(val_loss=loss, val_top1=top1)
        if self.is_save_due():
            self.save_checkpoint()

    def best_weights_path(self, epoch: float) -> Path:
        """Weights of an epoch that was the best so far.

        `weights.safetensors` is written only at the end, because Snakemake deletes the outputs of
        a killed job.
        """
        return self.folder / f"best-{epoch:.0f}.safetensors"

    def save_best_weights(self, epoch: float) -> None:
        """Save the current weights. Older ones stay until no checkpoint needs them."""
        if self.fabric.is_global_zero:
            save_weights(self.best_weights_path(epoch), self.tested, spec_hash=self.run.spec_hash)
        self.fabric.barrier()

    def delete_old_weights(self) -> None:
        best = self.state.best
        for path in self.folder.glob("best-*.safetensors"):
            if best and path != self.best_weights_path(best["epoch"]):
                path.unlink()

    def evaluate(self, split: str) -> tuple[float, float, pd.DataFrame]:
        """Return the mean loss, top-1 in percent, and one prediction per image of a split.

        Raises:
            HovitError: for a mean loss that is not finite.
        """
        predictions = self.predict(self.splits[split])
        loss, top1 = metrics(predictions)
        if not math.isfinite(loss):
            raise HovitError(
                f"run {self.run.id} seed {self.run.seed}: {split} loss is {loss} after "
                f"{len(self.state.history)} whole epochs; {self.remedy}"
            )
        return loss, top1, predictions

    @torch.inference_mode()
    def predict(self, indices: np.ndarray) -> pd.DataFrame:
        """Label, predicted class and loss of images, in the order of `indices`."""
        world, rank = self.fabric.world_size, self.fabric.global_rank
        batches = eval_batches(indices, EVAL_BATCH, rank, world)
        self.model.eval()
        if self.captured_predict:
            self.captured_predict.check_settings()
        predict_batch = self.captured_predict or self.predict_batch
        rows = []
        for batch in self.load_evaluation(batches):
            images, labels = (x.to(self.fabric.device, non_blocking=True) for x in batch)
            # The last, smaller batch would need a graph of its own.
            whole = len(labels) == len(batches[0])
            rows.append((predict_batch if whole else self.predict_batch)(images, labels))
            self.run_ahead.wait()
            if time.monotonic() > self.options.deadline and world == 1:
                self.save_checkpoint()  # raises OutOfTime
        table = self.all_gather(torch.cat(rows))[: len(indices)]  # [n, 3]
        label, predicted, loss = table.T.cpu().numpy()
        columns = {"label": label.astype(int), "predicted": predicted.astype(int), "loss": loss}
        return pd.DataFrame({"index": indices} | columns)

    def predict_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Label, predicted class and loss of each image, float64 [B, 3]."""
        logits = self.infer(self.model_input(images)).float()  # [B, classes]
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([labels.double(), logits.argmax(1).double(), losses.double()], 1)

    def finish(self) -> Record:
        best = self.state.best
        assert best is not None
        best_path = self.best_weights_path(best["epoch"])
        self.tested.load_state_dict(load_weights(best_path))
        self.set_epoch(self.recipe.epochs - 1)
        loss, top1, predictions = self.evaluate("test")
        results = {
            "top1": top1,
            "loss": loss,
            "loss_error": float(np.std(predictions["loss"]) / len(predictions) ** 0.5),
            "val_top1": best["val_top1"],
            "best_epoch": best["epoch"],
            "images_val": len(self.splits["val"]),
            "images_test": len(self.splits["test"]),
            "weights_sha256": file_digest(best_path),
            "predictions_sha256": predictions_digest(predictions),
        }
        record = self.make_record(results)
        if self.fabric.is_global_zero:
            write_predictions(self.folder / "predictions.csv.gz", predictions)
            with atomic(self.folder / "weights.safetensors") as path:
                shutil.copyfile(best_path, path)
            self.write_results(record)
        self.fabric.barrier()
        return record


def limit_splits(packed: Packed | ImageFiles, run: Run) -> dict[str, np.ndarray]:
    """Image indices of each split of a run, at most as many as the scale allows.

    Raises:
        HovitError: if a split is empty.
    """
    splits = {
        name: _limit(indices, packed.labels[indices], getattr(run.limit, name))
        for name, indices in splits_of(run, packed).items()
    }
    empty = [name for name, indices in splits.items() if not len(indices)]
    if empty:
        raise HovitError(f"{run.dataset.id}: its {empty[0]} split is empty")
    return splits


def _limit(indices: np.ndarray, labels: np.ndarray, most: int | None) -> np.ndarray:
    """The first images; of a split that is sorted by class, some of each class."""
    if most is None or most >= len(indices):
        return indices
    if (np.diff(labels) >= 0).all():
        indices = indices[stratified_order(labels)]
    return indices[:most]


def freeze_front(model: Any, run: Run) -> None:
    """Exclude the pretrained front of a model from training, but not the classifier.

    Raises:
        HovitError: if the model has no front.
    """
    if not hasattr(model, "front_features"):
        raise HovitError(f"run {run.id}: {run.model} has no front for `frozen_front` to freeze")
    model.front_module.requires_grad_(False)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)


def training_loss(logits: Tensor | tuple[Tensor, ...], y: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy, averaged over the heads of a model with several.

    Args:
        logits: [B, classes] of each head.
        y: labels, int64 [B], or probabilities [B, classes] that are smoothed already.
        smoothing: label smoothing.
    """
    heads = logits if isinstance(logits, tuple) else (logits,)
    smoothing = 0.0 if y.ndim == 2 else smoothing
    losses = [F.cross_entropy(head.float(), y, label_smoothing=smoothing) for head in heads]
    return torch.stack(losses).mean()


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Learning rate at a fractional epoch: linear warm-up, then constant or cosine to `min_lr`."""
    if epoch < recipe.warmup_epochs:
        return recipe.lr * max(epoch / recipe.warmup_epochs, 1e-3)
    if recipe.schedule == "constant":
        return recipe.lr
    span = recipe.epochs - recipe.warmup_epochs
    cosine = 0.5 * (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / span))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * cosine


def make_optimizer(model: nn.Module, recipe: Recipe, **arguments: Any) -> torch.optim.Optimizer:
    """Optimizer of the recipe; further arguments are those of the optimizer's class.

    Weight decay skips the same parameters as in timm's training: biases, norms and other vectors,
    and those that `no_weight_decay` of the model names (attention biases, position embeddings, the
    class token).
    """
    return create_optimizer_v2(model, recipe.optimizer, recipe.lr, recipe.weight_decay, **arguments)
