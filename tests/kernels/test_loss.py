"""The head's loss: definitions that a comparison with the reference cannot see, and memory."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_kernels import OPS
from nanochat_kernels import linear_softcap_cross_entropy_chunked as chunked

OP = OPS["linear_softcap_cross_entropy"]
NAMES = ("torch", "chunked")  # triton shares the walk with chunked and is compared with the reference elsewhere
BACKENDS = [OP.load(name) for name in NAMES]


@pytest.fixture(params=BACKENDS, ids=NAMES)
def loss(request):
    return request.param


def inputs(n=24, c=16, v=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, generator=g).requires_grad_()
    w = torch.randn(v, c, generator=g).requires_grad_()
    return x, w, torch.randint(0, v, (n,), generator=g)


def test_equals_the_formula(loss):
    x, w, y = inputs()
    logits = 15 * torch.tanh(x @ w.T / 15)
    torch.testing.assert_close(loss(x, w, y), F.cross_entropy(logits, y))


def test_mean_divides_by_the_count_and_not_by_the_weights(loss):
    x, w, y = inputs()
    y[::3] = -1
    weights = torch.rand(y.numel())
    nll = loss(x, w, y, reduction="none")
    assert (nll[::3] == 0).all()
    torch.testing.assert_close(loss(x, w, y, weights), (nll * weights).sum() / (y != -1).sum())
    torch.testing.assert_close(loss(x, w, y, weights, reduction="sum"), (nll * weights).sum())


def test_all_ignored_is_zero_with_zero_gradients(loss):
    x, w, y = inputs()
    for reduction in ("mean", "sum"):
        value = loss(x, w, torch.full_like(y, -1), reduction=reduction)
        dx, dw = torch.autograd.grad(value, (x, w))
        assert value == 0 and (dx == 0).all() and (dw == 0).all()


def test_padding_of_the_vocabulary_has_no_part(loss):
    x, w, y = inputs()
    y = y % 50
    cropped = loss(x, w, y, vocab_size=50)
    torch.testing.assert_close(cropped, loss(x, w[:50], y))
    (dw,) = torch.autograd.grad(cropped, w)
    assert dw.shape == w.shape and (dw[50:] == 0).all() and (dw[:50] != 0).any()


def test_leading_dimensions(loss):
    x, w, y = inputs()
    shaped = loss(x.view(2, 12, -1), w, y.view(2, 12), torch.ones(2, 12))
    torch.testing.assert_close(shaped, loss(x, w, y))
    assert loss(x.view(2, 12, -1), w, y.view(2, 12), reduction="none").shape == (24,)


def test_unknown_reduction(loss):
    with pytest.raises(ValueError, match="median.*mean, sum, none"):
        loss(*inputs(), reduction="median")


def test_incoming_gradients_scale(loss):
    x, w, y = inputs()
    plain = torch.autograd.grad(loss(x, w, y), (x, w))
    scaled = torch.autograd.grad(loss(x, w, y) * 3, (x, w))
    for a, b in zip(plain, scaled):
        torch.testing.assert_close(3 * a, b)


def test_token_weights_get_gradients(loss):
    x, w, y = inputs()
    y[0] = -1
    weights = torch.rand(y.numel(), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x, w, y, weights), weights)
    torch.testing.assert_close(gradient, loss(x, w, y, reduction="none") / 23)


@pytest.mark.parametrize("softcap", [1.0, 15.0, 30.0, 100.0])
def test_any_softcap(loss, softcap):
    x, w, y = inputs()
    logits = softcap * torch.tanh((50 * x) @ w.T / softcap)
    torch.testing.assert_close(loss(50 * x, w, y, softcap=softcap), F.cross_entropy(logits, y))


@pytest.mark.parametrize(("panel", "tile"), [(64, 64), (640, 128), (1000, 300), (1 << 25, 1)])
def test_block_sizes_do_not_matter(monkeypatch, panel, tile):
    x, w, y = inputs()
    expected = torch.autograd.grad(OP.reference(x, w, y), (x, w))
    monkeypatch.setattr(chunked, "PANEL", panel)
    monkeypatch.setattr(chunked, "TILE", tile)
    result = torch.autograd.grad(OP.load("chunked")(x, w, y), (x, w))
    for a, b in zip(result, expected):
        torch.testing.assert_close(a, b)


def test_panels_in_bf16(monkeypatch):
    """The 16-bit products, which a CPU without their instructions would not choose."""
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(chunked, "PANEL", 640)
    x, w, y = inputs()
    expected = torch.autograd.grad(OP.reference(x, w, y), (x, w))
    result = torch.autograd.grad(OP.load("chunked")(x.bfloat16(), w, y), (x, w))
    for a, b in zip(result, expected):
        assert (a - b).norm() < 0.02 * b.norm()


def test_no_gradients_no_gradient_memory():
    x, w, y = inputs()
    with torch.no_grad():
        loss, _, dx, dw = torch.ops.nanochat.head_loss(x, w, y, None, None, 15.0, "", True, False)
    assert dx.numel() == dw.numel() == 0
    torch.testing.assert_close(loss, OP.reference(x, w, y).detach())


def test_custom_ops_are_well_formed():
    x, w, y = inputs()
    y = y % 50
    y[3] = -1
    weights = torch.rand(y.numel())
    torch.library.opcheck(torch.ops.nanochat.head_loss, (x, w, y, weights, 50, 15.0, "", True, True))
    torch.library.opcheck(torch.ops.nanochat.head_nll, (x, w, y, None, 15.0, ""))


def test_logits_never_exist_at_once():
    """Peak memory of the largest single allocation: a panel, not N × V."""
    x, w, y = torch.randn(2048, 8), torch.randn(32768, 8, requires_grad=True), torch.randint(0, 32768, (2048,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        OP.load("chunked")(x, w, y).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * chunked.PANEL < 4 * 2048 * 32768
