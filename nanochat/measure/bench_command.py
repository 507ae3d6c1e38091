"""`nanochat bench NAME [flags]`: runs a script of the checkout's benchmarks/ folder.

The measuring scripts and their rows belong to a checkout, not to the installed package: a row names a commit. This
command finds them, runs them as modules in a process of their own, and hands their flags through untouched, so a
script's own --help is the reference.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat.errors import NanochatError, UsageError
from nanochat.measure.machine import CHECKOUT

SCRIPTS = {  # name: what it does; the module is benchmarks/<name>.py
    "kernels": "every op × backend × case: time, share of the roofline, baselines and peers",
    "train": "a training step: tokens/s, MFU, where the time goes, memory, time to the first step",
    "infer": "prefill and decode: tokens/s, bandwidth, beside peers",
    "serve": "the engine under load: throughput and latency",
    "serve_online": "the server over HTTP under load",
    "tokenizer": "encoding and training, beside tiktoken, rustbpe and gigatoken",
    "loader": "from parquet to packed rows, beside what training takes",
    "eval": "CORE examples per second",
    "callgrind": "instruction counts of native code, free of noise, against recorded allowances",
    "estimator": "predicted step time, MFU, memory and time to GPT-2, beside what was measured",
    "scaling": "loss against compute, parameters and tokens of a miniseries, and the next depth",
    "all": "the above within --minutes N, most valuable first",
    "compare": "two files or commits, row by row: ratio, confidence interval, verdict; exit 1 on a regression",
    "report": "the rows as a page with plots, and the README's tables",
}


def folder() -> Path:
    """The checkout's benchmarks/. Raises NanochatError where nanochat was installed without one."""
    found = CHECKOUT / "benchmarks"
    if not (found / "harness.py").exists():
        raise NanochatError(
            f"the benchmarks are part of a checkout, and {found} is not there: clone the repository and install it "
            "with `pip install --no-build-isolation -e .`, or run `nanochat profile`, which needs no checkout"
        )
    return found


def help_text() -> str:
    """The list of benchmarks."""
    width = max(map(len, SCRIPTS))
    lines = ["usage: nanochat bench <name> [--flags]        nanochat bench <name> --help lists the flags", ""]
    return "\n".join([*lines, *(f"  {name:<{width}}  {what}" for name, what in SCRIPTS.items())])


def run(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name not in SCRIPTS:
        close = difflib.get_close_matches(name, SCRIPTS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"unknown benchmark {name!r}; {hint}there are {', '.join(SCRIPTS)}")
    scripts = folder()
    if not (scripts / f"{name}.py").exists():
        raise NanochatError(f"this checkout has no {scripts / name}.py")
    root = scripts.parent
    paths = os.pathsep.join(filter(None, (str(root), str(root / "kernels"), os.environ.get("PYTHONPATH"))))
    # -P keeps the current folder off the path: it may hold modules that shadow ours
    command = [sys.executable, "-P", "-m", f"benchmarks.{name}", *rest]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}).returncode
