"""What recorded measurements say: the rows under benchmarks/results/<device class>/*.jsonl.

A row that counts names op, backend, case, dtype, mode and median (any unit, the same in a file). A backend is proven
where it and the reference were measured on the same cases; backends are ordered by the geometric mean of their time
over the reference's. Rows of an earlier date are superseded by later lines for the same case.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch

from nanochat_kernels.registry import REFERENCE, Place

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def device_class(device: torch.device) -> str:
    """The folder name of a device's rows: a GPU's product name, or what decides on a CPU, its vector instructions."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    if device.type != "cpu":
        return device.type
    if torch.cpu._is_avx512_bf16_supported():
        return "cpu-avx512-bf16"
    return "cpu-" + torch.backends.cpu.get_cpu_capability().lower()


def fastest(place: Place, results: Path | None = None) -> dict[str, tuple[tuple[str, str], ...]]:
    """For every op with rows for this device class, dtype and mode: (backend, reason), fastest first."""
    folder = (results or RESULTS) / device_class(place.device)
    times: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = _row(line, place)
            if row:
                op, backend, case, median = row
                times.setdefault(op, {}).setdefault(backend, {})[case] = median
    return {op: _ranked(backends, folder.name) for op, backends in times.items() if REFERENCE in backends}


def _row(line: str, place: Place) -> tuple[str, str, str, float] | None:
    """(op, backend, case, median) when the line is a measurement of this dtype and mode; other rows share the files."""
    try:
        row = json.loads(line)
        if row["dtype"] != str(place.dtype).removeprefix("torch.") or row["mode"] != place.mode:
            return None
        return row["op"], row["backend"], row["case"], float(row["median"])
    except (ValueError, KeyError, TypeError):
        return None


def _ranked(backends: dict[str, dict[str, float]], device: str) -> tuple[tuple[str, str], ...]:
    reference, ratios = backends[REFERENCE], []
    for backend, cases in backends.items():
        shared = [case for case in cases if case in reference]
        if shared:
            ratios.append(
                (math.exp(sum(math.log(cases[c] / reference[c]) for c in shared) / len(shared)), backend, len(shared))
            )
    return tuple(
        (backend, f"{1 / ratio:.2f}× the reference over {count} recorded case{'s' * (count > 1)} on {device}")
        for ratio, backend, count in sorted(ratios)
    )
