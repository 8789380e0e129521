"""Training a detector: COCO's images and boxes in; weights, detections and a record out.

Recipe: EfficientViT's downstream configuration (arXiv 2305.07027, upstream's
retinanet_efficientvit_m4_fpn_1x_coco).
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor, nn

from ..config.runs import DETECTIONS, Run
from ..config.schema import Recipe
from ..data.loader import eval_batches
from ..detection.batches import Sample, Samples, load, to_input
from ..detection.coco import Picture, drawn
from ..detection.evaluate import MOST, detections_digest, evaluate, to_coco, write_detections
from ..detection.folder import Coco, open_coco
from ..detection.model import make_backbone, retinanet
from ..records.record import Record
from ..utils.errors import OutOfTime
from ..utils.files import file_digest
from .checkpoint import save_weights
from .pretrained import load_pretrained
from .trainer import Fabric, Job, Options, Seed

EVAL_BATCH = 16
WARMUP_FROM = 1e-3  # of the learning rate, at the first step


def train(run: Run, fabric: Fabric, root: Path = Path(), options: Options | None = None) -> Record:
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
    return Detection.train(run, fabric, root, options)


class Detection(Job):
    """A detector's run: evaluated once, with its last weights."""

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        super().__init__(run, fabric, root, options)
        assert run.recipe.detection is not None
        self.detection = run.recipe.detection
        self.coco = open_coco(run.pack, root / run.pack.folder)
        self.meta = self.coco.meta
        self.learned, self.tested = limited(self.coco, run)
        self.indices = np.arange(len(self.learned))
        torch.manual_seed(run.seed)
        body = make_backbone(run.model, **run.model_args)
        if run.weights:
            self.started_from = load_pretrained(body, run, root, options.weights_file)
        sides = (run.image_size, self.detection.long_side)
        model = retinanet(body, run.dataset.num_classes, *sides, self.detection.channels)
        self.begin(model, make_optimizer)

    def load(self, batches: list[np.ndarray]) -> Iterable[Sequence[Sample]]:
        flips = (self.run.seed, self.state.epoch)
        samples = Samples(self.learned, self.detection.flip, flips)
        return load(samples, batches, self.fabric.device)

    def loss(self, batch: Sequence[Sample], seed: Seed) -> Tensor:
        device = self.fabric.device
        images = [to_input(image, device) for image, _ in batch]
        targets = [{key: t.to(device) for key, t in target.items()} for _, target in batch]
        return torch.stack(list(self.model(images, targets).values())).sum()

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        return learning_rate(self.recipe, epoch, step, steps)

    def end_epoch(self) -> None:
        self.note_epoch()
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
        every = self.gathered(torch.stack(found))  # [n, 100, 6]
        tables = every[: len(self.tested)].double().cpu().numpy()
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
        results = precision | {
            "images_val": 0,
            "images_test": len(self.tested),
            "weights_sha256": file_digest(weights),
            "detections": len(detections),
            "detections_sha256": detections_digest(detections),
            "annotations_sha256": self.coco.annotations_sha256,
        }
        record = self.record(results)
        if self.fabric.is_global_zero:
            write_detections(self.folder / DETECTIONS, detections)
            self.leave(record)
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
    groups = param_groups_weight_decay(
        model, recipe.weight_decay, weight_decay_exclude_1d=False,
        no_weight_decay_list=["*attention_biases"],
    )  # fmt: skip
    return create_optimizer_v2(groups, recipe.optimizer, recipe.lr)


def fixed(output: dict[str, Tensor]) -> Tensor:
    """One image's detections as float [100, 6]: box, label, score; NaN where there are fewer."""
    table = torch.full((MOST, 6), torch.nan, device=output["boxes"].device)
    lines = torch.cat(
        [output["boxes"], output["labels"][:, None], output["scores"][:, None]], dim=1
    )
    table[: len(lines)] = lines.float()
    return table
