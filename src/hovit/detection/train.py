"""Training a detector: one run from its first batch to its record, however often it is killed.

Recipe: EfficientViT's downstream configuration (arXiv 2305.07027, upstream's
retinanet_efficientvit_m4_fpn_1x_coco). As in `hovit.training.loop`, every random choice is drawn
from (seed, epoch, step), so a continued run ends with the same weights, on a CPU to the bit.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ..catalogue import Recipe
from ..data.loader import epoch_batches, eval_batches, step_seed
from ..device import describe_device, peak_memory_mb
from ..errors import HovitError, OutOfTime
from ..files import alone, file_digest, write_text
from ..plan import DETECTIONS, Run
from ..records import Record, make_provenance, write_record
from ..training.checkpoint import load_state, save_state, save_weights
from ..training.loop import CHECK_EVERY, Options
from ..training.weights import load_pretrained
from .batches import Sample, Samples, load, to_input
from .coco import Picture, drawn
from .evaluate import MOST, detections_digest, evaluate, to_coco, write_detections
from .folder import Coco, open_coco
from .model import make_backbone, retinanet

EVAL_BATCH = 16
WARMUP_FROM = 1e-3  # of the learning rate, at the first step


def train(run: Run, fabric: Any, root: Path = Path(), options: Options | None = None) -> Record:
    """Train one run and evaluate its last weights; leave record, weights, history, detections.

    Args:
        run: what to train; its recipe has `detection`.
        fabric: launched, with device, precision and processes set.
        root: top of the artifact.
        options: how.

    Returns:
        The record, also written to `run.folder`.

    Raises:
        HovitError: for missing or damaged data or weights, a loss that is not finite, or if another
            process trains this very run.
        OutOfTime: at the deadline; the same call continues.
    """
    with alone(root / run.folder) if fabric.is_global_zero else nullcontext():
        job = _Job(run, fabric, root, options or Options())
        job.fit()
        return job.finish()


class _Job:
    """One run under way."""

    def __init__(self, run: Run, fabric: Any, root: Path, options: Options) -> None:
        assert run.recipe.detection is not None
        self.run, self.fabric, self.options = run, fabric, options
        self.recipe, self.detection = run.recipe, run.recipe.detection
        self.folder = root / run.folder
        self.started = self.saved = time.monotonic()
        self.coco = open_coco(run.pack, root / run.pack.folder)
        self.learned, self.tested = limited(self.coco, run)
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)

        torch.manual_seed(run.seed)
        body = make_backbone(run.model, **run.model_args)
        self.started_from = ""
        if run.weights:
            self.started_from = load_pretrained(body, run, root, options.weights_file)
        sides = (run.image_size, self.detection.long_side)
        model = retinanet(body, run.dataset.num_classes, *sides, self.detection.channels)
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            model = convert_sync_batchnorm(model)
        self.module = model
        self.model, self.optimizer = fabric.setup(model, make_optimizer(model, self.recipe))
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        made_by = [run.spec_hash, run.code, self.coco.meta["fingerprint"], self.started_from]
        self.state = load_state(self.place, made_by, model, self.optimizer, self.scaler)

    @property
    def place(self) -> Path:
        """Of the checkpoint."""
        return self.folder / "state.safetensors"

    def fit(self) -> None:
        """All epochs that are still to do."""
        while self.state.epoch < self.recipe.epochs:
            self.train_epoch()
            self.end_epoch()

    def train_epoch(self) -> None:
        """The batches of this epoch that are still to do."""
        epoch, seed = self.state.epoch, self.run.seed
        rank, world = self.fabric.global_rank, self.fabric.world_size
        every = np.arange(len(self.learned))
        batches = epoch_batches(every, self.recipe.batch_size, seed, epoch, rank, world)
        samples = Samples(self.learned, self.detection.flip, (seed, epoch))
        loader = load(samples, batches[self.state.step :], self.fabric.device)
        self.model.train()
        recent: list[Tensor] = []
        for step, batch in enumerate(loader, start=self.state.step):
            torch.manual_seed(step_seed((seed, epoch, step, rank)))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, epoch, step, len(batches))
            recent.append(self.train_step(batch))
            look = len(recent) >= CHECK_EVERY or step + 1 == len(batches)
            # With several processes all must agree that it is time; they ask each other seldom.
            due = self.is_due() if look or world == 1 else False
            if look or due:
                self.keep(recent)
                recent = []
            if due:
                self.save()
            self.options.on_step(epoch, step + 1, len(batches))

    def train_step(self, batch: Sequence[Sample]) -> Tensor:
        """One step of the optimizer; its loss, still on the device."""
        device = self.fabric.device
        images = [to_input(image, device) for image, _ in batch]
        targets = [{key: t.to(device) for key, t in target.items()} for _, target in batch]
        loss = torch.stack(list(self.model(images, targets).values())).sum()
        self.fabric.backward(loss)
        if norm := self.recipe.clip_norm:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def keep(self, recent: list[Tensor]) -> None:
        """Take the last losses off the device; one that is not finite ends the run."""
        values = self.fabric.all_reduce(torch.stack(recent).double(), reduce_op="mean").tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise HovitError(
                    f"run {self.run.id} seed {self.run.seed}: loss is {value} at epoch "
                    f"{self.state.epoch + 1}, step {self.state.step + offset + 1}; lower lr, or "
                    "use 32-true"
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
            save_state(self.place, self.state, self.module, self.optimizer, self.scaler)
        self.fabric.barrier()
        self.saved = time.monotonic()
        if self.saved > self.options.deadline:
            raise OutOfTime

    def end_epoch(self) -> None:
        """Note the epoch, and save."""
        entry = {"epoch": self.state.epoch + 1, "train_loss": float(np.mean(self.state.losses))}
        self.state.history.append(entry)
        self.state.epoch += 1
        self.state.step, self.state.losses = 0, []
        self.options.on_epoch(entry)
        self.save()

    def detect(self) -> list[dict[str, Any]]:
        """What is found in the evaluation set, in COCO's results format, image by image."""
        world, rank = self.fabric.world_size, self.fabric.global_rank
        batches = eval_batches(np.arange(len(self.tested)), EVAL_BATCH, rank, world)
        loader = load(Samples(self.tested), batches, self.fabric.device)
        self.model.eval()
        found = []
        with torch.inference_mode():
            for batch in loader:
                outputs = self.model([to_input(image, self.fabric.device) for image, _ in batch])
                found += [fixed(output) for output in outputs]
                if time.monotonic() > self.options.deadline and world == 1:
                    raise OutOfTime  # the last epoch's end is saved
        mine = torch.stack(found)  # [n / world, 100, 6]
        if world > 1:
            every = self.fabric.all_gather(mine)  # [world, n / world, 100, 6]
            mine = every.transpose(0, 1).flatten(0, 1)
        tables = mine[: len(self.tested)].double().cpu().numpy()
        pairs = zip(self.tested, tables, strict=True)
        categories = self.coco.test.categories
        return [line for picture, table in pairs for line in to_coco(picture, table, categories)]

    def finish(self) -> Record:
        """Evaluate the last weights, and write the record."""
        detections = self.detect()
        precision = evaluate(self.coco.test, detections, [picture.id for picture in self.tested])
        weights = self.folder / "weights.safetensors"
        if self.fabric.is_global_zero:
            save_weights(weights, self.module, spec_hash=self.run.spec_hash)
        self.fabric.barrier()
        seconds = self.state.seconds + time.monotonic() - self.started
        results = precision | {
            "epochs": len(self.state.history),
            "images_train": len(self.learned),
            "images_val": 0,
            "images_test": len(self.tested),
            "interruptions": self.state.interruptions,
            "processes": self.fabric.world_size,
            "started_from_sha256": self.started_from,
            "weights_sha256": file_digest(weights),
            "history": self.state.history,
            "detections": len(detections),
            "detections_sha256": detections_digest(detections),
            "annotations_sha256": self.coco.annotations_sha256,
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
                self.run.code,
                self.coco.meta,
            ),
        )
        if self.fabric.is_global_zero:
            write_detections(self.folder / DETECTIONS, detections)
            history = pd.DataFrame(self.state.history)
            write_text(self.folder / "history.csv", history.to_csv(index=False))
            write_record(self.folder / "record.json", record)
            for leftover in (self.place, *self.folder.glob(".*")):
                leftover.unlink(missing_ok=True)
        self.fabric.barrier()
        return record


def limited(coco: Coco, run: Run) -> tuple[list[Picture], list[Picture]]:
    """The images to learn from and those to test on, cut to the scale's limits by a seeded draw."""
    seed, most = run.dataset.split.seed, run.limit
    return drawn(coco.train, most.train, seed), drawn(coco.test.pictures, most.test, seed)


def learning_rate(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """The learning rate at a step: a tenth after each milestone; a linear warm-up at first.

    Args:
        epoch, step: from 0.
        steps: of an epoch.
    """
    assert recipe.detection is not None
    passed = sum(epoch + step / steps >= each for each in recipe.detection.milestones)
    rate = recipe.lr * 0.1**passed
    warmup, done = recipe.detection.warmup_steps, epoch * steps + step
    if done < warmup:
        rate *= WARMUP_FROM + (1 - WARMUP_FROM) * done / warmup
    return rate


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay spares attention's biases, and nothing else."""
    spared = {name: name.endswith("attention_biases") for name, _ in model.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in model.named_parameters() if spared[name] == bias],
         "weight_decay": 0.0 if bias else recipe.weight_decay}
        for bias in (False, True)
    ]  # fmt: skip
    kinds: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, momentum=0.9),
    }
    return kinds[recipe.optimizer](groups, lr=recipe.lr)


def fixed(output: dict[str, Tensor]) -> Tensor:
    """One image's detections as float [100, 6]: box, label, score; NaN where there are fewer."""
    table = torch.full((MOST, 6), torch.nan, device=output["boxes"].device)
    lines = torch.cat(
        [output["boxes"], output["labels"][:, None], output["scores"][:, None]], dim=1
    )
    table[: len(lines)] = lines.float()
    return table
