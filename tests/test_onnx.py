"""Models in ONNX Runtime: PyTorch's outputs on real images, a time, and one line for what fails."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

import hovit.models  # noqa: F401 (registers)
from hovit.measure import onnx_runtime
from hovit.measure.onnx_runtime import OnnxPass, make_session, run_session
from hovit.models.deploy import deploy
from hovit.models.efficientvit_deploy import TokenAttention, TokenFFN
from hovit.utils.errors import HovitError


@pytest.fixture(autouse=True)
def _one_core_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def digits(count: int, size: int) -> torch.Tensor:
    """[count, 3, size, size] in [-1, 1]: scikit-learn's digits, enlarged."""
    images = torch.tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


@torch.no_grad()
def as_trained(model: nn.Module, images: torch.Tensor) -> None:
    """BN weights that hide nothing, and these images' statistics: outputs then follow the image.

    At a model's initial weights they hardly do, and a model blind to its image would pass.
    """
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.3, 0.3)
            m.momentum = None
    model.train()(images)
    model.eval()


@pytest.mark.parametrize("form", [lambda m: m, deploy], ids=["as it is", "deployed"])
def test_outputs_on_real_images_are_pytorchs_to_1e_4(form):
    model = timm.create_model("efficientvit_paper_m0", num_classes=10, img_size=64, depth=(1, 1, 1))
    as_trained(model, digits(64, 64))
    model = form(model.eval())
    images = digits(8, 64)
    made = make_session(model, images[:4])
    for some in images.split(4):  # the second batch is not the one that it was exported with
        with torch.no_grad():
            expected = model(some)
        apart = (expected - expected.mean(0)).norm()  # what the image decides
        assert apart > 0.1 * expected.norm()
        assert (run_session(made, some) - expected).norm() <= 1e-4 * apart


@pytest.mark.slow
@pytest.mark.parametrize("size", ["m0", "m3", "m5"])
def test_photographs_at_224_px_through_the_deployed_family(size):
    photographs = torch.stack([torch.tensor(x) for x in load_sample_images().images])
    windows = photographs.permute(0, 3, 1, 2).float().unfold(2, 224, 100).unfold(3, 224, 100)
    images = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2) / 127.5 - 1  # [n, 3, 224, 224]
    model = timm.create_model(f"efficientvit_paper_{size}", num_classes=10, depth=(1, 1, 1))
    as_trained(model, images)
    model = deploy(model.eval())
    made, some = make_session(model, images[-4:]), images[-4:]
    with torch.no_grad():
        expected = model(some)
    apart = (expected - expected.mean(0)).norm()
    assert apart > 0.1 * expected.norm()
    assert (run_session(made, some) - expected).norm() <= 1e-4 * apart


@pytest.mark.parametrize("kind", [TokenAttention, TokenFFN])
def test_a_pass_of_wrong_blocks_is_refused_at_initial_weights_too(kind, monkeypatch):
    def scrambled(model, *inputs):
        model = copy.deepcopy(model)
        for block in filter(lambda m: isinstance(m, kind), model.modules()):
            for weight in block.state_dict().values():
                weight.copy_(weight.flip(0))
        return make_session(model, *inputs)

    monkeypatch.setattr(onnx_runtime, "make_session", torch.no_grad()(scrambled))
    args = {"of": "efficientvit_paper_m0", "num_classes": 10, "depth": (1, 1, 1)}
    model = timm.create_model("deployed", **args)
    with pytest.raises(HovitError, match="differ from PyTorch's"):
        OnnxPass()(model.eval(), torch.randn(1, 3, 224, 224))


def test_a_pass_takes_time_and_is_exported_once_for_each_shape(monkeypatch):
    exported = []

    def counted(model, *inputs):
        exported.append(inputs[0].shape[0])
        return make_session(model, *inputs)

    monkeypatch.setattr(onnx_runtime, "make_session", counted)
    timer, model = OnnxPass(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    times = [timer(model, torch.randn(batch, 3, 16, 16)) for batch in (1, 2, 1, 2)]
    assert all(t > 0 for t in times)
    assert exported == [1, 2]


def test_what_cannot_be_exported_is_one_line():
    class Reads(nn.Module):
        """Its graph depends on the values."""

        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(HovitError, match="Reads does not run in ONNX Runtime") as caught:
        make_session(Reads(), torch.randn(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_other_outputs_are_never_timed(monkeypatch):
    wrong = nn.Conv2d(3, 4, 3)
    monkeypatch.setattr(
        onnx_runtime, "make_session", lambda model, *inputs: make_session(wrong, *inputs)
    )
    with pytest.raises(HovitError, match="outputs differ from PyTorch's"):
        OnnxPass()(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8))
