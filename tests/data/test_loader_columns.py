"""Text columns read in place: every shape Arrow can give them, the same ids and rows as from Python strings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.columns import Column, ColumnReader, as_column
from nanochat.data.corpus import open_corpus
from nanochat.data.loader import PackedLoader, Position, read_documents
from nanochat.errors import NanochatError
from nanochat.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer

from .conftest import make_texts, write_parquet

TEXTS = ["one", "", "zwei äöü", "三 <|bos|>", "😀" * 9, " ", "\n\n", "end"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(make_texts(500), MIN_VOCAB_SIZE + 100)


def array_of(texts: Sequence[str | None], kind: pa.DataType) -> pa.Array:
    return pa.array(texts, kind)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("form", ["whole", "slice", "empty slice", "chunks", "no chunks", "nulls", "taken"])
def test_ids_equal_those_of_python_strings(tokenizer, kind, form):
    padded = array_of(["before", "it", *TEXTS, "after"], kind)
    chunks = {
        "whole": [array_of(TEXTS, kind)],
        "slice": [padded.slice(2, len(TEXTS))],
        "empty slice": [padded.slice(3, 0)],
        "chunks": [padded.slice(0, 3), padded.slice(3, 0), padded.slice(3)],
        "no chunks": [],
        "nulls": [array_of([None, "a", None, None, "b", None], kind).slice(1)],
        "taken": [padded],
    }[form]
    column = as_column(pa.chunked_array(chunks, kind))
    expected = [text or "" for chunk in chunks for text in chunk.to_pylist()]
    if form == "taken":
        column, expected = column.take([8, 2, 2, 0]), [expected[i] for i in (8, 2, 2, 0)]
    assert list(column) == expected and len(column) == len(expected)
    for low, high in [(0, None), (1, 3), (2, None), (5, 5)]:
        texts = expected[low:high]
        found, wanted = (tokenizer.encode_batch(t, prepend_bos=True) for t in (column[low:high], texts))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert isinstance(column, Sequence) and [column[i] for i in range(len(column))] == expected


def test_buffers_are_those_of_arrow():
    array = pa.array(TEXTS * 3).slice(2, 9)
    data, offsets = Column(array)[3:].utf8_buffers()
    assert data.ctypes.data == array.buffers()[2].address
    assert offsets.ctypes.data == array.buffers()[1].address + 4 * 5 and offsets.dtype == np.int32
    assert len(offsets) == 7


def test_null_slots_with_text_behind_them_are_empty(tokenizer):
    """Arrow lets the offsets of a null span any bytes."""
    validity, offsets = pa.py_buffer(bytes([0b101])), pa.py_buffer(np.array([0, 1, 3, 4], np.int32))
    array = pa.Array.from_buffers(pa.string(), 3, [validity, offsets, pa.py_buffer(b"axxb")])
    column = as_column(pa.chunked_array([array]))
    ids, bounds = tokenizer.encode_batch(column)
    assert tokenizer.decode(ids) == "ab" and bounds.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_matter(tokenizer, threads):
    texts = make_texts(3000, longest=200) + ["x " * 100_000] + make_texts(50)
    wanted, found = (tokenizer.encode_batch(t, threads=n) for t, n in ((texts, 1), (Column(pa.array(texts)), threads)))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_wide_vocabularies_give_wide_ids():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 70_000}
    wide = Tokenizer.from_ranks(ranks, specials=SPECIAL_TOKENS)
    ids, _ = wide.encode_batch(Column(pa.array(["abc"])), prepend_bos=True)
    assert ids.dtype == np.uint32 and ids.tolist() == [wide.bos_id, 70_000, 99]


def test_bad_buffers_are_errors(tokenizer):
    class Bad:
        def __init__(self, data: bytes, offsets: np.ndarray):
            self.utf8_buffers = lambda: (np.frombuffer(data, np.uint8), offsets)

    encoding = tokenizer._encoding
    for offsets in ([0, 9], [-1, 2], [2, 1], [0, 2**31 - 1]):
        for kind in (np.int32, np.int64):
            with pytest.raises(ValueError, match="offsets of text 0"):
                encoding.encode_batch(Bad(b"text", np.array(offsets, kind)))
    with pytest.raises(ValueError, match="text 1 is not valid UTF-8"):
        encoding.encode_batch(Bad(b"a\xffb", np.array([0, 1, 2, 3])))
    ids, _ = encoding.encode_batch(Bad(b"a\xffb", np.array([0, 1, 2, 3])), errors="replace")
    assert encoding.decode_bytes(ids) == "a\ufffdb".encode()
    with pytest.raises(TypeError):
        encoding.encode_batch(Bad(b"ab", np.array([0, 1, 2], np.uint8)))


class OnlyStrings:
    """The same tokenizer, blind to columns."""

    def __init__(self, tokenizer: Tokenizer):
        self.inner, self.fingerprint = tokenizer, tokenizer.fingerprint

    def encode_batch(self, texts, prepend_bos=False, threads=None):
        return self.inner.encode_batch([str(text) for text in texts], prepend_bos, threads)


def test_rows_and_states_equal_those_from_python_strings(tmp_path: Path, tokenizer):
    texts: list[str | None] = [*make_texts(150, longest=300), None, *TEXTS, None]
    for shard, kind in enumerate((pa.string(), pa.large_string(), pa.string())):
        table = pa.table({"other": pa.array(range(len(texts))), "text": pa.array(texts[shard:] + texts[:shard], kind)})
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=37)
    corpus = open_corpus(str(tmp_path))
    with (
        PackedLoader(corpus, tokenizer, "train", rows=3, seq_len=64, buffer_size=30) as ours,
        PackedLoader(corpus, OnlyStrings(tokenizer), "train", rows=3, seq_len=64, buffer_size=30) as theirs,
    ):
        for _ in range(200):
            a, b = next(ours), next(theirs)
            assert (a.inputs == b.inputs).all() and (a.targets == b.targets).all() and a.state == b.state
    assert a.state["epoch"] >= 1


def test_text_that_is_not_utf8_names_its_shard(tmp_path: Path, tokenizer):
    for shard in range(2):
        array = pa.array([b"good", b"bad \xff", b"good"]).view(pa.string()) if shard == 0 else pa.array(["good"])
        pq.write_table(pa.table({"text": array}), tmp_path / f"{shard}.parquet")
    with PackedLoader(open_corpus(str(tmp_path)), tokenizer, "train", rows=1, seq_len=4, buffer_size=2) as loader:
        with pytest.raises(NanochatError, match=r"row group 0 of .*0\.parquet from document 0 on: text 1 is not valid"):
            next(loader)


def test_a_restart_reads_only_the_row_groups_it_needs(corpus_folder: Path, tokenizer, monkeypatch):
    corpus, reads = open_corpus(str(corpus_folder)), []
    read = ColumnReader._read
    monkeypatch.setattr(ColumnReader, "_read", lambda self, *place: reads.append(place) or read(self, *place))
    options = {"rows": 2, "seq_len": 32, "buffer_size": 25, "prefetch": 1}
    with PackedLoader(corpus, tokenizer, "train", epochs=1, **options) as loader:
        states = [batch.state for batch in loader]
    shared = 0
    for state in states:
        needed, following = [tuple(place) for _, *place, _ in state["buffer"]], (state["shard"], state["row_group"])
        reads.clear()
        with PackedLoader(corpus, tokenizer, "train", state=state, epochs=1, **options) as loader:
            next(loader, None)
        assert reads[: len(needed)] == needed
        # what follows in the buffer's last row group is not read a second time
        assert not needed or all(place > needed[-1] for place in reads[len(needed) :])
        shared += needed[-1:] == [following]
    assert shared > 3 and len(states) > 10


def test_positions_name_what_is_read(tmp_path: Path):
    for shard in range(3):
        write_parquet(tmp_path / f"{shard}.parquet", [f"{shard}.{i}" for i in range(20)], row_group_size=6)
    reader = ColumnReader(open_corpus(str(tmp_path)), "train")
    seen = [
        (Position(*place), text)
        for texts, positions, _ in read_documents(reader, Position(0, 0, 2, 3), epochs=2)
        for place, text in zip(positions.tolist(), texts, strict=True)
    ]
    assert seen[0][0] == (0, 0, 2, 3) and len(seen) == 80 - 15 and [p for p, _ in seen] == sorted(p for p, _ in seen)
    assert all(text == f"{p.shard}.{p.row_group * 6 + p.document}" for p, text in seen)
