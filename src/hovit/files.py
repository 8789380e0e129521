"""Writing files so that a reader, or a killed writer, never meets half of one."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import HovitError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; once written without an error it becomes `path`.

    Raises:
        HovitError: if the file cannot be written (read-only folder, full disk).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise HovitError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # there is no folder, or it is a file
            temporary.unlink()


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
        HovitError: if the file is missing, no JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HovitError(f"{path}: no such file") from None
    except OSError as error:
        raise HovitError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, too deep, too long a number
        raise HovitError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise HovitError(f"{path}: not readable as JSON (no object in it)")
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
