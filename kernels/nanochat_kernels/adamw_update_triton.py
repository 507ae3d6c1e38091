"""AdamW in Triton: one launch updates any number of tensors, of any sizes and with numbers of their own.

A table in GPU memory says where things are; the kernel's grid covers all tensors, one after the other:

    per tensor    addresses of p, g, m, v · elements · the block after its last        (6 × int64)
    per tensor    1 − lr·λ, lr/(1−β₁ᵗ), 1−β₁, 1−β₂, 1/(1−β₂ᵗ), ε                       (6 × float32)

A program finds its tensor by counting how many end before it. Every element of g is read once, of p, m and v read and
written once: memory-bound, so what a launch per tensor costs is its start (about 5 µs, and the tail of a grid that
does not fill the machine), which matters for the dozens of small tensors, not for the tables of embeddings. The price
is one small asynchronous copy per call. Tensors whose addresses and sizes allow wide accesses go apart from those that
do not, and so do pairs of dtypes: one launch each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.adamw_update import Numbers, per_tensor
from nanochat_kernels.compiled import Build

BLOCK = 2048
WARPS = 8


@triton.jit
def _pointer(row, field: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + field).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _adamw_update_kernel(
    table_ptr, number_ptr, count,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """COUNT is a power of two, at least count."""
    tensor = tl.arange(0, COUNT)
    ends = tl.load(table_ptr + tensor * 6 + 5, mask=tensor < count, other=1 << 62)
    index = tl.sum((ends <= tl.program_id(0)).to(tl.int32), axis=0)
    row = table_ptr + index * 6
    size = tl.load(row + 4)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    first = tl.load(row + 5) - (size + BLOCK - 1) // BLOCK
    offset = (tl.program_id(0) - first) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    p_ptr = _pointer(row, 0, PARAM, ALIGNED) + offset
    m_ptr = _pointer(row, 2, PARAM, ALIGNED) + offset
    v_ptr = _pointer(row, 3, PARAM, ALIGNED) + offset
    g = tl.load(_pointer(row, 1, GRAD, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(p_ptr, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=inside, other=0.0).to(tl.float32)
    number_ptr += index * 6
    m += tl.load(number_ptr + 2) * (g - m)
    v += tl.load(number_ptr + 3) * (g * g - v)
    denominator = tl.sqrt_rn(v * tl.load(number_ptr + 4)) + tl.load(number_ptr + 5)
    p = p * tl.load(number_ptr) - tl.load(number_ptr + 1) * tl.div_rn(m, denominator)
    tl.store(p_ptr, p.to(PARAM), mask=inside)
    tl.store(m_ptr, m.to(PARAM), mask=inside)
    tl.store(v_ptr, v.to(PARAM), mask=inside)


def adamw_update_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: Numbers,
    beta1: Numbers,
    beta2: Numbers,
    eps: float,
    decay: Numbers,
) -> None:
    """As the reference. Dense tensors; parameters and moments of equal strides, gradients are copied where they
    differ."""
    numbers = [
        (1 - lr_ * decay_, lr_ / (1 - beta1_**step), 1 - beta1_, 1 - beta2_, 1 / (1 - beta2_**step), eps)
        for lr_, beta1_, beta2_, decay_ in zip(*(per_tensor(x, len(params)) for x in (lr, beta1, beta2, decay)))
    ]
    launches: dict[tuple, list[int]] = {}
    grads = [
        g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g) for g, p in zip(grads, params)
    ]
    for i, four in enumerate(zip(params, grads, exp_avg, exp_avg_sq)):
        if four[0].numel():
            aligned = four[0].numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in four)
            launches.setdefault((four[0].device, four[0].dtype, four[1].dtype, aligned), []).append(i)
    for (device, dtype, grad_dtype, aligned), members in launches.items():
        table, blocks = [], 0
        for i in members:
            four = (params[i], grads[i], exp_avg[i], exp_avg_sq[i])
            blocks += triton.cdiv(four[0].numel(), BLOCK)
            table.append([*(x.data_ptr() for x in four), four[0].numel(), blocks])
        _adamw_update_kernel[(blocks,)](
            _on(device, table, torch.int64), _on(device, [numbers[i] for i in members], torch.float32), len(members),
            PARAM=_TYPES[dtype], GRAD=_TYPES[grad_dtype], ALIGNED=aligned,
            COUNT=triton.next_power_of_2(len(members)), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _on(device: torch.device, rows: Sequence[Sequence], dtype: torch.dtype) -> Tensor:
    """A small table on the device without waiting for it; numbers that are tensors there are never looked at here."""
    if any(isinstance(x, Tensor) for row in rows for x in row):
        flat = [torch.as_tensor(x, dtype=dtype, device=device).reshape(()) for row in rows for x in row]
        return torch.stack(flat)
    table = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def shipped() -> Iterator[Build]:
    """Head and scalars (float32) and embeddings (bf16), a handful of tensors each."""
    types = {"table_ptr": "*i64", "number_ptr": "*fp32", "count": "i32"}
    for name, param, grad in (("float32", tl.float32, tl.float32), ("bfloat16", tl.bfloat16, tl.bfloat16)):
        constants = {"PARAM": param, "GRAD": grad, "ALIGNED": True, "COUNT": 16, "BLOCK": BLOCK}
        yield Build(f"adamw_update {name}", _adamw_update_kernel, types, constants, WARPS, odd=("count",))
