"""The correctness run: every backend of every op, over its cases, against the reference.

The truth is the reference evaluated in float64 on the same inputs. A backend's error, for each result and each
gradient, may be a small factor of the error that the reference makes in the case's own dtype (see `Tolerance`).
Errors are taken element by element, |a − b| / (|b| + rms(b)), and the largest counts, so that one wrong element in a
large tensor is seen. A gradient that vanishes in truth is measured by its largest sibling instead of by its own rms.
Integers must be equal. Fresh memory is filled with NaN, and so are the gaps between strided inputs: what is read
unwritten shows.

    python -m nanochat_kernels.verify [--ops rms_norm attention] [--backends sdpa] [--device cuda] [--sizes small odd
    model]
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels.registry import REFERENCE, Case, Op, Place

REFERENCE_FACTOR = 64  # the reference's own error in a dtype may be this many of the dtype's floors


@dataclass(frozen=True)
class Row:
    """One comparison. error and tolerance are those of `quantity`, the result or gradient nearest its limit."""

    op: str
    backend: str
    case: str
    dtype: str
    quantity: str
    error: float
    tolerance: float
    verdict: str  # "pass", "fail", or "skip: reason"

    @property
    def ok(self) -> bool:
        return self.verdict != "fail"

    def summary(self) -> str:
        return f"{self.case}, {self.quantity}: error {self.error:.2e}, allowed {self.tolerance:.2e}"


def run(
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    device: torch.device | str = "cpu",
    sizes: list[str] | None = None,
    json_path: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Check ops × backends × cases × dtypes on one device. Default sizes: small and odd on a CPU, all elsewhere.

    Backends that cannot run here give one "skip" row each. Raises KeyError for an unknown op.
    """
    from nanochat_kernels import OPS

    device = torch.device(device)
    sizes = sizes or (["small", "odd"] if device.type == "cpu" else ["small", "odd", "model"])
    rows: list[Row] = []
    for name in ops or list(OPS):
        op = OPS[name]
        for backend in op.backends:
            if backends and backend not in backends:
                continue
            progress(f"{name} {backend}")
            rows += _run_backend(op, backend, device, sizes)
    if json_path:
        _write_json(json_path, rows)
    return rows


def _run_backend(op: Op, backend: str, device: torch.device, sizes: list[str]) -> Iterator[Row]:
    probe, refused = op.available.get(backend), set()
    for case in op.cases():
        for dtype in case.dtypes if case.size in sizes else ():
            refusal = probe(Place(device, dtype, "train-eager")) if probe else None
            if not refusal:
                yield check(op, backend, case, device, dtype)
            elif dtype not in refused:
                refused.add(dtype)
                yield Row(op.name, backend, "all", _name(dtype), "", 0.0, 0.0, f"skip: {refusal}")


def check(op: Op, backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> Row:
    """Compare one backend with the reference on one case. A backend that raises fails, with its message."""
    args, kwargs = case.make(device, dtype, torch.Generator().manual_seed(0))
    bound = inspect.signature(op.reference).bind(*args, **kwargs)
    truth = evaluate(op, op.reference, bound, torch.float64)
    plain = evaluate(op, op.reference, bound)
    try:
        with nan_poisoned_memory():
            result = plain if backend == REFERENCE else evaluate(op, op.load(backend), bound)
    except Exception as raised:
        message = f"raised {type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"
        return Row(op.name, backend, case.name, _name(dtype), message, float("inf"), 0.0, "fail")
    worst = Row(op.name, backend, case.name, _name(dtype), "", 0.0, 0.0, "pass")
    closest = -1.0
    scales = {name: _rms(x) for name, x in truth.items()}
    largest = max([scale for name, scale in scales.items() if name.startswith("gradient")], default=0.0)
    for name, scale in scales.items():
        scales[name] = largest if name.startswith("gradient") and scale < 1e-9 * largest else scale
    for quantity, expected in truth.items():
        if expected.is_floating_point():
            error = difference(result[quantity], expected, scales[quantity])
            allowed = op.tolerance.allowed(dtype, difference(plain[quantity], expected, scales[quantity]))
            if backend == REFERENCE:
                allowed = REFERENCE_FACTOR * op.tolerance.allowed(dtype, 0.0)
        else:
            error, allowed = float((result[quantity] != plain[quantity]).double().mean()), 0.0
        nearness = 0.0 if error == 0 else error / allowed if allowed else float("inf")
        if nearness > closest:
            closest = nearness
            verdict = "pass" if error <= allowed else "fail"
            worst = Row(op.name, backend, case.name, _name(dtype), quantity, error, allowed, verdict)
    return worst


def evaluate(
    op: Op, function: Callable, bound: inspect.BoundArguments, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Call on private copies of the arguments, floats cast to `dtype` if given; results and gradients by name, and the
    results of a second call without gradients, where backends may take another path."""
    arguments = {name: _copied(value, dtype) for name, value in bound.arguments.items()}
    leaves = {}
    for name in op.differentiable:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = value.requires_grad_()
    call = inspect.BoundArguments(bound.signature, arguments)
    returned = function(*call.args, **call.kwargs)
    if op.mutates:
        returned = [x for name in op.mutates for x in _listed(arguments[name])]
    outputs = _listed(returned)
    results = {f"result {i}" if len(outputs) > 1 else "result": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
        used, weights = zip(*[(x, g) for x, g in zip(outputs, upstream) if x.requires_grad])
        gradients = torch.autograd.grad(used, list(leaves.values()), weights, allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients):
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        with torch.no_grad():
            call = inspect.BoundArguments(bound.signature, {n: _copied(v, dtype) for n, v in bound.arguments.items()})
            again = _listed(function(*call.args, **call.kwargs))
        results |= {f"result {i} without gradients": x for i, x in enumerate(again)}
    return results


def difference(result: Tensor, expected: Tensor, scale: float) -> float:
    """The largest |a − b| / (|b| + scale), infinite for a NaN or a wrong shape."""
    if result.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = result.double(), expected.double()
    error = (a - b).abs()
    relative = torch.where(error == 0, 0.0, error / (b.abs() + scale))
    return float(torch.nan_to_num(relative, nan=float("inf")).max())


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


@contextlib.contextmanager
def nan_poisoned_memory() -> Iterator[None]:
    """Within, torch.empty and its kin hand out NaN (largest integers, for integers).

    The public setter imports torch's compiler, seconds that every command would pay when its plan is made.
    """
    switch = torch._C._set_deterministic_algorithms
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switch(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            switch(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    """A private copy with the same strides, the gaps filled with NaN."""
    if isinstance(value, (list, tuple)):
        return [_copied(x, dtype) for x in value]
    if isinstance(value, torch.dtype):
        return dtype or value
    if not isinstance(value, Tensor):
        return value
    kind = dtype if dtype and value.is_floating_point() else value.dtype
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride())) if value.numel() else 0
    fill = float("nan") if kind.is_floating_point else 0
    storage = torch.full((extent,), fill, dtype=kind, device=value.device)
    return storage.as_strided(value.shape, value.stride()).copy_(value.detach())


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, rows: list[Row]) -> None:
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class VerifyConfig:
    """Check every kernel against its reference."""

    ops: tuple[str, ...] = ()
    """Ops to check (default: all)."""
    backends: tuple[str, ...] = ()
    """Backends to check (default: all)."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda."""
    sizes: tuple[str, ...] = ()
    """Which cases: small, odd, model (default: small and odd on a CPU, all elsewhere)."""
    json: Path | None = None
    """Also write the rows to this file, one JSON object a line."""
    verbose: bool = False
    """List every case, not only the worst of each backend."""
    compile: str = ""
    """Instead, compile every Triton kernel ahead of time for an architecture (sm_90), without a GPU."""
    record: bool = False
    """With --compile: accept what is seen as the new allowances."""


def main(config: VerifyConfig) -> int:
    """Print the table; 0 when nothing is red, 1 otherwise. Raises KernelUnavailable for an unknown op."""
    from nanochat_kernels import OPS, KernelUnavailable, compiled

    if config.compile:
        return compiled.run(config.compile, config.record, config.ops)
    for name in config.ops:
        if name not in OPS:
            raise KernelUnavailable(name, "?", "no such op", f"ops are {', '.join(OPS)}")
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rows = run(
        list(config.ops),
        list(config.backends),
        device,
        list(config.sizes),
        config.json,
        progress=lambda line: print(f"\r{line:60}", end="", file=sys.stderr, flush=True),
    )
    print(f"\r{'':60}\r", end="", file=sys.stderr)
    _print(rows if config.verbose else _worst_of_each(rows))
    red = sum(not row.ok for row in rows)
    print(f"{len(rows)} comparisons on {device}, {red} red, {sum(r.verdict[:4] == 'skip' for r in rows)} skipped")
    return 1 if red else 0


def _worst_of_each(rows: list[Row]) -> list[Row]:
    """Per op, backend and dtype, the row nearest to its limit, and every red one."""
    worst: dict[tuple, Row] = {}
    for row in rows:
        key = (row.op, row.backend, row.dtype)
        if key not in worst or row.error * worst[key].tolerance > worst[key].error * row.tolerance:
            worst[key] = row
    return [row for row in rows if not row.ok or worst[(row.op, row.backend, row.dtype)] is row]


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "backend", "case", "dtype", "quantity", "error", "allowed", "verdict")
    color = {"pass": "green", "fail": "red"}
    for row in rows:
        cells = (row.op, row.backend, row.case, row.dtype, row.quantity, f"{row.error:.1e}", f"{row.tolerance:.1e}")
        table.add_row(*cells, f"[{color.get(row.verdict, 'yellow')}]{row.verdict}")
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(VerifyConfig)))
