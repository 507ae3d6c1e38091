"""The two products of the FP8 MLP whose epilogues make and cast the hidden tensor.

    up      a  = relu(n8·w8_fcᵀ)²            a8, a8ᵀ, max a
    down    dh = 2·√a8·(g8·w8_proj)          dh8, dh8ᵀ, max|dh|

One kernel, as in relu2_mlp_triton.py: persistent, 128 × 256 outputs a tile, operands by tensor descriptor or pointer,
the epilogue in two halves. Three things differ. The tensor cores read FP8 along the sum only, so w_proj comes
transposed (the cast of weights makes both orders). A tile leaves twice, as it is and turned around in registers, into
matrices that the next products read along their own sums; a8 is read back in the turned order, the only one that is
kept. And each program keeps the largest magnitude it has seen and adds it to the tensor's by one atomic maximum at its
end: 132 of them, not one a tile.

128 terms of the sum a step: 128 bytes a row, the widest line that the copy engine swizzles. Four stages of 48 KiB
beside two or three halves of results fill the 227 KiB of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat_kernels.compiled import Build
from nanochat_kernels.fp8_norm_mlp import FIRST_A, FIRST_DH, Cast
from nanochat_kernels.fp8_quantize import E4M3, E5M2
from nanochat_kernels.fp8_quantize_triton import LARGEST, TRITON_FP8, to_fp8
from nanochat_kernels.relu2_mlp_triton import BAND, Tiles, has_tma, load_tile, programs, store_tile, tile_at

TILES = Tiles(128, 256, 128, warps=8, stages=4)


@triton.jit
def _fp8_relu2_kernel(
    left, right, kept, out, turned, inverse_left, inverse_right, inverse_kept, scale_ptr, inverse_out, amax_ptr,
    rows, columns, depth,
    BACKWARD: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr, LARGEST: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """left (rows, depth), right (columns, depth), kept and turned (columns, rows), out (rows, columns)."""
    inverse = tl.load(inverse_left) * tl.load(inverse_right)
    scale = tl.load(scale_ptr)
    unscale = 1.0
    if BACKWARD:
        unscale = tl.load(inverse_kept)
        if scale <= 0:
            scale = FIRST / tl.load(inverse_left)
    elif scale <= 0:
        scale = FIRST
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    half: tl.constexpr = COLUMNS // 2
    largest = 0.0
    for number in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        tile_row, tile_column = tile_at(number, row_tiles, column_tiles, GROUP)
        row = tile_row * ROWS
        column = tile_column * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            a = load_tile(left, row, k, rows, depth, ROWS, DEPTH, TMA)
            b = load_tile(right, column, k, columns, depth, COLUMNS, DEPTH, TMA)
            total = tl.dot(a, b.T, total)
        parts = total.reshape(ROWS, 2, half).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            part = parts[i] * inverse
            at = column + i * half
            if BACKWARD:
                a8 = load_tile(kept, at, row, columns, rows, half, ROWS, TMA)
                part = 2.0 * tl.sqrt(a8.T.to(tl.float32) * unscale) * part
            else:
                part = tl.maximum(part, 0.0)
                part = part * part
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(part), axis=1), axis=0))
            cast = to_fp8(part, scale, LARGEST, FP8)
            store_tile(out, cast, row, at, rows, columns, ROWS, half, TMA)
            store_tile(turned, cast.T, at, row, columns, rows, half, ROWS, TMA)
    tl.atomic_max(amax_ptr, largest)
    if tl.program_id(0) == 0:
        tl.store(inverse_out, 1.0 / scale)


def _launch(
    left: Tensor, right: Tensor, kept: Tensor | None, inverses: tuple[Tensor, Tensor, Tensor | None], scale: Tensor
) -> Cast:
    rows, columns, depth = left.size(0), right.size(0), left.size(1)
    dtype, backward, t = (E4M3 if kept is None else E5M2), kept is not None, TILES
    out, turned = (left.new_empty(shape, dtype=dtype) for shape in ((rows, columns), (columns, rows)))
    amax, inverse = scale.new_zeros((), dtype=torch.float32), scale.new_empty((), dtype=torch.float32)
    matrices: tuple[Any, ...] = (left, right, kept, out, turned)
    tma = has_tma(*(m for m in matrices if m is not None))
    if tma:
        half = t.columns // 2
        blocks = ([t.rows, t.depth], [t.columns, t.depth], [half, t.rows], [t.rows, half], [half, t.rows])
        matrices = tuple(
            None if m is None else TensorDescriptor.from_tensor(m, block)
            for m, block in zip(matrices, blocks, strict=True)
        )
    grid = (min(programs(left.device), triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns)),)
    _fp8_relu2_kernel[grid](
        *matrices, *inverses, scale, inverse, amax, rows, columns, depth, **_constants(backward, tma),
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out, turned, inverse, amax


def _constants(backward: bool, tma: bool) -> dict[str, Any]:
    dtype = E5M2 if backward else E4M3
    return {
        "BACKWARD": backward, "TMA": tma, "FP8": TRITON_FP8[dtype], "LARGEST": LARGEST[dtype],
        "FIRST": FIRST_DH if backward else FIRST_A,
        "ROWS": TILES.rows, "COLUMNS": TILES.columns, "DEPTH": TILES.depth, "GROUP": BAND,
    }  # fmt: skip


def relu2_cast(
    n8: Tensor, inverse_n: Tensor, w8: Tensor, inverse_w: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Cast:
    """As relu2_cast_reference; the sums are float32."""
    return _launch(n8, w8, None, (inverse_n, inverse_w, None), scale)


def drelu2_cast(
    g8: Tensor,
    inverse_g: Tensor,
    w8t: Tensor,
    inverse_w: Tensor,
    a8t: Tensor,
    inverse_a: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Cast:
    """As drelu2_cast_reference; the sums are float32."""
    return _launch(g8, w8t, a8t, (inverse_g, inverse_w, inverse_a), scale)


def shipped() -> Iterator[Build]:
    """Both directions, by descriptor and through pointers."""
    half = TILES.columns // 2
    for backward in (False, True):
        result, source = ("fp8e5", "fp8e5") if backward else ("fp8e4nv", "fp8e4nv")
        blocks = {
            "left": (source, TILES.rows, TILES.depth), "right": ("fp8e4nv", TILES.columns, TILES.depth),
            "kept": ("fp8e4nv", half, TILES.rows),
            "out": (result, TILES.rows, half), "turned": (result, half, TILES.rows),
        }  # fmt: skip
        scalars = dict.fromkeys(
            ("inverse_left", "inverse_right", "inverse_kept", "scale_ptr", "inverse_out", "amax_ptr"), "*fp32"
        )
        scalars |= dict.fromkeys(("rows", "columns", "depth"), "i32")
        for tma in (True, False):
            types = {n: f"tensordesc<{d}[{r}, {c}]>" if tma else f"*{d}" for n, (d, r, c) in blocks.items()} | scalars
            constants = _constants(backward, tma)
            if not backward:
                constants |= {"kept": None, "inverse_kept": None}
                types = {n: t for n, t in types.items() if n not in ("kept", "inverse_kept")}
            name = f"fp8_norm_mlp {'backward' if backward else 'forward'} {'descriptors' if tma else 'pointers'}"
            yield Build(name, _fp8_relu2_kernel, types, constants, TILES.warps, num_stages=TILES.stages)
