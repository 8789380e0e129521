"""Provenance names the artifact's own commit, never that of another repository."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import small_run

from hovit.config.plan import Plan
from hovit.records.record import git_state
from hovit.training.classification import ClassificationTrainer
from hovit.training.trainer import Options, make_fabric


@pytest.fixture(autouse=True)
def _fresh() -> None:
    git_state.cache_clear()


def repository(folder: Path) -> str:
    """A repository with one commit; returns its hash."""
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("a")
    (folder / ".gitignore").write_text("inside/\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for args in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *args], cwd=folder, check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_repository_and_a_change_in_it(tmp_path: Path) -> None:
    commit = repository(tmp_path)
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("b")
    git_state.cache_clear()
    assert git_state(tmp_path) == (commit, True)


def test_a_record_states_the_commit_at_the_start_of_its_run(
    packed: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    commit = repository(sources)
    monkeypatch.chdir(sources)
    run, fabric = small_run(plan), make_fabric("32-true", "cpu")
    trainer = ClassificationTrainer(run, fabric, packed, Options())
    (sources / "file").write_text("b")
    trainer.fit()
    record = trainer.finish()
    assert (record.provenance.commit, record.provenance.dirty) == (commit, False)


def test_a_folder_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    repository(tmp_path)
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") == ("unknown", True)


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_git_variables_of_the_environment_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    repository(tmp_path / "other")
    (tmp_path / "other/file").write_text("changed")
    commit = repository(tmp_path / "own")
    value = {"GIT_DIR": ".git", "GIT_WORK_TREE": "", "GIT_INDEX_FILE": ".git/index"}[variable]
    monkeypatch.setenv(variable, str(tmp_path / "other" / value))
    assert git_state(tmp_path / "own") == (commit, False)


def test_no_git_and_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert git_state(tmp_path) == ("unknown", True)
    git_state.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == ("unknown", True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_repository_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = repository(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 12345, 12345)
    monkeypatch.setenv("HOME", str(tmp_path))  # no configuration that allows it
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    assert subprocess.run(["git", "status"], cwd=tmp_path, capture_output=True).returncode != 0
    assert git_state(tmp_path) == (commit, False)
