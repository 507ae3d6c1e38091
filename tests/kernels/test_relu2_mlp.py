"""The fused MLP: what it keeps, that its ops are well-formed, and that it traces in one graph (in the interpreter)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import torch
from nanochat_kernels import OPS
import nanochat_kernels.relu2_mlp_triton as fused
ops, r = torch.ops.nanochat, torch.randn
x, fc, proj = (t.requires_grad_() for t in (r(6, 16), r(64, 16) / 4, r(16, 64) / 8))
torch.library.opcheck(ops.relu2_mlp, (x, fc, proj))
a = torch.rand(6, 64)
torch.library.opcheck(ops.relu2_mlp_backward, (r(6, 16), r(6, 16), r(64, 16), r(16, 64), a))

reference = OPS["relu2_mlp"].reference
x3 = r(2, 3, 16, requires_grad=True)
compiled = torch.compile(lambda *t: fused.relu2_mlp_triton(*t), fullgraph=True, backend="aot_eager")
upstream = r(2, 3, 16)
expected = torch.autograd.grad(reference(x3, fc, proj), (x3, fc, proj), upstream)
for ours, theirs in zip(torch.autograd.grad(compiled(x3, fc, proj), (x3, fc, proj), upstream), expected):
    torch.testing.assert_close(ours, theirs)

# Descriptors and pointers are two ways to the same numbers, strided inputs included.
wide = r(150, 80)[:, :40]
fc, proj = r(200, 40) / 6, r(40, 200) / 14
for change in (lambda: None, lambda: setattr(fused, "has_tma", lambda *matrices: False)):
    change()
    torch.testing.assert_close(fused.relu2_mlp_triton(wide, fc, proj), reference(wide, fc, proj))
assert fused.relu2_mlp_triton(r(0, 40), fc, proj).shape == (0, 40)

# One hidden tensor is kept, nothing else of its size.
kept = []
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
    fused.relu2_mlp_triton(x3, *(t.requires_grad_() for t in (r(64, 16), r(16, 64))))
assert [t.shape for t in kept if t.numel() == 6 * 64] == [(6, 64)]
print("well-formed")
"""


def test_in_the_interpreter():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "well-formed" in done.stdout, done.stderr[-3000:]
