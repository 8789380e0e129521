"""Worker process that imports torch, timm and pandas once and runs `hovit` commands for Snakemake.

Each command runs in a fork of the worker, so jobs share the imports and nothing else. The Snakefile
starts the worker if jobs run on this machine. `python -m hovit` sends its command to the socket in
HOVIT_WORKER, and runs the command itself if no worker answers.

This file imports only the standard library: sending a command costs 20 ms.
"""

import array
import atexit
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress

VARIABLE = "HOVIT_WORKER"
STARTED_AT = "HOVIT_WORKER_STARTED_AT"  # seconds since the epoch
SOCKET = ".snakemake/hovit.sock"  # relative: a socket's path has at most 107 bytes
LOG = "logs/worker.log"
STARTED = b"s"  # what a fork sends first; its exit code follows
PATIENCE = 10.0  # seconds until a worker that was just started must listen
TORCH = ("hovit.models", "hovit.training.classification", "hovit.pipeline.train")
REPORT = ("hovit.report.tables.write", "hovit.report.figures.draw", "hovit.report.claims.write")
# What a command needs; imported when the first such command arrives.
IMPORTS = {
    "train": TORCH,
    "measure": (*TORCH, "hovit.pipeline.measure"),
    "analyse": (*TORCH, "hovit.pipeline.analyse"),
    "table": REPORT,
    "figure": REPORT,
    "claims": REPORT,
}


def start() -> subprocess.Popen[bytes]:
    """Start a worker for the current folder; it ends with this process, even if that is killed.

    Jobs of this process find it by the environment variable.
    """
    os.makedirs(os.path.dirname(LOG), exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(SOCKET)
    os.environ |= {VARIABLE: SOCKET, STARTED_AT: str(time.time())}
    with open(LOG, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hovit.pipeline.worker"],
            stdin=subprocess.PIPE, stdout=log, stderr=log,
        )  # fmt: skip
    atexit.register(process.communicate)  # its CPU time and its jobs' count as this process's
    return process


def hand_over(arguments: list[str]) -> int | None:
    """Have the worker run `hovit ARGUMENTS`, with this process's files, folder and environment.

    Returns:
        its exit code; None if no worker answers, or if it ends before it has started the command.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        if not _connected(connection, path):
            return None
        message = json.dumps(request).encode()
        files = array.array("i", [0, 1, 2])
        header = len(message).to_bytes(8, "big")
        try:
            connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            connection.sendall(message)
            if connection.recv(1) != STARTED:
                return None
        except ConnectionError:
            return None
        code = b""
        with suppress(ConnectionError):
            code = connection.recv(1)
    if not code:
        print("error: the process of this command was killed (out of memory?)", file=sys.stderr)
        return 1
    return code[0]


def _connected(connection: socket.socket, path: str) -> bool:
    """Connect; a worker that has just been started needs a moment to listen."""
    until = float(os.environ.get(STARTED_AT, time.time())) + PATIENCE
    while True:
        try:
            connection.connect(path)
            return True
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            if time.time() > until:
                return False
            time.sleep(0.02)


def reap(jobs: set[int]) -> None:
    """Remove the ended jobs. A signal may interrupt this function and call it again."""
    for job in tuple(jobs):
        try:
            ended = os.waitpid(job, os.WNOHANG)[0] == job
        except ChildProcessError:  # the inner call has reaped it
            ended = True
        if ended:
            jobs.discard(job)


def serve() -> None:
    """Answer requests until standard input ends, that is, until the starter has ended."""
    gc.set_threshold(10_000)  # as in `hovit.__main__`; jobs inherit it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the jobs
    jobs: set[int] = set()  # process ids

    signal.signal(signal.SIGCHLD, lambda *_: reap(jobs))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(SOCKET)
        listener.listen(128)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                break
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # of a command killed while it asks
                if (job := _answer(connection, listener)) is not None:
                    jobs.add(job)
                reap(jobs)  # of those that ended before they were noted
    os.unlink(SOCKET)
    print(cpu_line(), flush=True)


def _answer(connection: socket.socket, listener: socket.socket) -> int | None:
    """Read a request, import what it needs and fork; the fork's process id."""
    space = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    header, ancillary, _, _ = connection.recvmsg(8, space)
    if len(header) < 8 or not ancillary:
        return None  # killed before it had asked
    files = array.array("i")
    files.frombytes(ancillary[0][2])
    request = json.loads(_read(connection, int.from_bytes(header, "big")) or "null")
    job = None
    if request is not None:
        command = next(iter(request["arguments"]), "")
        with suppress(Exception):  # the command itself says what is wrong
            for module in IMPORTS.get(command, ()):
                importlib.import_module(module)
        sys.stdout.flush()
        sys.stderr.flush()
        job = os.fork()
        if job == 0:
            listener.close()
            _run(connection, request, list(files))
    for file in files:
        os.close(file)
    return job


def _read(connection: socket.socket, size: int) -> bytes:
    """That many bytes, or none if the other end closes before."""
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 65536))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _run(connection: socket.socket, request: dict[str, object], files: list[int]) -> None:
    """In the fork: run the command as a process of its own would, and leave."""
    try:
        connection.sendall(STARTED)
    except OSError:  # the command was killed while it waited
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    sys.argv = ["hovit", *request["arguments"]]  # type: ignore[misc]
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    code = 1
    try:
        from hovit.cli import main

        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        if stat.S_ISREG(os.fstat(2).st_mode):  # a log, not a terminal or a pipe
            print(cpu_line(), file=sys.stderr, flush=True)
        connection.sendall(bytes([code & 255]))
    os._exit(code & 255)


def _end_with(connection: socket.socket) -> None:
    """End this process when the one that asked for it has ended."""
    with suppress(OSError):
        connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def cpu_line() -> str:
    """CPU seconds of this process, as the last line of a job's log has them (bench/pipeline.py)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return f"cpu {usage.ru_utime + usage.ru_stime:.2f} s"


if __name__ == "__main__":
    serve()
