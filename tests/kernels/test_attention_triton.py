"""Attention in Triton, in the interpreter: every block's bounds, gradients, and one graph under torch.compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def interpreted(code):
    """Triton reads TRITON_INTERPRET when a kernel's module is imported, so the code gets a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BOUNDS = """
import torch
from nanochat_kernels import OPS, attention_triton as module
op, g = OPS["attention"], torch.Generator().manual_seed(0)
for m, n in ((16, 32), (32, 16), (32, 32)):
    module.SMALL = module.Launch(m, n, 4, 2)
    for t, window in ((130, 0), (130, 17), (130, 64), (96, 31), (97, 33), (128, 1000)):
        shapes = ((1, t, 2, 16), (1, t, 1, 16), (1, t, 1, 16))
        inputs = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
        upstream = torch.randn(shapes[0], generator=g)
        a, b = (op.load(name)(*inputs, window) for name in ("torch", "triton"))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for x, y in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (a, b))):
            torch.testing.assert_close(x, y, atol=3e-5, rtol=1e-5)
print("agrees")
"""


def test_every_kind_of_block_in_every_place():
    assert "agrees" in interpreted(BOUNDS)


def test_work_follows_the_window_not_the_square():
    """Blocks of keys that a query block visits, and blocks of queries that a key block visits, counted."""
    code = """
import triton, triton.language as tl, torch
from nanochat_kernels.attention_triton import _key_bounds
@triton.jit
def count(out, length, window, M: tl.constexpr, N: tl.constexpr):
    begin, interior, diagonal, end = _key_bounds(tl.program_id(0) * M, length, window, M, N)
    tl.store(out + tl.program_id(0) * 4 + 0, begin)
    tl.store(out + tl.program_id(0) * 4 + 1, interior)
    tl.store(out + tl.program_id(0) * 4 + 2, diagonal)
    tl.store(out + tl.program_id(0) * 4 + 3, end)
for length, window, m, n in ((4096, 300, 128, 64), (4096, 5000, 64, 128), (1000, 77, 32, 32), (700, 0, 64, 16)):
    out = torch.zeros(-(-length // m), 4, dtype=torch.int32)
    count[(len(out),)](out, length, min(window, length), m, n)
    for first, (begin, interior, diagonal, end) in zip(range(0, length, m), out.tolist()):
        assert begin <= interior <= diagonal <= end
        last = min(first + m, length) - 1
        assert begin <= max(first - window, 0) < begin + n and last < end <= length
        if interior < diagonal:  # all of these keys are seen by all of these queries
            assert interior >= first + m - 1 - window and diagonal <= first + 1
        assert end - begin <= window + m + n
print("bounded")
"""
    assert "bounded" in interpreted(code)


WELL_FORMED = """
import torch
from nanochat_kernels import OPS, KernelPlan
import nanochat_kernels.attention_triton
r = torch.randn
q, k, v = (r(1, 20, n, 16, requires_grad=True) for n in (4, 2, 2))
torch.library.opcheck(torch.ops.nanochat.attention, (q, k, v, 7))
plan = KernelPlan.resolve("auto,attention=triton", "cpu", torch.float32, "train-compiled")
layer = lambda q, k, v: (plan.attention(q, k, v, 7) ** 2).sum()
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
expected = torch.autograd.grad((OPS["attention"].reference(q, k, v, 7) ** 2).sum(), (q, k, v))
for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
try:
    OPS["attention"].load("triton")(*(r(1, 4, 1, 512) for _ in range(3)), 2)
except ValueError as error:
    assert "at most 256" in str(error)
print("well-formed")
"""


def test_op_is_well_formed_and_traces_in_one_graph():
    assert "well-formed" in interpreted(WELL_FORMED)


def test_flash_takes_the_first_version_that_imports(monkeypatch):
    from nanochat_kernels import attention

    calls = {}

    def flash_attn_func(q, k, v, **options):
        calls.update(options)
        return q, None

    attention._flash_function.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    package = type(sys)("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    cute = type(sys)("flash_attn.cute")
    cute.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    q = torch.zeros(1, 4, 1, 8)
    assert attention.attention_flash(q, q, q, 100) is q
    assert calls == {"causal": True, "window_size": (4, 0)}
    attention._flash_function.cache_clear()
