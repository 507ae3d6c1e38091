#!/usr/bin/env python3
"""What nvcc makes of every CUDA kernel, known without a GPU: python csrc/compile_check.py [--record] [FILE.cu …]

Each .cu file is compiled for sm_90a and the assembler's report is read: registers per thread, bytes of stack and of
spills, static shared memory. allowances.json beside this file records what was seen and accepted; more is red.
After a deliberate change: --record. nvcc is taken from PATH, CUDA_HOME or NVIDIA's wheels (the dev extra brings them).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ALLOWANCES = CSRC / "allowances.json"
FLAGS = ("-O3", "-std=c++20", "-Werror=all-warnings", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin")
Facts = dict[str, int]


def find_nvcc() -> str | None:
    """nvcc from PATH, CUDA_HOME, the usual folder, or NVIDIA's wheels."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *(f"{path}/nvidia/cu13" for path in sys.path)]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def compile_file(path: Path, nvcc: str) -> dict[str, Facts]:
    """Kernel name → facts. Raises RuntimeError with nvcc's words when it does not compile without a warning."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, str(path), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path.name} does not compile:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return read_report(done.stdout + done.stderr)


def read_report(report: str) -> dict[str, Facts]:
    """Facts of every kernel in what `ptxas -v` prints."""
    names, found = re.findall(r"Compiling entry function '(\w+)'", report), {}
    filtered = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True) if names else None
    readable = dict(zip(names, filtered.stdout.splitlines() if filtered else (), strict=True))
    for part in report.split("Compiling entry function ")[1:]:
        match = re.match(r"'(\w+)'", part)
        usage = re.search(r"Used (\d+) registers(.*)", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not (match and usage and stack):
            raise RuntimeError(f"the assembler's report is not as expected: {part[:500]}")
        shared = re.search(r"(\d+) bytes smem", usage[2])
        found[_short(readable[match[1]])] = {
            "registers": int(usage[1]),
            "spill_bytes": sum(int(number) for number in stack.groups()),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return found


def _short(name: str) -> str:
    """thin_linear_kernel<fp8, 2> from the whole signature."""
    name = re.sub(r"nanochat::|\(anonymous namespace\)::|^void ", "", name)
    return name[: name.rindex("(")]


def compare(facts: Facts, allowed: Facts | None) -> list[str]:
    """What is worse than allowed."""
    if allowed is None:
        return ["no allowance recorded"]
    return [f"{key} {facts[key]} > {allowed[key]}" for key in allowed if facts[key] > allowed[key]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(CSRC.glob("*.cu")))
    parser.add_argument("--record", action="store_true", help="accept what is seen")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc not found: set CUDA_HOME, or pip install the dev extra", file=sys.stderr)
        return 2
    recorded = json.loads(ALLOWANCES.read_text(encoding="utf-8")) if ALLOWANCES.exists() else {}
    red = 0
    for path in options.files:
        seen = compile_file(path, nvcc)
        for name, facts in seen.items():
            complaints = [] if options.record else compare(facts, recorded.get(path.name, {}).get(name))
            red += bool(complaints)
            numbers = "  ".join(f"{key} {value}" for key, value in facts.items())
            print(f"{path.name:26} {name:60} {numbers}  {'; '.join(complaints) or 'ok'}")
        recorded[path.name] = seen
    if options.record:
        ALLOWANCES.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
