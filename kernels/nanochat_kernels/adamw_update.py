"""One AdamW step on a list of tensors, in place (Loshchilov, Hutter: arXiv 1711.05101).

    p ← p·(1 − lr·λ)
    m ← β₁m + (1−β₁)g        v ← β₂v + (1−β₂)g²
    p ← p − lr/(1−β₁ᵗ) · m / (√(v/(1−β₂ᵗ)) + ε)

lr, the betas and λ may differ from tensor to tensor, so that all groups can go in one call. Arithmetic is float32;
parameters and moments are stored in the parameter's dtype. Memory-bound: p, m and v are read and written once and g
read once when fused, against a dozen passes for the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanochat_kernels.numerics import normal, wide
from nanochat_kernels.registry import Case, Cost, Op, Place
from nanochat_kernels.triton_support import needs_triton

Number = float | Tensor
Numbers = Number | Sequence[Number]


def per_tensor(value: Numbers, count: int) -> list[Number]:
    """One number for each tensor: a sequence of that many, or the same for all."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"adamw_update: {len(value)} numbers for {count} tensors; give one, or one for each")
    return list(value)


def adamw_update_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: Numbers,
    beta1: Numbers,
    beta2: Numbers,
    eps: float,
    decay: Numbers,
) -> None:
    """Update params, exp_avg and exp_avg_sq in place. Lists of equal length; step counts from 1.

    lr, beta1, beta2 and decay: one number, or one for each tensor.
    """
    numbers = (per_tensor(x, len(params)) for x in (lr, beta1, beta2, decay))
    for p, g, m, v, lr_, beta1_, beta2_, decay_ in zip(params, grads, exp_avg, exp_avg_sq, *numbers):
        p32, g32, m32, v32 = wide(p), wide(g), wide(m), wide(v)
        m32 = m32.lerp(g32, 1 - beta1_)
        v32 = v32.lerp(g32.square(), 1 - beta2_)
        denominator = (v32 / (1 - beta2_**step)).sqrt() + eps
        p.copy_(p32 * (1 - lr_ * decay_) - lr_ / (1 - beta1_**step) * (m32 / denominator))
        m.copy_(m32)
        v.copy_(v32)


def adamw_update_fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: Numbers,
    beta1: Numbers,
    beta2: Numbers,
    eps: float,
    decay: Numbers,
) -> None:
    """torch's single-pass kernel: the same formula, one read and one write of everything."""
    groups: dict[tuple, list[int]] = {}
    numbers = list(zip(*(per_tensor(x, len(params)) for x in (lr, beta1, beta2, decay))))
    for i, p in enumerate(params):
        groups.setdefault((p.device, p.dtype, numbers[i]), []).append(i)
    for (device, _, (lr_, beta1_, beta2_, decay_)), members in groups.items():
        count = torch.as_tensor(step, dtype=torch.float32, device=device)
        torch._fused_adamw_(
            [params[i] for i in members],
            [grads[i].to(params[i].dtype) for i in members],
            [exp_avg[i] for i in members],
            [exp_avg_sq[i] for i in members],
            [],
            [count] * len(members),
            lr=lr_ if isinstance(lr_, Tensor) else float(lr_),
            beta1=float(beta1_),
            beta2=float(beta2_),
            weight_decay=float(decay_),
            eps=float(eps),
            amsgrad=False,
            maximize=False,
        )


def _cases() -> Iterator[Case]:
    def make(shapes, step=3, decay=0.01, lr=0.01):
        def build(device, dtype, generator):
            def tensors(scale):
                return [normal(shape, device, dtype, generator, scale) for shape in shapes]

            second = [x.square() for x in tensors(1e-2)]
            kwargs = {"step": step, "lr": lr, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "decay": decay}
            return (tensors(1.0), tensors(1e-2), tensors(1e-2), second), kwargs

        return build

    yield Case("matrix", make([(64, 32)]))
    yield Case("group", make([(64, 32), (7,), (1, 24)]))
    yield Case("several groups", make([(16, 8), (7,), (3000,)], lr=[0.1, 0.01, 0.3], decay=[0.0, 0.1, 0.01]))
    yield Case("late, no decay", make([(33, 5)], step=1000, decay=0.0))
    yield Case("scalar", make([(), (1,)], step=1), size="odd")
    yield Case("prime", make([(1009,)]), size="odd")
    yield Case("d12 head", make([(32768, 768)]), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    elements = sum(p.numel() for p in args[0])
    return Cost(7 * sum(p.numel() * p.element_size() for p in args[0]), 14 * elements)


def _has_fused(place: Place) -> str | None:
    return None if place.device.type in ("cpu", "cuda") else f"torch has no fused AdamW on {place.device.type}"


adamw_update = Op(
    "adamw_update",
    torch=adamw_update_reference,
    fused=adamw_update_fused,
    triton="nanochat_kernels.adamw_update_triton:adamw_update_triton",
    available={"fused": _has_fused, "triton": needs_triton},
    custom=("triton",),
    auto=(("fused", lambda place: True, "one pass over parameters and moments"),),
    cases=_cases,
    cost=_cost,
    mutates=("params", "exp_avg", "exp_avg_sq"),
)
