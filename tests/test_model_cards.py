"""Model cards: every registered model is on one of them, and their numbers are current."""

import json
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import ROOT

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import load_plan
from hovit.pipeline.describe_models import describe_model, registered_models
from hovit.report.model_cards import (
    CARDS,
    COMMAND,
    Trained,
    card_rows,
    card_table,
    trained_runs,
    write_cards,
)
from hovit.report.sources import load_sources
from hovit.utils.errors import HovitError
from hovit.utils.generated import around, marks

MODELS = registered_models()
TEXT = (ROOT / CARDS).read_text()


@pytest.fixture(scope="module")
def trained() -> list[Trained]:
    return trained_runs(load_sources(load_plan("smoke", ROOT / "config"), ROOT))


def table_of(module: str) -> str:
    """The table of a card; if the card is missing, the error names the lines to add."""
    before, after = around(TEXT, module, COMMAND, CARDS)
    return TEXT.removeprefix(before).removesuffix(after)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODELS)
def test_every_card_is_current(module: str, trained: list[Trained]) -> None:
    """If this fails, `hovit readme` writes the tables again."""
    assert table_of(module) == card_table(card_rows(module, MODELS, trained), describe_model)


def test_every_registered_model_is_on_one_card() -> None:
    """Also a model from another package than `hovit.models`, if this project registers it."""
    own = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("hovit")]
    rows = re.findall(r"^\| `(\w+)` \|", "".join(map(table_of, MODELS)), re.M)
    baselines = [name for name in rows if name not in own]
    assert baselines == ["levit_256"]
    missing = sorted(set(own) - set(rows))
    assert not missing, f"run `hovit readme`: no row for {', '.join(missing)}"
    assert sorted(rows) == sorted([*own, *baselines])


def test_every_table_is_of_a_module_of_this_package() -> None:
    assert sorted(re.findall(r"^<!-- (\w+): made by", TEXT, re.M)) == sorted(MODELS)


def test_a_module_without_a_card_gets_an_error_with_the_lines_to_add(tmp_path: Path) -> None:
    (tmp_path / CARDS).parent.mkdir(parents=True)
    (tmp_path / CARDS).write_text(TEXT)
    sources = load_sources(load_plan("smoke", ROOT / "config"), tmp_path)
    begin, end = (mark.strip() for mark in marks("another", COMMAND))
    with pytest.raises(HovitError, match=f"README.md: needs the lines {begin} and {end} once"):
        write_cards(sources, {**MODELS, "another": ["another"]}, describe_model, tmp_path)
    assert (tmp_path / CARDS).read_text() == TEXT


def test_without_evidence_no_accuracy_is_stated(tmp_path: Path) -> None:
    (tmp_path / CARDS).parent.mkdir(parents=True)
    (tmp_path / CARDS).write_text("".join(marks("hovit", COMMAND)))
    sources = load_sources(load_plan("smoke", ROOT / "config"), tmp_path)
    write_cards(sources, {"hovit": ["hovit"]}, describe_model, tmp_path)
    parameters = sum(p.numel() for p in timm.create_model("hovit").parameters())
    row = f"| `hovit` | {parameters / 1e6:.2f} M | 602 M | none |  |  |"
    assert row in (tmp_path / CARDS).read_text()


def test_every_classifier_with_committed_results_is_on_one_card(trained: list[Trained]) -> None:
    names = {name for models in MODELS.values() for name in models}
    shown = [
        each.run.id
        for module in MODELS
        for row in card_rows(module, MODELS, trained)
        if row.model in names
        for each in row.results
    ]
    assert sorted(shown) == sorted(each.run.id for each in trained if each.run.model in names)


def test_ways_of_training_share_a_row_and_are_told_apart(trained: list[Trained]) -> None:
    rows = [row for row in card_rows("front", MODELS, trained) if row.args]
    assert [row.args for row in rows] == [{"front": "tf_efficientnet_lite0"}]
    table = card_table(rows, describe_model)
    for frozen in (False, True):
        (each,) = (t for t in rows[0].results if t.run.recipe.frozen_front == frozen)
        assert each.images.endswith(", frozen front") == frozen
        assert f"{statistics.fmean(each.top1):.1f}" in table
    assert "–" not in table  # not one range of both


def test_top1_is_that_of_the_records(trained: list[Trained]) -> None:
    (mini,) = (t for t in trained if t.run.id == "hovit.pets.deck" and t.scale == "mini")
    folder = ROOT / "results/evidence/amd-epyc/mini/hovit.pets.deck"
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]
    top1 = [record["results"]["top1"] for record in records]
    assert list(mini.top1) == top1
    text = f"{statistics.fmean(top1):.1f} ± {statistics.stdev(top1):.1f}"
    assert text in table_of("hovit")


def test_the_code_of_the_cards_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(blocks) == 1 + TEXT.count("\n## ")  # one for all models, and one on each card
    for block in blocks:
        names: dict[str, Any] = {"timm": timm}
        exec(block, names)
    assert names["out"].shape == (2, 196, 256)


def test_the_runs_that_the_cards_name_exist() -> None:
    commands = re.findall(r"`hovit train (\S+) --scale (\w+)`", TEXT)
    assert len(commands) == TEXT.count("hovit train") - 1  # and `hovit train RUN`
    for run, scale in commands:
        load_plan(scale, ROOT / "config").run(run)


def test_the_weights_of_a_front_fit() -> None:
    model = timm.create_model("l_hovit", num_classes=37)
    front = timm.create_model("resnet50", num_classes=0)
    model.front_module.load_state_dict(front.state_dict())


def test_the_cards_are_installed_with_the_models(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert file.read(CARDS.relative_to("src").as_posix()) == (ROOT / CARDS).read_bytes()


def test_a_model_that_needs_the_name_of_another_is_not_counted() -> None:
    assert describe_model("deployed", {}) == {}
    facts = describe_model("deployed", {"of": "efficientvit_paper_m0"})
    assert facts["macs"] > 0
