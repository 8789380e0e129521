"""Atomic file writes, JSON, digests and locks."""

import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import HovitError, one_line


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which replaces `path` if the body succeeds.

    The temporary file is locked while it is written. A temporary file without a lock was left by a
    process that died, and is removed. Locks hold across containers; process ids would not.

    Raises:
        HovitError: if the file cannot be written (read-only folder, full disk).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().int}.tmp")
    handle = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.utime(handle, ns=(0, 0))
        yield temporary
        with open(temporary, "rb") as file:
            if os.fstat(file.fileno()).st_mtime_ns == 0:
                raise OSError("nothing was written")
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise HovitError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # renamed, or never made
            temporary.unlink()
        if handle >= 0:
            os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose writers have died."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # locked, removed by another process, or no locks here
            handle = os.open(leftover, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove unfinished copies of `folder` that killed processes left. Call it under `alone`."""
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def alone(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder: a file next to it, removed at the end.

    Locks hold across containers and, where its server supports them, over NFS. If the file system
    has no locks, the body runs without one.

    Args:
        folder: folder to lock; it need not exist.
        wait: wait for a process that holds the lock instead of raising.

    Yields:
        Whether the lock is held.

    Raises:
        HovitError: if another process holds the lock, or the lock file cannot be made.
    """
    path = folder.with_name(f".{folder.name}.lock")
    handle, locked = _open_lock(folder, path), False
    try:
        while True:
            locked = _lock(handle, folder, wait)
            if not locked or _is_same(handle, path):
                break
            os.close(handle)  # its holder has removed the file since: lock the new one
            handle, locked = -1, False
            handle = _open_lock(folder, path)
        yield locked
    finally:
        if locked:
            path.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def _open_lock(folder: Path, path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only writable files
    except OSError as error:
        raise HovitError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _lock(handle: int, folder: Path, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            raise HovitError(
                f"{folder}: in use by another process; wait for it, or end it"
            ) from None
        print(f"{folder}: waiting for another process", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


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
        HovitError: if the file is missing, invalid JSON (NaN, infinity), or not an object.
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
    """Write `value` as JSON, atomically, with its digest added as `sha256`."""
    write_json(path, value | {"sha256": digest(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a file of `write_sealed`, without the `sha256`.

    Raises:
        HovitError: as `read_json`, or if the contents do not match the digest.
    """
    value = read_json(path)
    if value.pop("sha256", None) != digest(value):
        raise HovitError(
            f"{path}: sha256 does not match the contents: the file was changed; delete it"
        )
    return value


def digest(value: Any) -> str:
    """sha256 in hex of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 in hex of the bytes of a file.

    Raises:
        HovitError: if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HovitError(f"{path}: cannot be read: {error.strerror}") from None
