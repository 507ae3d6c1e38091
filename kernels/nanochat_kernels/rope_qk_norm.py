"""Rotary positions and RMSNorm on queries and keys, and the gated value embedding on values, in one op.

    rotate(x) = (x1·cos + x2·sin, x2·cos − x1·sin)         x1, x2 the halves of a head: a rotation by −θ
    q, k      = scale·rmsnorm(rotate(q)), scale·rmsnorm(rotate(k))
    v         = v + 3·sigmoid(gate)·ve                     per key/value head, when a value embedding is given

The norm follows the rotation, which preserves lengths: a fused kernel may take the sum of squares before rotating.
Memory-bound; q, k and v are read and written once when fused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.numerics import EPS, normal
from nanochat_kernels.registry import Case, Cost, Op
from nanochat_kernels.triton_support import needs_triton

GATE_SCALE = 3.0


def rope_qk_norm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    ve: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    scale: float = 1.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of the given shapes and dtype.

    q (B, T, H, D); k, v (B, T, G, D); cos, sin (T, D/2), or (B, T, D/2) where each row has positions of its own.
    ve (B, T, G·D) or (B, T, G, D) with gate logits (B, T, G).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    q, k = (_rotate_and_norm(x, cos, sin, scale) for x in (q, k))
    if ve is not None and gate is not None:
        v = v + (GATE_SCALE * torch.sigmoid(gate)).unsqueeze(-1) * ve.view_as(v)
    return q, k, v


def _rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    rotated = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
    return scale * F.rms_norm(rotated, (x.size(-1),), eps=EPS)


def rope_qk_norm_lean(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    ve: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    scale: float = 1.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference without gradients in fewer passes over memory: halves are rotated straight into the result, and the
    norm is taken of what came in. With gradients, the reference."""
    if torch.is_grad_enabled():
        return rope_qk_norm_reference(q, k, v, cos, sin, ve, gate, scale=scale)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    q, k = (_rotate_and_norm_into(x.new_empty(x.shape), x, cos, sin, scale) for x in (q, k))
    if ve is not None and gate is not None:
        v = torch.addcmul(v, (GATE_SCALE * torch.sigmoid(gate)).unsqueeze(-1), ve.view_as(v))
    return q, k, v


def _rotate_and_norm_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=-1)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    factor = scale * torch.rsqrt(length.square() / x.size(-1) + EPS)
    return out.mul_(factor.to(x.dtype))


def _cases() -> Iterator[Case]:
    def make(b, t, h, g, d, embedding=True, per_row=False, packed=False):
        def build(device, dtype, generator):
            if packed:  # views of one QKV product, as the model makes them
                qkv = normal((b, t, (h + 2 * g) * d), device, dtype, generator)
                q, k, v = (x.unflatten(-1, (-1, d)) for x in qkv.split([h * d, g * d, g * d], dim=-1))
            else:
                q, k, v = (normal((b, t, n, d), device, dtype, generator) for n in (h, g, g))
            angle = torch.rand((b, t, d // 2) if per_row else (t, d // 2), generator=generator) * 6.3
            tables = (angle.cos().to(device, dtype), angle.sin().to(device, dtype))
            extra = (normal((b, t, g * d), device, dtype, generator), normal((b, t, g), device, dtype, generator))
            return (q, k, v, *tables, *(extra if embedding else ())), {}

        return build

    yield Case("value embedding", make(2, 8, 2, 2, 32))
    yield Case("grouped, no embedding", make(2, 8, 4, 2, 64, embedding=False))
    yield Case("packed qkv", make(2, 8, 2, 1, 32, packed=True))
    yield Case("decode", make(3, 1, 4, 2, 64, per_row=True))
    yield Case("prime", make(3, 7, 5, 5, 34), size="odd")
    yield Case("d12", make(8, 2048, 6, 6, 128), size="model")
    yield Case("d24", make(8, 2048, 12, 12, 128), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    q, k, v, ve = args[0], args[1], args[2], args[5] if len(args) > 5 else None
    moved = 2 * (q.numel() + k.numel()) + (3 * v.numel() if ve is not None else 0)
    return Cost(moved * q.element_size(), 10 * (q.numel() + k.numel()) + (2 * v.numel() if ve is not None else 0))


rope_qk_norm = Op(
    "rope_qk_norm",
    torch=rope_qk_norm_reference,
    lean=rope_qk_norm_lean,
    triton="nanochat_kernels.rope_qk_norm_triton:rope_qk_norm_triton",
    available={"triton": needs_triton},
    custom=("triton",),
    auto=(("lean", lambda place: place.forward_on_cpu, "halves rotated into the result, no copies"),),
    cases=_cases,
    cost=_cost,
    differentiable=("q", "k", "v", "ve", "gate"),
)
