"""How many rows a device takes at a time.

A step of R rows on W ranks is `accumulation` micro-batches of `rows` rows on each: rows · accumulation · W = R. Losses
and gradients do not depend on the split (but for rounding), speed and memory do:

    CUDA    the more rows the better while they fit: begin at an estimate, try a pass, and go down on out-of-memory
    CPU     a few thousand tokens keep the cores busy, and more only leave the caches; bounded by free memory
"""

from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist

from nanochat.errors import NanochatError, UsageError
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime

CPU_TOKENS = 4096  # per micro-batch
MEMORY_SHARE = 0.8  # of what is free may be planned for


def rows_per_rank(batch_tokens: int, seq_len: int, world_size: int) -> int:
    """Rows of one step on one rank. Raises UsageError where the batch does not divide."""
    unit = seq_len * world_size
    if batch_tokens % unit:
        low = batch_tokens // unit * unit
        nearest = f"{low:,} or {low + unit:,}" if low else f"{unit:,}"
        raise UsageError(
            f"--batch-tokens {batch_tokens:,} is not a multiple of {seq_len:,} tokens × {world_size} ranks; "
            f"use {nearest}"
        )
    return batch_tokens // unit


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def check_rows(rows: int, per_rank: int) -> int:
    """`rows` as given. Raises UsageError where they do not divide a step's rows on one rank."""
    if rows < 1 or per_rank % rows:
        raise UsageError(
            f"--rows {rows} does not divide the {per_rank} rows that a step has on one rank; "
            f"use one of {', '.join(map(str, divisors(per_rank)))}, or leave it out"
        )
    return rows


def activation_bytes(model: GPT) -> float:
    """Roughly what one token keeps alive between forward and backward. An upper estimate."""
    config, size = model.config, torch.finfo(model.dtype).bits // 8
    per_layer = 24 * config.width * size
    if model.plan.choices["attention"].backend == "torch":  # keeps its scores
        per_layer += 3 * config.heads * config.seq_len * 4
    head = 0
    if model.plan.choices["linear_softcap_cross_entropy"].backend == "torch":  # keeps its logits
        head = 4 * config.padded_vocab_size * 4
    return config.layers * per_layer + head + 16 * config.width * size


def choose_rows(model: GPT, per_rank: int, runtime: Runtime) -> tuple[int, str]:
    """The largest divisor of `per_rank` that suits the device, and why. All ranks choose alike."""
    seq_len = model.config.seq_len
    need = activation_bytes(model) * seq_len
    free = _free_memory(runtime) * MEMORY_SHARE
    if runtime.device.type == "cuda":
        limit, reason = free / need, "the most that fits in memory"
    else:
        by_cache = max(1, CPU_TOKENS // seq_len)
        limit, reason = min(by_cache, free / need), f"about {CPU_TOKENS:,} tokens suit a {runtime.device.type}"
    if runtime.distributed:
        smallest = torch.tensor(float(limit), device=runtime.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        limit = smallest.item()
    candidates = [d for d in divisors(per_rank) if d <= limit] or [1]
    if runtime.device.type == "cuda":
        return largest_that_fits(candidates, lambda rows: fits(model, rows, runtime)), reason
    return candidates[-1], reason


def largest_that_fits(candidates: list[int], fit: Callable[[int], bool]) -> int:
    """The last of the ascending candidates that fits, at least halving after each failure."""
    rows = candidates[-1]
    while not fit(rows):
        smaller = [d for d in candidates if d <= rows // 2]
        if not smaller:
            raise NanochatError(
                f"not even {rows} row(s) fit in the device's memory; use a smaller --depth or --seq-len, or more ranks"
            )
        rows = smaller[-1]
    return rows


def fits(model: GPT, rows: int, runtime: Runtime) -> bool:
    """Whether a forward and backward pass of `rows` rows runs on every rank. Leaves no gradients."""
    ids = torch.zeros(rows, model.config.seq_len, dtype=torch.int64, device=runtime.device)
    try:
        model(ids, ids).backward()
        torch.cuda.synchronize(runtime.device)
        free = 1.0
    except torch.OutOfMemoryError:
        free = 0.0
    model.zero_grad(set_to_none=True)
    if model.fp8:
        model.fp8.forget()
    torch.cuda.empty_cache()
    if runtime.distributed:
        agreed = torch.tensor(free, device=runtime.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        free = agreed.item()
    return free > 0


def _free_memory(runtime: Runtime) -> float:
    """Bytes that this rank may use: all of its GPU's free memory, or its share of the machine's."""
    if runtime.device.type == "cuda":
        return float(torch.cuda.mem_get_info(runtime.device)[0])
    return psutil.virtual_memory().available / runtime.world_size
