"""Casting to FP8: one scale per tensor, both memory orders at once, the largest magnitude noted on the way.

    x8 = cast(clamp(s·x, −largest, largest))      x ≈ x8/s      amax = max|x|

Two formats: e4m3 (3 bits of mantissa, largest 448) for inputs and weights, e5m2 (2 bits, largest 57,344) for gradients,
whose magnitudes spread further. Scales are powers of two: multiplying by them is exact, so a scale moves the window of
representable magnitudes without touching any mantissa, and every device rounds alike. s is chosen such that amax lands
in the second-highest binade: between 1.75 and 3.5 times amax still fits, which is what a scale that is not up to date
lives on.

Where a scale comes from, from cheap to dear:
    static    a bound known beforehand: a normed row cannot exceed √C
    delayed   the largest amax of the last steps (nanochat.model.fp8 keeps them): the producer can cast at once, and
              what has grown beyond the headroom since saturates, for one step
    current   this tensor's own amax: the whole tensor must be read before its first element can be cast. Taken where
              the given scale is not positive, that is, nothing is known yet

Layout. Hopper's FP8 tensor cores want both operands contiguous along the summed dimension. A linear layer sums over its
inputs forward, over its outputs for dx, over tokens for dW: each tensor is needed in both orders, x8 (M, N) and x8ᵀ
(N, M). One kernel reads a tile once and writes it twice: 4 bytes moved for a bf16 element. Amax, cast and transpose as
separate steps, the straightforward way to torch._scaled_mm, read it twice in bf16 and once in FP8: 7 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op, Tolerance
from nanochat_kernels.triton_support import needs_triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4M3: 8, E5M2: 15}  # amax is scaled to below 2 to this power; the format ends at 1.75 times that


def scale_for(amax: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The power of two (float32, shaped like amax) that puts amax below 2^TOP; 1 for what float32 holds as zero."""
    amax = torch.as_tensor(amax, dtype=torch.float32)
    exponent = (TOP[dtype] - torch.frexp(amax).exponent).clamp(max=126)
    return torch.where(amax >= torch.finfo(torch.float32).tiny, torch.ldexp(torch.ones_like(amax), exponent), 1.0)


def cast(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """x·scale in FP8, saturating instead of overflowing. x is float32 or float64."""
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype)


def fp8_quantize_reference(
    parts: list[Tensor], scale: Tensor, e5m2: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x8 (M, N), x8ᵀ (N, M) contiguous, 1/s, amax) of x, the parts (M, Nᵢ) side by side.

    scale: float32 0-d, not positive for current scaling. 1/s and amax are float32 0-d. The
    format is e4m3, or e5m2 if asked for.
    """
    dtype = E5M2 if e5m2 else E4M3
    x = wide(torch.cat(parts, dim=-1))
    amax = x.abs().amax().float()
    scale = torch.where(scale > 0, scale.float(), scale_for(amax, dtype))
    x8 = cast(x, scale, dtype)
    return x8, x8.mT.contiguous(), 1.0 / scale, amax


def _cases() -> Iterator[Case]:
    def make(rows, widths, scale, magnitude=1.0, e5m2=False):
        def build(device, dtype, generator):
            parts = [normal((rows, width), device, dtype, generator, magnitude) for width in widths]
            return (parts, torch.tensor(scale, device=device), e5m2), {}

        return build

    yield Case("given scale", make(32, (48,), 16.0))
    yield Case("current scale", make(32, (48,), 0.0, 1e-6, True))
    yield Case("three parts", make(40, (64, 16, 16), 0.0))
    yield Case("saturated", make(8, (16,), 1024.0), size="odd")
    yield Case("prime", make(131, (137, 3), 8.0), size="odd")
    yield Case("zeros", make(3, (5,), 0.0, 0.0), size="odd")
    yield Case("d12 gradient", make(16384, (768,), 1e6, 1e-6, True), size="model")
    yield Case("d12 qkv gradient", make(16384, (768, 768, 768), 0.0, 1e-6, True), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    parts = args[0]
    elements = sum(part.numel() for part in parts)
    return Cost(elements * (parts[0].element_size() + 2), 3 * elements)


fp8_quantize = Op(
    "fp8_quantize",
    torch=fp8_quantize_reference,
    triton="nanochat_kernels.fp8_quantize_triton:fp8_quantize_triton",
    available={"triton": needs_triton},
    auto=(("triton", lambda place: place.device.type == "cuda", "one pass instead of three"),),
    custom=("triton",),
    cases=_cases,
    cost=_cost,
    # Scaling is exact and so is every comparison in the end: the same FP8 numbers come out.
    tolerance=Tolerance(factor=1.0, float32=0.0, bfloat16=0.0, float16=0.0),
)
