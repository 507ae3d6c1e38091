"""rms_norm that hands its result to FP8 products: cast where it is made, at a scale known beforehand.

    mixed = scale·(x + delta) + other_scale·other        y = mixed·(mean(mixed²) + ε)^-½        y8 = cast(s·y)

No element of a normed row exceeds √C, so s = the power of two that puts √C below 2⁸ is right whatever the input: no
amax is looked for, no history kept. It costs range, not precision: elements below √C/2¹⁴, some 0.003 where 1 is usual,
begin to lose bits.

Results in both orders, since dx and the products forward sum over channels and dW sums over tokens. The first 16
channels also come in the input's dtype: the gates of the value embeddings read 12 of them. Without FP8 the norm writes
y in bf16 and a cast reads it: 2·2 + 1 + (1 + 1 + 1 for a separate transpose) bytes an element after mixed; here 1 + 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.fp8_quantize import E4M3, cast, scale_for
from nanochat_kernels.numerics import EPS, normal, wide
from nanochat_kernels.registry import Case, Cost, Op, Tolerance
from nanochat_kernels.triton_support import needs_triton

HEAD = 16  # channels that also come uncast


def static_scale(channels: int) -> float:
    """The scale of a normed row: a power of two, exact in every dtype."""
    return float(scale_for(channels**0.5, E4M3))


def fp8_rms_norm_reference(
    x: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y8 (M, C), y8ᵀ (C, M), the first channels of y (M, 16 or C), mixed (M, C)) of x, delta, other (M, C).

    The scales are one element of any float dtype; y8 holds y times `static_scale`. Precision as in rms_norm, but y is
    rounded once, to FP8.
    """
    mixed = x if delta is None else x + delta
    if scale is not None:
        mixed = scale.reshape(()) * mixed
    if other is not None:
        mixed = mixed + (other if other_scale is None else other_scale.reshape(()) * other)
    y = F.rms_norm(wide(mixed), (mixed.size(-1),), eps=EPS)
    y8 = cast(y, static_scale(y.size(-1)), E4M3)
    return y8, y8.mT.contiguous(), y[:, :HEAD].to(x.dtype).contiguous(), mixed


def _cases() -> Iterator[Case]:
    def make(rows, columns, extras):
        def build(device, dtype, generator):
            x, delta, other = (normal((rows, columns), device, dtype, generator) for _ in range(3))
            scales = [torch.tensor(s, device=device) for s in (1.1, -0.2)]
            given = {"delta": delta, "scale": scales[0], "other": other, "other_scale": scales[1].reshape(1)}
            return (x,), {name: given[name] for name in extras}

        return build

    full = ("delta", "scale", "other", "other_scale")
    yield Case("plain", make(32, 64, ()))
    yield Case("block entry", make(32, 64, full))
    yield Case("delta only", make(48, 160, ("delta",)))
    yield Case("prime", make(67, 131, full), size="odd")
    yield Case("one element", make(1, 1, ()), size="odd")
    yield Case("d12", make(16384, 768, full), size="model")
    yield Case("d24", make(16384, 1536, full), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x = args[0]
    tensors = 1 + ("delta" in kwargs) + ("other" in kwargs) + bool(kwargs)
    moved = tensors * x.element_size() + 2
    return Cost(moved * x.numel(), (5 + 2 * len(kwargs)) * x.numel())


fp8_rms_norm = Op(
    "fp8_rms_norm",
    torch=fp8_rms_norm_reference,
    triton="nanochat_kernels.rms_norm_triton:fp8_rms_norm_triton",
    available={"triton": needs_triton},
    auto=(("triton", lambda place: place.device.type == "cuda", "the cast costs no pass over memory"),),
    custom=("triton",),
    cases=_cases,
    cost=_cost,
    # Where two orders of the sum of squares fall to the two sides of a tie, the neighboring FP8 number: one part in 8.
    tolerance=Tolerance(factor=1.0, float32=0.125, bfloat16=0.125, float16=0.125),
)
