"""The head at inference and evaluation: float32 logits c·tanh(x·Wᵀ/c), cropped to the real vocabulary.

The product is taken in x's dtype, as in training, and widened before the softcap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op


def softcapped_logits_reference(
    x: Tensor, weight: Tensor, vocab_size: int | None = None, softcap: float = 15.0
) -> Tensor:
    """float32 (..., vocab_size) from x (..., C) and weight (padded vocabulary, C) in any float dtype."""
    logits = F.linear(x, weight[:vocab_size].to(x.dtype))
    return softcap * torch.tanh(wide(logits) / softcap)


def softcapped_logits_inplace(
    x: Tensor, weight: Tensor, vocab_size: int | None = None, softcap: float = 15.0
) -> Tensor:
    """The reference with one buffer: at large batches the logits are the largest tensor of a decode step."""
    logits = wide(F.linear(x, weight[:vocab_size].to(x.dtype)))
    return logits.div_(softcap).tanh_().mul_(softcap)


def _cases() -> Iterator[Case]:
    def make(rows, c, padded, vocab_size, scale=1.0):
        def build(device, dtype, generator):
            x = normal((*rows, c), device, dtype, generator, scale)
            return (x, normal((padded, c), device, dtype, generator)), {"vocab_size": vocab_size}

        return build

    yield Case("small", make((2, 5), 64, 128, None))
    yield Case("padded", make((3,), 64, 128, 101))
    yield Case("saturated", make((3,), 64, 128, 128, 10.0))
    yield Case("prime", make((7,), 37, 64, 53), size="odd")
    yield Case("d12 decode", make((8, 1), 768, 32768, 32768), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, weight = args
    rows, vocab = x.numel() // x.size(-1), kwargs.get("vocab_size") or weight.size(0)
    moved = weight.numel() * weight.element_size() + rows * vocab * 4 + x.numel() * x.element_size()
    return Cost(moved, 2 * rows * weight.numel())


softcapped_logits = Op(
    "softcapped_logits",
    torch=softcapped_logits_reference,
    inplace=softcapped_logits_inplace,
    auto=(("inplace", lambda place: place.device.type == "cpu", "one buffer of logits instead of four"),),
    cases=_cases,
    cost=_cost,
)
