"""rope_qk_norm in Triton: one program per token, all its heads in one tile, every tensor read and written once.

A head's two halves are loaded as two (heads, D/2) tiles that share one row of cos and sin. The length that the norm
needs is that of the head before rotation, which a rotation does not change; only rounding would tell the difference.

Backward keeps q and k and forms the rotation again. With u = rotated/rms the gradient of the norm is scale·(g −
u·mean(g·u))/rms, and the gradient of a rotation by −θ is the rotation by θ. v's own gradient passes through. q, k and
v may be views of one QKV product (any strides before the last dimension); results are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.compiled import Build
from nanochat_kernels.numerics import EPS
from nanochat_kernels.rope_qk_norm import GATE_SCALE


@triton.jit
def _tile(heads, half, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    head = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    return head, d, (head < heads) & (d < half)


@triton.jit
def _rotate_norm_fwd(
    x_ptr, out_ptr, head_stride, cos, sin, heads, half, scale, eps, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    head, d, inside = _tile(heads, half, BLOCK_H, BLOCK_D)
    offset = head * head_stride + d
    x1 = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offset + half, mask=inside, other=0.0).to(tl.float32)
    y1 = x1 * cos + x2 * sin
    y2 = x2 * cos - x1 * sin
    r = scale * tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, axis=1) / (2 * half) + eps)[:, None]
    out = head * (2 * half) + d
    tl.store(out_ptr + out, y1 * r, mask=inside)
    tl.store(out_ptr + out + half, y2 * r, mask=inside)


@triton.jit
def _rotate_norm_bwd(
    x_ptr, g_ptr, dx_ptr, head_stride, cos, sin, heads, half, scale, eps,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, d, inside = _tile(heads, half, BLOCK_H, BLOCK_D)
    offset = head * head_stride + d
    out = head * (2 * half) + d
    x1 = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offset + half, mask=inside, other=0.0).to(tl.float32)
    g1 = tl.load(g_ptr + out, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(g_ptr + out + half, mask=inside, other=0.0).to(tl.float32)
    y1 = x1 * cos + x2 * sin
    y2 = x2 * cos - x1 * sin
    r = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, axis=1) / (2 * half) + eps)[:, None]
    y1 *= r
    y2 *= r
    mean = (tl.sum(g1 * y1 + g2 * y2, axis=1) / (2 * half))[:, None]
    d1 = scale * r * (g1 - y1 * mean)
    d2 = scale * r * (g2 - y2 * mean)
    tl.store(dx_ptr + out, d1 * cos - d2 * sin, mask=inside)
    tl.store(dx_ptr + out + half, d1 * sin + d2 * cos, mask=inside)


@triton.jit
def _rope_qk_norm_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, q_out, k_out, v_out,
    length, q_heads, kv_heads, half, table_batch_stride,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, eps, gate_scale, HAS_VE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    t = token % length
    d = tl.arange(0, BLOCK_D)[None, :]
    table = batch * table_batch_stride + t * half + d
    cos = tl.load(cos_ptr + table, mask=d < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=d < half, other=0.0).to(tl.float32)
    q_ptr += batch * q_batch + t * q_token
    k_ptr += batch * k_batch + t * k_token
    q_out += token * q_heads * 2 * half
    k_out += token * kv_heads * 2 * half
    _rotate_norm_fwd(q_ptr, q_out, q_head, cos, sin, q_heads, half, scale, eps, BLOCK_Q, BLOCK_D)
    _rotate_norm_fwd(k_ptr, k_out, k_head, cos, sin, kv_heads, half, scale, eps, BLOCK_G, BLOCK_D)
    if HAS_VE:
        head, e, inside = _tile(kv_heads, 2 * half, BLOCK_G, 2 * BLOCK_D)
        gate = tl.load(gate_ptr + token * kv_heads + head, mask=head < kv_heads, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + batch * v_batch + t * v_token + head * v_head + e, mask=inside, other=0.0).to(tl.float32)
        flat = (token * kv_heads + head) * 2 * half + e
        ve = tl.load(ve_ptr + flat, mask=inside, other=0.0).to(tl.float32)
        tl.store(v_out + flat, v + gate_scale * tl.sigmoid(gate) * ve, mask=inside)


@triton.jit
def _rope_qk_norm_bwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, gq_ptr, gk_ptr, gv_ptr, dq_ptr, dk_ptr, dve_ptr, dgate_ptr,
    length, q_heads, kv_heads, half, table_batch_stride, q_batch, q_token, q_head, k_batch, k_token, k_head,
    scale, eps, gate_scale, HAS_VE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    t = token % length
    d = tl.arange(0, BLOCK_D)[None, :]
    table = batch * table_batch_stride + t * half + d
    cos = tl.load(cos_ptr + table, mask=d < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=d < half, other=0.0).to(tl.float32)
    q_ptr += batch * q_batch + t * q_token
    k_ptr += batch * k_batch + t * k_token
    q_flat = token * q_heads * 2 * half
    k_flat = token * kv_heads * 2 * half
    _rotate_norm_bwd(
        q_ptr, gq_ptr + q_flat, dq_ptr + q_flat, q_head, cos, sin, q_heads, half, scale, eps, BLOCK_Q, BLOCK_D
    )
    _rotate_norm_bwd(
        k_ptr, gk_ptr + k_flat, dk_ptr + k_flat, k_head, cos, sin, kv_heads, half, scale, eps, BLOCK_G, BLOCK_D
    )
    if HAS_VE:
        head, e, inside = _tile(kv_heads, 2 * half, BLOCK_G, 2 * BLOCK_D)
        gate = tl.load(gate_ptr + token * kv_heads + head, mask=head < kv_heads, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        flat = (token * kv_heads + head) * 2 * half + e
        g = tl.load(gv_ptr + flat, mask=inside, other=0.0).to(tl.float32)
        ve = tl.load(ve_ptr + flat, mask=inside, other=0.0).to(tl.float32)
        tl.store(dve_ptr + flat, gate_scale * open_ * g, mask=inside)
        dgate = gate_scale * open_ * (1 - open_) * tl.sum(g * ve, axis=1)[:, None]
        tl.store(dgate_ptr + token * kv_heads + head, dgate, mask=head < kv_heads)


def rope_qk_norm_triton(
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
    """As the reference; cos and sin get no gradients. Without a value embedding v is returned as it came."""
    if ve is None or gate is None:
        q, k, _ = torch.ops.nanochat.rope_qk_norm(q, k, v, cos, sin, None, None, scale)
        return q, k, v
    return torch.ops.nanochat.rope_qk_norm(q, k, v, cos, sin, ve, gate, scale)


def _launch(q: Tensor, k: Tensor) -> dict[str, int]:
    d = triton.next_power_of_2(q.size(-1) // 2)
    heads = triton.next_power_of_2(q.size(2))
    blocks = {"BLOCK_Q": heads, "BLOCK_G": triton.next_power_of_2(k.size(2)), "BLOCK_D": d}
    return blocks | {"num_warps": min(max(heads * d // 256, 1), 8)}


def _sizes(q: Tensor, k: Tensor, cos: Tensor) -> tuple[int, ...]:
    table_batch_stride = cos.stride(0) if cos.dim() == 3 else 0
    return q.size(1), q.size(2), k.size(2), q.size(3) // 2, table_batch_stride


def _readable(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension is contiguous, copied where it is not."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


@torch.library.custom_op("nanochat::rope_qk_norm", mutates_args=())
def _rope_qk_norm(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), contiguous; v is empty without a value embedding."""
    q, k, v = _readable(q, k, v)
    cos, sin = cos.contiguous(), sin.contiguous()
    ve, gate = (None if x is None else x.contiguous() for x in (ve, gate))
    out = [x.new_empty(x.shape) for x in (q, k)] + [v.new_empty(v.shape if ve is not None else (0,))]
    _rope_qk_norm_fwd_kernel[(q.size(0) * q.size(1),)](
        q, k, v, cos, sin, ve, gate, *out, *_sizes(q, k, cos), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        scale, EPS, GATE_SCALE, HAS_VE=ve is not None, **_launch(q, k),
    )  # fmt: skip
    return out[0], out[1], out[2]


@_rope_qk_norm.register_fake
def _(q, k, v, cos, sin, ve, gate, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape if ve is not None else (0,))


@torch.library.custom_op("nanochat::rope_qk_norm_backward", mutates_args=())
def _rope_qk_norm_backward(
    gq: Tensor, gk: Tensor, gv: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    ve: Tensor | None, gate: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dve, dgate), the last two empty without a value embedding."""
    q, k = _readable(q, k)
    gq, gk, gv, cos, sin = (x.contiguous() for x in (gq, gk, gv, cos, sin))
    ve, gate = (None if x is None else x.contiguous() for x in (ve, gate))
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dve, dgate = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (ve, gate))
    _rope_qk_norm_bwd_kernel[(q.size(0) * q.size(1),)](
        q, k, cos, sin, ve, gate, gq, gk, gv, dq, dk, dve, dgate, *_sizes(q, k, cos), *q.stride()[:3], *k.stride()[:3],
        scale, EPS, GATE_SCALE, HAS_VE=ve is not None, **_launch(q, k),
    )  # fmt: skip
    return dq, dk, dve, dgate


@_rope_qk_norm_backward.register_fake
def _(gq, gk, gv, q, k, cos, sin, ve, gate, scale):
    dve, dgate = (q.new_empty((0,) if x is None else x.shape) for x in (ve, gate))
    return q.new_empty(q.shape), k.new_empty(k.shape), dve, dgate


def _setup(ctx, inputs, output):
    q, k, _, cos, sin, ve, gate, ctx.scale = inputs
    ctx.save_for_backward(q, k, cos, sin, ve, gate)


def _backward(ctx, gq, gk, gv):
    q, k, cos, sin, ve, gate = ctx.saved_tensors
    saved = (q, k, cos, sin, ve, gate, ctx.scale)
    dq, dk, dve, dgate = torch.ops.nanochat.rope_qk_norm_backward(gq, gk, gv, *saved)
    if ve is None:
        return dq, dk, None, None, None, None, None, None
    return dq, dk, gv, None, None, dve, dgate, None


_rope_qk_norm.register_autograd(_backward, setup_context=_setup)


def shipped() -> Iterator[Build]:
    """The launches of the model at depths 12 and 24 in bf16, with and without a value embedding."""
    for heads in (6, 12):
        q = torch.empty((1, 1, heads, 128), device="meta")
        launch = _launch(q, q)
        warps = launch.pop("num_warps")
        for kernel in (_rope_qk_norm_fwd_kernel, _rope_qk_norm_bwd_kernel):
            for ve in (True, False):
                constants: dict[str, object] = {**launch, "HAS_VE": ve}
                absent = () if ve else ("ve_ptr", "gate_ptr", "v_out", "dve_ptr", "dgate_ptr", "gv_ptr")
                constants |= {name: None for name in absent if name in kernel.arg_names}
                arguments = {n: _type(n) for n in kernel.arg_names if n not in constants}
                direction = "forward" if kernel is _rope_qk_norm_fwd_kernel else "backward"
                kind = "embedding" if ve else "plain"
                name = f"rope_qk_norm {direction} {kind} {heads} heads"
                yield Build(name, kernel, arguments, constants, warps, odd=("q_heads", "kv_heads"))


def _type(name: str) -> str:
    if name.endswith(("_ptr", "_out")):
        return "*bf16"
    return "fp32" if name in ("scale", "eps", "gate_scale") else "i32"
