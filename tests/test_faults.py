"""Bad luck and bad files: kills, full disks, damaged and hostile files. README quotes FIGURES."""

import functools
import gzip
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import killed
import numpy as np
import pytest
import torch
from conftest import ROOT, small_run
from fuzz import damaged, damages, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic import made_up_predictions, train_record
from torch import nn

import hovit.training.classification
from hovit import cli
from hovit.config.plan import Plan, load_plan
from hovit.config.runs import Pack, Run
from hovit.config.schema import KINDS, Dataset
from hovit.data.pack import fingerprint, open_pack, prepare
from hovit.pipeline.evidence import check
from hovit.pipeline.measure import _resume
from hovit.records.predictions import read_predictions, write_predictions
from hovit.records.record import read_record, write_record
from hovit.report.results import _image_counts
from hovit.training.checkpoint import State, load_state, load_weights, save_state, save_weights
from hovit.training.classification import train
from hovit.training.trainer import Options, make_fabric
from hovit.utils.errors import HovitError
from hovit.utils.files import (
    alone,
    digest,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
    write_text,
)
from hovit.utils.yaml_file import load_file

KILLS = 20  # each of training, a measurement, the report, packing
EXAMPLES = 200  # damaged versions of each file
FILES = (
    "record.json", "pack.json", "manifest.csv", "images.npy", "predictions.csv.gz",
    "state.safetensors", "weights.safetensors", "depth.partial.json",
)  # fmt: skip


@contextmanager
def one_line_or_none() -> Iterator[list[str]]:
    """Suppress a HovitError, which must be one line; gives a list with what it says."""
    said: list[str] = []
    with suppress(HovitError):
        try:
            yield said
        except HovitError as error:
            said.append(str(error))
            raise
    assert not any("\n" in line for line in said)


def test_readme_quotes_this_suite() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"each killed at {KILLS} random moments" in text
    assert f"{EXAMPLES} damaged versions of each of {len(FILES)} kinds of file" in text


# Killed at random moments -----------------------------------------------------------------------


def outcome(root: Path, run: Run) -> tuple[dict[str, Any], str, bytes]:
    """What must not depend on interruptions."""
    record = read_record(root / run.folder / "record.json")
    results = {
        k: v for k, v in record.results.items() if k not in ("images_per_second", "interruptions")
    }
    files = (root / run.folder / name for name in ("history.csv", "predictions.csv.gz"))
    return results, *(file.read_bytes() for file in files)  # type: ignore[return-value]


@pytest.mark.slow
def test_killed_training_ends_the_same_to_the_bit(plan: Plan, packed: Path) -> None:
    run = small_run(plan, epochs=5)
    folder = packed / run.folder
    length = killed.undisturbed(killed.training, packed)
    expected = outcome(packed, run)
    shutil.rmtree(folder)
    reached, furthest = (0, 0), (0, 0)

    def after_kill() -> None:
        nonlocal reached, furthest
        assert all(p.name.startswith(".") or p.name in names for p in folder.glob("*"))
        if (folder / "record.json").exists():  # it was tidying up
            assert outcome(packed, run) == expected
            reached = (0, 0)
        elif (folder / "state.safetensors").exists():
            state = position(folder / "state.safetensors")
            assert state >= reached  # nothing that was saved is lost
            reached, furthest = state, max(furthest, state)

    def at_end() -> None:
        nonlocal reached
        assert outcome(packed, run) == expected
        assert {path.name for path in folder.iterdir()} == set(final)
        shutil.rmtree(folder)
        reached = (0, 0)

    final = ("record.json", "weights.safetensors", "history.csv", "predictions.csv.gz")
    names = (*final, "state.safetensors", *(f"best-{epoch}.safetensors" for epoch in range(1, 6)))
    killed.kill(killed.training, packed, KILLS, 0.6 * length, after_kill, at_end)
    assert furthest > (0, 0)


def position(path: Path) -> tuple[int, int]:
    """Epoch and step of a checkpoint, which must be whole."""
    from hovit.training.checkpoint import _load

    header = _load(path)[1]
    return header["epoch"], header["step"]


@pytest.mark.slow
def test_killed_measurement_keeps_its_rounds(tmp_path: Path) -> None:
    plan, study = killed.measured_study()
    path = tmp_path / plan.measure_task(study).path
    partial = path.with_suffix(".partial.json")
    length = killed.undisturbed(killed.measuring, tmp_path)
    exact = {name: row["macs"] for name, row in rows_of(path).items()}
    path.unlink()
    kept: dict[tuple[str, str], list[float]] = {}
    most = 0

    def hold(samples: dict[str, dict[str, list[float]]]) -> None:
        """These are the samples there were, and whole rounds beside."""
        nonlocal kept, most
        now = {(name, b): ms for name, by in samples.items() for b, ms in by.items()}
        assert len({len(ms) for ms in now.values()}) == 1
        for key, ms in kept.items():
            assert now[key][: len(ms)] == ms
        kept, most = now, max(most, *map(len, now.values()))

    def after_kill() -> None:
        if path.exists():
            at_end()
        elif partial.exists() and (samples := read_sealed(partial).get("samples")):
            hold(samples)

    def at_end() -> None:
        nonlocal kept
        rows = rows_of(path)
        assert {name: row["macs"] for name, row in rows.items()} == exact
        latency = {name: row["latency"] for name, row in rows.items()}
        once = {name for name, _ in kept} or set(latency)
        hold({n: {b: v["ms"] for b, v in latency[n].items()} for n in once})
        assert {v["n"] for by in latency.values() for v in by.values()} == {killed.ROUNDS}
        path.unlink()
        partial.unlink(missing_ok=True)
        kept = {}

    killed.kill(killed.measuring, tmp_path, KILLS, 0.4 * length, after_kill, at_end)
    assert most == killed.ROUNDS
    assert not list(path.parent.iterdir())


def rows_of(path: Path) -> dict[str, Any]:
    return read_record(path).results["rows"]


@pytest.mark.slow
def test_killed_report_leaves_whole_files_or_none(
    tmp_path: Path, copy_records: Callable[[Plan, Path], Path]
) -> None:
    copy_records(load_plan("mini", ROOT / "config"), tmp_path)
    length = killed.undisturbed(killed.reporting, tmp_path)
    expected = shown(tmp_path)
    assert len(expected) > 30
    counts: list[int] = []

    def wipe() -> None:
        for folder in ("results/tables", "figures"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        for file in (tmp_path / "results").glob("claims.*"):
            file.unlink()

    def after_kill() -> None:
        found = shown(tmp_path)
        assert found.items() <= expected.items()
        for path in hidden(tmp_path):
            assert re.fullmatch(r"\..+\.\d+\.tmp", path.name)
        counts.append(len(found))
        if len(counts) % 3:  # sometimes over what is there, sometimes anew
            wipe()

    def at_end() -> None:
        assert shown(tmp_path) == expected
        assert not hidden(tmp_path)  # of the killed ones, nothing stays

    wipe()
    killed.kill(killed.reporting, tmp_path, KILLS, length, after_kill, at_end)
    assert min(counts) < len(expected)


def reported(root: Path) -> list[Path]:
    places = (*(root / "results/tables").rglob("*"), *(root / "figures").rglob("*"))
    return [p for p in (*places, *(root / "results").glob("*")) if p.is_file()]


def shown(root: Path) -> dict[str, bytes]:
    """What a reader sees of the report."""
    files = [path for path in reported(root) if not path.name.startswith(".")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def hidden(root: Path) -> list[Path]:
    return [path for path in reported(root) if path.name.startswith(".")]


@pytest.mark.slow
def test_killed_packing_leaves_a_whole_pack_or_none(plan: Plan, tmp_path: Path) -> None:
    pack = plan.run("levit_deck.pets.deck").pack
    folder = tmp_path / pack.folder
    length = killed.undisturbed(killed.packing, tmp_path)
    expected = open_pack(pack, folder).meta
    shutil.rmtree(folder)

    def after_kill() -> None:
        if folder.exists():
            at_end(False)

    def at_end(ended: bool = True) -> None:
        assert open_pack(pack, folder).meta == expected
        assert not ended or [p.name for p in folder.parent.iterdir()] == [folder.name]
        shutil.rmtree(folder)

    killed.kill(killed.packing, tmp_path, KILLS, length, after_kill, at_end)


# Two at once ------------------------------------------------------------------------------------


def test_two_processes_do_not_train_one_run(plan: Plan, packed: Path) -> None:
    run = small_run(plan)
    fabric = make_fabric("32-true", accelerator="cpu")
    with alone(packed / run.folder), pytest.raises(HovitError, match="in use by another process"):
        train(run, fabric, packed)
    train(run, fabric, packed)


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hovit.utils.files import alone\n"
        "with alone(Path(sys.argv[1])): print('in', flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(HovitError, match="in use by another process"), alone(tmp_path):
            pass
        process.kill()
    with alone(tmp_path):
        pass


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A copy of what a reader has, before anything has run."""
    for name in ("Snakefile", "rules", "profiles", "config"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


TABLE = "results/tables/datasets.md"  # needs data and no training


def snakemake(root: Path, *args: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *args]
    return subprocess.Popen(
        command, cwd=root, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, said = process.communicate()
    return process.returncode, said


def wait_for_a_lock(root: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while not list(root.glob(".snakemake/locks/*")) or not list(root.glob("logs/*/*")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.slow
def test_two_snakemakes_and_a_killed_one(artifact: Path) -> None:
    first = snakemake(artifact, TABLE)
    wait_for_a_lock(artifact, first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still there when the second comes
    try:
        code, said = ended(snakemake(artifact, TABLE))
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert code != 0
    assert "lock" in said
    assert ended(first)[0] == 0
    expected = (artifact / TABLE).read_bytes()

    for folder in ("data", "logs", "results"):
        shutil.rmtree(artifact / folder)
    third = snakemake(artifact, TABLE)
    wait_for_a_lock(artifact, third)
    os.killpg(third.pid, signal.SIGKILL)  # as if the machine had gone down
    ended(third)
    code, said = ended(snakemake(artifact, TABLE))
    assert code != 0
    assert "--unlock" in said
    assert ended(snakemake(artifact, "--unlock"))[0] == 0
    code, said = ended(snakemake(artifact, TABLE))
    assert code == 0, said
    assert (artifact / TABLE).read_bytes() == expected


# A full disk, a read-only folder ----------------------------------------------------------------


class Disk:
    """A file system of its own."""

    def __init__(self, place: Path, kilobytes: int) -> None:
        self.place, self.filler = place, place / "filler"
        place.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "hovit-test")

    def _mount(self, *args: str) -> None:
        done = subprocess.run(["mount", *args, str(self.place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")

    def fill(self, leave: int = 0) -> None:
        with open(self.filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                file.truncate(file.tell() - leave)

    def free(self) -> None:
        self.filler.unlink()

    def read_only(self, yes: bool) -> None:
        self._mount("-o", f"remount,{'ro' if yes else 'rw'}")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=False, capture_output=True)


@pytest.fixture
def disk() -> Iterator[Callable[[Path, int], Disk]]:
    disks: list[Disk] = []

    def make(place: Path, kilobytes: int) -> Disk:
        disks.append(Disk(place, kilobytes))
        return disks[-1]

    yield make
    for made in disks:
        made.close()


def refused(root: Path, *args: str) -> str:
    """The command must say one line on stderr and exit with 1."""
    code, _, said = killed.run_hovit(root, *args)
    assert (code, said.count("\n")) == (1, 1), said
    assert said.startswith("error: ")
    return said


# Command, where it writes, how much room that needs
WRITERS = {
    "pack": ("data/packed", ["data", "digits-64px"], 2000),
    "table": ("results/tables", ["table", "hovit", "--scale", "mini"], 400),
    "figure": ("figures", ["figure", "five_ideas", "--scale", "mini"], 2000),
}


@pytest.fixture
def records(tmp_path: Path, copy_records: Callable[[Plan, Path], Path]) -> Path:
    """The config and all records of scale mini."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    return copy_records(load_plan("mini", ROOT / "config"), tmp_path)


def contents(place: Path) -> dict[str, bytes]:
    files = [p for p in place.rglob("*") if p.is_file() and p.name != "filler"]
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in files}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_or_a_read_only_folder_is_one_line(
    records: Path, disk: Callable[[Path, int], Disk], what: str
) -> None:
    place, command, kilobytes = WRITERS[what]
    small = disk(records / place, kilobytes)
    small.fill()
    assert place in refused(records, *command)
    assert contents(records / place) == {}
    small.free()
    assert killed.run_hovit(records, *command)[0] == 0
    expected = contents(records / place)
    if what == "pack":  # one that is there is not made again, so let it be another's
        meta = records / place / "digits-64px/pack.json"
        meta.write_text(meta.read_text().replace('"spec_hash": "', '"spec_hash": "0'))
    before = contents(records / place)
    for harm, mend in (
        (small.fill, small.free),
        (lambda: small.read_only(True), lambda: small.read_only(False)),
    ):
        harm()
        assert place in refused(records, *command)
        assert contents(records / place) == before
        mend()
    assert killed.run_hovit(records, *command)[0] == 0
    assert contents(records / place) == expected


@pytest.mark.slow
def test_a_disk_that_fills_while_packing_does_not_kill_the_process(
    records: Path, disk: Callable[[Path, int], Disk]
) -> None:
    """The images are written to mapped memory, where a full disk is SIGBUS and not an error."""
    small = disk(records / "data/packed", 2000)
    small.fill(leave=100_000)  # of 345,152
    assert "No space left" in refused(records, "data", "digits-64px")
    small.free()
    assert killed.run_hovit(records, "data", "digits-64px")[0] == 0


@pytest.mark.parametrize("moment", ["a step", "the last epoch", "the test"])
def test_a_disk_that_fills_while_training(
    plan: Plan,
    packed: Path,
    disk: Callable[[Path, int], Disk],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    run = small_run(plan)
    fabric = make_fabric("32-true", accelerator="cpu")
    train(run, fabric, packed)
    expected = outcome(packed, run)
    shutil.rmtree(packed / run.folder)
    small = disk(packed / run.folder, 400_000)

    def fill(*seen: Any) -> None:
        if moment == "a step" and seen[:2] == (1, 2):
            small.fill()
        if moment == "the last epoch" and seen[0]["epoch"] == 2:
            small.fill()

    def full_at_the_test(*args: Any) -> None:
        small.fill()
        write_predictions(*args)

    options = Options(save_seconds=0)
    if moment == "a step":
        options.on_step = fill
    elif moment == "the last epoch":
        options.on_epoch = fill
    with monkeypatch.context() as patch:
        if moment == "the test":
            patch.setattr(hovit.training.classification, "write_predictions", full_at_the_test)
        with pytest.raises(HovitError, match=r"cannot be written: .*No space left") as caught:
            train(run, fabric, packed, options)
    assert str(small.place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (small.place / "record.json").exists()
    assert position(small.place / "state.safetensors") >= (1, 0)
    small.free()
    record = train(run, fabric, packed)
    assert record.results["interruptions"] == 1
    assert outcome(packed, run) == expected


def test_training_and_measuring_into_a_read_only_folder(
    plan: Plan, packed: Path, disk: Callable[[Path, int], Disk]
) -> None:
    disk(packed / "results", 1000).read_only(True)
    with pytest.raises(HovitError, match=r"results/.*cannot be written: Read-only"):
        train(small_run(plan), make_fabric("32-true", accelerator="cpu"), packed)
    with pytest.raises(HovitError, match=r"measure/depth: cannot be written: Read-only"):
        killed.measuring(packed)
    record = train_record(small_run(plan), 50.0)
    with pytest.raises(HovitError, match=r"record\.json: cannot be written: Read-only"):
        write_record(packed / "results/record.json", record)


# Damaged files ----------------------------------------------------------------------------------

SMALL_DATA = Dataset(
    id="digits", title="t", about="a", reader="digits", num_classes=10, native_size=8,
    split={"train": 0.7, "val": 0.15},
)  # fmt: skip
PACK = Pack(SMALL_DATA, 8)


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A little model and its optimizer, one step old."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def tensors_of(value: Any) -> Any:
    """The same with tensors as (type, shape, numbers), so that == works."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.flatten().tolist()
    if isinstance(value, dict):
        return {key: tensors_of(v) for key, v in value.items()}
    return value


def read_state(path: Path) -> Any:
    model, optimizer = network()
    state = load_state(path, ["spec", "code"], model, optimizer)
    assert state.epoch == 3  # not begun anew
    return state, tensors_of(model.state_dict()), tensors_of(optimizer.state_dict()["state"])


def read_pack(path: Path) -> Any:
    """A pack as training, `hovit data` and the report see it."""
    found = open_pack(PACK, path.parent)
    assert prepare(PACK, Path(), path.parent) == found.meta
    splits = {name: index.tolist() for name, index in found.splits.items()}
    counts = _image_counts(path.parent)
    return found.meta, splits, found.labels.tolist(), found.images.tobytes(), counts


BEGUN = {"spec_hash": "0" * 64, "code": "1" * 64, "device": {"kind": "cpu", "name": "x"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undamaged file of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(PACK, Path(), folder / "pack")
    for file in (folder / "pack").iterdir():
        shutil.copy(file, folder)
    run = small_run(load_plan("smoke", ROOT / "config"))
    write_record(folder / "record.json", train_record(run, 50.0))
    write_predictions(folder / "predictions.csv.gz", made_up_predictions(50.0))
    model, optimizer = network()
    save_weights(folder / "weights.safetensors", model, spec_hash="spec")
    state = State(["spec", "code"], epoch=3, losses=[1.5], history=[{"val_top1": 2.5}])
    save_state(folder / "state.safetensors", state, model, optimizer)
    samples = {"a": {"1": [1.25, 2.5], "32": [3.5, 4.75]}}
    write_sealed(folder / "depth.partial.json", BEGUN | {"samples": samples})
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "record.json": lambda path: read_record(path).model_dump(),
    "pack.json": read_pack,
    "manifest.csv": read_pack,
    "images.npy": read_pack,
    "predictions.csv.gz": lambda path: read_predictions(path).to_dict("list"),
    "state.safetensors": read_state,
    "weights.safetensors": lambda path: tensors_of(load_weights(path)),
    "depth.partial.json": lambda path: _resume(path, BEGUN),
}


def spoil(whole: Path, folder: Path, name: str, data: bytes) -> Path:
    """The file with other bytes, among undamaged ones."""
    for neighbour in ("pack.json", "manifest.csv", "images.npy"):
        if not (folder / neighbour).exists() and neighbour != name:
            shutil.copy(whole / neighbour, folder / neighbour)
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line_or_changes_nothing(
    whole: Path, tmp_path: Path, name: str
) -> None:
    original = (whole / name).read_bytes()
    path = spoil(whole, tmp_path, name, original)
    expected = READERS[name](path)
    assert READERS[name](path) == expected
    tried = noticed = 0

    @fuzz(EXAMPLES)
    @given(damage=damages)
    def run(damage: Any) -> None:
        nonlocal tried, noticed
        tried += 1
        path.write_bytes(damaged(original, damage))
        with one_line_or_none() as said:
            assert READERS[name](path) == expected
        assert all(str(tmp_path) in line for line in said)
        noticed += len(said)

    run()
    assert noticed > tried / 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_config_file_is_one_line(tmp_path: Path, kind: str) -> None:
    source = sorted((ROOT / "config" / kind).glob("*.yaml"))[0]
    original, path = source.read_bytes(), tmp_path / source.name

    @fuzz(EXAMPLES // 4)
    @given(damage=damages)
    def run(damage: Any) -> None:
        path.write_bytes(damaged(original, damage))
        with one_line_or_none() as said:
            load_file(path, KINDS[kind])
        assert all(str(path) in line for line in said)

    run()


@pytest.mark.parametrize("form", ["zip", "png", "jpg"])
def test_a_damaged_archive_or_image_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A zip gives the images that were put in; what is noticed of an image is PIL's matter."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), dtype=np.uint8)
    images = []
    for array in pixels:
        content = io.BytesIO()
        Image.fromarray(array).save(content, "jpeg" if form == "jpg" else "png")
        images.append(content.getvalue())
    if form == "zip":
        target = tmp_path / "data.zip"
        with zipfile.ZipFile(target, "w") as archive:
            for i, content_ in enumerate(images):
                archive.writestr(f"data/class_{i % 2}/{i}.png", content_)
    else:
        for i, content_ in enumerate(images):
            target = tmp_path / f"data/class_{i % 2}/{i}.{form}"
            write_text(target, "")
            target.write_bytes(content_)
    source = "data.zip" if form == "zip" else "data"
    what = SMALL_DATA.model_copy(
        update={"reader": "image_folder", "num_classes": 2, "files": (source,)}
    )
    original = target.read_bytes()
    known = {image.tobytes() for image in pixels}

    @fuzz(EXAMPLES // 2)
    @given(damage=damages)
    def run(damage: Any) -> None:
        shutil.rmtree("pack", ignore_errors=True)
        target.write_bytes(damaged(original, damage))
        pack = Pack(what.model_copy(update={"native_size": 9}), 9)
        with one_line_or_none() as said:
            prepare(pack, tmp_path, Path("pack"))
        assert Path("pack").exists() != bool(said)
        if not said and form == "zip":
            found = open_pack(pack, Path("pack"))
            assert {image.tobytes() for image in found.images} <= known

    run()


json_values = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab/.", max_size=3)
json_values |= st.lists(st.integers(0, 3), max_size=2) | st.just({})


def test_a_record_changed_and_sealed_again_is_no_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a hostile record says, checking it ends in one line."""
    plan = load_plan("smoke", ROOT / "config")
    run = next(iter(plan.run(name) for name in plan.runs))
    monkeypatch.setattr("hovit.pipeline.evidence._check_code", lambda *_: None)
    valid = train_record(run, 50.0)
    path = tmp_path / "record.json"
    write_predictions(tmp_path / "predictions.csv.gz", made_up_predictions(50.0))
    write_record(path, valid)
    check({plan.scale.id: plan}, path)
    content = read_json(path)
    places = [
        (*before, key)
        for before, inside in (
            ((), content), (("results",), content["results"]), (("spec",), content["spec"]),
            (("spec", "recipe"), content["spec"]["recipe"]),
            (("provenance",), content["provenance"]),
        )
        for key in inside
    ]  # fmt: skip

    @fuzz(EXAMPLES)
    @given(place=st.sampled_from(places), value=json_values | st.just("gone"))
    def run_it(place: tuple[str, ...], value: Any) -> None:
        changed = json.loads(json.dumps(content))
        inside = functools.reduce(lambda d, key: d[key], place[:-1], changed)
        if value == "gone":
            del inside[place[-1]]
        else:
            inside[place[-1]] = value
        write_json(path, changed)
        with one_line_or_none():
            assert read_record(path).model_dump() == valid.model_dump() | {"sha256": valid.seal()}
        changed.pop("sha256", None)
        if "spec" in changed and changed["spec"] != content["spec"]:
            changed["spec_hash"] = digest(changed["spec"])
        write_sealed(path, changed)
        with one_line_or_none():
            record = check({plan.scale.id: plan}, path)
            assert record.spec == valid.spec
            for key in ("loss", "top1", "predictions_sha256"):
                assert record.results[key] == valid.results[key]

    run_it()


def says(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The command, in this process: exit code 1 and one line."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hovit", *args])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    said = capsys.readouterr().err
    assert (exit_.value.code, said.count("\n")) == (1, 1), said
    return said


def test_commands_name_the_damaged_file(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(records)
    monkeypatch.setattr("hovit.pipeline.show.PROBE", ("levit_128s", 2))  # of `hovit show`
    plan = load_plan("smoke")
    run = plan.run("levit_deck.pets.deck")
    prepare(run.pack, Path(), run.pack.folder)
    pack = run.pack.folder / "pack.json"
    state = run.folder / "state.safetensors"
    garbage = (b"", b"\x80\x04garbage", b'{"spec_hash": NaN}')
    for path, contents_, *command in (
        (state, garbage[1:2], "train", run.id, "--accelerator", "cpu"),
        (pack, garbage, "data", run.pack.id),
        (pack, garbage, "table", "datasets"),
        (pack, garbage[2:], "show", run.id),
        (pack, garbage[2:], "train", run.id, "--accelerator", "cpu"),
        (Path("config/recipes/deck.yaml"), garbage, "list"),
    ):
        before = path.read_bytes() if path.exists() else None
        for content in contents_:
            write_text(path, "")
            path.write_bytes(content)
            assert path.name in says(capsys, *command)
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_record_too_deep_to_seal_is_one_line(whole: Path, tmp_path: Path, depth: int) -> None:
    text = (whole / "record.json").read_text()
    deep = f'"results": {{"deep": {"[" * depth}{"]" * depth},'
    (tmp_path / "record.json").write_text(text.replace('"results": {', deep, 1))
    with pytest.raises(HovitError, match=r"record\.json: not "):
        read_record(tmp_path / "record.json")


def test_a_pack_json_of_other_counts_is_refused(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(records)
    run = load_plan("smoke").run("levit_deck.pets.deck")
    meta = prepare(run.pack, Path(), run.pack.folder)
    for change in ({"images": {}}, {"images": meta["images"] | {"train": 99}}, {"bytes": 7}):
        write_json(run.pack.folder / "pack.json", meta | change)
        for command in (["data", run.pack.id], ["table", "datasets"]):
            assert str(run.pack.folder) in says(capsys, *command)


# Nothing is executed ----------------------------------------------------------------------------


class Payload:
    """What it does when it is unpickled: leave a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def object_array(payload: Payload) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([payload], dtype=object), allow_pickle=True)
    return content.getvalue()


def torch_file(payload: Payload) -> bytes:
    content = io.BytesIO()
    torch.save({"model": payload}, content)
    return content.getvalue()


DISGUISES: dict[str, Callable[[Payload], bytes]] = {
    "pickle": pickle.dumps,
    "pickle of protocol 0": lambda payload: pickle.dumps(payload, protocol=0),
    "torch": torch_file,
    "object array": object_array,
    "packed pickle": lambda payload: gzip.compress(pickle.dumps(payload)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_no_pickle_is_ever_opened(
    whole: Path, tmp_path: Path, disguise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    content = DISGUISES[disguise](Payload(marker))
    if disguise == "torch":
        torch.load(io.BytesIO(content), weights_only=False)
    elif disguise == "object array":
        np.load(io.BytesIO(content), allow_pickle=True)
    else:
        pickle.loads(gzip.decompress(content) if disguise == "packed pickle" else content)
    marker.unlink()  # the payload is live

    for name in FILES:
        folder = tmp_path / f"with a bad {name}"
        folder.mkdir()
        path = spoil(whole, folder, name, content)
        with pytest.raises(HovitError):
            READERS[name](path)
        if name == "images.npy":  # and with a pack.json that goes with it
            seal = {"fingerprint": fingerprint(folder), "bytes": len(content)}
            write_json(folder / "pack.json", read_json(folder / "pack.json") | seal)
            with pytest.raises(HovitError):
                READERS[name](path)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        with pytest.raises(HovitError):
            load_weights(path)
    with pytest.raises(HovitError, match="pickles are not opened"):  # as --weights
        load_plan("smoke", ROOT / "config", tmp_path / "weights.pth")
    for kind, model in KINDS.items():
        path = tmp_path / f"{kind}.yaml"
        path.write_bytes(content)
        with pytest.raises(HovitError):
            load_file(path, model)
    assert not marker.exists()
