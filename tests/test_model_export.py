"""Every registered model exports, compiles and still runs eagerly afterwards."""

import io
import sys
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import hovit.models

LEVIT = {"embed_dim": (64, 64, 64), "depth": (1, 1, 1)}
SMALL: dict[str, dict[str, Any]] = {  # by module, or by name
    "levit_deck": LEVIT,
    "hovit": LEVIT,
    "launcher": LEVIT | {"img_size": 64},
    "l_levit_256": {"img_size": 64},
    "efficientvit": {"embed_dim": (16, 24), "depth": (1, 1), "num_heads": (2, 2),
                     "img_size": 64},
    "skipvit": {"embed_dim": 24, "num_heads": 3, "depth": 4, "img_size": 64,
                "schedule": "2(45%)+4"},
    "swin": {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "img_size": 32,
             "window_size": 4},
    "mhsa_swin_tiny": {"embed_dim": 24, "depths": (2, 2), "num_heads": (3, 3), "img_size": 56,
                       "mhsa_share": 0.25},
    "mhsa_deit_tiny": {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 64,
                       "mhsa_share": 0.25},
    "front": {"front": "test_efficientnet"},
    "attention_layer": {"side": 4, "heads": 2, "head_dim": 8},
    "deployed": {"of": "efficientvit_paper_m0", "img_size": 64, "depth": (1, 1, 1)},
}  # fmt: skip
MODULES = {
    name: module for module in hovit.models.__all__ for name in timm.list_models(module=module)
}
# One per structure. The others differ in sizes, or are larger: `make test-all` runs them.
DISTINCT = ("attention_layer", "efficientvit_paper_m1", "levit_deck_checkerboard",
            "levit_deck_checkerboard_drop", "mhsa_deit_tiny", "skipvit_tiny_patch16_224",
            "swin_tiny_patch2_window4_32")  # fmt: skip
# The same for tests that need no export.
CHEAP = (*DISTINCT, "deployed", "flatten_swin_tiny_patch2_window16_32", "front_linear", "hovit",
         "levit_deck", "l_levit_deck_2blocks", "mhsa_swin_tiny")  # fmt: skip
REGISTRY = [n if n in DISTINCT else pytest.param(n, marks=pytest.mark.exhaustive) for n in MODULES]


class TinyResNet(nn.Sequential):
    """Replaces the ResNet50 of all Launchers but one: images -> features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 2048, 3, stride=16), nn.BatchNorm2d(2048), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip


def small(name: str, **args: Any) -> nn.Module:
    """The registered model at a small size, in evaluation mode."""
    torch.manual_seed(0)
    sizes = SMALL.get(name) or SMALL[MODULES[name]]
    model = timm.create_model(name, **{"num_classes": 5} | sizes | args).eval()
    if MODULES[name] == "launcher" and name != "l_hovit":
        model.resnet = TinyResNet().eval()
    return model


def inputs(model: nn.Module, name: str, batch: int) -> tuple[Tensor, ...]:
    if hasattr(model, "example_inputs"):
        return model.example_inputs(batch)
    size = (SMALL.get(name) or SMALL[MODULES[name]]).get("img_size", 64)
    return (torch.randn(batch, 3, size, size),)


BATCH = torch.export.Dim("batch", min=1, max=64)


def state(model: nn.Module) -> dict[str, Any]:
    """What an export must not change."""
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["training"] == before["training"]
    assert after["requires_grad"] == before["requires_grad"]
    assert all(torch.equal(t, before["tensors"][name]) for name, t in after["tensors"].items())


def export(model: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Export with a dynamic batch."""
    shapes = tuple({0: BATCH} for _ in example)
    return torch.export.export(model, example, dynamic_shapes=shapes)


def run_onnx(
    model: nn.Module | torch.export.ExportedProgram,
    example: tuple[Tensor, ...],
    x: tuple[Tensor, ...],
) -> Tensor:
    """Convert to ONNX with a dynamic batch and run in ONNX Runtime."""
    exported = isinstance(model, torch.export.ExportedProgram)
    shapes = None if exported else tuple({0: BATCH} for _ in example)
    program = torch.onnx.export(model, example, dynamo=True, verbose=False, dynamic_shapes=shapes)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [given.name for given in session.get_inputs()]
    return torch.tensor(session.run(None, dict(zip(names, (t.numpy() for t in x), strict=True)))[0])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", REGISTRY)
def test_exports_compiles_and_still_runs_eagerly(name, frozen):
    """torch.export, ONNX and torch.compile with a dynamic batch; frozen first compiles."""
    if frozen and name not in ("attention_layer", "mhsa_deit_tiny", "l_levit_256"):
        pytest.skip("frozen weights and the other order are tested on three models")
    torch.manual_seed(0)
    model = small(name).requires_grad_(not frozen)
    example, x = inputs(model, name, 2), inputs(model, name, 3)
    before = state(model)
    with torch.no_grad():
        expected = small(name)(*x)

    programs = []  # the export is most of the work: ONNX takes the same program if there is one

    def exported() -> Tensor:
        programs.append(export(model, example))
        return programs[0].module()(*x)

    def in_onnx() -> Tensor:
        # SkipViT sorts in another way for ONNX, which has no stable sort.
        again = programs and not name.startswith("skipvit")
        return run_onnx(programs[0] if again else model, example, x)

    def compiled() -> Tensor:
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, backend="eager", dynamic=True)(*x)

    runs = [exported, in_onnx, compiled]
    for run in reversed(runs) if frozen else runs:
        torch.testing.assert_close(run().detach(), expected, atol=1e-4, rtol=1e-3)
        eager = model(*x).detach()
        assert type(eager) is Tensor
        torch.testing.assert_close(eager, expected, atol=1e-5, rtol=1e-5)
        assert type(small(name)(*x).detach()) is Tensor  # nor does a new model see leftovers
    assert_unchanged(model, before)


def test_no_module_keeps_tensors_in_a_global():
    """After a forward pass of each model, no cache of the package holds a tensor."""
    for name in DISTINCT:
        model = small(name)
        with torch.no_grad():
            model(*inputs(model, name, 2))
    packages = ("hovit.models", "hovit.attention")
    for module in [m for name, m in sys.modules.items() if name.startswith(packages)]:
        for key, value in vars(module).items():
            assert not isinstance(value, Tensor), key
            assert not hasattr(value, "cache_info"), f"{module.__name__}.{key} is cached"
