"""The machine a figure was taken on: what it is, whether it was quiet, and what it can do at most.

A time means nothing without these. `environment` goes into every row; `disturbances` says what else was running;
`ceilings` are *measured*, because datasheets describe machines that nobody has: a virtual CPU shares its memory
controller, a GPU throttles at its power limit. Rooflines divide by the measured ceilings, MFU by the datasheet's peak
(model/costs.py), which is the field's convention.

    bandwidth   CPU: reading, all threads together. GPU: copying, bytes read plus bytes written
    gemm        square matrix products of random data (zeros run faster), by dtype
    launch      one tiny operation: dispatch on a CPU, a launch from Python on a GPU; `graph_launch` inside a CUDA graph
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from nanochat.doctor import cpu_name, read_bandwidth
from nanochat_kernels.recorded import device_class

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "nanochat-rustbpe", "liger-kernel", "flash-attn", "transformers", "vllm")
GPU_FACTS = {  # nvidia-smi's names: ours
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "celsius",
}
BUSY_CORES = 0.2  # of other processes: more than this is a disturbance


def _output(*command: str) -> str:
    """What a command prints, or nothing where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit(folder: Path = CHECKOUT) -> tuple[str, bool]:
    """(short hash of the checkout's HEAD, whether tracked files were changed since); ("unknown", False) elsewhere."""
    head = _output("git", "-C", str(folder), "rev-parse", "--short=10", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head or "unknown", bool(changed)


def versions() -> dict[str, str]:
    """Versions that decide about speed; distributions that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _smi(fields: str, device: torch.device, query: str = "gpu") -> list[list[str]]:
    index = str(device.index or 0)
    output = _output("nvidia-smi", f"--query-{query}={fields}", "--format=csv,noheader,nounits", f"--id={index}")
    return [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def environment(device: torch.device) -> dict[str, Any]:
    """What a row says about where it comes from: names, clocks, limits, versions, commit. Takes well under a second."""
    head, dirty = commit()
    record: dict[str, Any] = {
        "device": device_class(device),
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": head,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "versions": versions(),
    }
    if device.type == "cuda":
        names = ",".join(GPU_FACTS)
        cells = next(iter(_smi(names, device)), [])
        record["clocks"] = {ours: _number(cell) for ours, cell in zip(GPU_FACTS.values(), cells)}
        record["driver"] = next(iter(_smi("driver_version", device)), [""])[0]
    else:
        frequency = psutil.cpu_freq()
        record["clocks"] = {"cpu_mhz": round(frequency.current)} if frequency else {}
        record["driver"] = platform.release()
    return record


def disturbances(device: torch.device, seconds: float = 0.3) -> list[str]:
    """What would falsify a measurement now: other processes on the CPU or the GPU, throttled clocks. Empty: quiet."""
    own, times = psutil.Process(), psutil.cpu_times()
    begin, mine = time.perf_counter(), sum(own.cpu_times()[:4])
    time.sleep(seconds)
    passed = time.perf_counter() - begin
    after = psutil.cpu_times()
    total = sum(after) - sum(times)
    idle = (after.idle - times.idle) + getattr(after, "iowait", 0.0) - getattr(times, "iowait", 0.0)
    cores = os.cpu_count() or 1
    busy = cores * (1 - idle / total) if total > 0 else 0.0
    others = busy - (sum(own.cpu_times()[:4]) - mine) / passed
    found = [f"other processes keep {others:.1f} of {cores} CPUs busy"] if others > BUSY_CORES else []
    if device.type == "cuda":
        ids = [int(row[0]) for row in _smi("pid", device, "compute-apps") if row and row[0].isdigit()]
        strangers = [str(pid) for pid in ids if pid != os.getpid()]
        found += [f"other processes use the GPU: {', '.join(strangers)}"] if strangers else []
        throttled = next(iter(_smi("clocks_throttle_reasons.active", device)), ["0"])[0]
        idle_or_app = {0, 1, 2}  # nothing, GPU idle, application clocks
        if throttled.startswith("0x") and int(throttled, 16) not in idle_or_app:
            found.append(f"clocks are throttled (nvidia-smi's reasons: {throttled})")
    return found


@dataclass(frozen=True)
class Ceilings:
    """What the machine did at best: bytes/s, FLOP/s by dtype, seconds per launch."""

    device: str
    threads: int
    bandwidth: float
    gemm: dict[str, float] = field(default_factory=dict)
    launch: float = 0.0
    graph_launch: float = 0.0

    def flops(self, dtype: torch.dtype | str) -> float:
        """The matrix-product ceiling of a dtype. On a CPU the fastest of all: where 16 bits are emulated, ops widen."""
        fastest = max(self.gemm.values(), default=float("nan"))
        return fastest if self.device.startswith("cpu") else self.gemm.get(str(dtype).removeprefix("torch."), fastest)

    def least_seconds(self, moved: float, flops: float, dtype: torch.dtype | str) -> float:
        """The roofline: what `moved` bytes and `flops` operations take at least."""
        return max(moved / self.bandwidth, flops / self.flops(dtype))


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """Measured once per process and device: about 2 s. Threads are torch's at the first call."""
    return _gpu_ceilings(device) if device.type == "cuda" else _cpu_ceilings(device)


def _best(work: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _cpu_ceilings(device: torch.device) -> Ceilings:
    gemm = {}
    for dtype in (torch.float32, torch.bfloat16):
        size, seconds = 512, 0.0
        while seconds < 0.04 and size <= 4096:  # large enough to last, small enough for emulated bf16
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            seconds = _best(lambda a=a, b=b: a @ b, 4)  # type: ignore[misc]
            gemm[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
            size *= 2
    x = torch.zeros(1)
    launch = _best(lambda: [x.add(1) for _ in range(1000)], 5) / 1000
    return Ceilings(device_class(device), torch.get_num_threads(), read_bandwidth(repeats=8), gemm, launch)


def _gpu_seconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Device time of one call: the best of `repeats`, between events."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return best


def _gpu_ceilings(device: torch.device) -> Ceilings:
    gemm, x = _gpu_gemm(device, 8192), torch.zeros(1, device=device)

    def launches(count: int = 1000) -> None:
        for _ in range(count):
            x.add_(1)

    def launch_and_wait() -> None:
        launches()
        torch.cuda.synchronize()

    launch_and_wait()
    launch = _best(launch_and_wait, 5) / 1000
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    inside = _gpu_seconds(graph.replay) / 1000
    return Ceilings(device_class(device), torch.get_num_threads(), _gpu_copy(device), gemm, launch, inside)


def _gpu_copy(device: torch.device, size: int = 2**30) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _gpu_seconds(lambda: target.copy_(source))


def _gpu_gemm(device: torch.device, size: int) -> dict[str, float]:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    half = a[: size // 2, : size // 2].float()
    gemm = {
        "bfloat16": 2 * size**3 / _gpu_seconds(lambda: a @ b),
        "float32": 2 * (size // 2) ** 3 / _gpu_seconds(lambda: half @ half),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
        product = functools.partial(torch._scaled_mm, a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        gemm["float8"] = 2 * size**3 / _gpu_seconds(lambda: product(use_fast_accum=True))
    return gemm
