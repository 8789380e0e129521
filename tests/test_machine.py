"""Machines that allow less than usual: control groups, no home, read-only folders, a full /tmp."""

import getpass
import os
import shutil
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hovit.records.record import make_provenance
from hovit.utils import machine
from hovit.utils.device import Device, describe_device, set_threads
from hovit.utils.errors import HovitError
from hovit.utils.machine import (
    check_writable,
    name_user,
    usable_cpus,
    usable_memory_mb,
    use_writable_caches,
)

CPUS = 8  # of the affinity mask in the tests of control groups
MEMINFO = {"proc/meminfo": "MemTotal:       16000000 kB\nMemFree:         100 kB"}
V1 = {"proc/self/cgroup": "4:memory:/job/step\n1:cpu,cpuacct:/job/step\n0::/"}
V2 = {"proc/self/cgroup": "0::/user.slice/job\n"}
HOST = {"proc/self/cgroup": "1:cpu,cpuacct:/docker/abc\n"}  # the path is that of the host
# case: (files, usable processors, usable memory in MB)
GROUPS = {
    "no limit": ({}, CPUS, None),
    "no control groups": (MEMINFO, CPUS, 16384),
    "version 2": (V2 | MEMINFO | {
        "sys/fs/cgroup/user.slice/job/cpu.max": "250000 100000",
        "sys/fs/cgroup/user.slice/job/memory.max": "4000000000",
    }, 3, 4000),
    "version 2, limit above": (V2 | {
        "sys/fs/cgroup/user.slice/cpu.max": "100000 100000",
        "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/memory.max": "2000000000",
        "sys/fs/cgroup/user.slice/job/memory.max": "max",
    }, 1, 2000),
    "version 2, in a container": ({
        "proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000",
    }, 2, None),
    "version 2, less than one": (V2 | {
        "sys/fs/cgroup/user.slice/job/cpu.max": "10000 100000",
    }, 1, None),
    "version 2, more than there are": (V2 | {
        "sys/fs/cgroup/user.slice/job/cpu.max": "6400000 100000",
    }, CPUS, None),
    "version 1": (V1 | MEMINFO | {
        "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us": "200000",
        "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000000000",
        "sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": "9223372036854771712",
    }, 2, 3000),
    "version 1, no limit": (V1 | {
        "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/job/step/cpu.cfs_period_us": "100000",
    }, CPUS, None),
    "version 1, in a container": (HOST | {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }, 2, None),
    "version 1, a group within a container": ({
        "proc/self/cgroup": "1:cpu,cpuacct:/docker/abc/job\n",
        "proc/self/mountinfo": "1 0 0:1 /docker/abc /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    }, 2, None),
    "without /proc": ({
        "sys/fs/cgroup/cpu.max": "100000 100000", "sys/fs/cgroup/memory.max": "1000000000",
    }, 1, 1000),
    "not numbers": (V2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "many few"}, CPUS, None),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_limits_of_control_groups(case, tmp_path, monkeypatch):
    files, cpus, memory = GROUPS[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CPUS)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus
    assert usable_memory_mb(tmp_path) == memory


def test_the_affinity_mask_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert usable_cpus(tmp_path) == 1


def test_a_real_control_group_limits_the_processors():
    group = Path(f"/sys/fs/cgroup/cpu/hovit-{uuid.uuid4().hex}")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: nothing to limit")
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here ({error.strerror})")
    code = (
        "import os, sys; from pathlib import Path; from hovit.utils.machine import usable_cpus; "
        "before = usable_cpus(); Path(sys.argv[1]).write_text(str(os.getpid())); "
        "print(before, usable_cpus())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, group / "cgroup.procs"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [str(usable_cpus()), "1"]
    finally:
        group.rmdir()


def test_torch_gets_no_more_threads_than_processors(monkeypatch):
    monkeypatch.setattr("hovit.utils.device.usable_cpus", lambda: 2)
    for wanted, given in ((1, 1), (2, 2), (64, 2)):
        set_threads(wanted)
        assert torch.get_num_threads() == given


def test_snakemake_gets_no_more_cores_and_memory_than_there_are(checkout):
    """`--cores all` of a container that may use one processor: the job with 2 threads gets one."""
    code = (
        "import sys, hovit.utils.machine as machine; from snakemake.cli import main; "
        "machine.usable_cpus, machine.usable_memory_mb = lambda: {cpus}, lambda: 3500; "
        "main(['-n', '--verbose', '--cores', '{cores}', 'data/packed/digits-64px/pack.json'])"
    )
    for cpus, cores, threads in ((1, "all", 1), (1, "64", 2)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(cpus=cpus, cores=cores)],
            cwd=checkout, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert ("threads: 2" in said) == (threads == 2), said


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Snakemake reads of the artifact, without records."""
    root = tmp_path_factory.mktemp("machine") / "checkout"
    for name in ("config", "profiles", "paper", "rules"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copyfile(ROOT / "Snakefile", root / "Snakefile")
    for name in (".snakemake", "data", "figures", "logs", "results"):
        (root / name).mkdir()
    return root


def in_namespace(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own; skip where there can be none."""
    command = ["unshare", "--mount", "--propagation", "private"]
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    probe = "mount -t tmpfs -o size=64k none /mnt"
    if subprocess.run([*command, "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here (needs root)")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src")} | environment
    return subprocess.run(
        [*command, "sh", "-euc", script], cwd=folder, env=env, capture_output=True, text=True
    )


READ_ONLY = """
mount --bind . .
cd "$PWD"
for folder in {folders}; do mount --bind $folder $folder; done
mount -o remount,ro,bind .
cd "$PWD"
! touch file 2>/dev/null
"""


def test_snakemake_runs_on_a_bare_machine(checkout):
    """A read-only checkout and home, a full /tmp, no /proc, no name of the user, the locale C."""
    if any(path.is_relative_to("/tmp") for path in (ROOT, Path(sys.prefix))):
        pytest.skip("the project lies in /tmp, which this test replaces")
    home = checkout.parent / "home"
    home.mkdir()
    script = (
        f'mount --bind "{checkout.parent}" /mnt; cd /mnt/{checkout.name}\n'
        "mount --bind /mnt/home /mnt/home; mount -o remount,ro,bind /mnt/home\n"
        + READ_ONLY.format(folders=".snakemake data figures logs results")
        + "mount -t tmpfs -o size=64k none /tmp; ! cp /bin/sh /tmp/full 2>/dev/null\n"
        "umount -l /proc\n"
        "for file in passwd nsswitch.conf; do\n"
        "[ ! -e /etc/$file ] || mount --bind /dev/null /etc/$file; done\n"
        "unset LOGNAME USER LNAME USERNAME; ! whoami 2>/dev/null\n"
        "snakemake --cores all data/packed/digits-64px/pack.json\n"
    )
    done = in_namespace(script, checkout, HOME="/mnt/home", LC_ALL="C", TZ="Asia/Tokyo")
    assert done.returncode == 0, done.stderr
    assert "data digits-64px" in done.stderr
    assert (checkout / "data/packed/digits-64px/pack.json").exists()
    assert list(home.iterdir()) == []


def test_a_wholly_read_only_checkout_is_one_line(checkout):
    done = in_namespace(
        READ_ONLY.format(folders="results") + "snakemake --cores all -n results/tables", checkout
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"{checkout}/.snakemake" in error
    assert "mount writable folders at .snakemake, logs, data" in error


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("logs", "results")
    assert (tmp_path / "logs").is_dir()
    (tmp_path / "data").write_text("a file")
    with pytest.raises(HovitError, match="data: File exists; in a read-only checkout, mount"):
        check_writable("logs", "data")


@pytest.mark.parametrize("home", ["read-only", "none", "file", "usual"])
def test_caches_move_only_if_the_home_cannot_be_written(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if home == "none":  # neither HOME nor an entry of the user
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    elif home == "file":
        (tmp_path / "home").write_text("")
    else:
        (tmp_path / "home").mkdir()
    if home == "read-only":
        monkeypatch.setattr(machine.os, "access", lambda *args: False)
    use_writable_caches()
    moved = str(tmp_path / ".snakemake/cache") if home != "usual" else None
    assert os.environ.get("XDG_CACHE_HOME") == moved
    assert os.environ.get("MPLCONFIGDIR") == (moved and f"{moved}/matplotlib")
    assert not (tmp_path / "~").exists()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_a_user_without_a_name_gets_one(error, monkeypatch):
    def unknown(uid: int) -> None:
        raise error(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("pwd.getpwuid", unknown)
    name_user()
    assert getpass.getuser() == f"user{os.getuid()}"
    os.environ["LOGNAME"] = "ada"
    name_user()
    assert getpass.getuser() == "ada"


@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "DEFAULT", "NO AVX"])
def test_a_processor_is_described_with_its_vector_instructions(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    device = describe_device(torch.device("cpu"))
    vectors = capability if capability.startswith("AVX") else ""
    assert device.cpu_capability == vectors
    assert device.model_dump().get("cpu_capability", "") == vectors
    assert str(device).startswith(f"{device.name} with {vectors}, " if vectors else device.name)


def test_a_device_of_an_older_record_keeps_its_hash():
    older = {"kind": "cpu", "name": "Test CPU", "driver": "", "threads": 1}
    assert Device(**older).model_dump() == older


def test_records_state_times_in_utc(monkeypatch):
    device = Device(kind="cpu", name="Test CPU", threads=1)
    made = []
    for zone in ("UTC", "Asia/Tokyo", "America/New_York"):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            made.append(datetime.fromisoformat(make_provenance(device, 1.0, 1.0, "code").made))
    time.tzset()
    assert all(abs((each - datetime.now(UTC)).total_seconds()) < 60 for each in made)
