"""What every benchmark here stands on: cold inputs, a correctness gate, medians, rows, a table, peers.

A script is a module `benchmarks/NAME.py` with `def main() -> int` and, at its foot,

    if __name__ == "__main__":
        harness.run(main)                       # NanochatError becomes one message, Ctrl-C keeps the finished rows

run as `nanochat bench NAME [flags]` or `python -m benchmarks.NAME` (as a module, so that no file here shadows a package
of the same name; it begins with `from benchmarks import harness`). What it does, in order:

    device = harness.pick_device(args.device)
    rows = harness.Rows("infer", device, out=args.out)              # warns when the machine is not quiet
    rows.ceilings                                                   # measured: bandwidth, gemm[dtype], launch
    harness.require(plan, "cached_attention", "native")             # HarnessError when the plan took another backend
    harness.gate(op, "native", case, device, torch.bfloat16)        # HarnessError: wrong result, or a silent fallback
    timing = harness.measure(call, device, seconds=1.0)             # CPU: caches flushed; GPU: graph replay and events
    timing = harness.Timing(seconds)                                # or from times taken elsewhere, e.g. a peer's
    rows.add(work="decode", case="d12 b1", timing=timing, backend="native", dtype="bfloat16", mode="decode",
             cost=Cost(bytes, flops), unit={"tokens_per_s": 1 / timing.median})
    rows.table()                                                    # rich, on the terminal

    runs = harness.interleave({"ours": ours, "nanochat": peer}, rounds=3)      # A B A B, each call returns a dict
    result = harness.run_json([python, script, ...], isolated=True)            # a peer's process: its last line is JSON

A row is one JSON object, appended to benchmarks/results/<device class>/<name>.jsonl and flushed at once, so that an
interrupted run keeps what it measured. `median`, `p20`, `p80` and `samples` are seconds for one unit of work, whatever
the benchmark, so smaller is always better; rates and shares stand beside them. What identifies a row in `bench compare`
is KEY; `recorded.py` reads rows with op, backend, case, dtype and mode. Baselines carry `peer` instead of `backend`.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from nanochat.errors import NanochatError
from nanochat.measure import machine
from nanochat_kernels import KernelPlan, Op, verify
from nanochat_kernels.registry import REFERENCE, Case, Cost

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("op", "work", "case", "backend", "peer", "dtype", "mode", "threads", "device", "ranks")
SAMPLES_KEPT = 40  # in a row: enough for a bootstrap
EXACT_FLOPS = 2e9  # of a case: beyond this a CPU does not evaluate the reference in float64


class HarnessError(NanochatError):
    """A figure that would be a lie: the op is red, or another backend ran than the one asked for."""


@dataclass(frozen=True)
class Timing:
    """Seconds per unit of work, one value per sample."""

    samples: tuple[float, ...]

    def __init__(self, samples: Sequence[float]) -> None:
        if not samples:
            raise ValueError("a timing needs at least one sample")
        object.__setattr__(self, "samples", tuple(samples))

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def record(self) -> dict[str, Any]:
        """The fields of a row; of many samples every so-manyth is kept, in order, so that drift stays visible."""
        stride = -(-len(self.samples) // SAMPLES_KEPT)
        return {
            "median": _round(self.median),
            "p20": _round(self.quantile(0.2)),
            "p80": _round(self.quantile(0.8)),
            "count": len(self.samples),
            "samples": [_round(x) for x in self.samples[::stride]],
        }


def _round(x: float) -> float:
    return float(f"{x:.5g}")


def pick_device(name: str = "auto") -> torch.device:
    """auto: cuda where there is one, else cpu. float32 products may use TF32 on CUDA, as in training."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", device.index or 0)
    return device


# ---- correctness -----------------------------------------------------------------------------------------------------


def require(plan: KernelPlan, op: str, backend: str) -> None:
    """HarnessError unless the plan runs `op` on `backend`: a figure must carry the name of what ran."""
    choice = plan.choices[op]
    if choice.backend != backend:
        raise HarnessError(f"{op}: {backend} was asked for, {choice.backend} would run ({choice.reason}); no figure")


def gate(op: Op, backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """HarnessError where the backend's result or a gradient is wrong on this case, or where it runs the reference.

    The truth is the reference in float64 (see verify), to the op's tolerance. Where that takes too long on a CPU, and
    for cases that the op does not declare, the declared small and odd ones are held to it, and this case to the
    reference in its own dtype.
    """
    args, kwargs = case.make(device, dtype, torch.Generator().manual_seed(0))
    large = device.type == "cpu" and op.cost(args, kwargs).flops > EXACT_FLOPS
    large = large or case.name not in {declared.name for declared in _own_cases(op)}
    cases = [c for c in _own_cases(op) if c.size != "model" and dtype in c.dtypes] if large else [case]
    for row in (_checked(op, backend, each, device, dtype) for each in cases):
        if not row.ok:
            raise HarnessError(f"{op.name}={backend} is red ({row.summary()}): mend it, then measure; no figure")
    if backend == REFERENCE:
        return
    if large and (apart := _apart(op, backend, args, kwargs)) > verify.REFERENCE_FACTOR * op.tolerance.allowed(
        dtype, 0
    ):
        raise HarnessError(f"{op.name}={backend} is red ({case.name}: {apart:.2e} from the reference); no figure")
    if runs_the_reference(op, backend, case, device, dtype):
        raise HarnessError(
            f"{op.name}={backend} fell back silently: it runs the reference's operations, so a figure under its "
            "name would be the reference's; no figure"
        )


@functools.cache
def _own_cases(op: Op) -> tuple[Case, ...]:
    return tuple(op.cases())


@functools.cache
def _checked(op: Op, backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> verify.Row:
    return verify.check(op, backend, case, device, dtype)


def _apart(op: Op, backend: str, args: tuple, kwargs: dict) -> float:
    """The largest difference from the reference in the case's own dtype, gradients included."""
    bound = inspect.signature(op.reference).bind(*args, **kwargs)
    plain, ours = (verify.evaluate(op, op.load(name), bound) for name in (REFERENCE, backend))
    scales = {name: float(x.double().square().mean().sqrt()) for name, x in plain.items()}
    return max(verify.difference(ours[name], x, scales[name]) for name, x in plain.items())


def _operations(function: Callable, op: Op, case: Case, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The torch operations of one forward call that do not consist of others, in order, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    args, kwargs = case.make(device, dtype, torch.Generator().manual_seed(0))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        function(*args, **kwargs)
    events = [event for event in seen.events() if event.name.startswith("aten::")]
    trivial = ("aten::empty", "aten::as_strided", "aten::detach", "aten::resize_", "aten::to")
    return [e.name for e in events if not e.cpu_children and not e.name.startswith(trivial)]


def runs_the_reference(op: Op, backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call of the backend contains all operations of the reference, in order and without a gap.

    A backend that catches an error and calls the reference looks like this, also from inside a custom op. References
    of fewer than three operations are too short to tell.
    """
    ours, plain = (_operations(op.load(name), op, case, device, dtype) for name in (backend, REFERENCE))
    if len(plain) < 3:
        return False
    return any(ours[i : i + len(plain)] == plain for i in range(len(ours) - len(plain) + 1))


# ---- timing ----------------------------------------------------------------------------------------------------------


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache: what inputs must exceed to be cold."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(text[:-1]) * 1024 for path in caches if (text := path.read_text().strip()).endswith("K")]
    return max(sizes, default=32 * 2**20)


class Flush:
    """Empties the CPU's caches of what a benchmark uses, by reading a buffer twice as large as the largest one."""

    def __init__(self) -> None:
        self.buffer = torch.ones(2 * last_level_cache(torch.device("cpu")) // 4)

    def __call__(self) -> None:
        self.buffer.sum()


def measure(
    call: Callable[[], Any],
    device: torch.device,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    cold: bool = True,
    warmup: int = 2,
) -> Timing:
    """Time of one call: at least `least` samples, then until `seconds` of work or `most` samples.

    CPU: caches are flushed before every sample unless `cold` is False. CUDA: events around the call; for short kernels
    use `measure_graph`, because a launch from Python takes microseconds.
    """
    begin = time.perf_counter()
    call()
    if time.perf_counter() - begin < seconds:
        for _ in range(warmup - 1):
            call()
    else:
        least = min(least, 3)  # long calls vary little
    samples: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        flush = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device) if cold else None
        while len(samples) < least or (sum(samples) < seconds and len(samples) < most):
            if flush is not None:
                flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1000)
        return Timing(samples)
    clear = Flush() if cold else None
    while len(samples) < least or (sum(samples) < seconds and len(samples) < most):
        if clear is not None:
            clear()
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return Timing(samples)


def measure_graph(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float = 0.5) -> Timing:
    """CUDA: device time of one call, from replays of a graph that makes every call once, each on inputs of its own.

    Give as many calls as it takes for their inputs to exceed the cache together (`input_sets`), so that each is cold.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    timing = measure(graph.replay, device, seconds, cold=False)
    return Timing([sample / len(calls) for sample in timing.samples])


def input_sets(size: int, device: torch.device, most: int = 32) -> int:
    """How many sets of inputs of `size` bytes it takes to exceed the cache twice."""
    return max(1, min(most, -(-2 * last_level_cache(device) // max(size, 1))))


# ---- rows ------------------------------------------------------------------------------------------------------------


class Rows:
    """Appends rows to one file, shows progress, and prints them as a table at the end.

    out: a file, or a folder (default: benchmarks/results/<device class>). Every row carries the environment, whether
    the machine was quiet, and, with a cost, its shares of the measured ceilings.
    """

    def __init__(self, name: str, device: torch.device, out: Path | str | None = None) -> None:
        self.name, self.device = name, device
        self.environment = machine.environment(device)
        self.disturbed = machine.disturbances(device)
        folder = Path(out) if out else RESULTS / self.environment["device"]
        self.path = folder if folder.suffix == ".jsonl" else folder / f"{name}.jsonl"
        self.rows: list[dict[str, Any]] = []
        self._ceilings: machine.Ceilings | None = None
        for complaint in self.disturbed:
            say(f"the machine is not quiet: {complaint}; rows are marked, do not quote them", "yellow")

    @property
    def ceilings(self) -> machine.Ceilings:
        """Measured when first asked for, and then for all rows of this process."""
        if self._ceilings is None:
            self._ceilings = machine.ceilings(self.device)
        return self._ceilings

    def add(
        self, *, timing: Timing, cost: Cost | None = None, unit: Mapping[str, float] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Appends and returns a row. fields: those of KEY that apply, and whatever else belongs to the figure."""
        row = {name: value for name, value in fields.items() if value is not None} | timing.record()
        row |= {name: _round(value) for name, value in (unit or {}).items()}
        if cost is not None:
            row |= self.roofline(cost, timing.median, str(fields.get("dtype", "float32")))
        if self._ceilings is not None:
            limits = self._ceilings
            row["ceilings"] = {"bandwidth": _round(limits.bandwidth), "launch": _round(limits.launch)}
            row["ceilings"] |= {f"gemm {dtype}": _round(rate) for dtype, rate in limits.gemm.items()}
        row |= {"quiet": not self.disturbed, **self.environment}
        append(self.path, row)
        self.rows.append(row)
        name = " ".join(str(row[key]) for key in ("op", "work", "case", "backend", "peer", "dtype") if key in row)
        say(f"{name}: {human(timing.median)}")
        return row

    def add_copy(self, row: Mapping[str, Any], **fields: Any) -> None:
        """A second row from one measurement, where a figure speaks for two modes."""
        self.rows.append(dict(row) | fields)
        append(self.path, self.rows[-1])

    def roofline(self, cost: Cost, seconds: float, dtype: str) -> dict[str, Any]:
        """Bytes and FLOPs of a call, and the shares of the measured ceilings that it reached."""
        least = self.ceilings.least_seconds(cost.bytes, cost.flops, dtype)
        return {
            "bytes": cost.bytes,
            "flops": cost.flops,
            "bandwidth_share": _round(cost.bytes / seconds / self.ceilings.bandwidth),
            "flops_share": _round(cost.flops / seconds / self.ceilings.flops(dtype)),
            "roofline_share": _round(least / seconds),
        }

    def table(self, columns: Sequence[str] = (), title: str = "") -> None:
        """Prints this run's rows. columns: further fields to show; shares are shown as percentages."""
        if not self.rows:
            return
        from rich.table import Table

        first = ("op", "work", "case", "backend", "peer", "dtype", "mode", "ranks")
        rest = dict.fromkeys((*columns, "bandwidth_share", "flops_share", "roofline_share"))
        first, rest = ([name for name in names if any(name in row for row in self.rows)] for names in (first, rest))
        table = Table(title=title or f"{self.name} on {self.environment['device_name']}")
        for name in first:
            table.add_column(name)
        for name in ("median", "p20", "p80", *rest):
            table.add_column(name.replace("_share", ""), justify="right")
        for row in self.rows:
            times = [human(row[name]) for name in ("median", "p20", "p80")]
            table.add_row(*(str(row.get(n, "")) for n in first), *times, *(_cell(n, row.get(n)) for n in rest))
        terminal = console()
        terminal.print(table)
        terminal.print(f"{len(self.rows)} rows appended to {self.path}", markup=False)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_share"):
        return f"{100 * value:.1f}%"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One line, on the disk when this returns. A last line cut short by a kill is ended first, and readers skip it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell() and not _ends_a_line(path):
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; lines that are not rows are skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("median"), (int, float)):
            rows.append(row)
    return rows


def human(seconds: float) -> str:
    """12.3 ms and the like: three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def console() -> Any:
    from rich.console import Console

    console = Console(stderr=False, highlight=False, soft_wrap=True)
    console.width = max(console.width, 140)
    return console


def say(text: str, color: str = "dim") -> None:
    """One line of progress on stderr, so that stdout stays the result."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[{color}]{escape(text)}[/]")


def corpus_folder(data: str | None) -> str:
    """A folder of parquet shards: the one given, or the built-in corpus, generated on first use in the base folder."""
    if data:
        return data
    from nanochat.data.corpus import open_corpus
    from nanochat.data.sources import Request, parse_source

    parse_source("builtin").prepare(Request(shards=0, characters=None))
    return str(open_corpus("builtin").folder)


# ---- processes -------------------------------------------------------------------------------------------------------


def run_process(
    command: Sequence[str],
    isolated: bool = False,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Runs a process and returns its output. Peers run this way: their imports cannot touch ours.

    isolated: a base folder and compiler caches of its own, empty at the start. Raises NanochatError with the end of
    what it wrote to stderr when it fails or does not end in time.
    """
    name = " ".join(command[:4])
    with tempfile.TemporaryDirectory() if isolated else nullcontext() as folder:
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NANOCHAT_BASE_DIR")
        own = dict.fromkeys(names, folder) if folder else {}
        try:
            done = subprocess.run(
                command, env=os.environ | own | (env or {}), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as late:
            raise NanochatError(f"{name} did not end within {timeout:.0f} s") from late
    if done.returncode:
        end = "\n".join(done.stderr.splitlines()[-8:])
        raise NanochatError(f"{name} … ended with {done.returncode}:\n{end}")
    return done.stdout


def run_json(command: Sequence[str], **options: Any) -> dict[str, Any]:
    """Runs a process whose last line of output is a JSON object, and returns it. options: those of `run_process`."""
    output = run_process(command, **options).splitlines()
    try:
        return json.loads(output[-1])
    except (IndexError, ValueError) as error:
        raise NanochatError(f"{' '.join(command[:4])} … ended without a line of JSON") from error


def interleave(sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Calls the sides in turn, A B A B, so that a change of the machine's load touches all alike: side → results."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            say(f"round {number + 1} of {rounds}: {name}")
            runs[name].append(side())
    return runs


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main's exit code; user errors become one message, Ctrl-C says that rows were kept."""
    try:
        sys.exit(main() or 0)
    except NanochatError as error:
        say(f"error: {error}", "red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted: the rows measured so far are in their file", "yellow")
        sys.exit(130)
