"""The packer in Rust gives the rows, the answers and the state of the one in Python, whatever the calls."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.packing import BestFitPacker
from nanochat.tokenizer import native

from .test_packing import LENGTHS, make_documents

KEY = (7, 0, -3)  # and the document's number: the four integers of a key are anything


def as_keys(numbers: range) -> np.ndarray:
    return np.array([(*KEY, number) for number in numbers], np.int64).reshape(-1, 4)


def add_to(packer, documents: list[np.ndarray], numbers: range) -> None:
    ids = np.concatenate([documents[i] for i in numbers])
    packer.add(ids, np.cumsum([0, *(len(documents[i]) for i in numbers)]), as_keys(numbers))


@settings(max_examples=250, deadline=None)
@given(
    LENGTHS, st.integers(1, 50), st.integers(1, 30), st.integers(1, 4), st.lists(st.integers(1, 20), min_size=1),
    st.sampled_from([np.uint16, np.uint32]),
)  # fmt: skip
def test_every_call_answers_as_the_python_packer(lengths, capacity, buffer_size, block, portions, kind):
    documents = [d.astype(kind) for d in make_documents(lengths)]
    python, rust = BestFitPacker(capacity, buffer_size), native().BestFitPacker(capacity, buffer_size)
    rows = [np.full((block, capacity), -7, np.int32) for _ in range(2)]
    assert rust.newest is None
    position = turn = 0
    while True:
        done = python.pack(rows[0])
        assert rust.pack(rows[1]) == done
        np.testing.assert_array_equal(rows[0], rows[1])  # what is begun, too
        assert rust.buffered().tolist() == [list(key) for key in python.buffered()]
        assert rust.newest == (None if python.newest is None else tuple(python.newest))
        assert rust.finished == python.finished
        if done == block:
            continue
        if python.finished:
            break
        if position == len(documents):
            python.finish()
            rust.finish()
            continue
        numbers = range(position, min(position + portions[turn % len(portions)], len(documents)))
        add_to(python, documents, numbers)
        add_to(rust, documents, numbers)
        position, turn = numbers.stop, turn + 1


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_a_rank_writes_every_nth_row(lengths, capacity, buffer_size, own_rows, step, first):
    documents, first = make_documents(lengths), first % step
    every = own_rows * step
    python, rust = BestFitPacker(capacity, buffer_size), native().BestFitPacker(capacity, buffer_size)
    for packer in (python, rust):
        add_to(packer, documents, range(len(documents)))
        packer.finish()
    while True:
        all_rows, own = np.full((every, capacity), -7), np.full((own_rows, capacity), -7, np.int32)
        done = python.pack(all_rows)
        assert rust.pack(own, first, step) == done
        np.testing.assert_array_equal(own, all_rows[first::step])
        if done < every:
            return


def test_wrong_calls_are_refused_and_leave_nothing_behind():
    make, keys = native().BestFitPacker, as_keys(range(2))
    packer, ids = make(8, 1), np.ones(3, np.uint16)
    for offsets in ([0, 0, 3], [0, 2, 2], [0, 1, 4], [-1, 1, 3], [2, 1, 3]):
        with pytest.raises(ValueError, match=r"document \[7, 0, -3, \d\].* has no tokens"):
            packer.add(ids, np.array(offsets), keys)
    with pytest.raises(ValueError, match="2 keys need 3 offsets, got 2"):
        packer.add(ids, np.array([0, 3]), keys)
    with pytest.raises(ValueError, match="4 numbers each, not"):
        packer.add(ids, np.array([0, 1, 3]), keys[:, :3].copy())
    with pytest.raises(ValueError, match="C-contiguous"):
        packer.add(ids, np.array([0, 1, 3]), np.asfortranarray(keys))
    with pytest.raises(TypeError):
        packer.add(ids.astype(np.float32), np.array([0, 1, 3]), keys)
    assert packer.pack(np.zeros((1, 8), np.int32)) == 0 and len(packer.buffered()) == 0
    with pytest.raises(ValueError, match="8 tokens"):
        packer.pack(np.zeros((2, 9), np.int32))
    with pytest.raises(ValueError, match="first 2 must be less than step 2"):
        packer.pack(np.zeros((2, 8), np.int32), 2, 2)
    with pytest.raises(TypeError):
        packer.pack(np.zeros((2, 8), np.int64))
    for strided in (np.zeros((2, 16), np.int32)[:, ::2], np.zeros((8, 2), np.int32).T):
        with pytest.raises(ValueError, match="C-contiguous"):
            packer.pack(strided)
    read_only = np.zeros((2, 8), np.int32)
    read_only.flags.writeable = False
    with pytest.raises((ValueError, TypeError)):
        packer.pack(read_only)
    for capacity, buffer_size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            make(capacity, buffer_size)


def test_packers_of_many_threads_do_not_disturb_each_other():
    lengths = np.random.default_rng(0).integers(1, 400, 3000).tolist()
    documents = make_documents([min(n, 400) for n in lengths])
    found: list[np.ndarray] = []

    def work() -> None:
        packer, rows = native().BestFitPacker(129, 100), np.zeros((2000, 129), np.int32)
        add_to(packer, documents, range(len(documents)))
        packer.pack(rows)
        found.append(rows)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and found[0].any() and all(np.array_equal(found[0], rows) for rows in found)
