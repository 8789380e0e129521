"""A study's runs and measurements one after another in one process, without Snakemake.

For a time-limited notebook or a rented GPU: stops cleanly before the budget is spent, and the
same command goes on next time.
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
    """Train and measure what these studies need and is not there yet, until `deadline`.

    Args:
        plan: the config at a scale.
        studies: whose runs and measurements.
        data_root: folder with downloads and archives.
        deadline: `time.monotonic()` by which to have stopped.
        accelerator: Fabric's word: auto, cpu, cuda.
        root: top of the artifact.
        options: of the training of one run, given the deadline.
        log: told what happens.

    Returns:
        what is still to do, in words; empty when all is done.
    """
    fabric = make_fabric(plan.scale.precision, accelerator=accelerator)

    def train_one(run: Run) -> None:
        torch.set_num_threads(plan.scale.threads)
        prepare_pack(run.pack, data_root, root / run.pack.folder)
        results = train_run(run, fabric, root, options(run, deadline)).results
        log(f"      {format_results(results)}")

    jobs: list[tuple[str, Callable[[], object]]] = []
    # Studies that want freed memory returned come first: a process that keeps it cannot go back.
    for task in plan.tasks(sorted(studies, key=lambda study: study.keep_memory)):
        if task.is_done(root):
            continue
        if isinstance(task, TrainTask):
            jobs.append((str(task), partial(train_one, task.run)))
        elif isinstance(task, MeasureTask):
            device = pick_device(accelerator)
            jobs.append((str(task), partial(measure_study, task, device, root, deadline)))
    failed: list[str] = []
    for i, (name, job) in enumerate(jobs):
        try:
            if time.monotonic() >= deadline:
                raise OutOfTime
            log(f"[{i + 1}/{len(jobs)}] {name}")
            job()
        except OutOfTime:
            return failed + [name for name, _ in jobs[i:]]
        except HovitError as error:  # the others need not wait for it
            log(f"      failed: {error}")
            failed.append(f"{name} (failed)")
    return failed
