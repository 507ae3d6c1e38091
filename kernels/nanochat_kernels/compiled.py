"""What the compiler makes of every Triton kernel, known without a GPU: `verify --compile sm_90`.

Each kernel is compiled ahead of time in the configurations in which the model launches it, and the binary is read:
registers per thread, bytes spilled to memory, shared memory, tensor-core instructions (HGMMA, in FP8 QGMMA), bulk-copy
instructions (UBLK, UTMA) and the widest global access in bits. allowances.json records what was seen and accepted; more
registers, spills or shared memory than that, or narrower accesses, are red. After a deliberate change: `verify
--compile sm_90 --record`.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MODULES = (
    "attention_triton",
    "orthogonalize_triton",
    "muon_update_triton",
    "adamw_update_triton",
    "sample_triton",
    "rms_norm_triton",
    "rope_qk_norm_triton",
    "linear_softcap_cross_entropy_triton",
    "relu2_mlp_triton",
    "fp8_quantize_triton",
    "fp8_norm_mlp_triton",
)
ALLOWANCES = Path(__file__).with_name("allowances.json")
AT_MOST = ("registers", "spill_bytes", "shared_bytes")
AT_LEAST = ("tensor_core", "widest_access")


@dataclass(frozen=True)
class Build:
    """A kernel and one way in which it is launched.

    arguments: parameter name → type as Triton writes it ("*bf16", "i32", "fp32"); constants: constexpr values, None
    for pointers that are absent; name tells configurations of a kernel apart.
    """

    name: str
    kernel: object
    arguments: dict[str, str]
    constants: Mapping[str, object]
    num_warps: int
    odd: tuple[str, ...] = ()  # integers that are not multiples of 16
    num_stages: int = 3


@dataclass(frozen=True)
class Facts:
    """What stands in the binary."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: int
    bulk_copy: int
    widest_access: int


def builds() -> Iterator[Build]:
    """Every shipped configuration of every kernel: each Triton module lists its own."""
    for module in MODULES:
        yield from importlib.import_module(f"nanochat_kernels.{module}").shipped()


def compile_for(build: Build, capability: int) -> Facts:
    """Compile for a compute capability (90 for Hopper) and read the binary. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names  # type: ignore[attr-defined]
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    # Tensors come from torch's allocator, aligned; sizes of the shipped configurations are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] in "*i" and n not in build.odd
    }
    source = ASTSource(build.kernel, signature, constants, aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    resources, code = _read(compiled.asm["cubin"])
    widths = [int(width or 32) for width in re.findall(r"(?:LDG|STG)\.E(?:\.[A-Z_]+)*?(?:\.(64|128))?[ .]", code)]
    return Facts(
        registers=int(resources["REG"]),
        spill_bytes=int(resources["STACK"]) + int(resources["LOCAL"]),
        shared_bytes=int(compiled.metadata.shared),
        tensor_core=len(re.findall("[HQ]GMMA", code)),
        bulk_copy=len(re.findall(r"UBLK|UTMA", code)),
        widest_access=max(widths, default=0),
    )


def _read(cubin: bytes) -> tuple[dict[str, str], str]:
    """(resource usage, machine code) of a binary, by the tools that Triton brings."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in (usage.stdout + usage.stderr).splitlines() if "REG:" in line)
    return dict(re.findall(r"(\w+):(\d+)", line)), code.stdout


def run(
    architecture: str = "sm_90",
    record: bool = False,
    names: Collection[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Compile everything, print the table, compare with the allowances; 1 when something is worse than allowed.

    names: only builds whose names begin with one of these. record keeps what is seen as the new allowances.
    """
    match = re.fullmatch(r"sm_(\d+)a?", architecture)
    if not match:
        raise ValueError(f"architecture {architecture!r}: write it like sm_90")
    recorded = json.loads(ALLOWANCES.read_text(encoding="utf-8")) if ALLOWANCES.exists() else {}
    allowed = recorded.get(architecture, {})
    seen, red = {}, 0
    for build in builds():
        if names and not build.name.startswith(tuple(names)):
            continue
        progress(build.name)
        facts = compile_for(build, int(match[1]))
        seen[build.name] = asdict(facts)
        complaints = [] if record else compare(facts, allowed.get(build.name))
        red += bool(complaints)
        numbers = "  ".join(f"{key} {value}" for key, value in asdict(facts).items())
        print(f"{build.name:48} {numbers}  {'; '.join(complaints) or 'ok'}")
    if record:
        kept = (json.loads(ALLOWANCES.read_text(encoding="utf-8")) if names and ALLOWANCES.exists() else recorded) | {}
        seen = {name: _explained(allowed.get(name), facts) for name, facts in seen.items()}
        kept[architecture] = kept.get(architecture, {}) | seen if names else seen
        ALLOWANCES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 1 if red else 0


def _explained(before: dict | None, facts: dict) -> dict:
    """An allowance's hand-written "explanation" of a spill outlives a new recording, as long as there is a spill."""
    words = (before or {}).get("explanation")
    return facts | {"explanation": words} if words and facts["spill_bytes"] else facts


def compare(facts: Facts, allowance: dict[str, int] | None) -> list[str]:
    """What is worse than allowed."""
    if allowance is None:
        return ["no allowance recorded"]
    now = asdict(facts)
    worse = [f"{key} {now[key]} > {allowance[key]}" for key in AT_MOST if now[key] > allowance[key]]
    return worse + [f"{key} {now[key]} < {allowance[key]}" for key in AT_LEAST if now[key] < allowance[key]]
