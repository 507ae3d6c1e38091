"""RMSNorm without weights, together with the residual additions that precede it.

    mixed = scale·(x + delta) + other_scale·other          absent terms drop out
    y     = mixed · (mean(mixed²) + ε)^-½                  mean over the last dimension, ε = 2⁻²³ in every dtype

One op serves every norm of the model: after the embedding (x alone), at the entry of a block (delta is the previous
MLP's output, scale and other_scale the learned mix with x0), before the MLP (delta is attention's output), and before
the head (other is the mid-depth stream, subtracted). Both results are needed: y feeds the matrix products, mixed is
the new stream.

Memory-bound: a fused kernel reads each input once and writes two tensors; torch in eager mode makes four to eight
passes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import EPS, normal
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.triton_support import needs_triton


def rms_norm_reference(
    x: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, mixed), both (..., C) in x's dtype. delta and other: like x; the scales: 0-d or one element, any float
    dtype.

    A scale's precision follows torch's promotion: a 0-d float32 tensor does not widen a bf16 one.
    """
    mixed = x if delta is None else x + delta
    if scale is not None:
        mixed = scale.reshape(()) * mixed
    if other is not None:
        mixed = mixed + (other if other_scale is None else other_scale.reshape(()) * other)
    return F.rms_norm(mixed, (mixed.size(-1),), eps=EPS), mixed


def _cases() -> Iterator[Case]:
    def make(shape, extras):
        def build(device, dtype, generator):
            args = [normal(shape, device, dtype, generator) for _ in range(3)]
            scales = [torch.tensor(s, device=device) for s in (1.1, -0.2)]
            given = {"delta": args[1], "scale": scales[0], "other": args[2], "other_scale": scales[1].reshape(1)}
            return (args[0],), {name: given[name] for name in extras}

        return build

    full = ("delta", "scale", "other", "other_scale")
    yield Case("plain", make((2, 8, 64), ()))
    yield Case("block entry", make((2, 8, 64), full))
    yield Case("delta only", make((2, 8, 64), ("delta",)))
    yield Case("final", make((2, 8, 64), ("delta", "other", "other_scale")))
    yield Case("one element", make((1, 1, 1), full), size="odd")
    yield Case("prime", make((3, 7, 131), full), size="odd")
    yield Case("d12", make((8, 2048, 768), full), size="model")
    yield Case("d24", make((8, 2048, 1536), full), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x = args[0]
    inputs = 1 + ("delta" in kwargs) + ("other" in kwargs)
    outputs = 2 if kwargs else 1
    return Cost((inputs + outputs) * x.numel() * x.element_size(), (4 + 2 * len(kwargs)) * x.numel())


rms_norm = Op(
    "rms_norm",
    torch=rms_norm_reference,
    triton="nanochat_kernels.rms_norm_triton:rms_norm_triton",
    cuda="nanochat_kernels.native_cuda:rms_norm",
    available={"triton": needs_triton, "cuda": needs_cuda_ops},
    custom=("triton",),
    cases=_cases,
    cost=_cost,
    differentiable=("x", "delta", "scale", "other", "other_scale"),
)
