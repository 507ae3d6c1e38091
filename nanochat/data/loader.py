"""Batches for pretraining: rows packed in one global order, made ahead of the device, restartable anywhere.

Idea: documents are read, tokenized and packed (packing.py) in one order that depends on the corpus alone. Row number n
of that order goes to rank n mod W, so what a model sees depends neither on the number of ranks nor on the micro-batch.
Every rank packs every row, since a row depends on the lengths of all documents before it; tokenizing is cheap beside
training on the tokens, and ranks that need not talk cannot wait for each other.

State: the number of the next row, the place of the next document, and the buffer as references (epoch, shard, row
group, document). A restart feeds the buffered documents first and the following ones after them, in their old order,
and is thereby exact, on any number of ranks: a few kilobytes of JSON instead of megabytes of tokens.

Three threads run ahead with short queues between them: one reads row groups, one tokenizes them, one packs. All three
work in native code without the GIL, on arrays: texts stay where Arrow decoded them, and the packer writes this rank's
rows into pinned memory. The training thread takes a finished block, which travels to the device as int32 and is widened
there.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from nanochat.data.columns import Column, ColumnReader
from nanochat.data.corpus import Corpus, Split
from nanochat.data.packing import BUFFER_SIZE
from nanochat.errors import NanochatError, UsageError
from nanochat.tokenizer import native

DOCUMENTS_AT_ONCE = 1024
_MAX_THREADS = 8
T = TypeVar("T")


class Tokenizer(Protocol):
    """What the loader needs of a tokenizer."""

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(
        self, texts: Sequence[str], prepend_bos: bool = False, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...


class Position(NamedTuple):
    """Where a document stands in a split, read epoch after epoch. Positions compare in reading order."""

    epoch: int
    shard: int
    row_group: int
    document: int


class TokenizedDocuments(NamedTuple):
    """Document number i is ids[offsets[i]:offsets[i + 1]] and stands at positions[i], a Position's four numbers."""

    ids: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray


class Snapshot(NamedTuple):
    """The loader between two blocks of rows: enough to restart it."""

    row: int
    next: Position
    buffer: np.ndarray  # (documents, 4) int64: positions, oldest first


class Shape(NamedTuple):
    """Which rows one rank takes at a time, and of how many tokens."""

    rows: int
    capacity: int
    rank: int
    world_size: int


class Block(NamedTuple):
    """The rows of one micro-batch of one rank (rows, T + 1), int32 on the host, and the state after them."""

    rows: torch.Tensor
    snapshot: Snapshot


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. `wait_seconds`: how long training stood still for it."""

    inputs: torch.Tensor  # (rows, T) int64
    targets: torch.Tensor  # (rows, T) int64: the token after each input
    wait_seconds: float
    snapshot: Snapshot
    identity: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """What `PackedLoader(state=...)` restarts from to give the batch after this one; plain JSON."""
        return _to_state(self.snapshot, self.identity)


class Ahead(Generic[T]):
    """Runs an iterator in a thread, at most `depth` items ahead. Its exceptions surface in the thread that iterates."""

    def __init__(self, items: Iterator[T], depth: int, name: str):
        self._channel: _Channel[T] = _Channel(depth)
        self._thread = threading.Thread(target=_fill, args=(items, self._channel), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._channel.get()

    def stop(self) -> None:
        """Lets the thread end at its next item, and whoever waits for one."""
        self._channel.close()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the thread has ended."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)


class _Channel(Generic[T]):
    """A bounded queue that can be closed from either side and carries the producer's exception."""

    def __init__(self, depth: int):
        self._items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Waits for room; False when the channel was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
            self._changed.notify_all()
            return not self._closed

    def get(self) -> T:
        """The next item; raises the producer's exception, or StopIteration at the end, after the items before it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._items)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self, error: BaseException | None = None) -> None:
        """Ends the channel; what is in it can still be taken."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
            self._changed.notify_all()


def _fill(items: Iterator[T], channel: _Channel[T]) -> None:
    """Body of an Ahead's thread: a function, so that the thread does not keep the Ahead alive."""
    try:
        for item in items:
            if not channel.put(item):
                return
        channel.close()
    except BaseException as error:  # it belongs to the thread that waits for items, whatever it is
        channel.close(error)


class Documents(NamedTuple):
    """Texts and where they stand: positions (documents, 4), a Position in each row. In `shard`, for messages."""

    texts: Column
    positions: np.ndarray
    shard: Path


def read_documents(reader: ColumnReader, start: Position, epochs: int | None) -> Iterator[Documents]:
    """The documents from `start` on, at most a row group at a time; without end when `epochs` is None."""
    epoch, first_shard, first_group, first_document = start
    while epochs is None or epoch < epochs:
        found = (first_shard, first_group, first_document) != (0, 0, 0)  # what comes before was found by an earlier run
        for shard in range(first_shard, len(reader.shards)):
            for group in range(first_group, reader.row_groups(shard)):
                texts = reader.read(shard, group)
                for low in range(first_document, len(texts), DOCUMENTS_AT_ONCE):
                    found = True
                    chosen = texts[low : low + DOCUMENTS_AT_ONCE]
                    indices = range(low, low + len(chosen))
                    yield Documents(chosen, _positions(epoch, shard, group, indices), reader.shards[shard].path)
                first_document = 0
            first_group = first_document = 0
        if not found:
            corpus = reader.corpus
            raise NanochatError(f"the {reader.split} shards of {corpus.folder} hold no documents; {corpus.remedy}")
        first_shard, epoch = 0, epoch + 1


def reread_documents(reader: ColumnReader, positions: np.ndarray) -> Iterator[Documents]:
    """The texts at `positions`, in that order: that of reading, so that each row group is read once."""
    places = np.flatnonzero(np.any(positions[1:, :3] != positions[:-1, :3], axis=1)) + 1
    for part in np.split(positions, places) if len(positions) else ():
        epoch, shard, group, _ = part[0].tolist()
        indices = part[:, 3].tolist()
        texts, path = reader.read(shard, group), reader.shards[shard].path
        if max(indices) >= len(texts):
            raise NanochatError(
                f"the data state names document {max(indices)} of row group {group} of {path}, "
                f"which has {len(texts)}: this is not the same corpus"
            )
        yield Documents(texts.take(indices), part, path)


def _positions(epoch: int, shard: int, group: int, documents: range) -> np.ndarray:
    positions = np.empty((len(documents), len(Position._fields)), np.int64)
    positions[:] = epoch, shard, group, 0
    positions[:, 3] = documents
    return positions


def _tokenize(documents: Iterator[Documents], tokenizer: Tokenizer, threads: int) -> Iterator[TokenizedDocuments]:
    for texts, positions, shard in documents:
        try:
            ids, offsets = tokenizer.encode_batch(texts, prepend_bos=True, threads=threads)
        except UsageError as error:  # of a text that is not UTF-8
            _, _, group, document = positions[0].tolist()
            raise NanochatError(
                f"cannot tokenize row group {group} of {shard} from document {document} on: {error}; "
                "replace the shard by an intact copy"
            ) from error
        yield TokenizedDocuments(ids, offsets, positions)


def _chained(reader: ColumnReader, snapshot: Snapshot, epochs: int | None) -> Iterator[Documents]:
    """The documents of the buffer, then all that follow."""
    yield from reread_documents(reader, snapshot.buffer)
    yield from read_documents(reader, snapshot.next, epochs)


def _pack(
    documents: Ahead[TokenizedDocuments], packer: Any, start: Snapshot, shape: Shape, pin: torch.device | None
) -> Iterator[Block]:
    """Blocks of this rank's rows: W × rows of the global order are packed, every W-th is written."""
    if pin is not None:
        torch.cuda.set_device(pin)  # per thread; pinning under another device would open a context there
    row, following, every = start.row, start.next, shape.rows * shape.world_size
    while True:
        block = torch.empty((shape.rows, shape.capacity), dtype=torch.int32, pin_memory=pin is not None)
        own = (shape.rank - row) % shape.world_size
        while packer.pack(block.numpy(), own, shape.world_size) < every:
            if packer.finished:
                return
            more = next(documents, None)
            if more is None:
                packer.finish()
            else:
                packer.add(*more)
        row += every
        newest = Position(*packer.newest)
        following = max(following, newest._replace(document=newest.document + 1))
        yield Block(block, Snapshot(row, following, packer.buffered()))


class PackedLoader:
    """An iterator of `Batch`es of `rows` rows of `seq_len` tokens for one rank; a context manager, or call `close`.

    Rows come without end, epoch after epoch, or for `epochs` (then the last, incomplete block is left out). `state` is
    a `Batch.state` of a loader of the same corpus, tokenizer and seq_len; ranks and rows may differ. `prefetch` counts
    batches; `threads` is for the tokenizer, by default this rank's share of the processors. Raises UsageError for
    values that do not fit together, NanochatError for a state of other data; damaged data raise from `next`.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        split: Split,
        *,
        rows: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        state: dict[str, Any] | None = None,
        prefetch: int = 4,
        pin_memory: bool | None = None,
        epochs: int | None = None,
        buffer_size: int = BUFFER_SIZE,
        threads: int | None = None,
    ):
        if rows < 1 or seq_len < 1 or prefetch < 1:
            raise UsageError(f"rows {rows}, seq_len {seq_len} and prefetch {prefetch} must be at least 1")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of {world_size} ranks")
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._identity = {
            "version": 1, "split": split, "seq_len": seq_len, "buffer_size": buffer_size,
            "corpus": corpus.digest(split), "tokenizer": str(tokenizer.fingerprint),
        }  # fmt: skip
        nothing = np.empty((0, len(Position._fields)), np.int64)
        start = _from_state(state, self._identity) if state else Snapshot(0, Position(0, 0, 0, 0), nothing)
        self._snapshot = start
        pin = self._device if (self._device.type == "cuda" if pin_memory is None else pin_memory) else None
        if pin is not None and pin.type != "cuda":
            raise UsageError(f"pin_memory needs a CUDA device, not {self._device}")
        threads = threads or max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // world_size))
        packer = native().BestFitPacker(seq_len + 1, buffer_size)
        shape = Shape(rows, seq_len + 1, rank, world_size)
        self._documents = Ahead(_chained(ColumnReader(corpus, split), start, epochs), 2, f"read-{split}")
        self._tokenized = Ahead(_tokenize(self._documents, tokenizer, threads), 2, f"tokenize-{split}")
        self._blocks = Ahead(_pack(self._tokenized, packer, start, shape, pin), prefetch, f"pack-{split}")
        self._finalizer = weakref.finalize(self, _end, self._blocks, self._tokenized, self._documents)

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if not self._finalizer.alive:
            raise StopIteration
        rows, self._snapshot = next(self._blocks)
        waited = time.perf_counter() - begin
        # torch's allocator of pinned memory hands it out again only when the copy from it is done.
        rows = rows.to(self._device, non_blocking=True)
        return Batch(rows[:, :-1].long(), rows[:, 1:].long(), waited, self._snapshot, self._identity)

    @property
    def state(self) -> dict[str, Any]:
        """The state after the last batch given out; the state it was started from before the first."""
        return _to_state(self._snapshot, self._identity)

    def close(self) -> None:
        """Ends the threads and waits for them. Batches not yet taken are dropped."""
        self._finalizer()

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _end(*stages: Ahead) -> None:
    """Stops all stages before waiting for any: a stage may be waiting for the one before it."""
    for stage in stages:
        stage.stop()
    for stage in stages:
        stage.join(timeout=30)


def _to_state(snapshot: Snapshot, identity: dict[str, Any]) -> dict[str, Any]:
    """The JSON form of a snapshot: the buffer as [epoch, shard, row group, [indices]], in reading order."""
    buffer: list[list] = []
    for *place, document in snapshot.buffer.tolist():
        if not buffer or buffer[-1][:3] != place:
            buffer.append([*place, []])
        buffer[-1][3].append(document)
    following = dict(zip(("epoch", "shard", "row_group", "offset"), snapshot.next, strict=True))
    return {**identity, "row": snapshot.row, **following, "buffer": buffer}


def _from_state(state: dict[str, Any], identity: dict[str, Any]) -> Snapshot:
    """The snapshot in `state`; NanochatError when it was taken of other data than `identity` describes."""
    different = [key for key, value in identity.items() if state.get(key) != value]
    other = [f"{key} was {state.get(key)!r} and is {identity[key]!r}" for key in different]
    if different:
        raise NanochatError(
            f"the saved data state does not belong to this run: {'; '.join(other)}; resume with the same "
            "corpus (the same --shards), tokenizer and sequence length, or start anew"
        )
    positions = [(epoch, shard, group, d) for epoch, shard, group, ds in state["buffer"] for d in ds]
    buffer = np.array(positions, np.int64).reshape(-1, len(Position._fields))
    following = Position(state["epoch"], state["shard"], state["row_group"], state["offset"])
    return Snapshot(state["row"], following, buffer)
