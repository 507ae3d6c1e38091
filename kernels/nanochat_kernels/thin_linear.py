"""A linear layer for a handful of rows, with what follows it: the matrix products of decoding.

    y = epilogue(x · (scale·W)ᵀ)        epilogue: none | relu2 (relu(y)²) | softcap (c·tanh(y/c), float32)

The weights are in bf16, or in FP8 (e4m3) or int8 with one scale per output: `quantize` makes them. Memory-bound: at up
to 16 rows the bytes are the weights', read once, and a kernel for it is measured in their share of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op, Place

ROWS = 16  # that one launch takes at most
MULTIPLE = 16  # inputs come in multiples of it
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight in float8_e4m3fn or int8, scale (outputs,) float32) of weight (outputs, inputs), any float dtype."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / LARGEST[dtype]
    scaled = weight / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def thin_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, epilogue: str = "none", softcap: float = 15.0
) -> Tensor:
    """(N, outputs) in x's dtype, float32 after the softcap, from x (N, inputs), weight (outputs, inputs).

    scale: (outputs,) float32 or None. Raises ValueError for an unknown epilogue.
    """
    y = F.linear(x, weight.to(x.dtype))
    if scale is not None:
        y = (wide(y) * scale).to(x.dtype)
    if epilogue == "relu2":
        return F.relu(y).square()
    if epilogue == "softcap":
        return softcap * torch.tanh(wide(y) / softcap)
    if epilogue != "none":
        raise ValueError(f"epilogue {epilogue!r}: use none, relu2 or softcap")
    return y


def _needs_bf16(place: Place) -> str | None:
    return "computes in bfloat16" if place.dtype != torch.bfloat16 else needs_cuda_ops(place)


def _cases() -> Iterator[Case]:
    def make(rows, inputs, outputs, weights=torch.bfloat16, epilogue="none", strided=False):
        def build(device, dtype, generator):
            x = normal((rows, 2 * inputs if strided else inputs), device, dtype, generator)[:, :inputs]
            weight = normal((outputs, inputs), device, torch.float32, generator, inputs**-0.5)
            scale = None
            if weights != torch.bfloat16:
                weight, scale = quantize(weight, weights)
            return (x, weight.to(weights), scale, epilogue), {}

        return build

    both = (torch.bfloat16,)
    yield Case("bf16", make(1, 128, 96), both)
    yield Case("fp8", make(4, 128, 96, torch.float8_e4m3fn), both)
    yield Case("int8", make(4, 128, 96, torch.int8), both)
    yield Case("16 rows, relu²", make(16, 256, 128, epilogue="relu2"), both)
    yield Case("softcap, fp8", make(9, 192, 100, torch.float8_e4m3fn, "softcap"), both)
    yield Case("rows apart", make(3, 64, 40, strided=True), both)
    yield Case("prime outputs", make(5, 48, 53, torch.int8), both, size="odd")
    yield Case("one output", make(2, 16, 1), both, size="odd")
    yield Case("long k", make(7, 1744, 24, torch.int8), both, size="odd")
    for name, weights in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        yield Case(f"d12 head, {name}", make(1, 768, 32768, weights, "softcap"), both, size="model")
        yield Case(f"d24 fc, {name}, 16 rows", make(16, 1536, 6144, weights, "relu2"), both, size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, weight = args[:2]
    moved = weight.numel() * weight.element_size() + (x.size(0) * (x.size(1) + weight.size(0))) * x.element_size()
    return Cost(moved, 2 * x.size(0) * weight.numel())


thin_linear = Op(
    "thin_linear",
    torch=thin_linear_reference,
    cuda="nanochat_kernels.native_cuda:thin_linear",
    available={"cuda": _needs_bf16},
    custom=("cuda",),
    cases=_cases,
    cost=_cost,
)
