"""Launch configurations: shipped ones that always work, and measured ones that a machine remembers.

    choose(kernel, key, candidates, run)   the first candidate is the shipped one

On a GPU the first call for a new key measures every candidate, keeps the fastest and writes it down, one file per kind
of device and versions of torch and Triton; from then on it is looked up. What was decided is never measured again, so
that results repeat to the bit.

Ranks must agree, and ranks that each measure do not. So a process that is one of several never measures: it takes what
`agree` brought from rank 0's file when the ranks met, and the shipped configuration where that has no answer. Tune
beforehand on one GPU: `nanochat verify --device cuda`, or a step of training on one process.

NANOCHAT_AUTOTUNE=0 takes the shipped configurations and looks at nothing else. NANOCHAT_AUTOTUNE_CACHE names the folder
(default: ~/.cache/nanochat/autotune). The trade-off of measuring in place, one kernel alone on a busy GPU: it sees
neither the cache that the step leaves behind nor other streams; differences below 2% are decided for the shipped one.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

MARGIN = 0.98  # a candidate must take less than this share of the shipped one's time


C = TypeVar("C")  # a frozen dataclass
Timer = Callable[[Callable[[], object]], float]


@dataclass
class Table:
    """What one kind of device prefers: key → fields of the chosen candidate, kept in a file."""

    path: Path
    shared: bool = False  # came from rank 0: nothing is added to it
    entries: dict[str, dict] = field(default_factory=dict)

    def read(self) -> None:
        """Takes in the file, where there is one that can be read; a broken one counts as none."""
        try:
            self.entries |= json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass

    def add(self, key: str, decide: Callable[[], dict]) -> dict:
        """The entry of a key, decided by one process while others that ask for it wait. None is decided twice."""
        with _locked(self.path.with_suffix(".lock")):
            self.read()
            if key not in self.entries:
                self.entries[key] = decide()
                temporary = self.path.with_suffix(f".{os.getpid()}")
                with open(temporary, "w", encoding="utf-8") as file:
                    json.dump(self.entries, file, indent=1, sort_keys=True)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
        return self.entries[key]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def choose(
    kernel: str,
    key: str,
    candidates: Sequence[C],
    run: Callable[[C], object],
    device: torch.device,
    timer: Timer | None = None,
) -> C:
    """The configuration to launch `kernel` with. candidates: frozen dataclasses of one kind, the shipped one first.

    key: what the best one depends on (shape class, dtype). run(candidate) launches once, on data it may scribble on.
    timer: microseconds of a call, or an exception when it cannot run (default: CUDA events, medians).
    """
    shipped = candidates[0]
    if os.environ.get("NANOCHAT_AUTOTUNE") == "0" or len(candidates) == 1:
        return shipped
    if timer is None and (device.type != "cuda" or torch.cuda.is_current_stream_capturing()):
        return shipped
    table = _table(_device_class(device))
    full_key = f"{kernel} {key} {_digest(candidates)}"
    chosen = table.entries.get(full_key)
    if chosen is None:
        if table.shared or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return shipped
        chosen = table.add(full_key, lambda: asdict(_fastest(candidates, run, timer or _median_on_gpu)))  # type: ignore[call-overload]
    return type(shipped)(**chosen)


def _fastest(candidates: Sequence[C], run: Callable[[C], object], timer: Timer) -> C:
    best, least = candidates[0], math.inf
    for candidate in candidates:
        try:
            time = timer(functools.partial(run, candidate))
        except Exception:  # too much shared memory, no such layout: whatever it is, this one cannot be launched here
            continue
        if time < least * (MARGIN if best is candidates[0] else 1.0):
            best, least = candidate, time
    return best


def agree(device: torch.device) -> None:
    """Make every rank use rank 0's table. Call once when the process group stands, on all ranks; no-op without one."""
    group_stands = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not group_stands or find_spec("triton") is None:
        return
    table = _table(_device_class(device))
    entries = [table.entries]
    torch.distributed.broadcast_object_list(entries, src=0)
    table.entries, table.shared = entries[0], True


def _median_on_gpu(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return 1000 * do_bench(call, warmup=10, rep=40, return_mode="median")


@functools.cache
def _table(device_class: str) -> Table:
    """The one table of this process."""
    import triton

    folder = Path(os.environ.get("NANOCHAT_AUTOTUNE_CACHE") or Path.home() / ".cache" / "nanochat" / "autotune")
    versions = re.sub(r"[^\w.]+", "-", f"torch{torch.__version__}-triton{triton.__version__}")
    table = Table(folder / f"{device_class}-{versions}.json")
    table.read()
    return table


def _device_class(device: torch.device) -> str:
    from nanochat_kernels.recorded import device_class

    return device_class(device)


def _digest(candidates: Sequence[Any]) -> str:
    """Changes with the candidates, so that a new one gets its chance."""
    text = json.dumps([asdict(c) for c in candidates], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
