"""What one training step consists of: every operation, at the shapes of a configuration, and how often it runs.

One list serves three readers. `bench kernels --step d4` times every entry on every backend at exactly these shapes; the
estimator adds the entries up to a predicted step; `profile` compares what a trace shows with what was expected.
Operations that have only one implementation (matrix products, look-ups, the smear) are declared here as ops with a
torch reference alone, so that they are timed and costed by the same machinery.

    entry            per step (L layers, V of them with value embeddings)
    linear           4·L projections (q, k, v, o), forward and backward
    relu2_mlp        L
    attention        L, by window
    rope_qk_norm     L, V of them with a value embedding
    rms_norm         2·L + 2: embedding, before attention and MLP, before the head
    head             1: linear_softcap_cross_entropy
    embedding        1 + V look-ups, whose gradients are dense tables
    smear, gather    1 each: the bigram, and stacking gradients and taking their norms before the update
    muon, adamw      one per stack of equal shapes, one per large table
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GATE_CHANNELS
from nanochat_kernels import OPS, Op
from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost

FORWARD_BACKWARD, OPTIMIZER = "forward and backward", "optimizer"


@dataclass(frozen=True)
class Entry:
    """`count` calls of an op on a case in every step; `phase` says which part of the step they belong to."""

    op: Op
    case: Case
    count: int
    phase: str = FORWARD_BACKWARD


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def _linear_cost(args: tuple, kwargs: dict) -> Cost:
    x, weight = args
    rows = x.numel() // x.size(-1)
    moved = (x.numel() + rows * weight.size(0)) * x.element_size() + weight.numel() * weight.element_size()
    return Cost(moved, 2 * rows * weight.numel())


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding(ids, table)


def _embedding_cost(args: tuple, kwargs: dict) -> Cost:
    """Rows read and written, and, as the gradient is dense, a whole table of zeros and sums."""
    ids, table = args
    return Cost((2 * ids.numel() * table.size(1) + table.numel()) * table.element_size(), ids.numel() * table.size(1))


def _smear(x: Tensor, gate: Tensor) -> Tensor:
    return x + gate * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def _gather(grads: list[Tensor]) -> Tensor:
    """What precedes an update on one process: gradients of one shape are stacked and their norms taken."""
    stack = torch.stack(grads) if len(grads) > 1 else grads[0]
    return torch.linalg.vector_norm(stack.flatten(1), dim=-1)


def _gather_cost(args: tuple, kwargs: dict) -> Cost:
    size = sum(x.numel() * x.element_size() for x in args[0])
    return Cost((3 if len(args[0]) > 1 else 1) * size, 2 * sum(x.numel() for x in args[0]))


def _no_cases() -> Iterator[Case]:
    return iter(())


LINEAR = Op("linear", torch=_linear, cases=_no_cases, cost=_linear_cost, differentiable=("x", "weight"))
EMBEDDING = Op("embedding", torch=_embedding, cases=_no_cases, cost=_embedding_cost, differentiable=("table",))
SMEAR = Op(
    "smear",
    torch=_smear,
    cases=_no_cases,
    cost=lambda args, kwargs: Cost(3 * args[0].numel() * args[0].element_size(), 2 * args[0].numel()),
    differentiable=("x", "gate"),
)
GATHER = Op("gather", torch=_gather, cases=_no_cases, cost=_gather_cost)
PLAIN = {op.name: op for op in (LINEAR, EMBEDDING, SMEAR, GATHER)}

Shape = tuple[int, ...]
Make = Callable[[torch.device, torch.dtype, torch.Generator], tuple[tuple, dict]]


class _Step:
    """Makes the cases of one configuration. Names carry what the shapes depend on, so that rows find each other."""

    def __init__(self, config: GPTConfig, rows: int, seq_len: int) -> None:
        self.config, self.rows, self.seq_len = config, rows, seq_len
        self.tokens = rows * seq_len
        self.name = f"step w{config.width} b{rows} t{seq_len}"

    def case(self, what: str, make: Make) -> Case:
        return Case(f"{self.name} {what}".strip(), make, size="model")

    def linear(self, outputs: int) -> Case:
        shape = (self.rows, self.seq_len, self.config.width)

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            weight = normal((outputs, shape[-1]), device, torch.float32, draw, shape[-1] ** -0.5)
            return (normal(shape, device, dtype, draw), weight), {}

        return self.case(f"→{outputs}", make)

    def norm(self, *extras: str) -> Case:
        shape = (self.rows, self.seq_len, self.config.width)

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            kwargs: dict[str, Any] = {}
            kwargs |= {name: normal(shape, device, dtype, draw) for name in ("delta", "other") if name in extras}
            kwargs |= {name: torch.tensor(0.9, device=device) for name in ("scale", "other_scale") if name in extras}
            return (normal(shape, device, dtype, draw),), kwargs

        return self.case("+".join(extras), make)

    def rope(self, value_embedding: bool) -> Case:
        c, b, t = self.config, self.rows, self.seq_len

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            q, k, v = (normal((b, t, n, c.head_dim), device, dtype, draw) for n in (c.heads, c.kv_heads, c.kv_heads))
            angles = torch.outer(torch.arange(t, dtype=torch.float32), torch.linspace(1, 1e-5, c.head_dim // 2))
            tables = (x.to(device, dtype) for x in (angles.cos(), angles.sin()))
            extra = {}
            if value_embedding:
                extra["ve"] = normal((b, t, c.kv_heads * c.head_dim), device, dtype, draw)
                extra["gate"] = normal((b, t, c.kv_heads), device, dtype, draw)
            return (q, k, v, *tables), extra

        return self.case("value embedding" if value_embedding else "", make)

    def attention(self, window: int) -> Case:
        c, b, t = self.config, self.rows, self.seq_len

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            heads = (c.heads, c.kv_heads, c.kv_heads)
            return (*(normal((b, t, n, c.head_dim), device, dtype, draw) for n in heads), window), {}

        return self.case(f"window {window}", make)

    def mlp(self) -> Case:
        width, shape = self.config.width, (self.rows, self.seq_len, self.config.width)

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            fc = normal((4 * width, width), device, torch.float32, draw, width**-0.5)
            proj = normal((width, 4 * width), device, torch.float32, draw, width**-0.5)
            return (normal(shape, device, dtype, draw), fc, proj), {}

        return self.case("", make)

    def head(self) -> Case:
        c, n = self.config, self.tokens

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            weight = normal((c.padded_vocab_size, c.width), device, torch.float32, draw, 0.02)
            targets = torch.randint(0, c.vocab_size, (n,), generator=draw).to(device)
            return (normal((n, c.width), device, dtype, draw), weight, targets), {"vocab_size": c.vocab_size}

        return self.case(f"V{c.vocab_size}", make)

    def embedding(self, width: int) -> Case:
        c = self.config

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            ids = torch.randint(0, c.vocab_size, (self.rows, self.seq_len), generator=draw).to(device)
            return (ids, normal((c.padded_vocab_size, width), device, dtype, draw)), {}

        return self.case(f"V{c.vocab_size} {width}", make)

    def smear(self) -> Case:
        b, t, width = self.rows, self.seq_len, self.config.width

        def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
            return (normal((b, t, width), device, dtype, draw), normal((b, t, 1), device, dtype, draw)), {}

        return self.case("", make)


def _gathered(count: int, shape: Shape, master: bool) -> Case:
    def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
        kind = torch.float32 if master else dtype
        return ([normal(shape, device, kind, draw) for _ in range(count)],), {}

    return Case(f"{count}x{'x'.join(map(str, shape))}{' master' if master else ''}", make, size="model")


def _muon(count: int, shape: Shape) -> Case:
    def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
        params, grads, momentum = (normal((count, *shape), device, torch.float32, draw, s) for s in (0.05, 1e-3, 1e-3))
        second = torch.full((count, shape[0], 1) if shape[0] >= shape[1] else (count, 1, shape[1]), 0.1, device=device)
        return (params, grads, momentum, second), {"lr": 0.02, "mu": 0.9, "decay": 0.2, "compute_dtype": dtype}

    return Case(f"{count}x{shape[0]}x{shape[1]}", make, size="model")


def _adamw(shape: Shape, master: bool) -> Case:
    def make(device: torch.device, dtype: torch.dtype, draw: torch.Generator) -> tuple[tuple, dict]:
        kind = torch.float32 if master else dtype
        tensors = [[normal(shape, device, kind, draw, scale)] for scale in (1.0, 1e-2, 1e-2)]
        settings: dict[str, Any] = {"step": 10, "lr": 1e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "decay": 0.01}
        return (*tensors, [tensors[1][0].square() + 1e-8]), settings

    return Case(f"{shape[0]}x{shape[1]}{' master' if master else ''}", make, size="model")


def optimizer_entries(config: GPTConfig) -> Iterator[Entry]:
    """The update on one process: gathering gradients, Muon on the stacks, AdamW on head and tables."""
    width, kv = config.width, config.kv_heads * config.head_dim
    values = sum(config.has_value_embedding(i) for i in range(config.layers))
    projections = [(config.width, width), (kv, width), (kv, width), (width, config.width)]
    shapes = [*projections, (4 * width, width), (width, 4 * width)]
    stacks = {shape: config.layers * len(list(same)) for shape, same in itertools.groupby(sorted(shapes))}
    if values:
        stacks[(config.kv_heads, GATE_CHANNELS)] = values
    for shape, count in stacks.items():
        yield Entry(GATHER, _gathered(count, shape, master=True), 1, OPTIMIZER)
        yield Entry(OPS["muon_update"], _muon(count, shape), 1, OPTIMIZER)
    rows = config.padded_vocab_size
    tables = [((rows, width), True, 1), ((rows, width), False, 1), *([((rows, kv), False, values)] if values else [])]
    for shape, master, count in tables:
        yield Entry(GATHER, _gathered(1, shape, master), count, OPTIMIZER)
        yield Entry(OPS["adamw_update"], _adamw(shape, master), count, OPTIMIZER)


def step_entries(config: GPTConfig, rows: int, seq_len: int | None = None) -> list[Entry]:
    """Everything that one micro-batch of rows × seq_len tokens and one update do. Architecture "2026"."""
    step = _Step(config, rows, config.seq_len if seq_len is None else seq_len)
    layers, kv = config.layers, config.kv_heads * config.head_dim
    values = sum(config.has_value_embedding(i) for i in range(layers))
    entries = [
        Entry(EMBEDDING, step.embedding(config.width), 1),
        Entry(OPS["rms_norm"], step.norm(), 1),
        Entry(SMEAR, step.smear(), 1),
        Entry(OPS["rms_norm"], step.norm("scale", "other", "other_scale"), 1),
        Entry(OPS["rms_norm"], step.norm("delta", "scale", "other", "other_scale"), layers - 1),
        Entry(LINEAR, step.linear(config.width), 4 * layers if kv == config.width else 2 * layers),
        Entry(OPS["rope_qk_norm"], step.rope(False), layers - values),
        Entry(OPS["rms_norm"], step.norm("delta"), layers),
        Entry(OPS["relu2_mlp"], step.mlp(), layers),
        Entry(OPS["rms_norm"], step.norm("delta", "other", "other_scale"), 1),
        Entry(OPS["linear_softcap_cross_entropy"], step.head(), 1),
    ]
    if kv != config.width:
        entries.append(Entry(LINEAR, step.linear(kv), 2 * layers))
    if values:
        entries += [Entry(EMBEDDING, step.embedding(kv), values), Entry(OPS["rope_qk_norm"], step.rope(True), values)]
    windows = [min(window, step.seq_len) for window in config.windows]
    entries += [
        Entry(OPS["attention"], step.attention(window), windows.count(window)) for window in dict.fromkeys(windows)
    ]
    merged: dict[tuple[str, str], Entry] = {}
    for entry in (*entries, *optimizer_entries(config)):
        key = (entry.op.name, entry.case.name)
        merged[key] = replace(entry, count=entry.count + (merged[key].count if key in merged else 0))
    return [entry for entry in merged.values() if entry.count]


# Ops whose declared cost is that of forward and backward together, because the forward pass forms the gradients.
COSTED_WITH_BACKWARD = ("linear_softcap_cross_entropy",)
BACKWARD_FLOPS, BACKWARD_BYTES = 3.0, 2.5  # of both passes, in units of the forward one: two more products; g and x


def training_cost(op: Op, args: tuple, kwargs: dict) -> Cost:
    """Cost of forward plus backward; of the call itself for updates and what has no gradient."""
    cost = op.cost(args, kwargs)
    if not op.differentiable or op.name in COSTED_WITH_BACKWARD:
        return cost
    return Cost(cost.bytes * BACKWARD_BYTES, cost.flops * BACKWARD_FLOPS)


def forward_cost(op: Op, args: tuple, kwargs: dict) -> Cost:
    """Cost of the forward pass alone."""
    cost = op.cost(args, kwargs)
    third = op.name in COSTED_WITH_BACKWARD
    return Cost(cost.bytes, cost.flops / 3) if third else cost
