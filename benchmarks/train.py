"""A training step: tokens/s, MFU, where its time goes, peak memory, time to the first step; alone or beside a peer.

    nanochat bench train [--depth 4 8] [--rows 4 8] [--dtype float32 bfloat16] [--kernels auto torch] [--compile]
    nanochat bench train --peer nanochat=PATH          interleaved with a checkout of karpathy/nanochat, identical work
    nanochat bench train --ablate                      `auto`, and `auto` with one kernel at a time back on torch
    nanochat bench train --ranks 1 2                   scaling, with the efficiency against one rank

Lists make a sweep: every combination is a variant. Variants (and the peer) run in turn, A B A B, each in a process with
compiler caches of its own, so the first step is a cold one; its time counts from the model's creation to the end of the
first update. Both sides make identical steps on random tokens, optimizer included; with --data ours reads packed rows
through the loader instead, and data wait becomes a figure. The step is timed undisturbed first; the breakdown comes
from separate steps that wait for the device between phases, and is given in shares of their sum.

MFU divides the FLOPs of model/costs.py by the device's dense bf16 peak; where there is none (a CPU), `gemm_share` gives
the share of the measured matrix-product ceiling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from nanochat.model import costs
from nanochat.model.config import GPTConfig
from nanochat_kernels import OPS, KernelPlan

SHAPE = ("depth", "vocab_size", "seq_len", "rows", "steps", "window_pattern", "dtype")
PHASES = ("data", "forward", "backward", "optimizer", "communication")
BREAKDOWN_STEPS = 3


# ---- one run, in a process of its own --------------------------------------------------------------------------------


class Phases:
    """Seconds per phase; `lap` closes one. Waits for the device, so it is not used in timed steps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self.last = time.perf_counter()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        now = self.now()
        self.seconds[phase] += now - self.last
        self.last = now

    def watch(self, optimizer: Any) -> None:
        """Counts the time in which the optimizer's shards wait for other ranks as communication, not as update."""
        for shard in optimizer.shards:
            shard.wait = self._timed(shard.wait)

    def _timed(self, wait: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            begin = self.now()
            wait()
            spent = self.now() - begin
            self.seconds["communication"] += spent
            self.seconds["optimizer"] -= spent

        return timed


def compute_dtype(name: str) -> str:
    """Precision fp8 is bfloat16 with the blocks' products in FP8."""
    return "bfloat16" if name == "fp8" else name


def batches(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets): random tokens, or packed rows of --data."""
    if args.data:
        from nanochat.data.corpus import open_corpus
        from nanochat.data.loader import PackedLoader
        from nanochat.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(Path(args.tokenizer))
        with PackedLoader(open_corpus(args.data), tokenizer, "train", rows=args.rows, seq_len=args.seq_len) as loader:
            for batch in loader:
                yield batch.inputs.to(device), batch.targets.to(device)
    draw = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(0, args.vocab_size, (args.rows, args.seq_len + 1), generator=draw).to(device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(args: argparse.Namespace) -> dict[str, Any] | None:
    """One run: {"first_step_s", "step_s", "phases", "peak_bytes", "plan", …} on rank 0, None on the others."""
    from nanochat.model.fp8 import Fp8
    from nanochat.model.gpt import GPT
    from nanochat.runtime import start, stop
    from nanochat.training.optimizer import MuonAdamW, parameter_groups
    from nanochat.training.schedules import MUON_DECAY, REFERENCE_BATCH, rates_at

    runtime = start(dtype=compute_dtype(args.dtype))  # type: ignore[arg-type]
    began = time.perf_counter()
    config = GPTConfig.from_depth(args.depth, args.vocab_size, args.seq_len, window_pattern=args.window_pattern)
    mode = "train-compiled" if args.compile else "train-eager"
    plan = KernelPlan.resolve(args.kernels, device=runtime.device, dtype=runtime.dtype, mode=mode)
    model = GPT(config, plan, runtime.dtype).to(runtime.device)
    model.init_weights()
    parameters = dict(model.named_parameters())
    lr_scale = (args.rows * args.seq_len * runtime.world_size / REFERENCE_BATCH) ** 0.5
    groups = parameter_groups(parameters, config.width, lr_scale, MUON_DECAY)
    optimizer = MuonAdamW(parameters, groups, plan, runtime)
    model.fp8 = Fp8(model) if args.dtype == "fp8" else None
    if args.compile:
        model.compile_blocks()
    source, seconds, loss, first = batches(args, runtime.device), [], None, 0.0

    def step(number: int, lap: Callable[[str], None] = lambda phase: None) -> None:
        nonlocal loss
        inputs, targets = next(source)
        lap("data")
        loss = model(inputs, targets) / runtime.world_size
        lap("forward")
        loss.backward()
        if model.fp8:
            model.fp8.observe()
        lap("backward")
        optimizer.step(rates_at(number, 1000))
        if model.fp8:
            model.fp8.advance()
        lap("optimizer")

    for number in range(args.steps):
        begin = time.perf_counter()
        step(number)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        first = first or time.perf_counter() - began
    phases = Phases(runtime.device)
    if runtime.distributed:
        phases.watch(optimizer)
    for number in range(BREAKDOWN_STEPS):
        step(args.steps + number, phases.lap)
    on_gpu = runtime.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "first_step_s": first,
        "step_s": seconds[1:],
        "loss": float(loss) * runtime.world_size,
        "phases": {name: spent / BREAKDOWN_STEPS for name, spent in phases.seconds.items()},
        "peak_bytes": peak,
        "plan": {name: choice.backend for name, choice in plan.choices.items()},
        "rank_threads": torch.get_num_threads(),
    }
    main_rank = runtime.is_main
    if runtime.distributed:
        torch.distributed.barrier()  # gloo aborts a rank whose neighbor has left
    stop(runtime)
    return result if main_rank else None


# ---- variants --------------------------------------------------------------------------------------------------------


def side_of(variant: argparse.Namespace, peer: Path | None) -> Callable[[], dict[str, Any]]:
    """What runs one variant (or the peer, on the variant's work) in a process and returns its result."""
    options = [part for name in SHAPE for part in (f"--{name.replace('_', '-')}", str(getattr(variant, name)))]
    if peer is not None:
        script = str(Path(__file__).with_name("nanochat_peer.py"))
        command = [sys.executable, script, "speed", "--peer", str(peer), *options]
        return lambda: harness.run_json(command, isolated=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={variant.ranks}"]
    start = [sys.executable, "-P", *(launch if variant.ranks > 1 else []), "-m", "benchmarks.train"]
    command = [*start, "--side", "--kernels", variant.kernels, *options]
    command += ["--compile"] if variant.compile else []
    command += ["--data", variant.data, "--tokenizer", variant.tokenizer] if variant.data else []
    root = str(harness.ROOT)
    paths = os.pathsep.join(filter(None, (root, f"{root}/kernels", os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": paths}
    if variant.ranks > 1 and not torch.cuda.is_available():
        env["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // variant.ranks))
    return lambda: harness.run_json(command, isolated=True, env=env)


def ablations(kernels: str, device: torch.device, dtype: str, compiled: bool) -> list[str]:
    """`kernels`, and the same with one op at a time back on torch, for every op that is not there already."""
    mode = "train-compiled" if compiled else "train-eager"
    plan = KernelPlan.resolve(kernels, device=device, dtype=getattr(torch, compute_dtype(dtype)), mode=mode)
    used = [name for name, choice in plan.choices.items() if choice.backend != "torch" and name in TRAINING_OPS]
    return [kernels, *(f"{kernels},{name}=torch" for name in used)]


TRAINING_OPS = tuple(name for name, op in OPS.items() if op.differentiable or op.mutates)  # the rest work at inference


def variants(args: argparse.Namespace, device: torch.device) -> list[argparse.Namespace]:
    """Every combination of the lists."""
    kernels = args.kernels
    if args.ablate:
        kernels = [v for k in args.kernels for v in ablations(k, device, args.dtype[0], args.compile)]
    lists = {"depth": args.depth, "rows": args.rows, "dtype": args.dtype, "kernels": kernels, "ranks": args.ranks}
    combined = itertools.product(*lists.values())
    return [argparse.Namespace(**{**vars(args), **dict(zip(lists, values, strict=True))}) for values in combined]


def case_of(variant: argparse.Namespace) -> str:
    return f"d{variant.depth} v{variant.vocab_size} t{variant.seq_len} b{variant.rows} {variant.window_pattern}"


def record(
    rows: harness.Rows, variant: argparse.Namespace, runs: list[dict[str, Any]], peer: str | None
) -> dict[str, Any]:
    """One row from all rounds of one side."""
    timing = harness.Timing([seconds for run in runs for seconds in run["step_s"]])
    config = GPTConfig.from_depth(
        variant.depth, variant.vocab_size, variant.seq_len, window_pattern=variant.window_pattern
    )
    ranks = 1 if peer else variant.ranks
    speed = variant.rows * variant.seq_len * ranks / timing.median
    achieved = costs.training_flops_per_token(config) * speed
    unit = {"tokens_per_s": speed, "first_step_s": statistics.median(run["first_step_s"] for run in runs)}
    devices = ranks if rows.device.type == "cuda" else 1
    if peak := costs.peak_bf16_flops(rows.device):
        unit["mfu"] = achieved / (peak * devices)
    unit["gemm_share"] = achieved / (rows.ceilings.flops(variant.dtype) * devices)
    extra: dict[str, Any] = {"config": {name: getattr(variant, name) for name in SHAPE}}
    if not peer:
        phases = {name: statistics.median(run["phases"][name] for run in runs) for name in PHASES}
        total = sum(phases.values())
        unit |= {f"{name}_share": spent / total for name, spent in phases.items()}
        unit["peak_bytes"] = max(run["peak_bytes"] for run in runs)
        extra |= {"plan": runs[-1]["plan"], "rank_threads": runs[-1]["rank_threads"]}
    backend = None if peer else variant.kernels + (" compiled" if variant.compile else "")
    return rows.add(
        timing=timing, unit=unit, work="train_step", case=case_of(variant), backend=backend, peer=peer,
        dtype=variant.dtype, ranks=ranks, loss=runs[-1]["loss"], **extra,
    )  # fmt: skip


def report_scaling(found: list[dict[str, Any]]) -> None:
    """Efficiency of every row against the one of a single rank."""
    single = {(r["case"], r["dtype"], r["backend"]): r for r in found if r["ranks"] == 1 and "backend" in r}
    for row in found:
        one = single.get((row["case"], row["dtype"], row.get("backend")))
        if one and row["ranks"] > 1:
            efficiency = row["tokens_per_s"] / one["tokens_per_s"] / row["ranks"]
            shared = "; its ranks share one CPU" if row["device"].startswith("cpu") else ""
            harness.say(f"{row['case']} on {row['ranks']} ranks: efficiency {efficiency:.0%}{shared}", "green")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="nanochat=PATH of a checkout of karpathy/nanochat")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--depth", type=int, nargs="+", default=[4])
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[8], help="rows of a micro-batch, per rank")
    parser.add_argument("--steps", type=int, default=8, help="of a run; the first is reported apart")
    parser.add_argument("--window-pattern", default="SSSL")
    parser.add_argument("--dtype", nargs="+", default=[], help="default: bfloat16 on CUDA, else float32; also fp8")
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--compile", action="store_true", help="compile our blocks, too (nanochat always compiles)")
    parser.add_argument("--ablate", action="store_true", help="also with every kernel alone turned off")
    parser.add_argument("--data", help="shards to read through the loader (default: random tokens)")
    parser.add_argument("--tokenizer", help="with --data: its folder")
    parser.add_argument("--out", help="file or folder for the rows (default: benchmarks/results/<device>)")
    args = parser.parse_args()
    device = harness.pick_device()
    args.dtype = args.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    if args.side:
        args.depth, args.rows, args.dtype, args.kernels = args.depth[0], args.rows[0], args.dtype[0], args.kernels[0]
        if result := ours(args):
            print(json.dumps(result))
        return 0
    rows, every = harness.Rows("train", device, args.out), variants(args, device)
    rows.ceilings  # noqa: B018  measured before anything else runs
    sides = {f"ours {case_of(v)} {v.dtype} {v.kernels} ×{v.ranks}": (v, None) for v in every}
    if args.peer:
        peer = Path(args.peer.removeprefix("nanochat="))
        sides |= {f"nanochat {case_of(v)} {v.dtype}": (v, peer) for v in every if v.dtype != "fp8"}
    runs = harness.interleave({name: side_of(*side) for name, side in sides.items()}, args.rounds)
    found = [record(rows, v, runs[name], "nanochat" if path else None) for name, (v, path) in sides.items()]
    rows.table(("tokens_per_s", "mfu", "gemm_share", "first_step_s", *(f"{name}_share" for name in PHASES)))
    report_scaling(found)
    peers = {(r["case"], r["dtype"]): r for r in found if "peer" in r}
    for row in found:
        if "peer" not in row and (theirs := peers.get((row["case"], compute_dtype(row["dtype"])))):
            ratio = row["tokens_per_s"] / theirs["tokens_per_s"]
            harness.say(f"{row['case']} {row['dtype']} {row['backend']}: {ratio:.2f} × nanochat", "green")
    return 0


if __name__ == "__main__":
    harness.run(main)
