"""The reference key/value cache: one contiguous block of memory per layer, each row with a length of its own.

Keys and values of tokens already seen are kept, so that a new token costs one position of work instead of the whole
sequence. The layout is (layers, B rows, S slots, G heads, D): a row's history is contiguous, so attention streams it.

Rows may have different lengths. A batch of prompts is padded on the right and written whole; then every row advances
by its true length only. What the padding left behind lies beyond that length, where no query looks, and is overwritten
by the next tokens. Memory is zeroed when allocated: a masked slot is multiplied by zero, and zero times a stale NaN is
NaN.

Growth: `reserve` at least doubles the slots, in multiples of 64, up to `limit`. A row that grows to S tokens is copied
O(S) in all, and no more than twice the needed memory is held. The trade-off against a paged cache is that every row
pays for the longest; the reference engine drops finished rows instead (`select`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.model.config import GPTConfig

SLOT_MULTIPLE = 64


class KVCache:
    """Implements nanochat.model.gpt.Cache for `rows` rows of at first `slots` and never more than `limit` tokens.

    dtype is the model's compute dtype. Without a limit the cache grows as far as memory goes.
    """

    def __init__(
        self,
        config: GPTConfig,
        rows: int,
        slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        limit: int | None = None,
    ) -> None:
        if limit is not None and slots > limit:
            raise UsageError(f"{slots} tokens do not fit in a context of {limit}; shorten the prompt")
        self.limit = limit
        self.slots = self._rounded(slots)  # tokens that a row can hold now
        shape = (config.layers, rows, self.slots, config.kv_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.previous = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.empty = True

    @property
    def rows(self) -> int:
        return self.k.size(1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B,T,G,D) behind each row's length; returns all keys and values of the layer, (B,S,G,D) each."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        positions = self.lengths[:, None] + torch.arange(k.size(1), device=k.device)
        self.k[layer, rows, positions] = k
        self.v[layer, rows, positions] = v
        return self.k[layer], self.v[layer]

    def advance(self, ids: Tensor, counts: Tensor | None = None) -> None:
        """After a forward pass over ids (B,T): all T are in, or the first counts[b] (B,) of each right-padded row.

        A row with a count of 0 stays as it was.
        """
        self.empty = False
        if counts is None:
            self.lengths = self.lengths + ids.size(1)
            self.previous = ids[:, -1]
            return
        last = ids.gather(1, (counts - 1).clamp_min(0)[:, None])[:, 0]
        self.previous = torch.where(counts > 0, last, self.previous)
        self.lengths = self.lengths + counts

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` tokens a row. The caller knows the lengths, so nothing is read from the device."""
        if slots <= self.slots:
            return
        if self.limit is not None and slots > self.limit:
            raise UsageError(f"{slots} tokens do not fit in a context of {self.limit}; generate fewer")
        self.slots = self._rounded(max(slots, 2 * self.slots))
        self.k, self.v = self._grown(self.k), self._grown(self.v)

    def select(self, rows: Sequence[int] | Tensor) -> "KVCache":
        """A new cache with these rows, in this order: repeats give each sample its own copy, omissions drop rows."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.k.device)
        chosen = object.__new__(KVCache)
        chosen.limit, chosen.slots = self.limit, self.slots
        chosen.k, chosen.v = self.k.index_select(1, index), self.v.index_select(1, index)
        chosen.lengths, chosen.previous, chosen.empty = self.lengths[index], self.previous[index], self.empty
        return chosen

    def expand(self, samples: int) -> "KVCache":
        """Every row `samples` times in a row: a prompt is computed once and continued in many ways."""
        return self.select(torch.arange(self.rows, device=self.k.device).repeat_interleave(samples))

    def _rounded(self, slots: int) -> int:
        rounded = -(-max(slots, 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
        return rounded if self.limit is None else min(rounded, self.limit)

    def _grown(self, cache: Tensor) -> Tensor:
        grown = cache.new_zeros(*cache.shape[:2], self.slots, *cache.shape[3:])
        grown[:, :, : cache.size(2)] = cache
        return grown
