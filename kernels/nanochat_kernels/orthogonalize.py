"""Polar Express: the nearest (semi-)orthogonal matrix, by five matrix polynomials instead of an SVD.

    X ← X / (1.01·‖X‖_F + 10⁻⁶)
    X ← aX + (bA + cA²)X, A = XXᵀ          for (a, b, c) in COEFFICIENTS; with A = XᵀX from the right when tall

Each step applies the odd polynomial ap + bp³ + cp⁵ to every singular value; the coefficients are the best at each
step for the interval that the one before leaves (Amsel, Persson, Musco, Gower: arXiv 2505.16932). Working on the
shorter side keeps A small. Compute-bound: per step 2·(2·m²·n) + 2·m³ FLOPs for m ≤ n, of which a symmetric product
could save a half.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.numerics import normal, product_dtype
from nanochat_kernels.registry import Case, Cost, Op, Tolerance
from nanochat_kernels.triton_support import needs_triton

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


ROUNDING_GROWTH = 53
"""How many roundings of a result the five steps make of one rounding in each of their terms.

With x_t a singular value's path and independent roundings of relative size u, the variance of its error follows

    e²_{t+1} = p'(x_t)²·e²_t + u²·((a·x)² + (bx³)² + (cx⁵)² + p(x)²)

since the terms cancel (8.2 − 22.5 + 15.9 at x = 1) before the next steps stretch what is left. The number is e₅/x₅ in
units of u, as root mean square over singular values from 10⁻³ to 1 (evenly in their logarithm): about 0.1 in bf16.
"""


def orthogonalize_reference(x: Tensor, steps: int = 5) -> Tensor:
    """A new tensor like x, (m, n) or (K, m, n), with singular values near 1 where x's were not negligible."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in COEFFICIENTS[:steps]:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def orthogonalize_blas(x: Tensor, steps: int = 5) -> Tensor:
    """The same with the sums folded into the matrix products (baddbmm): three calls a step, no elementwise passes."""
    shape, dtype = x.shape, x.dtype
    x = x.reshape(-1, *shape[-2:]).to(product_dtype(dtype, x.device))
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    return iterate_blas(x, steps).reshape(shape).to(dtype)


def iterate_blas(x: Tensor, steps: int = 5) -> Tensor:
    """The steps alone, on normalized (K, m, n)."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in COEFFICIENTS[:steps]:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _cases() -> Iterator[Case]:
    def make(shape, scale=1.0):
        def build(device, dtype, generator):
            return (normal(shape, device, dtype, generator, scale),), {}

        return build

    yield Case("square", make((3, 64, 64)))
    yield Case("wide", make((2, 32, 128)))
    yield Case("tall", make((2, 128, 32)))
    yield Case("single", make((48, 64), 1e-3))
    yield Case("gate", make((4, 2, 12)), size="odd")
    yield Case("prime", make((1, 37, 53)), size="odd")
    yield Case("row", make((2, 1, 5)), size="odd")
    yield Case("d12 projection", make((12, 768, 768)), size="model")
    yield Case("d12 mlp", make((12, 3072, 768)), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x = args[0]
    short, long = sorted(x.shape[-2:])
    matrices = x.numel() // (short * long)
    return Cost(2 * x.numel() * x.element_size(), 5 * matrices * (4 * short**2 * long + 2 * short**3))


orthogonalize = Op(
    "orthogonalize",
    torch=orthogonalize_reference,
    blas=orthogonalize_blas,
    triton="nanochat_kernels.orthogonalize_triton:orthogonalize_triton",
    available={"triton": needs_triton},
    custom=("triton",),
    auto=(("blas", lambda place: place.device.type == "cpu", "sums folded into the matrix products"),),
    cases=_cases,
    cost=_cost,
    tolerance=Tolerance(
        float32=ROUNDING_GROWTH * 2**-24, bfloat16=ROUNDING_GROWTH * 2**-9, float16=ROUNDING_GROWTH * 2**-12
    ),
)
