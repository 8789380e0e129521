"""Training an object detector on COCO.

Recipe: the downstream configuration of EfficientViT (arXiv 2305.07027, upstream file
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
from ..detection.batches import DetectionDataset, Sample, make_loader, to_input
from ..detection.coco import CocoImage, sample_images
from ..detection.dataset import CocoDataset, open_coco
from ..detection.evaluate import (
    MAX_DETECTIONS,
    detections_digest,
    evaluate,
    to_coco,
    write_detections,
)
from ..detection.model import PRETRAINED_SIZE, make_backbone, retinanet
from ..records.record import Record
from ..utils.errors import OutOfTime
from ..utils.files import file_digest
from .checkpoint import save_weights
from .pretrained import load_pretrained
from .trainer import Fabric, Options, StepSeed, Trainer

EVAL_BATCH = 16
WARMUP_START = 1e-3  # fraction of the learning rate at the first step


def train(run: Run, fabric: Fabric, root: Path = Path(), options: Options | None = None) -> Record:
    """Train one run and evaluate its last weights; write record, weights, history, detections.

    Args:
        run: the run; its recipe has `detection`.
        fabric: a launched Fabric; it sets device, precision and processes.
        root: top folder of the artifact.
        options: deadline, checkpoints and progress.

    Returns:
        The record, also written to `run.folder`.

    Raises:
        HovitError: for missing or damaged data or weights, a loss that is not finite, or if another
            process trains the same run.
        OutOfTime: at the deadline. The same call resumes.
    """
    return DetectionTrainer.run_to_record(run, fabric, root, options)


class DetectionTrainer(Trainer):
    """Evaluates once, with the weights of the last epoch."""

    fixed_shapes = False

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        super().__init__(run, fabric, root, options)
        assert run.recipe.detection is not None
        self.detection = run.recipe.detection
        self.coco = open_coco(run.pack, root / run.pack.folder)
        self.meta = self.coco.meta
        self.train_images, self.test_images = limit_images(self.coco, run)
        self.indices = np.arange(len(self.train_images))
        torch.manual_seed(run.seed)
        body = make_backbone(run.model, **run.model_args)
        if run.weights:
            given = make_backbone(run.model, PRETRAINED_SIZE, **run.model_args)
            self.pretrained_sha256 = load_pretrained(
                given, run, root, options.weights_file, PRETRAINED_SIZE
            )
            body.load_resized(given.state_dict())
        sides = (run.image_size, self.detection.long_side)
        model = retinanet(
            body, run.dataset.num_classes, *sides, self.detection.channels,
            frozen_norms=run.weights is not None,
        )  # fmt: skip
        self.setup(model, make_optimizer)

    def load_batches(self, batches: list[np.ndarray]) -> Iterable[Sequence[Sample]]:
        seed = (self.run.seed, self.state.epoch)
        images = DetectionDataset(self.train_images, self.detection.flip, seed)
        return make_loader(images, batches, self.fabric.device)

    def step_inputs(self, batch: Sequence[Sample], seed: StepSeed) -> tuple[list[Any], list[Any]]:
        device = self.fabric.device
        images = [to_input(image, device) for image, _ in batch]
        targets = [
            {key: t.to(device, non_blocking=True) for key, t in target.items()}
            for _, target in batch
        ]
        return images, targets

    def compute_loss(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack(list(self.model(images, targets).values())).sum()

    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        return learning_rate(self.recipe, epoch, step, steps)

    def end_epoch(self) -> None:
        self.log_epoch()
        self.save_checkpoint()

    @torch.inference_mode()
    def detect(self) -> list[dict[str, Any]]:
        """Detections in the evaluation set, in COCO's results format, image by image."""
        world, rank = self.fabric.world_size, self.fabric.global_rank
        batches = eval_batches(np.arange(len(self.test_images)), EVAL_BATCH, rank, world)
        loader = make_loader(DetectionDataset(self.test_images), batches, self.fabric.device)
        self.model.eval()
        tables = []
        for batch in loader:
            outputs = self.model([to_input(image, self.fabric.device) for image, _ in batch])
            tables += [pad_detections(output) for output in outputs]
            if time.monotonic() > self.options.deadline and world == 1:
                raise OutOfTime  # the last epoch ended with a checkpoint
        gathered = self.all_gather(torch.stack(tables))[: len(self.test_images)]  # [n, 100, 6]
        pairs = zip(self.test_images, gathered.double().cpu().numpy(), strict=True)
        categories = self.coco.test.categories
        return [line for image, table in pairs for line in to_coco(image, table, categories)]

    def finish(self) -> Record:
        detections = self.detect()
        precision = evaluate(self.coco.test, detections, [image.id for image in self.test_images])
        weights = self.folder / "weights.safetensors"
        if self.fabric.is_global_zero:
            save_weights(weights, self.module, spec_hash=self.run.spec_hash)
        self.fabric.barrier()
        results = precision | {
            "images_val": 0,
            "images_test": len(self.test_images),
            "weights_sha256": file_digest(weights),
            "detections": len(detections),
            "detections_sha256": detections_digest(detections),
            "annotations_sha256": self.coco.annotations_sha256,
        }
        record = self.make_record(results)
        if self.fabric.is_global_zero:
            write_detections(self.folder / DETECTIONS, detections)
            self.write_results(record)
        self.fabric.barrier()
        return record


def limit_images(coco: CocoDataset, run: Run) -> tuple[list[CocoImage], list[CocoImage]]:
    """Training and test images: a seeded sample of at most as many as the scale allows."""
    seed, limit = run.dataset.split.seed, run.limit
    return (
        sample_images(coco.train, limit.train, seed),
        sample_images(coco.test.images, limit.test, seed),
    )


def learning_rate(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """Learning rate at a step: linear warm-up, then a tenth after each milestone.

    Args:
        recipe: its `detection` has milestones and warm-up.
        epoch, step: counted from 0.
        steps: steps per epoch.
    """
    assert recipe.detection is not None
    passed = sum(epoch + step / steps >= each for each in recipe.detection.milestones)
    rate = recipe.lr * 0.1**passed
    warmup, done = recipe.detection.warmup_steps, epoch * steps + step
    if done < warmup:
        rate *= WARMUP_START + (1 - WARMUP_START) * done / warmup
    return rate


def make_optimizer(model: nn.Module, recipe: Recipe, **arguments: Any) -> torch.optim.Optimizer:
    """Optimizer of the recipe. Weight decay skips only the attention biases."""
    groups = param_groups_weight_decay(
        model, recipe.weight_decay, weight_decay_exclude_1d=False,
        no_weight_decay_list=["*attention_biases"],
    )  # fmt: skip
    return create_optimizer_v2(groups, recipe.optimizer, recipe.lr, **arguments)


def pad_detections(output: dict[str, Tensor]) -> Tensor:
    """Detections of one image as float [100, 6]: box, label, score; unused rows are NaN."""
    table = torch.full((MAX_DETECTIONS, 6), torch.nan, device=output["boxes"].device)
    columns = [output["boxes"], output["labels"][:, None], output["scores"][:, None]]
    rows = torch.cat(columns, dim=1)  # [n, 6]
    table[: len(rows)] = rows.float()
    return table
