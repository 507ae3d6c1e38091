"""What the references share: the norm's epsilon, float32 arithmetic that lets float64 through, and inputs for cases."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1.1920929e-07  # float32's machine epsilon, whatever the compute dtype


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged when it is float64 already (the correctness run evaluates references in float64)."""
    return x if x.dtype == torch.float64 else x.float()


def normal(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Normal values, drawn on the CPU in float32 so that every device sees the same."""
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrix products of this dtype are best taken: itself, except on CPUs without 16-bit matrix
    instructions, where emulating them is slower than widening to float32 (15 against 60 GFLOP/s on an AVX2 CPU)."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if torch.cpu._is_avx512_bf16_supported() else torch.float32
