"""Captured calls: on a CPU by the stand-in, on a card by CUDA graphs."""

import pytest
import torch
from recorded_graph import capture
from torch import Tensor, nn

from hovit.utils.graphs import GraphedCallable, SyncLog

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CARD])]


@pytest.mark.parametrize("device", DEVICES)
def test_each_call_runs_the_function_once(device: str) -> None:
    total = torch.zeros((), device=device)

    def add(x: Tensor) -> Tensor:
        total.add_(x.sum())
        return total * 2

    graphed = GraphedCallable(add, warmup=2)
    for n in range(1, 7):
        out = graphed(torch.ones(3, device=device))
        assert total.item() == 3 * n
        assert out.item() == 6 * n
    assert graphed.events == [("eager", 2), ("capture", 1), ("replay", 4)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_overwrites_the_outputs(device: str) -> None:
    graphed = capture(lambda x: {"twice": 2 * x, "none": None}, torch.ones(2, device=device))
    first = graphed(torch.ones(2, device=device))
    kept = first["twice"].clone()
    second = graphed(torch.full((2,), 5.0, device=device))
    assert first["twice"] is second["twice"]
    assert kept.tolist() == [2, 2]
    assert second["twice"].tolist() == [10, 10]
    assert second["none"] is None


@pytest.mark.parametrize("device", DEVICES)
def test_each_shape_has_its_own_graph(device: str) -> None:
    graphed = GraphedCallable(lambda x: x + 1, warmup=1)
    for _ in range(3):
        for n in (2, 3):
            assert graphed(torch.ones(n, device=device)).tolist() == [2] * n
    assert [e for e, _ in graphed.events] == ["eager", "capture", "replay", "capture", "replay"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + 1 if x.sum() > 0 else x,
    ],
    ids=["item", "boolean index", "nonzero", "branch"],
)
def test_a_function_that_waits_for_the_device_stays_eager(fn, device: str) -> None:
    lines: list[str] = []
    graphed = GraphedCallable(fn, warmup=1, on_fallback=lines.append)
    x = torch.tensor([1.0, -0.5], device=device)
    for _ in range(3):
        assert torch.equal(graphed(x), fn(x))
    assert graphed.events == [("eager", 1), ("fallback", 1), ("eager", 2)]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert graphed.reason in lines[0]
    graphed.fn = torch.exp  # a function that changed
    graphed.reset()
    graphed(x)
    assert torch.equal(graphed(x), x.exp())
    assert not graphed.reason


def training_step(device: str) -> tuple[nn.Module, GraphedCallable]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=torch.tensor(0.1), capturable=device != "cpu"
    )

    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return model, GraphedCallable(step, warmup=2)


@pytest.mark.gpu
@NO_CARD
def test_a_captured_training_step_learns_as_an_eager_one() -> None:
    results = []
    for captured in (True, False):
        model, graphed = training_step("cuda")
        step = graphed if captured else graphed.fn
        losses = []
        for seed in range(20):
            torch.manual_seed(seed)
            x = torch.randn(16, 4).cuda()
            losses.append(step(x, x[:, :2]).detach().clone())
        results.append((torch.stack(losses), torch.cat([p.flatten() for p in model.parameters()])))
        assert not captured or ("replay", 18) in graphed.events
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@NO_CARD
def test_random_numbers_differ_between_replays_and_follow_the_seed() -> None:
    graphed = capture(lambda x: torch.rand_like(x), torch.zeros(8, device="cuda"))
    drawn = [graphed(torch.zeros(8, device="cuda")).clone() for _ in range(2)]
    assert not torch.equal(*drawn)
    for value in drawn:
        torch.manual_seed(3)
        value.copy_(graphed(torch.zeros(8, device="cuda")))
    assert torch.equal(*drawn)


def test_a_hook_runs_before_the_capture() -> None:
    order: list[str] = []

    def fn(x: Tensor) -> Tensor:
        order.append("call")
        return x + 1

    graphed = GraphedCallable(fn, warmup=2, on_capture=lambda: order.append("hook"))
    for _ in range(4):
        graphed(torch.ones(1))
    assert order == ["call", "call", "hook", "call", "call"]


@pytest.mark.gpu
@NO_CARD
def test_random_numbers_work_after_a_failed_capture() -> None:
    def fn(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.rand_like(x).sum().item()
        return x + torch.rand_like(x)

    graphed = GraphedCallable(fn, warmup=1)
    for _ in range(3):
        graphed(torch.ones(4, device="cuda"))
    assert graphed.reason
    assert torch.rand(3, device="cuda").isfinite().all()


def test_outputs_carry_no_autograd_graph() -> None:
    w = torch.ones(2, requires_grad=True)
    graphed = GraphedCallable(lambda x: (w * x).sum(), warmup=1)
    for _ in range(3):
        assert not graphed(torch.ones(2)).requires_grad


def test_replaying_without_a_copy_needs_the_shape_only() -> None:
    graphed = capture(lambda x: x.sum(), torch.ones(3))
    assert graphed.replay(torch.zeros(3)).item() == 3
    assert graphed.events == [("eager", 3), ("capture", 1), ("replay", 1)]


def test_the_log_of_waits_sees_the_backward_pass() -> None:
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * g.sum().item()

    x = torch.ones(2, requires_grad=True)
    with SyncLog() as log:
        y = Waits.apply(x).sum()
        assert not log.counts
        y.backward()
    assert log.counts == {"_local_scalar_dense": 1}


def test_filling_by_a_mask_does_not_wait() -> None:
    x = torch.arange(4.0)
    with SyncLog() as log:
        x[x > 1] = 0
        assert not log.counts
        x[x > -1] = torch.ones(4)
    assert log.counts == {"boolean index": 1}


def test_a_capture_needs_a_warm_up() -> None:
    with pytest.raises(ValueError, match="at least one"):
        GraphedCallable(torch.exp, warmup=0)
