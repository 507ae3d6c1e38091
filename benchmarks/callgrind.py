"""Instruction counts of native code: a regression check that no other process can disturb.

    nanochat bench callgrind [--only encode] [--record]

Each work runs once under valgrind's callgrind, which simulates the processor and counts what it executes between two
markers around the work itself (start-up, imports and inputs are outside). A count says nothing about caches, but it
repeats: what changes it is a change of the code or of its compiler. So it is compared with the recorded count in
benchmarks/callgrind.json, and more than the threshold is red (exit 1):

    2%   the tokenizer and the packer: counts repeat to about 0.1% (addresses decide which of two paths a memory copy
         takes), another release of the compiler moves them by about 1%
    4%   CPU kernels: their loops are the same, but torch's dispatch is inside the markers and changes with torch

After a deliberate change: --record, with the reason in the commit. Needs valgrind and a C compiler (for the markers).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.callgrind_works import RUST, works
from nanochat.errors import NanochatError, UsageError
from nanochat_kernels import native

RECORDED = Path(__file__).with_name("callgrind.json")
MARKERS = """#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def compile_markers(folder: Path) -> Path:
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if not shutil.which("valgrind") or compiler is None:
        raise NanochatError("instruction counts need valgrind and a C compiler: apt-get install valgrind gcc")
    source, library = folder / "markers.c", folder / "markers.so"
    source.write_text(MARKERS, encoding="utf-8")
    harness.run_process([compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)])
    return library


def count(names: Sequence[str], folder: Path, markers: Path) -> dict[str, float]:
    """Instructions per unit of each work, from one process: its imports are the slow part."""
    tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder / 'counted'}"]
    command = [*tool, sys.executable, "-P", "-m", "benchmarks.callgrind_works", str(markers), *names]
    root = str(harness.ROOT)
    paths = os.pathsep.join(filter(None, (root, f"{root}/kernels", os.environ.get("PYTHONPATH"))))
    env = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    output = harness.run_process(command, env=env)
    units = {name: int(number) for number, name in re.findall(r"^units (\d+) (.+)$", output, re.M)}
    totals: dict[str, int] = {}
    for dump in sorted(folder.glob("counted.*")):
        text = dump.read_text(errors="replace")
        trigger, total = re.search(r"Client Request: (.+)", text), re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        if trigger and total:
            totals[trigger[1].strip()] = int(total[1])
        dump.unlink()
    missing = [name for name in names if name not in units or name not in totals]
    if missing:
        raise NanochatError(f"callgrind counted nothing for {', '.join(missing)}:\n{output[-500:]}")
    return {name: totals[name] / units[name] for name in names}


def judge(found: float, recorded: float | None, threshold: float) -> str:
    """ "ok", "new", "fewer" (worth recording) or "RED"."""
    if recorded is None:
        return "new"
    if found > recorded * (1 + threshold):
        return "RED"
    return "fewer" if found < recorded * (1 - threshold) else "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="works whose name contains this")
    parser.add_argument("--record", action="store_true", help="accept what is counted as the new counts")
    parser.add_argument("--out", help="accepted for the sake of `bench all`: counts are kept in callgrind.json")
    args = parser.parse_args()
    from rich.table import Table

    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    chosen = [work for work in works() if args.only in work.name]
    if (reason := native.missing()) is not None:
        harness.say(f"CPU kernels left out: {reason}", "yellow")
    if not chosen:
        raise UsageError(f"no work's name contains {args.only!r}; there are {', '.join(work.name for work in works())}")
    table, red = Table("work", "instructions", "per", "recorded", "change", "allowed", "verdict"), 0
    with tempfile.TemporaryDirectory() as temporary:
        markers = compile_markers(Path(temporary))
        harness.say(f"counting {', '.join(work.name for work in chosen)}")
        rust = [work.name for work in chosen if work in RUST]
        others = [work.name for work in chosen if work not in RUST]
        counts = {n: c for names in (rust, others) if names for n, c in count(names, Path(temporary), markers).items()}
        for work in chosen:
            found, before = counts[work.name], recorded.get(work.name)
            verdict = judge(found, before, work.threshold)
            red += verdict == "RED" and not args.record
            change = f"{found / before - 1:+.2%}" if before else ""
            cells = (f"{found:,.1f}", work.unit, f"{before:,.1f}" if before else "", change, f"+{work.threshold:.0%}")
            table.add_row(work.name, *cells, verdict)
            if args.record:
                recorded[work.name] = round(found, 1)
    harness.console().print(table)
    if args.record:
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    return int(red > 0)


if __name__ == "__main__":
    harness.run(main)
