"""Attention of the newest tokens against a key/value cache, at prefill and decode. No gradients.

Row b holds lengths[b] valid positions, the newest Tq of them being the queries': query t stands at position p =
lengths[b] − Tq + t and sees positions p − window … p. Whatever the cache holds beyond is never read into the result.

Memory-bound at decode: the bytes are those of the keys and values inside the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op


def cached_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int) -> Tensor:
    """(B, Tq, H, D) from q (B, Tq, H, D), caches (B, S, G, D) that already hold the new keys, lengths (B,) integers.

    lengths count the new tokens. A query of a row shorter than Tq stands before position 0, sees nothing and gives
    zeros.
    """
    b, tq, h, d = q.shape
    g = k_cache.size(2)
    seen = _visible(lengths, tq, k_cache.size(1), window)
    q = q.reshape(b, tq, g, h // g, d)
    scores = wide(torch.einsum("btgrd,bsgd->bgrts", q, k_cache)) / math.sqrt(d)
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    weights = torch.nan_to_num(scores.softmax(dim=-1)).to(q.dtype)
    # Zero weights do not silence what was never written: 0·NaN is NaN.
    valid = torch.arange(v_cache.size(1), device=q.device) < lengths[:, None]
    values = v_cache.masked_fill(~valid[:, :, None, None], 0)
    return torch.einsum("bgrts,bsgd->btgrd", weights, values).reshape(b, tq, h, d)


def cached_attention_sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int) -> Tensor:
    """torch's fused attention with a mask. The cache beyond `lengths` must hold finite numbers."""
    mask = _visible(lengths, q.size(1), k_cache.size(1), window).unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def _visible(lengths: Tensor, tq: int, size: int, window: int) -> Tensor:
    """(B, Tq, S) bool: may query t of row b read cache position s?"""
    query = lengths[:, None, None] - tq + torch.arange(tq, device=lengths.device)[:, None]
    distance = query - torch.arange(size, device=lengths.device)
    return (distance >= 0) & (distance <= window)


def _cases() -> Iterator[Case]:
    def make(b, tq, s, h, g, d, window):
        def build(device, dtype, generator):
            q = normal((b, tq, h, d), device, dtype, generator)
            k, v = (normal((b, s, g, d), device, dtype, generator) for _ in range(2))
            lengths = torch.randint(tq, s + 1, (b,), generator=generator)
            return (q, k, v, lengths.to(device), window), {}

        return build

    yield Case("decode", make(3, 1, 32, 2, 2, 32, 32))
    yield Case("decode, window, grouped", make(3, 1, 48, 4, 2, 64, 8))
    yield Case("prefill", make(2, 16, 32, 2, 2, 32, 32))
    yield Case("prefill, window", make(2, 16, 40, 2, 1, 32, 5))
    yield Case("one position", make(1, 1, 1, 1, 1, 16, 4), size="odd")
    yield Case("prime", make(3, 5, 53, 3, 3, 24, 7), size="odd")
    yield Case("d12 decode", make(8, 1, 2048, 6, 6, 128, 2048), size="model")
    yield Case("d24 decode, window", make(64, 1, 1024, 12, 12, 128, 512), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    q, k, v, lengths, window = args
    keys = float((lengths.clamp(max=window + q.size(1))).sum())
    moved = 2 * keys * k.size(2) * k.size(3) + 2 * q.numel()
    return Cost(moved * q.element_size(), 4 * keys * q.size(1) * q.size(2) * q.size(3))


cached_attention = Op(
    "cached_attention",
    torch=cached_attention_reference,
    sdpa=cached_attention_sdpa,
    auto=(("sdpa", lambda place: True, "fused softmax over the cache"),),
    cases=_cases,
    cost=_cost,
)
