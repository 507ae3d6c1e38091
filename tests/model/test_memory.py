"""Memory estimates against the allocator's own events, and activation checkpointing against plain training."""

from dataclasses import replace

import pytest
import torch

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.memory import LEAN_PLAN, Ledger, estimate, passes_bytes
from nanochat.runtime import Runtime
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.schedules import StepRates
from nanochat_kernels import KernelPlan

SMALL = GPTConfig.from_depth(2, vocab_size=512, seq_len=256, head_dim=32)
GROUPED = replace(SMALL, kv_heads=1, window_pattern="L", layers=3)
FIRST = replace(SMALL, architecture="2025-10")


def lean(dtype: torch.dtype) -> KernelPlan:
    return KernelPlan.resolve(LEAN_PLAN, device=torch.device("cpu"), dtype=dtype, mode="train-eager")


def train(config: GPTConfig, rows: int, dtype: torch.dtype, plan: KernelPlan, checkpoint_activations: bool) -> None:
    """Two micro-batches and an update, twice, with everything made in here."""
    model = GPT(config, plan, dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    model.checkpoint_activations = checkpoint_activations
    parameters = dict(model.named_parameters())
    groups = parameter_groups(parameters, config.width, 1.0, 0.1)
    optimizer = MuonAdamW(parameters, groups, plan, Runtime(torch.device("cpu"), dtype))
    idx = torch.randint(0, config.vocab_size, (rows, config.seq_len + 1))
    for _ in range(2):
        for _ in range(2):
            (model(idx[:, :-1], idx[:, 1:]) / 2).backward()
        optimizer.step(StepRates(lr=1.0, momentum=0.9, decay=1.0))


def allocator_peak(run) -> int:
    """Bytes at the highest point of torch's CPU allocator, read off the profiler's record of every event."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("config", "rows", "dtype"),
    [
        (SMALL, 1, torch.float32),
        (SMALL, 8, torch.float32),
        (SMALL, 4, torch.bfloat16),
        (GROUPED, 4, torch.float32),
        (FIRST, 4, torch.float32),
    ],
    ids=["one row", "many rows", "bfloat16", "grouped", "2025-10"],
)
def test_estimate_is_within_a_tenth_of_the_measured_peak(
    config: GPTConfig, rows: int, dtype: torch.dtype, checkpointed: bool
) -> None:
    plan = lean(dtype)
    measured = allocator_peak(lambda: train(config, rows, dtype, plan, checkpointed))
    guess = estimate(config, rows, dtype=dtype, plan=plan, checkpoint_activations=checkpointed)
    assert abs(guess.peak / measured - 1) < 0.1, f"{measured / 1e9:.4f} GB measured, {guess} estimated"


@pytest.mark.parametrize(
    ("depth", "rows", "ranks", "checkpointed", "gigabytes"),
    [(12, 4, 1, False, 8), (20, 8, 1, True, 24), (24, 16, 8, False, 80)],
)
def test_the_sizes_that_must_fit(depth: int, rows: int, ranks: int, checkpointed: bool, gigabytes: int) -> None:
    """A card of 8 or 24 GB trains alone; the speedrun's micro-batch of 32,768 tokens takes an 80 GB card of eight."""
    config = GPTConfig.from_depth(depth, vocab_size=32768)
    assert estimate(config, rows, ranks=ranks, checkpoint_activations=checkpointed).peak < gigabytes * 1e9


@pytest.mark.parametrize("config", [SMALL, FIRST], ids=["2026", "2025-10"])
def test_checkpointing_changes_memory_and_nothing_else(config: GPTConfig) -> None:
    gradients = []
    idx = torch.randint(0, config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))
    for checkpointed in (False, True):
        model = GPT(config, lean(torch.float32))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        model.checkpoint_activations = checkpointed
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        with torch.no_grad():
            assert torch.equal(model(idx[:, :-1], idx[:, 1:]), loss)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    plain, less = (
        passes_bytes(config, 8, config.seq_len, torch.float32, checkpoint_activations=c) for c in (False, True)
    )
    assert less < 0.75 * plain  # two layers only; of many, much less


def test_the_ledger_counts_storages_not_views() -> None:
    before = torch.zeros(1000)
    with Ledger() as ledger:
        view = before.view(10, 100).t()
        assert ledger.now == 0
        made = torch.zeros(500) + 1  # two storages of 2,000 bytes, of which one dies at once
        part = made[3:]
        assert (ledger.now, ledger.peak) == (2000, 4000)
        del made
        assert ledger.now == 2000  # the view keeps it
        del part
        assert ledger.now == 0
    assert view.shape == (100, 10)
