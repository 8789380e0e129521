"""`deploy` is exact or refuses: single patterns, random graphs, and models of timm."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from timm.models.levit import LinearNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hovit.models.deploy import deploy


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def randomise(model: nn.Module) -> nn.Module:
    """Random BN statistics and weights, in evaluation mode."""
    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            nn.init.uniform_(m.running_mean, -1, 1)
            nn.init.uniform_(m.running_var, 0.3, 2)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.3, 2)
                nn.init.uniform_(m.bias, -1, 1)
    return model.eval()


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for o in output for t in tensors(o)]


@torch.no_grad()
def assert_exact(model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> nn.Module:
    """The deployed model gives the same outputs and leaves its input unchanged."""
    deployed, before = deploy(model), x.clone()
    expected, found = tensors(model(x)), tensors(deployed(x))
    assert torch.equal(x, before)
    assert [t.shape for t in found] == [t.shape for t in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))
    return deployed


class Net(nn.Module):
    """A module with the given children and forward."""

    def __init__(self, run: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


IMAGE, SQUARE = (2, 4, 9, 9), (2, 4, 4)


def conv(kernel: int = 3, **args: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel, padding=kernel // 2, **args)


def test_an_activation_shared_by_several_parents_does_not_overwrite_the_input():
    act = nn.ReLU()
    first = Net(lambda m, x: m.act(m.conv(x)), conv=conv(), act=act)
    second = Net(lambda m, x: x + m.act(x), act=act)
    assert_exact(Net(lambda m, x: m.second(x) + m.first(x), first=first, second=second),
                 torch.randn(IMAGE))  # fmt: skip


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv that standardises its weight": (
        nn.Sequential(StdConv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), IMAGE),
    "conv that pads in forward, after BN": (
        nn.Sequential(nn.BatchNorm2d(4), Conv2dSame(4, 4, 3, stride=2)), IMAGE),
    "conv that pads, after BN": (nn.Sequential(nn.BatchNorm2d(4), conv()), IMAGE),
    "BN without statistics": (
        nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
    "conv read twice": (
        Net(lambda m, x: m.bn(y := m.conv(x)) + y, conv=conv(), bn=nn.BatchNorm2d(4)), IMAGE),
    "conv called twice": (
        Net(lambda m, x: m.bn(m.conv(m.conv(x))), conv=conv(), bn=nn.BatchNorm2d(4)), IMAGE),
    "BN called twice": (
        Net(lambda m, x: m.bn(m.a(m.bn(m.b(x)))), a=conv(), b=conv(), bn=nn.BatchNorm2d(4)), IMAGE),
    "weight read elsewhere": (
        Net(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.mean(), conv=conv(),
            bn=nn.BatchNorm2d(4)), IMAGE),
    "BN never called": (Net(lambda m, x: m.conv(x), conv=conv(), bn=nn.BatchNorm2d(4)), IMAGE),
    "parts used by the grandparent": (
        Net(lambda m, x: m.inner(x) + m.inner.conv(x),
            inner=Net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4))), IMAGE),
    "several steps between": (
        Net(lambda m, x: m.bn(2 * m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_norm_that_is_not_understood_is_refused(case):
    model, shape = REFUSED[case]
    model = randomise(model)
    with pytest.raises(ValueError, match=r"BatchNorm .* cannot be folded") as caught:
        assert_exact(model, torch.randn(shape))
    assert "\n" not in str(caught.value)


def test_a_batch_norm_over_tokens_is_refused_when_called():
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert_exact(model, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"rank 2, not \(2, 4, 4\)"):
        deploy(model)(torch.randn(SQUARE))


class Optional(nn.Module):
    """Its graph depends on an argument that its parent does not give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y.relu() if skip is None else y)


def test_optional_arguments_are_not_guessed():
    with pytest.raises(ValueError, match="optional argument skip"):
        assert_exact(randomise(Net(lambda m, x: m.inner(x), inner=Optional())), torch.randn(IMAGE))


def hooked(model: nn.Module, child: str) -> nn.Module:
    model.get_submodule(child).register_forward_hook(lambda m, args, out: out + 1)
    return model


def aliased() -> nn.Module:
    """Two names for one conv; `forward` calls it by the second."""
    shared = conv()
    return Net(lambda m, x: m.b(x).relu() + x, a=shared, b=shared, act=nn.ReLU())


def listed() -> nn.Module:
    """`forward` calls a conv through a plain list."""
    net = Net(lambda m, x: m.act(m.hidden[0](x)) + x, conv=conv(), act=nn.ReLU())
    net.hidden = [net.conv]
    return net


KEPT: dict[str, nn.Module] = {
    "a sum with a factor": Net(lambda m, x: torch.add(x, m.conv(x), alpha=2), conv=conv()),
    "a tuple as output": Net(lambda m, x: (m.conv(x), 1.5 * x), conv=conv()),
    "an output in a list": Net(lambda m, x: [m.conv(x)], conv=conv()),
    "a hook": hooked(Net(lambda m, x: m.act(m.conv(x)), conv=conv(), act=nn.ReLU()), "conv"),
    "a hook on a sum": hooked(Net(lambda m, x: x + m.conv(x), conv=conv(), act=nn.ReLU()), "conv"),
    "an alias": aliased(),
    "a hidden list": listed(),
    "circular padding": Net(lambda m, x: x + m.conv(x), conv=conv(padding_mode="circular")),
    "groups": Net(lambda m, x: x + m.conv(x), conv=conv(groups=2)),
    "dilation": Net(lambda m, x: x + m.conv(x), conv=nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
    "padding as a word": Net(lambda m, x: x + m.conv(x), conv=nn.Conv2d(4, 4, 3, padding="same")),
    "weight norm": nn.utils.parametrizations.weight_norm(conv()),
    "a conv before its own input": Net(lambda m, x: m.act(m.conv(x)) + m.conv(x), conv=conv(),
                                       act=nn.ReLU()),
    "an activation of the input": Net(lambda m, x: m.conv(m.act(x)) + x, conv=conv(),
                                      act=nn.ReLU()),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_other_patterns_keep_their_outputs(case):
    assert_exact(KEPT[case].eval(), torch.randn(IMAGE))
    around = Net(lambda m, x: m.inner(x), inner=copy.deepcopy(KEPT[case]), conv=conv()).eval()
    assert_exact(around, torch.randn(IMAGE))


FOLDED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv, BN, activation": (nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), IMAGE),
    "conv, BatchNormAct": (nn.Sequential(conv(bias=False), BatchNormAct2d(4)), IMAGE),
    "BN, conv": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE),
    "BN, dropout, linear": (
        nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 6)), (3, 4)),
    "BN, linear, BN": (
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "linear and BN on tokens": (nn.Sequential(LinearNorm(4, 4), nn.ReLU()), SQUARE),
    "BN without weights": (nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "layers in a list": (
        Net(lambda m, x: m.bns[0](m.convs[0](x)), convs=nn.ModuleList([conv()]),
            bns=nn.ModuleList([nn.BatchNorm2d(4)])), IMAGE),
    "a sum of conv and BN": (
        Net(lambda m, x: x + m.m(x), m=nn.Sequential(conv(groups=4), nn.BatchNorm2d(4))), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_known_patterns_are_folded(case):
    model, shape = FOLDED[case]
    deployed = assert_exact(randomise(model).double(), torch.randn(shape).double())
    assert not any(isinstance(m, _BatchNorm) for m in deployed.modules())


# Random graphs -----------------------------------------------------------------------------------


class Graph(nn.Module):
    """Random layers with random wiring on maps of 4 channels; some layers are used repeatedly.

    Args:
        rng: source of all choices.
        depth: levels of nested graphs that it can contain.
    """

    def __init__(self, rng: random.Random, depth: int, acts: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, int, tuple[int, ...]]] = []  # kind, layer, inputs
        for step in range(rng.randint(2, 7)):
            source = step if rng.random() < 0.75 else rng.randint(0, step)
            if rng.random() < 0.2:
                kind = rng.choice(["add", "alpha", "cat"])
                self.plan.append((kind, -1, (source, rng.randint(0, step))))
            elif self.layers and rng.random() < 0.1:
                self.plan.append(("call", rng.randrange(len(self.layers)), (source,)))
            else:
                self.layers.append(self.layer(rng, depth, acts))
                self.plan.append(("call", len(self.layers) - 1, (source,)))
        self.outputs = [len(self.plan), rng.randint(0, len(self.plan))]

    @staticmethod
    def layer(rng: random.Random, depth: int, acts: list[nn.Module]) -> nn.Module:
        def convolution() -> nn.Module:
            kind = rng.choice([nn.Conv2d] * 8 + [StdConv2d])
            kernel = 3 if kind is StdConv2d else rng.choice([1, 3])
            groups = rng.choice([1, 1, 2, 4])
            mode = {"padding_mode": "circular"} if rng.random() < 0.2 else {}
            args = {"padding": kernel // 2, "groups": groups, "bias": rng.random() < 0.5}
            return kind(4, 4, kernel, **args, **(mode if kind is nn.Conv2d else {}))

        def norm() -> nn.Module:
            return BatchNormAct2d(4) if rng.random() < 0.3 else nn.BatchNorm2d(4)

        makers: list[Callable[[], nn.Module]] = [
            convolution,
            lambda: nn.Sequential(convolution(), norm()),
            lambda: nn.Sequential(convolution(), norm(), nn.ReLU()),
            lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
            lambda: Net(lambda m, x: m.m(x) + x, m=nn.Sequential(convolution(), norm())),
            lambda: rng.choice([nn.ReLU(), nn.Hardswish(), nn.Dropout(), nn.Identity()]),
            lambda: rng.choice(acts),
            lambda: norm() if rng.random() < 0.2 else nn.ReLU(),
        ]
        if depth:
            makers += 2 * [lambda: Graph(rng, depth - 1, acts)]
        return rng.choice(makers)()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, layer, inputs in self.plan:
            a, b = values[inputs[0]], values[inputs[-1]]
            if kind == "call":
                values.append(self.layers[layer](a))
            elif kind == "cat":
                values.append(torch.cat([a, b], dim=1)[:, 2:6])
            else:
                values.append(a + b if kind == "add" else torch.add(a, b, alpha=2))
        first, second = self.outputs
        return values[first] + values[second]


class Tokens(nn.Module):
    """Random layers on tokens [B, 4, 4] or vectors [B, 4]."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        makers: list[Callable[[], nn.Module]] = [
            lambda: nn.Linear(4, 4),
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4)),
            lambda: LinearNorm(4, 4),
            nn.ReLU,
        ]
        self.layers = nn.ModuleList(rng.choice(makers)() for _ in range(rng.randint(1, 5)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def is_exact(model: nn.Module, x: Tensor) -> bool:
    """Whether the deployed model is exact; False if it refuses. Fails if it is wrong."""
    try:
        assert_exact(model, x)
    except ValueError as error:
        if "fold" not in str(error):
            raise
        return False
    return True


def test_random_graphs_are_exact_or_refused():
    exact = 0
    for seed in range(120):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        model = randomise(Graph(rng, 2, [nn.ReLU(), nn.SiLU()])).double()
        exact += is_exact(model, torch.randn(2, 4, 5, 5).double())
    assert exact >= 80


def test_random_layers_on_tokens_are_exact_or_refused():
    exact = 0
    for seed in range(100):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        model = randomise(Tokens(rng)).double()
        try:
            model(x := torch.randn(rng.choice([(3, 4), (3, 4, 4)])).double())
        except (RuntimeError, ValueError):  # LinearNorm takes no vectors
            continue
        exact += is_exact(model, x)
    assert exact >= 30


# Models of timm ----------------------------------------------------------------------------------

QUICK = ["convit_tiny", "convnext_atto", "deit_tiny_patch16_224", "efficientvit_b0", "fasternet_t0",
         "gernet_s", "ghostnet_050", "hardcorenas_a", "iformer_s", "legacy_seresnet18",
         "skresnet18", "test_nfnet", "test_vit", "tiny_vit_5m_224"]  # fmt: skip
REFUSED_BY_NAME = ["dla34", "mixnet_s", "resnetv2_18", "test_maxvit"]


def build(name: str) -> tuple[nn.Module, Tensor] | None:
    """A timm model in float64 and an image, at 64 px or its own size; None if it is large."""
    model, size = None, 64
    with torch.device("meta"):
        if sum(p.numel() for p in timm.create_model(name).parameters()) > 4e7:
            return None
    try:
        model = timm.create_model(name, num_classes=10, img_size=size)
    except Exception:  # models without the argument raise various errors
        model = timm.create_model(name, num_classes=10)
        if model.default_cfg.get("fixed_input_size"):
            size = model.default_cfg["input_size"][-1]
    channels = model.default_cfg["input_size"][0]
    return randomise(model).double(), torch.randn(1, channels, size, size).double()


@pytest.mark.parametrize("name", QUICK)
def test_models_of_timm_are_exact(name):
    built = build(name)
    assert built is not None
    assert_exact(*built)


@pytest.mark.parametrize("name", REFUSED_BY_NAME)
def test_models_of_timm_with_other_patterns_are_refused(name):
    built = build(name)
    assert built is not None
    with pytest.raises(ValueError, match=r"^BatchNorm [^ ]+ cannot be folded"):
        deploy(built[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("module", timm.list_modules())
def test_one_model_of_every_module_of_timm_is_exact_or_refused(module):
    for name in sorted(timm.list_models(module=module), key=lambda name: (len(name), name)):
        try:
            built = build(name)
            with torch.no_grad():
                runs = built is not None and built[0](built[1]) is not None
        except Exception:  # timm's own limits: image sizes, lazy parts, optional packages
            runs = False
        if built is not None and runs:
            is_exact(*built)
            return
    pytest.skip("no small model")
