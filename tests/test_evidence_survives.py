"""Committed evidence stays valid when config and code grow, and a forgery of it is still caught.

Each change is made on a clone of the repository, with the sources as they are now.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from hovit.records.evidence import EVIDENCE, records_in
from hovit.records.predictions import read_predictions, write_predictions
from hovit.records.record import read_record
from hovit.utils.code_hash import ENTRIES

pytestmark = pytest.mark.xdist_group("evidence")  # the tests share a clone
HOVIT = "amd-epyc/mini/hovit.pets.deck/seed0"
OTHER = "amd-epyc/mini/levit_deck.pets.deck/seed0"
PACKAGE = Path("src/hovit")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with this working tree's sources, and its verdicts accepted."""
    commits = {read_record(p).provenance.commit for p in records_in(ROOT / EVIDENCE)}
    for commit in commits - {"unknown"}:
        there = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT)
        if there.returncode:
            pytest.skip(f"this clone has not the whole history: no commit {commit[:10]}")
    root = tmp_path_factory.mktemp("clone") / "original"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
    for name in ("src", "config", "results/evidence"):
        shutil.rmtree(root / name)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    hovit(root, "claims", "--accept")
    return root


@pytest.fixture
def clone(original: Path, tmp_path: Path) -> Path:
    """A copy of the clone that may be changed; the repository itself is linked."""
    root, git = tmp_path / "clone", shutil.ignore_patterns(".git")
    shutil.copytree(original, root, ignore=git)
    shutil.copytree(original / ".git", root / ".git", copy_function=os.link)
    return root


def run(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a clone, with the clone's package."""
    return subprocess.run(
        [sys.executable, *args], cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root / "src")},
    )  # fmt: skip


def hovit(root: Path, *args: str) -> str:
    done = run(root, "-m", "hovit", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(root: Path, *args: str) -> str:
    """What a command that fails says."""
    done = run(root, "-m", "hovit", *args)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path}: {old!r}"
    path.write_text(text.replace(old, new, 1))


# Changes that evidence survives -------------------------------------------------------------------

ROW = """  - id: another
    label: "Another row"
    model: levit_deck
    model_args: {drop_rate: 0.25}
    ours: true
"""
PROSE = r'^(\s*(?:title|about|note|why|says|place|label): ")'


def add_a_row(root: Path) -> None:
    for study in (root / "config/studies").glob("*.yaml"):
        if "kind: data" not in study.read_text():
            study.write_text(study.read_text() + ROW)


def change_the_protocol(root: Path) -> None:
    """How latency is measured from now on: other rounds and batches at every scale."""
    for scale in (root / "config/scales").glob("*.yaml"):
        text = re.sub(r"(rounds|warmup|threads): (\d+)", r"\1: 1\2", scale.read_text())
        scale.write_text(text)


def add_a_field(root: Path) -> None:
    """A new field with a default in everything that a spec states."""
    schema, runs = (root / PACKAGE / f"config/{name}.py" for name in ("schema", "runs"))
    in_schema = [(schema, name) for name in ("Recipe", "Detection", "Dataset", "Split", "Limit")]
    for path, name in [*in_schema, (runs, "Run"), (runs, "Weights")]:
        text = path.read_text()
        tree = ast.parse(text)
        (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
        last = [n for n in found.body if isinstance(n, ast.AnnAssign)][-1]
        lines = text.splitlines(keepends=True)
        lines.insert(last.end_lineno or 0, "    another: float = 0.5\n")
        path.write_text("".join(lines))


def reword_prose(root: Path) -> None:
    """Every sentence of config, and every constant of the package that holds a sentence."""
    count = 0
    for path in (root / "config").glob("*/*.yaml"):
        text, found = re.subn(PROSE, r"\1In other words: ", path.read_text(), flags=re.M)
        path.write_text(text)
        count += found
    assert count > 300
    reworded = 0
    for path in (root / PACKAGE).rglob("*.py"):
        text = path.read_text()
        for node in ast.parse(text).body:  # constants at the top level of a file
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign) and isinstance(value, ast.Constant):
                old = ast.get_source_segment(text, value)
                if isinstance(value.value, str) and re.search(r"\w \w+ \w", value.value) and old:
                    text = text.replace(old, f'"In other words: " {old}')
                    reworded += 1
        path.write_text(text)
    assert reworded


def move_a_file(root: Path) -> None:
    """Rename the file at which the sources of training start."""
    old = Path(ENTRIES["training"][0])
    new = old.with_name("moved.py")
    (root / PACKAGE / old).rename(root / PACKAGE / new)
    for path in (root / PACKAGE).rglob("*.py"):
        text = path.read_text().replace(f'"{old.as_posix()}"', f'"{new.as_posix()}"')
        path.write_text(re.sub(rf"\b(training|)\.{old.stem}\b", r"\1.moved", text))
    code = "import hovit.training.moved, hovit.pipeline.train, hovit.utils.code_hash as c; " \
           "print(c.ENTRIES['training'])"  # fmt: skip
    assert "moved.py" in run(root, "-c", code).stdout


CHANGES: dict[str, Callable[[Path], None]] = {
    "a new row in every table": add_a_row,
    "another protocol of latency": change_the_protocol,
    "a new field with a default": add_a_field,
    "reworded prose": reword_prose,
    "a moved source file": move_a_file,
}


ONE_BY_ONE = [pytest.param([change], marks=pytest.mark.exhaustive) for change in CHANGES]


@pytest.mark.parametrize("changes", [list(CHANGES), *ONE_BY_ONE], ids=", ".join)
def test_all_evidence_survives(clone: Path, changes: list[str]) -> None:
    for change in changes:
        CHANGES[change](clone)
    count = len(records_in(clone / EVIDENCE))
    assert count >= 164
    assert hovit(clone, "evidence", "verify") == f"{count} records of evidence verify\n"
    hovit(clone, "claims", "--check")


def test_a_table_keeps_its_evidence_beside_a_new_row(clone: Path) -> None:
    def lines() -> list[str]:
        hovit(clone, "table", "hovit")
        text = (clone / "results/tables/hovit.md").read_text()
        return [line for line in text.splitlines() if line.startswith(("| ", "**"))]

    before = lines()
    assert any("committed results" in line for line in before)
    with (clone / "config/studies/hovit.yaml").open("a") as file:
        file.write(ROW)
    after = lines()
    assert [line for line in after if "Another row" not in line] == before
    assert len(after) > len(before)


# Forgeries ----------------------------------------------------------------------------------------


def test_a_changed_digit_and_swapped_labels_are_caught(clone: Path) -> None:
    records = records_in(clone / EVIDENCE)
    path = clone / EVIDENCE / OTHER / "record.json"
    top1 = str(read_record(path).results["top1"])
    edit(path, f'"top1": {top1}', f'"top1": {top1[:-1]}{(int(top1[-1]) + 1) % 10}')

    path = clone / EVIDENCE / HOVIT / "predictions.csv.gz"
    table = read_predictions(path)
    other = int((table["label"] != table.loc[0, "label"]).to_numpy().argmax())
    table.loc[[0, other], "label"] = table.loc[[other, 0], "label"].to_numpy()
    write_predictions(path, table)

    said = refused(clone, "evidence", "verify")
    assert f"{OTHER}/record.json: sha256 does not match" in said
    assert f"{HOVIT}/predictions.csv.gz: not the predictions" in said
    assert f"2 of {len(records)} records" in said


def test_a_changed_reported_number_is_caught(clone: Path) -> None:
    edit(clone / "config/studies/hovit.yaml", 'top1: "27.47"', 'top1: "27.48"')
    assert "hovit/hovit/top1" in refused(clone, "claims", "--check")


def test_a_missing_run_is_caught(clone: Path) -> None:
    for seed in (0, 1):
        shutil.rmtree(clone / EVIDENCE / HOVIT.replace("seed0", f"seed{seed}"))
    said = refused(clone, "claims", "--check")
    assert "hovit-accuracy: not measured; accepted: reproduced" in said
