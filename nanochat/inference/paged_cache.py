"""The serving engine's key/value cache: memory in blocks that sequences take and give back (docs/paged_cache.md).

Per layer, k and v are (blocks, block_size, G heads, D). Layers fall into two groups, each with block ids of its own:

    full      layers that see the whole context: a sequence keeps all of its blocks
    window    the others, which all have one window w: a block is given back when no later query can see it

A block id of a group stands for the same place in every layer of that group, so a sequence has two tables of ids,
however many layers there are. Position p lies in block table[p div block_size], slot p mod block_size.

This file holds the memory and its size; who owns which block is decided in nanochat.inference.blocks, on the host. One
block more than the tables can name takes what padding writes. Memory is touched when it is allocated: a server that
starts has what it will ever need.
"""

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import GPTConfig

FULL, WINDOW = 0, 1
BLOCK_SIZE = 16
FREE_SHARE = {"cuda": 0.8, "cpu": 0.25}  # of the free memory that a cache takes by default at most


class PagedCache:
    """Keys and values of `blocks` = (full, window) blocks for a model of `config`, in its compute dtype.

    k, v: per layer (blocks + 1, block_size, G, D), the last block being scratch. groups: per layer FULL or WINDOW.
    window: what layers of the windowed group see before their own position; `context` where there is no such layer.
    """

    def __init__(
        self,
        config: GPTConfig,
        blocks: tuple[int, int],
        block_size: int = BLOCK_SIZE,
        context: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.context = config.seq_len if context is None else context
        self.groups, self.window = layer_groups(config, self.context)
        self.blocks, self.block_size = blocks, block_size
        self.k, self.v = (
            [
                torch.empty(blocks[group] + 1, block_size, config.kv_heads, config.head_dim, device=device, dtype=dtype)
                for group in self.groups
            ]
            for _ in range(2)
        )
        for memory in (*self.k, *self.v):
            memory.zero_()

    def slots(self, tables: tuple[Tensor, Tensor], sequences: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Per group, where tokens go: (N,) int64 indices into the flattened (blocks · block_size) slots.

        tables: per group (S, M) int32. sequences, positions: (N,) int64; a negative position is padding.
        """
        block, slot = positions.clamp_min(0) // self.block_size, positions % self.block_size
        found = []
        for table, blocks in zip(tables, self.blocks, strict=True):
            ids = table[sequences, block.clamp_max(table.size(1) - 1)].long()
            found.append(torch.where((positions >= 0) & (ids >= 0), ids, blocks) * self.block_size + slot)
        return found[FULL], found[WINDOW]

    def write(self, layer: int, slots: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """Puts k, v (N,G,D) of one layer in their slots."""
        where = slots[self.groups[layer]]
        self.k[layer].flatten(0, 1).index_copy_(0, where, k)
        self.v[layer].flatten(0, 1).index_copy_(0, where, v)

    @property
    def nbytes(self) -> int:
        return sum(memory.numel() * memory.element_size() for memory in (*self.k, *self.v))


def layer_groups(config: GPTConfig, context: int) -> tuple[tuple[int, ...], int]:
    """Per layer FULL or WINDOW, and the windowed group's window (the context where no layer is windowed)."""
    windows = {window for window in config.windows if window < context}
    if len(windows) > 1:
        raise UsageError(
            f"layers have the windows {sorted(windows)}; the paged cache holds one beside the full context"
        )
    groups = tuple(WINDOW if window < context else FULL for window in config.windows)
    return groups, min(windows, default=context)


def block_bytes(config: GPTConfig, context: int, block_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one block of each group, over all of its layers."""
    groups, _ = layer_groups(config, context)
    one = 2 * block_size * config.kv_heads * config.head_dim * torch.empty(0, dtype=dtype).element_size()
    return groups.count(FULL) * one, groups.count(WINDOW) * one


def blocks_per_sequence(window: int, context: int, block_size: int, chunk: int) -> tuple[int, int]:
    """Blocks of each group that one sequence holds at most, when `chunk` tokens are computed at a time."""
    full = -(-context // block_size)
    return full, min(full, -(-(window + chunk) // block_size) + 1)


def pool_sizes(
    config: GPTConfig,
    context: int,
    block_size: int,
    chunk: int,
    sequences: int,
    device: torch.device,
    dtype: torch.dtype,
    cache_bytes: int | None = None,
    num_blocks: int | None = None,
) -> tuple[int, int]:
    """Blocks of the (full, windowed) group, in the proportion in which one sequence of `context` tokens takes them.

    As many as fit in cache_bytes; by default what `sequences` and one more full contexts take, or a share of the free
    memory. num_blocks of the full group: as many windowed ones, as sequences shorter than the window take both alike,
    but no more than `sequences` can see. Raises NanochatError when not even one sequence fits.
    """
    groups, window = layer_groups(config, context)
    each = blocks_per_sequence(window, context, block_size, chunk)
    costs = block_bytes(config, context, block_size, dtype)
    one = each[FULL] * costs[FULL] + each[WINDOW] * costs[WINDOW]
    if num_blocks is not None:
        full, windowed = num_blocks, min(num_blocks, sequences * each[WINDOW])
    else:
        room = cache_bytes
        if room is None:
            room = min(one * (sequences + 1), int(_free_memory(device) * FREE_SHARE.get(device.type, 0.25)))
        full = each[FULL] * room // one
        windowed = full * each[WINDOW] // each[FULL]
        if full < each[FULL]:
            raise NanochatError(
                f"a cache of {room / 1e6:,.1f} MB is too small: one sequence of {context} tokens takes "
                f"{one / 1e6:,.1f} MB; free memory, or set a smaller context"
            )
    return full, max(each[WINDOW], windowed) if WINDOW in groups else 0


def _free_memory(device: torch.device) -> float:
    """Bytes; the host's are shared by the processes of a run."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available / (dist.get_world_size() if dist.is_initialized() else 1)
