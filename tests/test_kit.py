"""The kit: sources at their commit, images that give the same packs, and a run without network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_sweep import REFUSE

from hovit.config.plan import Plan, load_plan
from hovit.config.runs import Pack
from hovit.data.pack import open_pack, prepare
from hovit.pipeline.kit import _add_images, _is_for, locked, make_kit
from hovit.utils.errors import HovitError


def archives(folder: Path, classes: int, images: int, sep: str = "/") -> tuple[str, ...]:
    """Two zips of an ImageFolder with small random images; `sep` is between folder and file."""
    rng = np.random.default_rng(0)
    names = ("part-0.zip", "part-1.zip")
    folder.mkdir()
    for part, name in enumerate(names):
        with zipfile.ZipFile(folder / name, "w") as file:
            for kind in range(classes):
                for i in range(images):
                    info = zipfile.ZipInfo("x")
                    info.filename = sep.join(("train", f"n{kind:02}", f"{part}_{i}.png"))
                    with file.open(info, "w") as member:
                        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
                        Image.fromarray(pixels).save(member, "PNG")
    return names


def some_classes(plan: Plan, files: tuple[str, ...], first: int, last: int) -> Pack:
    dataset = plan.config.datasets["tiny-imagenet-37"].model_copy(update={
        "id": f"some-{first}", "files": files, "classes": (first, last), "images": None,
        "num_classes": last - first,
    })  # fmt: skip
    return Pack(dataset, 64)


@pytest.mark.parametrize("sep", ["/", "\\"])
def test_reduced_archives_give_the_same_packs(plan: Plan, tmp_path: Path, sep: str) -> None:
    names = archives(tmp_path / "all", classes=8, images=12, sep=sep)
    packs = [some_classes(plan, names, 0, 2), some_classes(plan, names, 2, 4)]
    log: list[str] = []
    _add_images(packs, tmp_path / "all", tmp_path / "kit", 10**9, log.append)
    assert len(log) == 2
    for name in names:
        reduced, whole = tmp_path / "kit/data" / name, tmp_path / "all" / name
        assert reduced.stat().st_size < 0.7 * whole.stat().st_size
        with zipfile.ZipFile(reduced) as file:
            assert len(file.namelist()) == 4 * 12 + 4  # all of four classes, one of each other
    for pack in packs:
        made = [prepare(pack, tmp_path / root, tmp_path / root / pack.id) for root in
                ("all", "kit/data")]  # fmt: skip
        assert made[0] == made[1]
        there, here = (open_pack(pack, tmp_path / r / pack.id) for r in ("all", "kit/data"))
        assert (there.images == here.images).all()


def test_images_that_do_not_fit_are_left_out_and_named(plan: Plan, tmp_path: Path) -> None:
    names = archives(tmp_path / "all", classes=8, images=12)
    packs = [some_classes(plan, names, 0, 4), some_classes(plan, names, 4, 5)]
    room = 60 * 64 * 64 * 3
    log: list[str] = []
    _add_images(packs, tmp_path / "all", tmp_path / "kit", room, log.append)
    assert log[0].startswith("left out some-0-64px: its images need ")
    assert log[1].startswith("images of some-4-64px")
    assert sum(path.stat().st_size for path in (tmp_path / "kit").rglob("*.zip")) <= room
    prepare(packs[1], tmp_path / "kit/data", tmp_path / "pack")
    with pytest.raises(HovitError, match=r"part-0\.zip: no such file"):
        _add_images(packs, tmp_path / "nowhere", tmp_path / "kit", room, log.append)


def test_a_folder_is_left_out_and_a_damaged_archive_is_one_line(plan: Plan, tmp_path: Path) -> None:
    names = archives(tmp_path / "all", classes=2, images=2)
    pack = some_classes(plan, names, 0, 2)
    (tmp_path / "all" / names[0]).write_bytes(b"PK damaged")
    with pytest.raises(HovitError, match=r"part-0\.zip: not a readable zip"):
        _add_images([pack], tmp_path / "all", tmp_path / "kit", 10**9, print)
    (tmp_path / "all" / names[0]).unlink()
    (tmp_path / "all" / names[0]).mkdir()
    log: list[str] = []
    _add_images([pack], tmp_path / "all", tmp_path / "kit", 10**9, log.append)
    assert len(log) == 1
    assert "part-0.zip is a folder, and a kit holds archives only" in log[0]


def test_wheels_are_those_of_the_lock_for_the_other_python() -> None:
    lock = ROOT / "envs/requirements.lock"
    versions = {python: locked(["numpy", "pydantic_core"], python, lock).split() for python in
                ("3.11", "3.12")}  # fmt: skip
    for words in versions.values():
        assert [w.partition("==")[0] for w in words if "==" in w] == ["numpy", "pydantic-core"]
        assert sum(w.startswith("--hash=sha256:") for w in words) > 10
    text = lock.read_text()
    for python, bound in (("3.11", "< '3.12'"), ("3.12", ">= '3.12'")):
        assert f"{versions[python][0]} ; python_full_version {bound}" in text
    with pytest.raises(HovitError, match=r"has no package 'no-such' for Python 3\.12"):
        locked(["no_such"], "3.12", lock)


@pytest.mark.parametrize(("marker", "fits"), [
    ("", True), ("; python_full_version < '3.12'", False),
    ("; python_full_version >= '3.12'", True),
    ("; python_full_version >= '3.12' and python_full_version < '3.13'", True),
    ("; python_full_version >= '3.9' and python_full_version < '3.10'", False),
])  # fmt: skip
def test_markers_of_the_lock(marker: str, fits: bool) -> None:
    assert _is_for(f"a==1 {marker}", "3.12") == fits


def git(*args: str, cwd: Path) -> str:
    done = subprocess.run(["git", *args], cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_an_earlier_kit_stays_if_an_archive_is_missing_or_damaged(
    repository: Path, tmp_path: Path
) -> None:
    plan = load_plan("mini", ROOT / "config")
    earlier = tmp_path / "kit"
    earlier.mkdir()
    (earlier / "kit.env").touch()
    for says in ("no such file", "not a readable zip"):
        with pytest.raises(HovitError, match=says):
            make_kit(earlier, plan, [plan.study("depth")], data_root=tmp_path, root=repository)
        assert (earlier / "kit.env").exists()
        for part in (0, 1):
            (tmp_path / f"tiny-imagenet-train-{part}.zip").write_bytes(b"PK damaged")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone of the last commit, with the sources as they are now committed on top."""
    root = tmp_path / "repository"
    git("clone", "-q", "--shared", str(ROOT), str(root), cwd=tmp_path)
    files = git("ls-files", "-m", "-o", "--exclude-standard", "src", "tests", "envs", "config",
                cwd=ROOT).split()  # fmt: skip
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            (root / name).write_bytes((ROOT / name).read_bytes())
    git("add", "-A", cwd=root)
    git("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty",
        "-m", "now", cwd=root)  # fmt: skip
    return root


def test_changes_that_are_not_committed_are_refused(repository: Path, plan: Plan) -> None:
    (repository / "README.md").write_text("changed")
    with pytest.raises(HovitError, match="has uncommitted changes"):
        make_kit(repository / "dist/kit", plan, [plan.study("depth")], data_root=repository,
                 root=repository)  # fmt: skip


def test_a_folder_that_is_no_kit_is_not_replaced(repository: Path, plan: Plan) -> None:
    with pytest.raises(HovitError, match="exists and is not a kit"):
        make_kit(repository / "src", plan, [plan.study("depth")], data_root=repository,
                 root=repository)  # fmt: skip
    assert (repository / "src/hovit").is_dir()


def run_kit(folder: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`run.sh` in an empty kit, with a Python that prints its arguments and exits with `code`."""
    (folder / "hovit").mkdir()
    (folder / "run.sh").write_text((ROOT / "envs/gpu-kit/run.sh").read_text())
    (folder / "kit.env").write_text("COMMIT=c SCALE=smoke STUDIES=hovit\n")
    (folder / "data").mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    python.chmod(0o755)
    return subprocess.run(["bash", str(folder / "run.sh"), *options], check=False, text=True,
                          capture_output=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)})  # fmt: skip


@pytest.mark.parametrize(("options", "says"), [
    (["--budget", "10min"], "error: --budget 10min: write 90s, 14m or 1h"),
    (["--budget", "1.5h"], "error: --budget 1.5h: write"),
    (["--budget", "08m"], "error: --budget 08m: write"),
    (["--budget"], "usage: "), (["--nosuch", "1"], "usage: "),
    (["--accelerator", "gpu"], "error: --accelerator gpu: write cpu or cuda"),
])  # fmt: skip
def test_a_wrong_option_of_run_sh_is_one_line(
    tmp_path: Path, options: list[str], says: str
) -> None:
    done = run_kit(tmp_path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says)
    assert not (tmp_path / "out").exists()


def test_run_sh_fails_if_a_part_fails(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "--accelerator", "cpu", "--budget", "2m", "--skip", "tests", code=3)
    assert done.returncode == 1
    assert done.stdout.count("exit code 3") == 2  # the other part still runs


@pytest.mark.parametrize("option", [[], ["--compile"]])
def test_the_option_compile_is_for_training(tmp_path: Path, option: list[str]) -> None:
    run_kit(tmp_path, *option, "--accelerator", "cpu", "--skip", "tests").check_returncode()
    said = {part: (tmp_path / f"out/{part}.log").read_text().split()
            for part in ("tables", "training")}  # fmt: skip
    assert ["--compile" in words for words in said.values()] == [False, bool(option)]
    for part, words in zip(("measure", "train"), said.values(), strict=True):
        assert words[words.index("--only") + 1] == part


@pytest.mark.exhaustive
def test_the_kit_runs_on_a_cpu_and_its_export_is_evidence(repository: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere and run by `run.sh`; then `hovit evidence add` in the repository."""
    python = [sys.executable, "-m", "hovit"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository / "src")}

    def hovit(*args: str) -> str:
        done = subprocess.run([*python, *args], cwd=repository, check=True, capture_output=True,
                              text=True, env=environment)  # fmt: skip
        return done.stdout

    hovit("kit", str(tmp_path / "kit"), "--study", "dropout", "--scale", "smoke")
    commit = git("rev-parse", "HEAD", cwd=repository)
    kit = (tmp_path / "kit").rename(tmp_path / "elsewhere")
    assert str(repository) not in (kit / "hovit/.git/config").read_text()
    total = sum(path.lstat().st_size for path in kit.rglob("*") if path.is_file())
    assert total < 60e6
    run = ["bash", str(kit / "run.sh"), "--accelerator", "cpu", "--jobs", "2", "--budget", "20m",
           "--skip", "tests"]  # fmt: skip
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable})  # fmt: skip
    assert "tables: exit code 0" in done.stdout, done.stdout
    assert "training: exit code 0" in done.stdout, done.stdout
    assert git("status", "--porcelain", "-uno", cwd=kit / "hovit") == ""
    said = hovit("evidence", "add", str(kit / "out/export.tgz")).splitlines()
    assert said[-1] == "7 records added"  # six rows, one measurement
    if git("rev-parse", "--is-shallow-repository", cwd=ROOT) == "false":
        assert hovit("evidence", "verify").endswith("records of evidence verify\n")
    for path in said[:-1]:
        record = (repository / path).read_text()
        assert f'"commit": "{commit}"' in record
        assert '"dirty": false' in record


@pytest.mark.exhaustive
def test_gpu_tests_are_collected_where_other_packages_are_missing() -> None:
    arguments = ["-q", "-m", "gpu", "--collect-only", "-p", "no:xdist", "-p", "no:hypothesispytest"]
    code = REFUSE.replace('"pytest", ', "") + f"import pytest; sys.exit(pytest.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_latency_on_a_card" in done.stdout
