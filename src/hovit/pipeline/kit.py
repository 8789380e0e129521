"""Build a folder that runs studies on a rented GPU machine without network: `make gpu-kit`.

kit/hovit/     shallow clone of this repository at its commit, so that records name the commit;
               it contains the counts of parameters and multiply-adds
kit/data/      archives, reduced to the images of the packs
kit/packed/    packs that are not made from archives
kit/wheels/    packages that the other machine lacks
kit/run.sh     GPU tests, latency tables, training, export
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..config.plan import Plan
from ..config.runs import Pack
from ..config.schema import Dataset, Study
from ..config.tasks import MeasureTask, TrainTask
from ..data.listing import member_name, open_zip
from ..data.pack import prepare, select_items
from ..data.readers import read_items
from ..records.record import git_state
from ..utils.errors import HovitError, one_line
from ..utils.files import write_text
from ..utils.git import git
from .measure import count_study
from .schedule import order_tasks

MAX_BYTES = 60_000_000
LOCK, RUN = Path("envs/requirements.lock"), Path("envs/gpu-kit/run.sh")
# Wheels for these platforms run on every recent x86-64 Linux.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
Members = dict[str, set[str]]  # archive -> names in it, with `/`


def make_kit(
    target: Path,
    plan: Plan,
    studies: list[Study],
    *,
    data_root: Path,
    python: str | None = None,
    packages: Iterable[str] = (),
    max_bytes: int = MAX_BYTES,
    root: Path = Path(),
    log: Callable[[str], None] = print,
) -> None:
    """Write the kit.

    Args:
        target: the folder; an earlier kit in it is replaced.
        plan: config at the scale to run.
        studies: studies to run, the most important first.
        data_root: folder with the archives.
        python: version of the other machine's Python, for wheels, such as `3.12`.
        packages: names of packages in the lock file that the other machine lacks.
        max_bytes: limit of the whole folder. Images that would exceed it are left out.
        root: top folder of the artifact.
        log: called with each line of progress.

    Raises:
        HovitError: for uncommitted changes, a folder that is not a kit, missing archives or wheels,
            or a kit that is too large even without images.
    """
    commit, dirty = git_state(root)
    if commit == "unknown":
        raise HovitError(f"{root.resolve()}: not a git repository; a kit is made from a clone")
    if dirty:
        raise HovitError(
            f"{root.resolve()}: has uncommitted changes, which the kit would not contain; commit "
            "them, so that records name their sources"
        )
    if target.exists() and not (target / "kit.env").exists():
        raise HovitError(f"{target}: exists and is not a kit; name another folder, or remove it")
    packs = _packs(plan, studies)
    for pack in packs:
        for path in _archives(pack.dataset, data_root).values():
            if path.is_file():
                open_zip(path).close()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    settings = {
        "COMMIT": commit, "SCALE": plan.scale.id, "STUDIES": " ".join(s.id for s in studies),
    }  # fmt: skip
    write_text(target / "kit.env", "".join(f'{k}="{v}"\n' for k, v in settings.items()))
    shutil.copy(root / RUN, target / "run.sh")
    _clone(root.resolve(), target / "hovit")
    for task in order_tasks(plan, studies, only="measure", done=True):
        assert isinstance(task, MeasureTask)
        count_study(task, target / "hovit")
        log(f"counted {task.id}")
    wanted = [*packages, *_weight_packages(plan, studies)]
    if wanted and python:
        _download_wheels(wanted, python, root / LOCK, target / "wheels")
    elif wanted:
        log(f"no wheels without PYTHON=3.X; the other machine needs {', '.join(wanted)}")
    room = max_bytes - _bytes(target)
    if room < 0:
        raise HovitError(f"{target}: {_bytes(target) / 1e6:.0f} MB without any images; the limit "
                         f"is {max_bytes / 1e6:.0f} MB")  # fmt: skip
    _add_images(packs, data_root, target, room, log)
    log(f"{target}: {_bytes(target) / 1e6:.1f} MB, commit {commit[:10]}; there: {target}/run.sh")


def _clone(root: Path, target: Path) -> None:
    """Clone only the current commit, and remove the path of the original."""
    git(root, "clone", "--quiet", "--depth=1", "--no-tags", f"file://{root}", str(target.resolve()))
    git(target, "remote", "remove", "origin")
    shutil.rmtree(target / ".git/logs", ignore_errors=True)
    for name in ("FETCH_HEAD", "hooks", "description"):
        path = target / ".git" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _packs(plan: Plan, studies: list[Study]) -> list[Pack]:
    """The packs that the runs need, in order of the runs."""
    tasks = order_tasks(plan, studies, priority=True, only="train", done=True)
    packs = [task.run.pack for task in tasks if isinstance(task, TrainTask)]
    return list({pack.id: pack for pack in packs}.values())


def _weight_packages(plan: Plan, studies: list[Study]) -> list[str]:
    """Python packages that contain the weights that runs start from."""
    sources = [run.weights for run in plan.needed(studies) if run.weights]
    return sorted({str(source.package) for source in sources if source.package})


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


# Images


def _add_images(
    packs: list[Pack], data_root: Path, target: Path, room: int, log: Callable[[str], None]
) -> None:
    """Add the images of each pack that fits into `room` bytes."""
    members: Members = {}
    (target / "data").mkdir(parents=True, exist_ok=True)
    for pack in packs:
        if not (pack.dataset.files or pack.dataset.test_files):
            room = _add_packed(pack, data_root, target / "packed", room, log)
            continue
        if folders := [p for p in _archives(pack.dataset, data_root).values() if p.is_dir()]:
            log(f"left out {pack.id}: {folders[0]} is a folder, and a kit holds archives only; "
                "copy it yourself and pass --data to run.sh")  # fmt: skip
            continue
        wider = _union(members, _members(pack.dataset, data_root))
        cost = _archive_bytes(wider, data_root) - _archive_bytes(members, data_root)
        if cost > room:
            log(f"left out {pack.id}: its images need {cost / 1e6:.0f} MB, but {room / 1e6:.0f} MB "
                "are left; copy the archives yourself and pass --data to run.sh")  # fmt: skip
            continue
        members, room = wider, room - cost
        log(f"images of {pack.id}: {cost / 1e6:.1f} MB more")
    for name, wanted in members.items():
        _copy_archive(data_root / name, target / "data" / name, wanted)


def _add_packed(
    pack: Pack, data_root: Path, folder: Path, room: int, log: Callable[[str], None]
) -> int:
    """Add a compressed pack if it fits; return the bytes left."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{pack.id}.tar.gz"
    with tempfile.TemporaryDirectory() as made:
        prepare(pack, data_root, Path(made) / pack.folder)
        with tarfile.open(path, "w:gz") as tar:
            tar.add(Path(made) / pack.folder, pack.folder.as_posix())
    size = path.stat().st_size
    if size > room:
        path.unlink()
        log(f"left out {pack.id}: needs {size / 1e6:.0f} MB, but {room / 1e6:.0f} MB are left")
        return room
    log(f"images of {pack.id}: {size / 1e6:.1f} MB")
    return room - size


def _archives(dataset: Dataset, data_root: Path) -> dict[str, Path]:
    """Name -> path of the archives, or folders, of a data set."""
    paths = {name: data_root / name for name in (*dataset.files, *dataset.test_files)}
    for path in paths.values():
        if not path.exists():
            raise HovitError(
                f"{path}: no such file, but dataset {dataset.id} needs it; name the folder that "
                "contains it (--data-root, or DATA= with make)"
            )
    return paths


def _members(dataset: Dataset, data_root: Path) -> Members:
    """Members of the archives that a data set needs.

    An ImageFolder zip is reduced to all images of the chosen classes, because their number
    determines the draw, and to one image of each other class, because classes are chosen by their
    position among all names. The pack stays the same, byte for byte. Other archives are kept whole.
    """
    paths = _archives(dataset, data_root)
    whole: Members = {}
    for name, path in paths.items():
        with open_zip(path) as archive:
            whole[name] = {member_name(info) for info in archive.infolist()}
    if dataset.reader != "image_folder":
        return whole
    items = read_items(dataset, data_root)
    chosen = {item.label for part in select_items(dataset, items) for item in part}
    kept: Members = {name: set() for name in paths}
    seen: set[tuple[str, str]] = set()
    for item in items:
        name = next(name for name, path in paths.items() if item.path.startswith(f"{path}/"))
        if item.label in chosen or (name, item.label) not in seen:
            kept[name].add(item.path.removeprefix(f"{paths[name]}/"))
        seen.add((name, item.label))
    return kept


def _union(one: Members, other: Members) -> Members:
    return {name: one.get(name, set()) | other.get(name, set()) for name in {**one, **other}}


def _archive_bytes(members: Members, data_root: Path) -> int:
    """Size of the reduced archives: contents and two headers per file."""
    total = 0
    for name, wanted in members.items():
        with zipfile.ZipFile(data_root / name) as archive:
            infos = [info for info in archive.infolist() if member_name(info) in wanted]
        total += sum(info.compress_size + 2 * len(info.filename) + 120 for info in infos)
    return total


def _copy_archive(source: Path, target: Path, wanted: set[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if member_name(info) in wanted:
                new.writestr(info, old.read(info))


# Wheels


def locked(names: Iterable[str], python: str, lock: Path) -> str:
    """The lines of a requirements lock for these packages and this Python, with hashes.

    Markers are omitted, because pip would evaluate them for the Python that runs pip.

    Raises:
        HovitError: for a package that the lock does not contain.
    """
    by_name = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", lock.read_text(encoding="utf-8")):
        requirement = block.split(" ", 1)[0]
        if _is_for(block.split("\\", 1)[0], python):
            hashes = re.findall(r"--hash=\S+", block)
            name = re.split(r"[=\[]", requirement, maxsplit=1)[0]
            by_name[_normal(name)] = " ".join([requirement, *hashes])
    try:
        return "".join(by_name[_normal(name)] + "\n" for name in names)
    except KeyError as error:
        raise HovitError(f"{lock}: has no package {error.args[0]!r} for Python {python}") from None


def _is_for(line: str, python: str) -> bool:
    """Whether the marker of a line, if any, allows this Python version."""
    version = int(python.removeprefix("3."))
    bounds = re.findall(r"python_full_version (<|>=) '3\.(\d+)'", line)
    return all(
        (version < int(bound)) if relation == "<" else version >= int(bound)
        for relation, bound in bounds
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download_wheels(names: list[str], python: str, lock: Path, folder: Path) -> None:
    """Download the locked versions for another Python on x86-64 Linux, and check their hashes."""
    if not re.fullmatch(r"3\.\d+", python):
        raise HovitError(f"--python {python}: write the version of the other machine, such as 3.12")
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(locked(names, python, lock))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--require-hashes", "--only-binary=:all:",
                   f"--python-version={python}", *(f"--platform={p}" for p in PLATFORMS),
                   f"--dest={folder}", f"--requirement={wanted}"]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
            reason = lines[-1] if lines else one_line(error)
            raise HovitError(f"cannot download wheels for Python {python}: {reason}") from None
