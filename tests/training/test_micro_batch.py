"""Rows per micro-batch: what divides, what fits, what is refused."""

import pytest
import torch

from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.training import micro_batch as mb


def test_divisors():
    assert mb.divisors(1) == [1]
    assert mb.divisors(12) == [1, 2, 3, 4, 6, 12]
    assert mb.divisors(49) == [1, 7, 49]


def test_rows_per_rank():
    assert mb.rows_per_rank(4096, 512, 2) == 4
    with pytest.raises(UsageError, match="4,096 is not a multiple of 512 tokens × 3 ranks; use 3,072 or 4,608"):
        mb.rows_per_rank(4096, 512, 3)
    with pytest.raises(UsageError, match="use 512$"):
        mb.rows_per_rank(100, 512, 1)


def test_given_rows_must_divide():
    assert mb.check_rows(4, 12) == 4
    for rows in (0, 5, 24):
        with pytest.raises(UsageError, match=f"--rows {rows} does not divide the 12 rows"):
            mb.check_rows(rows, 12)


@pytest.mark.parametrize(("per_rank", "expected"), [(64, 8), (12, 6), (7, 7), (11, 1), (3, 3)])
def test_a_cpu_takes_a_few_thousand_tokens(per_rank, expected):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(4, vocab_size=1000, seq_len=512))
    rows, reason = mb.choose_rows(model, per_rank, Runtime(torch.device("cpu"), torch.float32))
    assert rows == expected and "4,096 tokens" in reason


def test_little_memory_means_fewer_rows(monkeypatch):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(4, vocab_size=1000, seq_len=512))
    row = mb.activation_bytes(model) * 512
    monkeypatch.setattr(mb, "_free_memory", lambda runtime: 2.5 * row / mb.MEMORY_SHARE)
    assert mb.choose_rows(model, 64, Runtime(torch.device("cpu"), torch.float32))[0] == 2
    monkeypatch.setattr(mb, "_free_memory", lambda runtime: 0.0)
    assert mb.choose_rows(model, 64, Runtime(torch.device("cpu"), torch.float32))[0] == 1


def test_going_down_until_it_fits():
    tried = []

    def fit(rows):
        tried.append(rows)
        return rows <= 5

    assert mb.largest_that_fits(mb.divisors(48), fit) == 3
    assert tried == [48, 24, 12, 6, 3]
    with pytest.raises(NanochatError, match="not even 1 row"):
        mb.largest_that_fits([1, 2, 4], lambda rows: False)


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu_is_caught():
    device = torch.device("cuda")
    model = GPT(GPTConfig.from_depth(2, vocab_size=5000, seq_len=512, head_dim=64), dtype=torch.bfloat16).to(device)
    model.init_weights(torch.Generator(device))
    runtime = Runtime(device, torch.bfloat16)
    assert mb.fits(model, 1, runtime) and not mb.fits(model, 1 << 20, runtime)
    assert all(p.grad is None for p in model.parameters())
