"""The MLP of a block: h = x·W_fcᵀ, a = relu(h)², y = a·W_projᵀ, without biases.

    da = dy·W_proj        dh = 2·relu(h)·da        dx = dh·W_fc        dW_proj = dyᵀ·a        dW_fc = dhᵀ·x

Only relu(h) need be kept for the backward pass: its square gives a, and its sign the mask. Compute-bound; the point
of a fused kernel is that the square costs no pass over memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.triton_support import needs_triton


def relu2_mlp_reference(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """(..., C) in x's dtype from x (..., C), w_fc (hidden, C), w_proj (C, hidden) in any float dtype."""
    hidden = F.relu(F.linear(x, w_fc.to(x.dtype))).square()
    return F.linear(hidden, w_proj.to(x.dtype))


class _Lean(torch.autograd.Function):
    """Keeps relu(h) alone, and leaves the 2 of dh to the four times smaller dx and dW_fc."""

    @staticmethod
    def forward(ctx, x, w_fc, w_proj):
        fc, proj = w_fc.to(x.dtype), w_proj.to(x.dtype)
        positive = F.linear(x, fc).relu_()
        ctx.save_for_backward(x, fc, proj, positive)
        ctx.weight_dtypes = w_fc.dtype, w_proj.dtype
        return F.linear(positive.square(), proj)

    @staticmethod
    def backward(ctx, grad):
        x, fc, proj, positive = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        d_proj = rows.mT @ positive.flatten(0, -2).square()
        d_hidden = (grad @ proj).mul_(positive)
        d_fc = d_hidden.flatten(0, -2).mT @ x.flatten(0, -2)
        d_x = (d_hidden @ fc).mul_(2)
        return d_x, d_fc.to(ctx.weight_dtypes[0]).mul_(2), d_proj.to(ctx.weight_dtypes[1])


def relu2_mlp_lean(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """The reference with one hidden tensor kept instead of two, and half the elementwise passes in backward; without
    gradients, with one hidden tensor altogether."""
    if not torch.is_grad_enabled():
        hidden = F.linear(x, w_fc.to(x.dtype)).relu_()
        return F.linear(hidden.mul_(hidden), w_proj.to(x.dtype))
    return _Lean.apply(x, w_fc, w_proj)


def _cases() -> Iterator[Case]:
    def make(rows, c, hidden, weight_dtype=None):
        def build(device, dtype, generator):
            x = normal((*rows, c), device, dtype, generator)
            w_fc = normal((hidden, c), device, weight_dtype or dtype, generator, c**-0.5)
            return (x, w_fc, normal((c, hidden), device, weight_dtype or dtype, generator, hidden**-0.5)), {}

        return build

    yield Case("small", make((2, 8), 64, 256))
    yield Case("float32 weights", make((2, 8), 64, 256, torch.float32))
    yield Case("prime", make((3, 7), 37, 101), size="odd")
    yield Case("several tiles", make((3, 50), 40, 200), size="odd")
    yield Case("one", make((1,), 1, 4), size="odd")
    yield Case("d12", make((8, 2048), 768, 3072), size="model")
    yield Case("d24", make((8, 2048), 1536, 6144), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    x, w_fc, w_proj = args
    rows = x.numel() // x.size(-1)
    moved = 2 * x.numel() + rows * w_fc.size(0) * 2 + w_fc.numel() + w_proj.numel()
    return Cost(moved * x.element_size(), 4 * rows * w_fc.numel())


relu2_mlp = Op(
    "relu2_mlp",
    torch=relu2_mlp_reference,
    lean=relu2_mlp_lean,
    triton="nanochat_kernels.relu2_mlp_triton:relu2_mlp_triton",
    available={"triton": needs_triton},
    custom=("triton",),
    auto=(("lean", lambda place: place.forward_on_cpu, "one hidden tensor, squared where it lies"),),
    cases=_cases,
    cost=_cost,
    differentiable=("x", "w_fc", "w_proj"),
)
