"""The pipeline's worker and its display: commands in forks of one process, a line for each job."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from rich.console import Console

from hovit.pipeline import worker
from snakemake_logger_plugin_hovit import LogHandler

LIST = [sys.executable, "-m", "hovit", "list"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the config, in which a worker runs."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / ".snakemake").mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "hovit.pipeline.worker"], cwd=tmp_path, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield tmp_path
    said, _ = server.communicate(timeout=60)  # the end of its input is the end of it
    assert server.returncode == 0
    assert said.startswith("cpu ")
    assert not (tmp_path / worker.SOCKET).exists()


def handed_over(folder: Path, command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=os.environ | {worker.VARIABLE: worker.SOCKET} | env,
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_command_says_and_returns_what_it_does_alone(folder: Path) -> None:
    alone = subprocess.run(LIST, cwd=folder, capture_output=True, text=True, check=True)
    done = handed_over(folder, LIST)
    assert (done.returncode, done.stdout) == (0, alone.stdout)
    wrong = handed_over(folder, [*LIST, "--scale", "nosuch"])
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no scale 'nosuch'")
    assert handed_over(folder, [*LIST, "--nosuch"]).returncode == 2  # typer's


def test_a_command_has_its_own_environment(folder: Path) -> None:
    for root in ("one", "two"):
        done = handed_over(
            folder,
            [sys.executable, "-m", "hovit", "data", "tiny-imagenet-37-96px"],
            HOVIT_DATA=root,
        )
        assert done.returncode == 1
        assert f"{root}/" in done.stderr


def test_a_worker_that_has_died_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    monkeypatch.setenv(worker.VARIABLE, str(tmp_path / "none.sock"))
    monkeypatch.setenv(worker.STARTED_AT, str(time.time() - worker.PATIENCE - 1))
    assert worker.hand_over(["list"]) is None
    assert not slept


def test_a_log_ends_with_the_cpu_time(folder: Path) -> None:
    with open(folder / "log", "w") as log:
        env = os.environ | {worker.VARIABLE: worker.SOCKET}
        subprocess.run(LIST, cwd=folder, env=env, stdout=log, stderr=log, check=True)
    assert (folder / "log").read_text().splitlines()[-1].startswith("cpu ")


def forks(folder: Path) -> set[int]:
    """Process ids of the worker of a folder and of its forks."""
    listed = subprocess.run(["pgrep", "-f", "hovit.pipeline.worker"], capture_output=True)
    here = set()
    for pid in listed.stdout.decode().split():
        with suppress(FileNotFoundError):  # a worker of another test may have ended since
            if os.readlink(f"/proc/{pid}/cwd") == str(folder):
                here.add(int(pid))
    return here


def waiting_command(folder: Path, until: float) -> tuple[subprocess.Popen[str], int]:
    """A command whose fork waits on a pipe that nobody writes to, and the fork's process id."""
    os.mkfifo(folder / "pipe.safetensors")
    env = os.environ | {worker.VARIABLE: worker.SOCKET, "HOVIT_WEIGHTS": "pipe.safetensors"}
    command = [sys.executable, "-m", "hovit", "train", "l_hovit.pets.deck"]
    while not (server := forks(folder)):
        assert time.monotonic() < until
    process = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    while not (fork := forks(folder) - server):
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None
    return process, fork.pop()


def test_a_killed_command_ends_its_fork(folder: Path) -> None:
    until = time.monotonic() + 60
    process, fork = waiting_command(folder, until)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    while fork in forks(folder):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_killed_fork_is_one_line(folder: Path) -> None:
    process, fork = waiting_command(folder, time.monotonic() + 60)
    os.kill(fork, signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said == "error: the process of this command was killed (out of memory?)\n"


def test_a_worker_that_ends_before_the_start_leaves_the_command_to_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(worker.VARIABLE, "here.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("here.sock")
        listener.listen()

        def accept_and_end() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=accept_and_end)
        thread.start()
        assert worker.hand_over(["list"]) is None
        thread.join()


def test_without_a_worker_a_command_runs_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(worker.VARIABLE, raising=False)
    assert worker.hand_over(["list"]) is None
    monkeypatch.setenv(worker.VARIABLE, "gone.sock")
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    assert worker.hand_over(["list"]) is None


# Display -----------------------------------------------------------------------------------------

SNAKEFILE = """
rule all:
    input: "results/made.txt", "results/wrong.txt"
rule make:
    output: "results/made.txt"
    shell: "echo {wildcards} > {output}"
rule break_down:
    output: "results/{name}.txt"
    log: "{name}.log"
    shell: "for i in $(seq 40); do echo line $i; done > {log}; false"
ruleorder: make > break_down
"""


def run_snakemake(folder: Path, *args: str) -> str:
    (folder / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *args, "--logger", "hovit"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stderr


def test_in_a_pipe_a_job_is_a_line_and_a_failure_the_end_of_its_log(tmp_path: Path) -> None:
    said = run_snakemake(tmp_path, "--keep-going")
    assert "3 jobs: " in said
    assert re.search(r"^\[1/3\] make, \d+ s$", said, re.M)
    failure = said[said.index("failed: break wrong") :].splitlines()
    assert failure[1] == "    line 26"
    assert failure[15] == "    line 40"
    assert failure[16] == "    (all of it: wrong.log)"
    assert "Select jobs" not in said


def test_the_counts_fit_a_terminal_of_80_columns() -> None:
    handler = LogHandler(SimpleNamespace(dryrun=False, verbose=False), None)  # type: ignore[arg-type]
    handler.on_run_info(SimpleNamespace(stats={"total": 40, "train": 40}))
    for job in range(4):
        wildcards = {"run": f"efficientvit_paper_m{job}-pretrained.pets.finetune", "seed": "0"}
        handler.on_job_info(SimpleNamespace(jobid=job, rule_name="train", wildcards=wildcards))
    handler.on_job_finished(SimpleNamespace(job_id=0))
    screen = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    with screen.capture() as shown:
        screen.print(handler.bar.get_renderable())
    (line,) = shown.get().splitlines()
    assert " 1/40 jobs, --:-- left: train efficientvit_paper_m1-" in line
    assert line.rstrip().endswith("…")


def test_a_dry_run_says_what_snakemake_says(tmp_path: Path) -> None:
    said = run_snakemake(tmp_path, "-n")
    assert "rule break_down:" in said
    assert "output: results/wrong.txt" in said


def test_at_the_end_stands_where_to_look_and_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/made.txt").touch()
    (tmp_path / "results/claims.json").write_text('{"tally": "3 reproduced"}')
    (tmp_path / "results/index.html").touch()
    lines = run_snakemake(tmp_path, "results/made.txt").splitlines()
    assert lines[-2:] == [
        "results/index.html and results/tables/index.md show the results", "claims: 3 reproduced"
    ]  # fmt: skip


def test_jobs_that_end_together_are_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGCHLD of one job may come while the handler for the other one runs."""
    jobs = {os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}) for _ in range(2)}
    for job in jobs:
        os.waitid(os.P_PID, job, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    real, calls = os.waitpid, list[int]()

    def interrupted(job: int, options: int) -> tuple[int, int]:
        if not calls:
            calls.append(job)
            worker.reap(jobs)
        return real(job, options)

    monkeypatch.setattr(os, "waitpid", interrupted)
    worker.reap(jobs)
    assert jobs == set()
