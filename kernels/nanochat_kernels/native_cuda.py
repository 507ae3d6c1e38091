"""The CUDA kernels of csrc/ as backends: where they can run, and their functions under the ops' signatures.

The same functions serve CPU tensors when NANOCHAT_CUDA_EMULATOR names a library in which the .cu files were compiled
as C++ over csrc/emulator.cuh (tests/native builds one): like Triton's interpreter, a check of kernels without a GPU.

These are inference kernels. Where an op has gradients, they are the reference's, computed anew in the backward pass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels import native
from nanochat_kernels.registry import Place

EMULATOR = "NANOCHAT_CUDA_EMULATOR"
DTYPES = (torch.float32, torch.bfloat16)


def needs_cuda_ops(place: Place) -> str | None:
    """The probe of every backend here."""
    if place.dtype not in DTYPES:
        return "computes in float32 or bfloat16"
    if place.device.type == "cpu":
        return None if _emulated() else f"needs an NVIDIA GPU (or {EMULATOR} to check it without one)"
    if place.device.type != "cuda":
        return f"CUDA kernels do not run on {place.device.type}"
    reason = native.missing()
    if reason:
        return reason
    if not native.bindings().cuda:
        return "the C++ extension was built without CUDA; build it where nvcc is found"
    capability = torch.cuda.get_device_capability(place.device)
    return None if capability == (9, 0) else f"built for Hopper (9.0), this GPU has {capability[0]}.{capability[1]}"


@functools.cache
def _emulated() -> bool:
    """Loads the emulator's library where the environment names one."""
    path = os.environ.get(EMULATOR)
    if path:
        torch.ops.load_library(path)
        _register_fakes("nanochat_emulated")
    return bool(path)


def _loaded() -> None:
    native.load()
    _register_fakes("nanochat")


def _ops(x: Tensor) -> Any:
    """The namespace of torch ops that serves x's device."""
    if x.device.type == "cpu" and _emulated():
        return torch.ops.nanochat_emulated
    _loaded()
    return torch.ops.nanochat


def _one(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach().float()


class _WithReferenceGradient(torch.autograd.Function):
    """A kernel forward; backward through the reference, on the saved inputs."""

    @staticmethod
    def forward(ctx, kernel, reference, *inputs):
        ctx.reference = reference
        ctx.save_for_backward(*inputs)
        results = kernel(*(x if x is None else x.detach() for x in inputs))
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx, *gradients):
        inputs = [x if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            results = ctx.reference(*inputs)
        wanted = [x for x in inputs if x is not None]
        found = iter(torch.autograd.grad(results, wanted, gradients, allow_unused=True))
        return None, None, *(None if x is None else next(found) for x in inputs)


def rms_norm(
    x: Tensor,
    delta: Tensor | None = None,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """nanochat_kernels.rms_norm; up to 8,192 channels."""
    inputs = (x, delta, scale, other, other_scale)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs):
        from nanochat_kernels.rms_norm import rms_norm_reference

        return _WithReferenceGradient.apply(_rms_norm, rms_norm_reference, *inputs)
    return _rms_norm(*inputs)


def _rms_norm(
    x: Tensor, delta: Tensor | None, scale: Tensor | None, other: Tensor | None, other_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    streams = [None if value is None else value.contiguous() for value in (x, delta, other)]
    y, mixed = _ops(x).residual_norm(streams[0], streams[1], _one(scale), streams[2], _one(other_scale))
    return y, mixed if mixed.numel() or not x.numel() else x


def smeared_embedding(
    tokens: Tensor,
    previous: Tensor,
    table: Tensor,
    smear_weight: Tensor | None = None,
    smear_scale: Tensor | None = None,
) -> Tensor:
    """nanochat_kernels.smeared_embedding; up to 8,192 channels, 32 of them for the smear."""
    return _ops(table).smeared_embedding(tokens, previous, table, smear_weight, smear_scale)


def thin_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, epilogue: str = "none", softcap: float = 15.0
) -> Tensor:
    """nanochat_kernels.thin_linear; inputs in multiples of 16."""
    return _ops(x).thin_linear(x, weight, scale, epilogue, softcap)


def paged_qkv(
    qkv: Tensor,
    x: Tensor,
    tokens: Tensor,
    positions: Tensor,
    table: Tensor,
    starts: Tensor,
    cos: Tensor,
    sin: Tensor,
    embeddings: Tensor | None,
    gate_weight: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float = 1.2,
) -> None:
    """nanochat_kernels.paged_qkv; even head sizes up to 256."""
    _ops(qkv).paged_qkv(
        qkv, x, tokens, positions, table, starts, cos, sin, embeddings, gate_weight, k_cache, v_cache, scale
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    window: int,
    arrivals: Tensor | None = None,
) -> Tensor:
    """nanochat_kernels.paged_attention, also over an FP8 cache (float8_e4m3fn with bfloat16 queries).

    arrivals: int32 zeros, one or more per token and key/value head, kept between calls: no launch has to clear them.
    """
    ops = _ops(q)
    if arrivals is None:
        return ops.paged_attention(q, k_cache, v_cache, table, starts, lengths, window)
    return ops.split_paged_attention(q, k_cache, v_cache, table, starts, lengths, window, arrivals)


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """nanochat_kernels.sample in one launch; the same draws."""
    return _ops(logits).draw_tokens(logits.float().contiguous(), seeds, positions, temperature, top_k, top_p, min_p)


def softmax_and_gradient(panel: Tensor, targets: Tensor, nll: Tensor, softcap: float, gradients: bool) -> None:
    """The elementwise step of linear_softcap_cross_entropy_chunked.py: panel is read once and overwritten."""
    _ops(panel).softcap_cross_entropy(panel, targets, nll, softcap, gradients)


def linear_softcap_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float = 15.0,
    reduction: str = "mean",
) -> Tensor:
    """nanochat_kernels.linear_softcap_cross_entropy: the chunked walk with this elementwise step."""
    from nanochat_kernels.linear_softcap_cross_entropy_chunked import linear_softcap_cross_entropy_chunked

    return linear_softcap_cross_entropy_chunked(
        x, weight, targets, token_weights, vocab_size, softcap, reduction, fused="cuda"
    )


@functools.cache
def _register_fakes(namespace: str) -> None:
    """What shapes come out, for tracing. paged_attention's stands in native.py for the library proper."""

    def fake(name: str) -> Callable:
        return torch.library.register_fake(f"{namespace}::{name}")

    @fake("residual_norm")
    def _(x, delta, scale, other, other_scale):
        plain = delta is None and scale is None and other is None
        return torch.empty_like(x), x.new_empty(0) if plain else torch.empty_like(x)

    @fake("smeared_embedding")
    def _(tokens, previous, table, smear_weight, smear_scale):
        return table.new_empty(tokens.size(0), table.size(1))

    @fake("thin_linear")
    def _(x, weight, scale=None, epilogue="none", softcap=15.0):
        return x.new_empty(x.size(0), weight.size(0), dtype=torch.float32 if epilogue == "softcap" else x.dtype)

    @fake("paged_qkv")
    def _(qkv, x, tokens, positions, table, starts, cos, sin, embeddings, gate_weight, k_cache, v_cache, scale):
        return None

    @fake("split_paged_attention")
    def _(q, k_cache, v_cache, table, starts, lengths, window, arrivals):
        return q.new_empty(q.shape)

    @fake("draw_tokens")
    def _(logits, seeds, positions, temperature, top_k, top_p, min_p):
        return logits.new_empty(logits.size(0), dtype=torch.int64)

    @fake("softcap_cross_entropy")
    def _(panel, targets, nll, softcap, gradients):
        return None

    if namespace != "nanochat":

        @fake("paged_attention")
        def _(q, k_cache, v_cache, table, starts, lengths, window):
            return q.new_empty(q.shape)
