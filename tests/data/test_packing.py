"""Best-fit packing: against a plain quadratic one, and its promises for any documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.packing import BestFitIndex, BestFitPacker, inputs_and_targets

BOS = 1000  # and above: a <|bos|> that tells whose it is
PAD = 9999
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    """Document i is BOS + i and then i repeated: every token tells where it came from."""
    return [np.array([BOS + i] + [i] * (n - 1), np.uint16) for i, n in enumerate(lengths)]


def feed(packer: BestFitPacker, documents: list[np.ndarray], first: int = 0) -> None:
    offsets = np.cumsum([0, *map(len, documents)])
    packer.add(np.concatenate(documents), offsets, range(first, first + len(documents)))


def naive_rows(documents: list[np.ndarray], capacity: int, buffer_size: int) -> list[list[int]]:
    """The definition, read aloud: lists, scanned."""
    waiting, buffer, rows, row = list(documents), [], [], []
    while True:
        while len(buffer) < buffer_size and waiting:
            buffer.append(waiting.pop(0))
        if not buffer:
            return rows
        left = capacity - len(row)
        fitting = [d for d in buffer if len(d) <= left]
        chosen = max(fitting, key=len) if fitting else min(buffer, key=len)  # max and min take the first of equals
        buffer = [d for d in buffer if d is not chosen]
        row += chosen[:left].tolist()
        if len(row) == capacity:
            rows.append(row)
            row = []


def pack_all(packer: BestFitPacker, block: int) -> np.ndarray:
    """All complete rows of a packer that has been fed everything."""
    packer.finish()
    blocks = []
    while True:
        rows = np.full((block, packer.capacity), -7)
        done = packer.pack(rows)
        blocks.append(rows[:done])
        if done < block:
            return np.concatenate(blocks)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 30), st.integers(1, 4))
def test_equals_the_naive_definition(lengths, capacity, buffer_size, block):
    documents = make_documents(lengths)
    packer = BestFitPacker(capacity, buffer_size)
    feed(packer, documents)
    assert pack_all(packer, block).tolist() == naive_rows(documents, capacity, buffer_size)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 30))
def test_every_token_is_placed_or_in_a_cropped_tail(lengths, capacity, buffer_size):
    documents = make_documents(lengths)
    packer = BestFitPacker(capacity, buffer_size)
    feed(packer, documents)
    rows = pack_all(packer, 3)
    used = set()
    for row in rows:
        assert row[0] >= BOS
        starts = [*np.flatnonzero(row >= BOS), capacity]
        for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False), 1):
            document = row[start] - BOS
            assert document not in used, "a document was used twice"
            used.add(document)
            assert row[start:end].tolist() == documents[document][: end - start].tolist()
            assert end - start == lengths[document] or number == len(starts) - 1, (
                "only the last of a row may be cropped"
            )
    unused = [n for i, n in enumerate(lengths) if i not in used]
    assert sum(unused) < capacity, "only the last, incomplete row may be left out"


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1))
def test_rows_do_not_depend_on_how_documents_arrive(lengths, capacity, buffer_size, portions):
    documents = make_documents(lengths)
    whole = BestFitPacker(capacity, buffer_size)
    feed(whole, documents)
    expected = pack_all(whole, 2)
    packer = BestFitPacker(capacity, buffer_size)
    rows, found, position, turn = np.full((2, capacity), -7), [], 0, 0
    while not packer.finished or position < len(documents):
        while packer.pack(rows) == len(rows):
            found.append(rows.copy())
        if position >= len(documents):
            packer.finish()
            continue
        portion = documents[position : position + portions[turn % len(portions)]]
        feed(packer, portion, position)
        position, turn = position + len(portion), turn + 1
    while (done := packer.pack(rows)) == len(rows):
        found.append(rows.copy())
    found.append(rows[:done])
    np.testing.assert_array_equal(np.concatenate(found), expected)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 30), st.integers(1, 6))
def test_buffered_documents_restart_a_packer(lengths, capacity, buffer_size, after):
    documents = make_documents(lengths)
    packer = BestFitPacker(capacity, buffer_size)
    feed(packer, documents)
    packer.finish()
    rows = np.zeros((after, capacity), int)
    if packer.pack(rows) < after:
        return
    again = BestFitPacker(capacity, buffer_size)
    for key in [*packer.buffered(), *range(packer.newest + 1, len(documents))]:
        feed(again, [documents[key]], key)
    np.testing.assert_array_equal(pack_all(again, 1), pack_all(packer, 1))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 30))
def test_padding_crops_nothing_but_what_is_longer_than_a_row(lengths, capacity, buffer_size):
    documents = make_documents(lengths)
    packer = BestFitPacker(capacity, buffer_size, pad_id=PAD)
    offsets = np.cumsum([0, *lengths])
    learn = (np.arange(offsets[-1]) % 3 == 0).astype(np.uint8)
    packer.add(np.concatenate(documents), offsets, range(len(documents)), learn)
    packer.finish()
    rows, mask = np.zeros((len(documents), capacity), int), np.full((len(documents), capacity), 7, np.uint8)
    done = packer.pack(rows, mask)
    pieces = []
    for row, learned in zip(rows[:done], mask[:done], strict=True):
        assert BOS <= row[0] < PAD
        padding = row == PAD
        assert not learned[padding].any() and not (np.diff(padding.astype(int)) < 0).any()
        starts = [*np.flatnonzero((row >= BOS) & ~padding), capacity - padding.sum()]
        pieces += [(row[a:b].tolist(), learned[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]
    expected = [
        (d[:capacity].tolist(), learn[offsets[i] : offsets[i + 1]][:capacity].tolist()) for i, d in enumerate(documents)
    ]
    assert sorted(pieces) == sorted(expected)


def test_ties_go_to_the_oldest_and_the_largest_that_fits_comes_first():
    index = BestFitIndex()
    for serial, length in enumerate([5, 3, 5, 3, 9]):
        index.push(length, serial)
    assert [index.pop_largest(8), index.pop_largest(4), index.pop_shortest(), index.pop_largest(4)] == [0, 1, 3, None]
    assert [index.pop_largest(5), index.pop_largest(9), len(index)] == [2, 4, 0]


def test_long_documents_are_kept_as_no_more_than_a_row():
    packer = BestFitPacker(10, 2)
    ids = np.zeros(1_000_000, np.uint16)
    packer.add(ids, np.array([0, 500_000, 1_000_000]), "ab")
    assert packer.pack(np.zeros((1, 10), int)) == 1
    ((head, _),) = packer._documents.values()
    assert head.nbytes == 20 and head.base is None


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        BestFitPacker(8).add(np.zeros(3, int), np.array([0, 0, 3]), "ab")
    with pytest.raises(ValueError, match="offsets"):
        BestFitPacker(8).add(np.zeros(3, int), np.array([0, 3]), "ab")
    with pytest.raises(ValueError, match="8 tokens"):
        BestFitPacker(8).pack(np.zeros((2, 9), int))
    with pytest.raises(ValueError, match="at least 1"):
        BestFitPacker(0)


def test_targets_are_shifted_and_masked():
    rows, mask = np.array([[0, 5, 6, 9]], np.uint16), np.array([[1, 0, 1, 0]])
    inputs, targets = inputs_and_targets(rows, mask)
    assert inputs.tolist() == [[0, 5, 6]] and targets.tolist() == [[-1, 6, -1]]
    assert inputs.dtype == targets.dtype == np.int64
