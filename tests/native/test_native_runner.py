"""The decode step in C++ against the model: every architecture, chunk, level and format; greedy text for 512 tokens."""

import threading

import pytest
import torch

from nanochat.errors import UsageError
from nanochat.inference.native_runner import NativeRunner
from nanochat.inference.paged_cache import PagedCache
from nanochat.inference.step import StepBatch
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat_kernels import native
from nanochat_kernels.packed_weights import FORMATS, INTEGER, pack, unpack
from tests.native.levels import LEVELS, each_level

pytestmark = pytest.mark.skipif(not LEVELS, reason=native.missing() or "")

CONFIGS = {
    "d4": GPTConfig.from_depth(4, 300, seq_len=512, head_dim=32),
    "grouped": GPTConfig.from_depth(3, 300, seq_len=512, head_dim=32, kv_heads=2),
    "odd": GPTConfig.from_depth(1, 101, seq_len=128, head_dim=34),
    "two layers": GPTConfig.from_depth(2, 65, seq_len=256, head_dim=24, aspect_ratio=36),
    "2025-10": GPTConfig.from_depth(2, 200, seq_len=128, head_dim=64, architecture="2025-10"),
}


def model_of(config, dtype=torch.float32):
    """Weights with which every part of the model matters: fresh ones silence half of it."""
    model, generator = GPT(config, dtype=dtype), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 * parameter.size(-1) ** -0.5))
        if config.is_current:
            model.resid_scale.add_(1.0)
            model.backout_scale.fill_(0.2)
            model.smear_scale.fill_(0.5)
    return model.eval()


class Session:
    """Rows of one text each over a cache of their own, with blocks in a scattered order."""

    def __init__(self, runner, ids, block_size=16, dtype=torch.float32):
        self.runner, self.ids = runner, ids
        rows, length = ids.shape
        width = -(-length // block_size)
        self.cache = PagedCache(runner.model.config, (rows * width,) * 2, block_size, dtype=dtype)
        for memory in (*self.cache.k, *self.cache.v):
            memory.fill_(float("nan"))  # what nobody wrote must not be read
        order = torch.randperm(rows * width, generator=torch.Generator().manual_seed(1))
        self.table = order.view(rows, width).to(torch.int32)

    def step(self, spans, wanted="all"):
        """spans: row → (begin, end). Logits of all its tokens, one row after the other."""
        rows = list(spans)
        tokens, previous, positions = [], [], []
        for row, (begin, end) in spans.items():
            tokens += self.ids[row, begin:end].tolist()
            previous += [int(self.ids[row, p - 1]) if p else -1 for p in range(begin, end)]
            positions += range(begin, end)
        counts = torch.tensor([0, *(end - begin for begin, end in spans.values())])
        batch = StepBatch(
            *(torch.tensor(x, dtype=torch.int64) for x in (tokens, previous, positions)),
            starts=counts.cumsum(0).to(torch.int32),
            lengths=torch.tensor([end for _, end in spans.values()], dtype=torch.int32),
            tables=(self.table[rows], self.table[rows]),
            outputs=torch.arange(len(tokens)),
        )
        return self.runner(batch, self.cache)


def text(config, rows, length):
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


@each_level
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_equals_the_model(level, name, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    model = model_of(CONFIGS[name])
    ids = text(model.config, 2, 128)
    with torch.no_grad():
        expected = model(ids).flatten(0, 1)
        exact = GPT(model.config, dtype=torch.float64)
        exact.load_state_dict(model.state_dict())
        truth = exact.double()(ids).flatten(0, 1)
    got = Session(NativeRunner(model), ids).step({0: (0, 128), 1: (0, 128)})
    assert (got - truth).abs().max() <= max(3 * (expected - truth).abs().max(), 1e-5)


@each_level
@pytest.mark.parametrize("format", FORMATS)
def test_packed_formats_equal_a_model_with_the_unpacked_weights(level, format, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    model = model_of(CONFIGS["grouped"])
    ids = text(model.config, 1, 100)
    got = Session(NativeRunner(model, format), ids).step({0: (0, 100)})
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.o, block.mlp.fc, block.mlp.proj):
                linear.weight.copy_(unpack(pack(linear.weight, format)))
        model.lm_head.weight.copy_(unpack(pack(model.lm_head.weight, format)))
        expected = model(ids)[0]
    assert (got - expected).abs().max() <= (0.04 if format in INTEGER else 1e-4)  # their rounded inputs


@each_level
@pytest.mark.parametrize("cache_dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("format", FORMATS)
def test_neither_the_batch_nor_the_chunks_change_a_bit(level, format, cache_dtype, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    model = model_of(CONFIGS["grouped"])
    ids = text(model.config, 3, 90)
    runner = NativeRunner(model, format)
    alone = [Session(runner, ids, 7, cache_dtype).step({row: (0, 90)}) for row in range(3)]
    session = Session(runner, ids, 16, cache_dtype)
    pieces = {row: [] for row in range(3)}
    ends = {0: (1, 2, 33, 34, 35, 90), 1: (40, 41, 42, 43, 44, 90), 2: (15, 16, 17, 48, 49, 90)}
    for j in range(6):
        spans = {row: (ends[row][j - 1] if j else 0, ends[row][j]) for row in (0, 1, 2)}
        out = session.step(spans).split([end - begin for begin, end in spans.values()])
        for row, logits in zip((0, 1, 2), out, strict=True):
            pieces[row].append(logits)
    for row in range(3):
        assert torch.equal(torch.cat(pieces[row]), alone[row])


@each_level
def test_lengths_up_to_the_context_across_windows_and_blocks(level, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    config = GPTConfig.from_depth(2, 80, seq_len=2048, head_dim=16, aspect_ratio=16, window_pattern="S")
    assert config.windows == (512, 2048)
    model = model_of(config)
    ids = text(config, 1, 2048)
    with torch.no_grad():
        expected = model(ids)[0]
    session = Session(NativeRunner(model), ids)
    session.step({0: (0, 1020)})
    for begin, end in ((1020, 1023), (1023, 1024), (1024, 1025), (1025, 1540), (1540, 2047), (2047, 2048)):
        assert (session.step({0: (begin, end)}) - expected[begin:end]).abs().max() < 2e-4


def test_blocks_behind_the_window_are_not_read():
    config = GPTConfig.from_depth(2, 80, seq_len=1024, head_dim=16, aspect_ratio=16, window_pattern="S")
    model = model_of(config)
    ids = text(config, 1, 700)
    session = Session(NativeRunner(model), ids)
    whole = session.step({0: (0, 700)})
    windowed = session.table.clone()
    windowed[0, : (699 - 256) // 16] = -1
    batch = StepBatch(
        ids[0, 699:], ids[0, 698:699], torch.tensor([699]), torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([700], dtype=torch.int32), (session.table, windowed), torch.tensor([0]),
    )  # fmt: skip
    assert session.cache.groups == (1, 0)
    assert torch.equal(session.runner(batch, session.cache)[0], whole[-1])
    windowed[0, (699 - 256) // 16] = -1
    with pytest.raises(IndexError, match="is -1"):
        session.runner(batch, session.cache)


def test_greedy_text_equals_the_reference_engine_for_512_tokens():
    from nanochat.inference.kv_cache import KVCache

    config = GPTConfig.from_depth(4, 300, seq_len=1024, head_dim=32)
    model = model_of(config)
    prompt = text(config, 1, 7)
    runner = NativeRunner(model)
    ids = torch.zeros(1, 600, dtype=torch.int64)
    ids[:, :7] = prompt
    session = Session(runner, ids)
    cache = KVCache(config, 1, 600)
    with torch.no_grad():
        hidden = model.hidden(prompt, cache)
        cache.advance(prompt)
        expected = [int(model.logits(hidden[:, -1]).argmax())]
        for _ in range(511):
            token = torch.tensor([[expected[-1]]])
            hidden = model.hidden(token, cache)
            cache.advance(token)
            expected.append(int(model.logits(hidden[:, -1]).argmax()))
    logits, got = session.step({0: (0, 7)})[-1], []
    for at in range(7, 519):
        got.append(int(logits.argmax()))
        ids[0, at] = got[-1]
        logits = session.step({0: (at, at + 1)})[-1]
    assert got == expected
    assert len(set(got)) > 5  # a text, not one token for ever


def test_several_threads_share_a_runner():
    model = model_of(CONFIGS["d4"])
    ids = text(model.config, 1, 40)
    runner = NativeRunner(model, "int8")
    expected, failures = Session(runner, ids).step({0: (0, 40)}), []

    def work():
        session = Session(runner, ids)
        got = [session.step({0: (0, 20)}), *(session.step({0: (p, p + 1)}) for p in range(20, 40))]
        if not torch.equal(torch.cat(got), expected):
            failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_any_number_of_threads_gives_the_same():
    model = model_of(CONFIGS["d4"])
    ids = text(model.config, 1, 40)
    runner, before = NativeRunner(model, "int4"), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(Session(runner, ids).step({0: (0, 40)}))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_padding_rows_change_nothing():
    model = model_of(CONFIGS["d4"])
    ids = text(model.config, 1, 30)
    session = Session(NativeRunner(model), ids)
    expected = session.step({0: (0, 30)})
    batch = StepBatch(
        torch.cat([ids[0], torch.tensor([0])]), torch.cat([torch.tensor([-1]), ids[0, :-1], torch.tensor([-1])]),
        torch.tensor([*range(30), -1]), torch.tensor([0, 30, 31], dtype=torch.int32),
        torch.tensor([30, 0], dtype=torch.int32), (session.table.repeat(2, 1),) * 2, torch.arange(30),
    )  # fmt: skip
    assert torch.equal(session.runner(batch, session.cache), expected)


def test_refresh_takes_over_changed_weights():
    model = model_of(CONFIGS["d4"])
    ids = text(model.config, 1, 10)
    runner = NativeRunner(model, "bf16")
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight.mul_(3)
    stale = Session(runner, ids).step({0: (0, 10)})
    runner.refresh()
    fresh = Session(runner, ids).step({0: (0, 10)})
    assert not torch.equal(stale, fresh)
    assert torch.equal(fresh, Session(NativeRunner(model, "bf16"), ids).step({0: (0, 10)}))


def test_wrong_batches_are_refused_before_anything_is_written():
    model = model_of(CONFIGS["d4"])
    ids = text(model.config, 1, 10)
    runner = NativeRunner(model)
    for broken in ("token", "position", "output"):
        session = Session(runner, ids)
        batch = StepBatch(
            torch.tensor([model.config.padded_vocab_size if broken == "token" else 1]), torch.tensor([-1]),
            torch.tensor([400 if broken == "position" else 0]), torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([1], dtype=torch.int32), (session.table,) * 2, torch.tensor([2 if broken == "output" else 0]),
        )  # fmt: skip
        with pytest.raises(IndexError, match=broken):
            runner(batch, session.cache)
        assert all(memory.isnan().all() for memory in session.cache.k)
    with pytest.raises(UsageError, match="int9"):
        NativeRunner(model, "int9")
