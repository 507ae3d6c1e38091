"""Tokens per second of a training step, alone or interleaved with karpathy/nanochat's.

    python benchmarks/train.py --dtype bfloat16 [--peer nanochat=PATH] [--rounds 2]

Every run is a process of its own with caches of its own, so that the first step is a cold one: its time counts from the
model's creation to the end of the first update, compiling included. Both sides make identical steps (random tokens,
same shapes, optimizer included); ours feeds nothing from disk and neither does the checkout. Rounds alternate A B A B,
and the ratio is that of the medians over all rounds. The last line is one JSON row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = ("depth", "vocab_size", "seq_len", "rows", "steps", "window_pattern", "dtype")


def ours(args: argparse.Namespace) -> dict:
    """One run in this process: {"first_step_s", "step_s": [...], "loss"}."""
    import torch

    from nanochat.model.config import GPTConfig
    from nanochat.model.gpt import GPT
    from nanochat.runtime import start
    from nanochat.training.optimizer import MuonAdamW, parameter_groups
    from nanochat.training.schedules import MUON_DECAY, REFERENCE_BATCH, rates_at
    from nanochat_kernels import KernelPlan

    runtime = start(dtype=args.dtype)
    began = time.perf_counter()
    config = GPTConfig.from_depth(args.depth, args.vocab_size, args.seq_len, window_pattern=args.window_pattern)
    mode = "train-compiled" if args.compile else "train-eager"
    plan = KernelPlan.resolve(args.kernels, device=runtime.device, dtype=runtime.dtype, mode=mode)
    model = GPT(config, plan, runtime.dtype).to(runtime.device)
    model.init_weights()
    parameters = dict(model.named_parameters())
    lr_scale = (args.rows * args.seq_len / REFERENCE_BATCH) ** 0.5
    groups = parameter_groups(parameters, config.width, lr_scale, MUON_DECAY)
    optimizer = MuonAdamW(parameters, groups, plan, runtime)
    if args.compile:
        model.compile_blocks()
    draw = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(args.steps):
        tokens = torch.randint(0, args.vocab_size, (args.rows, args.seq_len + 1), generator=draw).to(runtime.device)
        begin = time.perf_counter()
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step(rates_at(step, 1000))
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if step == 0:
            first = time.perf_counter() - began
    return {"first_step_s": first, "step_s": seconds[1:], "loss": loss.item()}


def run_side(side: str, args: argparse.Namespace, peer: Path | None) -> dict:
    here = Path(__file__)
    options = [part for name in SHAPE for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    if side == "ours":
        command = [sys.executable, str(here), "--side", "ours", "--kernels", args.kernels, *options]
        command += ["--compile"] if args.compile else []
    else:
        command = [sys.executable, str(here.with_name("nanochat_peer.py")), "speed", "--peer", str(peer), *options]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, "NANOCHAT_BASE_DIR": folder}
        output = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="nanochat=PATH of a checkout of karpathy/nanochat")
    parser.add_argument("--side", choices=["ours"], help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--window-pattern", default="SSSL")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile our blocks, too")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args)))
        return
    peer = Path(args.peer.removeprefix("nanochat=")) if args.peer else None
    sides = ["ours", "peer"] if peer else ["ours"]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            runs[side].append(run_side(side, args, peer))
            latest = runs[side][-1]
            rate = args.rows * args.seq_len / statistics.median(latest["step_s"])
            print(
                f"round {number} {side:5} {rate:8.0f} tokens/s, first step {latest['first_step_s']:.1f} s", flush=True
            )
    row = {name: getattr(args, name) for name in SHAPE} | {"work": "train_step", "rounds": args.rounds}
    for side in sides:
        seconds = sorted(s for run in runs[side] for s in run["step_s"])
        row[side] = {
            "tokens_per_s": round(args.rows * args.seq_len / statistics.median(seconds), 1),
            "p20_s": seconds[len(seconds) // 5],
            "p80_s": seconds[len(seconds) * 4 // 5],
            "first_step_s": round(statistics.median(run["first_step_s"] for run in runs[side]), 1),
        }
    if peer:
        row["ratio"] = round(row["ours"]["tokens_per_s"] / row["peer"]["tokens_per_s"], 3)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
