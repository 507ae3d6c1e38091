"""The CUDA decode step, its kernels emulated on a CPU: equal to the readable runner's, chunk by chunk and in drafts."""

import pytest
import torch

from nanochat.errors import UsageError
from nanochat.inference.cuda_runner import CudaRunner, Weight
from nanochat.inference.paged_cache import PagedCache
from nanochat.inference.step import StepBatch, TorchRunner
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from tests.native.cuda_emulator import lent

BLOCK = 16


@pytest.fixture
def emulator():
    with lent():
        yield


def small_model(dtype=torch.float32, architecture="2026", kv_heads=2, device="cpu"):
    """Four layers, a window of 128 in a context of 192, every parameter nonzero."""
    shape = {"layers": 4, "width": 64, "heads": 4, "kv_heads": kv_heads, "head_dim": 16}
    config = GPTConfig(vocab_size=265, seq_len=192, architecture=architecture, **shape)
    model = GPT(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith(("wte.weight", "lm_head.weight")) else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval().to(device)


class Sequences:
    """Rows of tokens that grow, each with blocks of its own for both groups of layers."""

    def __init__(self, config, rows, dtype, device="cpu"):
        self.width = config.seq_len // BLOCK
        self.cache = PagedCache(config, (rows * self.width,) * 2, BLOCK, device=device, dtype=dtype)
        ids = torch.arange(rows * self.width, dtype=torch.int32)
        self.tables = tuple(x.view(rows, self.width).to(device) for x in (ids, ids.flip(0)))
        self.tokens, self.device = [[] for _ in range(rows)], device

    def batch(self, new):
        """new[s] joins sequence s; the logits of all new tokens are wanted. None is padding."""
        tokens, previous, positions, starts, lengths = [], [], [], [0], []
        for text, more in zip(self.tokens, new, strict=True):
            for token in more if more is not None else [0]:
                positions.append(-1 if more is None else len(text))
                previous.append(text[-1] if text and more is not None else -1)
                tokens.append(token)
                if more is not None:
                    text.append(token)
            starts.append(len(tokens))
            lengths.append(0 if more is None else len(text))
        long, short = (lambda x: torch.tensor(x, device=self.device), lambda x: torch.tensor(x, dtype=torch.int32))
        counts = [short(x).to(self.device) for x in (starts, lengths)]
        outputs = long([i for i, p in enumerate(positions) if p >= 0])
        return StepBatch(long(tokens), long(previous), long(positions), *counts, self.tables, outputs)


def steps(first=33, longest=100, rows=3):
    """A prompt in chunks, decoding, a draft, padding; past the window (unless shortened), over block boundaries."""
    generator = torch.Generator().manual_seed(0)

    def some(count):
        return torch.randint(0, 265, (count,), generator=generator).tolist()

    yield [some(7), some(first), some(1)]
    yield [some(1), some(longest), some(16)]
    for _ in range(3):
        yield [some(1) for _ in range(rows)]
    yield [some(4), some(2), some(1)]
    yield [some(1), None, some(1)]
    yield [some(1) for _ in range(rows)]


@pytest.mark.parametrize("architecture", ["2026", "2025-10"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_equal_to_the_readable_runner(emulator, architecture, kv_heads):
    """In float32 as near to float64 as that one."""
    exact, model = (small_model(dtype, architecture, kv_heads) for dtype in (torch.float64, torch.float32))
    runners = [TorchRunner(exact), TorchRunner(model), CudaRunner(model, "fp32")]
    sequences = [Sequences(model.config, 3, dtype) for dtype in (torch.float64, torch.float32, torch.float32)]
    for new in steps():
        truth, *logits = (runner(s.batch(new), s.cache) for runner, s in zip(runners, sequences, strict=True))
        theirs, ours = ((x - truth).abs().max() for x in logits)
        assert ours <= 3 * theirs + 1e-5


@pytest.mark.parametrize(
    ("weights", "fp8_cache", "allowed"), [("bf16", False, 1.5), ("bf16", True, 8), ("int8", False, 3), ("fp8", True, 9)]
)
def test_in_16_and_8_bits_the_error_is_of_the_formats_size(emulator, weights, fp8_cache, allowed):
    """Root mean square against float32, in units of the readable runner's error in bf16."""
    exact, model = small_model(), small_model(torch.bfloat16)
    runners = [TorchRunner(exact), TorchRunner(model), CudaRunner(model, weights, fp8_cache)]
    dtypes = [torch.float32, torch.bfloat16, runners[2].cache_dtype]
    sequences = [Sequences(model.config, 3, dtype) for dtype in dtypes]
    errors = torch.zeros(2)
    for new in steps(first=10, longest=4):
        truth, *logits = (runner(s.batch(new), s.cache) for runner, s in zip(runners, sequences, strict=True))
        errors += torch.stack([(x - truth).square().mean() for x in logits])
    plain, ours = errors.sqrt().tolist()
    assert ours <= allowed * plain, (ours / plain, plain)


def test_weights_that_changed_are_cast_anew(emulator):
    model = small_model()
    runner = CudaRunner(model, "fp32")
    before = Sequences(model.config, 1, torch.float32)
    first = runner(before.batch([[1, 2]]), before.cache)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
        model.blocks[0].attn.q.weight.mul_(2)
    runner.refresh()
    after = Sequences(model.config, 1, torch.float32)
    assert not torch.allclose(runner(after.batch([[1, 2]]), after.cache), first)


def test_bytes_of_the_weights():
    weight = torch.randn(48, 32)
    assert Weight.of(weight, torch.bfloat16).nbytes == 48 * 32 * 2
    for dtype in (torch.int8, torch.float8_e4m3fn):
        assert Weight.of(weight, dtype).nbytes == 48 * 32 + 48 * 4


def test_refused_with_the_reason(emulator):
    with pytest.raises(UsageError, match="do not fit a model in float32"):
        CudaRunner(small_model(), "bf16")
    with pytest.raises(UsageError, match="use one of fp32, bf16, fp8, int8"):
        CudaRunner(small_model(), "int3")


def test_refused_without_a_gpu():
    with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
        CudaRunner(small_model(), "fp32")


@pytest.mark.gpu
def test_a_captured_step_replays_with_new_tokens():
    """One graph for a batch of three: lengths, positions and tables change under it; FP8 weights and cache too."""
    for dtype, weights, fp8_cache in ((torch.float32, "fp32", False), (torch.bfloat16, "fp8", True)):
        model = small_model(dtype, device="cuda")
        runner = CudaRunner(model, weights, fp8_cache)
        ours, theirs = (Sequences(model.config, 3, runner.cache_dtype, "cuda") for _ in range(2))
        for s in (ours, theirs):
            runner(s.batch([[1, 2, 3], list(range(140)), [7]]), s.cache)
        static = ours.batch([[5], [6], [8]])
        runner(static, ours.cache)  # warm-up writes what the replay writes again
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = runner(static, ours.cache)
        graph.replay()
        torch.testing.assert_close(logits, runner(theirs.batch([[5], [6], [8]]), theirs.cache))
        for new in ([[9], [10], [11]], [[12], [13], [14]]):
            batch = ours.batch(new)
            for name in ("tokens", "previous", "positions", "starts", "lengths"):
                getattr(static, name).copy_(getattr(batch, name))
            graph.replay()
            torch.testing.assert_close(logits, runner(theirs.batch(new), theirs.cache))
