"""The models against the numbers in the deck, and each layer against a plain reference."""

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hovit.models  # noqa: F401 (registers)
from hovit.models.levit_layers import (
    Attention,
    Block,
    ConvShrink,
    ConvStage,
    DeckShrink,
    FixedShrink,
    Mlp,
    checkerboard_indices,
    checkerboard_mask,
)
from hovit.utils.create_model import create_model
from hovit.utils.errors import HovitError

DECK = [*timm.list_models(module="levit_deck"), *timm.list_models(module="hovit")]
LAUNCHERS = timm.list_models(module="launcher")
FEW_LAUNCHERS = ["l_levit_deck", "l_levit_256", "l_hovit"]  # one per kind of backbone


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def create(name: str, **args):
    """The model at 37 classes; a Launcher generates 64 x 64 pixels by default."""
    if name in LAUNCHERS:
        args = {"img_size": 64} | args
    return timm.create_model(name, **{"num_classes": 37} | args)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, **args):
    """The model on the meta device, to count parameters."""
    with torch.device("meta"):
        return create(name, **args)


def lively(module: nn.Module) -> nn.Module:
    """BN statistics and weights as after training: at their defaults BN is nearly the identity."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for t, low, high in (
                (m.running_mean, -0.5, 0.5),
                (m.running_var, 0.5, 2),
                (m.weight, 0.5, 2),
                (m.bias, -0.5, 0.5),
            ):
                nn.init.uniform_(t, low, high)
    return module.eval()


def test_the_registry_is_not_empty():
    assert len(DECK) == 11
    assert len(LAUNCHERS) == 12
    assert set(LAUNCHERS) == {f"l_{name}" for name in [*DECK, "levit_256"]}


# Counts ------------------------------------------------------------------------------------------

PRINTED = {  # in the deck, at 37 classes and 224 pixels
    "levit_deck": 15_733_482,
    "levit_deck_2blocks": 14_020_586,
    "levit_deck_conv_shrink": 12_431_338,
    "hovit": 4_937_962,
    "l_levit_deck_2blocks": 56_805_757,
    "l_levit_deck_conv_shrink": 55_216_509,
    "l_hovit": 47_723_133,
}
PARTS = {
    "stem": 388_896,
    "stages.0.blocks.0": 527_872,
    "stages.1.blocks.0": 1_185_024,
    "stages.2.blocks.0": 2_104_320,
    "stages.0": 1_583_616,
    "stages.1.blocks": 3_555_072,
    "stages.2.blocks": 4_208_640,
    "stages.1.shrink": 1_746_176,
    "stages.2.shrink": 4_211_072,
}
CONV_STAGES = {1: (197_888, 395_776), 2: (395_136, 790_272), 3: (460_800, 921_600)}


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_match_the_deck(name):
    size = {"img_size": 224} if name in LAUNCHERS else {}
    assert count(on_meta(name, **size)) == PRINTED[name]


def test_parameters_of_each_part_of_levit_deck():
    model = on_meta("levit_deck")
    assert {part: count(model.get_submodule(part)) for part in PARTS} == PARTS
    assert sum(map(count, model.get_classifier())) == 40_010


def test_parameters_of_the_unused_keys_and_values():
    model = on_meta("levit_deck")
    dead = sum(count(stage.shrink.kv) for stage in model.stages if stage.shrink is not None)
    assert dead == 3_164_160
    assert count(model) - dead == 12_569_322
    cut = 1 - PRINTED["hovit"] / (count(model) - dead)
    assert round(100 * cut, 1) == 60.7


@pytest.mark.parametrize("k", CONV_STAGES)
def test_the_deck_counts_conv_stages_twice(k):
    ours, printed = CONV_STAGES[k]
    assert count(on_meta(f"levit_deck_conv{k}").stages[k - 1]) == ours
    assert printed == 2 * ours


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_adds_the_same_parameters(name):
    backbone = name.removeprefix("l_")
    launcher = on_meta(name, img_size=224)
    assert count(launcher) - count(on_meta(backbone)) == 42_785_171
    assert count(launcher.resnet) == 23_508_032
    assert count(launcher.to_image) == 2048 * 9408 + 9408


# Every model of the registry ---------------------------------------------------------------------

AT_224 = DECK + FEW_LAUNCHERS


@pytest.mark.parametrize(
    ("name", "size"), [(n, 64) for n in DECK + LAUNCHERS] + [(n, 224) for n in AT_224]
)
@torch.no_grad()
def test_forward(name, size):
    args = {"img_size": size} if name in LAUNCHERS else {}
    model = create(name, **args).eval()
    x = torch.randn(2, 3, size, size)
    out = model(x)
    assert out.shape == (2, 37)
    assert out.isfinite().all()
    assert not torch.equal(out[0], out[1])
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), out)
    assert model.num_features == features.shape[-1] == 512
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(1))


# Tokens of the last stage for an image of 64 x 96, and of 224 x 224. Convolutions round up.
TOKENS = dict.fromkeys(DECK, (1, 9)) | {
    "levit_deck_conv2": (6, 49),
    "levit_deck_conv3": (6, 49),
    "levit_deck_conv_shrink": (2, 16),
    "hovit": (6, 49),
}


@pytest.mark.parametrize("name", DECK)
@torch.no_grad()
def test_images_of_any_shape(name):
    model = create(name).eval()
    small, large = TOKENS[name]
    assert model.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, small, 512)
    assert model.forward_features(torch.randn(1, 3, 96, 64)).shape == (1, small, 512)
    assert model.forward_features(torch.randn(1, 3, 224, 224)).shape == (1, large, 512)
    assert model(torch.randn(2, 3, 75, 131)).isfinite().all()


@pytest.mark.parametrize("name", DECK + FEW_LAUNCHERS)
@torch.no_grad()
def test_reset_classifier(name):
    model = create(name).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(x).shape == (2, 5)
    assert not any(m.training for m in model.modules())
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), features)


def test_reset_classifier_keeps_device_mode_and_dropout():
    model = create("levit_deck_dropout", drop_rate=0.3).train().to("meta")
    model.reset_classifier(5)
    for head in model.get_classifier():
        assert head.linear.weight.device.type == "meta"
        assert head.training
        assert head.drop.p == 0.3
    assert not model.eval().head.training


@torch.no_grad()
def test_global_pool():
    model = timm.create_model("levit_deck", num_classes=0, global_pool="").eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="'avg'"):
        model.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="with num_classes=0"):  # BatchNorm of the heads is 1D
        model.reset_classifier(5)


@pytest.mark.parametrize("name", DECK + FEW_LAUNCHERS)
@torch.no_grad()
def test_both_heads_are_returned_in_distilled_training_only(name):
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(model.train()(x), Tensor)
    model.set_distilled_training(True)
    pair = model(x)
    assert isinstance(pair, tuple)
    assert [tuple(t.shape) for t in pair] == [(2, 37)] * 2
    model.eval()
    features = model.forward_features(x).mean(1)
    head, head_dist = (head(features) for head in model.get_classifier())
    assert not torch.allclose(head, head_dist, atol=1e-3)
    torch.testing.assert_close(model(x), (head + head_dist) / 2)
    model.train().set_distilled_training(False)
    assert isinstance(model(x), Tensor)


DEAD = dict.fromkeys(DECK, (1, 2)) | {
    "levit_deck_fixed": (),
    "levit_deck_conv2": (2,),
    "levit_deck_conv3": (1,),
    "levit_deck_conv_shrink": (),
    "hovit": (),
    "levit_256": (),
}


@pytest.mark.parametrize("name", DECK + LAUNCHERS)
def test_every_parameter_except_unused_ones_gets_a_gradient(name):
    model = create(name).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    prefix = "backbone." if name in LAUNCHERS else ""
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {
        f"{prefix}stages.{i}.shrink.kv.{part}"
        for i in DEAD[name.removeprefix("l_")]
        for part in ("linear.weight", "bn.weight", "bn.bias")
    }
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", DECK + LAUNCHERS)
def test_only_the_launcher_has_a_fixed_size(name):
    assert on_meta(name).pretrained_cfg["fixed_input_size"] == (name in LAUNCHERS)


@pytest.mark.parametrize("name", ["levit_deck", "levit_deck_fixed", "hovit", "l_hovit"])
@torch.no_grad()
def test_state_dict_through_safetensors(name, tmp_path):
    model, other = lively(create(name)), create(name).eval()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(model(x), other(x))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", ["levit_deck", "l_hovit"])
def test_there_are_no_published_weights(name):
    with pytest.raises(RuntimeError, match="pretrained"):
        create(name, pretrained=True)


@pytest.mark.parametrize("shape", [(63, 64), (224, 48)])
def test_an_image_under_64_pixels_is_refused(shape):
    with pytest.raises(ValueError, match=rf"{shape[0]}, {shape[1]}.*64 x 64 at least"):
        create("levit_deck").eval()(torch.randn(1, 3, *shape))


# Layers, against plain references in float64 ------------------------------------------------------


def bn64(bn: nn.Module, x: Tensor) -> Tensor:
    """Evaluation-mode BN over the last dimension."""
    mean, var, w, b = (
        t.detach().double() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / torch.sqrt(var + bn.eps) * w + b


def linear_norm64(layer: nn.Module, x: Tensor) -> Tensor:
    assert layer.linear.bias is None
    return bn64(layer.bn, x @ layer.linear.weight.detach().double().T)


def hardswish64(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def attend64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = []
    for c in range(0, q.shape[-1], 64):
        scores = q[..., c : c + 64] @ k[..., c : c + 64].transpose(-1, -2) / math.sqrt(64)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[..., c : c + 64])
    return torch.cat(heads, -1)


def attention64(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = linear_norm64(layer.qkv, x).split(x.shape[-1], -1)
    return linear_norm64(layer.proj, hardswish64(attend64(q, k, v)))


def mlp64(mlp: Mlp, x: Tensor) -> Tensor:
    linears = [m for m in mlp if hasattr(m, "linear")]
    return linear_norm64(linears[1], hardswish64(linear_norm64(linears[0], x)))


def grid64(x: Tensor, height: int, width: int) -> Tensor:
    """The grid of tokens, pixel by pixel."""
    out = torch.empty(x.shape[0], x.shape[2], height, width, dtype=torch.float64)
    for row in range(height):
        for col in range(width):
            out[:, :, row, col] = x[:, row * width + col]
    return out


def scrambled64(x: Tensor, height: int, width: int) -> Tensor:
    """The grid of the published code: the list of tokens, reshaped into an image."""
    channels, flat = x.shape[2], x.double().flatten(1)
    out = torch.empty(x.shape[0], channels, height, width, dtype=torch.float64)
    for c in range(channels):
        for row in range(height):
            for col in range(width):
                out[:, c, row, col] = flat[:, (c * height + row) * width + col]
    return out


def conv_tokens64(conv: nn.Conv2d, image: Tensor, **args) -> Tensor:
    y = F.conv2d(image, conv.weight.double(), conv.bias.double(), **args)
    return torch.stack([y[:, :, r, c] for r in range(y.shape[2]) for c in range(y.shape[3])], 1)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention():
    layer, x = lively(Attention(192)), 2 * torch.randn(2, 10, 192)
    assert_close(layer(x, (2, 5)), attention64(layer, x.double()))


@torch.no_grad()
def test_block():
    block, x = lively(Block(128)), torch.randn(2, 6, 128)
    y = x.double()
    y = y + attention64(block.attn, y)
    assert_close(block(x, (2, 3)), y + mlp64(block.mlp, y))


def shrink_tail64(layer: DeckShrink, q: Tensor) -> Tensor:
    return mlp64(layer.mlp, linear_norm64(layer.proj, hardswish64(q)))  # no residual


@pytest.mark.parametrize("size", [(4, 6), (7, 7)])  # 7 x 7 leaves its last row and column out
@torch.no_grad()
def test_deck_shrink_reads_scrambled_tokens_and_does_not_attend(size):
    layer = lively(DeckShrink(64, 128, 2, 0.0))
    x = torch.randn(2, size[0] * size[1], 64)
    out, out_size = layer(x, size)
    assert out_size == (size[0] // 2, size[1] // 2)
    assert_close(out, shrink_tail64(layer, conv_tokens64(layer.q, scrambled64(x, *size), stride=2)))
    in_place = shrink_tail64(layer, conv_tokens64(layer.q, grid64(x, *size), stride=2))
    assert (out - in_place).abs().max() > 0.1


@pytest.mark.parametrize("size", [(4, 6), (7, 7)])
@torch.no_grad()
def test_fixed_shrink_attends_to_tokens_in_order(size):
    layer = lively(FixedShrink(128, 192, 3, 0.0))
    x = 2 * torch.randn(2, size[0] * size[1], 128)
    out, out_size = layer(x, size)
    assert out_size == (size[0] // 2, size[1] // 2)
    k, v = linear_norm64(layer.kv, x.double()).split(128, -1)
    q = conv_tokens64(layer.q, grid64(x, *size), stride=2)
    assert_close(out, shrink_tail64(layer, attend64(q, k, v)))


@pytest.mark.parametrize(("shrink", "reads"), [(DeckShrink, False), (FixedShrink, True)])
@torch.no_grad()
def test_only_fixed_shrink_uses_keys_and_values(shrink, reads):
    layer, x = lively(shrink(128, 192, 3, 0.0)), torch.randn(2, 24, 128)
    calls = []
    layer.kv.register_forward_hook(lambda *_: calls.append(1))
    before = layer(x, (4, 6))[0]
    layer.kv.linear.weight.normal_()
    assert torch.equal(before, layer(x, (4, 6))[0]) != reads
    assert len(calls) == 2  # computed even if unused


@torch.no_grad()
def test_conv_shrink():
    layer, x = ConvShrink(8, 12, 1, 0.0).eval(), torch.randn(2, 35, 8)
    out, size = layer(x, (5, 7))
    assert size == (3, 4)
    reference = conv_tokens64(layer.conv, grid64(x, 5, 7), stride=2, padding=1)
    assert_close(out, hardswish64(reference))


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_conv_stage(depth):
    layer, x = lively(ConvStage(8, 12, depth)), torch.randn(2, 6, 8)
    out, size = layer(x, (2, 3))
    assert size == (2, 3)
    *convs, bn, _ = layer.convs
    assert len(convs) == depth
    y = x.double()
    for conv in convs:
        y = y @ conv.weight[:, :, 0, 0].double().T + conv.bias.double()
    assert_close(out, bn64(bn, y).clamp(min=0))


@torch.no_grad()
def test_stem_ends_without_an_activation():
    stem = lively(create("levit_deck").stem)
    x = torch.randn(1, 3, 64, 64)
    y = x.double()
    for i in range(1, 5):
        layer = stem.get_submodule(f"conv{i}")
        y = hardswish64(y) if i > 1 else y
        y = F.conv2d(y, layer.linear.weight.double(), stride=2, padding=1)
        y = bn64(layer.bn, y.movedim(1, -1)).movedim(-1, 1)
    assert y.shape == (1, 256, 4, 4)
    assert_close(stem(x), y)


# Checkerboard ------------------------------------------------------------------------------------


def test_checkerboard_pattern():
    assert checkerboard_mask((2, 3)).tolist() == [True, False, True, False, True, False]
    assert checkerboard_mask((3, 2)).tolist() == [True, False, False, True, True, False]
    assert checkerboard_mask((2, 2)).tolist() == [True, False, False, True]
    assert checkerboard_mask((7, 7)).sum() == 25
    for size in itertools.product(range(1, 9), repeat=2):
        assert torch.equal(checkerboard_indices(size), checkerboard_mask(size).nonzero()[:, 0])


@pytest.mark.parametrize("checkerboard", ["mask", "drop"])
def test_only_the_second_stage_has_a_checkerboard(checkerboard):
    model = on_meta("levit_deck", checkerboard=checkerboard)
    found = [{block.checkerboard for block in stage.blocks} for stage in model.stages]
    assert found == [{""}, {checkerboard}, {""}]
    model = on_meta("levit_deck_checkerboard" + {"mask": "", "drop": "_drop"}[checkerboard])
    assert model.stages[1].blocks[2].checkerboard == checkerboard


def with_checkerboard(checkerboard: str, plain: Block) -> Block:
    block = Block(64, checkerboard=checkerboard).eval()
    block.load_state_dict(plain.state_dict())
    return block


EVEN, ODD = [0, 2, 4, 6, 8], [1, 3, 5, 7]  # of 3 x 3


@torch.no_grad()
def test_mask_zeroes_the_input_of_attention():
    plain, x = lively(Block(64)), torch.randn(2, 9, 64)
    block = with_checkerboard("mask", plain)
    masked = x.clone()
    masked[:, ODD] = 0
    y = x.double() + attention64(block.attn, masked.double())
    assert_close(block(x, (3, 3)), y + mlp64(block.mlp, y))


@torch.no_grad()
def test_drop_removes_odd_tokens_from_attention():
    plain, x = lively(Block(64)), torch.randn(2, 9, 64)
    block = with_checkerboard("drop", plain)
    out = block(x, (3, 3))
    assert_close(out[:, ODD], x[:, ODD].double() + mlp64(block.mlp, x[:, ODD].double()))
    torch.testing.assert_close(out[:, EVEN], plain(x[:, EVEN], (1, 5)))
    block.attn.qkv.linear.weight.normal_()
    again = block(x, (3, 3))
    assert torch.equal(again[:, ODD], out[:, ODD])
    assert not torch.allclose(again[:, EVEN], out[:, EVEN])


@torch.no_grad()
def test_drop_attends_to_25_of_49_tokens():
    block, seen = Block(64, checkerboard="drop").eval(), []
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    block(torch.randn(1, 49, 64), (7, 7))
    assert seen == [25]


@torch.no_grad()
def test_mask_and_drop_change_nothing_on_a_single_token():
    plain, x = lively(Block(64)), torch.randn(2, 1, 64)
    for checkerboard in ("mask", "drop"):
        block = with_checkerboard(checkerboard, plain)
        assert torch.equal(block(x, (1, 1)), plain(x, (1, 1)))


def test_drop_under_autocast():
    block, x = Block(64, checkerboard="drop"), torch.randn(2, 9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, (3, 3)).sum().backward()  # x is float32, attention's output is not
    assert block.attn.qkv.linear.weight.grad.isfinite().all()


# Dropout -----------------------------------------------------------------------------------------


def test_dropout_is_in_mlps_and_heads():
    model = on_meta("levit_deck_dropout", drop_rate=0.3)
    layers = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    inside = [n for n in layers if ".mlp." in n]
    assert len(inside) == 8 + 2  # of blocks and shrinks
    assert set(layers) - set(inside) == {"head.drop", "head_dist.drop"}
    assert set(layers.values()) == {0.3}
    assert on_meta("levit_deck_dropout").head.drop.p == 0.1
    plain = on_meta("levit_deck")
    assert {m.p for m in plain.modules() if isinstance(m, nn.Dropout)} == {0.0}


@torch.no_grad()
def test_dropout_drops_in_training_only():
    mlp, read = Mlp(64, drop=0.5), []
    mlp[-1].register_forward_pre_hook(lambda _, args: read.append((args[0] == 0).double().mean()))
    x = torch.randn(16, 8, 64)
    mlp.train()(x)
    mlp.eval()(x)
    assert read[0] == pytest.approx(0.5, abs=0.03)
    assert read[1] < 0.01


@torch.no_grad()
def test_dropout_of_a_whole_model():
    x = torch.randn(2, 3, 64, 64)
    for name, random in (("levit_deck_dropout", True), ("levit_deck", False)):
        model = create(name).train()
        assert torch.equal(model(x), model(x)) != random
        model.eval()
        assert torch.equal(model(x), model(x))


# create_model ------------------------------------------------------------------------------------


def test_create_model_passes_the_image_size_to_models_of_fixed_size():
    assert create_model("l_hovit", 5, 96).low_res_shape == (3, 24, 24)
    assert create_model("levit_deck_dropout", 5, 96, drop_rate=0.5).head.drop.p == 0.5


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("levit_dekc", {}, "'levit_dekc' is not registered with timm; nearest: l_levit_"),
        ("nosuch", {}, "'nosuch' is not registered with timm"),
        ("resnet50.a1_in1k", {}, "resnet50.a1_in1k"),  # a tag names weights
        ("resnet50.nosuch", {}, "resnet50.nosuch"),
        ("levit_deck", {"nosuch": 1}, "levit_deck at 64 px with {'nosuch': 1}"),
        ("levit_deck", {"depth": (1, 2)}, "levit_deck at 64 px with {'depth': (1, 2)}"),
        ("levit_deck", {"shrink": "nosuch"}, "levit_deck at 64 px with {'shrink': 'nosuch'}"),
        ("levit_deck", {"pretrained": True}, "levit_deck at 64 px with {'pretrained': True}"),
        ("l_hovit", {"drop_rate": 2}, "l_hovit at 64 px with"),
    ],
)
def test_create_model_reports_errors_in_one_line(name, args, says):
    with pytest.raises(HovitError) as error:
        create_model(name, 5, 64, **args)
    assert says in str(error.value)
    assert str(error.value).isprintable()


# Launcher ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_image_is_the_upsampled_linear_map_of_resnet50_features():
    model = lively(create("l_hovit"))
    x = torch.randn(2, 3, 96, 64)
    small = model.to_image(model.resnet(x)).reshape(2, 3, 16, 16)
    weight, bias = model.upsample.weight, model.upsample.bias
    image = torch.einsum("bcij,couv->boiujv", small, weight).reshape(2, 3, 64, 64)
    assert model.generate_image(x).shape == (2, 3, 64, 64)
    assert image.std() > 1e-3
    torch.testing.assert_close(model.generate_image(x), image + bias[:, None, None])
    torch.testing.assert_close(model(x), model.backbone(model.generate_image(x)))


@torch.no_grad()
def test_image_is_affine_in_the_pooled_vector():
    model = create("l_hovit").double().eval()
    model.resnet = nn.Identity()
    a, b = torch.randn(2, 1, 2048, dtype=torch.float64)
    zero = model.generate_image(torch.zeros_like(a))
    mixed = 3 * (model.generate_image(a) - zero) - 2 * (model.generate_image(b) - zero)
    torch.testing.assert_close(model.generate_image(3 * a - 2 * b) - zero, mixed)
    assert not torch.allclose(model.generate_image(a), zero)


@torch.no_grad()
def test_launcher_sizes():
    model = create("l_levit_deck", img_size=(64, 96)).eval()
    assert model.generate_image(torch.randn(1, 3, 80, 48)).shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match=r"66.*multiples of 4"):
        create("l_hovit", img_size=66)
    with pytest.raises(ValueError, match="64 x 64 at least"):
        create("l_hovit", img_size=32).eval()(torch.randn(1, 3, 64, 64))


def test_launcher_passes_arguments_to_the_backbone():
    assert on_meta("l_levit_deck_dropout", drop_rate=0.5).backbone.head.drop.p == 0.5
    assert on_meta("l_hovit", num_classes=5).num_classes == 5


# Fronts ------------------------------------------------------------------------------------------

LITE = "tf_efficientnet_lite0"


@pytest.mark.parametrize("name", ["l_levit_deck", "l_levit_256", "l_hovit"])
def test_names_of_a_launcher_behind_resnet50(name):
    model = on_meta(name)
    parts = {key.partition(".")[0] for key in model.state_dict()}
    assert parts == {"resnet", "to_image", "upsample", "backbone"}
    assert isinstance(model.renormalize, nn.Identity)
    assert model.front_module is model.resnet


def test_parameters_behind_another_front():
    model = on_meta("l_hovit", img_size=224, front=LITE)
    assert count(model.front) == count(on_meta(LITE, num_classes=0)) == 3_371_008
    assert count(model.to_image) == 1280 * 9408 + 9408
    assert count(model) - count(model.front) - count(model.to_image) - 147 == 4_937_962
    parts = {key.partition(".")[0] for key in model.state_dict()}
    assert parts == {"front", "to_image", "upsample", "backbone"}


@torch.no_grad()
def test_a_front_gets_images_with_its_own_statistics():
    model = create("l_hovit", front=LITE).eval()
    images = torch.rand(2, 3, 64, 64)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    own = (images - 0.5) / 0.5
    torch.testing.assert_close(model.renormalize((images - mean) / std), own, atol=1e-5, rtol=1e-5)
    features = model.front_features((images - mean) / std)
    torch.testing.assert_close(features, model.front(own), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="in_chans=4"):
        create("l_hovit", front=LITE, in_chans=4)


@pytest.mark.parametrize(
    ("name", "args"),
    [("l_hovit", {}), ("l_levit_256", {"front": LITE}), ("front_linear", {"front": LITE})],
)
@torch.no_grad()
def test_pooled_features_replace_images(name, args):
    model = lively(create(name, **args))
    x = torch.randn(2, 3, 64, 64)
    features = model.front_features(x)
    assert features.shape == (2, model.front_module.head_hidden_size)
    assert torch.equal(model(features), model(x))
    assert not torch.equal(model(x)[0], model(x)[1])


@torch.no_grad()
def test_linear_classifier_on_a_front():
    model = lively(create("front_linear", front=LITE))
    assert count(model) == 3_371_008 + 1280 * 37 + 37
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    assert torch.equal(out, model.backbone(model.renormalize(x)))
    assert torch.equal(out, model.forward_head(model.forward_features(x)))
    last, features = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert len(features) == len(model.feature_info)
    assert (model.num_features, model.head_hidden_size) == (1280, 1280)
    model.reset_classifier(5)
    assert (model.num_classes, model(x).shape) == (5, (2, 5))


@pytest.mark.parametrize(
    ("name", "args"), [("l_hovit", {"front": LITE}), ("front_linear", {"front": LITE})]
)
@pytest.mark.parametrize("coarse", [True, False])
def test_parameter_groups_of_a_front(name, args, coarse):
    model = on_meta(name, **args)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    found = [name for group in groups.values() for name in group]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) > 2
    assert model.no_weight_decay() <= set(found)


def test_a_linear_classifier_leaves_pretrained_weights_to_its_front():
    with pytest.raises(RuntimeError, match="create 'resnet50' itself"):
        timm.create_model("front_linear", pretrained=True)
