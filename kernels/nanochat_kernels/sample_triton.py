"""Sampling in Triton: temperature, top-k, top-p, min-p and the draw in one launch, one program a row, without a sort.

What a sort would tell is where to cut, and a cut is one number. Floats map to unsigned integers of the same order, so
for weights w (1 for top-k, the probability for top-p)

    t = the largest key with  Σ_{key ≥ t} w ≥ target        (target: k, or p)

is found bit by bit, highest first, in 32 passes over the row: 128 KiB at 32,768 words, which stay in the processor's
first-level cache. All keys above t survive; of those equal to t the first few by token id, as in the reference's
stable sort, and if not all, the id where they end is found the same way. (A sort of the row in one program would be
15·16/2 = 120 passes.)

The draw is argmax(z + Gumbel noise) with the reference's own generator and counters: four neighboring tokens share one
counter, its four words. Draws agree with the reference's unless two candidates are closer than the rounding of a
logarithm, or a cumulative probability within rounding of p. Passes for limits that are off are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.compiled import Build

BLOCK = 4096


@triton.jit
def _scaled(row_ptr, start, words, temperature, BLOCK: tl.constexpr):
    """(z/τ, whether inside) of BLOCK tokens; −0 becomes 0, so that equal logits have equal keys."""
    token = start + tl.arange(0, BLOCK)
    inside = token < words
    z = tl.load(row_ptr + token, mask=inside, other=-float("inf"))
    return tl.div_rn(z, temperature) + 0.0, inside


@triton.jit
def _key(z):
    """An unsigned integer of the same order."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _share(z, top, total):
    return tl.exp(z - top) / total


@triton.jit
def _survives(z, token, inside, threshold, bound):
    key = _key(z)
    return inside & ((key > threshold) | ((key == threshold) & (token < bound)))


@triton.jit
def _weight_from(
    row_ptr, words, temperature, lowest, k_threshold, k_bound, top, total, BY_SHARE: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ of the weights of tokens with key ≥ lowest: 1 each, or the shares of those that passed top-k."""
    weight = 0.0
    for start in range(0, words, BLOCK):
        z, inside = _scaled(row_ptr, start, words, temperature, BLOCK)
        chosen = inside & (_key(z) >= lowest)
        if BY_SHARE:
            chosen &= _survives(z, start + tl.arange(0, BLOCK), inside, k_threshold, k_bound)
            weight += tl.sum(tl.where(chosen, _share(z, top, total), 0.0), axis=0)
        else:
            weight += tl.sum(chosen.to(tl.float32), axis=0)
    return weight


@triton.jit
def _cut(
    row_ptr, words, temperature, target, k_threshold, k_bound, top, total, BY_SHARE: tl.constexpr, BLOCK: tl.constexpr
):
    """(threshold, bound): survivors have a greater key, or the same and a token id below the bound."""
    threshold = tl.full((), 0, tl.uint32)
    for bit in range(0, 32):
        candidate = threshold | (tl.full((), 1, tl.uint32) << tl.cast(31 - bit, tl.uint32))
        weight = _weight_from(row_ptr, words, temperature, candidate, k_threshold, k_bound, top, total, BY_SHARE, BLOCK)
        threshold = tl.where(weight >= target, candidate, threshold)
    above = 0.0
    ties = 0.0
    each = 0.0
    for start in range(0, words, BLOCK):
        z, inside = _scaled(row_ptr, start, words, temperature, BLOCK)
        key = _key(z)
        weight = tl.full((BLOCK,), 1.0, tl.float32)
        if BY_SHARE:
            inside &= _survives(z, start + tl.arange(0, BLOCK), inside, k_threshold, k_bound)
            weight = _share(z, top, total)
        above += tl.sum(tl.where(inside & (key > threshold), weight, 0.0), axis=0)
        ties += tl.sum((inside & (key == threshold)).to(tl.float32), axis=0)
        each = tl.maximum(each, tl.max(tl.where(inside & (key == threshold), weight, 0.0), axis=0))
    kept = tl.ceil((target - above) / each)  # of the ties: those before which there is less than the target
    bound = words
    if kept < ties:
        bound = 0
        for bit in range(0, 31):
            step = 1 << (30 - bit)
            candidate = bound + step
            if step <= words:
                count = 0.0
                for start in range(0, words, BLOCK):
                    z, inside = _scaled(row_ptr, start, words, temperature, BLOCK)
                    token = start + tl.arange(0, BLOCK)
                    if BY_SHARE:
                        inside &= _survives(z, token, inside, k_threshold, k_bound)
                    tied = inside & (_key(z) == threshold) & (token < candidate)
                    count += tl.sum(tied.to(tl.float32), axis=0)
                bound = tl.where(count <= kept, candidate, bound)
    return threshold, bound


@triton.jit
def _log1p_of_minus(w):
    """log(1 − w) without cancellation: the rounding of 1 − w is divided out again (Kahan)."""
    u = 1.0 - w
    ratio = tl.div_rn(w, tl.where(u == 1.0, 1.0, 1.0 - u))
    return tl.where(u == 1.0, -w, tl.log(u) * ratio)


@triton.jit
def _sample_kernel(
    logit_ptr, seed_ptr, position_ptr, temperature_ptr, k_ptr, p_ptr, min_p_ptr, token_ptr, words, row_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logit_ptr + row * row_stride
    asked = tl.load(temperature_ptr + row)
    greedy = asked <= 0
    temperature = tl.where(greedy, 1.0, asked)
    top = -float("inf")
    best = 0
    for start in range(0, words, BLOCK):
        z, inside = _scaled(row_ptr, start, words, temperature, BLOCK)
        highest = tl.max(z, axis=0)
        if highest > top:
            best = start + tl.argmax(z, axis=0)
            top = highest
    if not greedy:
        k = tl.load(k_ptr + row)
        p = tl.load(p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        k_threshold = tl.full((), 0, tl.uint32)
        k_bound = words
        if (k > 0) & (k < words):
            k_threshold, k_bound = _cut(
                row_ptr, words, temperature, k.to(tl.float32), k_threshold, k_bound, top, 1.0, False, BLOCK
            )
        total = _weight_from(
            row_ptr, words, temperature, tl.full((), 0, tl.uint32), k_threshold, k_bound, top, 1.0, True, BLOCK
        )
        p_threshold = tl.full((), 0, tl.uint32)
        p_bound = words
        if p < 1:
            p_threshold, p_bound = _cut(row_ptr, words, temperature, p, k_threshold, k_bound, top, total, True, BLOCK)
        least = min_p * _share(top, top, total)
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row)
        low = (position & 0xFFFFFFFF).to(tl.uint32)
        high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        score = -float("inf")
        first = best
        for start in range(0, words, BLOCK):
            z, inside = _scaled(row_ptr, start, words, temperature, BLOCK)
            token = start + tl.arange(0, BLOCK)
            keep = _survives(z, token, inside, k_threshold, k_bound)
            keep &= _survives(z, token, inside, p_threshold, p_bound)
            keep &= _share(z, top, total) >= least
            keep |= token == first
            counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            zero = tl.zeros((BLOCK // 4,), tl.uint32)
            w0, w1, w2, w3 = tl.philox(seed, counter, zero, zero + low, zero + high)
            bits = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)
            w = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
            noisy = tl.where(keep, z - tl.log(-_log1p_of_minus(w)), -float("inf"))
            highest = tl.max(noisy, axis=0)
            if highest > score:
                best = start + tl.argmax(noisy, axis=0)
                score = highest
    tl.store(token_ptr + row, tl.cast(best, tl.int64))


def sample_triton(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """As the reference; nothing is looked at on the host."""
    logits = logits.float() if logits.stride(-1) == 1 else logits.float().contiguous()
    tokens = torch.empty(logits.size(0), dtype=torch.int64, device=logits.device)
    block = max(16, min(BLOCK, triton.next_power_of_2(logits.size(1))))
    _sample_kernel[(logits.size(0),)](
        logits, *(x.contiguous() for x in (seeds, positions, temperature, top_k, top_p, min_p)), tokens,
        logits.size(1), logits.stride(0), BLOCK=block, num_warps=max(block // 256, 1),
    )  # fmt: skip
    return tokens


def shipped() -> Iterator[Build]:
    """Any vocabulary above the block size."""
    types = dict.fromkeys(("logit_ptr", "temperature_ptr", "p_ptr", "min_p_ptr"), "*fp32")
    types |= dict.fromkeys(("seed_ptr", "position_ptr", "k_ptr", "token_ptr"), "*i64")
    types |= {"words": "i32", "row_stride": "i32"}
    yield Build("sample", _sample_kernel, types, {"BLOCK": BLOCK}, BLOCK // 256)
