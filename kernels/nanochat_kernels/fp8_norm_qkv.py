"""The entry of a block in FP8: residual mix, norm, and the three products that read the normed rows.

    mixed = scale·(x + delta) + other_scale·other       y8 = cast(norm(mixed))       q, k, v = y8·w8ᵢᵀ

The norm is fp8_rms_norm: its result is cast where it is made, at a static scale, and exists in FP8 alone, but for the
first 16 channels, which gates read. Backward the gradients of all products are cast side by side into one matrix, with
one (delayed) scale: one product gives dy, one all of dW, and the norm's own backward pass follows from mixed. Kept for
it: y8ᵀ, one byte an element, and mixed, which the residual stream keeps anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.fp8_linear import TOLERANCE, Fp8Weight, cast_weights, gradients, products, weight_dtype
from nanochat_kernels.fp8_quantize import E4M3
from nanochat_kernels.fp8_rms_norm import HEAD, fp8_rms_norm_reference, static_scale
from nanochat_kernels.numerics import EPS, normal, wide
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.triton_support import needs_triton


def normed(triton: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp8_rms_norm of a backend; inputs as there."""
    if not triton:
        return fp8_rms_norm_reference(*inputs)  # type: ignore[arg-type]
    from nanochat_kernels.rms_norm_triton import fp8_rms_norm_triton

    return fp8_rms_norm_triton(*inputs)  # type: ignore[arg-type]


def norm_gradients(
    triton: bool,
    dy: Tensor,
    dmixed: Tensor | None,
    mixed: Tensor,
    x: Tensor,
    delta: Tensor | None,
    scale: Tensor | None,
    other: Tensor | None,
    other_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x and of delta, that of other or an empty tensor, (2,) those of the scales)."""
    if triton:
        import nanochat_kernels.rms_norm_triton  # noqa: F401  (registers the op)

        return torch.ops.nanochat.rms_norm_backward(dy, dmixed, mixed, x, delta, scale, other, other_scale)
    h, dy = wide(mixed), wide(dy)
    r = (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
    g = r * (dy - h * r * (dy * h * r).mean(-1, keepdim=True))
    if dmixed is not None:
        g = g + dmixed
    sums = g.new_zeros(2)
    if scale is not None:
        sums[0] = (g * (x if delta is None else x + delta)).sum()
    if other is None:
        dother = x.new_empty(0)
    else:
        sums[1] = (g * other).sum()
        dother = (g if other_scale is None else g * other_scale.reshape(())).to(x.dtype)
    return (g if scale is None else g * scale.reshape(())).to(x.dtype), dother, sums


def like_input(gradient: Tensor, given: Tensor | None) -> Tensor | None:
    """A scalar's gradient in its shape and dtype."""
    return None if given is None else gradient.reshape(given.shape).to(given.dtype)


@torch.library.custom_op("nanochat::fp8_norm_qkv", mutates_args=())
def _fp8_norm_qkv(
    x: Tensor, delta: Tensor | None, scale: Tensor | None, other: Tensor | None, other_scale: Tensor | None,
    weights: list[Tensor], scales: Tensor, w8: list[Tensor], triton: bool,
) -> list[Tensor]:  # fmt: skip
    """[the products' results, the first channels of y, mixed (empty when it is x), y8ᵀ]."""
    y8, y8t, head, mixed = normed(triton, x, delta, scale, other, other_scale)
    inverse = scales.new_full((), 1.0 / static_scale(x.size(1)), dtype=torch.float32)
    results = products(y8, inverse, Fp8Weight(*w8), [w.size(0) for w in weights], x.dtype)
    return [*results, head, x.new_empty(0) if mixed is x else mixed, y8t]


@_fp8_norm_qkv.register_fake
def _(x, delta, scale, other, other_scale, weights, scales, w8, triton):
    rows, channels = x.shape
    mixes = any(t is not None for t in (delta, scale, other))
    results = [x.new_empty((rows, w.size(0))) for w in weights]
    head, mixed = x.new_empty((rows, min(HEAD, channels))), x.new_empty((rows, channels) if mixes else (0,))
    return [*results, head, mixed, x.new_empty((channels, rows), dtype=E4M3)]


@torch.library.custom_op("nanochat::fp8_norm_qkv_backward", mutates_args=())
def _fp8_norm_qkv_backward(
    parts: list[Tensor], dhead: Tensor, dmixed: Tensor | None, mixed: Tensor, y8t: Tensor,
    x: Tensor, delta: Tensor | None, scale: Tensor | None, other: Tensor | None, other_scale: Tensor | None,
    scales: Tensor, w8: list[Tensor], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dother, (2,) gradients of the scalars, dW of all weights, amax of the products' gradients)."""
    inverse = scales.new_full((), 1.0 / static_scale(x.size(1)), dtype=torch.float32)
    dy, dw, amax = gradients(parts, scales[0], y8t, inverse, Fp8Weight(*w8), triton)
    dy[:, : dhead.size(1)] += dhead
    dx, dother, sums = norm_gradients(triton, dy, dmixed, mixed, x, delta, scale, other, other_scale)
    return dx, dother, sums, dw, amax


@_fp8_norm_qkv_backward.register_fake
def _(parts, dhead, dmixed, mixed, y8t, x, delta, scale, other, other_scale, scales, w8, triton):
    dtype = weight_dtype(x.dtype)
    dother = x.new_empty(x.shape if other is not None else (0,))
    dw = x.new_empty((w8[0].size(0), x.size(1)), dtype=dtype)
    return torch.empty_like(x), dother, x.new_empty((2,), dtype=dtype), dw, scales.new_empty((), dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, delta, scale, other, other_scale, weights, scales, w8, ctx.triton = inputs
    mixed, y8t = output[-2:]
    ctx.mixes = mixed.numel() > 0
    ctx.weights = [(w.size(0), w.dtype) for w in weights]
    ctx.save_for_backward(x, delta, scale, other, other_scale, scales, mixed if ctx.mixes else x, y8t, *w8)
    ctx.mark_non_differentiable(y8t)


def _backward(ctx, grads):
    *parts, dhead, dmixed, _ = grads
    x, delta, scale, other, other_scale, scales, mixed, y8t, *w8 = ctx.saved_tensors
    extras = (x, delta, scale, other, other_scale)
    dmixed = dmixed if ctx.mixes else None
    dx, dother, sums, dw, amax = torch.ops.nanochat.fp8_norm_qkv_backward(
        parts, dhead, dmixed, mixed, y8t, *extras, scales, w8, ctx.triton
    )
    rows = dw.split([size for size, _ in ctx.weights])
    dweights = [row.to(dtype) for row, (_, dtype) in zip(rows, ctx.weights, strict=True)]
    return (
        dx,
        dx if delta is not None else None,
        like_input(sums[0], scale),
        dother if other is not None else None,
        like_input(sums[1], other_scale),
        dweights,
        amax.reshape(1).to(scales.dtype),
        [None] * 3,
        None,
    )


_fp8_norm_qkv.register_autograd(_backward, setup_context=_setup)


def _norm_qkv(
    triton: bool,
    x: Tensor,
    weights: list[Tensor],
    extras: tuple[Tensor | None, ...],
    scales: Tensor | None,
    weight8: Fp8Weight | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    delta, scale, other, other_scale = extras
    flat = [None if t is None else t.flatten(0, -2) for t in (delta, other)]
    scales = x.new_zeros(1, dtype=torch.float32) if scales is None else scales
    w8 = cast_weights(weights, triton) if weight8 is None else weight8
    *results, mixed, _ = torch.ops.nanochat.fp8_norm_qkv(
        x.flatten(0, -2), flat[0], scale, flat[1], other_scale, weights, scales, list(w8), triton
    )
    q, k, v, head = (t.unflatten(0, x.shape[:-1]) for t in results)
    return q, k, v, head, mixed.view(x.shape) if mixed.numel() else x


def fp8_norm_qkv_reference(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
    scales: Tensor | None = None,
    weight8: Fp8Weight | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, the first 16 channels of the norm, mixed) of x, delta, other (..., C), in x's dtype.

    scale, other_scale: one element. scales (1,) float32: the delayed scale of the products' gradients, 0 for current
    scaling; its own gradient is their amax. weight8: the three weights (…, C) side by side, cast already.
    """
    return _norm_qkv(False, x, [w_q, w_k, w_v], (delta, scale, other, other_scale), scales, weight8)


def fp8_norm_qkv_triton(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
    scales: Tensor | None = None,
    weight8: Fp8Weight | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference, with the norm and the casts in Triton."""
    return _norm_qkv(True, x, [w_q, w_k, w_v], (delta, scale, other, other_scale), scales, weight8)


def _cases() -> Iterator[Case]:
    def make(rows, c, kv, extras, scales=None):
        def build(device, dtype, generator):
            x, delta, other = (normal((*rows, c), device, dtype, generator) for _ in range(3))
            weights = [normal((n, c), device, torch.float32, generator, c**-0.5) for n in (c, kv, kv)]
            factors = [torch.tensor(s, device=device) for s in (1.1, -0.2)]
            given = {"delta": delta, "scale": factors[0], "other": other, "other_scale": factors[1].reshape(1)}
            kwargs = {name: given[name] for name in extras}
            return (x, *weights), kwargs | ({} if scales is None else {"scales": torch.tensor(scales, device=device)})

        return build

    full = ("delta", "scale", "other", "other_scale")
    yield Case("block entry", make((2, 16), 128, 64, full, [1024.0]))
    yield Case("plain, current scaling", make((2, 16), 128, 128, ()))
    yield Case("first block", make((2, 16), 128, 128, ("scale", "other", "other_scale")))
    yield Case("d12", make((8, 2048), 768, 768, full, [1024.0]), size="model")
    yield Case("d24", make((8, 2048), 1536, 1536, full, [1024.0]), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, weights = args[0], args[1:4]
    rows, outputs = x.numel() // x.size(-1), sum(w.size(0) for w in weights)
    tensors = 1 + sum(name in kwargs for name in ("delta", "other")) + ("delta" in kwargs or "other" in kwargs)
    moved = x.numel() * (tensors * x.element_size() + 3) + outputs * (rows * x.element_size() + 7 * x.size(-1))
    return Cost(moved, 2 * rows * outputs * x.size(-1))


fp8_norm_qkv = Op(
    "fp8_norm_qkv",
    torch=fp8_norm_qkv_reference,
    triton=fp8_norm_qkv_triton,
    available={"triton": needs_triton},
    auto=(("triton", lambda place: place.device.type == "cuda", "the norm casts, products by torch"),),
    custom=("triton",),
    cases=_cases,
    cost=_cost,
    tolerance=TOLERANCE,
    differentiable=("x", "w_q", "w_k", "w_v", "delta", "scale", "other", "other_scale", "scales"),
)
