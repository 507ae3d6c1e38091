"""Norm, rotary and attention: definitions that hold whatever the backend."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_kernels import OPS, KernelPlan

PLANS = [KernelPlan.reference(), KernelPlan.resolve("auto", mode="prefill")]


@pytest.fixture(params=PLANS, ids=["torch", "auto"])
def plan(request):
    return request.param


def test_rms_norm_is_torchs(plan):
    x = torch.randn(3, 5, 64)
    y, mixed = plan.rms_norm(x)
    torch.testing.assert_close(y, F.rms_norm(x, (64,)))
    assert mixed is x


def test_rms_norm_mixes_in_the_input_dtype(plan):
    x, delta, other = (torch.randn(2, 4, 32).bfloat16() for _ in range(3))
    y, mixed = plan.rms_norm(x, delta, torch.tensor(1.1), other, torch.tensor([-0.3]))
    assert y.dtype == mixed.dtype == torch.bfloat16
    expected = 1.1 * (x.float() + delta.float()) - 0.3 * other.float()
    torch.testing.assert_close(mixed.float(), expected, atol=0.05, rtol=0.02)


def test_rotation_depends_on_distance_only(plan):
    """q·k after rotary is a function of the difference of positions."""
    d, t = 16, 12
    angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    q, k = torch.randn(1, 1, 1, d).expand(1, t, 1, d), torch.randn(1, 1, 1, d).expand(1, t, 1, d)
    q, k, _ = plan.rope_qk_norm(q, k, k, angle.cos(), angle.sin())
    scores = q[0, :, 0] @ k[0, :, 0].T
    for shift in range(-3, 4):
        diagonal = scores.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, t, 1), 1.2 * d**0.5))


def test_rotation_is_by_minus_theta(plan):
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    q, _, _ = plan.rope_qk_norm(x, x, x, torch.tensor([[0.0]]), torch.tensor([[1.0]]), scale=1.0)
    torch.testing.assert_close(q.flatten(), torch.tensor([0.0, -(2**0.5)]))


def test_value_gate(plan):
    v, ve, gate = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 8), torch.randn(2, 3, 2)
    cos, sin = torch.ones(3, 2), torch.zeros(3, 2)
    _, _, mixed = plan.rope_qk_norm(v, v, v, cos, sin, ve, gate)
    torch.testing.assert_close(mixed, v + 3 * torch.sigmoid(gate)[..., None] * ve.view(2, 3, 2, 4))


@pytest.mark.parametrize("window", [0, 1, 5, 31, 32, 1000])
def test_a_window_of_w_sees_w_plus_one_keys(plan, window):
    """Equal scores average the visible values: with values = positions the output tells which were seen."""
    t = 32
    q = torch.zeros(1, t, 1, 8)
    v = torch.arange(t, dtype=torch.float32).view(1, t, 1, 1).expand(1, t, 1, 8)
    out = plan.attention(q, q, v, window)[0, :, 0, 0]
    expected = torch.tensor([sum(range(max(0, i - window), i + 1)) / min(i + 1, window + 1) for i in range(t)])
    torch.testing.assert_close(out, expected)


def test_cached_attention_equals_attention(plan):
    b, t, h, g, d, window = 2, 20, 4, 2, 16, 6
    q, k, v = torch.randn(b, t, h, d), torch.randn(b, t, g, d), torch.randn(b, t, g, d)
    whole = plan.attention(q, k, v, window)
    cache = [F.pad(x, (0, 0, 0, 0, 0, 12)) for x in (k, v)]
    for tq in (1, 5, t):
        out = plan.cached_attention(q[:, -tq:], *cache, torch.full((b,), t), window)
        torch.testing.assert_close(out, whole[:, -tq:], atol=1e-5, rtol=1e-5)


def test_cached_rows_of_different_lengths_do_not_mix(plan):
    k, v = torch.randn(2, 3, 16, 2, 8)
    q = torch.randn(3, 1, 2, 8)
    lengths = torch.tensor([4, 16, 9])
    together = plan.cached_attention(q, k, v, lengths, 100)
    for i, length in enumerate(lengths.tolist()):
        row = slice(i, i + 1)
        alone = plan.cached_attention(q[row], k[row, :length], v[row, :length], lengths[row], 100)
        torch.testing.assert_close(together[row], alone)


def test_reference_ignores_unwritten_cache():
    cache = torch.full((1, 8, 1, 4), float("nan"))
    cache[:, :3] = torch.randn(3, 1, 4)
    q, lengths = torch.randn(1, 1, 1, 4), torch.tensor([3])
    out = OPS["cached_attention"].reference(q, cache.nan_to_num(), cache, lengths, 100)
    assert torch.isfinite(out).all()
