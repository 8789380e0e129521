"""Resumable training loop, independent of the task.

All random choices of a step are drawn from (seed, epoch, step). A run that resumes from its last
checkpoint therefore ends with bit-identical metrics, on a CPU with the same number of threads. On a
GPU, where each step is a CUDA graph and sums have no fixed order, metrics agree to rounding.
"""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ..config.runs import Run
from ..config.tasks import TrainTask
from ..data.loader import epoch_batches, step_seed
from ..records.record import Record, git_state, write_record
from ..utils.device import describe_device, peak_memory_mb
from ..utils.errors import HovitError, OutOfTime, one_line
from ..utils.files import alone, write_text
from .averaged import average_weights, clip_adaptively
from .captured import (
    CapturedStep,
    RunAhead,
    benchmark_convolutions,
    optimizer_args,
    share_learning_rate,
)
from .checkpoint import load_state, save_state
from .fabric import Fabric, check_batch_norm
from .fabric import make_fabric as make_fabric  # part of this module's interface

LOG_EVERY = 20  # steps between reads of the loss; captured steps: once an epoch
StepSeed = tuple[int, int, int, int]  # (run seed, epoch, step, rank)
MakeOptimizer = Callable[..., torch.optim.Optimizer]  # (model, recipe, **arguments)


@dataclass
class Options:
    """How a run is executed. On a CPU, only `compile` and `capture` change the result.

    Args:
        deadline: `time.monotonic()` after which the run saves a checkpoint and stops.
        save_seconds: time between checkpoints.
        weights_file: value of `--weights`.
        capture: whether steps run as CUDA graphs; None: on a GPU. A CPU only has a stand-in, for
            tests, with another optimizer kernel.
        compile: whether `torch.compile` compiles the model; changes results by rounding.
        on_step: called with (epoch, step, steps) after each batch.
        on_epoch: called with the history entry of each finished epoch.
    """

    deadline: float = math.inf
    save_seconds: float = 60.0
    weights_file: Path | None = None
    capture: bool | None = None
    compile: bool = False
    on_step: Callable[[int, int, int], None] = lambda *_: None
    on_epoch: Callable[[dict[str, float]], None] = lambda *_: None


class Trainer(ABC):
    """Trains one run.

    A subclass sets `indices` and `meta`, builds its model and calls `setup`. The abstract methods
    define the task.
    """

    fixed_shapes = True  # whether all batches have the same shapes
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
        git_state()  # the record states the commit at the start
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)

    @abstractmethod
    def load_batches(self, batches: list[np.ndarray]) -> Iterable[Any]:
        """Yield batches of this epoch, given the image indices of each."""

    @abstractmethod
    def step_inputs(self, batch: Any, seed: StepSeed) -> Sequence[Any]:
        """Inputs of `compute_loss`, on the device; random numbers that the host draws included."""

    @abstractmethod
    def compute_loss(self, *inputs: Any) -> Tensor:
        """Forward one batch and return its scalar loss on the device.

        With `fixed_shapes`, inputs are tensors and nothing here waits for the device.
        """

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
        device, world = self.fabric.device, self.fabric.world_size
        if world > 1 and device.type == "cuda":
            model = convert_sync_batchnorm(model)  # statistics over the images of all GPUs
        elif world > 1:
            check_batch_norm(model, self.recipe.batch_size, world)
        self.module = model
        self.captures = self.can_capture()
        arguments = optimizer_args(self.recipe.optimizer, device) if self.captures else {}
        optimizer = make_optimizer(model, self.recipe, **arguments)
        compiled: Any = torch.compile(model) if self.options.compile else model
        self.model, self.optimizer = self.fabric.setup(compiled, optimizer)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.ema = average_weights(model, self.recipe.ema_decay)
        fingerprint = self.meta["fingerprint"]
        made_by = [self.run.spec_hash, self.task.code, fingerprint, self.pretrained_sha256]
        self.state = load_state(
            self.checkpoint_path, made_by, model, self.optimizer, self.scaler, self.ema
        )
        self.rate = share_learning_rate(optimizer, device) if self.captures else None
        self.captured_step = self.capture(self.optimize, model) if self.captures else None
        self.run_ahead = RunAhead(device)

    def can_capture(self) -> bool:
        """Whether steps are captured as CUDA graphs; says why not if a GPU trains without."""
        wanted = self.options.capture
        if wanted is None:
            wanted = self.fabric.device.type == "cuda"
        reason = ""
        if not self.fixed_shapes:
            reason = "images differ in size"
        elif self.fabric.world_size > 1:
            reason = "processes exchange gradients"
        if wanted and reason:
            self.warn(f"no CUDA graph: {reason}")
        return wanted and not reason

    def capture(self, fn: Callable[..., Tensor], model: nn.Module) -> CapturedStep:
        """A function that uses a model as a CUDA graph, or eager with a line that says why."""
        return CapturedStep(fn, model, self.warn)

    def warn(self, line: str) -> None:
        """Print a line about this run to stderr, once for all processes."""
        if self.fabric.is_global_zero:
            name = f"run {self.run.id} seed {self.run.seed}"
            print(f"{name}: {line}; it runs eagerly", file=sys.stderr, flush=True)

    def fit(self) -> None:
        """Train the remaining epochs.

        Raises:
            HovitError: for a loss that is not finite, too little GPU memory, or if `torch.compile`
                fails.
        """
        try:
            with benchmark_convolutions(self.fabric.device):
                while self.state.epoch < self.recipe.epochs:
                    self.train_epoch()
                    self.end_epoch()
        except torch.OutOfMemoryError as error:
            raise HovitError(
                f"run {self.run.id} seed {self.run.seed}: not enough memory on the GPU for a batch "
                f"of {self.recipe.batch_size} ({one_line(error)}); run fewer jobs at once"
            ) from None
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = one_line(getattr(error, "inner_exception", error))
                raise HovitError(
                    f"run {self.run.id}: torch.compile failed ({reason}); train without --compile"
                ) from None
            raise

    def train_epoch(self) -> None:
        """Train the remaining batches of the current epoch."""
        epoch, seed = self.state.epoch, self.run.seed
        rank, world = self.fabric.global_rank, self.fabric.world_size
        size, repeats = self.recipe.batch_size, self.recipe.repeats
        batches = epoch_batches(self.indices, size, seed, epoch, rank, world, repeats)
        loader = self.load_batches(batches[self.state.step :])
        self.set_epoch(epoch)
        self.model.train()
        if self.captured_step:
            self.captured_step.check_settings()
        losses: list[Tensor] = []  # of the steps since the last read
        for step, batch in enumerate(loader, start=self.state.step):
            self.set_learning_rate(self.learning_rate(epoch, step, len(batches)))
            losses.append(self.train_step(batch, (seed, epoch, step, rank)))
            self.run_ahead.wait()
            # Each read waits for the device, so that a captured epoch is read only at its end.
            read = step + 1 == len(batches) or (len(losses) >= LOG_EVERY and not self.captures)
            # Processes must agree to save, and agreeing costs a broadcast: they do it seldom.
            save = self.is_save_due() if read or world == 1 else False
            if read or save:
                self.log_losses(losses)
                losses = []
            if save:
                self.save_checkpoint()
            self.options.on_step(epoch, step + 1, len(batches))

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all parameter groups."""
        if self.rate is not None:
            self.rate.fill_(rate)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def train_step(self, batch: Any, seed: StepSeed) -> Tensor:
        """Do one optimizer step and return its loss, still on the device."""
        # Dropout, also inside a graph, and the pixels of random erasing.
        seed_generators(step_seed(seed), self.fabric.device)
        inputs = self.step_inputs(batch, seed)
        return self.captured_step(*inputs) if self.captured_step else self.optimize(*inputs)

    def optimize(self, *inputs: Any) -> Tensor:
        """Forward, loss, backward, clipping and optimizer: the part of a step that is captured."""
        self.optimizer.zero_grad()
        loss = self.compute_loss(*inputs)
        self.fabric.backward(loss)
        self.clip_gradients()
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.module)
        return loss.detach()

    def clip_gradients(self) -> None:
        """Clip gradients as the recipe says, after division by the scale of fp16 gradients.

        Fabric's own function waits for the device to look for infinite gradients, and refuses
        fused optimizers in fp16.
        """
        norm, factor = self.recipe.clip_norm, self.recipe.agc
        if self.scaler and (norm or factor):
            self.scaler.unscale_(self.optimizer.optimizer)
        if norm:
            groups = self.optimizer.param_groups
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], norm)
        if factor:
            clip_adaptively(self.module, factor)

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
                    f"{self.state.epoch + 1}, step {step}; {self.remedy}"
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
        if device.type == "cuda" or self.options.compile:
            shared["execution"] = self.execution()
        seconds = self.state.seconds + time.monotonic() - self.started
        return self.task.make_record(
            results | shared, describe_device(device), seconds, peak_memory_mb(device), self.meta
        )

    @property
    def remedy(self) -> str:
        """What to do about a loss that is not finite."""
        recipe, scale = self.run.recipe.id, self.run.scale
        return (
            f"lower lr (config/recipes/{recipe}.yaml, or `lrs` in config/scales/{scale}.yaml), or "
            f"set `precision: 32-true` in config/scales/{scale}.yaml"
        )

    def execution(self) -> str:
        """How the steps ran: `captured` as CUDA graphs or `eager`, `compiled` or not."""
        captured = self.captured_step is not None and not self.captured_step.graphed.reason
        return f"{'compiled, ' * self.options.compile}{'captured' if captured else 'eager'}"

    def write_results(self, record: Record) -> None:
        """Write history and record, then delete the checkpoint and temporary files."""
        history = pd.DataFrame(self.state.history)
        write_text(self.folder / "history.csv", history.to_csv(index=False))
        write_record(self.folder / "record.json", record)
        # Hidden files are left by processes that were killed while they wrote.
        for pattern in (self.checkpoint_path.name, "best-*.safetensors", ".*"):
            for path in self.folder.glob(pattern):
                with suppress(OSError):  # NFS keeps a deleted file that is open under a new name
                    path.unlink()


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the default generators of the host and of the device.

    `torch.manual_seed` does the same, but formats the call stack once for each kind of device that
    is not there, which takes 0.1 to 1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


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
