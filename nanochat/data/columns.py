"""Text columns of parquet shards as Arrow decoded them: read by native code where they lie, without Python strings.

An Arrow string array is one buffer of UTF-8 and one of offsets into it, of 32 bits, or 64 for a `large_string`. A slice
shares both and begins somewhere in the offsets; a column may come in several chunks; a null has no text, and its
offsets may say anything. All of that ends here: a Column is a sequence of texts with one pair of buffers.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.data.corpus import TEXT_COLUMN, Corpus, Split


class Column(Sequence[str]):
    """Texts of an Arrow string array: Python strings for whoever iterates, the array's own memory for native code."""

    def __init__(self, array: pa.Array):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Column": ...
    def __getitem__(self, index: int | slice) -> "str | Column":
        found = self._array[index]
        return Column(found) if isinstance(index, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._array.to_pylist())

    def take(self, indices: list[int]) -> "Column":
        """The texts with these indices, copied."""
        return Column(self._array.take(pa.array(indices, pa.int64())))

    def utf8_buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all texts and where each begins in them, without a copy: (uint8, int32 or int64 [len + 1])."""
        kind = np.dtype(np.int64 if pa.types.is_large_string(self._array.type) else np.int32)
        _, offsets, data = self._array.buffers()
        if len(self) == 0:  # an empty array need not have buffers
            return np.empty(0, np.uint8), np.zeros(1, kind)
        bounds = np.frombuffer(offsets, kind, len(self) + 1, self._array.offset * kind.itemsize)
        return np.frombuffer(data if data is not None else b"", np.uint8), bounds


class ColumnReader:
    """Row groups of a split's shards as Columns. Keeps the last file open and the last row group: neighbors share."""

    def __init__(self, corpus: Corpus, split: Split):
        self.corpus, self.split = corpus, split
        self.shards = corpus.shards(split)
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._column: tuple[tuple[int, int], Column] | None = None

    def row_groups(self, shard: int) -> int:
        """How many row groups the shard has."""
        return self._open(shard).num_row_groups

    def read(self, shard: int, row_group: int) -> Column:
        """The texts of one row group; a null text reads as the empty string."""
        if self._column is None or self._column[0] != (shard, row_group):
            self._column = (shard, row_group), self._read(shard, row_group)
        return self._column[1]

    def _open(self, shard: int) -> pq.ParquetFile:
        if self._file is None or self._file[0] != shard:
            self._file = shard, self.shards[shard].open()
        return self._file[1]

    def _read(self, shard: int, row_group: int) -> Column:
        try:
            # pyarrow's threads decode columns in parallel, and there is but one
            table = self._open(shard).read_row_group(row_group, columns=[TEXT_COLUMN], use_threads=False)
        except (pa.ArrowException, OSError):
            self.shards[shard].read(row_group)  # raises the same, in words that name the remedy
            raise
        return as_column(table.column(0))


def as_column(texts: pa.ChunkedArray) -> Column:
    """A column of strings, nulls read as empty; copied only where it has nulls or several chunks."""
    if texts.null_count:
        texts = pc.fill_null(texts, "")
    if texts.num_chunks == 1:
        return Column(texts.chunk(0))
    # Several chunks may hold more than the 2 GB of text that 32-bit offsets reach.
    return Column(pa.concat_arrays(texts.cast(pa.large_string()).chunks or [pa.array([], pa.large_string())]))
