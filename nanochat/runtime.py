"""Where and how a command runs: device, compute dtype, ranks, seeds, folders, each chosen once and handed down.

Every choice travels with the reason for it (`Runtime.reasons`), so that a log answers "why is this running in float32?"
without a debugger. torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE) is read here and nowhere else.
"""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from nanochat.errors import NanochatError, UsageError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The machine as one rank sees it.

    `dtype` is the compute dtype: what activations and matrix products use. Master weights are float32 whatever it is.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, writes and downloads."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def base_dir() -> Path:
    """The folder that holds everything a run makes: NANOCHAT_BASE_DIR, by default ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512_BF16 or AMX), about twice float32's rate."""
    supported = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe() for probe in supported if probe is not None)


def choose_device(name: DeviceName, local_rank: int = 0) -> tuple[torch.device, str]:
    """The device for `name` and why it was chosen; raises UsageError for one that this machine does not have."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        chosen = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
        reason = f"auto: the first available of cuda, mps, cpu (torch {torch.__version__})"
    elif name not in available:
        raise UsageError(f"unknown device {name!r}; use one of auto, cpu, cuda, mps")
    elif not available[name]:
        raise UsageError(
            f"device {name!r} was asked for, but torch {torch.__version__} finds none; use --device cpu or auto"
        )
    else:
        chosen, reason = name, "asked for"
    if chosen == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank} needs a GPU of its own, but only {torch.cuda.device_count()} are visible; "
                "lower --nproc_per_node or widen CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", local_rank), reason
    return torch.device(chosen), reason


def choose_dtype(name: DtypeName, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype for `name` on `device` and why.

    auto: bfloat16 on CUDA from compute capability 8.0, float32 elsewhere. bfloat16 on a CPU is offered, not imposed.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"unknown dtype {name!r}; use one of auto, {', '.join(DTYPES)}")
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"auto: compute capability {major}.{minor} multiplies bfloat16 in hardware"
        return torch.float32, f"auto: compute capability {major}.{minor} is below 8.0, no bfloat16 tensor cores"
    return torch.float32, f"auto: float32 is exact everywhere on {device.type}; --dtype bfloat16 may be faster"


def seed_everything(seed: int) -> None:
    """Seeds Python's and torch's generators (all devices). Nothing in the pipeline draws from numpy's global one."""
    random.seed(seed)
    torch.manual_seed(seed)


def start(device: DeviceName = "auto", dtype: DtypeName = "auto", seed: int = 42) -> Runtime:
    """Chooses device and dtype, joins the process group when torchrun started us, seeds, and returns the Runtime.

    The backend is nccl on CUDA and gloo elsewhere. float32 matrix products may use TF32 on CUDA.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    chosen_device, device_reason = choose_device(device, local_rank)
    chosen_dtype, dtype_reason = choose_dtype(dtype, chosen_device)
    if chosen_device.type == "cuda":
        torch.cuda.set_device(chosen_device)
        torch.set_float32_matmul_precision("high")
    seed_everything(seed)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if chosen_device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, device_id=chosen_device if backend == "nccl" else None)
        except (RuntimeError, ValueError) as error:
            raise NanochatError(
                f"rank {rank} of {world_size} could not join the process group over {backend}: {error}; "
                "start ranks with torchrun, which sets MASTER_ADDR and MASTER_PORT"
            ) from error
        if chosen_device.type == "cuda":
            from nanochat_kernels import autotune  # here, because a run on one rank needs none of it

            autotune.agree(chosen_device)
    return Runtime(
        chosen_device, chosen_dtype, rank, local_rank, world_size, {"device": device_reason, "dtype": dtype_reason}
    )


def stop(runtime: Runtime) -> None:
    """Leaves the process group, if one was joined. Call it on every rank at the end of a command."""
    if runtime.distributed and dist.is_initialized():
        dist.destroy_process_group()
