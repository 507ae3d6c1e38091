"""The loader: one global order of rows whatever the ranks, exact restarts, and threads that end."""

import gc
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.loader import PackedLoader
from nanochat.data.packing import BestFitPacker
from nanochat.errors import NanochatError, UsageError

from .conftest import ByteTokenizer, write_parquet

pytestmark = pytest.mark.usefixtures("no_stray_threads")
T = 32
SMALL = {"seq_len": T, "buffer_size": 25}


@pytest.fixture
def corpus(corpus_folder: Path) -> Corpus:
    return open_corpus(str(corpus_folder))


def reference_rows(corpus: Corpus, tokenizer: ByteTokenizer, count: int, split: str = "train") -> np.ndarray:
    """The first rows of the global order, made with no loader at all."""
    packer = BestFitPacker(T + 1, SMALL["buffer_size"])
    rows, added = np.zeros((count, T + 1), np.int64), 0
    while packer.pack(rows) < count:
        texts = list(corpus.documents(split))
        packer.add(*tokenizer.encode_batch(texts, prepend_bos=True), range(added, added := added + len(texts)))
    return rows


def to_rows(batch) -> np.ndarray:
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return torch.cat([batch.inputs, batch.targets[:, -1:]], 1).numpy()


def global_rows(corpus, tokenizer, count: int, rows: int, world_size: int, state=None, first: int = 0, **options):
    """Rows first … first + count of the global order, put together from all ranks; and the state after them."""
    result, states = np.full((count, T + 1), -1), []
    for rank in range(world_size):
        with PackedLoader(
            corpus, tokenizer, "train", rows=rows, rank=rank, world_size=world_size, state=state, **SMALL, **options
        ) as loader:
            mine = np.concatenate([to_rows(next(loader)) for _ in range(count // (rows * world_size))])
            numbers = [n for n in range(first, first + count) if n % world_size == rank]
            result[np.array(numbers) - first] = mine
            states.append(loader.state)
    assert all(s == states[0] for s in states), "every rank saves the same state"
    return result, states[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_rows_do_not_depend_on_ranks_or_micro_batch(corpus, tokenizer, rows, world_size):
    count = 24 * 12  # more than two epochs
    found, state = global_rows(corpus, tokenizer, count, rows, world_size)
    np.testing.assert_array_equal(found, reference_rows(corpus, tokenizer, count))
    assert state["epoch"] >= 2 and state["row"] == count


def test_restart_after_every_batch(corpus, tokenizer):
    total, rows = 80, 2
    expected = reference_rows(corpus, tokenizer, total * rows + 24)
    with PackedLoader(corpus, tokenizer, "train", rows=rows, **SMALL) as loader:
        batches = [next(loader) for _ in range(total)]
        np.testing.assert_array_equal(np.concatenate([to_rows(b) for b in batches]), expected[: total * rows])
    for number, batch in enumerate(batches):
        state = json.loads(json.dumps(batch.state))  # as a checkpoint keeps it
        with PackedLoader(corpus, tokenizer, "train", rows=3, state=state, **SMALL) as again:
            assert again.state == state
            first = (number + 1) * rows
            np.testing.assert_array_equal(to_rows(next(again)), expected[first : first + 3])


def test_restart_of_a_restart_on_other_ranks_and_rows(corpus, tokenizer):
    expected, state, first = reference_rows(corpus, tokenizer, 400), None, 0
    for rows, world_size, batches in [(1, 1, 7), (3, 2, 4), (2, 4, 5), (5, 1, 1), (1, 3, 6), (7, 2, 9)]:
        count = rows * world_size * batches
        found, state = global_rows(corpus, tokenizer, count, rows, world_size, state, first)
        np.testing.assert_array_equal(found, expected[first : first + count])
        first += count
    assert state["row"] == first


def test_validation_begins_anew_each_time_and_can_end(corpus, tokenizer):
    expected = reference_rows(corpus, tokenizer, 12, "val")
    for _ in range(2):
        with PackedLoader(corpus, tokenizer, "val", rows=4, **SMALL) as loader:
            np.testing.assert_array_equal(np.concatenate([to_rows(next(loader)) for _ in range(3)]), expected)
    with PackedLoader(corpus, tokenizer, "val", rows=1, epochs=1, **SMALL) as loader:
        once = np.concatenate([to_rows(b) for b in loader])
        assert next(loader, None) is None
    documents = [t.encode() for t in corpus.documents("val")]
    assert (once[:, 0] == tokenizer.bos_id).all()
    assert (once == tokenizer.bos_id).sum() <= len(documents)
    assert once.size > 0.5 * sum(map(len, documents))


def test_one_epoch_restarts_exactly_down_to_its_end(corpus, tokenizer):
    options = {"rows": 2, "epochs": 1, **SMALL}
    with PackedLoader(corpus, tokenizer, "train", **options) as loader:
        batches = list(loader)
    expected = np.concatenate([to_rows(b) for b in batches])
    for number in range(0, len(batches), 3):
        with PackedLoader(corpus, tokenizer, "train", state=batches[number].state, **options) as loader:
            rest = [(to_rows(b), b.state) for b in loader]
        np.testing.assert_array_equal(np.concatenate([expected[:0], *[r for r, _ in rest]]), expected[2 * number + 2 :])
        assert [s for _, s in rest] == [b.state for b in batches[number + 1 :]]


def test_state_is_small_and_names_documents(corpus, tokenizer):
    with PackedLoader(corpus, tokenizer, "train", rows=2, seq_len=T) as loader:
        for _ in range(5):
            batch = next(loader)
    assert len(json.dumps(batch.state)) < 20_000
    for epoch, shard, group, documents in batch.state["buffer"]:
        assert epoch >= 0 and max(documents) < len(corpus.read_row_group(shard, group))


def test_state_of_other_data_is_refused(corpus, corpus_folder, tokenizer):
    with PackedLoader(corpus, tokenizer, "train", rows=1, **SMALL) as loader:
        state = next(loader).state
    with pytest.raises(NanochatError, match="corpus was .* --shards"):
        PackedLoader(open_corpus(str(corpus_folder), shards=2), tokenizer, "train", rows=1, state=state, **SMALL)
    with pytest.raises(NanochatError, match="seq_len was 32 and is 16"):
        PackedLoader(corpus, tokenizer, "train", rows=1, seq_len=16, buffer_size=25, state=state)
    other = ByteTokenizer()
    other.fingerprint = "another"
    with pytest.raises(NanochatError, match="tokenizer was 'bytes' and is 'another'"):
        PackedLoader(corpus, other, "train", rows=1, state=state, **SMALL)


def test_wrong_values_are_usage_errors(corpus, tokenizer):
    for wrong in ({"rows": 0}, {"rank": 2, "world_size": 2}, {"prefetch": 0}, {"seq_len": 0}):
        with pytest.raises(UsageError):
            PackedLoader(corpus, tokenizer, "train", **{"rows": 1, "seq_len": T, **wrong})
    with pytest.raises(UsageError, match="split 'test'"):
        PackedLoader(corpus, tokenizer, "test", rows=1, seq_len=T)


def test_exceptions_of_the_threads_surface_with_their_message(corpus, corpus_folder, tokenizer):
    class Broken(ByteTokenizer):
        calls = 0

        def encode_batch(self, *args, **kwargs):
            Broken.calls += 1
            if Broken.calls > 3:
                raise RuntimeError("vocabulary on fire")
            return super().encode_batch(*args, **kwargs)

    with (
        PackedLoader(corpus, Broken(), "train", rows=1, **SMALL) as loader,
        pytest.raises(RuntimeError, match="on fire"),
    ):
        for _ in range(1000):
            next(loader)
    damaged = corpus_folder / "shard_00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with PackedLoader(corpus, tokenizer, "train", rows=1, **SMALL) as loader:
        with pytest.raises(NanochatError, match="shard_00001.parquet is truncated or damaged.*delete it"):
            for _ in range(1000):
                next(loader)


def test_corpus_without_documents_is_an_error_not_a_loop(tmp_path, tokenizer):
    for shard in range(2):
        write_parquet(tmp_path / f"{shard}.parquet", [])
    with PackedLoader(open_corpus(str(tmp_path)), tokenizer, "train", rows=1, **SMALL) as loader:
        with pytest.raises(NanochatError, match="no documents"):
            next(loader)


def test_runs_ahead_but_no_further_than_prefetch(corpus):
    class Counting(ByteTokenizer):
        documents = 0

        def encode_batch(self, texts, *args, **kwargs):
            Counting.documents += len(texts)
            return super().encode_batch(texts, *args, **kwargs)

    with PackedLoader(corpus, Counting(), "train", rows=2, prefetch=2, **SMALL) as loader:
        next(loader)
        time.sleep(0.2)
        ahead = Counting.documents
        time.sleep(0.2)
        assert Counting.documents == ahead < 150
        assert next(loader).wait_seconds < 0.1


def test_close_is_prompt_and_final_wherever_the_threads_stand(corpus, tokenizer):
    release = threading.Event()

    class Slow(ByteTokenizer):
        def encode_batch(self, *args, **kwargs):
            release.wait(0.3)
            return super().encode_batch(*args, **kwargs)

    loader = PackedLoader(corpus, Slow(), "train", rows=2, **SMALL)
    begin = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - begin < 2
    assert next(loader, None) is None


def test_a_forgotten_loader_ends_its_threads(corpus, tokenizer):
    loader = PackedLoader(corpus, tokenizer, "train", rows=2, **SMALL)
    next(loader)
    del loader
    gc.collect()  # the fixture sees to the rest


@pytest.mark.gpu
def test_batches_arrive_whole_on_the_device(corpus, tokenizer):
    expected = reference_rows(corpus, tokenizer, 200)
    with PackedLoader(corpus, tokenizer, "train", rows=4, device="cuda", **SMALL) as loader:
        batches = [next(loader) for _ in range(50)]
        assert batches[0].inputs.is_cuda and batches[0].inputs.is_contiguous()
    found = torch.cat([torch.cat([b.inputs, b.targets[:, -1:]], 1) for b in batches]).cpu().numpy()
    np.testing.assert_array_equal(found, expected)
