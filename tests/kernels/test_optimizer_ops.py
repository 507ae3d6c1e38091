"""Orthogonality where it is hard, the optimizer steps by their formulas, and what in-place means."""

import pytest
import torch

from nanochat_kernels import OPS
from nanochat_kernels.registry import Place

ORTHOGONALIZE = OPS["orthogonalize"]
G = torch.Generator


def on_this_cpu(op):
    place = Place(torch.device("cpu"), torch.float32, "train-eager")
    return [name for name in op.backends if name not in op.available or op.available[name](place) is None]


def singular_values(x):
    return torch.linalg.svdvals(x.double())


def with_spectrum(values, m, n, seed=0):
    g = G().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, len(values), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64))
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.fixture(params=on_this_cpu(ORTHOGONALIZE))
def orthogonalize(request):
    return ORTHOGONALIZE.load(request.param)


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0.5, 1.2), (torch.bfloat16, 0.4, 1.3)])
def test_random_matrices_become_orthogonal(orthogonalize, shape, dtype, low, high):
    x = torch.randn(3, *shape, generator=G().manual_seed(1)).to(dtype)
    values = singular_values(orthogonalize(x))
    assert values.min() > low and values.max() < high


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3])
def test_ill_conditioned_directions_are_kept_and_lifted(orthogonalize, condition):
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 16).tolist()
    x = with_spectrum(spectrum, 48, 32).float()
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    result = orthogonalize(x).double()
    lifted = (u[:, :16].T @ result @ vt[:16].T).diagonal()
    assert lifted.min() > 0.5 and lifted.max() < 1.3
    off = u[:, :16].T @ result @ vt[:16].T - torch.diag(lifted)
    assert off.abs().max() < 0.01


def test_rank_deficient_matrices_stay_rank_deficient(orthogonalize):
    x = with_spectrum([1.0, 0.5, 0.25], 40, 24).float()
    values = singular_values(orthogonalize(x))
    assert values[:3].min() > 0.5 and values[:3].max() < 1.3 and values[3:].max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(orthogonalize, dtype):
    assert (orthogonalize(torch.zeros(2, 8, 16, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("scale", [1e15, 1e-2, 1e4])
def test_scale_does_not_matter(orthogonalize, scale):
    x = torch.randn(24, 40, generator=G().manual_seed(2))
    torch.testing.assert_close(orthogonalize(x * scale), orthogonalize(x), atol=1e-3, rtol=1e-3)


def test_the_input_is_left_alone(orthogonalize):
    x = torch.randn(8, 12)
    before = x.clone()
    orthogonalize(x)
    assert torch.equal(x, before)


def muon_state(shape, seed=3):
    g = G().manual_seed(seed)
    k, m, n = shape
    w, grad, momentum = (torch.randn(shape, generator=g) for _ in range(3))
    second = torch.rand((k, m, 1) if m >= n else (k, 1, n), generator=g)
    return w, grad, momentum, second


@pytest.fixture(params=on_this_cpu(OPS["muon_update"]))
def muon(request):
    return OPS["muon_update"].load(request.param)


@pytest.mark.parametrize("shape", [(2, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_muon_step_by_step(muon, shape):
    """The six steps once more, one matrix at a time, in float64."""
    w, grad, momentum, second = muon_state(shape)
    expected = [x.double().clone() for x in (w, momentum, second)]
    lr, mu, decay, beta2 = 0.02, 0.9, 0.3, 0.9
    for i in range(shape[0]):
        gi = grad[i].double()
        expected[1][i] = mu * expected[1][i] + (1 - mu) * gi
        x = (1 - mu) * gi + mu * expected[1][i]
        x = x * (x.norm() / shape[1] ** 0.5) / x.norm(dim=1, keepdim=True)
        x = ORTHOGONALIZE.reference(x)
        x = x * min(shape[1:]) ** 0.5 / x.norm()
        v = (x**2).mean(dim=1 if shape[1] >= shape[2] else 0, keepdim=True)
        expected[2][i] = beta2 * expected[2][i] + (1 - beta2) * v
        scaled = x / expected[2][i].sqrt()
        x = scaled * x.norm() / scaled.norm()
        expected[0][i] -= lr * x + lr * decay * expected[0][i] * (x * expected[0][i] >= 0)
    muon(w, grad, momentum, second, lr=lr, mu=mu, decay=decay, beta2=beta2)
    for result, value in zip((w, momentum, second), expected):
        torch.testing.assert_close(result.double(), value, atol=2e-5, rtol=2e-5)


def test_muon_with_tensors_for_numbers(muon):
    a, b = muon_state((2, 8, 12)), muon_state((2, 8, 12))
    muon(*a, lr=0.02, mu=0.9, decay=0.1)
    muon(*b, lr=torch.tensor(0.02), mu=torch.tensor(0.9), decay=torch.tensor(0.1))
    for x, y in zip((a[0], a[2], a[3]), (b[0], b[2], b[3])):
        torch.testing.assert_close(x, y)


def test_muon_without_gradient_and_momentum_is_finite(muon):
    w = torch.randn(1, 8, 8)
    before = w.clone()
    muon(w, torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 8, 1), lr=0.1, mu=0.9, decay=0.0)
    assert torch.equal(w, before)


def test_muon_survives_huge_gradients(muon):
    w, grad, momentum, second = muon_state((2, 16, 24))
    muon(w, grad * 1e12, momentum, second, lr=0.02, mu=0.9, decay=0.1)
    assert torch.isfinite(w).all() and torch.isfinite(second).all()


@pytest.fixture(params=on_this_cpu(OPS["adamw_update"]))
def adamw(request):
    return OPS["adamw_update"].load(request.param)


def test_adamw_against_torch(adamw):
    """torch.optim.AdamW has the same formula in float32: ten steps of it."""
    g = G().manual_seed(4)
    mine = [torch.randn(5, 7, generator=g), torch.randn(3, generator=g)]
    theirs = [p.clone().requires_grad_() for p in mine]
    optimizer = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    m, v = ([torch.zeros_like(p) for p in mine] for _ in range(2))
    for step in range(1, 11):
        grads = [torch.randn(p.shape, generator=g) for p in mine]
        for p, grad in zip(theirs, grads):
            p.grad = grad.clone()
        optimizer.step()
        adamw(mine, grads, m, v, step=step, lr=0.03, beta1=0.8, beta2=0.95, eps=1e-10, decay=0.1)
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q.detach())


def test_adamw_keeps_16_bit_parameters_and_moments_in_place(adamw):
    p = torch.randn(64, dtype=torch.bfloat16)
    m, v, address = torch.zeros_like(p), torch.zeros_like(p), p.data_ptr()
    before = p.clone()
    grad = torch.randn(64, dtype=torch.bfloat16)
    adamw([p], [grad], [m], [v], step=1, lr=0.5, beta1=0.8, beta2=0.95, eps=1e-10, decay=0.0)
    assert p.data_ptr() == address and {x.dtype for x in (p, m, v)} == {torch.bfloat16}
    # The first step of Adam is lr in the direction of the sign.
    torch.testing.assert_close(p.float(), before.float() - 0.5 * grad.float().sign(), atol=0.02, rtol=0.01)


def test_adamw_mixes_dtypes_in_a_group(adamw):
    p = [torch.ones(4), torch.ones(4, dtype=torch.bfloat16), torch.ones(())]
    rest = [[torch.ones_like(x) for x in p] for _ in range(3)]
    adamw(p, *rest, step=2, lr=0.1, beta1=0.8, beta2=0.95, eps=1e-10, decay=0.0)
    assert all((x < 1).all() for x in p)


def test_the_tolerance_is_the_growth_of_roundings():
    """The recursion of orthogonalize.py's ROUNDING_GROWTH, evaluated."""
    from nanochat_kernels.orthogonalize import COEFFICIENTS, ROUNDING_GROWTH

    x = torch.logspace(-3, -(torch.tensor(1.01).log10().item()), 4000, dtype=torch.float64)
    variance = x**2
    for a, b, c in COEFFICIENTS:
        value = a * x + b * x**3 + c * x**5
        slope = a + 3 * b * x**2 + 5 * c * x**4
        variance = slope**2 * variance + (a * x) ** 2 + (b * x**3) ** 2 + (c * x**5) ** 2 + value**2
        x = value
    growth = (variance / x**2).mean().sqrt().item()
    assert growth == pytest.approx(ROUNDING_GROWTH, rel=0.02)


@pytest.mark.parametrize("kind", ["random", "square", "ill-conditioned", "one direction and noise"])
def test_gram_way_in_bf16_is_no_worse_than_the_steps(kind):
    """Restarted every other step it is about as exact as the reference in bf16; without restarts it is not."""
    pytest.importorskip("triton")
    from nanochat_kernels import orthogonalize_triton as module

    g = G().manual_seed(0)
    m, n = (96, 96) if kind == "square" else (96, 384)
    x = torch.randn(m, n, generator=g, dtype=torch.float64)
    if kind == "ill-conditioned":
        x = with_spectrum(torch.logspace(0, -4, m).tolist(), m, n)
    if kind == "one direction and noise":
        x = with_spectrum([1.0], m, n) + 1e-3 * x
    truth = ORTHOGONALIZE.reference(x)
    low = x.bfloat16()
    reference = (ORTHOGONALIZE.reference(low).double() - truth).norm() / truth.norm()
    normalized = (x / (1.01 * x.norm())).bfloat16()[None]
    gram = module.iterate_gram(normalized, product=module._plain_product)[0].double()
    assert (gram - truth).norm() / truth.norm() < 1.5 * reference + 0.01


def test_work_of_the_ways():
    pytest.importorskip("triton")
    from nanochat_kernels.orthogonalize_triton import products

    assert products("symmetric", 1024, 1024) == 5 * 2 * (2 * 1024**3)  # of three products two halves
    assert products("symmetric", 768, 3072) / products("blas", 768, 3072) == pytest.approx(6.5 / 9)
    assert products("gram", 768, 3072) < 0.7 * products("blas", 768, 3072)
