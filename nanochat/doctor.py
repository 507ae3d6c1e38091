"""`nanochat doctor`: what this machine offers to the pipeline, what is missing, and how to get it.

Each check is a small function that returns findings; none of them raises, because a machine with a fault is what the
command is for. It ends with one number that bounds generation on a CPU: every decoded token reads all weights once, so
tokens/s ≤ read bandwidth ÷ bytes of weights.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from nanochat.runtime import base_dir

SIMD_FLAGS = "avx2 fma avx512f avx512_vnni avx512_bf16 amx_tile amx_bf16 neon asimd bf16 sve".split()
EXTRAS = {  # distribution: the extra that brings it
    "flash-attn": "flash",
    "kernels": "hub-kernels",
    "fastapi": "serve",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
}
GIB = 2**30


@dataclass(frozen=True)
class DoctorConfig:
    """Looks at this machine: Python, torch, GPU, CPU, compilers, built extensions, memory, disk, read bandwidth."""

    json: bool = False
    """Print the findings as JSON instead of a list."""
    bandwidth: bool = True
    """Measure the memory's read bandwidth (256 MiB, well under a second)."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination. `state`: ok, note (works without it, less well), missing (the pipeline needs it)."""

    area: str
    name: str
    value: str
    state: Literal["ok", "note", "missing"] = "ok"
    remedy: str = ""


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    """The version of an installed distribution. Import names will not do: our folder `kernels` looks like a package."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding(
        "software",
        "python",
        f"{platform.python_version()} ({sys.prefix})",
        "missing" if old else "ok",
        "nanochat needs Python 3.11 or newer: remove .venv, then bash runs/setup.sh" if old else "",
    )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("software", "torch", f"{torch.__version__} ({build})")
    yield Finding("software", "triton", _version("triton") or "none (it comes with torch on Linux)")
    versions = {name: _version(name) for name in EXTRAS}
    there = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [EXTRAS[name] for name, version in versions.items() if not version]
    remedy = f"pip install --no-build-isolation -e '.[NAME]' with {', '.join(absent)}" if absent else ""
    yield Finding("software", "extras", ", ".join(there) or "none installed", "note" if absent else "ok", remedy)


def check_gpu() -> Iterator[Finding]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            value = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
            yield Finding("GPU", f"cuda:{index}", f"{value}, {gpu.multi_processor_count} SMs")
        yield Finding("GPU", "driver", driver.splitlines()[0] if driver else "unknown")
    elif driver:
        remedy = "torch cannot use it; below 580: remove .venv, then NANOCHAT_TORCH=cuda12 bash runs/setup.sh"
        yield Finding("GPU", "driver", driver.splitlines()[0], "missing", remedy)
    else:
        yield Finding("GPU", "cuda", "none: the pipeline runs on the CPU", "note", "depth 12 and more want a GPU")
    if torch.backends.mps.is_available():
        yield Finding("GPU", "mps", "available")


def simd_flags() -> list[str]:
    """The vector instruction sets of this CPU that matter to the kernels, as the operating system names them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        words = set(cpuinfo.read_text(errors="replace").split())
        return [flag for flag in SIMD_FLAGS if flag in words]
    return [torch.backends.cpu.get_cpu_capability().lower()]


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def check_cpu(measure: bool) -> Iterator[Finding]:
    threads = torch.get_num_threads()
    cores = f"{psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads"
    yield Finding("CPU", "model", f"{cpu_name()}, {cores}, torch uses {threads}")
    yield Finding("CPU", "SIMD", " ".join(simd_flags()) or "none of " + ", ".join(SIMD_FLAGS))
    if measure:
        yield Finding("CPU", "read bandwidth", f"{read_bandwidth() / 1e9:.1f} GB/s with {threads} threads")


def read_bandwidth(size: int = 256 * 2**20, repeats: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the best of `repeats` sums over `size` bytes."""
    data = torch.ones(size // 4)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def find_nvcc() -> str | None:
    """nvcc from PATH, CUDA_HOME, the usual folder, or NVIDIA's wheels."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *(f"{path}/nvidia/cu13" for path in sys.path)]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and Path(path).is_file()), None)


def check_compilers() -> Iterator[Finding]:
    cxx = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if cxx:
        yield Finding("compilers", "C++", (_output(cxx, "--version") or cxx).splitlines()[0])
    else:
        yield Finding("compilers", "C++", "none", "note", "torch.compile and csrc/ need one: apt-get install g++")
    nvcc = find_nvcc()
    if nvcc:
        release = re.search(r"release ([\d.]+)", _output(nvcc, "--version") or "")
        yield Finding("compilers", "nvcc", f"{release[1] if release else 'unknown version'} ({nvcc})")
    else:
        yield Finding("compilers", "nvcc", "none", "note", "only to build CUDA kernels: CUDA toolkit 13.0")
    cargo = _output("cargo", "--version")
    remedy = "" if cargo else "builds the tokenizer: https://rustup.rs"
    yield Finding("compilers", "cargo", cargo or "none", "ok" if cargo else "note", remedy)


def check_built() -> Iterator[Finding]:
    tokenizer = _version("nanochat-rustbpe")
    remedy = "" if tokenizer else "bash runs/setup.sh (or: pip install ./rustbpe)"
    yield Finding("built", "rustbpe", tokenizer or "not built", "ok" if tokenizer else "missing", remedy)
    yield from check_extension()


def check_extension() -> Iterator[Finding]:
    """What of csrc/ was built, for which chips, and which SIMD level runs."""
    from nanochat_kernels import native

    reason = native.missing()
    if reason:
        yield Finding("built", "C++ extension", "none: ops run on their torch backends", "note", reason)
        return
    facts = native.bindings()
    chips = f"CUDA for {facts.cuda_archs}" if facts.cuda else "no CUDA kernels"
    remedy = "" if facts.cuda or not torch.cuda.is_available() else "NANOCHAT_BUILD=cuda with nvcc, then setup again"
    value = f"CPU and {chips}" if facts.cuda else f"CPU, {chips}"
    yield Finding("built", "C++ extension", f"{value} ({facts.compiler})", "note" if remedy else "ok", remedy)
    try:
        level = facts.simd_level()
    except RuntimeError as error:  # NANOCHAT_SIMD names one that this CPU lacks
        yield Finding("built", "SIMD kernels", str(error), "missing", "unset NANOCHAT_SIMD")
        return
    slow = level == "portable"
    remedy = "no SIMD kernels for this CPU: generation runs, slowly" if slow else ""
    yield Finding("built", "SIMD kernels", f"{level} runs, of {facts.simd_levels()}", "note" if slow else "ok", remedy)


def check_space() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("space", "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available")
    folder = base_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    enough = free >= 2
    remedy = "" if enough else "less than 2 GiB: free some, or point NANOCHAT_BASE_DIR at another disk"
    yield Finding("space", "disk", f"{free:.1f} GiB free under {folder}", "ok" if enough else "note", remedy)
    if not os.access(existing, os.W_OK):
        yield Finding("space", "base folder", f"{existing} is not writable", "missing", "set NANOCHAT_BASE_DIR")


def examine(config: DoctorConfig) -> list[Finding]:
    """All findings, in the order in which they are printed."""
    checks = (check_python(), check_gpu(), check_cpu(config.bandwidth), check_compilers(), check_built(), check_space())
    return [finding for check in checks for finding in check]


def run(config: DoctorConfig) -> int:
    """Prints the findings; 1 when something that the pipeline needs is missing."""
    findings = examine(config)
    if config.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_list(findings)
    return int(any(finding.state == "missing" for finding in findings))


def _print_list(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape

    marks = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "missing": "[bold red]✗[/]"}
    console, area = Console(highlight=False, soft_wrap=True), ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            console.print(f"[bold]{area}[/]")
        remedy = f" [dim]→ {escape(finding.remedy)}[/]" if finding.remedy else ""
        console.print(f"  {marks[finding.state]} {finding.name:<15} {escape(finding.value)}{remedy}")
