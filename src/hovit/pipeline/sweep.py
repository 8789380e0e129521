"""Train and measure studies in one process, without Snakemake.

For a time-limited notebook or a rented GPU: the sweep stops cleanly before the budget is spent, and
the same command resumes.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..config.plan import Plan
from ..config.runs import Run
from ..config.schema import Study
from ..config.tasks import MeasureTask, TrainTask
from ..training.trainer import Options, make_fabric
from ..utils.device import pick_device
from ..utils.errors import HovitError, OutOfTime
from .measure import measure_study
from .train import format_results, prepare_pack, train_run

Job = tuple[str, Callable[[], object]]  # name, work


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
    accelerator: str = "auto",
    root: Path = Path(),
    options: Callable[[Run, float], Options] = lambda _, deadline: Options(deadline=deadline),
    log: Callable[[str], None] = print,
) -> list[str]:
    """Do the open tasks of these studies, until `deadline`.

    Args:
        plan: config at a scale.
        studies: the studies to train and measure.
        data_root: folder with downloads and archives.
        deadline: `time.monotonic()` at which it must have stopped.
        accelerator: auto, cpu or cuda.
        root: top folder of the artifact.
        options: training options for a run, given the deadline.
        log: called with each line of progress.

    Returns:
        the tasks that are still open, in words; empty when all are done.
    """
    fabric = make_fabric(plan.scale.precision, accelerator=accelerator)

    def train_one(run: Run) -> None:
        torch.set_num_threads(plan.scale.threads)
        prepare_pack(run.pack, data_root, root / run.pack.folder)
        results = train_run(run, fabric, root, options(run, deadline)).results
        log(f"      {format_results(results)}")

    jobs: list[Job] = []
    # Studies that want freed memory returned come first: a process that keeps it cannot go back.
    for task in plan.tasks(sorted(studies, key=lambda study: study.keep_memory)):
        if task.is_done(root):
            continue
        if isinstance(task, TrainTask):
            jobs.append((str(task), partial(train_one, task.run)))
        elif isinstance(task, MeasureTask):
            device = pick_device(accelerator)
            jobs.append((str(task), partial(measure_study, task, device, root, deadline)))
    return _run(jobs, deadline, log)


def _run(jobs: list[Job], deadline: float, log: Callable[[str], None]) -> list[str]:
    """Run jobs in turn until the deadline; return the names of the failed and the open ones."""
    failed: list[str] = []
    for i, (name, job) in enumerate(jobs):
        try:
            if time.monotonic() >= deadline:
                raise OutOfTime
            log(f"[{i + 1}/{len(jobs)}] {name}")
            job()
        except OutOfTime:
            return failed + [name for name, _ in jobs[i:]]
        except HovitError as error:  # the other tasks go on
            log(f"      failed: {error}")
            failed.append(f"{name} (failed)")
    return failed
