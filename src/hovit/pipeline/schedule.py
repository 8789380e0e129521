"""Order the tasks of a sweep, and select tasks that fit into the remaining time.

Does not import torch.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config.plan import Plan
from ..config.runs import Run
from ..config.schema import Study
from ..config.tasks import MeasureTask, Task, TrainTask
from ..utils.errors import HovitError
from ..utils.files import read_json


def split_sizes(run: Run, root: Path = Path()) -> tuple[int, int, int] | None:
    """Number of images of a run for training, for validation, and in its whole pack.

    None if neither the pack nor config states the numbers.

    Raises:
        HovitError: if pack.json is damaged.
    """
    dataset, path = run.dataset, root / run.pack.folder / "pack.json"
    if path.exists():
        try:
            images = read_json(path)["images"]
            train, val = int(images["train"]), int(images.get("val", 0))
            total = sum(images.values())
        except (KeyError, TypeError, ValueError, AttributeError):
            raise HovitError(f"{path}: does not describe a pack; delete it") from None
    elif found := dataset.images or dataset.listed:
        train, val, test = dataset.split.sizes(found, has_test=bool(dataset.test_files))
        total = train + val + test
    elif dataset.published:
        train, val, _ = dataset.split.sizes(dataset.published[0], has_test=True)
        total = sum(dataset.published)
    else:
        return None
    return min(train, run.limit.train or train), min(val, run.limit.val or val), total


def training_images(run: Run, root: Path = Path()) -> int | None:
    """Number of training images of a run; None if it is not known yet.

    Raises:
        HovitError: if pack.json is damaged.
    """
    sizes = split_sizes(run, root)
    return sizes and sizes[0]


def total_steps(run: Run, root: Path = Path()) -> int | None:
    """Optimizer steps of a whole run; None if the number of images is not known yet."""
    images = training_images(run, root)
    return None if images is None else run.recipe.epochs * (images // run.recipe.batch_size)


def finished_steps(run: Run, root: Path = Path()) -> int:
    """Steps that a run's checkpoint holds; 0 without a readable one."""
    try:
        with safe_open(root / run.folder / "state.safetensors", "np") as file:
            header = json.loads((file.metadata() or {}).get("hovit", ""))
        epoch, step = int(header["epoch"]), int(header["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return 0
    images = training_images(run, root)
    return 0 if images is None else epoch * (images // run.recipe.batch_size) + step


def order_tasks(
    plan: Plan,
    studies: Iterable[Study],
    root: Path = Path(),
    *,
    priority: bool = False,
    only: str | None = None,
    done: bool = False,
) -> list[Task]:
    """List the open tasks of these studies: trainings (upstream runs first), then measurements.

    Args:
        plan: config at a scale.
        studies: the studies.
        root: top folder of the artifact.
        priority: train study by study in the given order, with the first random seed of every row
            before the second of any; measure in the given order.
        only: `train` or `measure`, to leave out the other tasks.
        done: include tasks that are done.
    """
    studies = list(studies)
    trained: list[Task] = []
    if priority:
        unique = {(r.id, r.seed): r for study in studies for r in plan.needed([study])}
        by_seed = sorted(unique.values(), key=lambda run: plan.scale.seeds.index(run.seed))
        trained += [plan.train_task(run) for run in by_seed]
    else:
        trained += [plan.train_task(run) for run in plan.needed(studies)]
    # A process that keeps freed memory cannot return it later, so studies that need returned memory
    # come first.
    measured: list[Task] = [
        task
        for study in sorted(studies, key=lambda study: study.keep_memory)
        if (task := plan.measure_task(study))
    ]
    chosen = {"train": trained, "measure": measured, None: trained + measured}[only]
    return [task for task in chosen if done or not task.is_done(root)]


@dataclass
class Progress:
    """Progress of one training in this sweep; times are from `time.monotonic`.

    Args:
        run: the run.
        started: when it started, with its images ready.
        first: time and step of the first report.
        last: time and step of the latest report.
        steps: steps of the whole run.
        ended: whether the run has finished; its last time then includes the test and the record.
    """

    run: Run
    started: float
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None
    steps: int = 0
    ended: bool = False

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step, including validation; None before the second report."""
        if self.first is None or self.last is None or self.last[1] <= self.first[1]:
            return None
        return (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])

    @property
    def setup(self) -> float:
        """Seconds until the first report."""
        return self.first[0] - self.started if self.first else 0.0


@dataclass
class Schedule:
    """Hands out tasks, and holds back trainings that cannot finish before the deadline.

    Args:
        plan: config at a scale; it states which run starts from which.
        waiting: tasks that have not started, in order.
        deadline: time at which all work stops.
        root: top folder of the artifact.
        must_finish: hold back trainings that would not finish. Otherwise they start, and stop with
            a checkpoint at the deadline.
    """

    plan: Plan
    waiting: list[Task]
    deadline: float
    root: Path = Path()
    must_finish: bool = False
    running: list[Task] = field(default_factory=list)
    stopped: list[Task] = field(default_factory=list)  # by the deadline
    failed: list[Task] = field(default_factory=list)
    progress: dict[str, Progress] = field(default_factory=dict)
    done: int = 0

    def next(self, now: float) -> Task | None:
        """Start and return the next task; None if none can start now.

        A measurement needs the machine to itself: it starts when nothing runs, and no task starts
        until it ends.
        """
        if now >= self.deadline or any(isinstance(task, MeasureTask) for task in self.running):
            return None
        for task in self.waiting:
            if isinstance(task, TrainTask):
                if not self._is_ready(task.run) or not self._fits(task.run, now):
                    continue
            elif self.running:
                continue
            self.waiting.remove(task)
            self.running.append(task)
            return task
        return None

    def begin(self, task: Task, now: float) -> None:
        """Record that a training has its images and starts."""
        if isinstance(task, TrainTask):
            self.progress[str(task)] = Progress(task.run, now)

    def report(self, task: Task, step: int, steps: int, now: float) -> None:
        """Record that `step` of `steps` steps are done."""
        progress = self.progress[str(task)]
        progress.first = progress.first or (now, step)
        progress.last, progress.steps = (now, step), steps

    def end(self, task: Task, outcome: str, now: float) -> None:
        """Record that a task has ended: `done`, `stopped` by the deadline, or `failed`."""
        self.running.remove(task)
        if outcome == "done":
            self.done += 1
            progress = self.progress.get(str(task))
            if progress and progress.last:
                progress.last, progress.ended = (now, progress.last[1]), True
        else:
            (self.stopped if outcome == "stopped" else self.failed).append(task)

    def open_tasks(self) -> list[str]:
        """Names of all tasks that are not done; failed tasks are marked."""
        failed = [f"{task} (failed)" for task in self.failed]
        return failed + [str(task) for task in (*self.running, *self.stopped, *self.waiting)]

    def predict(self, run: Run) -> float | None:
        """Predict the seconds of a run from measured steps; None if there are none.

        The slowest of the most similar runs counts: other seeds of the same run, otherwise the same
        recipe from weights of the same kind, otherwise any run.
        """
        known = [p for p in self.progress.values() if p.seconds_per_step is not None]
        steps = total_steps(run, self.root)
        if not known or steps is None:
            return None
        similar = next(filter(None, _by_similarity(run, known)))
        speed = max(p.seconds_per_step or 0.0 for p in similar)
        left = steps - finished_steps(run, self.root)
        return max(p.setup for p in known) + speed * left

    def _fits(self, run: Run, now: float) -> bool:
        seconds = self.predict(run) if self.must_finish else None
        return seconds is None or now + seconds <= self.deadline

    def _is_ready(self, run: Run) -> bool:
        """Whether its upstream run, if any, is not waiting, running, stopped or failed."""
        upstream = self.plan.upstream(run)
        if upstream is None:
            return True
        unfinished = (*self.waiting, *self.running, *self.stopped, *self.failed)
        return all(
            (task.run.id, task.run.seed) != (upstream.id, upstream.seed)
            for task in unfinished
            if isinstance(task, TrainTask)
        )


def _by_similarity(run: Run, known: list[Progress]) -> Iterator[list[Progress]]:
    """Yield the same run with other seeds, then runs of the same kind, then all runs."""
    yield [p for p in known if p.run.id == run.id]
    yield [p for p in known if _kind(p.run) == _kind(run)]
    yield known


def _kind(run: Run) -> tuple[object, ...]:
    return run.recipe.id, run.recipe.batch_size, run.image_size, run.weights is None
