"""The git repository of the artifact."""

import os
import subprocess
from pathlib import Path

from .errors import HovitError


def git(root: Path, *args: str) -> bytes:
    """Output of a git command in `root`.

    Environment variables such as GIT_DIR are ignored: they may name another repository. The
    repository may belong to another user, as when it is mounted into a container.

    Raises:
        HovitError: if git is missing or fails.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(root), *args],
            capture_output=True, check=True, timeout=60, env=clean,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        raise HovitError(f"{root.resolve()}: git {args[0]} failed") from None


def is_repository(root: Path) -> bool:
    """Whether `root` is the top folder of a git repository, not a folder within another one."""
    try:
        top = git(root, "rev-parse", "--show-toplevel").decode().rstrip("\n")
    except HovitError:
        return False
    return Path(top).resolve() == root.resolve()
