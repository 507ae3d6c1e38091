"""The MLP of a block in FP8, from the residual sum before its norm to its result.

    mixed = x + delta       n8 = cast(norm(mixed))       a = relu(n8·w8_fcᵀ)²       a8 = cast(a)       y = a8·w8_projᵀ

    g8 = cast(dy)      dh8 = cast(2·√a·(g8·w8_proj))      dW_proj = g8ᵀ·a8      dn = dh8·w8_fc      dW_fc = dh8ᵀ·n8

The hidden tensor never exists in bf16, in either direction: the epilogue of the first product squares, casts and stores
it in both orders; that of dy·w8_proj takes the derivative and does the same with dh. An epilogue sees one tile and
cannot know the amax of all, so both casts go by delayed scales. Where nothing is known yet (scale 0) a takes 1, which
holds up to 448, and dh takes a sixteenth of dy's scale: what an e5m2 exponent's 30 binades forgive until the next step
knows better. Kept for the backward pass are n8ᵀ and a8ᵀ, 5 bytes a channel of x where bf16 keeps 10 (and torch in eager
mode 26): √a8 serves for relu(h), at three bits of mantissa, which is one more than dh will have.

The sums of both fused products may be kept with fewer bits on the tensor cores (some 14 bits): their results are cast
to 2 or 3 bits at once. Products that end in 16 or 32 bits (y, dn, dW) are torch's, the latter two with full sums.

Bytes moved for a token's hidden element, beside the products' own reads: 2 forward and 3 backward. As separate steps
(product, relu², amax, cast, transpose) 2 + 4 + 2 + 3 + 2 forward, and 2 + 6 + 2 + 3 + 2 backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanochat_kernels.fp8_linear import TOLERANCE, Fp8Weight, cast_weights, fp8_matmul, quantizer, weight_dtype
from nanochat_kernels.fp8_norm_qkv import norm_gradients, normed
from nanochat_kernels.fp8_quantize import E4M3, E5M2, cast
from nanochat_kernels.fp8_rms_norm import static_scale
from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.triton_support import needs_triton

Cast = tuple[Tensor, Tensor, Tensor, Tensor]  # a tensor in FP8, its transpose, the inverse scale, the amax
FIRST_A, FIRST_DH = 1.0, 1 / 16  # scales before there is a history: of a, and of dh as a share of dy's


def relu2_cast_reference(
    n8: Tensor, inverse_n: Tensor, w8: Tensor, inverse_w: Tensor, scale: Tensor, dtype: torch.dtype
) -> Cast:
    """(a8 (M, hidden), a8ᵀ, its inverse scale, amax of a) of n8 (M, C) and w8 (hidden, C); sums in `dtype`."""
    a = fp8_matmul(n8, w8, inverse_n, inverse_w, dtype, fast=True).relu().square()
    scale = torch.where(scale > 0, scale, FIRST_A).float()
    a8 = cast(a, scale, E4M3)
    return a8, a8.mT.contiguous(), 1.0 / scale, a.amax().float()


def drelu2_cast_reference(
    g8: Tensor,
    inverse_g: Tensor,
    w8t: Tensor,
    inverse_w: Tensor,
    a8t: Tensor,
    inverse_a: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Cast:
    """(dh8 (M, hidden), dh8ᵀ, its inverse scale, amax of dh) of g8 (M, C), w8ᵀ (hidden, C) and a8ᵀ (hidden, M)."""
    root = (a8t.mT.to(dtype) * inverse_a.to(dtype)).sqrt()
    dh = 2 * root * fp8_matmul(g8, w8t, inverse_g, inverse_w, dtype, fast=True)
    scale = torch.where(scale > 0, scale, FIRST_DH / inverse_g).float()
    dh8 = cast(dh, scale, E5M2)
    return dh8, dh8.mT.contiguous(), 1.0 / scale, dh.abs().amax().float()


def _fused_products(backend: str) -> tuple[Callable[..., Cast], Callable[..., Cast]]:
    """What takes the part of the two references above."""
    if backend == "torch":
        return relu2_cast_reference, drelu2_cast_reference
    if backend == "triton":
        from nanochat_kernels.fp8_norm_mlp_triton import drelu2_cast, relu2_cast

        return relu2_cast, drelu2_cast
    return _relu2_cast_scaled, _drelu2_cast_scaled


def _relu2_cast_scaled(
    n8: Tensor, inverse_n: Tensor, w8: Tensor, inverse_w: Tensor, scale: Tensor, dtype: torch.dtype
) -> Cast:
    """As relu2_cast_reference, by torch's product and one kernel after it. Between them h waits in float32: rounded to
    bf16 first, one value in sixty would end as its neighbor in e5m2."""
    from nanochat_kernels.fp8_quantize_triton import quantize_relu2

    h = fp8_matmul(n8, w8, inverse_n, inverse_w, dtype, fast=True)
    return quantize_relu2(h, torch.where(scale > 0, scale, FIRST_A).float())


def _drelu2_cast_scaled(
    g8: Tensor,
    inverse_g: Tensor,
    w8t: Tensor,
    inverse_w: Tensor,
    a8t: Tensor,
    inverse_a: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> Cast:
    """As drelu2_cast_reference, by torch's product and one kernel after it."""
    from nanochat_kernels.fp8_quantize_triton import quantize_relu2

    da = fp8_matmul(g8, w8t, inverse_g, inverse_w, dtype, fast=True)
    return quantize_relu2(da, torch.where(scale > 0, scale, FIRST_DH / inverse_g).float(), a8t, inverse_a)


def _static_inverse(like: Tensor, channels: int) -> Tensor:
    return like.new_full((), 1.0 / static_scale(channels), dtype=torch.float32)


@torch.library.custom_op("nanochat::fp8_norm_mlp", mutates_args=())
def _fp8_norm_mlp(
    x: Tensor, delta: Tensor | None, w_fc: Tensor, w_proj: Tensor, scales: Tensor, w8: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mixed (empty when it is x), n8ᵀ, a8ᵀ, its inverse scale, amax of a) of x, delta (M, C)."""
    fc, proj = Fp8Weight(*w8[:3]), Fp8Weight(*w8[3:])
    n8, n8t, _, mixed = normed(backend != "torch", x, delta, None, None, None)
    relu2_cast, _ = _fused_products(backend)
    inverse_n = _static_inverse(scales, x.size(1))
    a8, a8t, inverse, amax = relu2_cast(n8, inverse_n, fc.data, fc.inverse, scales[0], weight_dtype(x.dtype))
    y = fp8_matmul(a8, proj.data, inverse, proj.inverse, x.dtype, fast=True)
    return y, x.new_empty(0) if delta is None else mixed, n8t, a8t, inverse, amax


@_fp8_norm_mlp.register_fake
def _(x, delta, w_fc, w_proj, scales, w8, backend):
    (rows, channels), hidden = x.shape, w_fc.size(0)
    scalar = scales.new_empty((), dtype=torch.float32)
    mixed = x.new_empty(0 if delta is None else (rows, channels))
    n8t, a8t = (x.new_empty((n, rows), dtype=E4M3) for n in (channels, hidden))
    return x.new_empty((rows, w_proj.size(0))), mixed, n8t, a8t, scalar, torch.empty_like(scalar)


@torch.library.custom_op("nanochat::fp8_norm_mlp_backward", mutates_args=())
def _fp8_norm_mlp_backward(
    dy: Tensor, dmixed: Tensor | None, mixed: Tensor, n8t: Tensor, a8t: Tensor, inverse_a: Tensor,
    scales: Tensor, w8: list[Tensor], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of x and delta, dW_fc, dW_proj, amax of dy, amax of dh)."""
    fc, proj = Fp8Weight(*w8[:3]), Fp8Weight(*w8[3:])
    sums = weight_dtype(dy.dtype)
    g8, g8t, inverse_g, amax_g = quantizer(backend != "torch")([dy], scales[1], True)
    d_proj = fp8_matmul(g8t, a8t, inverse_g, inverse_a, sums, fast=False)
    _, drelu2_cast = _fused_products(backend)
    dh8, dh8t, inverse_h, amax_h = drelu2_cast(
        g8, inverse_g, proj.transposed, proj.inverse, a8t, inverse_a, scales[2], sums
    )
    d_fc = fp8_matmul(dh8t, n8t, inverse_h, _static_inverse(scales, mixed.size(1)), sums, fast=False)
    dn = fp8_matmul(dh8, fc.transposed, inverse_h, fc.inverse, dy.dtype, fast=False)
    dx, _, _ = norm_gradients(backend != "torch", dn, dmixed, mixed, mixed, None, None, None, None)
    return dx, d_fc, d_proj, amax_g, amax_h


@_fp8_norm_mlp_backward.register_fake
def _(dy, dmixed, mixed, n8t, a8t, inverse_a, scales, w8, backend):
    hidden, channels, dtype = a8t.size(0), mixed.size(1), weight_dtype(dy.dtype)
    d_fc = dy.new_empty((hidden, channels), dtype=dtype)
    scalar = scales.new_empty((), dtype=torch.float32)
    d_proj = dy.new_empty((dy.size(1), hidden), dtype=dtype)
    return dy.new_empty(mixed.shape), d_fc, d_proj, scalar, torch.empty_like(scalar)


def _setup(ctx, inputs, output):
    x, delta, w_fc, w_proj, scales, w8, ctx.backend = inputs
    _, mixed, *kept = output
    ctx.delta = delta is not None
    ctx.dtypes = w_fc.dtype, w_proj.dtype
    ctx.save_for_backward(x if delta is None else mixed, *kept, scales, *w8)
    ctx.mark_non_differentiable(*kept)


def _backward(ctx, dy, dmixed, *_):
    mixed, n8t, a8t, inverse_a, amax_a, scales, *w8 = ctx.saved_tensors
    dmixed = dmixed if ctx.delta else None
    dx, d_fc, d_proj, amax_g, amax_h = torch.ops.nanochat.fp8_norm_mlp_backward(
        dy, dmixed, mixed, n8t, a8t, inverse_a, scales, w8, ctx.backend
    )
    amaxes = torch.stack([amax_a, amax_g, amax_h]).to(scales.dtype)
    weights = d_fc.to(ctx.dtypes[0]), d_proj.to(ctx.dtypes[1])
    return dx, dx if ctx.delta else None, *weights, amaxes, [None] * 6, None


_fp8_norm_mlp.register_autograd(_backward, setup_context=_setup)


def _norm_mlp(
    backend: str,
    x: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    delta: Tensor | None,
    scales: Tensor | None,
    weights8: tuple[Fp8Weight, Fp8Weight] | None,
) -> tuple[Tensor, Tensor]:
    scales = x.new_zeros(3, dtype=torch.float32) if scales is None else scales
    fc, proj = weights8 or tuple(cast_weights([w], backend != "torch") for w in (w_fc, w_proj))
    flat = None if delta is None else delta.flatten(0, -2)
    y, mixed, *_ = torch.ops.nanochat.fp8_norm_mlp(x.flatten(0, -2), flat, w_fc, w_proj, scales, [*fc, *proj], backend)
    return y.view(x.shape), x if delta is None else mixed.view(x.shape)


def fp8_norm_mlp_reference(
    x: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    delta: Tensor | None = None,
    scales: Tensor | None = None,
    weights8: tuple[Fp8Weight, Fp8Weight] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mixed) of x, delta (..., C), w_fc (hidden, C), w_proj (C, hidden), in x's dtype.

    scales (3,) float32: the delayed scales of a, dy and dh; their gradient is the amax of each. weights8: both weights,
    cast already.
    """
    return _norm_mlp("torch", x, w_fc, w_proj, delta, scales, weights8)


def fp8_norm_mlp_triton(
    x: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    delta: Tensor | None = None,
    scales: Tensor | None = None,
    weights8: tuple[Fp8Weight, Fp8Weight] | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference, with the hidden tensor's casts in the epilogues of Triton's products."""
    return _norm_mlp("triton", x, w_fc, w_proj, delta, scales, weights8)


def fp8_norm_mlp_scaled(
    x: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    delta: Tensor | None = None,
    scales: Tensor | None = None,
    weights8: tuple[Fp8Weight, Fp8Weight] | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference: every product is torch's, and a kernel after it makes and casts the hidden tensor."""
    return _norm_mlp("scaled", x, w_fc, w_proj, delta, scales, weights8)


def _cases() -> Iterator[Case]:
    def make(rows, c, hidden, scales=None, delta=True):
        def build(device, dtype, generator):
            x, extra = (normal((*rows, c), device, dtype, generator) for _ in range(2))
            w_fc = normal((hidden, c), device, torch.float32, generator, c**-0.5)
            w_proj = normal((c, hidden), device, torch.float32, generator, hidden**-0.5)
            kwargs = {"delta": extra} if delta else {}
            return (x, w_fc, w_proj), kwargs | (
                {} if scales is None else {"scales": torch.tensor(scales, device=device)}
            )

        return build

    yield Case("given scales", make((2, 16), 128, 256, [16.0, 1024.0, 512.0]))
    yield Case("no history", make((2, 16), 128, 256, delta=False))
    yield Case("several tiles", make((11, 16), 128, 384, [16.0, 1024.0, 512.0]), size="odd")
    yield Case("d12", make((8, 2048), 768, 3072, [16.0, 1024.0, 512.0]), size="model")
    yield Case("d24", make((8, 2048), 1536, 6144, [16.0, 1024.0, 512.0]), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, w_fc = args[:2]
    rows, hidden = x.numel() // x.size(-1), w_fc.size(0)
    normed = x.numel() * ((3 if "delta" in kwargs else 1) * x.element_size() + 3)
    moved = normed + 3 * rows * hidden + x.numel() * x.element_size() + 2 * w_fc.numel()
    return Cost(moved, 4 * rows * w_fc.numel())


fp8_norm_mlp = Op(
    "fp8_norm_mlp",
    torch=fp8_norm_mlp_reference,
    triton=fp8_norm_mlp_triton,
    scaled=fp8_norm_mlp_scaled,
    available={"triton": needs_triton, "scaled": needs_triton},
    auto=(("triton", lambda place: place.device.type == "cuda", "the hidden tensor is cast where it is made"),),
    custom=("triton", "scaled"),
    cases=_cases,
    cost=_cost,
    tolerance=TOLERANCE,
    differentiable=("x", "w_fc", "w_proj", "delta", "scales"),
)
