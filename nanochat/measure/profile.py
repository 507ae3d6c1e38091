"""`nanochat profile train|infer|kernel NAME`: where the time of a step goes, by kernel and by operation.

Writes a trace for Perfetto (ui.perfetto.dev, or chrome://tracing), and prints two tables: by kernel what the device ran
(on a CPU: torch's innermost operations), and by operation of the kernel plan with launches, achieved bytes/s and FLOP/s
beside the measured ceilings, and the gap: the seconds above the roofline, which is what there is to win.

On CUDA, ranges are visible to Nsight (NVTX), a memory snapshot for pytorch.org/memory_viz is written, and a line for
Nsight Compute is printed. The plan's calls are wrapped in named ranges for the profiled steps only: the model is given
a plan whose callables announce themselves, so nothing is patched and nothing is slower outside this command.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat.errors import NanochatError, UsageError
from nanochat.measure import machine
from nanochat.measure.inventory import forward_cost, training_cost
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import DeviceName, DtypeName, Runtime, base_dir, start
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.schedules import MUON_DECAY, rates_at
from nanochat_kernels import OPS, KernelPlan

PREFIX = "op:"  # of the ranges around the plan's calls


@dataclass(frozen=True)
class ProfileConfig:
    """Traces a training step, decoding, or one kernel; prints time by kernel and by op beside the ceilings."""

    what: tyro.conf.Positional[Literal["train", "infer", "kernel"]]
    """What to trace."""
    name: tyro.conf.Positional[str] = ""
    """With kernel: the op, or op=backend."""
    depth: int = 4
    """Layers of the model."""
    rows: int = 8
    """Rows of a batch."""
    seq_len: int = 512
    """Tokens of a row; with infer, of the prompt."""
    vocab_size: int = 32768
    """Vocabulary."""
    steps: int = 3
    """Steps in the trace, after one that warms up; with infer, decoded tokens."""
    kernels: str = "auto"
    """auto, torch, fused, or op=backend,..."""
    compile: bool = False
    """With train: compile the blocks. Calls inside them are then one graph and have no ranges of their own."""
    device: DeviceName = "auto"
    """auto, cpu or cuda."""
    dtype: DtypeName = "auto"
    """Compute dtype."""
    top: int = 20
    """Lines of the table by kernel."""
    out: Path | None = None
    """Folder for the trace (default: `profile` in NANOCHAT_BASE_DIR)."""


@contextlib.contextmanager
def named(label: str) -> Iterator[None]:
    """A range that torch's profiler shows and, on CUDA, Nsight too."""
    nvtx = torch.cuda.nvtx.range(label) if torch.cuda.is_available() else contextlib.nullcontext()
    with record_function(label), nvtx:
        yield


@dataclass
class Call:
    """What was seen of one op of the plan: calls, and what they cost by the op's declaration."""

    calls: int = 0
    bytes: float = 0.0
    flops: float = 0.0


class AnnouncingPlan(KernelPlan):
    """A plan whose callables run inside a range with their name, and note their cost.

    seen: op → `Call`, filled while `counting` holds a key.
    """

    seen: dict[str, Call]
    counting: dict[str, bool]

    def __init__(self, plan: KernelPlan, training: bool) -> None:
        super().__init__(plan.choices, "profiled")
        object.__setattr__(self, "seen", {})
        object.__setattr__(self, "counting", {})
        for name in plan.choices:
            object.__setattr__(self, name, self._announced(name, getattr(plan, name), training))

    def _announced(self, name: str, function: Callable[..., Any], training: bool) -> Callable[..., Any]:
        op, label = OPS[name], f"{PREFIX}{name}"
        cost_of = training_cost if training else forward_cost

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.counting:
                entry = self.seen.setdefault(name, Call())
                given = args
                while given and given[-1] is None:  # costs are declared for the arguments that are there
                    given = given[:-1]
                with contextlib.suppress(ValueError, TypeError):
                    cost = cost_of(op, given, kwargs)
                    entry.bytes, entry.flops = entry.bytes + cost.bytes, entry.flops + cost.flops
                entry.calls += 1
            with named(label):
                return function(*args, **kwargs)

        return call


def _train_work(config: ProfileConfig, runtime: Runtime) -> tuple[Callable[[], None], AnnouncingPlan]:
    gpt = GPTConfig.from_depth(config.depth, config.vocab_size, config.seq_len)
    mode = "train-compiled" if config.compile else "train-eager"
    chosen = KernelPlan.resolve(config.kernels, runtime.device, runtime.dtype, mode)
    plan = AnnouncingPlan(chosen, training=True)
    model = GPT(gpt, chosen if config.compile else plan, runtime.dtype).to(runtime.device)
    model.init_weights()
    parameters = dict(model.named_parameters())
    optimizer = MuonAdamW(parameters, parameter_groups(parameters, gpt.width, 0.1, MUON_DECAY), plan, runtime)
    if config.compile:
        model.compile_blocks()
    tokens = torch.randint(0, config.vocab_size, (config.rows, config.seq_len + 1), device=runtime.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with named("forward"):
            loss = model(inputs, targets)
        with named("backward"):
            loss.backward()
        with named("optimizer"):
            optimizer.step(rates_at(100, 1000))

    return step, plan


def _infer_work(config: ProfileConfig, runtime: Runtime) -> tuple[Callable[[], None], AnnouncingPlan]:
    from nanochat.inference.kv_cache import KVCache

    context = config.seq_len + 4 * config.steps + 8
    gpt = GPTConfig.from_depth(config.depth, config.vocab_size, context)
    plan = AnnouncingPlan(KernelPlan.resolve(config.kernels, runtime.device, runtime.dtype, "decode"), training=False)
    model = GPT(gpt, plan, runtime.dtype).to(runtime.device)
    model.init_weights()
    prompt = torch.randint(0, config.vocab_size, (config.rows, config.seq_len), device=runtime.device)
    cache = KVCache(gpt, config.rows, context, runtime.device, runtime.dtype)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        logits = model.logits(model.hidden(tokens, cache)[:, -1])
        cache.advance(tokens)
        return logits.argmax(-1, keepdim=True)

    with torch.inference_mode():
        following = [forward(prompt)]

    def step() -> None:
        with torch.inference_mode(), named("decode"):
            following[0] = forward(following[0])

    return step, plan


def _kernel_work(config: ProfileConfig, runtime: Runtime) -> tuple[Callable[[], None], AnnouncingPlan]:
    name, _, backend = config.name.partition("=")
    if name not in OPS:
        raise UsageError(f"kernel {name!r} is not an op; ops are {', '.join(OPS)}")
    op = OPS[name]
    wanted = f"{config.kernels},{name}={backend}" if backend else config.kernels
    plan = AnnouncingPlan(KernelPlan.resolve(wanted, runtime.device, runtime.dtype, "train-eager"), training=False)
    sized = [case for case in op.cases() if runtime.dtype in case.dtypes]
    if not sized:
        raise UsageError(f"op {name} has no case in {runtime.dtype}; choose another --dtype")
    case = next((c for c in sized if c.size == "model"), sized[0])
    args, kwargs = case.make(runtime.device, runtime.dtype, torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.no_grad(), named(case.name):
            plan[name](*args, **kwargs)

    return step, plan


WORKS: Mapping[str, Callable[[ProfileConfig, Runtime], tuple[Callable[[], None], AnnouncingPlan]]] = {
    "train": _train_work,
    "infer": _infer_work,
    "kernel": _kernel_work,
}


@contextlib.contextmanager
def _memory_history(device: torch.device, path: Path) -> Iterator[None]:
    """On CUDA, writes a snapshot of every allocation within."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def trace(step: Callable[[], None], plan: AnnouncingPlan, steps: int, device: torch.device, folder: Path) -> Any:
    """Warms up once, then profiles `steps` steps and writes the trace; returns the profiler."""
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plan.counting["now"] = True
    with _memory_history(device, folder / "memory.pickle"):
        with profile(activities=activities, acc_events=True) as seen:
            for _ in range(steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    plan.counting.clear()
    seen.export_chrome_trace(str(folder / "trace.json"))
    return seen


@dataclass(frozen=True)
class Line:
    """A line of a table: seconds and launches are per step."""

    name: str
    seconds: float
    launches: float
    share: float


def by_kernel(seen: Any, steps: int, on_gpu: bool) -> list[Line]:
    """What the device ran, longest first: kernels on a GPU, innermost torch operations on a CPU."""
    found: dict[str, list[float]] = {}
    for event in seen.events():
        is_kernel = "CUDA" in str(event.device_type) if on_gpu else event.name.startswith(("aten::", "nanochat"))
        spent = event.device_time if on_gpu else event.self_cpu_time_total
        if is_kernel and spent > 0:
            entry = found.setdefault(event.name, [0.0, 0.0])
            entry[0] += spent / 1e6 / steps
            entry[1] += 1 / steps
    total = sum(seconds for seconds, _ in found.values()) or 1.0
    lines = [Line(name, seconds, count, seconds / total) for name, (seconds, count) in found.items()]
    return sorted(lines, key=lambda line: -line.seconds)


def by_op(seen: Any, steps: int, on_gpu: bool) -> dict[str, tuple[float, float]]:
    """op → (seconds, kernels launched) per step in its forward range, and in the backward of what it recorded.

    The profiler links a backward operation to the forward one by its sequence number, which is how it finds its op.
    """

    def spent(event: Any) -> float:
        return (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6 / steps

    def launched(event: Any) -> int:
        return len(event.kernels) + sum(launched(child) for child in event.cpu_children)

    def numbers(event: Any) -> Iterator[int]:
        if event.sequence_nr >= 0:
            yield event.sequence_nr
        for child in event.cpu_children:
            yield from numbers(child)

    found: dict[str, list[float]] = {}
    owner: dict[int, str] = {}
    events = list(seen.events())
    for event in events:
        if event.name.startswith(PREFIX):
            name = event.name.removeprefix(PREFIX)
            entry = found.setdefault(name, [0.0, 0.0])
            entry[0] += spent(event)
            entry[1] += launched(event) / steps
            owner |= dict.fromkeys(numbers(event), name)
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in owner:
            entry = found[owner[event.sequence_nr]]
            entry[0] += spent(event)
            entry[1] += launched(event) / steps
    return {name: (seconds, count) for name, (seconds, count) in found.items()}


def _rate(x: float, unit: str) -> str:
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= scale:
            return f"{x / scale:.3g} {letter}{unit}"
    return f"{x:.3g} {unit}" if x else ""


def show(config: ProfileConfig, seen: Any, plan: AnnouncingPlan, runtime: Runtime) -> None:
    """Prints both tables."""
    from rich.console import Console
    from rich.table import Table

    on_gpu, console = runtime.device.type == "cuda", Console(highlight=False)
    console.width = max(console.width, 130)
    kernels = by_kernel(seen, config.steps, on_gpu)
    table = Table("kernel" if on_gpu else "torch operation", "ms", "share", "launches", title="by kernel, per step")
    for line in kernels[: config.top]:
        table.add_row(line.name[:80], f"{line.seconds * 1e3:.3f}", f"{line.share:.1%}", f"{line.launches:.0f}")
    rest = kernels[config.top :]
    if rest:
        spent, share = sum(line.seconds for line in rest), sum(line.share for line in rest)
        table.add_row(f"({len(rest)} more)", f"{spent * 1e3:.3f}", f"{share:.1%}", "")
    console.print(table)
    limits = machine.ceilings(runtime.device)
    total = sum(line.seconds for line in kernels) or 1.0
    headers = ("op", "backend", "ms", "share", "calls", "launches", "bytes/s", "FLOP/s", "of roofline", "gap ms")
    table = Table(*headers, title=f"by op, per step; ceilings {_rate(limits.bandwidth, 'B/s')}, "
                  f"{_rate(limits.flops(runtime.dtype), 'FLOP/s')}")  # fmt: skip
    timed = by_op(seen, config.steps, on_gpu)
    for name, (seconds, launches) in sorted(timed.items(), key=lambda item: -item[1][0]):
        call = plan.seen[name]
        moved, flops = call.bytes / config.steps, call.flops / config.steps
        least = limits.least_seconds(moved, flops, runtime.dtype)
        known = seconds > 0 and moved > 0
        table.add_row(
            name, plan.choices[name].backend, f"{seconds * 1e3:.3f}", f"{seconds / total:.1%}",
            f"{call.calls / config.steps:.0f}", f"{launches:.0f}" if on_gpu else "",
            _rate(moved / seconds, "B/s") if known else "", _rate(flops / seconds, "FLOP/s") if known else "",
            f"{least / seconds:.0%}" if known else "", f"{(seconds - least) * 1e3:.3f}" if known else "",
        )  # fmt: skip
    other = total - sum(seconds for seconds, _ in timed.values())
    table.add_row("(outside the plan)", "", f"{other * 1e3:.3f}", f"{other / total:.1%}", *[""] * 6)
    console.print(table)


def run(config: ProfileConfig) -> int:
    """The command."""
    if config.steps < 1:
        raise UsageError(f"--steps {config.steps} must be at least 1")
    if (config.what == "kernel") != bool(config.name):
        raise UsageError(f"nanochat profile {config.what}: an op's name goes with `kernel`, and only there")
    runtime = start(config.device, config.dtype)
    folder = config.out or base_dir() / "profile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NanochatError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
    for complaint in machine.disturbances(runtime.device):
        print(f"the machine is not quiet: {complaint}", file=sys.stderr)
    step, plan = WORKS[config.what](config, runtime)
    seen = trace(step, plan, config.steps, runtime.device, folder)
    show(config, seen, plan, runtime)
    print(f"trace: {folder / 'trace.json'} (open it at ui.perfetto.dev)")
    if runtime.device.type == "cuda":
        print(f"memory: {folder / 'memory.pickle'} (open it at pytorch.org/memory_viz)")
    again = " ".join(sys.argv[1:]) or f"profile {config.what}"
    print(f"Nsight Compute: ncu --set full --nvtx --target-processes all -o kernels python -m nanochat {again}")
    return 0
