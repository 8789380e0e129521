"""SkipViT: notation, algorithm against a plain reference, and agreement with timm's ViT."""

import math
import runpy
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_run
from hypothesis import given
from hypothesis import strategies as st
from recorded_graph import capture
from torch import Tensor

import hovit.models  # noqa: F401 (registers)
from hovit.analysis.kept_patches import kept_patches as analysed
from hovit.config.plan import Plan
from hovit.models.schedule import Schedule, keep_count
from hovit.models.skipvit import SkipViT, kept_patches
from hovit.models.token_skipping import choose, class_attention, fuse, put_back, take
from hovit.training.classification import train
from hovit.training.trainer import Options, make_fabric
from hovit.utils.errors import HovitError, OutOfTime
from hovit.utils.graphs import SyncLog

POSTER = [  # Table 1
    "6(45%)+fused token",
    "4,7(30%,30%)+10",
    "4,7(30%,30%)+11",
    "6,8(35%,35%)+10",
    "6,8(35%,35%)+11",
    "6(45%)+11",
    "6(50%)+11",
    "6(55%)+11",
]
FEW = ["6(45%)+fused", "4,7(30%,30%)+10", "6(55%)+11"]
TRAINED = {"embed_dim": 24, "num_heads": 3}
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small(schedule: str = "", **args) -> SkipViT:
    """12 layers, 64 patches, weights from random seed 0."""
    torch.manual_seed(0)
    return timm.create_model("skipvit_tiny_patch16_224", schedule=schedule, **SMALL | args)


def loud(model: SkipViT) -> SkipViT:
    """Large random weights, so that every part affects the output (timm starts at 0.02)."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def plain(**args):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL | args)


# The notation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", POSTER)
def test_schedules_of_the_poster_are_parsed(text):
    schedule = Schedule.parse(text, 12)
    assert str(schedule) == text.replace(" token", "")
    assert schedule.fused == ("fused" in text)


def test_fields_of_a_parsed_schedule():
    schedule = Schedule.parse(" 4, 7 ( 30%, 30 % ) + 10 ", 12)
    assert schedule.layers == (4, 7)
    assert schedule.back == 10
    assert schedule.kept(196) == (138, 97)  # 30 % of the rest, not of all
    assert Schedule.parse("6(45%)+11", 12).kept(196) == (108,)
    assert Schedule.parse("", 12).kept(196) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("13(45%)+14", "layer 13 is out of range; layers count from 1 to 12"),
        ("0(45%)+11", "layer 0 is out of range"),
        ("6(45%)+13", "layer 13 is out of range"),
        ("6(45%)+6", "layer 6 returns what layer 6 drops"),
        ("6(45%)+5", "return in a later layer"),
        ("7,4(30%,30%)+10", "ascending"),
        ("4,4(30%,30%)+10", "once each"),
        ("4,7(30%)+10", "2 layers but 1 ratios"),
        ("6(100%)+11", "leaves no token"),
        ("6(130%)+11", "leaves no token"),
        ("6(45)+11", "write LAYERS(RATIOS)+LAYER"),
        ("6(-5%)+11", "write LAYERS(RATIOS)+LAYER"),
        ("6(45%)", "write LAYERS(RATIOS)+LAYER"),
        ("six", "write LAYERS(RATIOS)+LAYER"),
    ],
)
def test_an_invalid_schedule_is_one_clear_line(text, says):
    with pytest.raises(ValueError, match="schedule") as caught:
        Schedule.parse(text, 12)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="schedule"):
        small(text)


@given(st.text(max_size=30) | st.integers() | st.none())
def test_any_text_is_a_schedule_or_a_value_error(text):
    try:
        schedule = Schedule.parse(text, 12)
    except ValueError:
        return
    assert Schedule.parse(str(schedule), 12) == schedule


@given(
    st.lists(st.integers(1, 11), min_size=1, max_size=4, unique=True).map(sorted),
    st.lists(st.integers(0, 99), min_size=4, max_size=4),
    st.booleans(),
    st.integers(1, 400),
)
def test_valid_schedules_round_trip_and_keep_a_token(layers, ratios, fused, patches):
    inside = ",".join(f"{r}%" for r in ratios[: len(layers)])
    text = f"{','.join(map(str, layers))}({inside})+{'fused' if fused else 12}"
    schedule = Schedule.parse(text, 12)
    assert str(schedule) == text
    left = patches
    for ratio, kept in zip(ratios, schedule.kept(patches), strict=False):
        assert kept == math.ceil(left * (100 - ratio) / 100 - 1e-9)
        assert 1 <= kept <= left
        left = kept


# The algorithm -----------------------------------------------------------------------------------


def test_class_attention_is_the_first_row_of_the_attention_matrix():
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 10, 8)
    whole = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(class_attention(q, k, 8**-0.5), whole[:, :, 0].mean(1))


def test_choose_keeps_the_highest_scores_in_order_and_all_unranked_tokens():
    scores = torch.tensor([[0.9, 0.0, 0.3, 0.1, 0.3, 0.2, 0.0], [0.0, 0.5, 0.4, 0.3, 0.2, 0.1, 1]])
    index = choose(scores, keep=2, prefix=1, suffix=1)
    assert index.tolist() == [[0, 2, 4, 6], [0, 1, 2, 6]]


@pytest.mark.parametrize("n", [9, 65, 197, 785])  # sorting few elements is stable anyway
def test_equal_scores_keep_the_earlier_token(n):
    assert choose(torch.ones(1, n), keep=3, prefix=1).tolist() == [[0, 1, 2, 3]]


def test_dropped_tokens_return_unchanged_to_their_positions():
    x = torch.arange(12.0).view(1, 6, 2)
    index = torch.tensor([[0, 2, 5]])
    kept = take(x, index)
    assert kept.tolist() == [[[0, 1], [4, 5], [10, 11]]]
    whole = put_back(x, index, -kept)
    assert whole.tolist() == [[[0, -1], [2, 3], [-4, -5], [6, 7], [8, 9], [-10, -11]]]
    assert x.tolist() == torch.arange(12.0).view(1, 6, 2).tolist()  # the original stays


def test_the_fused_token_is_the_weighted_sum_of_the_dropped_tokens():
    x, scores = torch.randn(3, 8, 4), torch.rand(3, 8)
    index = torch.tensor([[0, 1, 4]] * 3)
    plain = sum(scores[:, j, None] * x[:, j] for j in (2, 3, 5, 6, 7))
    torch.testing.assert_close(fuse(x, index, scores)[:, 0], plain)


# The model, against a slow reference -------------------------------------------------------------


def reference(model: SkipViT, x: Tensor) -> Tensor:
    """One image and one token at a time; logits [B, classes]."""
    return torch.cat([model.forward_head(_reference(model, image[None])) for image in x])


def _reference(model: SkipViT, x: Tensor) -> Tensor:
    never_ranked = [t for t in (model.cls_token, model.reg_token) if t is not None]
    tokens = torch.cat([*never_ranked, model.patch_embed(x)], dim=1) + model.pos_embed
    tokens = model.norm_pre(tokens)
    active, away = list(range(tokens.shape[1])), {}
    prefix = tokens.shape[1] - 64
    schedule = model.schedule
    for layer, block in enumerate(model.blocks, start=1):
        if layer == schedule.back:
            everyone = dict(zip(active, tokens[0], strict=True)) | away
            active = sorted(everyone)
            tokens = torch.stack([everyone[i] for i in active])[None]
        attn = block.attn
        h = block.norm1(tokens)
        q, k, v = attn.qkv(h).view(1, -1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)
        mixed = attn.norm((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.ls1(attn.proj(mixed))
        if layer in schedule.layers:
            score = weights.mean(1)[0, 0]  # the class token's row
            ranked = [j for j in range(prefix, len(active)) if active[j] >= 0]
            ratio = schedule.ratios[schedule.layers.index(layer)]
            keep = math.ceil(float((1 - ratio) * len(ranked)))
            best = sorted(ranked, key=lambda j: -score[j])[:keep]
            stay = [j for j in range(len(active)) if j in best or j not in ranked]
            gone = [j for j in range(len(active)) if j not in stay]
            away |= {active[j]: tokens[0, j] for j in gone}
            new, names = [tokens[0, j] for j in stay], [active[j] for j in stay]
            if schedule.fused:
                new.append(sum(score[j] * tokens[0, j] for j in gone))
                names.append(-1)
            tokens, active = torch.stack(new)[None], names
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.norm(tokens)


RICH = {  # all options of timm's plain block
    "qk_norm": True,
    "scale_attn_norm": True,
    "init_values": 0.3,
    "reg_tokens": 4,
    "pre_norm": True,
}


@pytest.mark.parametrize("args", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("schedule", [*FEW, "3,5(50%,50%)+fused"])
def test_outputs_and_gradients_match_the_reference(schedule, args):
    model, x = loud(small(schedule, **args)).double(), torch.randn(2, 3, 32, 32).double()
    outputs, gradients = [], []
    for way in (model, partial(reference, model)):
        model.zero_grad()
        outputs.append(way(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name  # scores are float32


def test_a_layer_that_keeps_all_tokens_equals_timms_block_with_dropout():
    """Bit-identical for one random seed: every module of the block runs, in timm's order."""
    rates = ("attn_drop_rate", "proj_drop_rate", "drop_path_rate")
    args = RICH | dict.fromkeys(rates, 0.3)
    model = loud(small("6(45%)+11", **args))
    x, block = torch.randn(8, 1 + 4 + 64, 24), model.blocks[5]
    assert model.training
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    whole, index, kept = model._drop(x, block, 64, 0)
    assert index.tolist() == [list(range(69))] * 8
    assert torch.equal(kept, expected)
    torch.manual_seed(1)
    block.ls2 = torch.nn.Sequential(block.ls2, Zero())
    assert torch.equal(whole, block(x))  # dropped tokens have passed only the attention


class Zero(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.no_grad()
def test_the_input_of_the_first_layer_equals_timms():
    """Position, its dropout, dropped patches and the norm before all layers."""
    args = {"pos_drop_rate": 0.2, "patch_drop_rate": 0.5, "pre_norm": True, "reg_tokens": 4}
    x, seen = torch.randn(2, 3, 32, 32), []
    for model in (small("6(45%)+11", **args), plain(**args)):
        model.norm_pre.weight.normal_(generator=torch.Generator().manual_seed(2))
        model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        torch.manual_seed(1)
        model.train()(x)
    assert seen[0].shape == (2, 1 + 4 + 32, 24)
    assert torch.equal(*seen)


@pytest.mark.parametrize("schedule", ["", "6(0%)+11"])
@pytest.mark.parametrize("name", ["tiny_patch16_224", "small_patch8_224", "base_patch16_224"])
@torch.no_grad()
def test_without_drops_outputs_are_bit_identical_to_timm(name, schedule):
    size = {"img_size": 32, "num_classes": 7}
    torch.manual_seed(0)
    theirs = timm.create_model(f"vit_{name}", **size)
    ours = timm.create_model(f"skipvit_{name}", schedule=schedule, **size)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.train()(x), theirs.train()(x))


@pytest.mark.parametrize("schedule", POSTER)
def test_state_dicts_interchange_with_timm(schedule):
    ours, theirs = small(schedule), plain()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("schedule", FEW)
def test_gradients_reach_every_parameter(schedule):
    model = small(schedule)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_returning_tokens_keep_their_features():
    """Attention is forced to every second token; the others are dropped and return unchanged."""
    model = small("6(50%)+11").eval()

    class Looks(torch.nn.Module):
        """Replaces the qkv of layer 6: keys at even positions match the class query."""

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            qkv = torch.zeros(b, n, 3, c)
            qkv[:, 0, 0] = 1  # the class token's query
            qkv[:, 2::2, 1] = 1  # even places: patches 1, 3, ... in raster order
            return qkv.flatten(2)

    model.blocks[5].attn.qkv = Looks()
    inputs = []
    for layer in (6, 10):
        model.blocks[layer].register_forward_pre_hook(lambda _, a: inputs.append(a[0].clone()))
    with torch.no_grad():
        x = model._embed(torch.randn(1, 3, 32, 32))
        model._skip(x)
    after, back = inputs  # layer 7's input and layer 11's
    assert after.shape[1] == 1 + 32
    assert back.shape[1] == 1 + 64
    whole = _before_drop(model, x)
    assert torch.equal(back[:, 1::2], whole[:, 1::2])  # odd places: dropped
    assert not torch.equal(back[:, 2::2], whole[:, 2::2])


def _before_drop(model: SkipViT, x: Tensor) -> Tensor:
    with torch.no_grad():
        for block in model.blocks[:5]:
            x = block(x)
        block = model.blocks[5]
        return x + block.attn.proj(torch.zeros_like(x))  # by hand, all values are 0


@pytest.mark.parametrize(("schedule", "tokens"), [("6(45%)+11", 65), ("6(45%)+fused", 38)])
def test_number_of_output_tokens(schedule, tokens):
    model = small(schedule)
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, tokens, 24)


@pytest.mark.parametrize("schedule", FEW)
def test_the_same_random_seed_gives_the_same_training_step(schedule):
    def step() -> list[Tensor]:
        model = small(schedule, drop_path_rate=0.1, proj_drop_rate=0.1)
        torch.manual_seed(1)
        model(torch.randn(4, 3, 32, 32)).sum().backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, step(), step()))


def test_warm_up_ends_exactly_at_its_epoch():
    model = small("6(45%)+11", warmup=0.15)
    assert model.dropping
    dropping = []
    for epoch in range(100):
        model.set_epoch(epoch, 100)
        dropping.append(model.dropping)
    assert dropping == [False] * 15 + [True] * 85
    model.set_epoch(1, 10)  # 1.5 epochs: a half up
    assert not model.dropping
    model.set_epoch(2, 10)
    assert model.dropping


def test_a_resumed_run_ends_its_warm_up_at_the_same_epoch(
    plan: Plan, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped after every step drops tokens in the same epochs as an unbroken one."""
    run = small_run(
        plan,
        "skipvit_tiny_patch16_224-schedule=6_45___11-warmup=0.15.imagenet.skipvit",
        epochs=3,
        recipe={"batch_size": 48, "warmup_epochs": 0.0},
        model_args={"schedule": "6(45%)+11", "warmup": 0.67} | TRAINED,
    )
    dropped: list[bool] = []
    whole = SkipViT.forward_features

    def noting(model: SkipViT, x: Tensor, **masks: None) -> Tensor:
        if model.training:
            dropped.append(model.dropping)
        return whole(model, x, **masks)

    monkeypatch.setattr(SkipViT, "forward_features", noting)
    fabric = make_fabric("32-true", accelerator="cpu")
    straight = train(run, fabric, packed).results
    assert dropped == [False] * 4 + [True] * 2  # two steps an epoch; 0.67 of 3 is 2
    shutil.rmtree(packed / run.folder)
    dropped.clear()
    for _ in range(6):
        with pytest.raises(OutOfTime):
            train(run, fabric, packed, Options(deadline=0.0))
    results = train(run, fabric, packed).results
    assert dropped == [False] * 4 + [True] * 2
    for key in ("top1", "loss", "history"):
        assert results[key] == straight[key]


@torch.no_grad()
def test_during_warm_up_outputs_equal_timm():
    model, theirs = small("6(45%)+11", warmup=0.5), plain()
    x = torch.randn(2, 3, 32, 32)
    model.set_epoch(0, 10)
    assert torch.equal(model(x), theirs(x))
    model.set_epoch(5, 10)
    assert not torch.equal(model(x), theirs(x))


@torch.no_grad()
def test_the_warm_up_affects_training_only():
    """Epochs of the warm-up are validated with dropped tokens."""
    model = small("6(45%)+11", warmup=0.5).eval()
    x = torch.randn(2, 3, 32, 32)
    model.set_epoch(9, 10)
    after = model(x)
    model.set_epoch(0, 10)
    assert torch.equal(model(x), after)


@pytest.mark.parametrize("warmup", [-0.1, 1.5, math.nan, "x"])
def test_an_invalid_warm_up_is_refused(warmup):
    with pytest.raises(ValueError, match=f"warmup={warmup!r}"):
        small("6(45%)+11", warmup=warmup)


def test_a_vit_without_a_class_token_is_refused():
    with pytest.raises(ValueError, match="class token"):
        small("6(45%)+11", class_token=False, global_pool="avg")


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("size", [32, 48])
@torch.no_grad()
def test_other_patches_and_image_sizes(patch, size):
    model = small("6(45%)+11", patch_size=patch, img_size=size).eval()
    assert model(torch.randn(1, 3, size, size)).shape == (1, 5)
    kept = kept_patches(model, torch.randn(1, 3, size, size))
    patches = (size // patch) ** 2
    assert (
        kept[0].sum(-1).tolist()
        == [patches] * 5 + [keep_count(patches, model.schedule.ratios[0])] * 5 + [patches] * 2
    )


@torch.no_grad()
def test_gradient_checkpointing_changes_nothing():
    model, x = small("6(45%)+11").eval(), torch.randn(1, 3, 32, 32)
    before = model(x)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), before)


def test_kept_patches_refuses_training_mode():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        kept_patches(small("6(45%)+11"), torch.randn(1, 3, 32, 32))


@torch.no_grad()
def test_dropped_patches_stay_dropped_until_they_return():
    kept = kept_patches(small("4,7(30%,30%)+10").eval(), torch.randn(4, 3, 32, 32))
    assert kept.sum(-1)[0].tolist() == [64] * 3 + [45] * 3 + [32] * 3 + [64] * 3
    assert not (kept[:, 6] & ~kept[:, 3]).any()


@pytest.mark.parametrize("schedule", ["6(45%)+fused", "4,7(30%,30%)+10"])
def test_no_graph_break_and_no_data_dependent_shape(schedule):
    """torch.compile captures one graph (the eager backend needs no compiler)."""
    model, x = small(schedule), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("schedule", ["", *FEW])
def test_no_operator_of_a_training_step_waits_for_the_device(schedule, autocast):
    """Nothing reads a value: no `item`, `nonzero` or boolean index, forward or backward."""
    model = small(schedule, drop_path_rate=0.1, proj_drop_rate=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    for _ in range(2):
        with SyncLog() as log:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = torch.nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not log.counts
    with SyncLog() as log, torch.inference_mode():
        model.eval()(x)
    assert not log.counts


def test_a_replayed_model_gives_the_same_numbers():
    """The CPU stand-in of a CUDA graph: two batches in turn, as by eager calls."""
    model = loud(small("6(45%)+11")).eval()
    batches = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        graphed = capture(model, batches[0])
        for x in (*batches, *batches):
            assert torch.equal(graphed(x), model(x))
    assert not graphed.reason


def test_the_analysis_of_kept_patches():
    found = analysed(small("4,7(30%,30%)+10").eval(), torch.randn(2, 3, 32, 32))
    assert found["layers"] == [4, 7]
    counts = [[sum(map(str.count, mask, "1" * 8)) for mask in image] for image in found["kept"]]
    assert counts == [[45, 32]] * 2
    with pytest.raises(ValueError, match="drops no patches"):
        analysed(small().eval(), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ("6(45)+11", "--schedule: schedule '6(45)+11': write LAYERS(RATIOS)+LAYER"),
        ("6(45%)+13", "--schedule: schedule '6(45%)+13': layer 13 is out of range"),
        ("", "--schedule '': drops none of 4 patches"),
        ("6(20%)+11", "--schedule '6(20%)+11': drops none of 4 patches"),
    ],
)
def test_the_bench_reports_an_invalid_schedule_in_one_line(schedule, says, tmp_path):
    main = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "skipvit.py"))["main"]
    small = ["--image-size=32", "--batch=1", "--rounds=1", "--accelerator=cpu", "--threads=1"]
    told = ["--schedule=6(45%)+11", f"--schedule={schedule}", f"--out={tmp_path / 'out.json'}"]
    with pytest.raises(HovitError) as caught:
        main([*small, *told])
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
