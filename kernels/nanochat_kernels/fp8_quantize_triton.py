"""fp8_quantize in Triton: a tile is read once and written twice, as it stands and transposed.

A tile of 128 × 128 makes every access a full line of 128 bytes: rows of 256 bytes come in (bf16), rows of 128 bytes go
out, and so do the columns, after a turn through shared memory. Each tile's largest magnitude joins the tensor's by one
atomic maximum.

Current scaling needs that maximum first. The kernel that finds it is always launched and returns at once where a scale
is given: the choice is made on the device, so that nothing waits for the host and compiled code has no branch. That
idle launch takes a microsecond or two.

The parts of one matrix (the gradients of q, k and v) are cast side by side into one, without being joined before.

The same kernel can apply relu² or its derivative to what it reads (FORM): the FP8 MLP's casts where the products before
them are torch's (fp8_norm_mlp=scaled).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.compiled import Build
from nanochat_kernels.fp8_quantize import E4M3, E5M2, TOP
from nanochat_kernels.triton_support import interpreted

TILE = 128
WARPS = 8
LINE = 8192  # elements that a program looks at in one go for the maximum
SEEKERS = 1024  # programs that look for it
TRITON_FP8 = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (E4M3, E5M2)}
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def power_of_two(amax, TOP: tl.constexpr):
    """As fp8_quantize.scale_for: by the exponent's bits, exact. Zero and what is too small for float32 count as 1."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) - 126  # amax < 2^exponent
    scale = ((tl.minimum(TOP - exponent, 126) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(amax >= 1.1754943508222875e-38, scale, 1.0)


@triton.jit
def _round_as_hardware(x, FP8: tl.constexpr):
    """x (float32) to the nearest number of the format, ties to even. Seen with Triton 3.6: the interpreter's own cast
    drops the carry into the exponent and cuts subnormal numbers off; a GPU's instruction does this by itself."""
    MANTISSA: tl.constexpr = FP8.fp_mantissa_width
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    step = ((tl.maximum(exponent, 1 - FP8.exponent_bias) - MANTISSA + 127) << 23).to(tl.float32, bitcast=True)
    integers: tl.constexpr = 12582912.0  # 1.5·2²³: the spacing of float32 there is 1
    return (x / step + integers - integers) * step


@triton.jit
def to_fp8(x, scale, LARGEST: tl.constexpr, FP8: tl.constexpr):
    """x·scale, saturating; a NaN stays one."""
    x = x * scale
    x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    if INTERPRETED:
        x = _round_as_hardware(x, FP8)
    return x.to(FP8, fp_downcast_rounding="rtne")


@triton.jit
def _amax_kernel(x_ptr, scale_ptr, amax_ptr, elements, LINE: tl.constexpr):
    """max|x| into amax, unless a scale is given."""
    if tl.load(scale_ptr) <= 0:
        largest = tl.zeros((LINE,), tl.float32)
        start = tl.program_id(0).to(tl.int64) * LINE
        while start < elements:
            offset = start + tl.arange(0, LINE)
            largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + offset, mask=offset < elements, other=0.0)))
            start += tl.num_programs(0) * LINE
        tl.atomic_max(amax_ptr, tl.max(largest, axis=0))


@triton.jit
def _quantize_kernel(
    x_ptr, kept_ptr, inverse_kept_ptr, scale_ptr, amax_ptr, out_ptr, transposed_ptr, inverse_ptr,
    rows, columns, first, out_columns,
    FORM: tl.constexpr, FP8: tl.constexpr, TOP: tl.constexpr, LARGEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x (rows, columns) into columns `first` and on of out (rows, out_columns), and into out's transpose.

    FORM: "x" as it is, "relu2" relu(x)², "drelu2" 2·√kept·x with kept (columns, rows) in FP8.
    """
    scale = tl.load(scale_ptr)
    if scale <= 0:
        scale = power_of_two(tl.load(amax_ptr), TOP)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    wide_row = row.to(tl.int64)
    x = tl.load(x_ptr + wide_row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if FORM == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    if FORM == "drelu2":
        a8 = tl.load(kept_ptr + column.to(tl.int64)[:, None] * rows + row[None, :], mask=inside.T, other=0.0)
        x = 2.0 * tl.sqrt(a8.T.to(tl.float32) * tl.load(inverse_kept_ptr)) * x
    tl.atomic_max(amax_ptr, tl.max(tl.max(tl.abs(x), axis=1), axis=0))
    x8 = to_fp8(x, scale, LARGEST, FP8)
    tl.store(out_ptr + wide_row[:, None] * out_columns + (first + column)[None, :], x8, mask=inside)
    wide_column = (first + column).to(tl.int64)
    tl.store(transposed_ptr + wide_column[:, None] * rows + row[None, :], x8.T, mask=inside.T)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_ptr, 1.0 / scale)


@torch.library.custom_op("nanochat::fp8_quantize", mutates_args=())
def _fp8_quantize(parts: list[Tensor], scale: Tensor, e5m2: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = E5M2 if e5m2 else E4M3
    parts = [part.contiguous() for part in parts]
    rows, columns = parts[0].size(0), sum(part.size(1) for part in parts)
    out, transposed = (parts[0].new_empty(shape, dtype=dtype) for shape in ((rows, columns), (columns, rows)))
    amax, inverse = scale.new_zeros((), dtype=torch.float32), scale.new_empty((), dtype=torch.float32)
    for part in parts:
        seekers = min(SEEKERS, triton.cdiv(part.numel(), LINE))
        _amax_kernel[(seekers,)](part, scale, amax, part.numel(), LINE=LINE, num_warps=WARPS)
    first = 0
    for part in parts:
        grid = (triton.cdiv(rows, TILE), triton.cdiv(part.size(1), TILE))
        _quantize_kernel[grid](
            part, None, None, scale, amax, out, transposed, inverse, rows, part.size(1), first, columns,
            FORM="x", FP8=TRITON_FP8[dtype], TOP=TOP[dtype], LARGEST=LARGEST[dtype], TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
        first += part.size(1)
    return out, transposed, inverse, amax


@_fp8_quantize.register_fake
def _(parts, scale, e5m2):
    rows, columns = parts[0].size(0), sum(part.size(1) for part in parts)
    dtype = E5M2 if e5m2 else E4M3
    out, transposed = (parts[0].new_empty(shape, dtype=dtype) for shape in ((rows, columns), (columns, rows)))
    return out, transposed, scale.new_empty((), dtype=torch.float32), scale.new_empty((), dtype=torch.float32)


def fp8_quantize_triton(
    parts: list[Tensor], scale: Tensor, e5m2: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference."""
    return torch.ops.nanochat.fp8_quantize(parts, scale, e5m2)


def quantize_relu2(x: Tensor, scale: Tensor, kept: Tensor | None = None, inverse_kept: Tensor | None = None):
    """relu(x)² in e4m3 or, given kept = a8ᵀ (N, M) and its inverse scale, 2·√a·x in e5m2; x (M, N), scale positive.

    Results as those of fp8_quantize, amax that of the value cast. Not an op: for use inside one.
    """
    dtype, form = (E4M3, "relu2") if kept is None else (E5M2, "drelu2")
    x, (rows, columns) = x.contiguous(), x.shape
    out, transposed = (x.new_empty(shape, dtype=dtype) for shape in ((rows, columns), (columns, rows)))
    amax, inverse = scale.new_zeros((), dtype=torch.float32), scale.new_empty((), dtype=torch.float32)
    _quantize_kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        x, kept, inverse_kept, scale, amax, out, transposed, inverse, rows, columns, 0, columns,
        FORM=form, FP8=TRITON_FP8[dtype], TOP=TOP[dtype], LARGEST=LARGEST[dtype], TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
    return out, transposed, inverse, amax


def shipped() -> Iterator[Build]:
    """Gradients and activations from bf16, weights from float32, and the MLP's two forms."""
    pointers = dict.fromkeys(("scale_ptr", "amax_ptr", "inverse_ptr"), "*fp32")
    sizes = dict.fromkeys(("rows", "columns", "first", "out_columns"), "i32")
    kinds = (
        ("*bf16", E5M2, "gradient", "x"),
        ("*bf16", E4M3, "activation", "x"),
        ("*fp32", E4M3, "weight", "x"),
        ("*fp32", E4M3, "relu2", "relu2"),
        ("*fp32", E5M2, "relu2 backward", "drelu2"),
    )
    for source, fp8, name, form in kinds:
        out = "*fp8e5" if fp8 == E5M2 else "*fp8e4nv"
        types = {"x_ptr": source, "out_ptr": out, "transposed_ptr": out, **pointers, **sizes}
        constants: dict[str, object] = {
            "FORM": form, "FP8": TRITON_FP8[fp8], "TOP": TOP[fp8], "LARGEST": LARGEST[fp8], "TILE": TILE
        }  # fmt: skip
        if form == "drelu2":
            types |= {"kept_ptr": "*fp8e4nv", "inverse_kept_ptr": "*fp32"}
        else:
            constants |= {"kept_ptr": None, "inverse_kept_ptr": None}
        yield Build(f"fp8_quantize {name}", _quantize_kernel, types, constants, WARPS)
    types = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "amax_ptr": "*fp32", "elements": "i32"}
    yield Build("fp8_quantize maximum", _amax_kernel, types, {"LINE": LINE}, WARPS)
