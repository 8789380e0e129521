"""EfficientViT's motivating studies, on constructed cases with known answers."""

import shutil
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT
from synthetic import ANALYSED, analysis_record
from torch import nn

import hovit.models  # noqa: F401
from hovit.analysis.blocks import attention_blocks, attention_weights
from hovit.analysis.head_similarity import head_similarity, largest_similarity
from hovit.analysis.runtime_breakdown import CLASSES, operator_class, runtime_breakdown
from hovit.analysis.taylor_pruning import (
    all_channels,
    channel_cost,
    channel_importance,
    drop_least,
    remaining,
    taylor_pruning,
    zero_dropped,
)
from hovit.config.load import load_config
from hovit.config.plan import Plan, load_plan
from hovit.models.mhsa_share import attention_layout, split_blocks, with_mhsa_share
from hovit.pipeline.analyse import to_csv
from hovit.records.record import write_record
from hovit.report.claims.check import Verdict, check_claim
from hovit.report.figures.draw import FIGURES
from hovit.report.results import Results
from hovit.report.sources import Sources, load_sources
from hovit.utils.create_model import create_model
from hovit.utils.errors import HovitError

SWIN: dict[str, Any] = {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6),
                        "num_classes": 5}  # fmt: skip
DEIT: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3,
                        "num_classes": 5}  # fmt: skip
SMALL = {"swin_tiny_patch4_window7_224": SWIN, "deit_tiny_patch16_224": DEIT}


def small(name: str, **more: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name] | more).eval()
    size = SMALL[name]["img_size"]
    return model, torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])


both = pytest.mark.parametrize("name", SMALL)


@both
def test_weights_are_those_that_timm_mixes_by(name: str) -> None:
    model, images, _ = small(name)
    seen: list[tuple[Any, ...]] = []
    for block in attention_blocks(model):
        block.attn.register_forward_hook(
            lambda m, args, kw, out: seen.append((m, args, kw, out)), with_kwargs=True
        )
    with torch.no_grad():
        model(images)
        assert len(seen) == len(attention_blocks(model))
        for attn, args, kw, out in seen:
            mask = args[1] if len(args) > 1 else kw.get("mask")
            weights = attention_weights(attn, args[0], mask)
            v = attn.qkv(args[0]).chunk(3, -1)[2].unflatten(-1, (attn.num_heads, -1))
            mixed = (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
            assert torch.allclose(attn.proj(mixed), out, atol=1e-5)


@both
def test_identical_heads_are_wholly_alike(name: str) -> None:
    model, images, _ = small(name)
    for block in attention_blocks(model):
        attn, qkv = block.attn, block.attn.qkv
        with torch.no_grad():
            for t in (qkv.weight, qkv.bias):
                heads = t.unflatten(0, (3, attn.num_heads, -1))
                heads.copy_(heads[:, :1].clone().expand_as(heads))
            if hasattr(attn, "relative_position_bias_table"):
                attn.relative_position_bias_table.zero_()
    found = head_similarity(model, images)
    assert [row["similarity"] for row in found["blocks"]] == [pytest.approx(100, abs=1e-3)] * len(
        found["blocks"]
    )
    assert found["mean"] == pytest.approx(100, abs=1e-3)


def test_heads_that_look_elsewhere_are_not_alike() -> None:
    here, there = torch.eye(4), torch.eye(4).roll(1, 0)
    weights = torch.stack([here, there, here])[None].repeat(2, 1, 1, 1)  # [2 images, 3 heads, 4, 4]
    assert torch.allclose(largest_similarity(weights, 2), torch.tensor([[1.0, 0.0, 1.0]] * 2))
    # Two windows of one image: alike in one, not in the other.
    half = torch.stack([torch.stack([here, here]), torch.stack([here, there])])
    assert torch.allclose(largest_similarity(half, 1), torch.full((1, 2), 0.5))


def test_similarity_says_how_far_the_images_leave_it() -> None:
    model, images, _ = small("deit_tiny_patch16_224")
    for block in attention_blocks(model):
        nn.init.normal_(block.attn.qkv.weight, std=0.3)  # sharp maps, which differ by image
    found = head_similarity(model, images)
    alone = [head_similarity(model, image[None]) for image in images]
    each = [one["mean"] for one in alone]
    assert {one["mean_noise"] for one in alone} == {0.0}
    assert max(each) - min(each) > 0.1
    assert found["mean"] == pytest.approx(statistics.mean(each), abs=1e-3)
    error = statistics.stdev(each) / len(each) ** 0.5
    assert found["mean_noise"] == pytest.approx(1.96 * error, rel=1e-2)
    rows = found["blocks"]
    assert found["mean"] == pytest.approx(sum(r["similarity"] for r in rows) / len(rows), abs=1e-3)


def test_one_head_has_nothing_to_be_like() -> None:
    model, images, _ = small("deit_tiny_patch16_224", num_heads=1)
    with pytest.raises(ValueError, match="no block has two heads"):
        head_similarity(model, images)
    with pytest.raises(ValueError, match="no block has two heads"):
        head_similarity(timm.create_model("resnet18"), images)
    with pytest.raises(ValueError, match=r"no block with attn.qkv"):
        attention_blocks(timm.create_model("resnet18"))


@both
def test_importance_is_the_gates_derivative(name: str) -> None:
    model, images, labels = small(name)
    importance = channel_importance(model, images, labels)
    blocks = attention_blocks(model)
    width = blocks[1].attn.proj.in_features
    gates: list[torch.Tensor] = []

    def gate(index: slice, length: int) -> Any:
        def scale(_: nn.Module, *values: Any) -> torch.Tensor:
            x = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
            gates.append(torch.ones(length, requires_grad=True))
            whole = torch.ones(x.shape[-1])
            whole = torch.cat([gates[-1], whole[length:]]) if length < len(whole) else gates[-1]
            return x * whole

        return scale

    hooks = [
        blocks[1].attn.qkv.register_forward_hook(gate(slice(width), width)),
        blocks[1].attn.proj.register_forward_pre_hook(gate(slice(width), width)),
        blocks[1].mlp.fc2.register_forward_pre_hook(
            gate(slice(None), blocks[1].mlp.fc2.in_features)
        ),
    ]
    nn.functional.cross_entropy(model(images), labels).backward()
    for part, each in zip(("qk", "v", "ffn"), gates, strict=True):
        assert each.grad is not None
        assert torch.allclose(importance[1, part], each.grad.abs(), atol=1e-6, rtol=1e-3), part
    for hook in hooks:
        hook.remove()


@both
def test_a_channel_without_gradient_goes_first(name: str) -> None:
    model, images, labels = small(name)
    blocks = attention_blocks(model)
    width = blocks[0].attn.proj.in_features
    with torch.no_grad():
        blocks[0].attn.qkv.weight[width + 5] = 0  # K's channel 5: no gradient reaches Q's
        blocks[0].attn.qkv.bias[width + 5] = 0
        blocks[1].attn.proj.weight[:, 7] = 0
        blocks[0].mlp.fc2.weight[:, 11] = 0
        want = model(images)
    importance = channel_importance(model, images, labels)
    spare = {(0, "qk"): 5, (1, "v"): 7, (0, "ffn"): 11}
    assert all(importance[key][c] < 1e-9 for key, c in spare.items())
    kept = all_channels(blocks)
    cost = sum(channel_cost(blocks[i], part) for i, part in spare)
    drop_least(blocks, kept, importance, remaining(blocks, kept) - cost)
    gone = {(key, int(c)) for key, on in kept.items() for c in (~on).nonzero()}
    assert gone == set(spare.items())
    zero_dropped(blocks, kept)
    with torch.no_grad():
        assert torch.allclose(model(images), want, atol=1e-6)


@both
def test_pruning_meets_its_budget(name: str) -> None:
    model, images, labels = small(name)
    found = taylor_pruning(model, images, labels, images, labels, budget=0.6, steps=3, batch_size=2)
    assert 0.58 < found["kept"] <= 0.6
    assert [row["block"] for row in found["blocks"]] == list(range(1, len(found["blocks"]) + 1))
    for row in found["blocks"]:
        assert (row["qk_before"], row["v_before"], row["ffn_before"]) == (1, 1, 4)
        assert 0 < row["qk_ratio"] <= 1
        assert 0 < row["ffn_ratio"] <= 4
    whole = taylor_pruning(small(name)[0], images, labels, images, labels, budget=1.0, steps=1)
    assert whole["kept"] == 1
    assert whole["top1_after"] == whole["top1_before"]


def test_pruning_ranks_on_one_set_and_scores_on_the_other() -> None:
    model, images, _ = small("deit_tiny_patch16_224")
    others = torch.randn(7, *images.shape[1:])
    with torch.no_grad():
        theirs, ours = (model(x).argmax(1) for x in (others, images))
    wrong = (ours + 1) % 5
    want = channel_importance(model, images, wrong)[0, "v"].mean()
    found = taylor_pruning(model, images, wrong, others, theirs, budget=1.0, steps=1)
    assert (found["top1_before"], found["top1_after"]) == (100, 100)
    assert found["blocks"][0]["v_importance"] == pytest.approx(float(want))
    found = taylor_pruning(model, others, theirs, images, wrong, budget=1.0, steps=1)
    assert (found["top1_before"], found["top1_after"]) == (0, 0)


def test_no_budget_is_refused() -> None:
    model, images, labels = small("deit_tiny_patch16_224")
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"steps": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            taylor_pruning(model, images, labels, images, labels, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "group"),
    [("aten::addmm", "matmul"), ("aten::mkldnn_convolution", "convolution"),
     ("aten::native_layer_norm", "normalisation"), ("aten::copy_", "copy"),
     ("aten::permute", "reshape"), ("aten::add_", "element-wise"), ("aten::t", "reshape"),
     ("aten::to", "copy"), ("aten::_softmax", "element-wise"), ("aten::topk", "other"),
     ("aten::_scaled_dot_product_flash_attention_for_cpu", "matmul"),
     ("aten::total", "other"), ("cudaLaunchKernel", "other")],
)  # fmt: skip
def test_operators_have_their_class(name: str, group: str) -> None:
    assert operator_class(name) == group


class Adding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


class Multiplying(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x.view(-1, x.shape[-1]).T, x.view(-1, x.shape[-1]))


def test_time_of_a_constructed_model_is_all_of_one_class() -> None:
    images = torch.randn(8, 3, 128, 128)
    adding = runtime_breakdown(Adding(), images)
    assert (adding["memory_bound_share"], adding["memory_bound_share_noise"]) == (100, 0)
    shares = {row["class"]: row["share"] for row in adding["classes"]}
    assert shares["element-wise"] == 100
    assert list(shares) == list(CLASSES)
    multiplying = {
        r["class"]: r["share"] for r in runtime_breakdown(Multiplying(), images)["classes"]
    }
    assert multiplying["matmul"] > 0
    assert multiplying["element-wise"] == multiplying["copy"] == 0
    with pytest.raises(ValueError, match="no operator"):
        runtime_breakdown(nn.Identity(), images)
    with pytest.raises(ValueError, match="repeats=0"):
        runtime_breakdown(Adding(), images, 0)


def test_run_time_says_how_far_its_passes_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = iter((10.0, 20.0, 30.0, 40.0, 50.0))  # ms of copying in 100, a pass

    def passes(*_: Any) -> dict[str, float]:
        copied = next(bound)
        return dict.fromkeys((*CLASSES, "other"), 0.0) | {"copy": copied, "matmul": 100 - copied}

    monkeypatch.setattr("hovit.analysis.runtime_breakdown._profiled", passes)
    found = runtime_breakdown(nn.Identity(), torch.zeros(1, 3, 8, 8), repeats=5)
    assert found["memory_bound_share"] == 30
    assert found["memory_bound_share_noise"] == 10  # quartiles at 20 and 40


@both
def test_every_operator_of_a_transformer_has_a_class(name: str) -> None:
    model, images, _ = small(name)
    # Enough images that an operator without a class tells among what each call costs.
    found = runtime_breakdown(model, images.repeat(64, 1, 1, 1))
    assert sum(row["share"] for row in found["classes"]) == pytest.approx(100, abs=0.01)
    assert 0 < found["memory_bound_share"] < 100
    by = {row["class"]: row["ms"] for row in found["classes"]}
    assert min(by["matmul"], by["convolution"], by["normalisation"], by["element-wise"]) > 0
    assert found["other_ms"] < 0.05 * (sum(by.values()) + found["other_ms"])


@both
def test_softmax_counts_alike_in_every_transformer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an operator of its own: no attention is fused while a model is analysed."""
    model, images, _ = small(name)
    was = [getattr(module, "fused_attn", None) for module in model.modules()]
    seen: set[str] = set()

    def noted(operator: str) -> str:
        seen.add(operator)
        return operator_class(operator)

    monkeypatch.setattr("hovit.analysis.runtime_breakdown.operator_class", noted)
    runtime_breakdown(model, images)
    assert "aten::_softmax" in seen
    assert not [operator for operator in seen if "attention" in operator]
    assert [getattr(module, "fused_attn", None) for module in model.modules()] == was


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.2, 5), (0.4, 10), (0.5, 12), (1, 24)])
def test_attention_is_spread_evenly(share: float, count: int) -> None:
    found = attention_layout(24, share)
    assert sum(found) == count
    at = [i for i, attends in enumerate(found) if attends]
    gaps = {b - a for a, b in pairwise(at)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if share == 0.5:
        assert found == [True, False] * 12


@both
def test_half_attention_is_timms_model(name: str) -> None:
    timms, images, _ = small(name)
    torch.manual_seed(0)
    ours = with_mhsa_share(name, 0.5, **SMALL[name]).eval()
    with torch.no_grad():
        want = timms(images)
        assert torch.equal(ours(images), want)
        for stage in getattr(timms, "layers", [timms]):  # its blocks, halved, make the same
            blocks = list(stage.blocks)
            stage.blocks = nn.Sequential(*split_blocks(blocks, [True, False] * len(blocks)))
        assert torch.equal(timms(images), want)


@both
@pytest.mark.parametrize("share", [0, 0.2, 0.8, 1])
def test_any_share_trains(name: str, share: float) -> None:
    _, images, labels = small(name)
    model = with_mhsa_share(name, share, **SMALL[name])
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    layers = 2 * sum(SMALL[name].get("depths", (3,)))
    assert sum(hasattr(m, "qkv") for m in model.modules()) == round(share * layers)
    with pytest.raises(ValueError, match=r"mhsa_share=1.5 is not in"):
        with_mhsa_share(name, 1.5, **SMALL[name])


@both
def test_a_head_reads_its_split_alone(name: str) -> None:
    torch.manual_seed(0)
    model = with_mhsa_share(name, head_splits=True, **SMALL[name])
    attn = next(m for m in model.modules() if hasattr(m, "qkv"))
    dim, heads = attn.proj.in_features, attn.num_heads
    x = torch.randn(1, 4, dim)
    other = x.clone()
    other[..., : dim // heads] += 1  # the first head's split
    same = (attn.qkv(x) == attn.qkv(other)).view(4, 3, heads, -1).all(-1)
    assert not same[:, :, 0].any()
    assert same[:, :, 1:].all()
    assert model.eval()(small(name)[1]).shape == (4, 5)


def test_registered_models_take_their_share_and_size() -> None:
    for name, width in (("mhsa_swin_tiny", 48), ("mhsa_deit_tiny", 96)):
        model = create_model(name, 7, 64, mhsa_share=0.2, embed_dim=width)
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
        with pytest.raises(HovitError, match="mhsa_share=2"):
            create_model(name, 7, 64, mhsa_share=2, embed_dim=width)


def test_csv_has_every_number() -> None:
    found = {"s/a": {"blocks": [{"block": 1, "similarity": 60.5}], "mean": 60.5, "images": [3],
                     "weights_sha256": "0"},
             "s/b": {"map": [[0.25, 0.75]], "entropy": 0.5}}  # fmt: skip
    lines = to_csv(found).splitlines()
    assert lines[0] == "row,what,mean,block,similarity,entropy,0,1"
    assert lines[1:] == ["s/a,all,60.5,,,,,", "s/a,blocks,,1.0,60.5,,,", "s/b,all,,,,0.5,,",
                         "s/b,map,,,,,0.25,0.75"]  # fmt: skip


def checked(plan: Plan, root: Path) -> dict[str, Verdict]:
    """The claims on analyses, by made-up records of the analyses alone."""
    for name in plan.claimed_analyses:
        write_record(
            root / plan.analyse_task(plan.analysis(name)).path, analysis_record(plan, name)
        )
    claims = plan.config.claims["efficientvit_analyses"].claims
    sources = Sources(Results(plan, root), ())
    return {c.id: check_claim(sources, c, "efficientvit") for c in claims if ":" in c.of}


def test_claims_on_analyses_are_checked_by_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = load_plan("mini", ROOT / "config")
    verdicts = checked(mini, tmp_path)
    assert verdicts["memory-bound-share"].verdict == "within noise"  # made up: alike
    assert verdicts["taylor-qk-less-than-v"].verdict == "not comparable"
    path = "results/runs/mini/analysis/runtime_breakdown.json"
    assert verdicts["memory-bound-share"].records == (path,)
    found = ANALYSED["runtime_breakdown"] | {"memory_bound_share_noise": 2.5}
    monkeypatch.setitem(ANALYSED, "runtime_breakdown", found)
    noisy = checked(mini, tmp_path)["memory-bound-share"]
    assert noisy.why == "differences up to 3.54 points are noise"  # both: 2.5 by the root of 2
    smoke = checked(load_plan("smoke", ROOT / "config"), tmp_path)["taylor-v-late"]
    assert smoke.verdict == "not measured"
    assert smoke.why.endswith("scale smoke does not check analyses")


def test_an_analysis_of_one_model_on_the_papers_images_is_provisional(tmp_path: Path) -> None:
    config = load_plan("mini", ROOT / "config").config
    images = config.datasets["tiny-imagenet-10"].model_copy(update={"stands_for": ""})
    datasets = config.datasets | {images.id: images}
    own = Plan(config.model_copy(update={"datasets": datasets}), config.scales["mini"])
    found = checked(own, tmp_path)["taylor-qk-less-than-v"]
    assert (found.verdict, found.detail) == ("provisional", "reproduced")  # made up: 50 against 90


def test_a_claim_on_an_analysis_names_one_that_exists(tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(ROOT / "config", config)
    path = config / "claims/efficientvit_analyses.yaml"
    text = path.read_text()
    path.write_text(text.replace("taylor_pruning:mhsa_share/swin/", "nosuch:mhsa_share/swin/"))
    with pytest.raises(HovitError, match="'nosuch' is not defined; allowed: attention_maps"):
        load_config(config)
    path.write_text(text.replace("taylor_pruning:mhsa_share/swin/", "taylor_pruning:depth/x/"))
    with pytest.raises(HovitError, match="'depth/x' is not defined; allowed: mhsa_share/swin"):
        load_config(config)


def test_a_figure_of_accuracy_skips_evidence_that_has_only_times(tmp_path: Path) -> None:
    place = Path("results/evidence/amd-epyc/mini/measure/mhsa_share.json")
    (tmp_path / place).parent.mkdir(parents=True)
    shutil.copy(ROOT / place, tmp_path / place)
    plan, figure = load_plan("smoke", ROOT / "config"), FIGURES["mhsa_share"]
    sources = load_sources(plan, tmp_path)
    assert replace(figure, numbers=("throughput",)).results(sources).is_evidence
    assert not figure.results(sources).is_evidence
