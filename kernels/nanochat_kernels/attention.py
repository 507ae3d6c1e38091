"""Causal attention with a sliding window and grouped key/value heads.

    out[i] = Σ_j softmax_j(q[i]·k[j] / √D) v[j]            over keys j with i − window ≤ j ≤ i

Query head h reads key/value head ⌊h / (H/G)⌋. A window that covers all of T is plain causal attention.

The reference forms the T×T scores of every head: it is the oracle, not something to train with. `sdpa` computes a
windowed layer in bands: queries in blocks, each against its own block and the few before it that the window reaches,
so work and memory grow with T·window instead of T². The copies of keys and values that this needs are small beside
the scores. `triton` needs no copies: its loops begin where the window does; see attention_triton.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op, Place
from nanochat_kernels.triton_support import needs_triton


def attention_reference(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(B, T, H, D) from q (B, T, H, D) and k, v (B, T, G, D), H a multiple of G. Softmax in float32."""
    group = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = wide(torch.einsum("bihd,bjhd->bhij", q, k)) / math.sqrt(q.size(-1))
    position = torch.arange(q.size(1), device=q.device)
    distance = position[:, None] - position[None, :]
    scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1).to(v.dtype), v)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """torch's fused attention: causal where the window covers T, banded otherwise. Shapes as the reference's."""
    if window >= q.size(1) - 1:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _grouped_sdpa(q, k, v, is_causal=True).transpose(1, 2)
    return _banded(q, k, v, window)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    b, t, h, d = q.shape
    block = min(max(window // 2, 16), 256)
    blocks, reach = -(-t // block), -(-window // block)
    back = blocks * block - t
    q = F.pad(q, (0, 0, 0, 0, 0, back)).view(b * blocks, block, h, d)
    k, v = (_neighborhoods(F.pad(x, (0, 0, 0, 0, reach * block, back)), block, reach) for x in (k, v))
    # The mask differs between blocks only where the padding in front of the first ones is in reach.
    position = torch.arange(block, device=q.device)
    key = torch.arange((reach + 1) * block, device=q.device) - reach * block
    distance = position[:, None] - key[None, :]
    start = torch.arange(blocks, device=q.device)[:, None, None] * block
    seen = (distance >= 0) & (distance <= window) & (start + key >= 0)
    mask = seen.repeat(b, 1, 1).unsqueeze(1)
    out = _grouped_sdpa(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2).reshape(b, blocks * block, h, d)[:, :t]


def _neighborhoods(x: Tensor, block: int, reach: int) -> Tensor:
    """(B·blocks, (reach+1)·block, G, D): each block of x (already padded) behind the `reach` before it."""
    b, _, g, d = x.shape
    x = x.view(b, -1, block, g, d)
    blocks = x.size(1) - reach
    return torch.cat([x[:, i : i + blocks] for i in range(reach + 1)], dim=2).view(b * blocks, -1, g, d)


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **options)


def attention_flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlexAttention with a block mask: skips blocks outside the window. Compiled; CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = _block_mask(q.size(2), window, str(q.device))
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


@lru_cache(maxsize=16)
def _block_mask(length: int, window: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    return create_block_mask(visible, None, None, length, length, device=device)


def attention_flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlashAttention 2, 3 or 4, where installed: takes our layout, our window and grouped heads as they are."""
    out = _flash_function()(q, k, v, causal=True, window_size=(min(window, q.size(1)), 0))
    return out[0] if isinstance(out, tuple) else out


FLASH = ("flash_attn_interface", "flash_attn.cute", "flash_attn")  # versions 3 (for Hopper), 4 and 2, by preference


@lru_cache(maxsize=1)
def _flash_function() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """flash_attn_func of the first version that imports. Raises ImportError with what each of them said."""
    failures = []
    for name in FLASH:
        try:
            return importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError) as error:
            failures.append(f"{name}: {error}")
    raise ImportError("; ".join(failures))


def _needs_cuda(place: Place) -> str | None:
    return None if place.device.type == "cuda" else "needs an NVIDIA GPU"


def _flash_probe(place: Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16):
        return "takes bf16 and float16 only"
    if not (find_spec("flash_attn_interface") or find_spec("flash_attn")):
        return "none of FlashAttention 2, 3 and 4 is installed"
    return _needs_cuda(place)


def _cases() -> Iterator[Case]:
    def make(b, t, h, g, d, window, packed=False):
        def build(device, dtype, generator):
            if packed:
                qkv = normal((b, t, h + 2 * g, d), device, dtype, generator)
                return (*qkv.split([h, g, g], dim=2), window), {}
            return (*(normal((b, t, n, d), device, dtype, generator) for n in (h, g, g)), window), {}

        return build

    yield Case("full", make(2, 32, 2, 2, 32, 32))
    yield Case("window", make(2, 64, 2, 2, 32, 16))
    yield Case("grouped", make(2, 64, 4, 2, 64, 8))
    yield Case("packed qkv", make(1, 48, 2, 1, 32, 20, packed=True))
    yield Case("one token", make(1, 1, 1, 1, 16, 4), size="odd")
    yield Case("window 0", make(1, 19, 1, 1, 16, 0), size="odd")
    yield Case("prime", make(3, 53, 3, 1, 24, 7), size="odd")
    yield Case("window one short", make(1, 37, 2, 2, 16, 35), size="odd")
    yield Case("d12 window", make(4, 2048, 6, 6, 128, 512), size="model")
    yield Case("d12 full", make(4, 2048, 6, 6, 128, 2048), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    q, k, v, window = args
    b, t, h, d = q.shape
    reach = min(window, t - 1)
    pairs = (reach + 1) * t - reach * (reach + 1) / 2
    return Cost((2 * q.numel() + 2 * k.numel()) * q.element_size(), 4 * b * h * d * pairs)


attention = Op(
    "attention",
    torch=attention_reference,
    sdpa=attention_sdpa,
    flex=attention_flex,
    flash=attention_flash,
    triton="nanochat_kernels.attention_triton:attention_triton",
    available={"flex": _needs_cuda, "flash": _flash_probe, "triton": needs_triton},
    custom=("triton",),
    auto=(
        ("flash", lambda place: place.device.type == "cuda", "FlashAttention is installed: windows without copies"),
        ("sdpa", lambda place: True, "fused softmax, banded windows: memory follows the window, not T²"),
    ),
    cases=_cases,
    cost=_cost,
    differentiable=("q", "k", "v"),
)
