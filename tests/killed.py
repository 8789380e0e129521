"""Processes forked from a server that has imported everything, for tests that kill or run many.

Each of the first functions is the whole work of a process, in a folder of its own.
"""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import ROOT, SMALL, small_run

from hovit import cli
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Latency, Study
from hovit.data.pack import prepare
from hovit.pipeline.measure import measure_study
from hovit.report.claims.write import write_claims
from hovit.report.figures.draw import draw
from hovit.report.tables.write import write_index, write_table
from hovit.training.classification import train
from hovit.training.trainer import Options, make_fabric

# The server does not find modules of tests/.
IMPORTED = ["hovit.models", "hovit.training.classification", "hovit.pipeline.measure",
            "hovit.pipeline.train", "hovit.cli",
            "hovit.report.figures.draw", "hovit.report.claims.write", "hovit.data.pack",
            "matplotlib.pyplot", "sklearn.datasets", "pytest"]  # fmt: skip
ROUNDS = 60  # of the measurement


def packing(root: Path) -> None:
    pack = load_plan("smoke", ROOT / "config").run("levit_deck.pets.deck").pack
    prepare(pack, root, root / pack.folder)


def training(root: Path) -> None:
    """Five epochs of three steps, with a checkpoint after each step."""
    torch.set_num_threads(1)
    run = small_run(load_plan("smoke", ROOT / "config"), epochs=5)
    train(run, make_fabric("32-true", accelerator="cpu"), root, Options(save_seconds=0))


def measured_study() -> tuple[Plan, Study]:
    """Two small models and many short rounds."""
    plan = load_plan("smoke", ROOT / "config")
    latency = Latency(batches=(1, 2), rounds=ROUNDS, warmup=1, threads=1, image_size=64)
    study = plan.study("depth")
    rows = [row.model_copy(update={"model_args": SMALL}) for row in study.rows[:2]]
    study = study.model_copy(update={"rows": tuple(rows)})
    return Plan(plan.config, plan.scale.model_copy(update={"latency": latency})), study


def measuring(root: Path) -> None:
    torch.set_num_threads(1)
    plan, study = measured_study()
    measure_study(plan.measure_task(study), torch.device("cpu"), root)


def reporting(root: Path) -> None:
    """Every fourth table, all claims and a figure of scale mini."""
    plan = load_plan("mini", ROOT / "config")
    for study in list(plan.config.studies.values())[::4]:
        write_table(plan, study, root)
    write_index(plan, root)
    write_claims(plan, root)
    draw(plan, "attention_maps", root)


def command(root: Path, arguments: list[str], variables: dict[str, str], said: Path) -> None:
    """Run `hovit ARGUMENTS` in a folder; what it prints goes to the files out and err of `said`."""
    os.chdir(root)
    os.environ.update(variables)
    for number, name in ((1, "out"), (2, "err")):
        with open(said / name, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["hovit", *arguments]
    cli.main()


def run_hovit(root: Path, *arguments: str) -> tuple[int | None, str, str]:
    """Run `hovit ARGUMENTS` in a forked process: exit code, standard output, standard error."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder)
        process = start(command, root, list(arguments), {}, said)
        process.join()
        return process.exitcode, (said / "out").read_text(), (said / "err").read_text()


def start(work: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """Start a function of this module in a process forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=work, args=args)
    process.start()
    return process


def undisturbed(work: Callable[[Path], None], root: Path) -> float:
    """Let it run to its end; gives the seconds."""
    warm_up = start(os.path.exists, root)  # the server imports everything only once
    warm_up.join()
    began = time.monotonic()
    process = start(work, root)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def kill(
    work: Callable[[Path], None],
    root: Path,
    kills: int,
    longest: float,
    after_kill: Callable[[], None],
    at_end: Callable[[], None],
) -> None:
    """Start it and SIGKILL it at a random moment, so many times; then let it end.

    Args:
        work: a function of this module.
        root: its folder.
        kills: how often; a process that ends before its moment does not count.
        longest: seconds that a process may live.
        after_kill: looks at what is left after each kill.
        at_end: looks at the result whenever it comes to an end.
    """
    dice = random.Random(0)
    done = 0
    while True:
        process = start(work, root)
        process.join(dice.uniform(0, longest) if done < kills else None)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            if process.exitcode == -signal.SIGKILL:
                done += 1
                after_kill()
                continue
        assert process.exitcode == 0
        at_end()
        if done == kills:
            return
