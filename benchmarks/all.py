"""Everything that fits into --minutes, most valuable first; a part that fails does not stop the rest.

    nanochat bench all --minutes 10 [--peer nanochat=PATH] [--data FOLDER] [--dry]

The order is by what the figures decide: kernels (what `auto` takes), the training step, the estimator's error,
decoding, the loader and the tokenizer, evaluation, serving. On a CPU the sizes are d4 with 512 tokens, on a GPU d12 and
d24 with 2,048. Rows are written as measured: a part that is cut off keeps what it had. --dry runs the same commands
in sizes that take seconds: it finds typos before an expensive machine does.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from benchmarks import harness


@dataclass(frozen=True)
class Part:
    """A benchmark with its flags, and the most minutes it may take."""

    name: str
    flags: tuple[str, ...]
    minutes: float


def cpu_parts(peer: tuple[str, ...], data: tuple[str, ...], corpus: tuple[str, ...]) -> list[Part]:
    return [
        Part("kernels", ("--step", "d4", "--seconds", "0.3"), 4),
        Part("train", ("--depth", "4", "--steps", "4", *peer), 5 if peer else 2),
        Part("estimator", ("--machine", "here"), 1),
        Part("infer", ("--depth", "12", "--rounds", "3", "--decode", "64", *peer), 3),
        Part("loader", ("--repeats", "2", "--tokens", "4000000", *data), 2),
        Part("tokenizer", ("--repeats", "2", "--only", "encode", *corpus), 2),
        Part("kernels", ("--sizes", "model", "--modes", "decode", "--seconds", "0.3"), 2),
        Part("eval", ("--rounds", "1", "--limit", "15", *peer), 3),
        Part("serve", ("--depth", "4", "--requests", "16", "--scale", "0.2"), 2),
        Part("callgrind", (), 5),
        Part("train", ("--depth", "4", "--steps", "4", "--ablate", "--rounds", "1"), 5),
    ]


def gpu_parts(peer: tuple[str, ...], data: tuple[str, ...], corpus: tuple[str, ...]) -> list[Part]:
    d24 = ("--depth", "24", "--seq-len", "2048", "--rows", "16", "--steps", "10", "--compile")
    d12 = ("--depth", "12", "--seq-len", "2048", "--rows", "32", "--steps", "20", "--compile")
    graphs = "bf16,bf16-eager,torch-bf16,torch-bf16-eager"
    return [
        Part("kernels", (), 6),
        Part("train", (*d12, "--window-pattern", "L", *peer), 8),
        Part("infer", ("--depth", "20", "--batch", "1,8,64", *peer), 5),
        Part("train", (*d12, "--kernels", "auto", "fused", "--rounds", "1"), 5),
        Part("kernels", ("--step", "d12", "--seq-len", "2048", "--rows", "32", "--compile"), 8),
        Part("estimator", ("--depth", "12", "--seq-len", "2048", "--rows", "32", "--mode", "train-compiled"), 1),
        Part("serve", ("--depth", "20"), 4),
        Part("train", (*d24, "--dtype", "bfloat16", "fp8", "--rounds", "1", *peer), 9),
        Part("train", (*d12, "--kernels", "fused", "--ablate", "--rounds", "1"), 10),
        Part("loader", data, 2),
        Part("infer", ("--depth", "20", "--sides", graphs, "--batch", "1,8", "--rounds", "3"), 3),
        Part("infer", ("--depth", "12", "--batch", "1,64", "--prompt", "1920", "--rounds", "3"), 3),
        Part("infer", ("--depth", "24", "--batch", "1,8", "--rounds", "3"), 3),
        Part("eval", ("--depth", "12"), 3),
        Part("tokenizer", corpus, 3),
    ]


def dry_parts(parts: list[Part]) -> list[Part]:
    """Every benchmark once, in the smallest sizes that pass through all of its code."""
    tiny = {
        "kernels": ("--step", "d1", "--rows", "1", "--seq-len", "64", "--vocab-size", "512", "--seconds", "0.01"),
        "train": (
            "--depth",
            "1",
            "--vocab-size",
            "512",
            "--seq-len",
            "64",
            "--rows",
            "2",
            "--steps",
            "2",
            "--rounds",
            "1",
        ),
        "estimator": ("--depth", "1", "--vocab-size", "512", "--seq-len", "64", "--rows", "2", "--machine", "here"),
        "loader": ("--repeats", "1", "--tokens", "100000", "--threads", "1", "--seq-len", "256"),
        "tokenizer": ("--repeats", "1", "--only", "encode, nanochat, 1"),
        "eval": ("--depth", "1", "--limit", "11", "--rounds", "1"),
        "infer": ("--depth", "1", "--rounds", "1", "--decode", "8", "--prompt", "16", "--vocab-size", "512"),
        "serve": ("--depth", "1", "--requests", "3"),
        "callgrind": ("--only", "encode"),
    }
    return [Part(name, tiny[name], 2) for name in dict.fromkeys(part.name for part in parts)]


def run_part(part: Part, left: float, out: str | None) -> int | None:
    """Its exit code, or None when it ran out of time; its processes end with it."""
    limit = min(part.minutes * 60, left)
    harness.say(f"bench {part.name} {' '.join(part.flags)}: at most {limit:.0f} s", "bold")
    command = [sys.executable, "-P", "-m", f"benchmarks.{part.name}", *part.flags]
    command += ["--out", out] if out else []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as ended:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(ended, KeyboardInterrupt):
            raise
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--peer", help="nanochat=PATH of a checkout of karpathy/nanochat")
    parser.add_argument("--data", help="folder of parquet shards (default: the built-in corpus)")
    parser.add_argument("--only", nargs="+", default=[], help="parts to run")
    parser.add_argument("--dry", action="store_true", help="the smallest sizes, to find faults")
    parser.add_argument("--out", help="folder for the rows (default: benchmarks/results/<device>)")
    args = parser.parse_args()
    peer = ("--peer", args.peer) if args.peer else ()
    data, corpus = (("--data", args.data), ("--corpus", args.data)) if args.data else ((), ())
    parts = (gpu_parts if torch.cuda.is_available() else cpu_parts)(peer, data, corpus)
    parts = dry_parts(parts) if args.dry else parts
    here, begin, failed = harness.ROOT / "benchmarks", time.monotonic(), []
    for part in parts:
        left = args.minutes * 60 - (time.monotonic() - begin)
        if (args.only and part.name not in args.only) or not (here / f"{part.name}.py").exists():
            continue
        if left < 15:
            harness.say(f"no time left for {part.name} {' '.join(part.flags)}", "yellow")
            continue
        code = run_part(part, left, args.out)
        if code is None:
            harness.say(f"{part.name} ran out of time; the rows it had are kept", "yellow")
        elif code:
            failed.append(part.name)
            harness.say(f"{part.name} failed with {code}", "red")
    harness.say(
        f"{(time.monotonic() - begin) / 60:.1f} minutes; " + (f"failed: {', '.join(failed)}" if failed else "all done")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    harness.run(main)
