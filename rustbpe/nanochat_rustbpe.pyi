"""Byte-level BPE in Rust. `nanochat.tokenizer` is the face that the pipeline uses; this is what lies under it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

PATTERN_2: str
"""The split pattern with at most two digits per number; this exact string takes the hand-written splitter."""
PATTERN_3: str
"""The same with three digits. Any other pattern runs on a regex engine."""
UNICODE_VERSION: str
"""Version of the tables behind \\p{L} and \\p{N}."""
__version__: str

class Column(Protocol):
    """Texts end to end, as an Arrow string column keeps them."""

    def utf8_buffers(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32] | npt.NDArray[np.int64]]:
        """Contiguous data and offsets [texts + 1]: text i is data[offsets[i]:offsets[i + 1]], in UTF-8."""

class Encoding:
    """A vocabulary, a split pattern and special tokens. Immutable, picklable, safe to share among threads.

    ranks: token bytes -> id; must hold all 256 single bytes. specials: (name, id) pairs. allow_specials: whether texts
    may spell special tokens, unless a call says otherwise; leave it off for anything a user wrote.
    Raises ValueError with the reason for a vocabulary, pattern or special token that cannot work.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        specials: Sequence[tuple[str, int]] = ...,
        allow_specials: bool = False,
    ) -> None: ...
    @property
    def pattern(self) -> str: ...
    @property
    def specials(self) -> list[tuple[str, int]]: ...
    @property
    def allow_specials(self) -> bool: ...
    @property
    def id_limit(self) -> int:
        """One above the largest id."""
    def ranks(self) -> dict[bytes, int]:
        """Ordinary tokens, in order of id."""
    def merges(self) -> list[tuple[int, int]]:
        """For each token longer than one byte, in order of id, the two tokens that join into it."""
    def split(self, text: str) -> list[str]:
        """The pieces of `text`; no token spans two of them."""
    def encode(
        self, text: str, allow_specials: bool | None = None, errors: Literal["strict", "replace"] = "strict"
    ) -> list[int]:
        """Ids of `text`. A lone surrogate is a ValueError, or with errors="replace" U+FFFD."""
    def encode_batch(
        self,
        texts: Iterable[str] | Column,
        first: int | None = None,
        threads: int | None = None,
        allow_specials: bool | None = None,
        errors: Literal["strict", "replace"] = "strict",
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Ids of all texts end to end (uint16 if every id fits, else uint32) and offsets [len(texts) + 1] into them.

        texts: strings, or a column that is read where it lies. first: an id to put before each text. threads: all CPUs
        by default; the result does not depend on it.
        """
    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[Any]) -> bytes:
        """Bytes of the tokens; a special token's are its name. ValueError for an id that is no token."""
    def token_bytes(self, id: int) -> bytes | None:
        """Bytes of one token; None for an id that is no token."""
    def stream_decoder(self) -> StreamDecoder: ...

class StreamDecoder:
    """Decodes tokens one by one; shows a character only when it is complete, broken bytes as U+FFFD."""

    def push(self, id: int) -> str: ...
    def flush(self) -> str: ...

class WordCounts:
    """How often each piece occurs: count once, then train any number of vocabularies."""

    def __init__(self, pattern: str) -> None: ...
    def __len__(self) -> int:
        """Number of distinct pieces."""
    @property
    def total(self) -> int:
        """Number of pieces."""
    def add(self, texts: Iterable[str | bytes], threads: int | None = None) -> None:
        """Counts every text, in threads. If the iterable raises, nothing of this call is counted."""
    def add_counts(self, counts: Iterable[tuple[bytes, int]]) -> None: ...
    def items(self) -> list[tuple[bytes, int]]:
        """(piece, count), sorted by piece."""
    def train(self, count: int, progress: Callable[[int], object] | None = None) -> list[tuple[int, int]]:
        """The first `count` merges, for ids 256, 257, …; those of a smaller vocabulary are a prefix.

        progress(done) is called about ten times a second; an exception in it, or Ctrl-C, ends the run. ValueError when
        the words hold fewer merges.
        """

class BestFitPacker:
    """`nanochat.data.packing.BestFitPacker` without padding and masks, the GIL released; the rows are the same.

    A document's key is four integers that mean nothing here. Raises ValueError for what cannot be packed.
    """

    def __init__(self, capacity: int, buffer_size: int = 1000) -> None: ...
    def add(self, ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> None:
        """Appends documents: number i is ids[offsets[i]:offsets[i + 1]] (uint16 or uint32) with key keys[i] of [n, 4].

        All of them or, when it raises, none; what a row can take of each is copied.
        """
    def finish(self) -> None:
        """Says that no document follows: from now on the buffer is emptied instead of topped up."""
    @property
    def finished(self) -> bool: ...
    @property
    def newest(self) -> tuple[int, int, int, int] | None:
        """Key of the last document that entered the buffer."""
    def buffered(self) -> npt.NDArray[np.int64]:
        """Keys [documents, 4] of the buffer, oldest first: the whole state, when no row is half filled."""
    def pack(self, rows: npt.NDArray[np.int32], first: int = 0, step: int = 1) -> int:
        """Packs len(rows) · step rows and writes numbers first, first + step, … into `rows` [n, capacity].

        How many are complete, written or not. Fewer than all means that documents ran out: `add` more (or `finish`) and
        call again with the same arguments.
        """

def ranks_from_merges(merges: Sequence[tuple[int, int]]) -> dict[bytes, int]:
    """Token bytes -> id: the 256 bytes, then one token for each merge."""
