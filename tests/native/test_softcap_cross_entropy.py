"""The elementwise step of the head's loss on a CPU, at every SIMD level, against float64."""

import pytest
import torch

from nanochat_kernels.native import softmax_and_gradient
from tests.native.levels import LEVELS, each_level


def panel_of(rows, vocabulary, scale, dtype):
    """2l/c for logits of some `scale`, and targets, among them the likeliest and the least likely token."""
    generator = torch.Generator().manual_seed(vocabulary)
    panel = (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[0], targets[-1] = panel[0].argmax(), panel[-1].argmin()
    return panel, targets


def exact(panel, targets, softcap):
    """(nll, s(1 − s)·(softmax − onehot)) in float64."""
    s = panel.double().sigmoid()
    logits = 2 * softcap * s
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    p = logits.softmax(-1)
    p[torch.arange(len(targets)), targets] -= 1
    return nll, s * (1 - s) * p


@each_level
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("softcap", (15.0, 35.0))
@pytest.mark.parametrize("vocabulary", (1, 3, 37, 512, 1003, 5000))
def test_loss_and_gradient_equal_float64(level, dtype, softcap, vocabulary, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    for scale in (0.1, 1.0, 12.0):
        panel, targets = panel_of(5, vocabulary, scale, dtype)
        nll_expected, expected = exact(panel, targets, softcap)
        got, nll = panel.clone(), torch.full((5,), torch.nan)
        softmax_and_gradient(got, targets, nll, softcap, True)
        assert ((nll - nll_expected).abs() <= 4e-6 * (1 + nll_expected)).all()
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
        assert ((got - expected).abs() <= rounding * expected.abs() + 1e-7).all()  # 1 − s is only as exact as s
        again, only = panel.clone(), torch.empty(5)
        softmax_and_gradient(again, targets, only, softcap, False)
        assert torch.equal(only, nll)


@each_level
@pytest.mark.parametrize("at", (0, 36, 37, 599))
def test_a_logit_that_is_not_a_number_shows_in_its_row_alone(level, at, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    panel, targets = panel_of(3, 603, 1.0, torch.float32)
    panel[1, at], nll = torch.nan, torch.empty(3)
    softmax_and_gradient(panel, targets, nll, 15.0, True)
    assert nll.isnan().tolist() == [False, True, False]
    assert panel[1].isnan().all() and panel[[0, 2]].isfinite().all()


@pytest.mark.skipif(not LEVELS, reason="the C++ extension is not built")
def test_wrong_calls_are_refused():
    panel, targets = panel_of(4, 10, 1.0, torch.float32)
    with pytest.raises(IndexError, match="target 10 of 10"):
        softmax_and_gradient(panel, targets + 10 - targets, torch.empty(4), 15.0, True)
    with pytest.raises(RuntimeError, match="contiguous"):
        softmax_and_gradient(panel[:, :5], targets, torch.empty(4), 15.0, True)
    with pytest.raises(RuntimeError, match="nll"):
        softmax_and_gradient(panel, targets, torch.empty(3), 15.0, True)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        softmax_and_gradient(panel.double(), targets, torch.empty(4), 15.0, True)
