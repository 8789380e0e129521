"""Verify the files in dvc.lock: recompute every md5, in the workspace and in DVC's cache.

DVC trusts a file whose size and time did not change; disk corruption changes neither.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import HovitError
from .yaml_file import read_yaml

LOCK = Path("dvc.lock")
CACHE = Path(".dvc/cache/files/md5")
MD5 = re.compile("[0-9a-f]{32}([.]dir)?")


def check_stored(root: Path = Path()) -> tuple[int, list[str]]:
    """Compare every output of dvc.lock with its md5.

    Returns:
        the number of files in dvc.lock, and a line for each missing or changed file.

    Raises:
        HovitError: if there is no readable dvc.lock.
    """
    count, problems = 0, []
    for out, md5 in _outs(root / LOCK):
        files = {out: md5}
        if md5.endswith(".dir"):
            listing = _cached(root, md5)
            if problem := _problem(listing, md5.removesuffix(".dir")):
                problems.append(f"{listing.relative_to(root)}: {problem} (the list of {out}/)")
                continue
            entries = json.loads(listing.read_text(encoding="utf-8"))
            files = {f"{out}/{entry['relpath']}": entry["md5"] for entry in entries}
        for name, expected in files.items():
            count += 1
            if problem := _problem(root / name, expected):
                problems.append(f"{name}: {problem}")
            cached = _cached(root, expected)
            if problem := _problem(cached, expected):
                problems.append(f"{cached.relative_to(root)}: {problem} (cache of {name})")
    return count, problems


def _outs(lock: Path) -> Iterator[tuple[str, str]]:
    if not lock.exists():
        raise HovitError(f"{lock}: no such file; `dvc repro` writes it")
    stages = read_yaml(lock)
    try:
        outs = [(o["path"], o["md5"]) for s in stages["stages"].values() for o in s["outs"]]
    except (KeyError, TypeError, AttributeError):
        raise HovitError(f"{lock}: not readable as DVC's lock") from None
    for path, md5 in outs:
        if not (isinstance(path, str) and isinstance(md5, str) and MD5.fullmatch(md5)):
            raise HovitError(
                f"{lock}: {path}: md5: {md5!r} is not an md5 of 32 hex digits; `dvc repro` writes "
                "it again"
            )
        yield path, md5


def _cached(root: Path, md5: str) -> Path:
    return root / CACHE / md5[:2] / md5[2:]


def _problem(path: Path, expected: str) -> str:
    try:
        with open(path, "rb") as file:
            same = hashlib.file_digest(file, "md5").hexdigest() == expected
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if same else "differs from dvc.lock"
