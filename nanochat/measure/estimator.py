"""Predicts a training step: time, MFU, memory, communication, and how long a model takes, before it is run.

The step is the sum of its inventory. Each entry's time comes from the best source there is, and says which:

    measured   a row of `bench kernels` at exactly this shape
    scaled     the share of the roofline that the same op reached at its nearest measured shape, applied to this one
    assumed    a share taken from published runs, where no row exists (SHARES)

    step = accumulation · (forward and backward) + max(update / ranks, communication) + remainder

The update's shards travel while others are computed (training/optimizer.py), so the longer of the two counts; nothing
overlaps with the backward pass. Communication is a reduce-scatter of all gradients and an all-gather of all parameters,
each moving (W − 1)/W of their bytes through every rank's link. What the inventory leaves out (residual sums, zeroing,
Python) is the `remainder`, one share of the sum, as small as it could be made.

The trade-off: a sum of parts knows no cache reuse between neighbors and no overlap on a GPU. That is why every
prediction is printed beside a measurement where there is one, with its error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat.measure.inventory import FORWARD_BACKWARD, OPTIMIZER, Entry, step_entries, training_cost
from nanochat.measure.machine import Ceilings
from nanochat.model import costs, memory
from nanochat.model.config import GPTConfig
from nanochat.training.schedules import REFERENCE_DEPTH, Horizon, plan_horizon
from nanochat_kernels.registry import Cost

# Shares of the roofline where nothing was measured: GEMMs and attention from published H100 runs (FlashAttention-3:
# 560 TFLOP/s forward, 316 backward), passes over memory from copy kernels.
SHARES = {
    "linear": 0.85,
    "relu2_mlp": 0.80,
    "linear_softcap_cross_entropy": 0.60,
    "attention": 0.45,
    "muon_update": 0.60,
}
MEMORY_SHARE = 0.80  # of ops that are bound by memory
FP8_GAIN = 1.35  # of a linear layer over bf16, casts and transposes included: between tensorwise today (1.25) and 1.5
REMAINDER = 0.02
FP8_OPS = ("linear", "relu2_mlp")
GPT2_DEPTH, GPT2_RATIO = 24, 8.0  # the smallest published run that reached GPT-2's CORE

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Machine:
    """One kind of rank: its ceilings, the peak that MFU divides by, and links in bytes/s per rank and direction."""

    name: str
    ceilings: Ceilings
    peak_bf16: float | None = None
    memory_bytes: float = math.inf
    link: float = math.inf
    network: float = math.inf
    per_node: int = 8


# Ceilings as published or seen on similar machines, until the ceilings of one are measured: 790 TFLOP/s of random bf16
# products, 92% of the datasheet's bandwidth; NVLink 450 GB/s and one 400 Gbit/s port per GPU, at 80%.
H100 = Machine(
    "H100 SXM (assumed ceilings)",
    Ceilings("nvidia-h100", 0, 0.92 * 3.35e12, {"bfloat16": 7.4e14, "float8": 1.4e15, "float32": 4.0e14}, 4e-6, 1.3e-6),
    peak_bf16=989e12,
    memory_bytes=80e9,
    link=0.8 * 450e9,
    network=0.8 * 50e9,
)


@dataclass(frozen=True)
class Part:
    """One entry of the inventory with its predicted seconds per step and where they come from."""

    entry: Entry
    cost: Cost
    seconds: float
    source: str


@dataclass(frozen=True)
class Prediction:
    """A step of `ranks` ranks; seconds, bytes."""

    machine: Machine
    config: GPTConfig
    rows: int
    seq_len: int
    ranks: int
    accumulation: int
    parts: tuple[Part, ...]
    forward_backward: float
    optimizer: float
    communication: float
    communication_bytes: float
    memory: memory.MemoryEstimate | None

    @property
    def step(self) -> float:
        work = self.accumulation * self.forward_backward + max(self.optimizer, self.communication)
        return work * (1 + REMAINDER)

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.seq_len * self.ranks * self.accumulation

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step

    @property
    def mfu(self) -> float | None:
        if not self.machine.peak_bf16:
            return None
        flops = costs.training_flops_per_token(self.config, self.seq_len) * self.tokens_per_second
        return flops / (self.machine.peak_bf16 * self.ranks)

    def measured_share(self) -> float:
        """The share of the predicted time that rests on rows at exactly these shapes."""
        known = sum(part.seconds for part in self.parts if part.source == "measured")
        return known / sum(part.seconds for part in self.parts)


class Rows:
    """Finds what `bench kernels` measured. rows: later ones supersede earlier ones. backends: op → the one that counts;
    ops not named there take their fastest."""

    def __init__(self, rows: Iterable[Row], dtype: str, mode: str, backends: Mapping[str, str]) -> None:
        self.exact: dict[tuple[str, str], dict[str, Row]] = {}
        self.dtype, self.backends = dtype, backends
        for row in rows:
            if row.get("dtype") == dtype and row.get("mode") == mode and "op" in row and "backend" in row:
                self.exact.setdefault((row["op"], row["case"]), {})[row["backend"]] = row

    def _chosen(self, found: Mapping[str, Row], op: str) -> Row | None:
        wanted = self.backends.get(op)
        return found.get(wanted) if wanted else min(found.values(), key=lambda row: row["median"])

    def at(self, op: str, case: str) -> Row | None:
        """The row of exactly this case."""
        return self._chosen(self.exact.get((op, case), {}), op) if (op, case) in self.exact else None

    def share(self, op: str, cost: Cost) -> float | None:
        """The roofline share at the measured case of this op whose cost is nearest."""
        rows = [self._chosen(found, op) for (name, _), found in self.exact.items() if name == op]
        known = [row for row in rows if row and row.get("roofline_share") and row.get("bytes")]
        if not known:
            return None
        size = math.log(cost.bytes + cost.flops)
        nearest = min(known, key=lambda row: abs(math.log(row["bytes"] + row["flops"]) - size))
        return float(nearest["roofline_share"])


def entry_cost(entry: Entry, dtype: torch.dtype) -> Cost:
    """What one call moves and computes; its inputs are made without memory."""
    with memory.shapes_only():
        args, kwargs = entry.case.make(torch.device("cpu"), dtype, torch.Generator())
        return training_cost(entry.op, args, kwargs)


def predict_part(entry: Entry, machine: Machine, rows: Rows, dtype: torch.dtype, fp8: bool) -> Part:
    cost, name = entry_cost(entry, dtype), entry.op.name
    row = rows.at(name, entry.case.name)
    if row is not None and not fp8:
        return Part(entry, cost, entry.count * float(row["median"]), "measured")
    least = machine.ceilings.least_seconds(cost.bytes, cost.flops, dtype)
    share = rows.share(name, cost)
    source = "scaled" if share else "assumed"
    seconds = entry.count * least / (share or SHARES.get(name, MEMORY_SHARE))
    if fp8 and name in FP8_OPS:
        seconds, source = seconds / FP8_GAIN, "assumed"
    return Part(entry, cost, seconds, source)


def communication_bytes(config: GPTConfig, dtype: torch.dtype, ranks: int) -> float:
    """Bytes that every rank sends per step: gradients reduced, parameters gathered."""
    counts = costs.parameter_counts(config)
    tables = counts["wte"] + counts["value_embeds"]
    held = 4 * (counts["total"] - tables) + (4 if dtype == torch.float16 else dtype.itemsize) * tables
    return 2 * held * (ranks - 1) / ranks


def predict(
    config: GPTConfig,
    machine: Machine,
    rows: Iterable[Row] = (),
    *,
    batch_rows: int,
    seq_len: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ranks: int = 1,
    accumulation: int = 1,
    fp8: bool = False,
    mode: str = "train-eager",
    backends: Mapping[str, str] | None = None,
    with_memory: bool = True,
) -> Prediction:
    """One step of `ranks` ranks with micro-batches of batch_rows × seq_len tokens."""
    seq_len = config.seq_len if seq_len is None else seq_len
    found = Rows(rows, str(dtype).removeprefix("torch."), mode, backends or {})
    entries = step_entries(config, batch_rows, seq_len)
    parts = tuple(predict_part(entry, machine, found, dtype, fp8) for entry in entries)
    sums = {phase: sum(p.seconds for p in parts if p.entry.phase == phase) for phase in (FORWARD_BACKWARD, OPTIMIZER)}
    sent = communication_bytes(config, dtype, ranks)
    link = machine.link if ranks <= machine.per_node else machine.network
    estimate = memory.estimate(config, batch_rows, seq_len, dtype, ranks) if with_memory else None
    return Prediction(
        machine, config, batch_rows, seq_len, ranks, accumulation, parts,
        sums[FORWARD_BACKWARD], sums[OPTIMIZER] / ranks, sent / link, sent, estimate,
    )  # fmt: skip


def horizon(config: GPTConfig, ratio: float, vocab_size: int) -> Horizon:
    """How far a model of this configuration is trained at `ratio` tokens per parameter."""
    reference = GPTConfig.from_depth(REFERENCE_DEPTH, vocab_size, config.seq_len, config.head_dim)
    return plan_horizon(costs.scaling_parameters(config), costs.scaling_parameters(reference), ratio)


def predict_run(
    depth: int,
    machine: Machine,
    rows: Sequence[Row] = (),
    *,
    ratio: float = GPT2_RATIO,
    ranks: int = 8,
    batch_rows: int = 16,
    vocab_size: int = 32768,
    **options: Any,
) -> tuple[Prediction, Horizon, float]:
    """A whole pretraining run: a step of its optimal batch, its horizon, and seconds from first to last step."""
    config = GPTConfig.from_depth(depth, vocab_size)
    plan = horizon(config, ratio, vocab_size)
    per_pass = batch_rows * config.seq_len * ranks
    if per_pass > plan.batch_tokens:  # many ranks: smaller micro-batches
        batch_rows = max(1, plan.batch_tokens // (config.seq_len * ranks))
        per_pass = batch_rows * config.seq_len * ranks
    step = predict(config, machine, rows, batch_rows=batch_rows, ranks=ranks, **options)
    step = replace(step, accumulation=max(1, round(plan.batch_tokens / per_pass)))
    return step, plan, plan.tokens / step.tokens_per_second
