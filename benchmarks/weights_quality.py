"""What a weight format costs: bits per byte of validation text through the C++ runner, beside the model's own.

The runner that serves is the one that is scored, its cache in the dtype that it serves with: a row of text goes through
in one step with the logits of every position. Part of `nanochat bench infer --quality`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from nanochat import runtime
from nanochat.data.corpus import open_corpus
from nanochat.data.loader import PackedLoader
from nanochat.evaluation import bits_per_byte
from nanochat.inference.loading import load
from nanochat.inference.native_runner import NativeRunner
from nanochat.inference.paged_cache import BLOCK_SIZE, PagedCache
from nanochat.inference.step import StepBatch
from nanochat.model.gpt import GPT

ROWS = 4


class Scored(nn.Module):
    """A runner with the interface that bits_per_byte asks of a model: losses of given targets."""

    def __init__(self, runner: NativeRunner, config: Any) -> None:
        super().__init__()
        self.runner, self.vocab_size, width = runner, config.vocab_size, -(-config.seq_len // BLOCK_SIZE)
        self.cache = PagedCache(config, (width, width), dtype=runner.cache_dtype)
        self.table = torch.arange(width, dtype=torch.int32)[None]

    def forward(self, inputs: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        """(B·T,) float32 losses, 0 where the target is −1."""
        return torch.cat([self._row(ids, wanted) for ids, wanted in zip(inputs, targets, strict=True)])

    def _row(self, ids: Tensor, targets: Tensor) -> Tensor:
        count = len(ids)
        batch = StepBatch(
            tokens=ids.contiguous(), previous=torch.cat([ids.new_tensor([-1]), ids[:-1]]),
            positions=torch.arange(count), starts=torch.tensor([0, count], dtype=torch.int32),
            lengths=torch.tensor([count], dtype=torch.int32), tables=(self.table, self.table),
            outputs=torch.arange(count),
        )  # fmt: skip
        return F.cross_entropy(self.runner(batch, self.cache), targets, ignore_index=-1, reduction="none")


def measure(formats: list[str], text: str, tag: str | None, tokens: int) -> dict[str, Any]:
    """Bits per byte of the model and of each format, and the cost in percent; printed on the way."""
    machine = runtime.start("cpu", "float32", 0)
    loaded = load(machine, "base", tag, mode="prefill")
    config, token_bytes = loaded.model.config, torch.from_numpy(loaded.tokenizer.token_bytes())
    rows = max(1, tokens // config.seq_len)

    def score(model: GPT | Scored) -> float:
        with PackedLoader(open_corpus(text), loaded.tokenizer, "val", rows=ROWS, seq_len=config.seq_len) as batches:
            return bits_per_byte.evaluate(model, batches, rows, token_bytes, machine)

    plain = score(loaded.model)
    harness.say(f"{loaded.name}: {plain:.5f} bits per byte over {rows * config.seq_len:,} tokens")
    found: dict[str, Any] = {
        "work": "quality",
        "model": loaded.name,
        "tokens": rows * config.seq_len,
        "model_bpb": plain,
    }
    for name in formats:
        runner = NativeRunner(loaded.model, name)
        bpb = score(Scored(runner, config))
        cost = 100 * (bpb / plain - 1)
        harness.say(f"{name}: {bpb:.5f} bits per byte, {cost:+.3f} %, {runner.nbytes / 1e6:.1f} MB of weights")
        found[name] = {"bpb": bpb, "cost_percent": cost, "weight_bytes": runner.nbytes}
    runtime.stop(machine)
    return found
