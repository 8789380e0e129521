"""Train and measure studies without Snakemake, within a time budget.

For a time-limited notebook or a rented GPU: the sweep saves and stops before the budget is spent,
and the same command resumes. Several processes can share the device.
"""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from ..config.plan import Plan
from ..config.schema import Study
from ..config.tasks import Task
from ..utils.errors import HovitError
from .export import Export
from .pool import Settings, do_safely, run_in_processes
from .schedule import Schedule, order_tasks


def parse_budget(text: str) -> float:
    """`9m`, `90s`, `1.5h` or plain seconds -> seconds.

    Raises:
        HovitError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise HovitError(f"--budget {text!r}: write 90s, 9m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def sweep(
    plan: Plan,
    studies: list[Study],
    *,
    data_root: Path,
    deadline: float,
    stop: float = math.inf,
    accelerator: str = "auto",
    compile: bool = False,
    root: Path = Path(),
    jobs: int = 1,
    priority: bool = False,
    only: str | None = None,
    export: Export | None = None,
    log: Callable[[str], None] = print,
) -> list[str]:
    """Do the open tasks of these studies, until `deadline`.

    Args:
        plan: config at a scale.
        studies: the studies to train and measure.
        data_root: folder with downloads and archives.
        deadline: `time.monotonic()` at which tasks save and stop.
        stop: `time.monotonic()` at which processes that have not stopped are killed.
        accelerator: auto, cpu or cuda.
        compile: whether `torch.compile` compiles the model of each training.
        root: top folder of the artifact.
        jobs: number of processes that share the device. With more than one, a training that cannot
            finish before the deadline does not start. With one, this process does the work. After
            an unexpected error, a new process does the rest, because CUDA errors break a process.
        priority: first the first seed of all rows, study by study.
        only: `train` or `measure`; None does both.
        export: written after tasks, while the sweep runs, and at its end.
        log: called with each line of progress.

    Returns:
        the tasks that are still open, in words; empty when all are done.
    """
    tasks = order_tasks(plan, studies, root, priority=priority, only=only)
    schedule = Schedule(plan, tasks, deadline, root, must_finish=jobs > 1)
    settings = Settings(
        data_root=data_root,
        root=root,
        accelerator=accelerator,
        precision=plan.scale.precision,
        threads=plan.scale.threads,
        deadline=deadline,
        compile=compile,
        weights_file=plan.weights_file,
    )
    refresh: Callable[[], object] = export.refresh if export else lambda: None
    broken = jobs == 1 and _run_here(schedule, settings, refresh, log)
    if jobs > 1 or broken:
        run_in_processes(schedule, settings, jobs, stop=stop, after_task=refresh, log=log)
    if export:
        for name in export.write():
            log(f"left out of {export.path}, over --max-size: {name}")
    return schedule.open_tasks()


def all_tasks(plan: Plan, studies: list[Study]) -> list[Task]:
    """Everything that an export of these studies may hold, in order of priority."""
    runs = order_tasks(plan, studies, priority=True, only="train", done=True)
    return order_tasks(plan, studies, only="measure", done=True) + runs


def _run_here(
    schedule: Schedule,
    settings: Settings,
    refresh: Callable[[], object],
    log: Callable[[str], None],
) -> bool:
    """Do the tasks one after another in this process.

    Returns:
        whether an unexpected error has ended the work; the tasks after it have not started.
    """
    import hovit.models  # noqa: F401 (registers)

    from .train import format_epoch

    count = len(schedule.waiting)
    while task := schedule.next(time.monotonic()):
        log(f"[{count - len(schedule.waiting)}/{count}] {task}")

        def send(message: tuple[object, ...], task: Task = task) -> None:
            if message[0] == "begin":
                schedule.begin(task, time.monotonic())

        def on_epoch(entry: dict[str, float]) -> None:
            log(f"      epoch {entry['epoch']}: {format_epoch(entry)}")
            refresh()

        ending, outcome, text = do_safely(task, settings, send, on_epoch)
        if text:
            log(f"      {'failed: ' if outcome == 'failed' else ''}{text}")
        schedule.end(task, outcome, time.monotonic())
        refresh()
        if ending == "crash":
            return True
    return False
