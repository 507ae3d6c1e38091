"""rms_norm in Triton: one program per row, the row in registers, every tensor touched once.

Forward reads x, delta and other, writes y and mixed. Backward keeps no statistics: mixed is at hand (it is a result),
and its mean square is cheaper to form again than to store and load. With h = mixed, r = (mean h² + ε)^-½ and ŷ = h·r,

    g      = r·(dy − ŷ·mean(dy·ŷ)) + dmixed
    dx     = ddelta = scale·g        dother = other_scale·g
    dscale = Σ g·(x + delta)         dother_scale = Σ g·other

The two sums run over all rows: every program adds up its own rows and writes one partial sum, torch adds those.
Programs therefore walk over many rows each, enough of them to fill the machine. Arithmetic is float32 throughout, so
that mixed is rounded once. A row must fit in the registers of one program: up to 16,384 columns.

The FP8 form (fp8_rms_norm) also writes the result's transpose, for which one row is too few: its columns would be
single bytes. A program takes 64 rows instead and sweeps over them twice in strips of 128 columns, first writing mixed
and adding up squares, then reading mixed back, out of the second-level cache, to write y8 and y8ᵀ in pieces of 128 and
64 bytes. Memory sees what the formula needs and any number of columns will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.compiled import Build
from nanochat_kernels.fp8_quantize import E4M3
from nanochat_kernels.fp8_quantize_triton import to_fp8
from nanochat_kernels.fp8_rms_norm import HEAD, static_scale
from nanochat_kernels.numerics import EPS

MAX_COLUMNS = 16384
PROGRAMS = 2048  # for the backward pass: about 16 for each of an H100's 132 processors


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, delta_ptr, scale_ptr, other_ptr, other_scale_ptr, y_ptr, mixed_ptr, columns, eps,
    HAS_DELTA: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_OTHER_SCALE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    inside = column < columns
    offset = tl.program_id(0).to(tl.int64) * columns + column
    h = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        h += tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        h *= tl.load(scale_ptr).to(tl.float32)
    if HAS_OTHER:
        other = tl.load(other_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_OTHER_SCALE:
            other *= tl.load(other_scale_ptr).to(tl.float32)
        h += other
    if HAS_DELTA or HAS_SCALE or HAS_OTHER:
        tl.store(mixed_ptr + offset, h, mask=inside)
    r = tl.rsqrt(tl.sum(h * h, axis=0) / columns + eps)
    tl.store(y_ptr + offset, h * r, mask=inside)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, dmixed_ptr, mixed_ptr, x_ptr, delta_ptr, scale_ptr, other_ptr, other_scale_ptr,
    dx_ptr, dother_ptr, partial_ptr, rows, columns, eps,
    HAS_DMIXED: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_OTHER: tl.constexpr,
    HAS_OTHER_SCALE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    inside = column < columns
    scale = 1.0
    other_scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    if HAS_OTHER_SCALE:
        other_scale = tl.load(other_scale_ptr).to(tl.float32)
    dscale = tl.zeros((BLOCK_C,), tl.float32)
    dother_scale = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * columns + column
        h = tl.load(mixed_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(h * h, axis=0) / columns + eps)
        normed = h * r
        g = r * (dy - normed * (tl.sum(dy * normed, axis=0) / columns))
        if HAS_DMIXED:
            g += tl.load(dmixed_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, g * scale, mask=inside)
        if HAS_SCALE:
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            if HAS_DELTA:
                x += tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            dscale += g * x
        if HAS_OTHER:
            tl.store(dother_ptr + offset, g * other_scale, mask=inside)
            if HAS_OTHER_SCALE:
                dother_scale += g * tl.load(other_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial_ptr + 2 * tl.program_id(0), tl.sum(dscale, axis=0))
    tl.store(partial_ptr + 2 * tl.program_id(0) + 1, tl.sum(dother_scale, axis=0))


@triton.jit
def _fp8_rms_norm_kernel(
    x_ptr, delta_ptr, scale_ptr, other_ptr, other_scale_ptr, y8_ptr, y8t_ptr, head_ptr, mixed_ptr,
    rows, columns, eps, fp8_scale,
    HAS_DELTA: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_OTHER_SCALE: tl.constexpr,
    HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    MIXES: tl.constexpr = HAS_DELTA or HAS_SCALE or HAS_OTHER
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide_row = row.to(tl.int64)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    scale = 1.0
    other_scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    if HAS_OTHER_SCALE:
        other_scale = tl.load(other_scale_ptr).to(tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        offset = wide_row[:, None] * columns + column[None, :]
        h = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            h += tl.load(delta_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            h *= scale
        if HAS_OTHER:
            h += other_scale * tl.load(other_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if MIXES:
            stored = h.to(mixed_ptr.dtype.element_ty)
            tl.store(mixed_ptr + offset, stored, mask=inside)
            h = stored.to(tl.float32)
        squares += h * h
    r = tl.rsqrt(tl.sum(squares, axis=1) / columns + eps)[:, None]
    if MIXES:
        tl.debug_barrier()  # what other threads of this program wrote is read now
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        offset = wide_row[:, None] * columns + column[None, :]
        if MIXES:
            y = tl.load(mixed_ptr + offset, mask=inside, other=0.0).to(tl.float32) * r
        else:
            y = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * r
        if start == 0:
            into = wide_row[:, None] * tl.minimum(HEAD, columns) + column[None, :]
            tl.store(head_ptr + into, y, mask=inside & (column[None, :] < HEAD))
        y8 = to_fp8(y, fp8_scale, 448.0, tl.float8e4nv)
        tl.store(y8_ptr + offset, y8, mask=inside)
        tl.store(y8t_ptr + column.to(tl.int64)[:, None] * rows + row[None, :], y8.T, mask=inside.T)


FP8_TILE = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}


def rms_norm_triton(
    x: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference; a row has at most 16,384 columns."""
    if x.size(-1) > MAX_COLUMNS:
        raise ValueError(f"rms_norm=triton: {x.size(-1)} columns, at most {MAX_COLUMNS}; take rms_norm=torch")
    y, mixed = torch.ops.nanochat.rms_norm(x, delta, scale, other, other_scale)
    return y, mixed if mixed.numel() else x


def _launch(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK_C": block, "num_warps": min(max(block // 512, 1), 16)}


def _contiguous(x: Any) -> Any:
    """A tensor in contiguous memory, or None as it is."""
    return None if x is None else x.contiguous()


def _flags(
    delta: Tensor | None, scale: Tensor | None, other: Tensor | None, other_scale: Tensor | None
) -> dict[str, bool]:
    return {
        "HAS_DELTA": delta is not None,
        "HAS_SCALE": scale is not None,
        "HAS_OTHER": other is not None,
        "HAS_OTHER_SCALE": other is not None and other_scale is not None,
    }


@torch.library.custom_op("nanochat::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, delta: Tensor | None, scale: Tensor | None, other: Tensor | None, other_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, mixed); mixed is empty when it would be x itself."""
    x, delta, other = (_contiguous(t) for t in (x, delta, other))
    flags = _flags(delta, scale, other, other_scale)
    y = torch.empty_like(x)
    mixed = torch.empty_like(x) if any(flags.values()) else x.new_empty(0)
    columns = x.size(-1)
    grid = (x.numel() // columns,)
    tensors = (x, delta, scale, other, other_scale, y, mixed)
    _rms_norm_fwd_kernel[grid](*tensors, columns, EPS, **flags, **_launch(columns))
    return y, mixed


@_rms_norm.register_fake
def _(x, delta, scale, other, other_scale):
    extras = any(t is not None for t in (delta, scale, other))
    return x.new_empty(x.shape), x.new_empty(x.shape if extras else (0,))


@torch.library.custom_op("nanochat::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor,
    dmixed: Tensor | None,
    mixed: Tensor,
    x: Tensor,
    delta: Tensor | None,
    scale: Tensor | None,
    other: Tensor | None,
    other_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dother, sums): dother is empty without other; sums (2,) float32 are dscale and dother_scale."""
    dy, dmixed, mixed, x, delta, other = (_contiguous(t) for t in (dy, dmixed, mixed, x, delta, other))
    columns = x.size(-1)
    rows = x.numel() // columns
    programs = min(rows, PROGRAMS)
    dx = torch.empty_like(x)
    dother = torch.empty_like(x) if other is not None else x.new_empty(0)
    partial = torch.empty((programs, 2), dtype=torch.float32, device=x.device)
    tensors = (dy, dmixed, mixed, x, delta, scale, other, other_scale, dx, dother, partial)
    flags = {"HAS_DMIXED": dmixed is not None} | _flags(delta, scale, other, other_scale)
    _rms_norm_bwd_kernel[(programs,)](*tensors, rows, columns, EPS, **flags, **_launch(columns))
    return dx, dother, partial.sum(dim=0)


@_rms_norm_backward.register_fake
def _(dy, dmixed, mixed, x, delta, scale, other, other_scale):
    dother = x.new_empty(x.shape if other is not None else (0,))
    return x.new_empty(x.shape), dother, x.new_empty((2,), dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, delta, scale, other, other_scale = inputs
    ctx.extras = output[1].numel() > 0
    ctx.save_for_backward(output[1] if ctx.extras else x, x, delta, scale, other, other_scale)


def _backward(ctx, dy, dmixed):
    mixed, x, delta, scale, other, other_scale = ctx.saved_tensors
    dmixed = dmixed if ctx.extras else None
    dx, dother, sums = torch.ops.nanochat.rms_norm_backward(dy, dmixed, mixed, x, delta, scale, other, other_scale)
    return (
        dx,
        dx if delta is not None else None,
        sums[0].reshape(scale.shape).to(scale.dtype) if scale is not None else None,
        dother if other is not None else None,
        sums[1].reshape(other_scale.shape).to(other_scale.dtype) if other_scale is not None else None,
    )


_rms_norm.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("nanochat::fp8_rms_norm", mutates_args=())
def _fp8_rms_norm(
    x: Tensor, delta: Tensor | None, scale: Tensor | None, other: Tensor | None, other_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y8, y8ᵀ, head, mixed) of (M, C) matrices; mixed is empty when it would be x itself."""
    x, delta, other = (_contiguous(t) for t in (x, delta, other))
    rows, columns = x.shape
    flags = _flags(delta, scale, other, other_scale)
    y8, y8t, head, mixed = _fp8_results(x, any(flags.values()))
    _fp8_rms_norm_kernel[(triton.cdiv(rows, FP8_TILE["ROWS"]),)](
        x, delta, scale, other, other_scale, y8, y8t, head, mixed, rows, columns, EPS, static_scale(columns),
        **flags, HEAD=HEAD, **FP8_TILE,
    )  # fmt: skip
    return y8, y8t, head, mixed


def _fp8_results(x: Tensor, mixes: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    y8, y8t = (x.new_empty(shape, dtype=E4M3) for shape in ((rows, columns), (columns, rows)))
    return y8, y8t, x.new_empty((rows, min(HEAD, columns))), x.new_empty((rows, columns) if mixes else (0,))


@_fp8_rms_norm.register_fake
def _(x, delta, scale, other, other_scale):
    return _fp8_results(x, any(t is not None for t in (delta, scale, other)))


def fp8_rms_norm_triton(
    x: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference of fp8_rms_norm."""
    y8, y8t, head, mixed = torch.ops.nanochat.fp8_rms_norm(x, delta, scale, other, other_scale)
    return y8, y8t, head, mixed if mixed.numel() else x


def shipped() -> Iterator[Build]:
    """The launches of the model at depths 12 and 24, in bf16: plain, and with everything that a block's entry adds."""
    pointers = ("x", "delta", "other", "y", "mixed", "dy", "dmixed", "dx", "dother")
    types = {f"{name}_ptr": "*bf16" for name in pointers} | {
        f"{name}_ptr": "*fp32" for name in ("scale", "other_scale")
    }
    types |= {"partial_ptr": "*fp32", "rows": "i32", "columns": "i32", "eps": "fp32"}
    for width in (768, 1536):
        for kind, given in (("plain", False), ("block entry", True)):
            flags = dict.fromkeys(("HAS_DELTA", "HAS_SCALE", "HAS_OTHER", "HAS_OTHER_SCALE"), given)
            absent = (
                () if given else ("delta_ptr", "scale_ptr", "other_ptr", "other_scale_ptr", "dmixed_ptr", "dother_ptr")
            )
            for kernel, extra in ((_rms_norm_fwd_kernel, {}), (_rms_norm_bwd_kernel, {"HAS_DMIXED": given})):
                launch = _launch(width)
                warps = launch.pop("num_warps")
                constants = flags | extra | launch | {name: None for name in absent if name in kernel.arg_names}
                if kernel is _rms_norm_fwd_kernel and not given:
                    constants["mixed_ptr"] = None
                arguments = {n: t for n, t in types.items() if n in kernel.arg_names and n not in constants}
                direction = "backward" if extra else "forward"
                yield Build(f"rms_norm {direction} {kind} {width}", kernel, arguments, constants, warps)
    yield from _shipped_fp8(types)


def _shipped_fp8(types: dict[str, str]) -> Iterator[Build]:
    types = types | {"y8_ptr": "*fp8e4nv", "y8t_ptr": "*fp8e4nv", "head_ptr": "*bf16", "fp8_scale": "fp32"}
    names = _fp8_rms_norm_kernel.arg_names
    tile = {"HEAD": HEAD, "ROWS": FP8_TILE["ROWS"], "COLUMNS": FP8_TILE["COLUMNS"]}
    for kind, missing in (("block entry", ()), ("delta", ("SCALE", "OTHER", "OTHER_SCALE"))):
        flags = {f"HAS_{name}": name not in missing for name in ("DELTA", "SCALE", "OTHER", "OTHER_SCALE")}
        constants = tile | flags | {f"{name.lower()}_ptr": None for name in missing}
        arguments = {n: t for n, t in types.items() if n in names and n not in constants}
        yield Build(f"fp8_rms_norm {kind}", _fp8_rms_norm_kernel, arguments, constants, FP8_TILE["num_warps"])
