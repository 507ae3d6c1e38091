"""What lies between the product of x with W_qkv and attention over a paged cache, in one op. No gradients.

    q, k ← scale·rmsnorm(rotate(q)), scale·rmsnorm(rotate(k))      v ← v + 3·sigmoid(x[:I]·W_gateᵀ)·embedding[token]

as in rope_qk_norm, with the gate's logits, the rows of the rotary tables and of the value embedding looked up here.
Queries are overwritten where they stand in qkv; keys and values go into the cache, in its dtype (FP8 without a scale:
normed keys and values of order one lie inside e4m3's range). Of three launches and five lookups per layer one remains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.rope_qk_norm import rope_qk_norm_reference

LARGEST_FP8 = 448.0


def paged_qkv_reference(
    qkv: Tensor,
    x: Tensor,
    tokens: Tensor,
    positions: Tensor,
    table: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    embeddings: Tensor | None,
    gate_weight: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float = 1.2,
) -> None:
    """Changes qkv (N, (H+2G)·D), k_cache and v_cache (blocks, block_size, G, D) in place.

    x (N, C); tokens, positions (N,) int64, a negative position being padding; table (S, M) and starts (S+1,) int32 as
    in paged_attention; cos, sin (P, D/2); embeddings (V, G·D) and gate_weight (G, I), both or neither.
    """
    size, groups, dims = k_cache.shape[1:]
    q, k, v = qkv.unflatten(-1, (-1, dims)).split([qkv.size(1) // dims - 2 * groups, groups, groups], dim=1)
    ve = gate = None
    if embeddings is not None and gate_weight is not None:
        ve, gate = embeddings[tokens][None], torch.nn.functional.linear(x[None, :, : gate_weight.size(1)], gate_weight)
    turns = positions.clamp_min(0)
    new_q, k, v = rope_qk_norm_reference(q[None], k[None], v[None], cos[turns], sin[turns], ve, gate, scale=scale)
    q.copy_(new_q[0])
    counts = (starts[1:] - starts[:-1]).long()
    sequences = torch.arange(counts.size(0), device=counts.device).repeat_interleave(counts)
    blocks = table[sequences, (turns // size).clamp_max(table.size(1) - 1)].long()
    there = (positions >= 0) & (blocks >= 0)
    slots = (blocks * size + turns % size)[there]
    for cache, new in ((k_cache, k[0]), (v_cache, v[0])):
        if cache.dtype == torch.float8_e4m3fn:
            new = new.clamp(-LARGEST_FP8, LARGEST_FP8)
        cache.flatten(0, 1)[slots] = new[there].to(cache.dtype)


def _cases() -> Iterator[Case]:
    def make(new, lengths, block, h, g, d, embedding=True, fp8=False):
        """new[s] tokens of a sequence that is then lengths[s] long."""

        def build(device, dtype, generator):
            needed = [-(-length // block) for length in lengths]
            total, n = sum(needed) + 2, sum(new)
            places = torch.randperm(total, generator=generator).tolist()
            table = torch.full((len(lengths), max([*needed, 1]) + 1), -1, dtype=torch.int32)
            for s, count in enumerate(needed):
                for j in range(count):
                    table[s, j] = places.pop()
            starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
            positions = [length - count + i for count, length in zip(new, lengths) for i in range(count)]
            tokens = torch.randint(0, 11, (n,), generator=generator)
            angle = torch.rand((max([*lengths, 1]), d // 2), generator=generator) * 6.3
            cache_dtype = torch.float8_e4m3fn if fp8 and dtype == torch.bfloat16 else dtype
            caches = (normal((total, block, g, d), device, torch.float32, generator).to(cache_dtype) for _ in range(2))
            extra = (normal((11, g * d), device, dtype, generator), normal((g, 12), device, dtype, generator))
            return (
                normal((n, (h + 2 * g) * d), device, dtype, generator),
                normal((n, 40), device, dtype, generator),
                *(x.to(device) for x in (tokens, torch.tensor(positions), table, starts)),
                *(x.to(device, dtype) for x in (angle.cos(), angle.sin())),
                *(extra if embedding else (None, None)),
                *caches,
            ), {}

        return build

    yield Case("decode", make([1, 1, 1], [5, 32, 17], 8, 2, 2, 32))
    yield Case("grouped, no embedding", make([1, 1], [9, 1], 16, 4, 2, 64, embedding=False))
    yield Case("chunks and padding", make([5, 1, 0, 3], [21, 0, 9, 3], 4, 2, 1, 32))
    yield Case("fp8 cache", make([1, 4], [5, 40], 16, 2, 2, 128, fp8=True), (torch.bfloat16,))
    yield Case("prime", make([3, 1], [7, 29], 5, 3, 3, 34), size="odd")
    yield Case("d12 decode", make([1] * 8, [100 * s + 3 for s in range(1, 9)], 16, 6, 6, 128), size="model")
    yield Case("d24 chunk", make([256, 1], [700, 31], 16, 12, 12, 128), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    qkv, k_cache = args[0], args[10]
    n, heads = qkv.size(0), k_cache.size(2) * k_cache.size(3)
    queries = qkv.size(1) - 2 * heads
    moved = n * (2 * queries + (3 if args[8] is not None else 2) * heads) * qkv.element_size()
    return Cost(moved + 2 * n * heads * k_cache.element_size(), 10 * qkv.numel())


paged_qkv = Op(
    "paged_qkv",
    torch=paged_qkv_reference,
    cuda="nanochat_kernels.native_cuda:paged_qkv",
    available={"cuda": needs_cuda_ops},
    custom=("cuda",),
    cases=_cases,
    cost=_cost,
    mutates=("qkv", "k_cache", "v_cache"),
)
