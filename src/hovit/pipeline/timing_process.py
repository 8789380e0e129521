"""Time models on a CPU in several fresh processes, one after another.

The speed of each model depends on the memory layout of its process, so ratios between models vary
by up to 15 % between processes, which is more than between rounds. The processes divide the rounds
among them. Each has its own file of samples, and resumes like a single process.

The first line of standard input is the job. The parent keeps it open; when it closes, because the
parent has ended, the process ends too.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..measure.latency import Samples
from ..utils.errors import HovitError, OutOfTime
from ..utils.files import read_sealed

OUT_OF_TIME = 3  # exit code
PACKAGE_ROOT = Path(__file__).parents[2]


def time_in_processes(
    spec: dict[str, Any], begun: dict[str, Any], partial: Path, deadline: float
) -> list[Samples]:
    """Run the processes and return the samples of each, in order.

    Args:
        spec: spec of the measurement; its `latency` has the numbers of rounds and processes.
        begun: identifies the measurement in each file of samples.
        partial: file of samples of a measurement in one process; names the files of all processes.
        deadline: `time.monotonic()` after which to stop.

    Raises:
        OutOfTime: at the deadline; the same call resumes.
        HovitError: if a process fails.
    """
    found = []
    for share, path in zip(_shares(spec["latency"]), partial_files(spec, partial), strict=True):
        if _is_finished(path, begun, share):
            found.append(read_sealed(path)["samples"])
            continue
        left = None if deadline == math.inf else deadline - time.monotonic()
        job = {"spec": spec, "begun": begun, "partial": str(path), "rounds": share, "left": left}
        paths = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
        with subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": paths},
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stderr is not None
            with suppress(BrokenPipeError):  # it has failed at once, and says why
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            lines = process.stderr.read().strip().splitlines()
        if process.returncode == OUT_OF_TIME:
            raise OutOfTime
        if process.returncode:
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            raise HovitError(f"{path.name}: {reason.removeprefix('error: ')}")
        found.append(read_sealed(path)["samples"])
    return found


def _is_finished(path: Path, begun: dict[str, Any], rounds: int) -> bool:
    if not path.exists():
        return False
    saved = read_sealed(path)
    lists = [ms for by_batch in saved["samples"].values() for ms in by_batch.values()]
    return all(saved[key] == begun[key] for key in begun) and min(map(len, lists)) >= rounds


def partial_files(spec: dict[str, Any], partial: Path) -> list[Path]:
    """The file of samples of each process."""
    name = partial.name.removesuffix(".partial.json")
    count = len(_shares(spec["latency"]))
    return [partial.with_name(f"{name}.process{i}.partial.json") for i in range(count)]


def _shares(latency: dict[str, Any]) -> list[int]:
    """Rounds of each process: as equal as possible, and at least one."""
    rounds, processes = latency["rounds"], min(latency.get("processes", 1), latency["rounds"])
    return [rounds // processes + (i < rounds % processes) for i in range(processes)]


def main() -> int:
    """Run one process: read the job from standard input and write the samples to its file."""
    import torch

    import hovit.models  # noqa: F401 (registers)

    from ..utils.device import keep_freed_memory
    from .measure import time_models

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    latency = job["spec"]["latency"]
    torch.manual_seed(0)
    torch.set_num_threads(latency["threads"])
    if latency["memory"] == "kept":
        keep_freed_memory()
    deadline = math.inf if job["left"] is None else time.monotonic() + job["left"]
    try:
        time_models(
            job["spec"] | {"latency": latency | {"rounds": job["rounds"]}},
            job["begun"], torch.device("cpu"), Path(job["partial"]), deadline,
        )  # fmt: skip
    except OutOfTime:
        return OUT_OF_TIME
    except HovitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    """End this process when its parent has ended, even if that was killed."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
