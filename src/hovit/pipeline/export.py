"""Export a sweep to one file: records and, on request, the checkpoints of unfinished runs.

Paths in the archive start at the top folder of the artifact, so `tar -xzf FILE` in that folder
restores all files. `hovit evidence add FILE` adds the records to the evidence.
"""

import contextlib
import io
import json
import re
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from ..config.runs import DETECTIONS, PREDICTIONS
from ..config.tasks import Task, TrainTask
from ..records.evidence import FOLDERS
from ..utils.errors import HovitError, one_line
from ..utils.files import atomic

RECORD_FILES = ("history.csv", PREDICTIONS, DETECTIONS, "record.json")
STATE = "state.safetensors"
EVERY, SHARE = 20.0, 0.05  # least seconds between exports; largest share of time spent on them


def parse_size(text: str) -> int:
    """`60M`, `1.5G`, `800k` or plain bytes -> bytes.

    Raises:
        HovitError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)B?", text.strip())
    if not match or float(match[1]) == 0:
        raise HovitError(f"--max-size {text!r}: write 60M, 800k or 1.5G")
    return int(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])


@dataclass
class Export:
    """Writes the export of a sweep repeatedly while the sweep runs.

    Args:
        path: the file.
        tasks: tasks to export.
        root: top folder of the artifact.
        states: include checkpoints of unfinished runs, measurements in progress, and weights that
            other runs start from.
        max_size: largest size in bytes. Records come first; a state that would exceed the limit is
            left out.
        upstreams: ids of the runs that other runs start from.
    """

    path: Path
    tasks: list[Task]
    root: Path = Path()
    states: bool = False
    max_size: int | None = None
    upstreams: frozenset[str] = frozenset()
    _last: float = 0.0  # time of the last export
    _took: float = 0.0  # seconds it took
    _failed: str = ""  # why the last one failed

    def refresh(self) -> None:
        """Write the file, unless it was just written or would take over 5 % of the time.

        A file that cannot be written does not stop the sweep: it is reported, and tried again.
        """
        if time.monotonic() - self._last <= max(EVERY, self._took / SHARE):
            return
        try:
            self.write()
            self._failed = ""
        except HovitError as error:
            self._last = time.monotonic()
            if str(error) != self._failed:
                print(f"warning: not exported, will retry: {error}", file=sys.stderr, flush=True)
            self._failed = str(error)

    def write(self) -> list[str]:
        """Write the file and return the states that the limit leaves out.

        Raises:
            HovitError: if the file cannot be written.
        """
        began = time.monotonic()
        left_out = []
        with (
            atomic(self.path) as temporary,
            tarfile.open(temporary, "w:gz", compresslevel=1) as tar,
        ):
            for task in self.tasks:
                for path in _record_files(task):
                    _add(tar, self.root, path)
            for name, files in self._states() if self.states else ():
                with contextlib.ExitStack() as stack:
                    opened = _open_all(stack, self.root, files)
                    size = sum(_size(file) for file in opened.values())
                    if self.max_size and _written(tar) + size > 0.98 * self.max_size:
                        left_out.append(f"{name} ({size / 1e6:.0f} MB)")
                        continue
                    for path, file in opened.items():
                        _add_open(tar, path, file)
        self._last, self._took = time.monotonic(), time.monotonic() - began
        return left_out

    def _states(self) -> Iterable[tuple[str, list[Path]]]:
        """Yield the files that unfinished tasks resume from, and weights of upstream runs."""
        for task in self.tasks:
            done = task.is_done(self.root)
            if not isinstance(task, TrainTask):
                folder = self.root / task.path.parent  # one file of counts, one of each process
                if begun := sorted(folder.glob(f"{task.path.stem}.*partial.json")):
                    yield str(task), [path.relative_to(self.root) for path in begun]
            elif done and task.run.id in self.upstreams and (self.root / task.weights).exists():
                yield f"weights of {task.run.id}", [task.weights]
            elif not done and (self.root / task.run.folder / STATE).exists():
                yield str(task), _state_files(self.root, task)


def _record_files(task: Task) -> list[Path]:
    if isinstance(task, TrainTask):
        return [task.run.folder / name for name in RECORD_FILES]
    return [task.path]


def _state_files(root: Path, task: TrainTask) -> list[Path]:
    """The checkpoint of a run, and the weights of its best epoch so far."""
    folder = task.run.folder
    try:
        with safe_open(root / folder / STATE, "np") as file:
            history = json.loads((file.metadata() or {}).get("hovit", "{}")).get("history", [])
    except (OSError, SafetensorError, ValueError):
        return []
    validated = [epoch for epoch in history if "val_top1" in epoch]  # detectors keep no best
    best = max(validated, key=lambda epoch: epoch["val_top1"], default=None)
    weights = [folder / f"best-{best['epoch']:.0f}.safetensors"] if best else []
    return [folder / STATE, *weights]


def _open_all(stack: contextlib.ExitStack, root: Path, paths: list[Path]) -> dict[Path, BinaryIO]:
    """Open all files of a state; {} if its run has replaced one of them meanwhile."""
    try:
        return {path: stack.enter_context(open(root / path, "rb")) for path in paths}
    except FileNotFoundError:
        return {}


def _size(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def _written(tar: tarfile.TarFile) -> int:
    """Compressed bytes written so far, without those still in a buffer."""
    fileobj = getattr(tar.fileobj, "fileobj", None) or tar.fileobj
    assert fileobj is not None
    return int(fileobj.tell())


def _add(tar: tarfile.TarFile, root: Path, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), open(root / path, "rb") as file:
        _add_open(tar, path, file)


def _add_open(tar: tarfile.TarFile, path: Path, file: BinaryIO) -> None:
    info = tarfile.TarInfo(path.as_posix())
    info.size, info.mtime = _size(file), int(time.time())
    file.seek(0)
    tar.addfile(info, file)


def unpack_records(path: Path, target: Path) -> None:
    """Unpack records and predictions of an export into a folder, without checkpoints.

    Raises:
        HovitError: if the file is not an export or is truncated.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                if not (member.isfile() and _is_record_file(place)):
                    continue
                if place.is_absolute() or ".." in place.parts:
                    raise HovitError(f"{path}: {member.name!r} is not a path inside an export")
                content = tar.extractfile(member)
                assert content is not None
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                (target / place).write_bytes(content.read())
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        reason = one_line(error)
        raise HovitError(f"{path}: not a readable export of `hovit sweep` ({reason})") from None


def _is_record_file(path: PurePosixPath) -> bool:
    of_folder = path.parent.name in FOLDERS and path.suffix == ".json"
    return (of_folder and not path.name.endswith(".partial.json")) or path.name in RECORD_FILES
