"""FP8: scales, saturation, what a cast costs, where amaxes come out, and well-formed ops (in the interpreter)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_kernels import OPS
from nanochat_kernels.fp8_linear import cast_weights
from nanochat_kernels.fp8_quantize import E4M3, E5M2, scale_for
from nanochat_kernels.fp8_rms_norm import static_scale

ROOT = Path(__file__).resolve().parents[2]
NONE = torch.zeros(())


def sqnr(result, expected):
    """Signal to quantization noise, in decibels."""
    return float(20 * torch.log10(expected.norm() / (expected - result).norm()).detach())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_are_powers_of_two_with_headroom(dtype):
    amax = torch.tensor([1e-30, 3e-7, 0.99, 1.0, 1.01, 27.7, 448.0, 6e4, 1e30])
    scale = scale_for(amax, dtype)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    headroom = torch.finfo(dtype).max / (amax * scale)
    assert (headroom > 1.75).all() and (headroom <= 3.5).all()
    assert scale_for(0.0, dtype) == 1.0 and torch.isfinite(scale_for(1e-37, dtype))
    assert static_scale(768) * 768**0.5 < 256


@pytest.mark.parametrize(("e5m2", "least"), [(False, 31), (True, 25)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 1e4])
def test_a_cast_keeps_its_signal(e5m2, least, magnitude, generator):
    """Rounding to m bits after the point of the mantissa: 6.02·(m + 2) dB or so, whatever the magnitude."""
    x = torch.randn(200, 100, generator=generator) * magnitude
    x8, x8t, inverse, amax = OPS["fp8_quantize"].reference([x], NONE, e5m2)
    assert sqnr(x8.float() * inverse, x) > least
    assert torch.equal(x8t.float(), x8.float().T) and x8t.is_contiguous() and amax == x.abs().max()


def test_what_exceeds_a_delayed_scale_saturates():
    x8, _, inverse, amax = OPS["fp8_quantize"].reference([torch.tensor([[1e6, -1e6, 1.0]])], torch.tensor(1.0))
    assert (x8.float() * inverse).tolist() == [[448.0, -448.0, 1.0]] and amax == 1e6  # the next scale will know


def test_linear_signal_to_noise_and_amaxes(generator):
    x = torch.randn(64, 256, generator=generator).requires_grad_()
    w = (torch.randn(128, 256, generator=generator) / 16).requires_grad_()
    upstream = torch.randn(64, 128, generator=generator) * 1e-6
    scales = torch.zeros(2, requires_grad=True)
    y = OPS["fp8_linear"].reference(x, w, scales)
    dx, dw, amaxes = torch.autograd.grad(y, (x, w, scales), upstream)
    assert sqnr(y, x @ w.T) > 27  # e4m3 rounds to 3 bits: about 31 dB for one operand, 3 dB less for two
    assert sqnr(dx, upstream @ w) > 23 and sqnr(dw, upstream.T @ x) > 23
    assert amaxes.tolist() == [x.abs().max(), upstream.abs().max()]
    # delayed scales as good as current ones, from amaxes a little out of date
    old = torch.stack([scale_for(amaxes[0] / 1.7, E4M3), scale_for(amaxes[1] / 1.7, E5M2)])
    delayed = OPS["fp8_linear"].reference(x, w, old.requires_grad_())
    assert sqnr(delayed, x @ w.T) > 27
    assert sqnr(torch.autograd.grad(delayed, x, upstream)[0], upstream @ w) > 23
    zero = OPS["fp8_linear"].reference(torch.zeros(16, 256), w)
    assert (zero == 0).all()


def test_weights_cast_beforehand_are_the_same_weights(generator):
    x, w = torch.randn(32, 128, generator=generator), torch.randn(64, 128, generator=generator)
    op = OPS["fp8_linear"].reference
    assert torch.equal(op(x, w, weight8=cast_weights([w], triton=False)), op(x, w))


def test_the_norm_before_qkv_equals_separate_layers(generator):
    x, delta, x0 = (torch.randn(2, 16, 128, generator=generator) for _ in range(3))
    weights = [torch.randn(n, 128, generator=generator) / 11 for n in (128, 64, 64)]
    a, b = torch.tensor(1.1), torch.tensor(0.2)
    *qkv, head, mixed = OPS["fp8_norm_qkv"].reference(x, *weights, delta, a, x0, b)
    y, expected = OPS["rms_norm"].reference(x, delta, a, x0, b)
    assert torch.equal(mixed, expected) and torch.equal(head, y[..., :16])
    for result, w in zip(qkv, weights, strict=True):
        assert sqnr(result, y @ w.T) > 27


def mlp_gradients(op, x, w_fc, w_proj, scales, upstream):
    y, _ = op(x, w_fc, w_proj, scales=scales)
    return y, *torch.autograd.grad(y, (x, w_fc, w_proj, scales), upstream)


def test_mlp_signal_to_noise(generator):
    """Against the same maths in float32. h carries the noise of two casts to 3 bits (28 dB), the square doubles it, a8
    and w_proj add theirs: some 24 dB for y; gradients pass e5m2 (2 bits, 25 dB) twice besides: some 20."""
    x = torch.randn(256, 128, generator=generator).requires_grad_()
    w_fc = (torch.randn(512, 128, generator=generator) / 11).requires_grad_()
    w_proj = (torch.randn(128, 512, generator=generator) / 22).requires_grad_()
    upstream = torch.randn(256, 128, generator=generator) * 1e-6
    y = OPS["relu2_mlp"].reference(OPS["rms_norm"].reference(x)[0], w_fc, w_proj)
    expected = y, *torch.autograd.grad(y, (x, w_fc, w_proj), upstream)
    op = OPS["fp8_norm_mlp"].reference
    *first, amaxes = mlp_gradients(op, x, w_fc, w_proj, torch.zeros(3, requires_grad=True), upstream)
    formats = (E4M3, E5M2, E5M2)
    delayed = torch.stack([scale_for(amax, dtype) for amax, dtype in zip(amaxes, formats, strict=True)])
    *second, again = mlp_gradients(op, x, w_fc, w_proj, delayed.requires_grad_(), upstream)
    for results in (first, second):
        assert all(sqnr(r, e) > least for r, e, least in zip(results, expected, (24, 20, 20, 22), strict=True))
    torch.testing.assert_close(again, amaxes, rtol=0.1, atol=0)
    hidden = (OPS["rms_norm"].reference(x)[0] @ w_fc.T).relu().square()
    assert sqnr(amaxes[0], hidden.max()) > 20 and amaxes[1] == upstream.abs().max()


SCRIPT = """
import torch
from nanochat_kernels import OPS, KernelPlan
from nanochat_kernels.fp8_linear import cast_weights
ops, r = torch.ops.nanochat, torch.randn
OPS["fp8_rms_norm"].load("triton"), OPS["fp8_quantize"].load("triton")
x, d, o = (r(32, 64, requires_grad=True) for _ in range(3))
s, t = torch.tensor(1.1, requires_grad=True), torch.tensor([0.2], requires_grad=True)
ws = [r(n, 64, requires_grad=True) for n in (64, 32, 32)]
w, fc, proj = (z.requires_grad_() for z in (r(48, 64), r(128, 64) / 8, r(64, 128) / 11))

def check(op, inputs):
    # torch cannot compare or add FP8 numbers, as opcheck's other two tests do: that arguments stay as they were is seen
    # here, and gradients through the compiler below.
    before = [bytes(t.detach().reshape(-1).view(torch.uint8).numpy()) for t in flat(inputs)]
    torch.library.opcheck(op, inputs, test_utils=("test_autograd_registration", "test_faketensor"))
    op(*inputs)
    assert before == [bytes(t.detach().reshape(-1).view(torch.uint8).numpy()) for t in flat(inputs)]

def flat(inputs):
    return [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]

check(ops.fp8_quantize, ([r(32, 16), r(32, 8)], torch.zeros(()), True))
check(ops.fp8_rms_norm, (r(32, 64), r(32, 64), None, None, None))
check(ops.fp8_rms_norm, (r(32, 64), None, None, None, None))
for triton in (False, True):
    w8, scales = list(cast_weights([w], triton)), torch.zeros(2, requires_grad=True)
    check(ops.fp8_linear, (x, w, scales, w8, triton))
    w8, scales = list(cast_weights(ws, triton)), torch.zeros(1, requires_grad=True)
    check(ops.fp8_norm_qkv, (x, d, s, o, t, ws, scales, w8, triton))
    check(ops.fp8_norm_qkv, (x, None, None, None, None, ws, scales, w8, triton))
    w8, scales = [*cast_weights([fc], triton), *cast_weights([proj], triton)], torch.zeros(3, requires_grad=True)
    for backend in ("triton", "scaled") if triton else ("torch",):
        check(ops.fp8_norm_mlp, (x, d, fc, proj, scales, w8, backend))
    check(ops.fp8_norm_mlp, (x, None, fc, proj, scales, w8, backend))

def step(plan, x, d, s, o, t, w, fc, proj, scales, *ws):
    q, k, v, head, mixed = plan.fp8_norm_qkv(x, *ws, d, s, o, t, scales=scales[:1])
    y, mixed = plan.fp8_norm_mlp(q, fc, proj, mixed, scales[3:])
    return plan.fp8_linear(y + mixed, w, scales[1:3]).sum() + (k * v).sum() + head.square().sum()

scales = torch.zeros(6, requires_grad=True)
x, d, o = (z.detach().view(2, 16, 64) for z in (x, d, o))
inputs = (x.requires_grad_(), d.requires_grad_(), s, o, t, w, fc, proj, scales, *ws)
wanted = [z for z in inputs if z.requires_grad]
reference, fused = KernelPlan.reference(), KernelPlan.resolve("fused", "cpu", torch.float32, "train-compiled")
assert fused.choices["fp8_norm_qkv"].backend == "triton", fused.report()
expected = torch.autograd.grad(step(reference, *inputs), wanted)
for plan in (reference, fused):
    compiled = torch.compile(lambda *a: step(plan, *a), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), wanted), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)
print("well-formed")
"""


def test_ops_are_well_formed_and_trace_in_one_graph():
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "well-formed" in done.stdout, done.stderr[-3000:]
