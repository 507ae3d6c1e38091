"""Best-fit packing: documents of any length into rows of one length, as pure functions of the order they arrive in.

Idea: a row is filled from a buffer of waiting documents (1000 by default), each beginning with <|bos|>. The largest
that fits in what is left of the row goes in; when none fits, pretraining crops the shortest to fill the row, so that
no position is padding and every row starts with <|bos|>, while fine-tuning pads the rest and crops nothing.
Trade-off: every token sees its document from the beginning, at the price of the cropped tails, whose tokens are not
trained on in this epoch. A larger buffer crops less and mixes the order of the corpus more.

The buffer is a sorted list of single integers, length × 2^40 + serial number: one bisection finds the largest that
fits, a second the oldest among equals, so that the result depends on nothing but the order of arrival. Insertion
moves at most 8 KB of pointers; the bisections dominate.

The interface is one of arrays, filled by `add` and emptied by `pack`. Pretraining uses the same in Rust,
`nanochat_rustbpe.BestFitPacker`, which knows neither padding nor masks; this one is its specification.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

BUFFER_SIZE = 1000
IGNORED_TARGET = -1
_SERIAL_BITS = 40
_SERIAL_MASK = (1 << _SERIAL_BITS) - 1


class BestFitIndex:
    """Lengths by serial number; finds the largest that fits and the shortest in O(log n). Ties go to the oldest."""

    def __init__(self) -> None:
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._order)

    def push(self, length: int, serial: int) -> None:
        """Adds a document of `length` tokens; among equal lengths the lowest `serial` number is the oldest."""
        insort(self._order, length << _SERIAL_BITS | serial)

    def pop_largest(self, limit: int) -> int | None:
        """Removes the largest document of at most `limit` tokens; its serial number, or None when none fits."""
        end = bisect_left(self._order, (limit + 1) << _SERIAL_BITS)
        if end == 0:
            return None
        length = self._order[end - 1] >> _SERIAL_BITS
        return self._order.pop(bisect_left(self._order, length << _SERIAL_BITS, 0, end)) & _SERIAL_MASK

    def pop_shortest(self) -> int:
        """Removes the shortest document; its serial number. IndexError when empty."""
        return self._order.pop(0) & _SERIAL_MASK


class BestFitPacker:
    """Packs documents into rows of `capacity` tokens.

    With `pad_id` None rows are filled to the last token by cropping (pretraining). Otherwise the rest of a row is
    `pad_id` with mask 0, and only documents longer than a whole row are cropped, to the row (fine-tuning).

    A document carries a `key`, which means nothing here: `buffered` and `newest` give keys back, and a packer that is
    fed the buffered documents first and then those after `newest` continues exactly where this one stopped.
    """

    def __init__(self, capacity: int, buffer_size: int = BUFFER_SIZE, pad_id: int | None = None):
        if capacity < 1 or buffer_size < 1:
            raise ValueError(f"capacity {capacity} and buffer_size {buffer_size} must be at least 1")
        self.capacity, self.buffer_size, self.pad_id = capacity, buffer_size, pad_id
        self.newest: Any = None
        self.finished = False
        self._index = BestFitIndex()
        self._documents: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}  # by serial, in order of age
        self._keys: dict[int, Any] = {}  # by serial, in order of age
        self._waiting: deque[tuple[np.ndarray, np.ndarray | None, Any]] = deque()
        self._serial = 0
        self._row = 0
        self._column = 0

    def add(self, ids: np.ndarray, offsets: np.ndarray, keys: Sequence[Any], mask: np.ndarray | None = None) -> None:
        """Appends documents: number i is ids[offsets[i]:offsets[i + 1]] with key keys[i].

        `ids` (tokens,) any integer dtype; `offsets` (n + 1,); `mask` (tokens,), 1 where a token is a target to learn.
        Raises ValueError for an empty document: it could not begin a row.
        """
        bounds = np.asarray(offsets).tolist()
        if len(bounds) != len(keys) + 1:
            raise ValueError(f"{len(keys)} keys need {len(keys) + 1} offsets, got {len(bounds)}")
        for start, end, key in zip(bounds, bounds[1:], keys, strict=False):
            if end <= start:
                raise ValueError(f"document {key} has no tokens; every document begins with <|bos|>")
            self._waiting.append((ids[start:end], None if mask is None else mask[start:end], key))

    def finish(self) -> None:
        """Says that no document follows: from now on the buffer is emptied instead of topped up."""
        self.finished = True

    def pack(self, rows: np.ndarray, mask: np.ndarray | None = None) -> int:
        """Fills `rows` (n, capacity), and `mask` (n, capacity) alike; how many of its rows are complete.

        Fewer than n means that documents ran out: `add` more (or `finish`) and call again with the same arrays. After
        `finish` the answer is final. It starts on a new array when the last one was completed.
        """
        if rows.shape[1:] != (self.capacity,):
            raise ValueError(f"rows of shape {rows.shape} do not hold {self.capacity} tokens each")
        while self._row < len(rows) and self._fill_row(rows[self._row], None if mask is None else mask[self._row]):
            self._row += 1
            self._column = 0
        done = self._row
        if done == len(rows):
            self._row = 0
        return done

    def buffered(self) -> list[Any]:
        """Keys of the documents in the buffer, oldest first. The packer's whole state, when no row is half filled."""
        return list(self._keys.values())

    def _fill_row(self, row: np.ndarray, mask: np.ndarray | None) -> bool:
        """Continues one row; False when it is incomplete because documents ran out."""
        while self._column < self.capacity:
            if not self._top_up():
                return self._end_row(row, mask)
            left = self.capacity - self._column
            serial = self._index.pop_largest(left)
            if serial is None:
                if self.pad_id is not None:
                    return self._end_row(row, mask)
                serial = self._index.pop_shortest()
            ids, learn = self._documents.pop(serial)
            del self._keys[serial]
            end = min(self._column + len(ids), self.capacity)
            row[self._column : end] = ids[: end - self._column]
            if mask is not None:
                mask[self._column : end] = 1 if learn is None else learn[: end - self._column]
            self._column = end
        return True

    def _end_row(self, row: np.ndarray, mask: np.ndarray | None) -> bool:
        """Pads a row that has begun; False where padding is not wanted, or documents are still to come."""
        out_of_documents = len(self._index) < self.buffer_size and not self.finished
        if self.pad_id is None or out_of_documents or self._column == 0:
            return False
        row[self._column :] = self.pad_id
        if mask is not None:
            mask[self._column :] = 0
        return True

    def _top_up(self) -> bool:
        """Moves waiting documents into the buffer; False when a choice must wait for more documents."""
        while len(self._index) < self.buffer_size and self._waiting:
            ids, mask, key = self._waiting.popleft()
            # No row takes more than its capacity, and a view would keep its whole batch alive: keep a copy of the head.
            head = ids[: self.capacity].copy()
            self._documents[self._serial] = head, None if mask is None else mask[: self.capacity].copy()
            self._keys[self._serial] = self.newest = key
            self._index.push(len(head) if self.pad_id is not None else len(ids), self._serial)
            self._serial += 1
        return len(self._index) == self.buffer_size or (self.finished and len(self._index) > 0)


def inputs_and_targets(rows: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows (n, T + 1) into inputs (n, T) and targets (n, T), int64.

    A target whose mask (n, T + 1) is 0 becomes −1: not supervised. The mask belongs to the token predicted.
    """
    inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    if mask is not None:
        targets[mask[:, 1:] == 0] = IGNORED_TARGET
    return inputs, targets
