"""The head and the loss in one op: logits, softcap, cross-entropy. How logits exist is its own affair.

    l = x·Wᵀ        t = tanh(l/c)        z = c·t        nll = log Σ_v exp(z_v) − z_target
    ∂nll/∂l = (softmax(z) − onehot(target))·(1 − t²)        dx = dl·W        dW = dlᵀ·x

Targets of −1 are ignored. "mean" divides by the number of targets that count, never by their weights, so that a token
weight (RL's advantage) scales its token's gradient and nothing else; when no target counts the loss is 0.

The reference keeps several float32 copies of all logits: 4,096 tokens × 32,768 words are half a gigabyte each.
`chunked` walks over a few rows at a time and forms the gradients in the same pass, so that logits never leave the
cache; see linear_softcap_cross_entropy_chunked.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.native import on_cpu
from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.triton_support import needs_triton

IGNORE = -1
REDUCTIONS = ("mean", "sum", "none")


def linear_softcap_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float = 15.0,
    reduction: str = "mean",
) -> Tensor:
    """float32 loss: 0-d for "mean" and "sum", (N,) for "none".

    x (..., C) in the compute dtype; weight (padded vocabulary, C), any float dtype; targets (...) int64, −1 ignored;
    token_weights (...) multiply each token's loss; vocab_size crops the padding off.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: use one of {', '.join(REDUCTIONS)}")
    targets = targets.reshape(-1)
    logits = wide(F.linear(x.reshape(-1, x.size(-1)), weight.to(x.dtype)))[:, :vocab_size]
    logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    if token_weights is not None:
        nll = nll * token_weights.reshape(-1)
    if reduction == "none":
        return nll
    counted = (targets != IGNORE).sum().clamp(min=1)
    return nll.sum() / counted if reduction == "mean" else nll.sum()


def _cases() -> Iterator[Case]:
    def make(n, c, padded, vocab_size, *, ignored=0.2, weights=False, reduction="mean", weight_dtype=None, scale=1.0):
        def build(device, dtype, generator):
            x = normal((n, c), device, dtype, generator, scale)
            weight = normal((padded, c), device, weight_dtype or dtype, generator, c**-0.5 * 4)
            targets = torch.randint(0, vocab_size, (n,), generator=generator)
            targets[torch.rand(n, generator=generator) < ignored] = IGNORE
            kwargs = {"vocab_size": vocab_size, "reduction": reduction}
            if weights:
                kwargs["token_weights"] = normal((n,), device, torch.float32, generator)
            return (x, weight, targets.to(device)), kwargs

        return build

    yield Case("mean", make(40, 64, 192, 192))
    yield Case("padded vocabulary", make(40, 64, 192, 150))
    yield Case("float32 weight", make(40, 64, 192, 150, weight_dtype=torch.float32))
    yield Case("token weights", make(40, 64, 192, 192, weights=True))
    yield Case("sum", make(40, 64, 192, 192, weights=True, reduction="sum"))
    yield Case("none", make(40, 64, 192, 192, weights=True, reduction="none"))
    yield Case("all ignored", make(16, 64, 192, 192, ignored=2.0))
    yield Case("saturated", make(16, 64, 192, 192, scale=8.0))
    yield Case("prime", make(307, 37, 64, 53), size="odd")
    yield Case("one token", make(1, 8, 64, 1, ignored=0), size="odd")
    yield Case("d4", make(4096, 256, 32768, 32768), size="model")
    yield Case("d12", make(16384, 768, 32768, 32768), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, weight, _ = args
    rows = x.numel() // x.size(-1)
    return Cost(2 * (x.numel() + weight.numel()) * x.element_size(), 6 * rows * weight.numel())


linear_softcap_cross_entropy = Op(
    "linear_softcap_cross_entropy",
    torch=linear_softcap_cross_entropy_reference,
    chunked="nanochat_kernels.linear_softcap_cross_entropy_chunked:linear_softcap_cross_entropy_chunked",
    triton="nanochat_kernels.linear_softcap_cross_entropy_triton:linear_softcap_cross_entropy_triton",
    cuda="nanochat_kernels.native_cuda:linear_softcap_cross_entropy",
    native="nanochat_kernels.native:linear_softcap_cross_entropy",
    available={"triton": needs_triton, "cuda": needs_cuda_ops, "native": on_cpu},
    custom=("triton", "cuda", "native", "chunked"),
    auto=(
        ("native", lambda place: place.device.type == "cpu", "and the elementwise work takes two walks over each row"),
        ("chunked", lambda place: place.device.type == "cpu", "logits stay in the cache, gradients in the same pass"),
    ),
    cases=_cases,
    cost=_cost,
    differentiable=("x", "weight"),
)
