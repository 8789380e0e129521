"""Processors, memory and cache folders that this process may use.

Affinity masks (`taskset`, Slurm) and control groups (containers, systemd) limit them.
`os.cpu_count` and `snakemake --cores all` ignore control groups.
"""

import errno
import getpass
import math
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import HovitError


def usable_cpus(system: Path = Path("/")) -> int:
    """Number of processors that the affinity mask and the control groups allow, at least 1.

    Args:
        system: root of the file system.
    """
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cpus = len(os.sched_getaffinity(0))
    for group in _groups("cpu", system):
        quota, _, period = _read(group / "cpu.max").partition(" ")  # version 2: `max 100000`
        if not quota:  # version 1
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(cpus, 1)


def usable_memory_mb(system: Path = Path("/")) -> int | None:
    """Memory of the machine in MB, or the lower limit of its control groups; None if unknown.

    Args:
        system: root of the file system.
    """
    total = [
        int(line.split()[1]) * 1024
        for line in _read(system / "proc/meminfo").splitlines()
        if line.startswith("MemTotal:")
    ]
    limits = [
        int(value)
        for group in _groups("memory", system)
        for name in ("memory.max", "memory.limit_in_bytes")  # versions 2 and 1
        if (value := _read(group / name)).isdigit()
    ]
    known = total + limits
    return int(min(known) / 1e6) if known else None


def check_writable(*folders: str) -> None:
    """Create folders and check that they are writable.

    Raises:
        HovitError: naming the first folder that is not.
    """
    for folder in map(Path, folders):
        try:
            folder.mkdir(exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError(errno.EROFS, "not writable")
        except OSError as error:
            raise HovitError(
                f"{folder.absolute()}: {error.strerror}; in a read-only checkout, mount writable "
                "folders at .snakemake, logs, data, results, figures and paper"
            ) from None


def use_writable_caches(folder: Path = Path(".snakemake/cache")) -> None:
    """Keep the caches of libraries in `folder` if the cache folder of the user is not writable.

    The home folder can be read-only or unset, as in a container with another user. Snakemake then
    stops with a traceback, and Matplotlib writes its font cache to the temporary folder at each
    start. An existing MPLCONFIGDIR is kept.
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    try:
        if not usual.is_absolute():  # no home
            raise OSError
        usual.mkdir(parents=True, exist_ok=True)
    except OSError:
        writable = False
    else:
        writable = os.access(usual, os.W_OK)
    if not writable:
        os.environ["XDG_CACHE_HOME"] = str(folder.absolute())
        os.environ.setdefault("MPLCONFIGDIR", str(folder.absolute() / "matplotlib"))


def name_user() -> None:
    """Set USER if the user has no name, as in a container that runs with `--user 1000`.

    Snakemake and PyTorch ask for the name, and stop with a traceback without one.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["USER"] = f"user{os.getuid()}"


def _groups(controller: str, system: Path) -> Iterator[Path]:
    """Folders of the control groups that may limit a controller of this process, with parents.

    In a container, the path may be that of the host. The folder of the container is then the root
    of the mount.
    """
    mount = system / "sys/fs/cgroup"
    paths = {mount, mount / controller}
    mounts = [line.split() for line in _read(system / "proc/self/mountinfo").splitlines()]
    root_of = {fields[4]: fields[3] for fields in mounts if len(fields) > 4}
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "name=systemd"):
            tops = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            tops = [mount / controllers, mount / controller]
        else:
            continue
        for top in tops:
            root = root_of.get(f"/{top.relative_to(system)}", "/")
            below = path.removeprefix(root) if Path(path).is_relative_to(root) else path
            inner = top / below.lstrip("/")
            paths |= {inner, *(p for p in inner.parents if p.is_relative_to(top))}
    yield from sorted(path for path in paths if path.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
