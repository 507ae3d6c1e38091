"""Attention in Triton: scores live in registers, and a window is a bound of a loop, not a mask over T².

    S = QKᵀ/√D      P = exp(S − L)      O = PV        L = log Σ_j exp(S_j), saved: (B, H, T) float32
    Δ = Σ_d dO·O    dV = PᵀdO    dS = P∘(dOVᵀ − Δ)    dQ = dS·K/√D    dK = dSᵀQ/√D

Forward: one program per block of queries and head. It walks over the blocks of keys that its window reaches, keeps
the running maximum and sum of each row (online softmax: Milakov, Gimelshein, arXiv 1805.02867; Dao, arXiv
2307.08691), and rescales what it has when the maximum grows. Only blocks at the two edges, where the window begins
and at the diagonal, compare positions; all between are free of masks:

        keys →      window edge       interior       diagonal
    query block   [ ▚▚ masked ▚▚ ] [ ██ ██ ██ ██ ] [ ▚▚ masked ▚▚ ]

Backward: P is formed again from L, which costs one product and saves the T² memory. Two kernels, each with one owner
of what it sums: a program per block of keys (all query heads of its group, all queries that can see it) for dK and
dV, a program per block of queries for dQ. The price is seven products where one kernel with atomic additions to dQ
needs five; bought with it are sums in a fixed order (the same bits every time) and no float32 copy of dQ.

Work is T·(window + one block) per head in each direction; memory beyond the results is L and Δ. Layout (B, T, H, D)
with any strides before D, so q, k and v may be views of one product. Exponentials are base 2, the hardware's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat_kernels import autotune
from nanochat_kernels.compiled import Build

LOG2_E = math.log2(math.e)


@triton.jit
def _load_rows(rows, batch, start, head, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) of one head's tokens from `start` on; zeros beyond the sequence and beyond D."""
    return rows.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)


@triton.jit
def _store_rows(
    ptr, value, start, token_stride, length, HEAD_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = start + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + token * token_stride + d, value.to(ptr.dtype.element_ty), mask=(token < length) & (d < HEAD_D))


@triton.jit
def _key_bounds(first, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the queries first … first + BLOCK_M: where their keys begin, the interior begins, ends, and the keys end."""
    begin = tl.maximum(first - window, 0) // BLOCK_N * BLOCK_N
    diagonal = first // BLOCK_N * BLOCK_N
    interior = (tl.maximum(first + BLOCK_M - 1 - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    interior = tl.minimum(interior, diagonal)
    return begin, interior, diagonal, tl.minimum(first + BLOCK_M, length)


@triton.jit
def _visible(query, key, window):
    """0 ≤ query − key ≤ window in one comparison: negative distances are huge without a sign."""
    return (query - key).to(tl.uint32, bitcast=True) <= tl.cast(window, tl.uint32)


@triton.jit
def _forward_blocks(
    acc, total, top, q, k_rows, v_rows, batch, kv_head, row, start, stop, window, scale,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for n in tl.range(start, stop, BLOCK_N):
        k = _load_rows(k_rows, batch, n, kv_head, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            s = tl.where(_visible(row[:, None], (n + tl.arange(0, BLOCK_N))[None, :], window), s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        v = _load_rows(v_rows, batch, n, kv_head, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, total, top


@triton.jit
def _attention_fwd_kernel(
    q_rows, k_rows, v_rows, out_ptr, lse_ptr, length, heads, group, window, scale,
    HEAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale is log₂e/√D, lse in units of log 2. The last queries have the most keys and start first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    out_ptr += (batch.to(tl.int64) * length * heads + head) * HEAD_D
    row = first + tl.arange(0, BLOCK_M)
    q = _load_rows(q_rows, batch, first, head, BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: a row may see nothing of its first block
    begin, interior, diagonal, end = _key_bounds(first, length, window, BLOCK_M, BLOCK_N)
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_rows, v_rows, batch, head // group, row, begin, interior, window, scale,
        True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_rows, v_rows, batch, head // group, row, interior, diagonal, window, scale,
        False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_rows, v_rows, batch, head // group, row, diagonal, end, window, scale,
        True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_rows(out_ptr, acc / total[:, None], first, heads * HEAD_D, length, HEAD_D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * length + row, top + tl.log2(total), mask=row < length)


@triton.jit
def _attention_delta_kernel(
    out_ptr, dout_ptr, delta_ptr, length, heads, HEAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Δ of a block of queries: what the softmax's gradient subtracts. Results and their gradients are contiguous."""
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    offset = ((batch * length + row[:, None]) * heads + tl.program_id(1) % heads) * HEAD_D + d
    inside = (row < length)[:, None] & (d < HEAD_D)
    out = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, axis=1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * length + row, delta, mask=row < length)


@triton.jit
def _attention_dkdv_kernel(
    q_rows, k_rows, v_rows, dout_rows, lse_ptr, delta_ptr, dk_ptr, dv_ptr, length, heads, group, window, scale, root,
    HEAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key/value head; root is D^-½. The first keys have the most queries and start first.

    Scores are formed transposed, (keys, queries), so that P and dS are the left factors of the sums as they come. One
    loop that always masks: three would spill. Queries beyond the sequence load as zeros and add nothing. Δ enters as
    the start of dP's sum, which frees its registers.
    """
    first = tl.program_id(0) * BLOCK_N
    kv_heads = heads // group
    batch = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    column = first + tl.arange(0, BLOCK_N)
    k = _load_rows(k_rows, batch, first, kv_head, BLOCK_N, BLOCK_D)
    v = _load_rows(v_rows, batch, first, kv_head, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    end = tl.minimum(first + BLOCK_N + window, length)
    for member in range(0, group):
        head = kv_head * group + member
        row_lse = lse_ptr + (batch * heads + head).to(tl.int64) * length
        row_delta = delta_ptr + (batch * heads + head).to(tl.int64) * length
        for m in tl.range(first // BLOCK_M * BLOCK_M, end, BLOCK_M):
            row = m + tl.arange(0, BLOCK_M)
            lse = tl.load(row_lse + row, mask=row < length, other=0.0)
            q = _load_rows(q_rows, batch, m, head, BLOCK_M, BLOCK_D)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
            distance = row[None, :] - column[:, None]
            p = tl.where((distance >= 0) & (distance <= window), p, 0.0)
            dout = _load_rows(dout_rows, batch, m, head, BLOCK_M, BLOCK_D)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            delta = tl.load(row_delta + row, mask=row < length, other=0.0)
            less = tl.broadcast_to(-delta[None, :], (BLOCK_N, BLOCK_M))
            ds = p * tl.dot(v, tl.trans(dout), less, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    start = (batch.to(tl.int64) * length * kv_heads + kv_head) * HEAD_D
    _store_rows(dk_ptr + start, dk * root, first, kv_heads * HEAD_D, length, HEAD_D, BLOCK_N, BLOCK_D)
    _store_rows(dv_ptr + start, dv, first, kv_heads * HEAD_D, length, HEAD_D, BLOCK_N, BLOCK_D)


@triton.jit
def _dq_blocks(
    dq, q, dout, lse, delta, k_rows, v_rows, batch, kv_head, row, start, stop, window, scale,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for n in tl.range(start, stop, BLOCK_N):
        k = _load_rows(k_rows, batch, n, kv_head, BLOCK_N, BLOCK_D)
        v = _load_rows(v_rows, batch, n, kv_head, BLOCK_N, BLOCK_D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if MASKED:
            p = tl.where(_visible(row[:, None], (n + tl.arange(0, BLOCK_N))[None, :], window), p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_dq_kernel(
    q_rows, k_rows, v_rows, dout_rows, lse_ptr, delta_ptr, dq_ptr, length, heads, group, window, scale, root,
    HEAD_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = first + tl.arange(0, BLOCK_M)
    statistics = tl.program_id(1).to(tl.int64) * length + row
    q = _load_rows(q_rows, batch, first, head, BLOCK_M, BLOCK_D)
    dout = _load_rows(dout_rows, batch, first, head, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + statistics, mask=row < length, other=0.0)
    delta = tl.load(delta_ptr + statistics, mask=row < length, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, interior, diagonal, end = _key_bounds(first, length, window, BLOCK_M, BLOCK_N)
    dq = _dq_blocks(
        dq, q, dout, lse, delta, k_rows, v_rows, batch, head // group, row, begin, interior, window, scale,
        True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_blocks(
        dq, q, dout, lse, delta, k_rows, v_rows, batch, head // group, row, interior, diagonal, window, scale,
        False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_blocks(
        dq, q, dout, lse, delta, k_rows, v_rows, batch, head // group, row, diagonal, end, window, scale,
        True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    start = (batch.to(tl.int64) * length * heads + head) * HEAD_D
    _store_rows(dq_ptr + start, dq * root, first, heads * HEAD_D, length, HEAD_D, BLOCK_M, BLOCK_D)


@dataclass(frozen=True)
class Launch:
    """Tile of queries and keys, warps, and how many tiles are under way at once."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


CANDIDATES = {  # (kernel, block of D): the shipped one, then what autotune.py may find faster
    ("forward", 64): (Launch(128, 128, 8, 3), Launch(128, 64, 8, 3)),
    ("forward", 128): (Launch(128, 64, 8, 3), Launch(128, 128, 8, 2), Launch(64, 64, 4, 3)),
    ("dkdv", 64): (Launch(64, 128, 8, 3), Launch(64, 64, 4, 3)),
    ("dkdv", 128): (Launch(64, 128, 8, 2), Launch(32, 128, 8, 2)),
    ("dq", 64): (Launch(128, 64, 8, 3), Launch(128, 128, 8, 2)),
    ("dq", 128): (Launch(128, 64, 8, 2), Launch(128, 64, 8, 3), Launch(64, 64, 4, 2)),
}
SMALL = Launch(32, 32, 4, 2)  # float32 and short sequences


def attention_triton(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """As the reference, for D up to 256."""
    if q.size(-1) > 256:
        raise ValueError(f"attention=triton: head size {q.size(-1)}, at most 256; take attention=sdpa")
    return torch.ops.nanochat.attention(q, k, v, window)[0]


def _tuned(kernel: str, q: Tensor, window: int, run: Callable[[Launch], None]) -> None:
    """Runs with the configuration that autotune.py picks for these shapes."""
    block_d, t = _block_d(q), q.size(1)
    small = q.element_size() > 2 or t <= 64
    candidates = (SMALL,) if small else CANDIDATES.get((kernel, max(block_d, 64)), (SMALL,))
    key = f"{q.dtype} D{block_d} T{t} window {min(window, t)}"
    run(autotune.choose(f"attention {kernel}", key, candidates, run, q.device))


def _block_d(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.size(-1)))


def _constants(launch: Launch, q: Tensor) -> dict[str, int]:
    return {**asdict(launch), "HEAD_D": q.size(-1), "BLOCK_D": _block_d(q)}


def _sizes(q: Tensor, k: Tensor, window: int) -> tuple[int, int, int, int]:
    """(length, heads, query heads per key/value head, window within the sequence)"""
    return q.size(1), q.size(2), q.size(2) // k.size(2), min(window, q.size(1))


def _readable(x: Tensor) -> Tensor:
    """x where the copy engine can read it: 16-byte steps and a dense last dimension; else a contiguous copy."""
    steps = [stride * x.element_size() for stride in x.stride()[:3]]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step and step % 16 == 0 for step in steps)
    return x if fits else x.contiguous()


def _rows(x: Tensor, block: int, block_d: int) -> TensorDescriptor:
    """(B, T, H, D) as the kernels load it: `block` tokens of one head at a time."""
    b, t, h, d = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    return TensorDescriptor(x, [b, h, t, d], strides, [1, 1, block, block_d])


@torch.library.custom_op("nanochat::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(out, lse): lse (B, H, T) float32 in units of log 2, for the backward pass."""
    q, k, v = (_readable(x) for x in (q, k, v))
    b, t, h, d = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((b, h, t), dtype=torch.float32)
    sizes = (*_sizes(q, k, window), LOG2_E * d**-0.5)

    def forward(launch: Launch) -> None:
        by_query, by_key = (launch.BLOCK_M, _block_d(q)), (launch.BLOCK_N, _block_d(q))
        _attention_fwd_kernel[(triton.cdiv(t, launch.BLOCK_M), b * h)](
            _rows(q, *by_query), _rows(k, *by_key), _rows(v, *by_key), out, lse, *sizes, **_constants(launch, q)
        )

    _tuned("forward", q, window, forward)
    return out, lse


@_attention.register_fake
def _(q, k, v, window):
    b, t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, t), dtype=torch.float32)


@torch.library.custom_op("nanochat::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous."""
    q, k, v = (_readable(x) for x in (q, k, v))
    dout = dout.contiguous()
    b, t, h, d = q.shape
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    sizes = (*_sizes(q, k, window), LOG2_E * d**-0.5, d**-0.5)
    tile = {"HEAD_D": d, "BLOCK_D": _block_d(q)}
    _attention_delta_kernel[(triton.cdiv(t, 64), b * h)](out, dout, delta, t, h, BLOCK_M=64, **tile)

    def launch_over(kernel: Any, grid: Callable[[Launch], tuple[int, int]], *results: Tensor) -> Callable:
        def run(launch: Launch) -> None:
            m, n = (launch.BLOCK_M, _block_d(q)), (launch.BLOCK_N, _block_d(q))
            rows = (_rows(q, *m), _rows(k, *n), _rows(v, *n), _rows(dout, *m))
            kernel[grid(launch)](*rows, lse, delta, *results, *sizes, **_constants(launch, q))

        return run

    by_key = launch_over(_attention_dkdv_kernel, lambda c: (triton.cdiv(t, c.BLOCK_N), b * k.size(2)), dk, dv)
    _tuned("dkdv", q, window, by_key)
    by_query = launch_over(_attention_dq_kernel, lambda c: (triton.cdiv(t, c.BLOCK_M), b * h), dq)
    _tuned("dq", q, window, by_query)
    return dq, dk, dv


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, window):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx, inputs, output):
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    return *torch.ops.nanochat.attention_backward(dout, *ctx.saved_tensors, ctx.window), None


_attention.register_autograd(_backward, setup_context=_setup)


def shipped() -> Iterator[Build]:
    """The launches of training in bf16, for head sizes 64 and 128; a window only moves the bounds of loops."""
    kernels = {"forward": _attention_fwd_kernel, "dkdv": _attention_dkdv_kernel, "dq": _attention_dq_kernel}
    for kind, d, launch in ((kind, d, c) for (kind, d), candidates in CANDIDATES.items() for c in candidates):
        kernel = kernels[kind]
        constants: dict[str, object] = {"HEAD_D": d, "BLOCK_M": launch.BLOCK_M, "BLOCK_N": launch.BLOCK_N, "BLOCK_D": d}
        arguments = {name: _type(name, launch, d) for name in kernel.arg_names if name not in constants}
        shape = f"{launch.BLOCK_M}x{launch.BLOCK_N} {launch.num_stages} stages"
        name = f"attention {kind} {d} {shape}"
        odd = ("heads", "group")
        yield Build(name, kernel, arguments, constants, launch.num_warps, odd, launch.num_stages)


def _type(name: str, launch: Launch, d: int) -> str:
    if name.endswith("_rows"):
        return f"tensordesc<bf16[1, 1, {launch.BLOCK_N if name[0] in 'kv' else launch.BLOCK_M}, {d}]>"
    if name.endswith("_ptr"):
        return "*fp32" if name in ("lse_ptr", "delta_ptr") else "*bf16"
    return "fp32" if name in ("scale", "root") else "i32"
