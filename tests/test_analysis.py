"""Analyses of trained models, on constructed cases and on a run of the shrunken artifact."""

import math
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from typer.testing import CliRunner

import hovit.models  # noqa: F401
from hovit.analysis.attention_maps import attention_maps
from hovit.analysis.kept_patches import kept_patches
from hovit.attention.modules import SimilarityAttention, create_attention, from_heads, to_heads
from hovit.cli import app
from hovit.config.plan import Plan, load_plan
from hovit.pipeline.analyse import FUNCTIONS, analyse, to_csv
from hovit.utils.errors import HovitError


@pytest.mark.parametrize("form", ["dot", "euclidean", "sqeuclidean", "jaccard", "jaccard_minmax"])
def test_weights_are_those_that_attention_mixes_by(form: str) -> None:
    torch.manual_seed(0)
    attend = create_attention(form, 16, 2)
    q, k, v = torch.randn(3, 2, 12, 16)
    weights = attend.weights(to_heads(q, 2), to_heads(k, 2))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 12))
    out = from_heads(weights @ to_heads(v, 2))
    assert torch.allclose(out, attend(q, k, v, q, (3, 4)), atol=1e-5)


def test_focused_weights_are_those_that_attention_mixes_by() -> None:
    torch.manual_seed(0)
    attend = create_attention("focused", 16, 2)
    torch.nn.init.zeros_(attend.conv.weight)
    torch.nn.init.zeros_(attend.conv.bias)
    q, k, v = torch.randn(3, 2, 12, 16)
    weights = attend.weights(to_heads(q, 2), to_heads(k, 2))
    out = from_heads(weights @ to_heads(v, 2))
    assert torch.allclose(out, attend(q, k, v, q, (3, 4)), atol=1e-3)


class OneAttention(torch.nn.Module):
    """All keys alike but one, at which every query looks."""

    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.attend = SimilarityAttention(8, 2, "dot")
        self.sharp = sharp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ones(1, 6, 8)
        k = torch.zeros(1, 6, 8)
        k[:, 5] = self.sharp
        return self.attend(q, k, k, x, (2, 3))


def test_a_map_of_a_constructed_attention() -> None:
    flat = attention_maps(OneAttention(0.0), torch.zeros(1, 3, 8, 8))
    assert flat["map"] == [[pytest.approx(1 / 6, abs=1e-6)] * 3] * 2
    assert flat["entropy"] == pytest.approx(math.log(6), abs=1e-5)
    sharp = attention_maps(OneAttention(50.0), torch.zeros(1, 3, 8, 8))
    assert sharp["map"] == [[0, 0, 0], [0, 0, 1]]
    assert sharp["entropy"] == pytest.approx(0, abs=1e-5)


def test_a_model_without_such_an_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention 0 with weights: there are 0"):
        attention_maps(timm.create_model("resnet18"), torch.zeros(1, 3, 64, 64))


def test_every_kind_of_the_catalogue_is_there() -> None:
    plan = load_plan("smoke", ROOT / "config")
    assert {a.kind for a in plan.config.analyses.values()} <= set(FUNCTIONS)


def test_a_run_that_was_not_trained_is_named(tmp_path: Path) -> None:
    plan = load_plan("smoke", ROOT / "config")
    with pytest.raises(HovitError, match=r"seed0/weights\.safetensors: no such file; train levit"):
        analyse(plan.analyse_task(plan.analysis("attention_maps")), torch.device("cpu"), tmp_path)


def test_an_unknown_analysis_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(HovitError, match="no analysis 'nosuch' in config/analyses; there are att"):
        CliRunner().invoke(app, ["analyse", "nosuch"], catch_exceptions=False)


def test_pictures_show_the_photographs_of_the_scale() -> None:
    """Where a scale names some; what it finds in numbers stays on the runs' own images."""
    mini, smoke = (load_plan(scale, ROOT / "config") for scale in ("mini", "smoke"))
    kept, pruned = mini.analysis("kept_patches"), mini.analysis("taylor_pruning")
    (pack, *_) = mini.analyse_task(kept).packs.values()
    assert pack.id == "oxford-iiit-pet-sample-224px"
    assert pack.id in mini.packs
    assert mini.analyse_task(kept).spec["photographs"]
    task = mini.analyse_task(pruned)
    assert all(task.packs[ref] == run.pack for ref, run in task.runs.items())
    assert "photographs" not in mini.analyse_task(pruned).spec
    task = smoke.analyse_task(kept)
    assert all(task.packs[ref] == run.pack for ref, run in task.runs.items())
    assert "photographs" not in smoke.analyse_task(kept).spec


def test_pictures_show_the_role_photographs_unless_the_scale_names_others() -> None:
    plan = load_plan("photographs", ROOT / "config")
    assert plan.scale.photographs is None
    task = plan.analyse_task(plan.analysis("generated_images"))
    assert {pack.id for pack in task.packs.values()} == {"oxford-iiit-pet-1033-224px"}
    assert "photographs" not in task.spec  # each run's own test images
    roles = {"pets": "digits", "photographs": "oxford-iiit-pet-1033"}
    scale = plan.scale.model_copy(update={"datasets": roles, "weights": {}})
    task = Plan(plan.config, scale).analyse_task(plan.analysis("attention_maps"))
    assert {pack.dataset.id for pack in task.packs.values()} == {"oxford-iiit-pet-1033"}
    assert {run.dataset.id for run in task.runs.values()} == {"digits"}
    assert set(task.spec["photographs"]) == set(task.runs)
    named = scale.model_copy(update={"photographs": "oxford-iiit-pet-sample"})
    task = Plan(plan.config, named).analyse_task(plan.analysis("attention_maps"))
    assert {pack.dataset.id for pack in task.packs.values()} == {"oxford-iiit-pet-sample"}


def test_what_skipvit_keeps_as_csv() -> None:
    model = timm.create_model(
        "skipvit_tiny_patch16_224", img_size=32, patch_size=8, schedule="6(45%)+11"
    ).eval()
    lines = to_csv({"a/b": kept_patches(model, torch.randn(1, 3, 32, 32))}).splitlines()
    assert lines[0].startswith("row,what,0")
    assert "a/b,layers,6" in lines[2]
    assert lines[3].startswith("a/b,kept,")
