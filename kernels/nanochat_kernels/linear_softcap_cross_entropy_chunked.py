"""The head's loss over a few rows of logits at a time, gradients formed in the same pass.

With s = sigmoid(2l/c) the softcap costs one exponential: c·tanh(l/c) = 2c·s − c. The shift drops out of the softmax,
and

    p = softmax(2c·s)        nll = −log p_target        ∂nll/∂l = 4·s(1−s)·(p − onehot)

Two block sizes. Rows are taken PANEL elements of logits at a time, enough for efficient matrix products; within a
panel the elementwise work goes TILE elements at a time, so that its six passes run in the second-level cache
(measured eight times faster than passes over memory on a 2-core CPU). The gradient overwrites the panel, dx and dW
follow at once, and no panel outlives its turn. dW accumulates in float32. The 4, the mean's 1/count and the incoming
gradient are applied to dx and dW, never to the panel: that saves passes, and a float16 panel does not underflow.

The price: gradients are formed in the forward pass, wanted or not by the time of backward; and each panel of a 16-bit
product costs a pass over dW, which is why panels are not smaller. On CPUs without 16-bit matrix instructions the
products are taken in float32, which is faster there and more exact. Ignored rows are left out of everything (one
synchronization on a GPU).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat_kernels.linear_softcap_cross_entropy import IGNORE, REDUCTIONS
from nanochat_kernels.numerics import product_dtype

PANEL = 1 << 25  # elements of logits per matrix product
GPU_PANEL = 1 << 28  # half a gigabyte in bf16; small enough beside the activations, large enough to fill the machine
TILE = 1 << 18  # elements per elementwise pass on a CPU
SAFE_SOFTCAP = 35.0  # up to here exp(2c)·vocabulary stays below float32's largest number


def linear_softcap_cross_entropy_chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float = 15.0,
    reduction: str = "mean",
    fused: str = "",
) -> Tensor:
    """As the reference. fused: who does the elementwise work, "" (torch), "triton", csrc/ by "cuda" or "native" (CPU).

    Gradients for x, weight and, where they ask for it, token_weights; second derivatives not."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: use one of {', '.join(REDUCTIONS)}")
    x, targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    if token_weights is not None:
        token_weights = token_weights.reshape(-1)
    if reduction == "none":
        nll = torch.ops.nanochat.head_nll(x, weight, targets, vocab_size, softcap, fused)
        return nll if token_weights is None else nll * token_weights
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, token_weights))
    mean = reduction == "mean"
    return torch.ops.nanochat.head_loss(x, weight, targets, token_weights, vocab_size, softcap, fused, mean, wants)[0]


@torch.library.custom_op("nanochat::head_loss", mutates_args=())
def _head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    vocab_size: int | None,
    softcap: float,
    fused: str,
    mean: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll, dx, dW): the gradients of the loss, empty when not wanted."""
    counted = (targets != IGNORE).sum().clamp(min=1) if mean else torch.ones((), device=x.device)
    nll, dx, dw = _walk(x, weight, targets, token_weights, vocab_size, softcap, fused, gradients)
    loss = (nll if token_weights is None else nll * token_weights).sum() / counted
    if gradients:
        dx, dw = dx.div_(counted), dw.div_(counted)
    return loss, nll, dx.to(x.dtype), dw.to(weight.dtype)


@_head_loss.register_fake
def _(x, weight, targets, token_weights, vocab_size, softcap, fused, mean, gradients):
    dx, dw = (t.new_empty(t.shape if gradients else (0,)) for t in (x, weight))
    return x.new_empty((), dtype=torch.float32), x.new_empty(targets.shape, dtype=torch.float32), dx, dw


def _save_loss(ctx, inputs, output):
    _, nll, dx, dw = output
    ctx.mean, ctx.weighted = inputs[7], inputs[3] is not None
    ctx.save_for_backward(nll, dx, dw, inputs[2])
    ctx.mark_non_differentiable(nll, dx, dw)


def _loss_backward(ctx, grad, *unused):
    nll, dx, dw, targets = ctx.saved_tensors
    needs_x, needs_w, _, needs_token_weights, *_ = ctx.needs_input_grad
    d_token_weights = None
    if ctx.weighted and needs_token_weights:
        d_token_weights = grad * nll / ((targets != IGNORE).sum().clamp(min=1) if ctx.mean else 1)
    grads = (dx * grad.to(dx.dtype) if needs_x else None, dw * grad.to(dw.dtype) if needs_w else None)
    return *grads, None, d_token_weights, None, None, None, None, None


_head_loss.register_autograd(_loss_backward, setup_context=_save_loss)


@torch.library.custom_op("nanochat::head_nll", mutates_args=())
def _head_nll(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None, softcap: float, fused: str
) -> Tensor:
    return _walk(x, weight, targets, None, vocab_size, softcap, fused, gradients=False)[0]


@_head_nll.register_fake
def _(x, weight, targets, vocab_size, softcap, fused):
    return x.new_empty(targets.shape, dtype=torch.float32)


@torch.library.custom_op("nanochat::head_nll_backward", mutates_args=())
def _head_nll_backward(
    grad: Tensor, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None, softcap: float, fused: str
) -> tuple[Tensor, Tensor]:
    _, dx, dw = _walk(x, weight, targets, grad, vocab_size, softcap, fused, gradients=True)
    return dx.to(x.dtype), dw.to(weight.dtype)


@_head_nll_backward.register_fake
def _(grad, x, weight, targets, vocab_size, softcap, fused):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_nll(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _nll_backward(ctx, grad):
    """Every row has a gradient of its own here, unknown before: the logits are formed again."""
    dx, dw = torch.ops.nanochat.head_nll_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, dw, None, None, None, None


_head_nll.register_autograd(_nll_backward, setup_context=_save_nll)


def _walk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    vocab_size: int | None,
    softcap: float,
    fused: str,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """nll (N,) and the gradients of Σ row_scale·nll: dx (N, C) and dW (V, C), float32, empty when not wanted."""
    dtype = product_dtype(x.dtype, x.device)
    rows = (targets != IGNORE).nonzero().squeeze(1)
    everything = rows.numel() == targets.numel()
    used_x, used_targets = (x, targets) if everything else (x[rows], targets[rows])
    used_x = used_x.to(dtype)
    scaled_x, scale = used_x, None
    if row_scale is not None:
        scale = row_scale if everything else row_scale[rows]
        scaled_x = (used_x * scale.unsqueeze(1)).to(dtype)
    w = weight[:vocab_size].to(x.dtype).to(dtype)

    used_nll = x.new_empty(rows.numel(), dtype=torch.float32)
    used_dx = x.new_empty(used_x.shape if gradients else (0,), dtype=torch.float32)
    dw = x.new_zeros(weight.shape if gradients else (0,), dtype=torch.float32)
    height = max(1, (PANEL if x.device.type == "cpu" else GPU_PANEL) // w.size(0))
    elementwise = _fused_step(fused) if fused and softcap <= SAFE_SOFTCAP else _softmax_and_gradient
    for start in range(0, rows.numel(), height):
        part = slice(start, start + height)
        panel = used_x.new_empty((used_targets[part].numel(), w.size(0)))
        torch.addmm(panel, used_x[part], w.T, beta=0, alpha=2 / softcap, out=panel)
        elementwise(panel, used_targets[part], used_nll[part], softcap, gradients)
        if gradients:
            used_dx[part] = panel @ w
            _accumulate(dw[: w.size(0)], panel, scaled_x[part])
    if gradients:
        used_dx.mul_(4) if scale is None else used_dx.mul_((4 * scale).unsqueeze(1))
        dw.mul_(4)
    if everything:
        return used_nll, used_dx, dw
    nll = x.new_zeros(targets.numel(), dtype=torch.float32).index_copy_(0, rows, used_nll)
    if not gradients:
        return nll, used_dx, dw
    return nll, x.new_zeros(x.shape, dtype=torch.float32).index_copy_(0, rows, used_dx), dw


def _fused_step(kind: str) -> Callable[[Tensor, Tensor, Tensor, float, bool], None]:
    module = {"triton": "linear_softcap_cross_entropy_triton", "cuda": "native_cuda", "native": "native"}[kind]
    return importlib.import_module(f"nanochat_kernels.{module}").softmax_and_gradient


def _softmax_and_gradient(panel: Tensor, targets: Tensor, nll: Tensor, softcap: float, gradients: bool) -> None:
    """panel holds 2l/c and becomes s(1−s)·(p − onehot), if gradients are wanted; nll is filled."""
    height = max(1, TILE // panel.size(1)) if panel.device.type == "cpu" else panel.size(0)
    s = panel.new_empty((height, panel.size(1)), dtype=torch.float32)
    p = torch.empty_like(s)
    for start in range(0, panel.size(0), height):
        tile, target = panel[start : start + height], targets[start : start + height].unsqueeze(1)
        s, p = s[: tile.size(0)], p[: tile.size(0)]
        s.copy_(tile).sigmoid_()
        torch.mul(s, 2 * softcap, out=p)
        if softcap > SAFE_SOFTCAP:
            p.sub_(p.amax(dim=1, keepdim=True))
        log_sum = p.gather(1, target).neg_()
        total = p.exp_().sum(dim=1, keepdim=True)
        nll[start : start + height] = log_sum.add_(total.log()).squeeze(1)
        if gradients:
            p.mul_(total.reciprocal_())
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand(target.shape))
            tile.copy_(torch.ops.aten.sigmoid_backward.grad_input(p, s, grad_input=p))


def _accumulate(dw: Tensor, panel: Tensor, x: Tensor) -> None:
    if panel.dtype == torch.float32:
        dw.addmm_(panel.T, x)
    else:
        dw.add_(panel.T @ x)
