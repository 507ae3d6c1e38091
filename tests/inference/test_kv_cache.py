"""The cache against the model without one: chunks, ragged rows, growth, selection."""

import pytest
import torch

from nanochat.errors import UsageError
from nanochat.inference.kv_cache import KVCache

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("architecture", ["2026", "2025-10"])
@torch.inference_mode()
def test_chunks_give_the_hidden_states_of_the_whole(make_model, architecture):
    model = make_model(architecture)
    ids = torch.randint(0, 265, (2, 300), generator=torch.Generator().manual_seed(1))
    cache, at, pieces = KVCache(model.config, 2, 10), 0, []
    for chunk in (1, 130, 1, 60, 108):  # single tokens and chunks that cross the window of 128
        cache.reserve(at + chunk)
        part = ids[:, at : at + chunk]
        pieces.append(model.hidden(part, cache))
        cache.advance(part)
        at += chunk
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden(ids), rtol=0, atol=2e-5)
    assert cache.lengths.tolist() == [300, 300] and cache.slots >= 300


@torch.inference_mode()
def test_right_padded_rows_equal_each_row_alone(make_model):
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 265, (n,), generator=generator) for n in (5, 140, 1)]
    more = torch.randint(0, 265, (3, 7), generator=generator)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cache = KVCache(model.config, 3, 160)
    model.hidden(padded, cache)
    cache.advance(padded, torch.tensor([5, 140, 1]))
    hidden = model.hidden(more, cache)
    for i, row in enumerate(rows):
        alone = model.hidden(torch.cat([row, more[i]])[None])[0, -7:]
        torch.testing.assert_close(hidden[i], alone, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_rows_of_nothing_but_padding_stay_empty_and_finite(make_model):
    model = make_model()
    cache = KVCache(model.config, 2, 8)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    assert model.hidden(ids, cache).isfinite().all()
    cache.advance(ids, torch.tensor([0, 3]))
    assert cache.lengths.tolist() == [0, 3] and cache.previous.tolist() == [-1, 0]
    again = model.hidden(ids[:, :1] + 9, cache)
    torch.testing.assert_close(again[0], model.hidden(torch.tensor([[9]]))[0], rtol=0, atol=2e-5)


@torch.inference_mode()
def test_selection_copies_repeats_and_drops(make_model):
    model = make_model()
    ids = torch.arange(40).view(2, 20)
    cache = KVCache(model.config, 2, 24)
    model.hidden(ids, cache)
    cache.advance(ids)
    chosen = cache.select([1, 0, 1])
    assert cache.expand(2).previous.tolist() == [19, 19, 39, 39]
    chosen.k[:, 0] = 0.0  # a copy: neither its source nor its twin may notice
    assert chosen.k[:, 2].ne(0).any() and cache.k[:, 1, :20].ne(0).all()
    following = torch.tensor([[7]])
    expected = model.hidden(torch.cat([ids[1:], following], 1))[:, -1:]
    torch.testing.assert_close(model.hidden(following, chosen.select([2])), expected, rtol=0, atol=2e-5)


def test_growth_doubles_up_to_the_limit(make_model):
    config = make_model().config
    cache = KVCache(config, 1, 10, limit=500)
    assert cache.slots == 64
    cache.k += 1
    cache.reserve(65)
    assert cache.slots == 128 and cache.k[:, :, :64].eq(1).all() and cache.k[:, :, 64:].eq(0).all()
    cache.reserve(500)
    assert cache.slots == 500
    with pytest.raises(UsageError, match="501 tokens.*500"):
        cache.reserve(501)
    with pytest.raises(UsageError, match="600 tokens.*500"):
        KVCache(config, 1, 600, limit=500)
