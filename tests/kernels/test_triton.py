"""Triton kernels without a GPU: values in the interpreter, well-formed ops, what the compiler makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments, interpret=True):
    """Triton reads TRITON_INTERPRET when a kernel's module is imported, so every use gets a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_values_and_gradients_in_the_interpreter(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = python("-m", "nanochat_kernels.verify", "--backends", "triton", "--device", "cpu", "--json", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert done.returncode == 0, [row for row in rows if row["verdict"] == "fail"]
    from nanochat_kernels import OPS

    ops = {name for name, op in OPS.items() if "triton" in op.backends}
    assert {row["op"] for row in rows if row["verdict"] == "pass"} == ops


OPCHECK = """
import torch
from nanochat_kernels import OPS, KernelPlan
import nanochat_kernels.rms_norm_triton, nanochat_kernels.rope_qk_norm_triton
ops, r = torch.ops.nanochat, torch.randn
x, s = r(2, 3, 16, requires_grad=True), torch.tensor(1.1, requires_grad=True)
torch.library.opcheck(ops.rms_norm, (x, r(2, 3, 16), s, r(2, 3, 16), torch.tensor([0.3], requires_grad=True)))
torch.library.opcheck(ops.rms_norm, (x, None, None, None, None))
q, k, v = (r(1, 3, n, 8, requires_grad=True) for n in (4, 2, 2))
ve, gate = r(1, 3, 16, requires_grad=True), r(1, 3, 2, requires_grad=True)
torch.library.opcheck(ops.rope_qk_norm, (q, k, v, r(3, 4), r(3, 4), ve, gate, 1.2))
torch.library.opcheck(ops.rope_qk_norm, (q, k, v, r(3, 4), r(3, 4), None, None, 1.2))

plan = KernelPlan.resolve("fused", "cpu", torch.float32, "train-compiled")
assert plan.choices["rms_norm"].backend == "triton", plan.report()

def block(x, s, q, k, v, ve, gate, cos, sin, plan):
    y, mixed = plan.rms_norm(x, x, s)
    q, k, v = plan.rope_qk_norm(q, k, v, cos, sin, ve, gate)
    return y.sum() + (mixed * mixed).sum() + (q * 2).sum() + (k * k * k).sum() + v.sum()

inputs = (x, s, q, k, v, ve, gate)
tables = (r(3, 4), r(3, 4))
expected = torch.autograd.grad(block(*inputs, *tables, KernelPlan.reference()), inputs)
compiled = torch.compile(lambda *a: block(*a, plan), fullgraph=True, backend="aot_eager")
for a, b in zip(torch.autograd.grad(compiled(*inputs, *tables), inputs), expected):
    torch.testing.assert_close(a, b)

head = OPS["linear_softcap_cross_entropy"]
triton_loss = head.load("triton")
w, y = r(64, 16, requires_grad=True), torch.randint(0, 64, (6,))
for softcap in (15.0, 100.0):  # the second is beyond what one pass may do without a maximum
    loss = torch.compile(lambda x, w: triton_loss(x, w, y, softcap=softcap), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(head.reference(x, w, y, softcap=softcap), (x, w))
    for a, b in zip(torch.autograd.grad(loss(x, w), (x, w)), expected):
        torch.testing.assert_close(a, b)
print("well-formed")
"""


def test_ops_are_well_formed_and_trace_in_one_graph():
    done = python("-c", OPCHECK)
    assert "well-formed" in done.stdout, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel carries ptxas for Linux only")
@pytest.mark.parametrize(
    "names",
    [
        ("attention dkdv 128 64x128", "attention forward 128 128x64", "adamw_update", "sample", "rms_norm backward"),
        pytest.param((), marks=pytest.mark.long),
    ],
    ids=["a few", "all"],
)
def test_compiled_for_hopper_within_the_recorded_allowances(names):
    chosen = ["--ops", *names] if names else []
    done = python("-m", "nanochat_kernels.verify", "--compile", "sm_90", *chosen, interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= max(5, len(names))


def test_spills_are_zero_or_explained_and_products_use_the_tensor_cores():
    from nanochat_kernels import compiled

    allowances = json.loads(compiled.ALLOWANCES.read_text())["sm_90"]
    assert {build.name for build in compiled.builds()} == set(allowances)
    for name, allowance in allowances.items():
        assert allowance["spill_bytes"] == 0 or allowance.get("explanation"), name
        if name.startswith(("attention", "orthogonalize", "relu2_mlp")):
            assert allowance["tensor_core"] > 0, name
        if name.startswith("attention"):
            assert allowance["bulk_copy"] > 0, name


def test_a_kernel_that_grew_is_red():
    from nanochat_kernels.compiled import Facts, compare

    allowance = {"registers": 40, "spill_bytes": 0, "shared_bytes": 32, "tensor_core": 8, "widest_access": 128}
    assert compare(Facts(40, 0, 32, 8, 0, 128), allowance) == []
    assert compare(Facts(41, 16, 32, 0, 0, 64), allowance) == [
        "registers 41 > 40", "spill_bytes 16 > 0", "tensor_core 0 < 8", "widest_access 64 < 128",
    ]  # fmt: skip
    assert compare(Facts(1, 0, 0, 0, 0, 128), None) == ["no allowance recorded"]


@pytest.mark.gpu
def test_every_backend_on_this_gpu():
    from nanochat_kernels import verify

    rows = verify.run(device="cuda")
    assert all(row.ok for row in rows), [row.summary() for row in rows if not row.ok]
