"""`hovit show`: what it says before anything is packed, trained or measured."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from typer.testing import CliRunner

from hovit.cli import app
from hovit.config.plan import load_plan
from hovit.pipeline import show
from hovit.pipeline.estimate import (
    ARTIFACT,
    estimate_table,
    macs_of,
    run_seconds,
)
from hovit.utils.generated import around


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone in which nothing was run, on a machine of known speed."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)

    def known(device: torch.device) -> float:
        return 1e9

    monkeypatch.setattr(show, "probe", known)
    return tmp_path


def shown(*command: str) -> str:
    result = CliRunner().invoke(app, ["show", *command], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_cost_is_known_before_the_digits_are_packed(fresh: Path) -> None:
    text = shown("hovit")
    assert re.search(r"cost: about \d+\.\d min of training on", text)
    plan = load_plan("smoke", ROOT / "config")
    runs, rows = len(plan.needed([plan.study("hovit")])), len(plan.study("hovit").rows)
    assert runs == rows + 1  # the pretraining
    assert f"{runs} runs (with those that others start from), 0 done" in text
    timed = f"{rows} rows; {rows} models timed in turn"
    assert f"measured: parameters and multiply-adds of {timed}" in text


def test_a_frozen_front_is_counted_once_for_each_image(fresh: Path) -> None:
    run = "l_hovit-front=tf_efficientnet_lite0.photographs.deck"
    pack = fresh / "data/packed/oxford-iiit-pet-1033-224px"
    pack.mkdir(parents=True)
    counts = {"train": 722, "val": 155, "test": 156}
    (pack / "pack.json").write_text(json.dumps({"images": counts}))
    front, whole = 0.383_907_552, 0.997_823_712  # G multiply-adds for one image
    wanted = {
        f"{run}_frozen": 1033 * front + 3 * 722 * 50 * (whole - front),
        run: 3 * 722 * 50 * whole,
    }
    for name, giga in wanted.items():
        found = re.search(r"estimate: (\d+\.\d) T", shown(name, "--scale", "photographs"))
        assert found is not None
        assert float(found[1]) == pytest.approx(giga / 1e3, abs=0.06)


def test_a_study_without_training_says_what_is_measured(fresh: Path) -> None:
    text = shown("efficientvit_imagenet")
    assert "nothing to train" not in text
    assert "runs (with" not in text
    assert re.search(r"m0 +measured: deployed of=efficientvit_paper_m0", text)
    assert "of 20 rows; 20 models timed in turn (inference), batches 16, 3 rounds" in text
    assert "1 thread on a CPU, on a GPU batch 2048, fp16 autocast" in text
    assert "timed" not in shown("efficientvit_family")
    assert "6 runs (with those that others start from)" in shown("efficientvit_family")
    assert "reported numbers only" in shown("efficientvit_detection")
    assert re.search(r"pets_rule +counted: the split of oxford-iiit-pet", shown("datasets"))
    assert re.search(r"pets +counted: digits-64px", shown("datasets"))


def test_an_analysis_is_shown(fresh: Path) -> None:
    text = shown("head_similarity")
    plan = load_plan("smoke", ROOT / "config")
    analysis = plan.analysis("head_similarity")
    for ref, run in plan.analyse_task(analysis).runs.items():
        assert re.search(rf"{ref} +{re.escape(run.id)} seed 0", text)
    assert "takes 64 images of digits-64px" in text
    assert (
        f"{plan.analyse_task(analysis).path} (`hovit analyse head_similarity --scale smoke`)"
        in text
    )
    assert "4 runs (with those that others start from), 0 done\ncost: about" in text
    assert "nothing to analyse at this scale" in shown("kept_patches", "--scale", "sample")


@pytest.mark.exhaustive
def test_artifact_states_the_estimate_of_the_scale_proxy() -> None:
    text = (ROOT / ARTIFACT).read_text()
    before, after = around(text, "estimate", "hovit estimate", ARTIFACT)
    block = text.removeprefix(before).removesuffix(after)
    table = estimate_table(load_plan("proxy", ROOT / "config"))
    assert block == table
    minutes = [int(n) for n in re.findall(r"\| (\d+) min \|$", table, re.MULTILINE)]
    assert len(minutes) == 4
    assert max(minutes) <= 15


def test_a_step_takes_as_long_as_the_reference_or_by_its_arithmetic() -> None:
    plan = load_plan("proxy", ROOT / "config")
    small, reference = plan.run("hovit.pets.deck"), plan.run("levit_deck.pets.deck")
    large = plan.run("resnet50.pets.deck")
    steps, val = 5144 // 32, 1102
    for run in (small, reference):  # as the larger batch of validation costs arithmetic alone
        assert run_seconds(run, 2.0) == pytest.approx(50 * (steps + val / 3 / 32) * 2e-3)
    ratio = macs_of(large) / macs_of(reference)
    assert ratio > 3
    assert run_seconds(large, 2.0) == pytest.approx(
        50 * (steps * ratio + val * ratio / 3 / 32) * 2e-3
    )
    assert run_seconds(small, 4.0) == pytest.approx(2 * run_seconds(small, 2.0))


def test_images_read_in_place_have_an_estimate_before_they_are_there(fresh: Path) -> None:
    """ImageNet's published numbers are in config."""
    text = shown("efficientvit_family", "--scale", "paper")
    assert re.search(r"cost: about [\d,.]+ min of training", text)
