"""relu2_mlp in Triton: the square rides in the epilogue of the first product, its derivative in that of dy·W_proj.

    forward     a  = relu(x·W_fcᵀ)²          one kernel; h never reaches memory
                y  = a·W_projᵀ               torch's product
    backward    dh = 2·√a·(dy·W_proj)        one kernel; da never reaches memory
                dx = dh·W_fc, dW_fc = dhᵀ·x, dW_proj = dyᵀ·a       torch's products

What is kept is a alone: √a is relu(h), and halves a's relative rounding error, so it is nearer to the truth than a
stored h would be. The hidden tensor, four times as wide as x, is written once and read once forward; torch in eager
mode writes h, relu(h) and a, and reads them all again. The price: a float16 h beyond 256 overflows, as in the
reference.

Layout. Tiles of 128 × 256 outputs, one at a time, by as many programs as the chip has processors ("persistent"): a
program's next loads start while its last tile is still being stored. Tiles are visited in bands of 8 rows, so that
those in flight share their operands in the second-level cache. Both products read their weight as it is stored: W_fc
(hidden, C) along the sum, W_proj (C, hidden) across it, which the tensor cores of Hopper take either way in 16 bits.

Operands travel by tensor descriptors (TMA: one thread asks for a whole tile, out-of-range parts come as zeros and are
not stored) where chip and strides allow it, and through plain pointers with masks elsewhere: odd widths, older chips.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat_kernels.compiled import Build
from nanochat_kernels.triton_support import interpreted


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: a program computes rows × columns outputs, depth terms of the sum at a time."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3


@triton.jit
def load_tile(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Tile (ROWS, COLUMNS) at (row, column) of a row-major matrix, zero beyond its edges."""
    if TMA:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r[:, None] < rows) & (c[None, :] < columns)
        return tl.load(source + r[:, None].to(tl.int64) * columns + c[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(target, tile, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        target.store([row, column], tile)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r[:, None] < rows) & (c[None, :] < columns)
        tl.store(target + r[:, None].to(tl.int64) * columns + c[None, :], tile, mask=inside)


@triton.jit
def tile_at(number, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row, column) of tile `number`: bands of GROUP rows of tiles, each band walked column by column."""
    band = GROUP * column_tiles
    first = number // band * GROUP
    height = min(row_tiles - first, GROUP)
    return first + number % band % height, number % band // height


@triton.jit
def _relu2_kernel(
    a, b, kept, out, rows, columns, depth,
    DTYPE: tl.constexpr, BACKWARD: tl.constexpr, TMA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Forward: out = relu(a·bᵀ)² with a (rows, depth), b (columns, depth). Backward: out = 2·√kept·(a·b), b (depth,
    columns), kept and out (rows, columns)."""
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    for number in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        tile_row, tile_column = tile_at(number, row_tiles, column_tiles, GROUP)
        row = tile_row * ROWS
        column = tile_column * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            left = load_tile(a, row, k, rows, depth, ROWS, DEPTH, TMA)
            if BACKWARD:
                right = load_tile(b, k, column, depth, columns, DEPTH, COLUMNS, TMA)
            else:
                right = load_tile(b, column, k, columns, depth, COLUMNS, DEPTH, TMA).T
            total = tl.dot(left, right, total, input_precision="ieee")
        # The epilogue works on halves of the tile: the staging memory it saves is a further stage of the pipeline.
        half: tl.constexpr = COLUMNS // 2
        parts = total.reshape(ROWS, 2, half).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            part = parts[i]
            at = column + i * half
            if BACKWARD:
                root = tl.sqrt(load_tile(kept, row, at, rows, columns, ROWS, half, TMA).to(tl.float32))
                part = 2.0 * root * part
            else:
                part = tl.maximum(part, 0.0)
                part = part * part
            store_tile(out, part.to(DTYPE), row, at, rows, columns, ROWS, half, TMA)


BAND = 8  # rows of tiles that are visited together
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tiles_for(dtype: torch.dtype, backward: bool) -> Tiles:
    """What fits Hopper's 227 KiB of shared memory: three or four stages of operands beside half a tile of results."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, warps=4, stages=2)
    return Tiles(stages=3 if backward else 4)


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs run at a time: one per processor. A few in the interpreter, so that each does several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def has_tma(*matrices: Tensor) -> bool:
    """Can these contiguous matrices travel by descriptor: on a Hopper chip, in rows of a multiple of 16 bytes?"""
    device = matrices[0].device
    if device.type == "cuda":
        chip = torch.cuda.get_device_capability(device) >= (9, 0)
    else:
        chip = interpreted()
    fits = all(m.data_ptr() % 16 == 0 and m.size(-1) * m.element_size() % 16 == 0 for m in matrices)
    return chip and fits


def _product(a: Tensor, b: Tensor, kept: Tensor | None, rows: int, columns: int) -> Tensor:
    """One launch of the kernel over contiguous matrices of one dtype."""
    out = a.new_empty((rows, columns))
    if out.numel() == 0:
        return out
    depth, backward = a.size(1), kept is not None
    t = tiles_for(a.dtype, backward)
    tma = has_tma(a, b, out, *(() if kept is None else (kept,)))
    sources: tuple[Any, ...] = (a, b, kept, out)
    if tma:
        right = [t.depth, t.columns] if backward else [t.columns, t.depth]
        blocks = ([t.rows, t.depth], right, [t.rows, t.columns // 2], [t.rows, t.columns // 2])
        sources = tuple(
            None if m is None else TensorDescriptor.from_tensor(m, block)
            for m, block in zip(sources, blocks, strict=True)
        )
    grid = (min(programs(a.device), triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns)),)
    _relu2_kernel[grid](
        *sources, rows, columns, depth, DTYPE=TRITON_DTYPES[a.dtype], BACKWARD=backward, TMA=tma,
        ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, GROUP=BAND, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("nanochat::relu2_mlp", mutates_args=())
def _relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> tuple[Tensor, Tensor]:
    """(y (M, C), a (M, hidden)) of x (M, C) and weights in its dtype."""
    x, w_fc, w_proj = x.contiguous(), w_fc.contiguous(), w_proj.contiguous()
    a = _product(x, w_fc, None, x.size(0), w_fc.size(0))
    return a @ w_proj.mT, a


@_relu2_mlp.register_fake
def _(x, w_fc, w_proj):
    return x.new_empty((x.size(0), w_proj.size(0))), x.new_empty((x.size(0), w_fc.size(0)))


@torch.library.custom_op("nanochat::relu2_mlp_backward", mutates_args=())
def _relu2_mlp_backward(
    dy: Tensor, x: Tensor, w_fc: Tensor, w_proj: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW_fc, dW_proj) in the dtype of x."""
    dy, x, w_fc, w_proj = dy.contiguous(), x.contiguous(), w_fc.contiguous(), w_proj.contiguous()
    dh = _product(dy, w_proj, a, dy.size(0), w_proj.size(1))
    return dh @ w_fc, dh.mT @ x, dy.mT @ a


@_relu2_mlp_backward.register_fake
def _(dy, x, w_fc, w_proj, a):
    return x.new_empty(x.shape), w_fc.new_empty(w_fc.shape), w_proj.new_empty(w_proj.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    return torch.ops.nanochat.relu2_mlp_backward(dy, *ctx.saved_tensors)


_relu2_mlp.register_autograd(_backward, setup_context=_setup)


def relu2_mlp_triton(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """As the reference."""
    y, _ = torch.ops.nanochat.relu2_mlp(x.flatten(0, -2), w_fc.to(x.dtype), w_proj.to(x.dtype))
    return y.unflatten(0, x.shape[:-1])


def shipped() -> Iterator[Build]:
    """Both directions in bf16, by descriptor (the model's widths) and through pointers."""
    for backward in (False, True):
        t = tiles_for(torch.bfloat16, backward)
        right = (t.depth, t.columns) if backward else (t.columns, t.depth)
        half = (t.rows, t.columns // 2)
        blocks = {"a": (t.rows, t.depth), "b": right, "out": half} | ({"kept": half} if backward else {})
        for tma in (True, False):
            types = {n: f"tensordesc<bf16[{r}, {c}]>" if tma else "*bf16" for n, (r, c) in blocks.items()}
            types |= dict.fromkeys(("rows", "columns", "depth"), "i32")
            constants: dict[str, object] = {
                "DTYPE": tl.bfloat16, "BACKWARD": backward, "TMA": tma,
                "ROWS": t.rows, "COLUMNS": t.columns, "DEPTH": t.depth, "GROUP": BAND,
            }  # fmt: skip
            if not backward:
                constants["kept"] = None
            name = f"relu2_mlp {'backward' if backward else 'forward'} {'descriptors' if tma else 'pointers'}"
            yield Build(name, _relu2_kernel, types, constants, t.warps, num_stages=t.stages)
