"""Ops, their backends, and the plan that says which backend runs.

An `Op` is declared once, in the file that bears its name: a torch reference, further backends by name, cases, cost
and tolerance. The correctness run, the generic tests, the kernel benchmark and the tables in the docs are derived
from it.

A `KernelPlan` is an immutable table op → (backend, proven, reason). It is made once, from the device, the compute
dtype, the mode and what the user asked for, and handed down to whoever computes; there is no global switch.

    auto            the fastest backend with recorded measurements on this class of device, else the conservative one
    torch           the references
    fused           every custom kernel that runs here and agrees with its reference
    op=backend,...  exceptions to the above; a backend asked for by name that cannot run is an error

The trade-off: a table of plain callables costs one attribute access per call and needs no dispatcher, but a choice
cannot depend on the shapes of one call. An op whose best backend varies with shape decides inside that backend.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

MODES = ("train-compiled", "train-eager", "prefill", "decode")
REFERENCE = "torch"


class KernelUnavailable(ValueError):
    """A backend that was asked for by name does not exist or cannot run here."""

    def __init__(self, op: str, backend: str, reason: str, remedy: str) -> None:
        super().__init__(f"kernel {op}={backend}: {reason}; {remedy}")
        self.op, self.backend, self.reason, self.remedy = op, backend, reason, remedy


@dataclass(frozen=True)
class Case:
    """An input of an op. `make(device, dtype, generator)` gives (args, kwargs); size is "small", "odd" or "model"."""

    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], tuple[tuple, dict]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    size: str = "small"


@dataclass(frozen=True)
class Cost:
    """What a call must at least move (bytes) and compute (floating-point operations)."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Tolerance:
    """A backend's error may be `factor` × the reference's own error in the same dtype, or the dtype's floor if
    larger.

    Errors are measured against the reference in float64. The floors are about one rounding of a result: they matter
    where the reference happens to be exact.
    """

    factor: float = 2.0
    float64: float = 1e-12
    float32: float = 4e-6
    bfloat16: float = 4e-3
    float16: float = 5e-4

    def allowed(self, dtype: torch.dtype, reference_error: float) -> float:
        return max(self.factor * reference_error, getattr(self, str(dtype).removeprefix("torch.")))


@dataclass(frozen=True)
class Place:
    """Where a plan will run: what probes and automatic choices may look at."""

    device: torch.device
    dtype: torch.dtype
    mode: str

    @property
    def forward_on_cpu(self) -> bool:
        """A CPU, and no gradients wanted: tensors may be overwritten where they lie."""
        return self.device.type == "cpu" and self.mode in ("prefill", "decode")


Probe = Callable[[Place], "str | None"]


class Op:
    """A hot operation: its reference, its backends, and all that is needed to check and measure them.

    torch: the reference, also the backend of that name. Further backends are keyword arguments: a callable, or
    "module:function" imported when chosen. available[backend](place) returns None or the reason why it cannot run.
    cases() yields `Case`s; cost(args, kwargs) returns `Cost`. differentiable names the arguments with gradients,
    mutates those that are updated in place (they are then the op's results). auto lists (backend, applies(place),
    reason): the first that applies is what `auto` takes without measurements; custom names the backends that `fused`
    takes, best first.
    """

    def __init__(
        self,
        name: str,
        *,
        torch: Callable[..., Any],
        cases: Callable[[], Iterable[Case]],
        cost: Callable[[tuple, dict], Cost],
        tolerance: Tolerance = Tolerance(),
        differentiable: tuple[str, ...] = (),
        mutates: tuple[str, ...] = (),
        available: Mapping[str, Probe] | None = None,
        auto: tuple[tuple[str, Callable[[Place], bool], str], ...] = (),
        custom: tuple[str, ...] = (),
        **backends: Callable[..., Any] | str,
    ) -> None:
        self.name = name
        self.backends: Mapping[str, Callable[..., Any] | str] = MappingProxyType({REFERENCE: torch, **backends})
        self.cases, self.cost, self.tolerance = cases, cost, tolerance
        self.differentiable, self.mutates = differentiable, mutates
        self.available: Mapping[str, Probe] = MappingProxyType(dict(available or {}))
        self.auto, self.custom = auto, custom
        unknown = ({*self.available} | {a[0] for a in auto} | {*custom}) - {*self.backends}
        if unknown:
            raise ValueError(f"op {name}: {', '.join(sorted(unknown))} named but not declared as a backend")

    def __repr__(self) -> str:
        return f"Op({self.name}: {', '.join(self.backends)})"

    def __reduce__(self) -> tuple[Callable[[str], Op], tuple[str]]:
        return _op_by_name, (self.name,)

    @property
    def reference(self) -> Callable[..., Any]:
        return self.load(REFERENCE)

    def load(self, backend: str) -> Callable[..., Any]:
        """The callable of a backend, imported on first use. Raises KeyError, ImportError or AttributeError."""
        target = self.backends[backend]
        if isinstance(target, str):
            module, _, function = target.partition(":")
            return getattr(importlib.import_module(module), function)
        return target

    def parameters(self) -> tuple[str, ...]:
        """Argument names, in order."""
        return tuple(inspect.signature(self.reference).parameters)

    def refusal(self, backend: str, place: Place) -> str | None:
        """Why this backend cannot run at `place`, or None. Static reasons first, then one small case is run."""
        if backend == REFERENCE:
            return None
        probe = self.available.get(backend)
        reason = probe(place) if probe else None
        return reason or _trial(self.name, backend, place.device.type, place.dtype)


def _op_by_name(name: str) -> Op:
    from nanochat_kernels import OPS

    return OPS[name]


@functools.cache
def _trial(name: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Import a backend and run its first small case against the reference: None, or what went wrong."""
    from nanochat_kernels import verify

    op = _op_by_name(name)
    try:
        op.load(backend)
        row = verify.check(op, backend, next(iter(op.cases())), torch.device(device_type), dtype)
    except Exception as error:  # whatever a backend raises is the reason why it cannot be used
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if row.ok else f"it disagrees with the reference ({row.summary()})"


@dataclass(frozen=True)
class Choice:
    """A backend, whether recorded measurements speak for it, and why it was taken."""

    backend: str
    proven: bool
    reason: str


class KernelPlan:
    """An immutable table of chosen backends; `plan.rms_norm(x)` and `plan["rms_norm"](x)` call the chosen one.

    Hashable, comparable and picklable by its choices. The callables are bound when the plan is made.
    """

    _table: tuple[tuple[str, Choice], ...]
    _where: str

    def __init__(self, choices: Mapping[str, Choice], where: str = "reference") -> None:
        from nanochat_kernels import OPS

        table = dict(choices)
        values: dict[str, Any] = {"_table": tuple(table.items()), "_where": where}
        values |= {name: OPS[name].load(choice.backend) for name, choice in table.items()}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def reference(cls) -> KernelPlan:
        """Every op on its torch reference."""
        from nanochat_kernels import OPS

        return cls({name: Choice(REFERENCE, True, "the reference was asked for") for name in OPS})

    @classmethod
    def resolve(
        cls,
        kernels: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mode: str = "train-eager",
        results: Path | None = None,
    ) -> KernelPlan:
        """Choose a backend for every op.

        kernels: "auto", "torch" or "fused", and/or op=backend, separated by commas. mode: one of MODES.
        results: folder with recorded measurements (default: the repository's benchmarks/results, where it exists).
        Raises KernelUnavailable for an op or backend that is unknown or cannot run, ValueError for an unknown mode.
        """
        from nanochat_kernels import OPS, recorded

        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: use one of {', '.join(MODES)}")
        place = Place(torch.device(device), dtype, mode)
        policy, named = parse(kernels)
        proven = recorded.fastest(place, results) if policy == "auto" else {}
        choices = {}
        for name, op in OPS.items():
            if name in named:
                choices[name] = _explicit(op, named[name], place)
            elif policy == REFERENCE:
                choices[name] = Choice(REFERENCE, True, "the reference was asked for")
            elif policy == "fused":
                choices[name] = _fused(op, place)
            else:
                choices[name] = _automatic(op, place, proven.get(name, ()))
        where = f"{place.device.type} {str(dtype).removeprefix('torch.')} {mode}"
        return cls(choices, where)

    @property
    def choices(self) -> Mapping[str, Choice]:
        return MappingProxyType(dict(self._table))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return getattr(self, name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the kernel plan has no op {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a kernel plan is immutable: resolve another one")

    def __reduce__(self) -> tuple[type[KernelPlan], tuple[dict[str, Choice], str]]:
        return KernelPlan, (dict(self._table), self._where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelPlan) and self._table == other._table

    def __hash__(self) -> int:
        return hash(self._table)

    def __repr__(self) -> str:
        return "KernelPlan(" + ",".join(f"{name}={choice.backend}" for name, choice in self._table) + ")"

    def report(self) -> str:
        """A table with one line per op: op, backend, proven or not, reason."""
        rows = [(n, c.backend, "proven" if c.proven else "unproven", c.reason) for n, c in self._table]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
        return "\n".join([f"kernels for {self._where}", *lines])


def parse(kernels: str) -> tuple[str, dict[str, str]]:
    """Split what the user wrote into the policy and the ops named one by one. Raises KernelUnavailable."""
    from nanochat_kernels import OPS

    policy, named = "auto", {}
    for word in filter(None, (part.strip() for part in kernels.split(","))):
        name, equals, backend = word.partition("=")
        if not equals:
            if word not in ("auto", REFERENCE, "fused"):
                raise KernelUnavailable(word, "?", "not a policy", "use auto, torch, fused or op=backend")
            policy = word
            continue
        if name not in OPS:
            raise KernelUnavailable(name, backend, "no such op", f"ops are {', '.join(OPS)}")
        if backend not in OPS[name].backends:
            raise KernelUnavailable(name, backend, "no such backend", f"backends are {', '.join(OPS[name].backends)}")
        named[name] = backend
    return policy, named


def _explicit(op: Op, backend: str, place: Place) -> Choice:
    reason = op.refusal(backend, place)
    if reason:
        raise KernelUnavailable(op.name, backend, reason, f"leave the choice to auto or take {op.name}=torch")
    return Choice(backend, False, "asked for by name")


def _fused(op: Op, place: Place) -> Choice:
    refusals = []
    for backend in op.custom:
        reason = op.refusal(backend, place)
        if reason is None:
            return Choice(backend, False, "custom kernel, agrees with the reference")
        refusals.append(f"{backend}: {reason}")
    return Choice(REFERENCE, False, "; ".join(refusals) or "no custom kernel yet")


def _automatic(op: Op, place: Place, proven: tuple[tuple[str, str], ...]) -> Choice:
    """The fastest measured backend that runs, else the first declared preference that runs, else the reference."""
    refusals = []
    for backend, reason in proven:
        refusal = op.refusal(backend, place) if backend in op.backends else "no longer declared"
        if refusal is None:
            return Choice(backend, True, reason)
        refusals.append(f"{backend}: {refusal}")
    for backend, applies, reason in op.auto:
        if not applies(place):
            continue
        refusal = op.refusal(backend, place)
        if refusal is None:
            return Choice(backend, False, reason)
        refusals.append(f"{backend}: {refusal}")
    return Choice(REFERENCE, False, "; ".join(refusals) or "no measurement here; the reference is the safe choice")
