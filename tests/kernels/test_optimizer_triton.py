"""The optimizer's and the sampler's Triton kernels in the interpreter: what the declared cases do not reach."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
PRELUDE = "import torch\nfrom nanochat_kernels import OPS\ng = torch.Generator().manual_seed(0)\n"


def interpreted(code):
    """Triton reads TRITON_INTERPRET when a kernel's module is imported, so the code gets a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    arguments = [sys.executable, "-c", PRELUDE + code + "\nprint('agrees')"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr[-3000:]


def test_adamw_many_tensors_of_any_size_place_and_group():
    interpreted("""
op, memory = OPS["adamw_update"], torch.randn(4, 9000, generator=g)
sizes = [1, 16, 17, 2048, 2049, 0, 300]
def tensors():
    copies, start, result = memory.clone(), 1, []  # the first ones do not lie where wide accesses may begin
    for size in sizes:
        result.append([row[start : start + size] for row in copies])
        start += size
    p, gr, m, v = map(list, zip(*result))
    matrix = [x.reshape(40, 50).T for x in copies[:, 7000:]]  # not contiguous, and its gradient is
    v = [x.square_() for x in (*v, matrix[3])]
    return p + [matrix[0]], gr + [matrix[1].contiguous()], m + [matrix[2]], v
numbers = dict(step=3, beta1=0.8, beta2=[0.9 + 0.01 * i for i in range(8)], eps=1e-10)
numbers |= dict(lr=[0.01 * (i + 1) for i in range(8)], decay=[0.1 * (i % 2) for i in range(8)])
a, b = tensors(), tensors()
op.reference(*a, **numbers)
op.load("triton")(*b, **numbers)
for x, y in zip(sum(a, []), sum(b, [])):
    torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
c = tensors()
on_device = numbers | dict(lr=[torch.tensor(x) for x in numbers["lr"]], decay=torch.tensor(0.1), step=torch.tensor(3))
op.load("triton")(*c, **on_device)
assert all(torch.isfinite(x).all() for x in c[0])
""")


def test_symmetric_product_is_mirrored():
    interpreted("""
from nanochat_kernels.orthogonalize_triton import symmetric_product
for k, m, n in ((2, 70, 33), (1, 1, 9), (1, 200, 64)):
    x = torch.randn(k, m, n, generator=g)
    expected = x @ x.mT
    for view in (x, x.mT.contiguous().mT):
        out = symmetric_product(view)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(out[:, 32:, :32], out[:, :32, 32:].mT)  # other tiles than those on the diagonal
    square = expected / expected.norm()
    both = symmetric_product(square, square, 0.5, 2.0)
    torch.testing.assert_close(both, 0.5 * square @ square + 2 * square, atol=1e-6, rtol=1e-4)
""")


def test_orthogonality_where_it_is_hard_by_every_way():
    interpreted("""
from nanochat_kernels.orthogonalize_triton import WAYS
q1, q2 = (torch.linalg.qr(torch.randn(n, 24, generator=g, dtype=torch.float64))[0] for n in (32, 72))
spectra = {"ill": torch.logspace(0, -3, 24), "deficient": (torch.arange(24) < 3) + 0.0, "zero": torch.zeros(24)}
for name, spectrum in spectra.items():
    for scale in (1.0, 1e12):
        x = ((q1 * spectrum) @ q2.T * scale).float()[None]
        expected = OPS["orthogonalize"].reference(x.double())
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        for way, iterate in WAYS.items():
            for matrix, truth in ((x, expected), (x.mT, expected.mT)):
                result = iterate(matrix / (1.01 * norm + 1e-6), 5)
                assert (result - truth).abs().max() < 2e-4, (name, way)
""")


def test_muon_with_numbers_on_the_device_and_extreme_gradients():
    interpreted("""
op = OPS["muon_update"]
for shape, scale in (((2, 6, 20), 1.0), ((1, 20, 6), 1e12), ((1, 5, 5), 1e-3)):
    k, m, n = shape
    def state():
        h = torch.Generator().manual_seed(1)
        w, grad, momentum = (torch.randn(shape, generator=h) for _ in range(3))
        return w, grad * scale, momentum * scale, torch.rand((k, m, 1) if m >= n else (k, 1, n), generator=h)
    a, b, c = state(), state(), state()
    numbers = dict(lr=0.02, mu=0.9, decay=0.1)
    op.reference(*a, **numbers)
    op.load("triton")(*b, **numbers)
    op.load("triton")(*c, **{name: torch.tensor(x) for name, x in numbers.items()})
    for i in (0, 2, 3):
        torch.testing.assert_close(b[i], a[i], atol=2e-5 * (scale if i == 2 else 1), rtol=2e-5)
        torch.testing.assert_close(c[i], b[i], atol=1e-6 * (scale if i == 2 else 1), rtol=1e-5)
try:
    op.load("triton")(*(x.mT for x in state()), **numbers)
except ValueError as error:
    assert "contiguous" in str(error)
""")


def test_draws_equal_the_reference_through_ties_masks_and_blocks():
    interpreted("""
from nanochat_kernels import sample_triton
op, kernel = OPS["sample"], OPS["sample"].load("triton")
sample_triton.BLOCK = 32  # several blocks, the last one partly filled
logits = torch.randn(16, 75, generator=g) * 2
logits[4:8] = logits[4:8].round()
logits[8:10] = 0.0
logits[10:12, 20:] = -torch.inf
logits[12:14, ::2] = -0.0
seeds, positions = (torch.randint(0, 2**62, (16,), generator=g) for _ in range(2))
full = lambda value, dtype=torch.float32: torch.full((16,), value, dtype=dtype)
settings = ((0, 1.0, 0.0, 0.7), (7, 1.0, 0.0, 1.0), (0, 0.6, 0.0, 1.0), (12, 0.8, 0.05, 1.5), (90, 0.99, 0.0, 0.0))
for k, p, least, t in settings:
    options = dict(temperature=full(t), top_k=full(k, torch.int64), top_p=full(p), min_p=full(least))
    expected, drawn = op.reference(logits, seeds, positions, **options), kernel(logits, seeds, positions, **options)
    assert torch.equal(expected, drawn), (k, p, least, t, (expected != drawn).nonzero())
""")
