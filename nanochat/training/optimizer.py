"""Muon for the matrices inside the blocks, AdamW for everything else, on one process or with state sharded over ranks.

The unit of work is a *shard*: a stack of K equal slices cut into one contiguous chunk per rank.

    Muon    the K matrices of one shape, stacked (K, rows, cols): a rank orthogonalizes whole matrices, its own
    AdamW   one large parameter as it is, its K rows being the slices: the update is elementwise, any cut will do
    small   scalars and tiny vectors: one flat sum over ranks, then updated everywhere alike (no cut)

The stack *is* the parameters' memory: each parameter becomes a view of its slice. So on one process the update needs no
gather and copies gradients at most, and on several the gather writes straight into the parameters. Where K does not
divide by the ranks, the stack is padded with slices that nobody reads.

A step on W ranks, all sums being asynchronous:  start every reduce_scatter of gradients → per shard: wait, update my
chunk, start its all_gather → wait for the gathers. While one shard computes, the others travel. Each rank keeps 1/W of
the moments. Gradients are *summed*: the training loop divides the loss by W (exact for powers of two, in any dtype).

The trade-off of not wrapping the model in DDP: nothing overlaps with the backward pass, but gradients move once per
step however many micro-batches it has, and each rank keeps the optimizer's state of its own chunks only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import NanochatError
from nanochat.runtime import Runtime
from nanochat.training.schedules import StepRates
from nanochat_kernels import KernelPlan

SMALL = 4096  # parameters with fewer elements are not worth cutting up
ADAMW_EPS = 1e-10
MUON_LR, MUON_BETA2 = 0.02, 0.9


@dataclass(frozen=True)
class Group:
    """Parameters updated by one rule with one set of numbers, at their peak; `StepRates` scale them step by step."""

    rule: str  # "muon" or "adamw"
    names: tuple[str, ...]
    lr: float
    decay: float
    betas: tuple[float, float] = (0.0, 0.0)  # AdamW's; Muon takes its momentum from the schedule


def parameter_groups(names: Iterable[str], width: int, lr_scale: float, muon_decay: float) -> list[Group]:
    """The groups of a GPT of `width` channels. lr_scale comes from the batch size; the smear and backout lr ignores it.

    AdamW's learning rates were tuned at width 768 and fall with the root of the width.
    """
    names = list(names)
    m = lr_scale * (width / 768) ** -0.5
    adamw = [  # prefixes, lr, betas, decay
        (("lm_head.",), 0.008 * m, (0.8, 0.96), 0.01),
        (("wte.",), 0.3 * m, (0.8, 0.995), 0.001),
        (("value_embeds.",), 0.15 * m, (0.8, 0.995), 0.01),
        (("resid_scale",), 0.005 * lr_scale, (0.8, 0.95), 0.05),
        (("x0_scale",), 0.5 * lr_scale, (0.96, 0.95), 0.0),
        (("smear_", "backout_"), 0.2, (0.8, 0.95), 0.0),
    ]
    groups = [
        Group("adamw", tuple(n for n in names if n.startswith(prefixes)), lr, decay, betas)
        for prefixes, lr, betas, decay in adamw
    ]
    groups.append(Group("muon", tuple(n for n in names if n.startswith("blocks.")), MUON_LR * lr_scale, muon_decay))
    placed = [n for group in groups for n in group.names]
    if sorted(placed) != sorted(names):
        raise ValueError(f"no group, or more than one, for {sorted(set(names) ^ set(placed))}")
    return [group for group in groups if group.names]


class Shard:
    """A stack of K slices whose memory the parameters share, and this rank's chunk of it.

    parameters: K matrices of one shape, or a single one whose rows are the slices (then `whole`).
    """

    def __init__(self, group: Group, parameters: Mapping[str, nn.Parameter], runtime: Runtime, whole: bool) -> None:
        self.group, self.names, self.whole = group, tuple(parameters), whole
        self.parameters = list(parameters.values())
        first = self.parameters[0]
        self.slices = len(first) if whole else len(self.parameters)
        self.chunk = -(-self.slices // runtime.world_size)
        self.ranks, start = runtime.world_size, runtime.rank * self.chunk
        self.owned = max(0, min(self.chunk, self.slices - start))  # the last ranks may own padding alone
        padded = self.chunk * self.ranks
        shape = first.shape[1:] if whole else first.shape
        if whole and padded == self.slices:
            self.stack = first.detach()
        else:
            self.stack = torch.zeros(padded, *shape, dtype=first.dtype, device=first.device)
            self.split(self.stack, adopt=True)
        self.mine = self.stack[start : start + self.owned]
        self.start = start
        self.state: dict[str, Tensor] = {}
        self.grads: Tensor | None = None
        self.norms = torch.zeros(1, device=first.device)  # of the last summed gradients, one per matrix or parameter
        self.work: Any = None
        self.sent: Tensor | None = None

    def split(self, stack: Tensor, adopt: bool = False) -> dict[str, Tensor]:
        """Per parameter its part of a stack. With `adopt`, copies the parameters in and makes them views of it."""
        parts = [stack[: self.slices]] if self.whole else list(stack.unbind()[: self.slices])
        if adopt:
            for parameter, part in zip(self.parameters, parts, strict=True):
                part.copy_(parameter.detach())
                parameter.data = part
        return dict(zip(self.names, parts, strict=True))

    def reduce(self) -> None:
        """Starts summing gradients over ranks, each rank receiving its own chunk; frees the parameters' gradients."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if self.ranks == 1:
            self.grads = grads[0] if self.whole else torch.stack(grads)
            return
        if self.whole and len(self.stack) == self.slices:
            full = grads[0].contiguous()
        else:
            full = torch.zeros_like(self.stack)
            for part, grad in zip(self.split(full).values(), grads, strict=True):
                part.copy_(grad)
        received = torch.empty_like(full[: self.chunk])
        self.work = dist.reduce_scatter_tensor(received, full, async_op=True)
        self.grads, self.sent = received[: self.owned], full  # what is sent must outlive the transfer

    def measure(self) -> None:
        """Notes the norms of this rank's summed gradients, before the update overwrites them."""
        assert self.grads is not None
        flat = self.grads.flatten() if self.whole else self.grads.flatten(1)
        self.norms = torch.linalg.vector_norm(flat, dim=-1).float().reshape(-1)

    def not_finite(self) -> list[str]:
        """Names whose gradients, in this rank's chunk, were not finite in the last step."""
        bad = (~torch.isfinite(self.norms)).tolist()
        names = self.names if self.whole else self.names[self.start : self.start + self.owned]
        return [name for name, is_bad in zip(names, bad, strict=False) if is_bad]

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work, self.sent = None, None

    def gather(self) -> None:
        """Starts sending this rank's updated chunk to all, straight into the parameters."""
        self.grads = None
        if self.ranks > 1:
            chunk = self.stack[self.start : self.start + self.chunk]
            self.work = dist.all_gather_into_tensor(self.stack, chunk, async_op=True)

    def full_state(self, field: str, to_rank_0: bool) -> dict[str, Tensor]:
        """One field of the state per parameter, on the CPU of rank 0 (elsewhere empty). All ranks must call it."""
        own = self.state[field]
        if self.ranks > 1:
            padded = torch.zeros(self.chunk, *own.shape[1:], dtype=own.dtype, device=own.device)
            padded[: self.owned].copy_(own)
            parts = [torch.empty_like(padded) for _ in range(self.ranks)] if to_rank_0 else None
            dist.gather(padded, parts)
            if parts is None:
                return {}
            own = torch.cat([part.cpu() for part in parts])
        return {name: part.cpu() for name, part in self.split(own).items()}

    def load(self, field: str, saved: Mapping[str, Tensor]) -> None:
        """Fills this rank's chunk of one field from tensors of all parameters."""
        own = self.state[field]
        expected = own.shape[1:]
        for i in range(self.owned):
            if self.whole:
                source = saved[self.names[0]]
                if source.shape != self.parameters[0].shape:
                    raise _mismatch(self.names[0], field, source, self.parameters[0].shape)
                own.copy_(source[self.start : self.start + self.owned])
                return
            name = self.names[self.start + i]
            if saved[name].shape != expected:
                raise _mismatch(name, field, saved[name], expected)
            own[i].copy_(saved[name])


class Small:
    """Parameters of one AdamW group too small to cut: every rank holds their state and makes the same update."""

    def __init__(self, group: Group, parameters: Mapping[str, nn.Parameter]) -> None:
        self.group, self.names = group, tuple(parameters)
        self.parameters = list(parameters.values())
        self.state = {
            field: [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
            for field in ("exp_avg", "exp_avg_sq")
        }
        self.norms = torch.zeros(1)

    def measure(self, grads: list[Tensor]) -> None:
        self.norms = torch.stack([torch.linalg.vector_norm(grad).float() for grad in grads])

    def not_finite(self) -> list[str]:
        return [name for name, norm in zip(self.names, self.norms.tolist(), strict=True) if not math.isfinite(norm)]


def _mismatch(name: str, field: str, found: Tensor, expected: Iterable[int]) -> NanochatError:
    return NanochatError(
        f"the optimizer state {name}.{field} has the shape {tuple(found.shape)}, the model needs {tuple(expected)}; "
        "the checkpoint belongs to another model"
    )


class MuonAdamW:
    """The optimizer. It takes over the memory of the parameters it is given: build it before compiling or training.

    compute_dtype: bfloat16 lets Muon iterate in bfloat16; any other dtype means float32 (float16 has no range for it).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Iterable[Group],
        plan: KernelPlan,
        runtime: Runtime,
    ) -> None:
        self.plan, self.runtime = plan, runtime
        self.compute_dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
        self.updates = 0  # made so far: AdamW's bias correction counts them, skipped steps do not
        self.shards: list[Shard] = []
        self.small: list[Small] = []
        for group in groups:
            members = {name: parameters[name] for name in group.names}
            if group.rule == "muon":
                self._add_muon(group, members)
            else:
                self._add_adamw(group, members)
        self.shards.sort(key=lambda shard: -shard.stack.numel())  # the largest travel first

    def _add_muon(self, group: Group, members: Mapping[str, nn.Parameter]) -> None:
        by_shape: dict[torch.Size, dict[str, nn.Parameter]] = {}
        for name, parameter in members.items():
            by_shape.setdefault(parameter.shape, {})[name] = parameter
        for (rows, cols), same in by_shape.items():
            shard = Shard(group, same, self.runtime, whole=False)
            shape = (shard.owned, rows, 1) if rows >= cols else (shard.owned, 1, cols)
            shard.state = {"momentum": torch.zeros_like(shard.mine), "second": shard.mine.new_zeros(shape)}
            self.shards.append(shard)

    def _add_adamw(self, group: Group, members: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in members.items():
            if parameter.numel() >= SMALL:
                shard = Shard(group, {name: parameter}, self.runtime, whole=True)
                shard.state = {field: torch.zeros_like(shard.mine) for field in ("exp_avg", "exp_avg_sq")}
                self.shards.append(shard)
        small = {name: parameter for name, parameter in members.items() if parameter.numel() < SMALL}
        if small:
            self.small.append(Small(group, small))

    @torch.no_grad()
    def step(self, rates: StepRates, skip: bool = False) -> None:
        """One update from the gradients that the parameters hold, which are consumed.

        skip: drop the gradients and change nothing (float16 overflow). All ranks must pass the same value.
        """
        if skip:
            holders: list[Shard | Small] = [*self.shards, *self.small]
            for parameter in (p for holder in holders for p in holder.parameters):
                parameter.grad = None
            return
        self.updates += 1
        for shard in self.shards:
            shard.reduce()
        small_grads, small_work = self._reduce_small()
        for shard in self.shards:
            shard.wait()
            if shard.owned:
                shard.measure()
                update = self._muon if shard.group.rule == "muon" else self._adamw
                update(shard, rates)
            shard.gather()
        if small_work is not None:
            small_work.wait()
        for holder, grads in zip(self.small, small_grads, strict=True):
            holder.measure(grads)
            state = holder.state
            self._adamw_update(holder.group, holder.parameters, grads, state["exp_avg"], state["exp_avg_sq"], rates)
        for shard in self.shards:
            shard.wait()

    @torch.no_grad()
    def grad_norm_squared(self) -> Tensor:
        """‖gradient‖² of the last step, float32 0-d: this rank's share, to be summed over ranks; inf and NaN show."""
        small = [holder.norms for holder in self.small] if self.runtime.is_main else []
        device = self.shards[0].stack.device
        norms = torch.cat([n.to(device) for n in (*(s.norms for s in self.shards if s.owned), *small)])
        return norms.square().sum()

    def not_finite(self) -> list[str]:
        """Parameters whose gradients were not finite in the last step, among those this rank updates."""
        holders: list[Shard | Small] = [*self.shards, *self.small]
        return [name for holder in holders for name in holder.not_finite()]

    def _reduce_small(self) -> tuple[list[list[Tensor]], Any]:
        """Gradients of the small parameters and, where ranks sum them, the one message to wait for."""
        grads = [[torch.zeros_like(p) if p.grad is None else p.grad for p in s.parameters] for s in self.small]
        for holder in self.small:
            for parameter in holder.parameters:
                parameter.grad = None
        if self.runtime.distributed and self.small:
            flat = torch.cat([g.float().flatten() for group in grads for g in group])
            pieces = iter(flat.split([g.numel() for group in grads for g in group]))
            views = [[next(pieces).view_as(g) for g in group] for group in grads]
            return views, dist.all_reduce(flat, async_op=True)
        return grads, None

    def _muon(self, shard: Shard, rates: StepRates) -> None:
        rows, cols = shard.mine.shape[-2:]
        self.plan.muon_update(
            shard.mine,
            shard.grads,
            shard.state["momentum"],
            shard.state["second"],
            lr=shard.group.lr * rates.lr * max(1.0, rows / cols) ** 0.5,
            mu=rates.momentum,
            decay=shard.group.decay * rates.decay,
            beta2=MUON_BETA2,
            compute_dtype=self.compute_dtype,
        )

    def _adamw(self, shard: Shard, rates: StepRates) -> None:
        moments = [shard.state["exp_avg"]], [shard.state["exp_avg_sq"]]
        assert shard.grads is not None
        self._adamw_update(shard.group, [shard.mine], [shard.grads], *moments, rates)

    def _adamw_update(
        self,
        group: Group,
        parameters: list[Any],
        grads: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        rates: StepRates,
    ) -> None:
        self.plan.adamw_update(
            parameters,
            grads,
            exp_avg,
            exp_avg_sq,
            step=self.updates,
            lr=group.lr * rates.lr,
            beta1=group.betas[0],
            beta2=group.betas[1],
            eps=ADAMW_EPS,
            decay=group.decay,
        )

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Full tensors "<parameter>.<field>" on the CPU of rank 0, {} elsewhere. All ranks must call it.

        On one process on the CPU they share memory with the optimizer: save them before the next step.
        """
        main = self.runtime.is_main
        result = {"updates": torch.tensor(self.updates)}
        for shard in self.shards:
            for field in shard.state:
                for name, tensor in shard.full_state(field, main).items():
                    result[f"{name}.{field}"] = tensor
        for holder in self.small:
            for field, tensors in holder.state.items():
                result |= {f"{name}.{field}": tensor.cpu() for name, tensor in zip(holder.names, tensors, strict=True)}
        return result if main else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state_dict` returned on any number of ranks; every rank passes the full tensors.

        Raises NanochatError where a tensor is missing or of another shape.
        """

        def pick(names: Iterable[str], field: str) -> dict[str, Tensor]:
            try:
                return {name: state[f"{name}.{field}"] for name in names}
            except KeyError as missing:
                raise NanochatError(
                    f"the optimizer state lacks {missing}; the checkpoint belongs to another model"
                ) from None

        for shard in self.shards:
            for field in shard.state:
                shard.load(field, pick(shard.names, field))
        for holder in self.small:
            for field, tensors in holder.state.items():
                for tensor, (name, source) in zip(tensors, pick(holder.names, field).items(), strict=True):
                    if source.shape != tensor.shape:
                        raise _mismatch(name, field, source, tensor.shape)
                    tensor.copy_(source)
        self.updates = int(state.get("updates", torch.tensor(0)))
