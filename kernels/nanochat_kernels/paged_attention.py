"""Attention of the newest tokens of many sequences against a key/value cache that is kept in blocks. No gradients.

The tokens of all sequences lie one behind the other, without padding; sequence s owns starts[s] … starts[s+1] − 1. Its
newest token is the one at position lengths[s] − 1, so its token i stands at lengths[s] − (starts[s+1] − i) and sees the
positions p − window … p. Position p of sequence s is kept in slot p mod block_size of block table[s, p div block_size].

Only positions that a query sees are read: blocks behind the window may have been given back (−1 in the table), and
slots never written may hold anything. A token at a negative position is padding and gives zeros.

Memory-bound at decode: the bytes are those of the keys and values inside the windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.native import on_cpu
from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op

SPAN = 64  # queries per call of the fused attention: chunks cut at its multiples give the same numbers as the whole


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, window: int
) -> Tensor:
    """(N, H, D) from q (N, H, D), k_cache and v_cache (blocks, block_size, G, D) that already hold the new keys.

    table: (S, M) int32; starts: (S + 1,) int32, beginning with 0 and ending with N; lengths: (S,) int32, the new tokens
    included. Query head h reads key/value head h div (H/G).
    """
    group, scale = q.size(1) // k_cache.size(2), 1 / math.sqrt(q.size(2))
    out = torch.zeros_like(q)
    for first, last, position, blocks in _sequences(table, starts, lengths):
        begin, end = max(position, 0), position + last - first  # what comes before position 0 is padding
        if begin >= end:
            continue
        oldest, rows = max(0, begin - window), slice(first + begin - position, last)
        k, v = (_gather(cache, blocks, oldest, end).repeat_interleave(group, 1) for cache in (k_cache, v_cache))
        at = torch.arange(oldest, end, device=q.device)
        distance = at[begin - oldest :, None] - at
        scores = wide(torch.einsum("thd,khd->htk", q[rows], k)) * scale
        scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
        out[rows] = torch.einsum("htk,khd->thd", scores.softmax(-1).to(q.dtype), v)
    return out


def paged_attention_sdpa(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, window: int
) -> Tensor:
    """torch's fused attention over what each sequence sees, gathered: one that fits in the cache of a core stays there.

    A sequence's numbers depend on nothing else in the batch. Reads lengths on the host: a synchronization on a GPU.
    """
    out = torch.zeros_like(q)
    grouped = q.size(1) != k_cache.size(2)
    for first, last, position, blocks in _sequences(table, starts, lengths):
        begin = max(position, 0)  # what comes before is padding
        while begin < position + last - first:
            end = min(begin // SPAN * SPAN + SPAN, position + last - first)
            oldest = max(0, begin - window)
            k, v = (_gather(cache, blocks, oldest, end).transpose(0, 1)[None] for cache in (k_cache, v_cache))
            rows = slice(first + begin - position, first + end - position)
            mask = None
            if end - begin > 1:
                at = torch.arange(oldest, end, device=q.device)
                distance = at[begin - oldest :, None] - at
                mask = (distance >= 0) & (distance <= window)
            attended = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=grouped
            )
            out[rows] = attended[0].transpose(0, 1)
            begin = end
    return out


def _sequences(table: Tensor, starts: Tensor, lengths: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Per sequence: the range of its tokens, the position of the first of them, its blocks."""
    bounds = starts.tolist()
    for s, length in enumerate(lengths.tolist()):
        first, last = bounds[s], bounds[s + 1]
        yield first, last, length - (last - first), table[s]


def _gather(cache: Tensor, blocks: Tensor, begin: int, end: int) -> Tensor:
    """(end − begin, G, D): positions begin … end − 1 of one sequence, whose blocks are given."""
    size = cache.size(1)
    first = begin // size
    found = cache.index_select(0, blocks[first : -(-end // size)])
    return found.flatten(0, 1)[begin - first * size : end - first * size]


def _cases() -> Iterator[Case]:
    def make(new, lengths, block, h, g, d, window):
        """new[s] tokens of a sequence that is then lengths[s] long; blocks in random places, NaN around."""

        def build(device, dtype, generator):
            needed = [-(-length // block) for length in lengths]
            width, total = max([*needed, 1]) + 1, sum(needed) + 3
            places = torch.randperm(total, generator=generator).tolist()
            table = torch.full((len(lengths), width), -1, dtype=torch.int32)
            k, v = (torch.full((total, block, g, d), float("nan")) for _ in range(2))
            for s, length in enumerate(lengths):
                oldest = max(0, length - new[s] - window)
                for j in range(oldest // block, needed[s]):
                    table[s, j] = places.pop()
                for p in range(oldest, length):
                    for cache in (k, v):
                        cache[table[s, p // block], p % block] = torch.randn(g, d, generator=generator)
            starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
            q = normal((sum(new), h, d), device, dtype, generator)
            placed = [x.to(device) for x in (table, starts, torch.tensor(lengths, dtype=torch.int32))]
            return (q, k.to(device, dtype), v.to(device, dtype), *placed, window), {}

        return build

    yield Case("decode", make([1, 1, 1], [5, 32, 17], 8, 2, 2, 32, 64))
    yield Case("decode, window, grouped", make([1, 1, 1, 1], [40, 9, 10, 64], 8, 4, 2, 64, 8))
    yield Case("prefill", make([16, 7], [16, 7], 16, 2, 2, 32, 64))
    yield Case("chunks among decodes", make([5, 1, 19, 1], [21, 48, 35, 1], 16, 4, 2, 32, 12))
    yield Case("block boundaries", make([1, 1, 1, 16, 17], [16, 17, 33, 32, 33], 16, 2, 1, 32, 16))
    yield Case("padding and nothing new", make([1, 0, 2, 1], [0, 9, 1, 4], 4, 2, 2, 32, 8))
    yield Case("one position", make([1], [1], 1, 1, 1, 1, 4), size="odd")
    yield Case("window of itself", make([3, 1], [9, 20], 5, 3, 3, 24, 0), size="odd")
    yield Case("prime", make([5, 1, 13, 2], [53, 29, 13, 31], 7, 6, 2, 24, 11), size="odd")
    yield Case("long prefill", make([150, 1], [201, 130], 16, 2, 2, 16, 70), size="odd")
    yield Case("d12 decode", make([1] * 8, [100 * s + 3 for s in range(1, 9)], 16, 6, 6, 128, 512), size="model")
    yield Case("d12 chunk", make([256, 1, 1], [700, 1025, 31], 16, 6, 6, 128, 2048), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    q, k_cache, _, _, starts, lengths, window = args
    new = (starts[1:] - starts[:-1]).double()
    seen = torch.minimum(lengths.double(), window + new)  # keys that a sequence's tokens read together
    pairs = float((new * torch.minimum(lengths.double(), torch.full_like(new, window + 1.0))).sum())
    heads, dims = k_cache.shape[2:]
    moved = 2 * float(seen.sum()) * heads * dims + 2 * q.numel()
    return Cost(moved * q.element_size(), 4 * pairs * q.size(1) * dims)


paged_attention = Op(
    "paged_attention",
    torch=paged_attention_reference,
    sdpa=paged_attention_sdpa,
    native="nanochat_kernels.native:paged_attention",
    cuda="nanochat_kernels.native_cuda:paged_attention",
    available={"native": on_cpu, "cuda": needs_cuda_ops},
    custom=("native", "cuda"),
    auto=(
        ("native", lambda place: place.device.type == "cpu", "reads the blocks where they are"),
        ("cuda", lambda place: place.device.type == "cuda", "reads the blocks where they are, waits for nobody"),
        ("sdpa", lambda place: True, "fused softmax over each sequence's keys"),
    ),
    cases=_cases,
    cost=_cost,
)
