"""Jaccard and Euclidean attention by FlexAttention: eager and compiled, on a CPU and on a card."""

import importlib
import warnings

import pytest
import torch
from test_attention import error, plain, qkv
from torch import Tensor

from hovit.attention import flex
from hovit.attention import similarity as sim
from hovit.attention.modules import SimilarityAttention

pytorch_flex = importlib.import_module("torch.nn.attention.flex_attention")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [(2, 4, 196, 64), (4, 6, 49, 64), (128, 3, 49, 32), (3, 1, 1, 16)]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex._compiled, "kernels", {})


@pytest.fixture
def eager_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients on a CPU, because its compiled kernel has none. Eager it has."""
    torch._dynamo.reset()  # eager calls would share one graph, and it takes no changing floats
    monkeypatch.setattr(pytorch_flex, "_validate_device", lambda *_: None)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")


def inputs(shape: tuple[int, ...], extra: bool, dtype=torch.float32, device="cpu") -> Inputs:
    """q, k, v, and with `extra` a bias of as many windows as divide the batch, and temperature."""
    q, k, v = (x.to(device, dtype) for x in qkv(shape))
    if not extra:
        return q, k, v, None, None
    windows = 64 if shape[0] % 64 == 0 else shape[0]
    bias = torch.randn(windows, shape[1], shape[2], shape[2], device=device, dtype=dtype)
    return q, k, v, bias, torch.linspace(0.5, 3, shape[1], device=device)


def gradients(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return list(torch.autograd.grad(out, wanted, weights.to(out.dtype)))


@pytest.mark.parametrize(
    ("shape", "extra"),
    [((4, 2, 49, 32), True), ((1, 4, 196, 64), True), ((2, 3, 7, 16), False)],
    ids=str,
)
@pytest.mark.parametrize("name", flex.SCORES)
@pytest.mark.usefixtures("eager_gradients")
def test_eager_values_and_gradients_match_the_reference(
    name: str, shape: tuple[int, ...], extra: bool
) -> None:
    """In float32 against float64; gradients also pass through the norms of q and k."""
    given = [x for x in inputs(shape, extra) if x is not None]
    found = [x.clone().requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    out, expected = flex.similarity_attention(name, *found), plain(name, *exact)
    assert error(out, expected) <= 1e-6
    for a, b in zip(gradients(out, found), gradients(expected, exact), strict=True):
        assert error(a, b) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", flex.SCORES)
@pytest.mark.usefixtures("eager_gradients")
def test_zero_and_equal_vectors_give_finite_results(name: str, dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 2, 5, 16, dtype=dtype)
    some = torch.randn(1, 2, 5, 16).to(dtype)
    for pair in ((zero, zero), (some, zero), (zero, some), (some, some)):
        q, k, v = (t.clone().requires_grad_() for t in (*pair, some))
        out = flex.similarity_attention(name, q, k, v)
        assert all(t.isfinite().all() for t in (out, *gradients(out, [q, k, v])))


@pytest.mark.parametrize(
    ("name", "shape", "extra"),
    [
        ("jaccard", (2, 4, 196, 64), True),
        ("euclidean", (128, 3, 49, 32), False),
    ],
    ids=str,
)
@torch.no_grad()
def test_compiled_on_a_cpu(name: str, shape: tuple[int, ...], extra: bool) -> None:
    given = inputs(shape, extra)
    out = flex.fused_attention(name, *given)
    assert out is not None
    assert error(out, plain(name, *given)) <= 1e-6
    (kernel,) = flex._compiled.kernels.values()
    again = flex.fused_attention(name, *(None if x is None else x + 0 for x in given))
    assert again is not None
    assert torch.equal(out, again)
    assert [*flex._compiled.kernels.values()] == [kernel]


def test_what_flexattention_cannot_take_runs_as_products() -> None:
    """On a CPU it has no gradients: one warning, and the choice is remembered."""
    q, k, v = (t.requires_grad_() for t in qkv((1, 2, 5, 16)))
    with pytest.warns(UserWarning, match="runs eagerly, because it does not compile: ") as caught:
        assert flex.fused_attention("jaccard", q, k, v) is None
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flex.fused_attention("jaccard", q, k, v) is None


@torch.no_grad()
def test_shapes_that_are_not_tried() -> None:
    q, k, v = qkv((1, 2, 5, 8))  # Triton needs 16 channels
    assert flex.fused_attention("jaccard", q, k, v) is None
    q, k, v = qkv((1, 2, 5, 16), torch.float64)
    assert flex.fused_attention("jaccard", q, k, v) is None
    q, k, v = qkv((1, 2, 5, 16))
    assert flex.fused_attention("jaccard", q, k, v.half()) is None
    assert flex.fused_attention("jaccard", q[:0], k[:0], v[:0]) is None
    torch.func.vmap(lambda *x: sim.attention("jaccard", *x))(*(t[None] for t in (q, k, v)))
    assert not flex._compiled.kernels


def test_gradients_are_deterministic_on_request() -> None:
    q, k, v = (t.requires_grad_() for t in qkv((1, 2, 5, 16)))
    torch.use_deterministic_algorithms(True)
    try:
        assert flex.fused_attention("jaccard", q, k, v) is None
        assert not flex._compiled.kernels  # not tried
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("plain_form", [False, True])
@pytest.mark.parametrize("name", flex.SCORES)
def test_the_plain_form_computes_the_same(name: str, plain_form: bool) -> None:
    torch.manual_seed(0)
    form = SimilarityAttention(64, 4, name, plain=plain_form)
    q, k, v = qkv((3, 9, 64))
    heads = [x.unflatten(2, (4, 16)).transpose(1, 2) for x in (q, k, v)]
    expected = plain(name, *heads, temperature=form.temperature).transpose(1, 2).flatten(2)
    assert error(form(q, k, v, q, (3, 3)), expected) <= 1e-5
    with torch.no_grad():
        assert error(form(q, k, v, q, (3, 3)), expected) <= 1e-5


# On a card.

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("extra", [False, True], ids=["", "bias and temperature"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", flex.SCORES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_compiled_on_a_card(
    device: str, grad: bool, name: str, shape: tuple[int, ...], dtype: torch.dtype, extra: bool
) -> None:
    """Fused, not by the fallback: any warning is an error."""
    given = [x for x in inputs(shape, extra, dtype, device) if x is not None]
    found = [x.clone().requires_grad_(grad) for x in given]
    exact = [x.double().requires_grad_(grad) for x in given]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*does not compile")
        out = sim.attention(name, *found)
    assert all(kernel is not None for kernel in flex._compiled.kernels.values())
    assert len(flex._compiled.kernels) == 1
    expected = plain(name, *exact)
    assert error(out, expected) <= TOLERANCES[dtype]
    if grad:
        for a, b in zip(gradients(out, found), gradients(expected, exact), strict=True):
            assert error(a, b) <= 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("name", flex.SCORES)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_on_a_card_autocast_plain_and_graphs(device: str, name: str) -> None:
    from recorded_graph import capture

    q, k, v, bias, temperature = inputs((2, 4, 196, 64), True, device=device)
    with torch.no_grad():
        with torch.autocast("cuda", torch.bfloat16):
            assert sim.attention(name, q, k, v, bias).dtype == torch.bfloat16
        expected = plain(name, q, k, v, bias, temperature)
        out = sim.attention(name, q, k, v, bias, temperature, plain=True)
        assert error(out, expected) <= 1e-5
        graphed = capture(lambda *x: sim.attention(name, *x), q, k, v, bias, temperature)
        assert error(graphed(q, k, v, bias, temperature), expected) <= 2e-5
    assert not graphed.reason
