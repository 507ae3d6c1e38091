"""A linear layer in FP8: e4m3 for input and weight, e5m2 for the output's gradient, one scale per tensor.

    y = Q₄(x)·Q₄(w)ᵀ        dx = Q₅(dy)·Q₄(w)        dw = Q₅(dy)ᵀ·Q₄(x)        Q(t) = cast(clamp(t·s))/s

e4m3 (largest 448) has one bit more of precision, e5m2 (largest 57,344) one of range, which gradients need. With
current scaling s = largest/max|t|: the whole tensor must be seen before its first element can be cast. A scale known
in advance (static after a norm, delayed elsewhere) lets the producer cast; scale_x and scale_w pass one in.

The reference emulates the casts and multiplies in x's dtype, so it runs on any device; it is slow, and right.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost, Op, Tolerance

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def round_to_fp8(x: Tensor, dtype: torch.dtype, scale: Tensor | float | None = None) -> Tensor:
    """x as FP8 would hold it, in x's dtype. scale: the factor before the cast, None takes it from max|x|."""
    largest = torch.finfo(dtype).max
    x32 = x.float()
    if scale is None:
        scale = largest / x32.abs().amax().clamp(min=1e-12)
    return ((x32 * scale).clamp(-largest, largest).to(dtype).float() / scale).to(x.dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale_x, scale_w):
        x8, w8 = round_to_fp8(x, E4M3, scale_x), round_to_fp8(weight.to(x.dtype), E4M3, scale_w)
        ctx.save_for_backward(x8, w8)
        ctx.weight_dtype = weight.dtype
        return x8 @ w8.mT

    @staticmethod
    def backward(ctx, grad):
        x8, w8 = ctx.saved_tensors
        g8 = round_to_fp8(grad, E5M2)
        grad_w = g8.flatten(0, -2).mT @ x8.flatten(0, -2)
        return g8 @ w8, grad_w.to(ctx.weight_dtype), None, None


def fp8_linear_reference(
    x: Tensor, weight: Tensor, *, scale_x: Tensor | float | None = None, scale_w: Tensor | float | None = None
) -> Tensor:
    """(..., out) in x's dtype from x (..., in) and weight (out, in), any float dtype."""
    return _Fp8Linear.apply(x, weight, scale_x, scale_w)


def _cases() -> Iterator[Case]:
    def make(rows, c, out, scales=False):
        def build(device, dtype, generator):
            x = normal((*rows, c), device, dtype, generator)
            weight = normal((out, c), device, torch.float32, generator, c**-0.5)
            return (x, weight), ({"scale_x": 32.0, "scale_w": 256.0} if scales else {})

        return build

    yield Case("current scaling", make((2, 16), 128, 256))
    yield Case("given scales", make((2, 16), 128, 256, scales=True))
    yield Case("d12 mlp", make((8, 2048), 768, 3072), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, weight = args
    rows = x.numel() // x.size(-1)
    moved = x.numel() * (x.element_size() + 1) + weight.numel() * 2 + rows * weight.size(0) * x.element_size()
    return Cost(moved, 2 * rows * weight.numel())


fp8_linear = Op(
    "fp8_linear",
    torch=fp8_linear_reference,
    cases=_cases,
    cost=_cost,
    # Rounding before the cast may move a value to the neighboring FP8 number: one part in sixteen of a term.
    tolerance=Tolerance(factor=2.0, float32=1e-2, bfloat16=2e-2, float16=2e-2),
    differentiable=("x", "weight"),
)
