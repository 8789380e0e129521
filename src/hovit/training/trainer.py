"""What a run is, whatever it learns: its steps, its checkpoints and its record.

Every random choice of a step is drawn from (seed, epoch, step). So a run that is continued from its
last checkpoint ends, on a CPU with the same number of threads, with the same metrics to the bit.
"""

import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # the same code, inside the larger package
    from lightning.fabric import Fabric  # type: ignore[no-redef]

from ..config.runs import Run
from ..config.schema import Recipe
from ..config.tasks import TrainTask
from ..data.loader import epoch_batches, step_seed
from ..records.record import Record, write_record
from ..utils.device import describe_device, peak_memory_mb, pick_device
from ..utils.errors import HovitError, OutOfTime
from ..utils.files import alone, write_text
from .checkpoint import load_state, save_state

CHECK_EVERY = 20  # steps between looks at the loss: each look waits for the device
Seed = tuple[int, int, int, int]  # of a step: the run's, epoch, step, rank
MakeOptimizer = Callable[[nn.Module, Recipe], torch.optim.Optimizer]


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


class Job(ABC):
    """One run under way.

    A kind of run sets `indices` and `meta`, makes its model and calls `begin`; the abstract methods
    say what it learns.
    """

    indices: np.ndarray  # of the images to learn from
    meta: dict[str, Any]  # of its pack

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        self.run, self.fabric, self.options = run, fabric, options
        self.task = TrainTask(run)
        self.recipe = run.recipe
        self.folder = root / run.folder
        self.started_from = ""
        self.started = self.saved = time.monotonic()
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)

    @classmethod
    def train(cls, run: Run, fabric: Fabric, root: Path, options: Options | None) -> Record:
        """From where the run stands to its record."""
        with alone(root / run.folder) if fabric.is_global_zero else nullcontext():
            job = cls(run, fabric, root, options or Options())
            job.fit()
            return job.finish()

    @abstractmethod
    def load(self, batches: list[np.ndarray]) -> Iterable[Any]:
        """This epoch's batches, by the indices of their images."""

    @abstractmethod
    def loss(self, batch: Any, seed: Seed) -> Tensor:
        """A batch's loss, on the device."""

    @abstractmethod
    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate at a step of so many in an epoch."""

    @abstractmethod
    def end_epoch(self) -> None:
        """Note the epoch, and save if it is time."""

    @abstractmethod
    def finish(self) -> Record:
        """Evaluate, and leave the record."""

    @property
    def place(self) -> Path:
        """Of the checkpoint."""
        return self.folder / "state.safetensors"

    def begin(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Put the model on its device, and go on from the checkpoint if there is one."""
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            model = convert_sync_batchnorm(model)  # statistics over all cards' images
        self.module = model
        self.model, self.optimizer = self.fabric.setup(model, make_optimizer(model, self.recipe))
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        made_by = [self.run.spec_hash, self.task.code, self.meta["fingerprint"], self.started_from]
        self.state = load_state(self.place, made_by, model, self.optimizer, self.scaler)

    def tell_epoch(self, epoch: int) -> None:
        """Tell a model that has a warm-up of its own (SkipViT) which epoch begins."""
        if set_epoch := getattr(self.module, "set_epoch", None):
            set_epoch(epoch, self.recipe.epochs)

    def fit(self) -> None:
        """All epochs that are still to do."""
        while self.state.epoch < self.recipe.epochs:
            self.train_epoch()
            self.end_epoch()

    def train_epoch(self) -> None:
        """The batches of this epoch that are still to do."""
        epoch, seed = self.state.epoch, self.run.seed
        rank, world = self.fabric.global_rank, self.fabric.world_size
        batches = epoch_batches(self.indices, self.recipe.batch_size, seed, epoch, rank, world)
        loader = self.load(batches[self.state.step :])
        self.tell_epoch(epoch)
        self.model.train()
        recent: list[Tensor] = []
        for step, batch in enumerate(loader, start=self.state.step):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(epoch, step, len(batches))
            recent.append(self.train_step(batch, (seed, epoch, step, rank)))
            look = len(recent) >= CHECK_EVERY or step + 1 == len(batches)
            # With several processes all must agree that it is time; they ask each other seldom.
            due = self.is_due() if look or world == 1 else False
            if look or due:
                self.keep(recent)
                recent = []
            if due:
                self.save()
            self.options.on_step(epoch, step + 1, len(batches))

    def train_step(self, batch: Any, seed: Seed) -> Tensor:
        """One step of the optimizer; its loss, still on the device."""
        torch.manual_seed(step_seed(seed))  # dropout
        loss = self.loss(batch, seed)
        self.fabric.backward(loss)
        if norm := self.recipe.clip_norm:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

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
            save_state(self.place, self.state, self.module, self.optimizer, self.scaler)
            self.tidy()
        self.fabric.barrier()
        self.saved = time.monotonic()
        if self.saved > self.options.deadline:
            raise OutOfTime

    def tidy(self) -> None:  # noqa: B027 - not every run has something
        """Delete what the checkpoint just saved no longer needs."""

    def note_epoch(self, **more: float) -> None:
        """Add the epoch that ends to the history."""
        losses = float(np.mean(self.state.losses))
        entry = {"epoch": self.state.epoch + 1, "train_loss": losses} | more
        self.state.history.append(entry)
        self.state.epoch += 1
        self.state.step, self.state.losses = 0, []
        self.options.on_epoch(entry)

    def gathered(self, mine: Tensor) -> Tensor:
        """[n / world, ...] of each process -> [n, ...] in the order of `eval_batches`."""
        if self.fabric.world_size == 1:
            return mine
        every: Any = self.fabric.all_gather(mine)  # [world, n / world, ...]
        return every.transpose(0, 1).flatten(0, 1)

    def record(self, results: dict[str, Any]) -> Record:
        """What a record says of any run, and these results."""
        shared = {
            "epochs": len(self.state.history),
            "images_train": len(self.indices),
            "interruptions": self.state.interruptions,
            "processes": self.fabric.world_size,
            "started_from_sha256": self.started_from,
            "history": self.state.history,
        }
        device = self.fabric.device
        seconds = self.state.seconds + time.monotonic() - self.started
        return self.task.make_record(
            results | shared, describe_device(device), seconds, peak_memory_mb(device), self.meta
        )

    def leave(self, record: Record) -> None:
        """Write history and record, last of all; delete what there was to go on from."""
        history = pd.DataFrame(self.state.history)
        write_text(self.folder / "history.csv", history.to_csv(index=False))
        write_record(self.folder / "record.json", record)
        # And of a process killed while it wrote.
        for pattern in (self.place.name, "best-*.safetensors", ".*"):
            for leftover in self.folder.glob(pattern):
                leftover.unlink()


def make_fabric(precision: str, accelerator: str = "auto") -> Fabric:
    """Fabric for one machine, launched; under torchrun it takes rank and world from there.

    Models with weights that nothing reads (the deck's dead kv) need DDP to look for them.

    Raises:
        HovitError: for an accelerator that is not here.
    """
    accelerator = pick_device(accelerator).type
    # Where Slurm is installed Fabric advises srun; profiles/slurm is how runs get there.
    warnings.filterwarnings("ignore", "The `srun` command is available")
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
