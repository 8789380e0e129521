"""EfficientViT against timm's models and the published counts, and every ablation switch."""

import pytest
import timm
import torch
from torch import Tensor, nn

import hovit.models  # noqa: F401 (registers)
from hovit.measure.cost import cost
from hovit.models.efficientvit import EfficientViT
from hovit.models.efficientvit_layers import CascadedGroupAttention, Switches
from hovit.utils.create_model import create_model
from hovit.utils.errors import HovitError

FAMILY = [f"m{i}" for i in range(6)]
PARAMETERS = {"m0": 2.3, "m1": 3.0, "m2": 4.2, "m3": 6.9, "m4": 8.8, "m5": 12.4}  # Table 2, M
MACS = {"m0": 79, "m1": 167, "m2": 201, "m3": 263, "m4": 299, "m5": 522}  # Table 2, M
SMALL = {"embed_dim": (16, 24, 32), "num_heads": (2, 2, 2), "img_size": 64, "num_classes": 5}


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def lively(model: nn.Module) -> nn.Module:
    """Random BN weights and statistics and random attention biases, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, p in model.named_parameters():
        if name.endswith("attention_biases"):
            nn.init.uniform_(p, -1, 1)
    return model.eval()


def small(**args) -> EfficientViT:
    torch.manual_seed(0)
    return timm.create_model("efficientvit_paper_m0", **SMALL | args)


@pytest.mark.parametrize("size", FAMILY)
@torch.no_grad()
def test_weights_interchange_with_timm(size):
    theirs = lively(timm.create_model(f"efficientvit_{size}"))
    ours = timm.create_model(f"efficientvit_paper_{size}").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    expected = theirs(x)
    assert (ours(x) - expected).norm() <= 1e-4 * expected.norm()
    lively(ours)
    theirs.load_state_dict(ours.state_dict())
    theirs.train().eval()  # clears its cache of attention biases
    assert (ours(x) - theirs(x)).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("size", FAMILY)
def test_parameters_and_multiply_adds_match_the_paper(size):
    found = cost(f"efficientvit_paper_{size}", {}, 1000, 224, None, False)
    parameters, macs = found["parameters"] / 1e6, found["macs"] / 1e6
    # The paper truncates the 12.47 of M5 (also timm's count) to 12.4.
    assert parameters == pytest.approx(PARAMETERS[size], abs=0.08)
    assert macs == pytest.approx(MACS[size], rel=0.03)


@pytest.mark.parametrize("px", [384, 512])
@torch.no_grad()
def test_other_image_sizes_match_timm(px):
    theirs = lively(timm.create_model("efficientvit_m4", img_size=px))
    ours = timm.create_model("efficientvit_paper_m4", img_size=px).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, px, px)
    expected = theirs(x)
    assert (ours(x) - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
def test_images_of_another_size_or_shape():
    model = small().eval()
    for shape in ((64, 64), (96, 64), (80, 112)):
        assert model(torch.randn(1, 3, *shape)).shape == (1, 5)


def reference(attn: CascadedGroupAttention, x: Tensor, switches: Switches) -> Tensor:
    """Equations 2 to 4, one head, query and key at a time; x [1, C, w, w]."""
    outs: list[Tensor] = []
    w, share = attn.window, x.shape[1] // attn.heads
    width, shared = switches.qk_dim or share, switches.attention == "mhsa"
    for j in range(attn.heads):
        feat = (x if shared else x[:, j * share : (j + 1) * share]).clone()
        if j and switches.cascade and not shared:
            last = outs[-1][:, :share]
            feat[:, : last.shape[1]] += last
        widths = [width, width, round(switches.v_ratio * share)]
        q, k, v = attn.qkvs[j](feat).split(widths, dim=1)
        q = attn.dws[j](q)
        out = torch.zeros_like(v)
        for a in range(w * w):
            scores = torch.zeros(w * w)
            for b in range(w * w):
                rows, cols = abs(a // w - b // w), abs(a % w - b % w)
                dot = (q[0, :, a // w, a % w] * k[0, :, b // w, b % w]).sum()
                scores[b] = dot / width**0.5 + attn.attention_biases[j, rows * w + cols]
            out[0, :, a // w, a % w] = v[0].flatten(1) @ scores.softmax(0)
        outs.append(out)
    return attn.proj(torch.cat(outs, dim=1))


@pytest.mark.parametrize("switches", [
    {}, {"attention": "mhsa"}, {"cascade": False}, {"qk_dim": 0}, {"v_ratio": 2.0},
    {"v_ratio": 0.5}, {"attention": "mhsa", "v_ratio": 0.5}, {"norm": "ln"}, {"act": "hardswish"},
], ids=str)  # fmt: skip
@torch.no_grad()
def test_cascaded_group_attention_matches_the_equations(switches):
    chosen = Switches(**{"qk_dim": 5} | switches)
    attn = lively(CascadedGroupAttention(12, 3, 3, (5, 3, 3), chosen))
    for module in attn.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(1, 12, 3, 3)
    torch.testing.assert_close(attn(x), reference(attn, x, chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("switches", "order"), [
    ({}, "dw0 ffn0 mixer dw1 ffn1"),
    ({"num_ffn": 2}, "dw0 ffn0 dw0_2 ffn0_2 mixer dw1 ffn1 dw1_2 ffn1_2"),
    ({"layout": "swin"}, "mixer dw1 ffn1"),
    ({"dwconv": False}, "ffn0 mixer ffn1"),
], ids=str)  # fmt: skip
def test_order_in_a_block(switches, order):
    block = small(**switches).stages[0].blocks[0]
    layers = [name for name, each in block.named_children() if not isinstance(each, nn.Identity)]
    assert layers == order.split()
    assert all(type(getattr(block, name)).__name__ == "Residual" for name in layers)


SWITCHES = [
    {"layout": "swin"},
    {"num_ffn": 2},
    {"attention": "mhsa"},
    {"cascade": False},
    {"qk_dim": 0},
    {"v_ratio": 2.0},
    {"v_ratio": 0.5},
    {"ffn_ratio": 4.0},
    {"dwconv": False},
    {"norm": "ln"},
    {"act": "hardswish"},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_row_of_the_ablation_trains(switch):
    model = small(**switch)
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    out.square().sum().backward()
    assert out.shape == (2, 5)
    # Norms that start at zero pass no gradient to earlier layers in the first step.
    assert all(p.grad is not None for p in model.parameters())


def kinds(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules()}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_effect_of_each_switch():
    base = count(small())
    assert count(small(num_ffn=2)) > base
    assert count(small(ffn_ratio=4.0)) > base
    assert count(small(dwconv=False)) < base
    assert count(small(layout="swin")) < base
    assert count(small(attention="mhsa")) > base
    assert count(small(cascade=False)) == base
    assert nn.BatchNorm2d not in kinds(small(norm="ln"))
    assert nn.ReLU in kinds(small())
    assert nn.Hardswish in kinds(small(act="hardswish"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(lively(small())(x), lively(small(cascade=False))(x))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"layout": "burger"}, "layout='burger'"),
        ({"num_ffn": 0}, "num_ffn=0"),
        ({"qk_dim": 1.5}, "qk_dim=1.5"),
        ({"ffn_ratio": -1}, "ffn_ratio=-1"),
        ({"cascades": True}, "no switch cascades"),
        ({"num_heads": (3, 2, 2)}, "num_heads=3"),
        ({"num_ffn": True}, "num_ffn=True: a whole number above 0"),
        ({"qk_dim": False}, "qk_dim=False: a whole number above 0"),
        ({"cascade": 1}, "cascade=1: one of True, False"),
        ({"dwconv": 0.0}, "dwconv=0.0: one of True, False"),
        ({"ffn_ratio": float("nan")}, "ffn_ratio=nan: a number above 0"),
        ({"v_ratio": float("inf")}, "v_ratio=inf: a number above 0"),
        ({"ffn_ratio": 1e-9}, "ffn_ratio=1e-09: no hidden channel for 16"),
        (
            {"depth": (1, 2)},
            "depth=(1, 2): a number for each stage, and embed_dim=(16, 24, 32) has",
        ),
        ({"depth": 2}, "depth=2: a whole number above 0 for each stage"),
        ({"depth": (1, True, 1)}, "depth=(1, True, 1): a whole number"),
        ({"num_heads": (2, 2, 2, 2)}, "num_heads=(2, 2, 2, 2): a number for each stage"),
        ({"embed_dim": ()}, "embed_dim=(): a number for each stage"),
        ({"embed_dim": (4, 24, 32)}, "embed_dim=(4, 24, 32): the first has 8 channels at least"),
        ({"kernels": (5, 5.0, 5, 5)}, "kernels=(5, 5.0, 5, 5)"),
        ({"window_size": 0}, "window_size=0: a whole number above 0"),
    ],
)
def test_invalid_arguments_are_one_clear_line(args, says):
    with pytest.raises(HovitError, match="efficientvit_paper_m0") as caught:
        create_model("efficientvit_paper_m0", 5, 64, **{"embed_dim": (16, 24, 32), **args})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_of_every_stage():
    model = timm.create_model("efficientvit_paper_m0", **SMALL, features_only=True).eval()
    shapes = [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 64, 64))]
    assert shapes == [(16, 4, 4), (24, 2, 2), (32, 1, 1)]
