"""Linear layers in FP8: e4m3 for input and weight, e5m2 for the output's gradient, one scale per tensor.

    y = x8·w8ᵀ        dx = g8·w8        dW = g8ᵀ·x8        g8 = the output's gradient, cast once for both products

What crosses from forward to backward is x8ᵀ, one byte an element where bf16 keeps two. Every operand exists in the
order its product wants (see fp8_quantize.py), so that the three products are torch._scaled_mm as it stands, on devices
that have it: Ada, Hopper and later. Elsewhere the product is emulated: the same FP8 numbers, multiplied in float32.
Products of FP8 numbers are exact there, so an emulated curve shows what the format costs, on any machine.

`scales` (2,) are the delayed scales of x and of dy, 0 for current scaling. The amaxes that make the next scales leave
by the one channel that autograd offers out of a backward pass: they are returned as the gradient of `scales`. Nothing
is written in place, and compiled code needs to know nothing of it (Flax's FP8 layers do likewise).

Weights change once a step and are used in every micro-batch, so they may come cast already (`Fp8Weight`, which the
model renews after each update); then nothing is read of the float32 weights here. Several weights that share an input
are one product over their outputs side by side backward: one dx instead of three and their sum.

Bytes moved for an element of x, dy and y (bf16 in and out), beside the products' own reads:
    here         x: 2 + 1 + 1          dy: 2 + 1 + 1           weights 4 + 4 + 1 + 1, once a step
    tensorwise   x: 2, 2 + 1, 1 + 1    dy: 2, 2 + 1, 1 + 1     weights 4, 4 + 1, 1 + 1, in every micro-batch
in passes for amax, cast and transpose; the second line is karpathy/nanochat's, as its operations stand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_kernels.fp8_quantize import E4M3, fp8_quantize_reference
from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost, Op, Tolerance
from nanochat_kernels.triton_support import needs_triton

Quantize = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class Fp8Weight(NamedTuple):
    """Weights with the same input, cast side by side."""

    data: Tensor  # (out, in) e4m3
    transposed: Tensor  # (in, out) e4m3
    inverse: Tensor  # 0-d float32: what an element is multiplied by to come back


def quantizer(triton: bool) -> Quantize:
    """fp8_quantize of a backend."""
    if not triton:
        return fp8_quantize_reference
    from nanochat_kernels.fp8_quantize_triton import fp8_quantize_triton

    return fp8_quantize_triton


def cast_weights(weights: Sequence[Tensor], triton: bool) -> Fp8Weight:
    """Weights (outᵢ, in) cast with the current scale of all of them together."""
    first = weights[0]
    rows = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else first.detach()
    return Fp8Weight(*quantizer(triton)([rows], first.new_zeros((), dtype=torch.float32))[:3])


@functools.cache
def has_fp8_products(device: torch.device) -> bool:
    """Does torch multiply FP8 matrices there?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_matmul(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a (M, K) times b (N, K) transposed, both FP8 and contiguous, as (M, N) in `dtype`.

    fast: sums may be kept with fewer bits on the tensor cores (some 14), as is usual forward. On devices with FP8
    products M, N and K are multiples of 16.
    """
    if has_fp8_products(a.device) and dtype != torch.float64:
        scales = inverse_a.reshape(1, 1), inverse_b.reshape(1, 1)
        return torch._scaled_mm(a, b.mT, scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=fast)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    product = a.to(working) @ b.to(working).mT
    return (product * (inverse_a * inverse_b).to(working)).to(dtype)


def products(y8: Tensor, inverse: Tensor, w8: Fp8Weight, widths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """y8 times each of the weights in w8, whose outputs are `widths` wide."""
    return [fp8_matmul(y8, part, inverse, w8.inverse, dtype, fast=True) for part in w8.data.split(list(widths))]


def gradients(
    parts: Sequence[Tensor], scale: Tensor, x8t: Tensor, inverse_x: Tensor, w8: Fp8Weight, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (M, in), dW (out, in) float32, amax of the gradient) from the gradients (M, outᵢ) of the products."""
    dtype = parts[0].dtype
    g8, g8t, inverse, amax = quantizer(triton)(list(parts), scale, True)
    dx = fp8_matmul(g8, w8.transposed, inverse, w8.inverse, dtype, fast=False)
    return dx, fp8_matmul(g8t, x8t, inverse, inverse_x, weight_dtype(dtype), fast=False), amax


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients of master weights are float32 (float64 where references are evaluated)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("nanochat::fp8_linear", mutates_args=())
def _fp8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, w8: list[Tensor], triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, x8ᵀ, its inverse scale, amax of x) of x (M, in)."""
    x8, x8t, inverse, amax = quantizer(triton)([x], scales[0])
    cast = Fp8Weight(*w8)
    (y,) = products(x8, inverse, cast, [cast.data.size(0)], x.dtype)
    return y, x8t, inverse, amax


@_fp8_linear.register_fake
def _(x, weight, scales, w8, triton):
    scalar = scales.new_empty((), dtype=torch.float32)
    x8t = x.new_empty((x.size(1), x.size(0)), dtype=E4M3)
    return x.new_empty((x.size(0), weight.size(0))), x8t, scalar, torch.empty_like(scalar)


@torch.library.custom_op("nanochat::fp8_gradients", mutates_args=())
def _fp8_gradients(
    parts: list[Tensor], scale: Tensor, x8t: Tensor, inverse_x: Tensor, w8: list[Tensor], triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(parts, scale, x8t, inverse_x, Fp8Weight(*w8), triton)


@_fp8_gradients.register_fake
def _(parts, scale, x8t, inverse_x, w8, triton):
    (channels, rows), outputs = x8t.shape, w8[0].size(0)
    dw = parts[0].new_empty((outputs, channels), dtype=weight_dtype(parts[0].dtype))
    return parts[0].new_empty((rows, channels)), dw, scale.new_empty((), dtype=torch.float32)


def _setup(ctx, inputs, output):
    _, weight, scales, w8, ctx.triton = inputs
    ctx.save_for_backward(scales, *w8, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.weight_dtype = weight.dtype


def _backward(ctx, dy, *_):
    scales, data, transposed, inverse_w, x8t, inverse_x, amax_x = ctx.saved_tensors
    w8 = [data, transposed, inverse_w]
    dx, dw, amax = torch.ops.nanochat.fp8_gradients([dy], scales[1], x8t, inverse_x, w8, ctx.triton)
    return dx, dw.to(ctx.weight_dtype), torch.stack([amax_x, amax]).to(scales.dtype), [None] * 3, None


_fp8_linear.register_autograd(_backward, setup_context=_setup)


def _linear(x: Tensor, weight: Tensor, scales: Tensor | None, weight8: Fp8Weight | None, triton: bool) -> Tensor:
    scales = x.new_zeros(2, dtype=torch.float32) if scales is None else scales
    w8 = cast_weights([weight], triton) if weight8 is None else weight8
    y, *_ = torch.ops.nanochat.fp8_linear(x.flatten(0, -2), weight, scales, list(w8), triton)
    return y.unflatten(0, x.shape[:-1])


def fp8_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor | None = None, weight8: Fp8Weight | None = None
) -> Tensor:
    """(..., out) in x's dtype from x (..., in) and weight (out, in), any float dtype.

    scales (2,) float32: of x and of dy; their gradient is max|x| and max|dy|. weight8: the weight, cast already.
    """
    return _linear(x, weight, scales, weight8, triton=False)


def fp8_linear_triton(
    x: Tensor, weight: Tensor, scales: Tensor | None = None, weight8: Fp8Weight | None = None
) -> Tensor:
    """As the reference, casting with Triton."""
    return _linear(x, weight, scales, weight8, triton=True)


def _cases() -> Iterator[Case]:
    def make(rows, c, out, scales=None):
        def build(device, dtype, generator):
            x = normal((*rows, c), device, dtype, generator)
            weight = normal((out, c), device, torch.float32, generator, c**-0.5)
            return (x, weight), ({} if scales is None else {"scales": torch.tensor(scales, device=device)})

        return build

    yield Case("current scaling", make((2, 16), 128, 256))
    yield Case("given scales", make((2, 16), 128, 256, [32.0, 4096.0]))
    yield Case("d12 output", make((8, 2048), 768, 768, [32.0, 4096.0]), size="model")
    yield Case("d24 output", make((8, 2048), 1536, 1536, [32.0, 4096.0]), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, weight = args[:2]
    rows = x.numel() // x.size(-1)
    cast = x.numel() * (x.element_size() + 2) + weight.numel() * (weight.element_size() + 2)
    return Cost(cast + x.numel() + weight.numel() + rows * weight.size(0) * x.element_size(), 2 * rows * weight.numel())


# Rounding before the cast may move a value to the neighboring FP8 number: one part in sixteen of a term.
TOLERANCE = Tolerance(factor=2.0, float32=1e-2, bfloat16=2e-2, float16=2e-2)

fp8_linear = Op(
    "fp8_linear",
    torch=fp8_linear_reference,
    triton=fp8_linear_triton,
    available={"triton": needs_triton},
    auto=(("triton", lambda place: place.device.type == "cuda", "casts in one pass, products by torch"),),
    custom=("triton",),
    cases=_cases,
    cost=_cost,
    tolerance=TOLERANCE,
    differentiable=("x", "weight", "scales"),
)
