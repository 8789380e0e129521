"""Evidence: taken only if it verifies, checked again at will, shown beside this run."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from synthetic import GPU, made_up_predictions, measure_record, write_all

from hovit.config.load import load_config
from hovit.config.plan import Plan, load_plan
from hovit.config.schema import Config
from hovit.pipeline.evidence import CODE, EVIDENCE, add, records_in, verify
from hovit.records.evidence import evidence_digest
from hovit.records.predictions import (
    metrics,
    predictions_digest,
    read_predictions,
    write_predictions,
)
from hovit.records.record import read_record, write_record
from hovit.report.claims.check import check_all
from hovit.report.sources import load_sources
from hovit.report.tables.write import write_table
from hovit.utils.errors import HovitError
from hovit.utils.files import write_json

RUN = "mini/hovit.pets.deck/seed0/record.json"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "config")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose only commit holds the sources as they are now."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("src", "config"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@contextmanager
def at_commit(history: Path) -> Iterator[None]:
    """Records that are written here name the commit of `history`."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=history, check=True, capture_output=True, text=True
    ).stdout.strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hovit.records.record.git_state", lambda: (commit, False))
        yield


@pytest.fixture(scope="module")
def elsewhere(history: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another machine's finished records of scale mini, made at the commit of `history`."""
    root = tmp_path_factory.mktemp("elsewhere")
    with at_commit(history):
        write_all(load_plan("mini", history / "config"), root, "elsewhere")
    return root / "elsewhere"


@pytest.fixture
def here(history: Path, elsewhere: Path, tmp_path: Path) -> Path:
    """A clone of the repository, with some records of the other machine in `elsewhere`."""
    root = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(history), str(root)], check=True)
    for name in ("hovit.pets.deck", "levit_deck.pets.deck"):
        shutil.copytree(elsewhere / "mini" / name, root / "elsewhere/mini" / name)
    for name in ("measure/hovit.json", "analysis/attention_maps.json"):
        (root / "elsewhere/mini" / name).parent.mkdir()
        shutil.copy(elsewhere / "mini" / name, root / "elsewhere/mini" / name)
    return root


@pytest.fixture
def plan(here: Path) -> Plan:
    return load_plan("smoke", here / "config")


def verify_copied(config: Config, root: Path) -> tuple[int, list[str]]:
    """`verify` of records that no `hovit evidence add` brought: CODE does not list them."""
    count, problems = verify(config, root)
    return count, [line for line in problems if not line.startswith(f"{CODE}: out of date")]


def test_what_verifies_is_taken_byte_for_byte_and_once(
    config: Config, here: Path, elsewhere: Path
) -> None:
    shutil.copytree(elsewhere, here / "elsewhere", dirs_exist_ok=True)  # all records
    taken = add(config, [here / "elsewhere"], here)
    assert len(taken) == len(records_in(here / "elsewhere")) > 60
    assert (here / EVIDENCE / "test-cpu" / RUN).read_bytes() == (
        here / "elsewhere" / RUN
    ).read_bytes()
    assert add(config, [here / "elsewhere"], here) == []
    assert verify(config, here) == (len(taken), [])


def test_what_is_committed_verifies(config: Config) -> None:
    commits = {read_record(p).provenance.commit for p in records_in(ROOT / EVIDENCE)}
    for commit in commits - {"unknown"}:
        there = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT)
        if there.returncode:
            pytest.skip(f"this clone has not the whole history: no commit {commit[:10]}")
    assert verify(config, ROOT)[1] == []


def mutate(path: Path, **results: object) -> None:
    record = read_record(path)
    write_record(path, record.model_copy(update={"results": record.results | results}))


def swap_two_labels(folder: Path) -> None:
    table = made_up_predictions(0)
    table.loc[[0, 1], "label"] = table.loc[[1, 0], "label"].to_numpy()
    write_predictions(folder / "predictions.csv.gz", table)


def flip_a_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"best_epoch": 3', '"best_epoch": 2'))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def other_code(path: Path) -> None:
    record = read_record(path)
    made = record.provenance.model_copy(update={"code": "0" * 64})
    write_record(path, record.model_copy(update={"provenance": made}))


def other_spec(path: Path) -> None:
    content = json.loads(path.read_text())
    content["spec"]["recipe"]["lr"] = 0.5
    write_json(path, content)


def not_predictions(folder: Path) -> None:
    (folder / "predictions.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))


def only_correct_predictions(path: Path) -> None:
    table = read_predictions(path.parent / "predictions.csv.gz")
    table = table[table["label"] == table["predicted"]]
    loss, top1 = metrics(table)
    write_predictions(path.parent / "predictions.csv.gz", table)
    mutate(path, loss=loss, top1=top1, predictions_sha256=predictions_digest(table))


def a_class_too_many(path: Path) -> None:
    table = read_predictions(path.parent / "predictions.csv.gz")
    table.loc[table["label"] != table["predicted"], "predicted"] = 1000
    write_predictions(path.parent / "predictions.csv.gz", table)
    mutate(path, predictions_sha256=predictions_digest(table))


MUTATIONS = {
    "a class that the data set lacks": (a_class_too_many, "not all classes are between 0 and"),
    "correct predictions alone": (only_correct_predictions, "not one line for each of the test im"),
    "a better validation": (lambda p: mutate(p, val_top1=99.0), "does not match its history"),
    "another epoch": (lambda p: mutate(p, best_epoch=2), "does not match its history"),
    "a digit of a record": (flip_a_digit, "sha256 does not match"),
    "a better accuracy, sealed again": (lambda p: mutate(p, top1=99.0), "does not match the pred"),
    "two labels of the test set": (lambda p: swap_two_labels(p.parent), "not the predictions"),
    "the end of the record": (cut, "not readable as JSON"),
    "the end of the predictions": (
        lambda p: cut(p.parent / "predictions.csv.gz"), "not readable as predictions"),
    "no predictions": (lambda p: (p.parent / "predictions.csv.gz").unlink(), "not readable as pr"),
    "other columns": (lambda p: not_predictions(p.parent), "not predictions: columns"),
    "other code": (other_code, "its code hash does not match the sources at commit"),
    "another spec": (other_spec, "spec_hash does not match"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_turns_it_red(config: Config, here: Path, mutation: str) -> None:
    change, says = MUTATIONS[mutation]
    change(here / "elsewhere" / RUN)
    with pytest.raises(HovitError, match=says):
        add(config, [here / "elsewhere"], here)
    assert not (here / EVIDENCE).exists()  # nothing of the lot is taken

    shutil.copytree(here / "elsewhere", here / EVIDENCE / "test-cpu")
    count, problems = verify_copied(config, here)
    assert len(problems) == 1
    assert says in problems[0]
    assert "hovit.pets.deck/seed0" in problems[0]
    assert count > 4


def test_evidence_in_another_devices_folder_is_red(config: Config, here: Path) -> None:
    add(config, [here / "elsewhere"], here)
    (here / EVIDENCE / "test-cpu").rename(here / EVIDENCE / "better-cpu")
    count, problems = verify_copied(config, here)
    assert len(problems) == count
    assert "belongs to" in problems[0]


def test_another_record_of_the_same_run_is_not_overwritten(config: Config, here: Path) -> None:
    add(config, [here / "elsewhere"], here)
    path = here / "elsewhere" / RUN
    new = records_in(here / EVIDENCE)[0]  # comes before the other one
    new.unlink()
    table = made_up_predictions(read_record(path).results["top1"] + 5)
    write_predictions(path.parent / "predictions.csv.gz", table)
    mutate(path, top1=metrics(table)[1], predictions_sha256=predictions_digest(table))
    before = evidence_digest(here)
    with pytest.raises(HovitError, match="is another record of this run"):
        add(config, [here / "elsewhere"], here)
    assert not new.exists()
    assert evidence_digest(here) == before


def test_two_sources_with_other_records_of_one_run_are_refused(
    config: Config, here: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree((here / "elsewhere" / RUN).parent, (other / RUN).parent)
    assert len(add(config, [other, other], here)) == 1  # the same record twice is one record
    shutil.rmtree(here / EVIDENCE)
    table = made_up_predictions(read_record(other / RUN).results["top1"] + 5)
    write_predictions((other / RUN).parent / "predictions.csv.gz", table)
    mutate(other / RUN, top1=metrics(table)[1], predictions_sha256=predictions_digest(table))
    with pytest.raises(HovitError, match="is another record of this run"):
        add(config, [here / "elsewhere", other], here)
    assert not (here / EVIDENCE).exists()


def test_reports_depend_on_predictions_too(config: Config, here: Path) -> None:
    add(config, [here / "elsewhere"], here)
    before = evidence_digest(here)
    (here / EVIDENCE / "test-cpu" / RUN).with_name("predictions.csv.gz").unlink()
    assert evidence_digest(here) != before


def test_a_commit_that_is_not_known_is_looked_for(config: Config, here: Path) -> None:
    path = here / "elsewhere" / RUN
    record = read_record(path)
    made = record.provenance.model_copy(update={"commit": "unknown", "dirty": True})
    write_record(path, record.model_copy(update={"provenance": made}))
    assert add(config, [here / "elsewhere"], here)
    other_code(path)
    with pytest.raises(HovitError, match="its code hash does not match the sources in any commit"):
        add(config, [here / "elsewhere"], here)


def test_an_archive_without_history_verifies(config: Config, here: Path, tmp_path: Path) -> None:
    """A tree without .git, as Zenodo has it, checks code hashes against code.json."""
    add(config, [here / "elsewhere"], here)
    archive = tmp_path / "archive"
    shutil.copytree(here / EVIDENCE, archive / EVIDENCE)
    count, problems = verify(config, archive)
    assert count > 0
    assert not problems
    (archive / CODE).unlink()
    _, problems = verify(config, archive)
    assert len(problems) == count
    assert all("history is not here" in line for line in problems)


def test_code_hashes_of_another_tree_are_out_of_date(config: Config, here: Path) -> None:
    add(config, [here / "elsewhere"], here)
    write_json(here / CODE, {})
    _, problems = verify(config, here)
    assert problems == [f"{CODE}: out of date; run `hovit evidence add {EVIDENCE}`"]


def test_nothing_to_add_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(HovitError, match="no records in it"):
        add(config, [tmp_path], tmp_path)


def test_a_source_without_records_is_named(config: Config, here: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HovitError, match="empty: no records in it"):
        add(config, [here / "elsewhere", tmp_path / "empty"], here)
    assert not (here / EVIDENCE).exists()


def test_tables_show_it_beside_this_run(config: Config, here: Path, plan: Plan) -> None:
    add(config, [here / "elsewhere"], here)
    write_all(plan, here)
    write_table(plan, plan.study("hovit"), here)
    text = (here / "results/tables/hovit.md").read_text()
    headers = [line for line in text.splitlines() if line.startswith("|  |")]
    assert headers[0].count("Parameters") == 2  # reported, and counted once
    assert headers[1].startswith("|  | Top-1, %, reported | Top-1, % on stand-ins |")
    assert "committed results, scale mini, Tiny-ImageNet-37" in text
    csv = (here / "results/tables/hovit.csv").read_text()
    assert {"top1_reported", "evidence_top1", "top1"} <= set(csv.splitlines()[0].split(","))


def test_claims_use_it_where_this_run_cannot_tell(config: Config, here: Path, plan: Plan) -> None:
    write_all(plan, here)
    before = {v.id: v for v in check_all(load_sources(plan, here))}
    assert before["hovit-accuracy"].verdict == "not measured"
    add(config, [here / "elsewhere"], here)
    after = {v.id: v for v in check_all(load_sources(plan, here))}
    assert after["hovit-accuracy"].verdict != "not measured"
    assert after["hovit-accuracy"].source == (
        "committed results (scale mini, Tiny-ImageNet-37, Test CPU)"
    )
    assert all("evidence/test-cpu" in path for path in after["hovit-accuracy"].records)
    assert after["parameters-hovit"].source == "counted now"


def test_a_dropped_run_turns_its_claims(config: Config, here: Path, plan: Plan) -> None:
    add(config, [here / "elsewhere"], here)
    for seed in (0, 1):
        shutil.rmtree(here / EVIDENCE / f"test-cpu/mini/hovit.pets.deck/seed{seed}")
    verdicts = {v.id: v.verdict for v in check_all(load_sources(plan, here))}
    assert verdicts["hovit-accuracy"] == "not measured"


def test_tables_from_evidence_alone_in_seconds_without_torch(config: Config, here: Path) -> None:
    add(config, [here / "elsewhere"], here)
    code = (
        "import sys; from hovit.config.plan import load_plan\n"
        "from hovit.report.tables.write import write_table\n"
        "from hovit.report.claims.write import write_claims\n"
        "plan = load_plan('smoke')\n"
        "for study in plan.config.studies.values(): write_table(plan, study)\n"
        "write_claims(plan); assert 'torch' not in sys.modules"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True)
    assert time.monotonic() - began < 60  # about two seconds; a hang guard, not a speed test
    assert (
        "- **Committed results a**: `results/evidence/test-cpu/mini`\n  - Scale: `mini`"
        in (here / "results/tables/launcher.md").read_text()
    )


def test_measurements_of_two_devices_stay_apart(config: Config, here: Path, history: Path) -> None:
    plan = load_plan("mini", here / "config")
    add(config, [here / "elsewhere"], here)
    with at_commit(history):
        write_record(here / "gpu/mini/measure/hovit.json", measure_record(plan, "hovit", GPU))
    (taken,) = add(config, [here / "gpu"], here)
    assert taken == here / EVIDENCE / "test-gpu/mini/measure/hovit.json"
    assert verify(config, here)[1] == []
