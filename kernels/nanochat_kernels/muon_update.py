"""One Muon step on a stack of equally shaped matrices, in place.

    1. Nesterov      M ← μM + (1−μ)G,   X = (1−μ)G + μM
    2. equilibrate   every row of X scaled to the mean row norm (arXiv 2603.28254), in the compute dtype
    3. orthogonalize Polar Express, see orthogonalize.py
    4. renormalize   ‖X‖_F ← √min(m, n), the norm of an exactly orthogonal matrix
    5. NorMuon       rows (or columns, when wide) divided by a running root mean square, norm kept (arXiv 2510.05491)
    6. cautious      W ← W − lr·X − lr·λ·W where the step and the weight agree in sign, else W − lr·X

Matrices of one shape are stacked, (K, m, n), so that each matrix product of step 3 is one batched call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.numerics import normal, product_dtype, wide
from nanochat_kernels.orthogonalize import ROUNDING_GROWTH, orthogonalize_blas, orthogonalize_reference
from nanochat_kernels.registry import Case, Cost, Op, Tolerance
from nanochat_kernels.triton_support import needs_triton

Number = float | Tensor


def muon_update_reference(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    second: Tensor,
    *,
    lr: Number,
    mu: Number,
    decay: Number,
    beta2: Number = 0.9,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Update params, momentum and second in place; grads may be overwritten.

    params, grads, momentum: (K, m, n) float32. second: (K, m, 1) when m ≥ n, else (K, 1, n). lr already contains the
    factor √max(1, m/n). compute_dtype: the precision of step 3.
    """
    momentum.lerp_(grads, 1 - mu)
    x = grads.lerp(momentum, mu).to(compute_dtype)
    x = orthogonalize_reference(_equilibrate(x)).to(params.dtype)
    _apply(params, _normalize(x, second, beta2), lr, decay)


def muon_update_blas(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    second: Tensor,
    *,
    lr: Number,
    mu: Number,
    decay: Number,
    beta2: Number = 0.9,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """The reference with fewer passes over memory: grads holds the step, and norms scale once."""
    momentum.lerp_(grads, 1 - mu)
    x = grads.lerp_(momentum, mu).to(product_dtype(compute_dtype, params.device))
    x = orthogonalize_blas(_equilibrate(x)).to(params.dtype)
    m, n = x.shape[-2:]
    mean_square = torch.linalg.vector_norm(x, dim=-1 if m >= n else -2, keepdim=True).square_().div_(min(m, n))
    total = mean_square.sum(dim=(-2, -1), keepdim=True).mul_(min(m, n)).sqrt_()
    snap = min(m, n) ** 0.5 / total.clamp(min=1e-6)
    scale = snap * _running_scale(mean_square * snap.square(), second, beta2, min(m, n))
    _apply(params, x.mul_(scale), lr, decay)


def _equilibrate(x: Tensor) -> Tensor:
    rows = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True)
    target = torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True) / x.size(-2) ** 0.5
    return x * (target / rows.clamp(min=1e-6)).to(x.dtype)


def _normalize(x: Tensor, second: Tensor, beta2: Number) -> Tensor:
    """Steps 4 and 5."""
    m, n = x.shape[-2:]
    x = x * (min(m, n) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))
    mean_square = x.square().mean(dim=-1 if m >= n else -2, keepdim=True)
    return x * _running_scale(mean_square, second, beta2, min(m, n))


def _running_scale(mean_square: Tensor, second: Tensor, beta2: Number, count: int) -> Tensor:
    """NorMuon's factor for each row or column: its running rms inverted, times what keeps the whole norm."""
    second.lerp_(mean_square.to(second.dtype), 1 - beta2)
    scale = second.clamp(min=1e-10).rsqrt()
    before = (mean_square * count).sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (mean_square * count * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return scale * (before / after.clamp(min=1e-10))


def _apply(params: Tensor, x: Tensor, lr: Number, decay: Number) -> None:
    shrink = (lr * decay) * (params * ((x * params) >= 0))
    params.sub_(lr * x + shrink)


def _cases() -> Iterator[Case]:
    def make(shape, zero=False):
        def build(device, dtype, generator):
            def f32(scale=1.0):
                return normal(shape, device, torch.float32, generator, scale)

            params, grads, momentum = f32(0.05), f32(0.0 if zero else 1e-3), f32(0.0 if zero else 1e-3)
            k, m, n = shape
            second = torch.rand((k, m, 1) if m >= n else (k, 1, n), generator=generator).to(device) * 0.1
            kwargs = {"lr": 0.02, "mu": 0.9, "decay": 0.2, "compute_dtype": dtype}
            return (params, grads, momentum, second), kwargs

        return build

    yield Case("square", make((3, 64, 64)))
    yield Case("wide", make((2, 32, 128)))
    yield Case("tall", make((2, 128, 32)))
    yield Case("gate", make((4, 2, 12)), size="odd")
    yield Case("prime", make((1, 37, 53)), size="odd")
    yield Case("zero gradient", make((2, 16, 16), zero=True), size="odd")
    yield Case("d12 projection", make((48, 768, 768)), size="model")
    yield Case("d12 mlp", make((12, 3072, 768)), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    k, m, n = args[0].shape
    short, long = sorted((m, n))
    return Cost(5 * 4 * k * m * n, 5 * k * (4 * short**2 * long + 2 * short**3) + 20 * k * m * n)


muon_update = Op(
    "muon_update",
    torch=muon_update_reference,
    blas=muon_update_blas,
    triton="nanochat_kernels.muon_update_triton:muon_update_triton",
    available={"triton": needs_triton},
    custom=("triton",),
    auto=(("blas", lambda place: place.device.type == "cpu", "sums folded into the products, fewer passes"),),
    cases=_cases,
    cost=_cost,
    # The error of the orthogonal factor enters `second` as a square, weighted by 1 − β₂: a fifth of it, relatively.
    tolerance=Tolerance(
        float32=0.2 * ROUNDING_GROWTH * 2**-24 + 4e-6, bfloat16=0.2 * ROUNDING_GROWTH * 2**-9, float16=3e-3
    ),
    mutates=("params", "momentum", "second"),
)
