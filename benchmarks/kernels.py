"""Every op × backend × case: time, shares of the measured ceilings, baselines and peers in the same process.

    nanochat bench kernels [--ops rms_norm attention] [--backends triton] [--dtypes bfloat16] [--compile]

Cases, costs and references are those of the Op declarations; nothing is repeated here. A backend is timed only after it
matched the reference on this very case and was seen not to run the reference's operations under its own name; one that
fails is reported, gets no row, and makes the exit code 1.

What is timed depends on where an op works: `train-eager` is forward plus backward, `train-compiled` the same under
torch.compile (so backend `torch` there is torch.compile(reference), the baseline to beat), `prefill` and `decode` the
forward pass alone. Updates in place run the same in both training modes and get a row for each. Peers (Liger, torch's
own fused functions) are timed where they compute the same thing.

--step d4 takes, in place of the ops' own cases, everything that a training step of that depth consists of
(nanochat/measure/inventory.py): from those rows the estimator predicts the step. It is what a CPU measures by default,
whose patience the ops' d12 and d24 cases exceed.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from nanochat.measure.inventory import forward_cost, step_entries, training_cost
from nanochat.model.config import GPTConfig
from nanochat_kernels import OPS, KernelUnavailable, Op, verify
from nanochat_kernels.registry import Case, Cost, Place

TRAINING = ("train-eager", "train-compiled")


@dataclass(frozen=True)
class Work:
    """One thing to time: a case of an op in a mode."""

    op: Op
    case: Case
    dtype: torch.dtype
    mode: str
    device: torch.device

    @property
    def backward(self) -> bool:
        return self.mode in TRAINING and bool(self.op.differentiable)

    def inputs(self, seed: int = 0) -> tuple[tuple, dict]:
        return self.case.make(self.device, self.dtype, torch.Generator().manual_seed(seed))

    def cost(self) -> Cost:
        return (training_cost if self.mode in TRAINING else forward_cost)(self.op, *self.inputs())

    def call(self, function: Callable, seed: int = 0) -> Callable[[], Any]:
        """A closure that makes one call, backward pass included, on inputs of its own."""
        args, kwargs = self.inputs(seed)
        if not self.backward:

            def forward() -> Any:
                with torch.no_grad():
                    return function(*args, **kwargs)

            return forward
        bound = inspect.signature(self.op.reference).bind(*args, **kwargs)
        found = (bound.arguments.get(name) for name in self.op.differentiable)
        leaves = [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        upstream: list[Tensor] = []

        def both() -> Any:
            outputs = [x for x in verify._listed(function(*args, **kwargs)) if x.requires_grad]
            if not upstream:
                upstream.extend(torch.randn_like(x) for x in outputs)
            return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

        return both


def modes_of(op: Op, case: Case, compiled: bool) -> tuple[str, ...]:
    """The modes whose plan this case speaks for, named by the case or by what the op can do."""
    for mode in ("decode", "prefill"):
        if mode in case.name:
            return (mode,)
    if op.differentiable:
        return ("train-eager", "prefill", *(("train-compiled",) if compiled else ()))
    return TRAINING


def declared(args: argparse.Namespace) -> Iterator[tuple[Op, Case]]:
    """The ops' own cases, or those of a training step."""
    if args.step:
        config = GPTConfig.from_depth(int(args.step.removeprefix("d")), args.vocab_size, args.seq_len)
        yield from ((entry.op, entry.case) for entry in step_entries(config, args.rows))
        return
    for op in OPS.values():
        yield from ((op, case) for case in op.cases() if case.size in args.sizes)


def works(args: argparse.Namespace, device: torch.device) -> Iterator[Work]:
    for name in args.ops:
        if name not in OPS and not args.step:
            raise KernelUnavailable(name, "?", "no such op", f"ops are {', '.join(OPS)}")
    for op, case in declared(args):
        if (args.ops and op.name not in args.ops) or args.cases not in case.name:
            continue
        for dtype in case.dtypes:
            if str(dtype).removeprefix("torch.") in args.dtypes:
                for mode in TRAINING[: 1 + args.compile] if args.step else modes_of(op, case, args.compile):
                    if not args.modes or mode in args.modes:
                        yield Work(op, case, dtype, mode, device)


def time_work(work: Work, function: Callable, seconds: float) -> harness.Timing:
    """CPU: one set of inputs, caches flushed. CUDA: as many sets as exceed the cache, replayed from a graph."""
    if work.device.type != "cuda":
        return harness.measure(work.call(function), work.device, seconds)
    sets = harness.input_sets(int(work.op.cost(*work.inputs()).bytes), work.device)
    calls = [work.call(function, seed) for seed in range(sets)]
    try:
        return harness.measure_graph(calls, work.device, seconds)
    except RuntimeError as error:  # some peers synchronize, which a graph cannot hold
        harness.say(f"{work.op.name} cannot be captured ({str(error).splitlines()[0]}): timed between events")
        torch.cuda.synchronize()
        return harness.measure(calls[0], work.device, seconds)


# ---- peers: op → name → a function of the op's arguments, and the module that must be installed ----------------------


def _plain_norm(x, delta=None, scale=None, other=None, other_scale=None):
    mixed = x if delta is None else x + delta
    if scale is not None:
        mixed = scale.to(x.dtype) * mixed
    if other is not None:
        mixed = mixed + other_scale.to(x.dtype) * other
    return torch.nn.functional.rms_norm(mixed, mixed.shape[-1:]), mixed


def _masked_sdpa(q, k, v, window):
    position = torch.arange(q.size(1), device=q.device)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0) & (distance <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def _liger_norm(x, delta=None, scale=None, other=None, other_scale=None):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    mixed = x if delta is None else x + delta
    if scale is not None:
        mixed = scale.to(x.dtype) * mixed
    if other is not None:
        mixed = mixed + other_scale.to(x.dtype) * other
    weight = torch.ones(x.size(-1), device=x.device, dtype=x.dtype)
    return LigerRMSNormFunction.apply(mixed, weight, 1.1920929e-07, 0.0, "llama", False), mixed


def _liger_loss(x, weight, targets, token_weights=None, vocab_size=None, softcap=15.0, reduction="mean"):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    if token_weights is not None:
        raise NotImplementedError("no token weights")
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-1, reduction=reduction, softcap=softcap)
    return loss(weight[:vocab_size].to(x.dtype), x, targets)


PEERS: dict[str, dict[str, tuple[Callable, str]]] = {  # op: {peer: (function, module that must be installed)}
    "rms_norm": {"F.rms_norm": (_plain_norm, "torch"), "Liger": (_liger_norm, "liger_kernel")},
    "attention": {"SDPA with mask": (_masked_sdpa, "torch")},
    "linear_softcap_cross_entropy": {"Liger": (_liger_loss, "liger_kernel")},
}
PEER_ERROR = 0.05  # a peer farther from the reference than this computes something else


def peers(work: Work) -> Iterator[tuple[str, Callable]]:
    """The installed peers that give this case's result (checked, forward pass)."""
    for name, (function, module) in PEERS.get(work.op.name, {}).items():
        if importlib.util.find_spec(module) is None or (module != "torch" and work.device.type != "cuda"):
            continue
        try:
            args, kwargs = work.inputs()
            with torch.no_grad():
                found = verify._listed(function(*args, **kwargs))
                expected = verify._listed(work.op.reference(*args, **kwargs))
            apart = max(verify.difference(a, b, verify._rms(b)) for a, b in zip(found, expected))
        except Exception as error:  # a peer's failure is not ours
            harness.say(f"{work.op.name}, {work.case.name}: {name} left out ({type(error).__name__}: {error})")
            continue
        if apart <= PEER_ERROR:
            yield name, function
        else:
            harness.say(f"{work.op.name}, {work.case.name}: {name} left out, it is {apart:.2g} from the reference")


# ---- the run ---------------------------------------------------------------------------------------------------------


def run_work(work: Work, backends: list[str], rows: harness.Rows, seconds: float) -> list[str]:
    """Times one case on all backends and peers; returns what was refused, as messages."""
    op, refused = work.op, []
    place = Place(work.device, work.dtype, work.mode)
    fields = {"op": op.name, "case": work.case.name, "dtype": str(work.dtype).removeprefix("torch.")}
    for backend in op.backends:
        probe = op.available.get(backend)
        if (backends and backend not in backends) or (probe and probe(place)):
            continue
        try:
            harness.gate(op, backend, work.case, work.device, work.dtype)
            function = op.load(backend)
            if work.mode == "train-compiled" and work.backward:
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)
            timing, cost = time_work(work, function, seconds), work.cost()
        except Exception as error:  # one backend's failure must not cost the others their rows
            known = isinstance(error, harness.HarnessError)
            refused.append(str(error) if known else f"{op.name}={backend} raised {type(error).__name__}: {error}")
            harness.say(refused[-1], "red")
            continue
        rows.add(timing=timing, cost=cost, backend=backend, mode=work.mode, **fields)
    if work.mode != "train-compiled" and not backends:
        for name, function in peers(work):
            rows.add(timing=time_work(work, function, seconds), cost=work.cost(), peer=name, mode=work.mode, **fields)
    return refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=[], help="default: all")
    parser.add_argument("--backends", nargs="+", default=[], help="default: all that can run here, and the peers")
    parser.add_argument("--step", help="the operations of a training step of this depth, such as d4 (a CPU's default)")
    parser.add_argument("--rows", type=int, default=8, help="with --step: rows of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=512, help="with --step")
    parser.add_argument("--vocab-size", type=int, default=32768, help="with --step")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        help="the ops' own cases (default on CUDA: model)",
        choices=["small", "odd", "model"],
    )
    parser.add_argument("--dtypes", nargs="+", default=[], help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--modes", nargs="+", default=[], help="default: all that a case speaks for")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile (a minute or more per op)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="file or folder for the rows (default: benchmarks/results/<device>)")
    args = parser.parse_args()
    device = harness.pick_device(args.device)
    if not args.sizes and not args.step and device.type == "cpu":
        args.step = "d4"
    args.sizes = args.sizes or ["model"]
    args.dtypes = args.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32"])
    rows, refused = harness.Rows("kernels", device, args.out), []
    done: dict[tuple, list[dict[str, Any]]] = {}
    try:
        for work in works(args, device):
            key = (work.op.name, work.case.name, work.dtype)
            if not work.op.differentiable and work.mode == "train-compiled" and key in done:
                for row in done[key]:  # the same call in both training modes: one measurement, two rows
                    rows.add_copy(row, mode=work.mode)
                continue
            before = len(rows.rows)
            refused += run_work(work, args.backends, rows, args.seconds)
            done[key] = rows.rows[before:]
    finally:
        rows.table()
    for message in dict.fromkeys(refused):
        harness.say(message, "red")
    return 1 if refused else 0


if __name__ == "__main__":
    harness.run(main)
