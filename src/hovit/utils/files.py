"""Atomic file writes, locks, JSON and digests."""

import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import HovitError, one_line


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` if no error occurs.

    Raises:
        HovitError: if the file cannot be written (read-only folder, full disk).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise HovitError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # there is no folder, or it is a file
            temporary.unlink()


def clear_leftovers(path: Path) -> None:
    """Remove temporary files of killed processes that were writing `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        pid, suffix = leftover.name.split(".")[-2:]
        if suffix not in ("tmp", "part") or not pid.isdecimal():
            continue
        if int(pid) == os.getpid() or not _is_alive(int(pid)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder for this process.

    Raises:
        HovitError: if another process holds the lock, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise HovitError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise HovitError(
            f"{folder}: another process is at work in it; wait for it, or end it"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON to `path` atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HovitError: if the file is missing, no JSON (NaN and infinity are none), or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise HovitError(f"{path}: no such file") from None
    except OSError as error:
        raise HovitError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, too deep, too long a number
        raise HovitError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise HovitError(f"{path}: not readable as JSON (no object in it)")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, atomically, with its digest as `sha256`."""
    write_json(path, value | {"sha256": digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file of `write_sealed`, without the seal.

    Raises:
        HovitError: as `read_json`, and if the seal does not match.
    """
    value = read_json(path)
    if value.pop("sha256", None) != digest(value):
        raise HovitError(
            f"{path}: sha256 does not match the contents: the file was changed; delete it"
        )
    return value


def digest(value: Any) -> str:
    """sha256, in hex, of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256, in hex, of a file's bytes.

    Raises:
        HovitError: if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HovitError(f"{path}: cannot be read: {error.strerror}") from None
