"""Every attention form against a plain float64 reference."""

import copy
import itertools
import math
import re
from inspect import signature

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hovit.models  # noqa: F401
from hovit.attention import flex
from hovit.attention import similarity as sim
from hovit.attention.forms import ATTENTION_FORMS
from hovit.attention.linear import (
    CHUNK,
    LEAST_PRODUCT,
    _fits_float32,
    focus,
    gated_chunks,
    gated_recurrence,
    linear_attention,
)
from hovit.attention.modules import (
    FocusedAttention,
    GatedAttention,
    SimilarityAttention,
    create_attention,
)

FORM_CLASSES = {name: (SimilarityAttention, name) for name in sim.SIMILARITIES} | {
    "focused": (FocusedAttention, None),
    "gated": (GatedAttention, None),
}
SHAPES = [(2, 3, 7, 16), (1, 2, 49, 32), (2, 4, 196, 64), (3, 1, 1, 8)]


def qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def plain_score(name: str, a: Tensor, b: Tensor) -> float:
    """The similarity of two vectors, by its formula."""
    d = len(a)
    x, y = F.softplus(a), F.softplus(b)
    return float(
        {
            "dot": lambda: a.dot(b) / math.sqrt(d),
            "euclidean": lambda: -((a - b) ** 2).sum().sqrt() / math.sqrt(d),
            "sqeuclidean": lambda: -((a - b) ** 2).sum() / math.sqrt(d),
            "jaccard": lambda: a.dot(b) / (a.dot(a) + b.dot(b) - a.dot(b)),
            "jaccard_minmax": lambda: sum(map(min, x, y)) / sum(map(max, x, y)),
        }[name]()
    )


def plain(name: str, q: Tensor, k: Tensor, v: Tensor, bias=None, temperature=None) -> Tensor:
    """softmax(t s + bias) v in float64, from all pairs of q and k."""
    q, k, v = (t.double() for t in (q, k, v))
    pairs = q[..., :, None, :], k[..., None, :, :]
    difference = (pairs[0] - pairs[1]).square().sum(-1)
    product = (pairs[0] * pairs[1]).sum(-1)
    norms = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
    x, y = (F.softplus(t) for t in pairs)
    scores = {
        "dot": lambda: product / math.sqrt(q.shape[-1]),
        "euclidean": lambda: -difference.sqrt() / math.sqrt(q.shape[-1]),
        "sqeuclidean": lambda: -difference / math.sqrt(q.shape[-1]),
        "jaccard": lambda: product / (norms - product),
        "jaccard_minmax": lambda: torch.minimum(x, y).sum(-1) / torch.maximum(x, y).sum(-1),
    }[name]()
    if temperature is not None:
        scores = scores * temperature.double()[:, None, None]
    if bias is not None:
        scores = scores + bias.double().repeat(len(q) // len(bias), 1, 1, 1)
    return scores.softmax(-1) @ v


def error(out: Tensor, reference: Tensor) -> float:
    return float(((out.double() - reference).norm() / reference.norm()).detach())


@pytest.mark.parametrize("name", sim.SIMILARITIES)
def test_the_reference_matches_the_formula_for_single_vectors(name: str) -> None:
    q, k, v = qkv((1, 1, 3, 4), torch.float64)
    rows = []
    for a in q[0, 0]:
        weights = torch.tensor([plain_score(name, a, b) for b in k[0, 0]]).double().softmax(0)
        rows.append(weights @ v[0, 0])
    assert torch.allclose(plain(name, q, k, v)[0, 0], torch.stack(rows), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sim.SIMILARITIES)
def test_similarity_matches_its_formula(name: str, shape: tuple[int, ...]) -> None:
    q, k, v = qkv(shape)
    assert error(sim.attention(name, q, k, v), plain(name, q, k, v)) <= 1e-5
    temperature = torch.linspace(0.5, 3, shape[1])
    bias = torch.randn(1, shape[1], shape[2], shape[2])
    out = sim.attention(name, q, k, v, bias, temperature)
    assert error(out, plain(name, q, k, v, bias, temperature)) <= 1e-5


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("tokens", [49, 196])
def test_error_of_euclidean_for_equal_queries_and_keys_is_as_documented(
    tokens: int, width: int
) -> None:
    q, _, v = qkv((2, 4, tokens, width))
    assert float(sim.euclidean(q, q).diagonal(dim1=-2, dim2=-1).abs().max()) <= 1e-3
    assert error(sim.attention("euclidean", q, q, v), plain("euclidean", q, q, v)) <= 5e-4


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("name", sim.SIMILARITIES)
def test_scores_of_any_leading_dimensions(name: str, lead: tuple[int, ...]) -> None:
    q, k = (torch.randn(*lead, n, 8, dtype=torch.float64) for n in (5, 7))
    scores = sim.SIMILARITIES[name](q, k)
    assert scores.shape == (*lead, 5, 7)
    for i in itertools.product(*map(range, lead)):
        assert torch.allclose(scores[i], sim.SIMILARITIES[name](q[i], k[i]))


@pytest.mark.parametrize("block", [1, 130, 10**6])
@pytest.mark.parametrize("name", sim.SIMILARITIES)
def test_block_size_changes_neither_width_nor_dtype(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sim.BLOCKS, "cpu", block)
    q, k, _ = qkv((6, 2, 5, 8))
    v, temperature = torch.randn(6, 2, 5, 3), torch.tensor([0.5, 3.0])
    out = sim.attention(name, q, k, v, temperature=temperature)
    assert error(out, plain(name, q, k, v, temperature=temperature)) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert sim.attention(name, q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sim.SIMILARITIES)
@pytest.mark.parametrize("windows", [1, 2, 3, 6])
def test_block_size_with_biases_of_windows(
    name: str, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every block size, each matrix gets the bias of its own window."""
    q, k, v = qkv((6, 2, 5, 8))
    bias = torch.randn(windows, 2, 5, 5)
    for block in (1, 60, 130, 10**6):
        monkeypatch.setitem(sim.BLOCKS, "cpu", block)
        assert error(sim.attention(name, q, k, v, bias), plain(name, q, k, v, bias)) <= 1e-5


@given(count=st.integers(1, 60), size=st.integers(1, 10**6), period=st.integers(1, 12))
def test_a_block_is_whole_periods_or_a_divisor_of_one(count: int, size: int, period: int) -> None:
    step = sim._step(count * period, size, period, 2**19)
    assert step >= 1
    assert step % period == 0 or period % step == 0
    assert step == 1 or step * size <= 2**19


@pytest.mark.parametrize("name", sim.SIMILARITIES)
def test_gradients(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv((2, 2, 4, 3), torch.float64))
    bias = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([1.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: sim.attention(name, *args), (q, k, v, bias, temperature)
    )


@pytest.mark.parametrize("name", sim.SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_and_equal_vectors_give_finite_results(name: str, dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 2, 5, 8, dtype=dtype)
    some = torch.randn(1, 2, 5, 8).to(dtype)
    for q, k in ((zero, zero), (some, zero), (zero, some), (some, some)):
        q, k, v = (t.clone().requires_grad_() for t in (q, k, some))
        out = sim.attention(name, q, k, v)
        out.float().sum().backward()
        assert all(t.isfinite().all() for t in (out, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("name", ATTENTION_FORMS)
@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("tokens", [1, 9])
def test_extreme_inputs_stay_finite(name: str, factor: float, tokens: int) -> None:
    torch.manual_seed(0)
    form = create_attention(name, dim=16, heads=2)
    q, k, v, x = ((torch.randn(2, tokens, 16) * factor).requires_grad_() for _ in range(4))
    out = form(q, k, v, x, (1, tokens))
    out.sum().backward()
    assert all(t.grad is not None for t in (q, k, v))
    grads = [t.grad for t in (q, k, v, x, *form.parameters()) if t.grad is not None]
    assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", sim.SIMILARITIES)
def test_half_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (t.to(dtype) for t in qkv((2, 4, 49, 32)))
    assert error(sim.attention(name, q, k, v), plain(name, q, k, v)) <= tolerance


@pytest.mark.parametrize(("name", "mean"), [("euclidean", 8), ("sqeuclidean", 2), ("jaccard", 1e3)])
@pytest.mark.parametrize("width", [32, 64])
def test_error_for_a_large_mean_is_as_documented(name: str, mean: float, width: int) -> None:
    q, k, v = qkv((2, 4, 196, width))
    q, k = q + mean, k + mean
    assert error(sim.attention(name, q, k, v), plain(name, q, k, v)) <= 1e-5


@pytest.mark.parametrize("mean", [0.0, 1.0, 8.0, 1e3])
def test_jaccard_is_accurate_to_1e_6_for_any_mean(mean: float) -> None:
    q, k, _ = (t + mean for t in qkv((2, 4, 49, 64)))
    wanted = torch.tensor(
        [plain_score("jaccard", q[0, 0, 0].double(), b.double()) for b in k[0, 0]]
    )
    assert float((sim.jaccard(q, k)[0, 0, 0] - wanted).abs().max()) <= 1e-6


@pytest.mark.parametrize("deviation", [0.1, 1.0, 30.0, 100.0])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("name", ["euclidean", "jaccard"])
def test_float16_handles_small_and_large_inputs(name: str, width: int, deviation: float) -> None:
    q, k, v = (t.half() for t in qkv((2, 4, 49, width)))
    q, k = ((t * deviation).requires_grad_() for t in (q, k))
    out = sim.attention(name, q, k, v)
    flat = error(v.float().mean(-2, keepdim=True).expand_as(v), plain(name, q, k, v))
    assert error(out, plain(name, q, k, v)) <= min(2e-2, flat / 5)
    out.float().sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ATTENTION_FORMS)
def test_zero_vectors_have_finite_gradients_in_half_precision(
    name: str, dtype: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    form = create_attention(name, dim=16, heads=2, tokens=9).to(
        torch.float32 if autocast else dtype
    )
    zero, some = torch.zeros(2, 9, 16, dtype=dtype), torch.randn(2, 9, 16).to(dtype)
    for q, k in ((zero, zero), (some, zero), (zero, some)):
        inputs = [t.clone().requires_grad_() for t in (q, k, some, some)]
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = form(*inputs, (3, 3))
        form.zero_grad()
        out.float().sum().backward()
        grads = [t.grad for t in (*inputs, *form.parameters()) if t.grad is not None]
        assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("name", ATTENTION_FORMS)
def test_half_precision_module(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Against the same module in float64."""
    torch.manual_seed(0)
    form = create_attention(name, dim=64, heads=2).to(dtype)
    inputs = [torch.randn(2, 49, 64).to(dtype) for _ in range(4)]
    with torch.no_grad():
        out = form(*inputs, (7, 7))
        assert out.dtype == dtype
        expected = copy.deepcopy(form).double()(*(t.double() for t in inputs), (7, 7))
    assert error(out, expected) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ATTENTION_FORMS)
@pytest.mark.parametrize(
    ("model", "pixels"), [("levit_deck", 64), ("swin_tiny_patch2_window4_32", 32)]
)
@torch.no_grad()
def test_half_precision_model(model: str, pixels: int, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=5, attention=name).eval().to(dtype)
    out = net(torch.randn(1, 3, pixels, pixels).to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_jaccard_is_one_for_itself_and_bounded() -> None:
    q, k, _ = qkv((2, 2, 20, 8))
    assert torch.allclose(sim.jaccard(q, q).diagonal(dim1=-2, dim2=-1), torch.ones(2, 2, 20))
    assert sim.jaccard(q, k).min() >= -1 / 3 - 1e-6
    assert sim.jaccard(q, -q).diagonal(dim1=-2, dim2=-1).allclose(torch.tensor(-1 / 3))
    minmax = sim.jaccard_minmax(q, k)
    assert minmax.min() > 0
    assert minmax.max() <= 1


# Focused attention.


def test_focus_keeps_the_norm_and_the_order() -> None:
    x = torch.rand(5, 12) + 1e-3
    for power in (1.0, 2.0, 3.0, 4.5):
        out = focus(x, power)
        assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
        assert (out.argsort(-1) == x.argsort(-1)).all()
        expected = x**power * (x.norm(dim=-1) / (x**power).norm(dim=-1))[:, None]
        assert torch.allclose(out, expected, rtol=1e-4)
    assert torch.allclose(focus(x, 1.0), x)
    assert focus(torch.full((2, 4), 1e30), 3.0).isfinite().all()
    assert (focus(torch.zeros(2, 4), 3.0) == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_attention_is_the_normalised_sum(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(shape)
    q, k = q.abs(), k.abs()
    weights = q.double() @ k.double().transpose(-2, -1)
    expected = weights / weights.sum(-1, keepdim=True) @ v.double()
    assert error(linear_attention(q, k, v), expected) <= 1e-5


def test_focused_module_matches_its_formula() -> None:
    torch.manual_seed(0)
    form = FocusedAttention(16, 2, power=3, tokens=12).double()
    torch.nn.init.normal_(form.scale)
    torch.nn.init.normal_(form.position)
    q, k, v = (torch.randn(2, 12, 16).double() for _ in range(3))
    out = form(q, k, v, q, (3, 4))
    scale = (1 + form.scale.exp()).log()
    expected = torch.empty_like(out)
    phi = []
    for t in (q, k + form.position):
        x = (t.clamp(min=0) + 1e-6) / scale
        phi.append(x**3 * (x.norm(dim=-1) / (x**3).norm(dim=-1))[..., None])
    for head in (slice(0, 8), slice(8, 16)):
        weights = phi[0][..., head] @ phi[1][..., head].transpose(1, 2)
        grid = v[..., head].transpose(1, 2).reshape(2, 8, 3, 4)
        local = F.conv2d(grid, form.conv.weight, form.conv.bias, padding=2, groups=8)
        expected[..., head] = weights / 12 / (weights.mean(-1, keepdim=True) + 1e-6) @ v[
            ..., head
        ] + local.flatten(2).transpose(1, 2)
    assert error(out, expected) <= 1e-5


def test_focused_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in qkv((2, 4, 6), torch.float64))
    form = FocusedAttention(6, 2, kernel=3).double()
    assert torch.autograd.gradcheck(lambda q, k, v: form(q, k, v, q, (2, 2)), (q, k, v))


# Gated attention.


def gates(shape: tuple[int, ...], least: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator, dtype=dtype) * least


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 200), chunk=st.integers(1, 40), seed=st.integers(0, 99))
def test_chunks_and_recurrence_agree(n: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 2, n, 6)
    v = torch.randn(1, 2, n, 5)
    a, b = -torch.rand(1, 2, n, 6) * 0.5, -torch.rand(1, 2, n, 5) * 0.5
    slow = gated_recurrence(*(t.double() for t in (q, k, v, a, b)))
    assert error(gated_chunks(q, k, v, a, b, chunk), slow) <= 1e-4
    assert error(gated_recurrence(q, k, v, a, b), slow) <= 1e-5


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100, 196])
@pytest.mark.parametrize("gate", [-0.9, -5.0, math.log(1e-8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chunks_are_exact_for_small_gates(n: int, gate: float, dtype: torch.dtype) -> None:
    """All gates equal, then random ones down to this one; also the gradients."""
    for a in (torch.full((2, 2, n, 16), gate), gates((2, 2, n, 16), gate)):
        inputs = [t.to(dtype).requires_grad_() for t in (*qkv((2, 2, n, 16)), a, a.flip(-1))]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        out, slow = gated_chunks(*inputs), gated_recurrence(*exact)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        assert error(out, slow) <= tolerance
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        found = torch.autograd.grad(out, inputs, weights.to(dtype))
        references = torch.autograd.grad(slow, exact, weights)
        largest = max(float(reference.norm()) for reference in references)
        for grad, reference in zip(found, references, strict=True):
            # Gradients of small gates are differences of larger ones, and almost 0.
            scale = max(float(reference.norm()), 1e-3 * largest)
            assert float((grad.double() - reference).norm()) <= 10 * tolerance * scale


def test_small_gates_in_bfloat16() -> None:
    """The module casts to float32, so rounding of the inputs is all that differs."""
    torch.manual_seed(0)
    form = GatedAttention(32, 2, tau=1.0)
    for gate in (form.alpha, form.beta):
        torch.nn.init.constant_(gate[1].bias, math.log(1e-8))
    inputs = [torch.randn(2, 49, 32).bfloat16() for _ in range(4)]
    expected = copy.deepcopy(form).bfloat16().double()
    expected.scan = gated_recurrence
    with torch.no_grad():
        out = form.bfloat16()(*inputs, (7, 7))
        assert out.dtype == torch.bfloat16
        assert error(out, expected(*(t.double() for t in inputs), (7, 7))) <= 2e-2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_trace_holds_for_smaller_gates_than_its_example() -> None:
    q, k, v = torch.randn(3, 1, 64, 8).unbind()
    gates = [torch.full((1, 64, 8), gate) for gate in (-0.01, -4.0)]
    traced = torch.jit.trace(
        lambda *t: gated_chunks(*t), (q[None], k[None], v[None], *[gates[0][None]] * 2)
    )
    inputs = (q[None], k[None], v[None], *[gates[1][None]] * 2)
    torch.testing.assert_close(traced(*inputs), gated_recurrence(*inputs))


def test_float64_is_used_for_small_products_of_gates_only() -> None:
    least = LEAST_PRODUCT[torch.float32] / 49
    for gate, fits in ((0.0, True), (0.99 * least, True), (1.01 * least, False)):
        for other in (0.0, gate):
            a, b = torch.full((1, 2, 196, 8), gate), torch.full((1, 2, 196, 8), other)
            assert _fits_float32(a, b, CHUNK) == _fits_float32(b, a, CHUNK) == fits
    small = torch.full((1, 1, 98, 8), -100.0)
    assert not _fits_float32(small, small, CHUNK)
    assert _fits_float32(small.to("meta"), small.to("meta"), CHUNK)  # shapes alone are counted


@pytest.mark.parametrize("least", [0.0, -0.9, -5.0])
@pytest.mark.parametrize("chunk", [17, CHUNK])
def test_large_inputs_over_several_chunks(chunk: int, least: float) -> None:
    q, k, v = (t * 1e4 for t in qkv((1, 2, 3 * CHUNK + 5, 16)))
    a, b = torch.full_like(q, least), torch.full_like(q, least)
    inputs = [t.requires_grad_() for t in (q, k, v, a, b)]
    out = gated_chunks(*inputs, chunk)
    out.mean().backward()
    wanted = [t.detach().double().requires_grad_() for t in inputs]
    slow = gated_recurrence(*wanted)
    slow.mean().backward()
    assert error(out, slow) <= 1e-4
    for got, reference in zip(inputs, wanted, strict=True):
        assert got.grad.isfinite().all()
        assert error(got.grad, reference.grad) <= 1e-4


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        )
    ],
)
@pytest.mark.parametrize("gate", [-0.1, math.log(1e-8)])
def test_chunks_on_a_card(gate: float, device: str) -> None:
    a = gates((2, 4, 196, 64), gate)
    inputs = [t.to(device).requires_grad_() for t in (*qkv((2, 4, 196, 64)), a, a.flip(-1))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, slow = gated_chunks(*inputs), gated_recurrence(*exact)
    assert error(out, slow) <= 1e-5
    found = torch.autograd.grad(out.sum(), inputs)
    for grad, reference in zip(found, torch.autograd.grad(slow.sum(), exact), strict=True):
        assert error(grad, reference) <= 1e-4


@pytest.mark.parametrize("tau", [0.5, 1.0, 16.0])
@torch.no_grad()
def test_the_chunk_size_does_not_change_the_output(tau: float) -> None:
    """With the gates of a new module, and with all gates at the minimum."""
    for bias in (0.0, -30.0):
        outputs = []
        for chunk in (0, 1, 17, CHUNK):
            torch.manual_seed(0)
            form = GatedAttention(16, 2, tau=tau, two_way=True, chunk=chunk)
            for gate in (form.alpha, form.beta):
                torch.nn.init.constant_(gate[1].bias, bias * tau)
            q, k, v, x = torch.randn(4, 2, 256, 16)
            outputs.append(form(q, k, v, x, (16, 16)))
        assert all(error(out, outputs[0]) <= 1e-4 for out in outputs)


def test_a_chunk_too_long_for_float32_is_refused() -> None:
    q = torch.ones(1, 1, CHUNK + 1, 2)
    for chunk in (CHUNK + 1, -3):
        with pytest.raises(ValueError, match=f"chunk={chunk}: 1 to {CHUNK} tokens"):
            gated_chunks(q, q, q, -q, -q, chunk)
        with pytest.raises(ValueError, match=f"chunk={chunk}: 1 to {CHUNK} tokens"):
            GatedAttention(16, 2, chunk=chunk)


def test_gated_recurrence_by_hand() -> None:
    """Two tokens, one head: S_1 = k1^T v1, S_2 = (alpha^T beta) * S_1 + k2^T v2."""
    q, k, v = (
        torch.tensor(x)[None] for x in ([[1.0, 2], [3, 4]], [[5.0, 6], [7, 8]], [[1.0], [2]])
    )
    a = torch.tensor([[[1.0, 1], [0.5, 0.25]]]).log()
    b = torch.tensor([[[1.0], [0.5]]]).log()
    out = gated_recurrence(q, k, v, a, b)
    first = [5 * 1.0, 6 * 1.0]
    second = [0.5 * 0.5 * first[0] + 7 * 2, 0.25 * 0.5 * first[1] + 8 * 2]
    expected = [[1 * first[0] + 2 * first[1]], [3 * second[0] + 4 * second[1]]]
    assert torch.allclose(out[0], torch.tensor(expected))


def test_gated_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in qkv((1, 1, 7, 3), torch.float64))
    rough = -torch.rand(1, 1, 7, 3).double(), gates((1, 1, 7, 3), -0.5).double()
    a, b = (t.requires_grad_() for t in rough)
    assert torch.autograd.gradcheck(lambda *t: gated_chunks(*t, chunk=3), (q, k, v, a, b))


def test_one_way_is_causal_and_two_way_is_not() -> None:
    torch.manual_seed(0)
    for two_way in (False, True):
        form = GatedAttention(16, 2, two_way=two_way, chunk=4).eval()
        q, k, v, x = torch.randn(4, 1, 9, 16)
        before = form(q, k, v, x, (3, 3))
        v2 = v.clone()
        v2[:, 6] += torch.arange(16.0)
        changed = (form(q, k, v2, x, (3, 3)) - before).abs().amax(-1)[0] > 1e-6
        assert changed[6:].all()
        assert changed[:6].any() == two_way


@pytest.mark.parametrize("two_way", [False, True])
def test_gated_module_matches_the_equations_of_the_deck(two_way: bool) -> None:
    """Eq. 4 to 11, one token and one head at a time; also the scan from last to first."""
    torch.manual_seed(0)
    form = GatedAttention(8, 2, tau=4.0, two_way=two_way).double()
    q, k, v, x = torch.randn(4, 1, 5, 8).double()
    out = form(q, k, v, x, (1, 5))
    alpha = form.alpha(x).sigmoid() ** (1 / 4)
    beta = form.beta(x).sigmoid() ** (1 / 4)
    swish = form.gate(x) * form.gate(x).sigmoid()
    for head in (slice(0, 4), slice(4, 8)):
        o = torch.zeros(5, 4).double()
        for order in (range(5), reversed(range(5)))[: 1 + two_way]:
            state = torch.zeros(4, 4).double()
            for t in order:
                gate = torch.outer(alpha[0, t, head], beta[0, t, head])
                state = gate * state + torch.outer(k[0, t, head], v[0, t, head])
                o[t] += q[0, t, head] @ state
        mean, var = o.mean(-1, keepdim=True), o.var(-1, unbiased=False, keepdim=True)
        norm = (o - mean) / (var + 1e-5).sqrt()
        assert torch.allclose(out[0, :, head], swish[0, :, head] * norm, atol=1e-5)


# In models.


def forms_in(net: torch.nn.Module) -> list[tuple[type, str | None]]:
    """The class of every attention form in a model, and its similarity."""
    found = [m.attend for m in net.modules() if hasattr(m, "attend")]
    return [(type(attend), getattr(attend, "similarity", None)) for attend in found]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [("levit_deck", 8), ("levit_deck_fixed", 8), ("hovit", 4), ("l_levit_deck", 8)],
)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_any_form_in_the_models_of_the_deck(model: str, blocks: int, form: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 64} if model.startswith("l_") else {}
    net = timm.create_model(model, num_classes=5, attention=form, **size)
    out = net(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 5)
    assert out.isfinite().all()
    assert forms_in(net) == [FORM_CLASSES[form]] * blocks


def test_dot_adds_no_parameters() -> None:
    names = set(timm.create_model("levit_deck", num_classes=37).state_dict())
    assert not any(".attend." in name for name in names)
    jaccard = set(timm.create_model("levit_deck", num_classes=37, attention="jaccard").state_dict())
    assert {n.rsplit(".", 1)[1] for n in jaccard - names} == {"temperature"}
    assert names < jaccard


@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_any_form_in_the_windows_of_swin(form: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch2_window4_32", num_classes=5, attention=form)
    out = net(torch.randn(2, 3, 32, 32))
    out.sum().backward()
    assert out.shape == (2, 5)
    assert out.isfinite().all()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert forms_in(net) == [FORM_CLASSES[form]] * (0 if form == "dot" else 12)


def test_by_default_every_stage_has_the_form() -> None:
    args = {"depths": (2, 2), "num_heads": (3, 6)}
    net = timm.create_model("swin_tiny_patch2_window4_32", attention="jaccard", **args)
    assert sum(hasattr(m, "attend") for m in net.modules()) == 4
    net = timm.create_model("swin_tiny_patch2_window4_32", **args)
    assert sum(hasattr(m, "attend") for m in net.modules()) == 0


def test_dot_equals_the_swin_of_timm() -> None:
    args = {"num_classes": 5, "img_size": 32, "patch_size": 2, "window_size": 4}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **args).eval()
    ours = timm.create_model("swin_tiny_patch2_window4_32", num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        # Our attention module, forced to the dot product, agrees with timm's blocks.
        forced = timm.create_model(
            "swin_tiny_patch2_window4_32", num_classes=5, attention="sqeuclidean"
        ).eval()
        for module in forced.modules():
            if hasattr(module, "similarity"):
                module.similarity = "dot"
        forced.load_state_dict(theirs.state_dict())
        assert torch.allclose(forced(x), theirs(x), atol=1e-4)


def test_linear_forms_are_not_shifted_and_stay_in_their_stages() -> None:
    net = timm.create_model("flatten_swin_tiny_patch4_window56_224")
    blocks = [list(layer.blocks) for layer in net.layers]
    assert [b.attn.window_size for b in (blocks[0][0], blocks[1][1])] == [(56, 56), (28, 28)]
    assert all(b.shift_size == (0, 0) for stage in blocks[:2] for b in stage)
    assert blocks[2][1].shift_size == (3, 3)
    assert [hasattr(b.attn, "attend") for stage in blocks for b in stage] == [True] * 4 + [
        False
    ] * 8
    assert 28.5e6 < sum(p.numel() for p in net.parameters()) < 29.5e6  # published: 29 M


@pytest.mark.parametrize("form", ["focused", "gated"])
@torch.no_grad()
def test_windows_of_a_linear_form_do_not_mix(form: str) -> None:
    """A change within a window affects only this window, also after a resize."""
    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch2_window4_32", attention=form).eval()
    x = torch.randn(1, 16, 16, 96)
    changed = x.clone()
    changed[:, 4:8, 8:12] += 1
    outputs = []
    for _ in range(2):
        blocks = net.layers[0].blocks
        touched = (blocks(changed) - blocks(x)).abs().amax(-1)[0] > 1e-6
        assert touched[4:8, 8:12].all()
        assert touched.sum() == 16
        outputs.append(net(torch.ones(1, 3, 32, 32)))
        net.set_input_size((32, 32), window_size=4)
    assert torch.equal(*outputs)
    net.set_input_size((64, 64), window_size=(4, 4, 4, 2))  # more windows as large
    assert all(b.shift_size == (0, 0) for stage in net.layers for b in stage.blocks)
    assert net(torch.ones(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@torch.no_grad()
def test_swin_takes_dtype_and_device(form: str) -> None:
    args = {"num_classes": 5, "attention": form, "embed_dim": 24, "depths": (1, 1, 1, 1)}
    net = timm.create_model("swin_tiny_patch2_window4_32", dtype=torch.bfloat16, **args).eval()
    assert net(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    net = timm.create_model("swin_tiny_patch2_window4_32", device="meta", **args)
    assert all(p.is_meta for p in net.parameters())


@torch.no_grad()
def test_windows_with_softmax_are_shifted_and_resized_as_in_timm() -> None:
    args = {"num_classes": 5, "img_size": 64, "patch_size": 2, "window_size": (4, 4, 4, 2)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **args)
    ours = timm.create_model(
        "swin_tiny_patch2_window4_32", attention="focused", attention_stages=(0, 1)
    )
    ours.set_input_size((64, 64), window_size=(4, 4, 4, 2))
    shifts, expected = (
        [block.shift_size for stage in net.layers for block in stage.blocks]
        for net in (ours, theirs)
    )
    assert shifts == [(0, 0)] * 4 + expected[4:]
    assert (2, 2) in shifts


@torch.no_grad()
def test_a_size_that_changes_a_fixed_window_is_refused_and_changes_nothing() -> None:
    net = timm.create_model("swin_tiny_patch2_window4_32", attention="focused").eval()
    x = torch.randn(1, 3, 32, 32)
    before, cfg = net(x), copy.deepcopy(net.pretrained_cfg)
    with pytest.raises(ValueError, match="a window of 8x8 for 4x4"):
        net.set_input_size((64, 64))
    assert torch.equal(net(x), before)
    assert net.patch_embed.img_size == (32, 32)
    assert net.pretrained_cfg == cfg


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"attention": "cosine"}, "attention 'cosine': there are dot, euclidean"),
        (
            {"attention": "jaccard", "power": 3},
            "attention 'jaccard' does not take power",
        ),
        ({"attention": "focused", "checkerboard": "drop"}, "convolves over all tokens"),
        (
            {"attention": "focused", "tau": 3, "power": 2},
            "take tau; it takes power, kernel$",
        ),
        ({"wat": 3}, "LevitDeck takes no wat$"),
        ({"attention": "gated", "wat": 3, "tau": 2}, "LevitDeck takes no wat$"),
        ({"attention": "jaccard", "heads": 3}, "LevitDeck takes no heads$"),
        ({"embed_dim": (100, 200, 300)}, "embed_dim: 100 is not a multiple of 64"),
        ({"embed_dim": (64, 128, 96)}, "embed_dim: 96 is not a multiple of 64"),
    ],
)
def test_wrong_arguments_are_one_line(args: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        timm.create_model("levit_deck", **args)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"attention": "cosine"}, "attention 'cosine': there are dot, euclidean"),
        ({"attention": "cosine", "attention_stages": ()}, "attention 'cosine': there are"),
        ({"power": 2}, "attention 'dot' does not take power; it takes no options"),
        (
            {"attention": "gated", "attention_stages": (7,)},
            "attention_stages: no stage 7; they are 0 to 3",
        ),
        ({"attention": "gated", "attention_stages": (0, -1)}, "attention_stages: no stage -1"),
        ({"attention": "jaccard", "attn_drop_rate": 0.1}, "has no attention dropout"),
        ({"attention": "jaccard", "head_dim": 16}, "attention='jaccard' has no head_dim"),
    ],
)
def test_wrong_arguments_of_swin_are_one_line(args: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        timm.create_model("swin_tiny_patch2_window4_32", **args)


@pytest.mark.parametrize(
    ("form", "name", "values"),
    [
        ("focused", "kernel", (4, 0, -1, "5", 3.0)),
        ("focused", "power", (0, -1.0, math.inf, math.nan, "3")),
        ("gated", "chunk", (-3, 1000, 2.5, "64", None)),
        ("gated", "rank", (0, -1, 1.5, "16")),
        ("gated", "tau", (0, -1.0, math.nan, "16")),
    ],
)
def test_invalid_values_of_options_are_one_line(form: str, name: str, values: tuple):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ")) as caught:
            create_attention(form, 16, 2, **{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("heads", [3, 0, -2, 2.0])
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_heads_that_do_not_divide_the_channels_are_refused(form: str, heads: int) -> None:
    with pytest.raises(ValueError, match=f"16 channels in {heads} heads: heads must be equal"):
        create_attention(form, 16, heads)


def test_an_error_inside_a_form_is_not_blamed_on_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("broken")

    monkeypatch.setattr(FocusedAttention, "__init__", broken)
    with pytest.raises(TypeError, match="broken"):
        create_attention("focused", 16, 2)


@pytest.mark.parametrize("similarity", ["euclidean", "jaccard"])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.float32,) * 2])
def test_dtypes_may_differ_under_autocast(similarity, kinds):
    q, k = (torch.randn(2, 3, 9, 8).to(kind) for kind in kinds)
    with torch.autocast("cpu", torch.bfloat16):
        scores = sim.SIMILARITIES[similarity](q, k)
    wanted = sim.SIMILARITIES[similarity](q.double(), k.double())
    assert (scores.double() - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("similarity", ["euclidean", "sqeuclidean", "jaccard"])
def test_similarities_count_as_many_multiply_adds_as_the_dot_product(similarity, grad):
    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 7, 8)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        sim.SIMILARITIES[similarity](q, k)
    assert counter.get_total_flops() == 2 * 2 * 3 * 9 * 7 * 8


def test_the_table_of_forms_matches_functions_and_modules() -> None:
    softmax = [name for name, form in ATTENTION_FORMS.items() if form.softmax]
    assert softmax == list(sim.SIMILARITIES)
    assert ATTENTION_FORMS.keys() == FORM_CLASSES.keys()
    for name, (module, _) in FORM_CLASSES.items():
        arguments = set(signature(module).parameters) - {"dim", "heads", "tokens", "similarity"}
        without = set() if name in flex.SCORES else {"plain"}  # there is no other computation
        assert set(ATTENTION_FORMS[name].options) == arguments - without
