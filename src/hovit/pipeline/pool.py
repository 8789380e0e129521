"""Worker processes of a sweep, which share one device.

Each worker imports torch once and runs one task after another. If a worker dies, only its task
fails, and a new worker replaces it.
"""

import gc
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..config.tasks import MeasureTask, Task, TrainTask
from ..utils.errors import HovitError, OutOfTime, one_line
from .schedule import Schedule

# CUDA does not survive a fork, and this process may have used it.
context = multiprocessing.get_context("spawn")
REPORT_EVERY, STATUS_EVERY = 0.5, 30.0  # seconds


@dataclass(frozen=True)
class Settings:
    """Settings that all workers of a sweep share.

    Args:
        data_root: folder with downloads and archives.
        root: top folder of the artifact.
        accelerator: auto, cpu or cuda.
        precision: precision of training, as in the scale.
        threads: CPU threads of a training.
        deadline: `time.monotonic()` at which tasks save and stop.
        compile: whether `torch.compile` compiles the model of each training.
        weights_file: value of `--weights`.
    """

    data_root: Path
    root: Path
    accelerator: str
    precision: str
    threads: int
    deadline: float
    compile: bool = False
    weights_file: Path | None = None


class Worker:
    """A process that runs the tasks sent to it."""

    def __init__(self, settings: Settings) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, settings))
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def send(self, task: Task) -> None:
        """Start a task."""
        self.task = task
        self.connection.send(task)

    def kill(self) -> None:
        """End the process at once. Files are written atomically, so no file is damaged."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_in_processes(
    schedule: Schedule,
    settings: Settings,
    jobs: int,
    *,
    stop: float,
    after_task: Callable[[], object] = lambda: None,
    log: Callable[[str], None] = print,
) -> None:
    """Run the tasks of a schedule in `jobs` processes.

    Args:
        schedule: the tasks.
        settings: what workers need.
        jobs: number of processes.
        stop: `time.monotonic()` at which workers that have not stopped by themselves are killed.
        after_task: called about once per second, and after each task.
        log: called with each line of progress.
    """
    workers = [Worker(settings) for _ in range(min(jobs, len(schedule.waiting)))]
    status = time.monotonic()
    try:
        while time.monotonic() < stop:
            for index, worker in enumerate(workers):
                if worker.task is None and (task := schedule.next(time.monotonic())):
                    log(f"start {task}")
                    workers[index] = _send(worker, task, settings)
            if not schedule.running:
                break
            _receive(workers, schedule, settings, log)
            after_task()
            if time.monotonic() - status > STATUS_EVERY:
                status = time.monotonic()
                log(_status(schedule, status))
    finally:
        for worker in workers:
            worker.kill()


def _send(worker: Worker, task: Task, settings: Settings) -> Worker:
    """Start a task in this worker, or in a new worker if this one has died."""
    try:
        worker.send(task)
    except OSError:
        worker.kill()
        worker = Worker(settings)
        worker.send(task)
    return worker


def _receive(
    workers: list[Worker], schedule: Schedule, settings: Settings, log: Callable[[str], None]
) -> None:
    """Handle the messages of busy workers, after waiting for at most a second."""
    busy = {worker.connection: worker for worker in workers if worker.task}
    for ready in wait(list(busy), timeout=1.0):
        worker = busy[ready]  # type: ignore[index]
        task, now = worker.task, time.monotonic()
        assert task is not None
        try:
            kind, *values = worker.connection.recv()
        except (EOFError, OSError):
            kind, values = "crash", ["failed", "its process died (out of memory?)"]
        if kind == "begin":
            schedule.begin(task, now)
        elif kind == "step":
            step, steps = values
            schedule.report(task, step, steps, now)
        else:
            outcome, text = values
            schedule.end(task, outcome, now)
            log(f"{outcome} {task}{f': {text}' if text else ''}")
            worker.task = None
            if kind == "crash":
                worker.kill()
                workers[workers.index(worker)] = Worker(settings)


def _status(schedule: Schedule, now: float) -> str:
    left = max(0.0, schedule.deadline - now)
    return (
        f"{schedule.done} done, {len(schedule.running)} running, {len(schedule.waiting)} waiting, "
        f"{left:.0f} s left"
    )


def _work(connection: Connection, settings: Settings) -> None:
    """Body of a worker process: run tasks until the sweep closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep, which kills its workers
    import hovit.models  # noqa: F401 (registers)

    try:
        while True:
            task = connection.recv()
            connection.send(do_safely(task, settings, connection.send))
    except (EOFError, ConnectionError):  # the sweep has ended
        return


def do_safely(
    task: Task,
    settings: Settings,
    send: Callable[[tuple[Any, ...]], object],
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
) -> tuple[str, str, str]:
    """Run a task as `do_task` does; an error fails this task only.

    Returns:
        end or crash (an error without a message of its own); done, stopped or failed; one line.
    """
    try:
        return "end", "done", do_task(task, settings, send, on_epoch)
    except OutOfTime:
        return "end", "stopped", ""
    except HovitError as error:
        return "end", "failed", str(error)
    except ConnectionError:  # the sweep has ended
        raise
    except Exception as error:  # a worker is replaced: a CUDA error may have broken its process
        traceback.print_exc()
        return "crash", "failed", f"{type(error).__name__}: {one_line(error)}"
    finally:
        _free_memory()


def do_task(
    task: Task,
    settings: Settings,
    send: Callable[[tuple[Any, ...]], object],
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
) -> str:
    """Run one task: train or measure.

    Args:
        task: the task.
        settings: settings of the sweep.
        send: called with ("begin",) once the images of a training are ready, and about twice a
            second with ("step", steps done, steps of the run).
        on_epoch: called with the history entry of each finished epoch.

    Returns:
        the main metrics of a training as text; empty for a measurement.

    Raises:
        HovitError, OutOfTime: as `train_run` and `measure_study`.
    """
    if isinstance(task, MeasureTask):
        from ..utils.device import pick_device
        from .measure import measure_study

        device = pick_device(settings.accelerator)
        measure_study(task, device, settings.root, settings.deadline)
        return ""
    assert isinstance(task, TrainTask)
    from ..training.trainer import Options, make_fabric
    from ..utils.device import set_threads
    from .train import format_results, prepare_pack, train_run

    run, root = task.run, settings.root
    set_threads(settings.threads)
    prepare_pack(run.pack, settings.data_root, root / run.pack.folder)
    send(("begin",))
    last = 0.0

    def on_step(epoch: int, step: int, steps: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > REPORT_EVERY or step == steps:
            last = now
            send(("step", epoch * steps + step, run.recipe.epochs * steps))

    options = Options(
        deadline=settings.deadline,
        compile=settings.compile,
        weights_file=settings.weights_file,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    fabric: Any = make_fabric(settings.precision, accelerator=settings.accelerator)
    return format_results(train_run(run, fabric, root, options).results)


def _free_memory() -> None:
    """Return the device memory of the last task, so that other processes can use it."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error, each call raises it again
            torch.cuda.empty_cache()
