"""Where Triton kernels can run: on an NVIDIA GPU, or on any tensors in Triton's interpreter (slow, for checking)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from nanochat_kernels.registry import Place


def interpreted() -> bool:
    """Does TRITON_INTERPRET=1 hold? Triton looks at it when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_triton(place: Place) -> str | None:
    """The probe of every Triton backend."""
    if place.dtype == torch.float64:
        return "computes in float32"
    if find_spec("triton") is None:
        return "triton is not installed"
    if place.device.type == "cpu" and not interpreted():
        return "needs an NVIDIA GPU (or TRITON_INTERPRET=1 to check it without one)"
    if place.device.type == "cpu":
        # Seen with Triton 3.6: storing float32 values to a bf16 tensor cuts the low bits off.
        return None if place.dtype == torch.float32 else "the interpreter truncates to 16 bits where a GPU rounds"
    return None if place.device.type == "cuda" else f"triton has no compiler for {place.device.type}"
