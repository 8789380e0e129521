"""Resumable training loop, independent of the task.

All random choices of a step are drawn from (seed, epoch, step). A run that resumes from its last
checkpoint therefore ends with bit-identical metrics, on a CPU with the same number of threads.
"""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
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
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
except ModuleNotFoundError:  # the same code, packaged with the rest of Lightning
    from lightning.fabric import Fabric  # type: ignore[no-redef]
    from lightning.fabric.plugins.environments import (  # type: ignore[no-redef]
        LightningEnvironment,
        TorchElasticEnvironment,
    )

from ..config.runs import Run
from ..config.schema import Recipe
from ..config.tasks import TrainTask
from ..data.loader import epoch_batches, step_seed
from ..records.record import Record, write_record
from ..utils.device import describe_device, peak_memory_mb, pick_device
from ..utils.errors import HovitError, OutOfTime, one_line
from ..utils.files import alone, write_text
from .averaged import average_weights, clip_adaptively
from .checkpoint import load_state, save_state

LOG_EVERY = 20  # steps between reads of the loss, because each read waits for the device
StepSeed = tuple[int, int, int, int]  # (run seed, epoch, step, rank)
MakeOptimizer = Callable[[nn.Module, Recipe], torch.optim.Optimizer]


@dataclass
class Options:
    """How a run is executed. Nothing here changes the result on a CPU.

    Args:
        deadline: `time.monotonic()` after which the run saves a checkpoint and stops.
        save_seconds: time between checkpoints. The last epoch always ends with one.
        weights_file: value of `--weights`.
        on_step: called with (epoch, step, steps) after each batch.
        on_epoch: called with the history entry of each finished epoch.
    """

    deadline: float = math.inf
    save_seconds: float = 60.0
    weights_file: Path | None = None
    on_step: Callable[[int, int, int], None] = lambda *_: None
    on_epoch: Callable[[dict[str, float]], None] = lambda *_: None


class Trainer(ABC):
    """Trains one run.

    A subclass sets `indices` and `meta`, builds its model and calls `setup`. The abstract methods
    define the task.
    """

    indices: np.ndarray  # int64 [n], the training images
    meta: dict[str, Any]  # pack.json

    @classmethod
    def run_to_record(
        cls, run: Run, fabric: Fabric, root: Path, options: Options | None = None
    ) -> Record:
        """Train a run from scratch or from its checkpoint, and return its record."""
        with _lock(fabric, root / run.folder):
            trainer = cls(run, fabric, root, options or Options())
            trainer.fit()
            return trainer.finish()

    def __init__(self, run: Run, fabric: Fabric, root: Path, options: Options) -> None:
        self.run, self.fabric, self.options = run, fabric, options
        self.task = TrainTask(run)
        self.recipe = run.recipe
        self.folder = root / run.folder
        self.checkpoint_path = self.folder / "state.safetensors"
        self.pretrained_sha256 = ""
        self.started = self.last_saved = time.monotonic()
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)

    @abstractmethod
    def load_batches(self, batches: list[np.ndarray]) -> Iterable[Any]:
        """Yield batches of this epoch, given the image indices of each."""

    @abstractmethod
    def compute_loss(self, batch: Any, seed: StepSeed) -> Tensor:
        """Forward one batch and return its scalar loss on the device."""

    @abstractmethod
    def learning_rate(self, epoch: int, step: int, steps: int) -> float:
        """Learning rate at a step of an epoch that has `steps` steps."""

    @abstractmethod
    def end_epoch(self) -> None:
        """Validate if the task does, add the epoch to the history, save a checkpoint if due."""

    @abstractmethod
    def finish(self) -> Record:
        """Evaluate the final weights, then write the results."""

    def setup(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Move the model to its device and restore the checkpoint if there is one."""
        world = self.fabric.world_size
        if world > 1 and self.fabric.device.type == "cuda":
            model = convert_sync_batchnorm(model)  # statistics over the images of all GPUs
        elif world > 1:
            check_batch_norm(model, self.recipe.batch_size, world)
        self.module = model
        self.model, self.optimizer = self.fabric.setup(model, make_optimizer(model, self.recipe))
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.ema = average_weights(model, self.recipe.ema_decay)
        fingerprint = self.meta["fingerprint"]
        made_by = [self.run.spec_hash, self.task.code, fingerprint, self.pretrained_sha256]
        self.state = load_state(
            self.checkpoint_path, made_by, model, self.optimizer, self.scaler, self.ema
        )

    def fit(self) -> None:
        """Train the remaining epochs."""
        while self.state.epoch < self.recipe.epochs:
            self.train_epoch()
            self.end_epoch()

    def train_epoch(self) -> None:
        """Train the remaining batches of the current epoch."""
        epoch, seed = self.state.epoch, self.run.seed
        rank, world = self.fabric.global_rank, self.fabric.world_size
        size, repeats = self.recipe.batch_size, self.recipe.repeats
        batches = epoch_batches(self.indices, size, seed, epoch, rank, world, repeats)
        loader = self.load_batches(batches[self.state.step :])
        self.set_epoch(epoch)
        self.model.train()
        losses: list[Tensor] = []  # of the steps since the last read
        for step, batch in enumerate(loader, start=self.state.step):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(epoch, step, len(batches))
            losses.append(self.train_step(batch, (seed, epoch, step, rank)))
            read = len(losses) >= LOG_EVERY or step + 1 == len(batches)
            # Processes must agree to save, and agreeing costs a broadcast: they do it seldom.
            save = self.is_save_due() if read or world == 1 else False
            if read or save:
                self.log_losses(losses)
                losses = []
            if save:
                self.save_checkpoint()
            self.options.on_step(epoch, step + 1, len(batches))

    def train_step(self, batch: Any, seed: StepSeed) -> Tensor:
        """Do one optimizer step and return its loss, still on the device."""
        torch.manual_seed(step_seed(seed))  # dropout
        loss = self.compute_loss(batch, seed)
        self.fabric.backward(loss)
        if norm := self.recipe.clip_norm:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=norm)
        if factor := self.recipe.agc:
            clip_adaptively(self.fabric, self.module, self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.module)
        return loss.detach()

    def log_losses(self, losses: list[Tensor]) -> None:
        """Average losses over processes and add them to the state.

        Raises:
            HovitError: for a loss that is not finite.
        """
        mean: Any = self.fabric.all_reduce(torch.stack(losses).double(), reduce_op="mean")
        values = mean.tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                step = self.state.step + offset + 1
                raise HovitError(
                    f"run {self.run.id} seed {self.run.seed}: loss is {value} at epoch "
                    f"{self.state.epoch + 1}, step {step}; lower lr, or use 32-true"
                )
        self.state.losses += values
        self.state.step += len(values)

    def log_epoch(self, **metrics: float) -> None:
        """Add the current epoch to the history and start the next one."""
        train_loss = float(np.mean(self.state.losses))
        entry = {"epoch": self.state.epoch + 1, "train_loss": train_loss} | metrics
        self.state.history.append(entry)
        self.state.epoch += 1
        self.state.step, self.state.losses = 0, []
        self.options.on_epoch(entry)

    def is_save_due(self) -> bool:
        """Whether `save_seconds` have passed since the last checkpoint, or the deadline has."""
        now = time.monotonic()
        due = now - self.last_saved > self.options.save_seconds or now > self.options.deadline
        return bool(self.fabric.broadcast(due)) if self.fabric.world_size > 1 else due

    def save_checkpoint(self) -> None:
        """Save a checkpoint.

        Raises:
            OutOfTime: after saving, if the deadline has passed.
        """
        now = time.monotonic()
        self.state.seconds += now - self.started
        self.started = now
        if self.fabric.is_global_zero:
            path, model = self.checkpoint_path, self.module
            save_state(path, self.state, model, self.optimizer, self.scaler, self.ema)
            self.delete_old_weights()
        self.fabric.barrier()
        self.last_saved = time.monotonic()
        if self.last_saved > self.options.deadline:
            raise OutOfTime

    def delete_old_weights(self) -> None:  # noqa: B027 - optional
        """Delete weights that the checkpoint just saved does not need."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to a model that has its own warm-up, as SkipViT does."""
        if set_epoch := getattr(self.module, "set_epoch", None):
            set_epoch(epoch, self.recipe.epochs)

    def all_gather(self, rows: Tensor) -> Tensor:
        """[n / world, ...] on each process -> [n, ...] in the order of `eval_batches`."""
        if self.fabric.world_size == 1:
            return rows
        gathered: Any = self.fabric.all_gather(rows)  # [world, n / world, ...]
        return gathered.transpose(0, 1).flatten(0, 1)

    def make_record(self, results: dict[str, Any]) -> Record:
        """Record of these results and of what every training run reports."""
        shared = {
            "epochs": len(self.state.history),
            "images_train": len(self.indices),
            "interruptions": self.state.interruptions,
            "processes": self.fabric.world_size,
            "started_from_sha256": self.pretrained_sha256,
            "history": self.state.history,
        }
        device = self.fabric.device
        seconds = self.state.seconds + time.monotonic() - self.started
        return self.task.make_record(
            results | shared, describe_device(device), seconds, peak_memory_mb(device), self.meta
        )

    def write_results(self, record: Record) -> None:
        """Write history and record, then delete the checkpoint and temporary files."""
        history = pd.DataFrame(self.state.history)
        write_text(self.folder / "history.csv", history.to_csv(index=False))
        write_record(self.folder / "record.json", record)
        # Hidden files are left by processes that were killed while they wrote.
        for pattern in (self.checkpoint_path.name, "best-*.safetensors", ".*"):
            for path in self.folder.glob(pattern):
                path.unlink()


@contextmanager
def _lock(fabric: Fabric, folder: Path) -> Iterator[None]:
    """Let the first process lock the folder of a run.

    Raises:
        HovitError: in all processes, if another process trains the run.
    """
    with ExitStack() as stack:
        problem = ""
        if fabric.is_global_zero:
            try:
                stack.enter_context(alone(folder))
            except HovitError as error:
                problem = str(error)
        if fabric.world_size > 1:
            problem = fabric.broadcast(problem)
        if problem:
            raise HovitError(problem)
        yield


def check_batch_norm(model: nn.Module, batch_size: int, world: int) -> None:
    """Refuse batches that give BatchNorm a single image per process.

    Raises:
        HovitError: if the model has BatchNorm and `world` processes get one image each.
    """
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and batch_size // world < 2:
        raise HovitError(
            f"{world} processes get one image each of a batch of {batch_size}, but BatchNorm needs "
            "two; use fewer processes or a larger batch"
        )


def make_fabric(precision: str, accelerator: str = "auto") -> Fabric:
    """Launch Fabric on one machine: one process, or those of torchrun or srun.

    DDP looks for unused parameters, because some models have weights that the forward pass does
    not use (the dead kv weights in the deck).

    Raises:
        HovitError: for an accelerator that this machine does not have, more than one machine, or
            more processes than GPUs.
    """
    accelerator = pick_device(accelerator).type
    processes = _launched_processes()
    for name in [name for name in os.environ if name.startswith("LT_")]:
        del os.environ[name]  # Lightning's own launcher overrides the arguments below
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=processes,
            strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
            # Named, because Fabric takes one process for many in a Slurm allocation without srun.
            plugins=TorchElasticEnvironment() if processes > 1 else LightningEnvironment(),
            precision=precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    except Exception as error:  # Fabric raises errors of many types
        raise HovitError(
            f"cannot start {processes} process(es) on {accelerator}: {one_line(error)}"
        ) from None
    return fabric


def _launched_processes() -> int:
    """Number of processes that torchrun or srun started; 1 for any other launch.

    Variables of an allocation (SLURM_NTASKS) and strays (WORLD_SIZE, LOCAL_RANK) do not count.

    Raises:
        HovitError: if the processes are on more than one machine.
    """
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "TORCHELASTIC_RUN_ID" in env:
        world, local = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    elif tasks > 1 and {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"} <= env.keys():
        world = tasks
        local = tasks if env.get("SLURM_STEP_NUM_NODES", "1") == "1" else 0
        # Tasks of a step find each other as torchrun's processes do.
        env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "GROUP_RANK": "0",
                "WORLD_SIZE": str(tasks), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        step = int(env["SLURM_JOB_ID"]) * 101 + int(env.get("SLURM_STEP_ID", 0))
        env["MASTER_PORT"] = str(20_000 + step % 10_000)
    else:
        return 1
    if world != local:
        raise HovitError(f"{world} processes on several machines: training runs on one machine")
    return world
