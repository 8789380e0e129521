"""The real DAG, shrunken: two rows, a handful of digits, through Snakemake itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from hovit.report.everything import date_before_inputs
from hovit.utils.files import write_text

STUDY = """
id: tiny
title: "Two rows"
source: {paper: ours, place: "a test"}
columns: [parameters, top1, latency]
rows:
  - {id: levit_deck, label: "LeViT", model: levit_deck, model_args: {depth: [1, 1, 1]}, ours: true}
  - {id: hovit, label: "HoViT", model: hovit, baseline: levit_deck, reported: {top1: "27.47"}}
"""
ROW = """  - {id: drop, label: "Dropout", model: hovit, model_args: {drop_rate: 0.2}, ours: true}
"""
TARGET = "results/tables/tiny.md"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the artifact with one small study, in a folder with a space in its name."""
    root = tmp_path_factory.mktemp("a folder") / "hovit copy"
    root.mkdir()
    for name in ("Snakefile", "rules", "profiles", "config"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
    for kind in ("studies", "claims", "analyses"):
        shutil.rmtree(root / "config" / kind)
        (root / "config" / kind).mkdir()
    (root / "config/studies/tiny.yaml").write_text(STUDY)
    smoke = (root / "config/scales/smoke.yaml").read_text()
    smoke = re.sub(r"\{row: \w+/\w+\}", "{timm: resnet50.a1_in1k}", smoke)
    (root / "config/scales/smoke.yaml").write_text(smoke)
    for name in ("sample", "mini", "proxy"):
        (root / f"config/scales/{name}.yaml").unlink()
    return root


def snakemake(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", TARGET, *args]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def planned(root: Path) -> str:
    """What Snakemake would do, as its table of jobs."""
    result = snakemake(root, "-n", "--quiet", "rules")
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scale", sorted(p.stem for p in (ROOT / "config/scales").glob("*.yaml")))
def test_every_scale_has_a_dag(scale: str, tmp_path: Path) -> None:
    for name in ("Snakefile", "rules", "profiles", "config", "paper"):
        (tmp_path / name).symlink_to(ROOT / name)
    targets = ["results/tables", "results/runs", "data/packed"]
    command = [sys.executable, "-m", "snakemake", "-n", *targets, "--config", f"scale={scale}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_dag_runs_rests_and_does_only_what_a_change_needs(checkout: Path) -> None:
    for suffix in (".csv", ".md", ".tex"):  # as `hovit report` leaves them
        write_text((checkout / TARGET).with_suffix(suffix), "from committed records")
    date_before_inputs(checkout)
    jobs = planned(checkout)
    assert all(name in jobs for name in ("data", "train", "measure", "table"))
    done = snakemake(checkout)
    assert done.returncode == 0, done.stderr
    table = checkout / TARGET
    assert "27.47" in table.read_text()
    assert table.with_suffix(".csv").exists()
    assert not [*checkout.rglob("weights.safetensors")]  # smoke keeps none that nothing reads

    study = checkout / "config/studies/tiny.yaml"
    assert "Error" not in snakemake(checkout, "results/tables/index.md", "-n").stderr
    os.utime(study)  # newer, but not different
    assert "Nothing to be done" in snakemake(checkout).stderr

    study.write_text(STUDY.replace('label: "HoViT"', 'label: "HoViT!"'))  # a label: only the table
    jobs = planned(checkout)
    assert "table" in jobs
    assert "train" not in jobs
    assert "measure" not in jobs

    study.write_text(STUDY + ROW)  # a row: its run, the study's interleaved latency, the table
    result = snakemake(checkout)
    assert result.returncode == 0, result.stderr
    lines = [line.split(", ")[0] for line in result.stderr.splitlines() if line.startswith("[")]
    assert sorted(lines)[-1].endswith("] table tiny")
    assert {line.split("] ")[1] for line in lines} == {
        "train hovit-drop_rate=0.2.pets.deck seed 0", "measure tiny", "table tiny"
    }  # fmt: skip
    assert "Dropout" in table.read_text()

    spent = subprocess.run(
        [sys.executable, ROOT / "bench/pipeline.py", "--root", checkout],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", spent, re.MULTILINE))
    assert rows["train"].startswith("3 | ")
    assert "–" not in rows["train"] + rows["measure"] + rows["table"]

    recipe = checkout / "config/recipes/deck.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.001", "lr: 0.002"))
    jobs = planned(checkout)
    assert "train" in jobs
    assert "measure" not in jobs


@pytest.mark.slow
def test_a_failed_job_says_why_in_one_line(checkout: Path) -> None:
    smoke = (checkout / "config/scales/smoke.yaml").read_text()
    lost = smoke.replace("id: smoke", "id: lost").replace("pets: digits", "pets: tiny-imagenet-37")
    (checkout / "config/scales/lost.yaml").write_text(lost)
    result = snakemake(checkout, "--config", "scale=lost", f"data_root={checkout}/nowhere")
    assert result.returncode != 0
    failure = result.stderr[result.stderr.index("failed: data tiny-imagenet-37-64px") :]
    assert "tiny-imagenet-train-0.zip: not found" in failure
    assert "(all of it: logs/data/tiny-imagenet-37-64px.log)" in failure
    wrong = snakemake(checkout, "--config", "scale=nosuch")
    assert wrong.returncode != 0
    assert "no scale 'nosuch'" in wrong.stdout + wrong.stderr


def test_a_config_key_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    for name in ("Snakefile", "rules", "profiles", "config", "paper"):
        (tmp_path / name).symlink_to(ROOT / name)
    wrong = snakemake(tmp_path, "-n", "--config", "scael=mini", "data_root=data")
    assert wrong.returncode != 0
    assert "error: --config scael: not known; there are scale, data_root, weights" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_given_imagenet_the_tables_that_train_nothing_evaluate_weights_on_it(
    tmp_path: Path,
) -> None:
    for name in ("Snakefile", "rules", "profiles", "config", "paper"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "of_no_run.safetensors").touch()
    command = [sys.executable, "-m", "snakemake", "-n"]
    given = ["--config", f"imagenet={tmp_path}", f"weights={tmp_path}"]
    # The table pareto cites the accuracies of efficientvit_imagenet and backbones.
    cases = (("results/tables", [], 0), ("results/tables", given, 2),
             ("results/tables/pareto.md", given, 2))  # fmt: skip
    for target, more, studies in cases:
        line = [*command, target, *more]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count("rule evaluate:") == studies
