"""The deploy form has the same outputs as the model, and no BatchNorm."""

import copy
import runpy

import pytest
import timm
import torch
from conftest import ROOT
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import hovit.models  # noqa: F401 (registers)
from hovit.config.plan import load_plan
from hovit.models.deploy import deploy
from hovit.models.efficientvit_deploy import TokenFFN
from hovit.models.efficientvit_layers import FFN

FAMILY = [f"efficientvit_paper_m{i}" for i in range(6)]
LEVIT = ["levit_128s", "levit_256", "levit_deck", "levit_deck_fixed", "levit_deck_conv2",
         "levit_deck_checkerboard", "levit_deck_conv_shrink", "hovit"]  # fmt: skip
OTHERS = ["resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientvit_m0"]


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def lively(model: nn.Module) -> nn.Module:
    """BN statistics and weights as after training: at their defaults BN is nearly the identity."""
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.3, 0.3)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def agree(model: nn.Module, deployed: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = model(x), deployed(x)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", FAMILY + LEVIT + OTHERS)
def test_outputs_agree_to_1e_4_without_batch_norm(name):
    model = lively(timm.create_model(name, num_classes=10))
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model)
    assert norms(deployed) == []
    agree(model, deployed, torch.randn(2, 3, 224, 224))
    assert norms(model)  # the model is unchanged
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["l_hovit", "l_levit_deck"])
def test_launchers(name):
    model = lively(timm.create_model(name, num_classes=10, img_size=64))
    deployed = deploy(model)
    assert norms(deployed) == []
    agree(model, deployed, torch.randn(2, 3, 64, 64))


ABLATION = load_plan("smoke", ROOT / "config").study("efficientvit_ablation").rows


@pytest.mark.parametrize(
    "switch", [*(row.model_args for row in ABLATION), {"v_ratio": 2.0}, {"v_ratio": 0.5}], ids=str
)
def test_every_switch_of_efficientvit(switch):
    model = lively(timm.create_model("efficientvit_paper_m0", num_classes=10, **switch))
    deployed = deploy(model)
    assert norms(deployed) == []
    agree(model, deployed, torch.randn(2, 3, 224, 224))


@pytest.mark.parametrize("px", [384, 512])
def test_larger_images(px):
    args = {"img_size": px, "num_classes": 10, "depth": (1, 1, 1)}
    model = lively(timm.create_model("efficientvit_paper_m4", **args))
    agree(model, deploy(model), torch.randn(1, 3, px, px))


@pytest.mark.slow
def test_compiled_model():
    """Inductor compiles two chained baddbmm to NaN at batches of more than one."""
    size = 64  # a small model, because each layer is compiled as C++
    small = {"img_size": size, "embed_dim": (32, 48), "depth": (1, 1), "num_heads": (2, 3)}
    model = timm.create_model("efficientvit_paper_m0", num_classes=10, **small)
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.momentum = None
    with torch.no_grad():  # BN statistics of these images, so that outputs depend on the image
        model.train()(torch.randn(8, 3, size, size))
    deployed = deploy(model)
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected, found = deployed(x), torch.compile(deployed, fullgraph=True)(x)
    assert (found - expected).norm() <= 1e-4 * (expected - expected.mean(0)).norm()


def test_a_batch_norm_that_cannot_be_folded_is_named():
    class Late(nn.Module):
        """BN after an activation."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x).relu()).mean()

    with pytest.raises(ValueError, match=r"BatchNorm .*norm cannot be folded") as caught:
        deploy(Late())
    assert "\n" not in str(caught.value)


def test_without_batch_norm_there_is_nothing_to_fold():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    agree(model, deploy(model), torch.randn(1, 3, 224, 224))


@pytest.mark.parametrize("args", [{}, {"by": "timm"}])
def test_a_deployed_model_by_name(args):
    name = "efficientvit_m0" if args else "efficientvit_paper_m0"
    model = timm.create_model("deployed", of=name, num_classes=10, **args)
    assert norms(model) == []
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("by", ["folding", "timm", "nothing"])
def test_memory_format_of_weights_and_maps(by, channels_last):
    of = "efficientvit_m0" if by == "timm" else "efficientvit_paper_m0"
    model = timm.create_model("deployed", of=of, by=by, channels_last=channels_last)
    order = torch.channels_last if channels_last else torch.contiguous_format
    maps = model.forward_features(torch.randn(2, 3, 224, 224))
    assert maps.is_contiguous(memory_format=order)


def test_folding_keeps_the_layers_of_efficientvit():
    model = timm.create_model("deployed", of="efficientvit_paper_m0", by="folding")
    assert norms(model) == []
    kinds = {type(m) for m in model.modules()}
    assert FFN in kinds
    assert TokenFFN not in kinds


def test_outputs_agree_after_folding_only():
    model = lively(timm.create_model("efficientvit_paper_m0", num_classes=10))
    agree(model, deploy(model, parts=False), torch.randn(2, 3, 224, 224))


def test_unknown_ways_to_deploy_are_refused():
    with pytest.raises(ValueError, match="by='me'"):
        timm.create_model("deployed", of="efficientvit_m0", by="me")
    with pytest.raises(ValueError, match="channels_last='no'"):
        timm.create_model("deployed", of="efficientvit_m0", channels_last="no")


@pytest.mark.parametrize("option", ["batch", "rounds", "threads", "image-size", "seconds"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "x"])
def test_the_bench_refuses_values_that_are_not_above_zero(option, value, capsys):
    main = runpy.run_path(str(ROOT / "bench/efficientvit_deploy.py"))["main"]
    with pytest.raises(SystemExit):
        main([f"--{option}={value}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --{option}: {value!r} is not a " in said
