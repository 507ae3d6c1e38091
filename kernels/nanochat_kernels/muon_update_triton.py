"""Muon in Triton: five kernels around the matrix products of Polar Express (orthogonalize_triton.py).

    momentum      M ← μM + (1−μ)G; X = (1−μ)G + μM to the compute dtype; ‖row‖ of it         one row a program
    equilibrate   X·(target/‖row‖)/(1.01‖X‖_F + 10⁻⁶): both scales follow from the row norms   one row a program
    square sums   Σx² of each row (each column, when wide) of the orthogonal factor
    factors       step 4's snap, the running rms S, NorMuon's factor, all of it per row         one matrix a program
    apply         W ← W − lr·factor·X − lr·λ·W·[X·W ≥ 0]                                        one row a program

What the reference does in about thirty passes over float32 matrices becomes: read G, M, write M, X; read and write X;
read X; read X, W, write W. X is in the compute dtype throughout. The products would allow the square sums as an
epilogue, were the last one ours. A row must fit one program: 16,384 columns and rows at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.compiled import Build
from nanochat_kernels.muon_update import Number
from nanochat_kernels.orthogonalize_triton import iterate

MAX_SIDE = 16384


@triton.jit
def _number(value, ON_DEVICE: tl.constexpr):
    return tl.load(value) if ON_DEVICE else value


@triton.jit
def _muon_momentum_kernel(
    grad_ptr, momentum_ptr, x_ptr, norm_ptr, columns, mu, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    offset = row * columns + column
    mu = _number(mu, ON_DEVICE)
    g = tl.load(grad_ptr + offset, mask=inside, other=0.0)
    m = tl.load(momentum_ptr + offset, mask=inside, other=0.0)
    m += (1 - mu) * (g - m)
    tl.store(momentum_ptr + offset, m, mask=inside)
    x = (g + mu * (m - g)).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + offset, x, mask=inside)
    x = x.to(tl.float32)
    tl.store(norm_ptr + row, tl.sqrt_rn(tl.sum(x * x, axis=0)))


@triton.jit
def _muon_equilibrate_kernel(x_ptr, norm_ptr, rows, columns, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """norm holds ‖row‖ of all rows of all matrices. Divided by the largest before squares are taken."""
    row = tl.program_id(0).to(tl.int64)
    first = row // rows * rows
    index = tl.arange(0, BLOCK_M)
    norms = tl.load(norm_ptr + first + index, mask=index < rows, other=0.0)
    largest = tl.maximum(tl.max(norms, axis=0), 1e-30)
    share = norms / largest
    target = largest * tl.sqrt_rn(tl.sum(share * share, axis=0) / rows)
    after = norms * (target / tl.maximum(norms, 1e-6))  # the target, but for rows that are all but zero
    share = after / largest
    whole = largest * tl.sqrt_rn(tl.sum(share * share, axis=0))
    factor = target / tl.maximum(tl.load(norm_ptr + row), 1e-6) / (1.01 * whole + 1e-6)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * columns + column, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _muon_square_sums_kernel(
    x_ptr, sum_ptr, outer, inner, x_batch, x_outer, x_inner, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr
):
    """Sums of squares over `inner` for BLOCK indices along `outer` of one matrix: rows or columns by their strides."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK, BLOCK_INNER), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        other = start + tl.arange(0, BLOCK_INNER)
        inside = (index < outer)[:, None] & (other < inner)[None, :]
        offset = batch * x_batch + index[:, None] * x_outer + other[None, :] * x_inner
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sum_ptr + batch * outer + index, tl.sum(total, axis=1), mask=index < outer)


@triton.jit
def _muon_factors_kernel(
    sum_ptr, second_ptr, factor_ptr, length, count, beta2, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr
):
    """Per row (or column) of one matrix; count elements in each. second is updated in place."""
    index = tl.arange(0, BLOCK)
    inside = index < length
    offset = tl.program_id(0).to(tl.int64) * length + index
    sums = tl.load(sum_ptr + offset, mask=inside, other=0.0)
    snap = tl.sqrt_rn(count * 1.0) / tl.maximum(tl.sqrt_rn(tl.sum(sums, axis=0)), 1e-6)
    sums *= snap * snap
    second = tl.load(second_ptr + offset, mask=inside, other=0.0)
    second += (1 - _number(beta2, ON_DEVICE)) * (sums / count - second)
    tl.store(second_ptr + offset, second, mask=inside)
    scale = 1.0 / tl.sqrt_rn(tl.maximum(second, 1e-10))
    before = tl.sqrt_rn(tl.sum(sums, axis=0))
    after = tl.sqrt_rn(tl.sum(sums * scale * scale, axis=0))
    tl.store(factor_ptr + offset, snap * scale * before / tl.maximum(after, 1e-10), mask=inside)


@triton.jit
def _muon_apply_kernel(
    param_ptr, x_ptr, factor_ptr, rows, columns, x_batch, x_row, x_column, lr, decay,
    ON_DEVICE: tl.constexpr, BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // rows
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x_offset = batch * x_batch + row % rows * x_row + column * x_column
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    if BY_ROW:
        x *= tl.load(factor_ptr + row)
    else:
        x *= tl.load(factor_ptr + batch * columns + column, mask=inside, other=0.0)
    lr = _number(lr, ON_DEVICE)
    shrink = lr * _number(decay, ON_DEVICE)
    w = tl.load(param_ptr + row * columns + column, mask=inside, other=0.0)
    w -= lr * x + tl.where(x * w >= 0, shrink * w, 0.0)
    tl.store(param_ptr + row * columns + column, w, mask=inside)


def muon_update_triton(
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
    """As the reference; params, momentum and second contiguous, sides up to 16,384."""
    k, m, n = params.shape
    if max(m, n) > MAX_SIDE:
        raise ValueError(f"muon_update=triton: a side of {max(m, n)}, at most {MAX_SIDE}; take muon_update=torch")
    if not (params.is_contiguous() and momentum.is_contiguous() and second.is_contiguous()):
        raise ValueError("muon_update=triton: parameters and state must be contiguous; take muon_update=torch")
    on_device = any(isinstance(value, Tensor) for value in (lr, mu, decay, beta2))
    lr, mu, decay, beta2 = (_scalar(value, params.device, on_device) for value in (lr, mu, decay, beta2))
    row = {"BLOCK": triton.next_power_of_2(n), "num_warps": _warps(n)}
    x = torch.empty_like(params, dtype=compute_dtype)
    norms = params.new_empty((k, m))
    _muon_momentum_kernel[(k * m,)](grads.contiguous(), momentum, x, norms, n, mu, ON_DEVICE=on_device, **row)
    _muon_equilibrate_kernel[(k * m,)](x, norms, m, n, BLOCK_M=triton.next_power_of_2(m), **row)
    x = iterate(x)
    by_row = m >= n
    length, count = (m, n) if by_row else (n, m)
    sums, factors = params.new_empty((k, length)), params.new_empty((k, length))
    tile = _tile(by_row)
    strides = (x.stride(1), x.stride(2)) if by_row else (x.stride(2), x.stride(1))
    _muon_square_sums_kernel[(triton.cdiv(length, tile["BLOCK"]), k)](
        x, sums, length, count, x.stride(0), *strides, **tile
    )
    _muon_factors_kernel[(k,)](
        sums, second, factors, length, count, beta2,
        ON_DEVICE=on_device, BLOCK=triton.next_power_of_2(length), num_warps=_warps(length),
    )  # fmt: skip
    _muon_apply_kernel[(k * m,)](
        params, x, factors, m, n, *x.stride(), lr, decay, ON_DEVICE=on_device, BY_ROW=by_row, **row
    )


def _scalar(value: Number, device: torch.device, on_device: bool) -> Number:
    if not on_device:
        return float(value)
    if isinstance(value, Tensor):
        return value.to(device, torch.float32).reshape(1)
    return torch.full((1,), float(value), device=device)


def _warps(length: int) -> int:
    return min(max(triton.next_power_of_2(length) // 512, 1), 16)


def _tile(by_row: bool) -> dict[str, Any]:
    """Rows are summed along memory, columns across it: the wide side of the tile lies along memory."""
    return {"BLOCK": 8, "BLOCK_INNER": 256} if by_row else {"BLOCK": 128, "BLOCK_INNER": 16}


def shipped() -> Iterator[Build]:
    """The projections of depth 12 and the MLP of depth 24, tall and wide, iterated in bf16."""
    floats = ("mu", "beta2", "lr", "decay")
    kernels = (
        _muon_momentum_kernel,
        _muon_equilibrate_kernel,
        _muon_square_sums_kernel,
        _muon_factors_kernel,
        _muon_apply_kernel,
    )
    for m, n in ((768, 768), (6144, 1536), (1536, 6144)):
        by_row = m >= n
        row: dict[str, object] = {"BLOCK": triton.next_power_of_2(n)}
        length = max(m, n)
        constants: dict[str, dict[str, object]] = {
            "momentum": row | {"ON_DEVICE": False},
            "equilibrate": row | {"BLOCK_M": triton.next_power_of_2(m)},
            "square_sums": _tile(by_row) | {"x_inner" if by_row else "x_outer": 1},
            "factors": {"ON_DEVICE": False, "BLOCK": triton.next_power_of_2(length)},
            "apply": row | {"ON_DEVICE": False, "BY_ROW": by_row, "x_column": 1},
        }
        for kernel, (part, fixed) in zip(kernels, constants.items()):
            arguments = {
                name: ("*bf16" if name == "x_ptr" else "*fp32")
                if name.endswith("_ptr")
                else "fp32"
                if name in floats
                else "i32"
                for name in kernel.arg_names
                if name not in fixed
            }
            warps = {"square_sums": 4, "factors": _warps(length)}.get(part, _warps(n))
            yield Build(f"muon_update {part} {m}x{n}", kernel, arguments, fixed, warps)
