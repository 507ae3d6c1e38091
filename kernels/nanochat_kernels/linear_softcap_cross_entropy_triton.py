"""The elementwise heart of the head's loss in Triton: one program per row of logits, two walks over the row.

A panel of logits (bf16, from torch's matrix product) is read once for the softmax's sum and once, out of the
second-level cache, to be overwritten by its gradient: 64 KiB a row at 32,768 words. In torch the same takes eight
float32 passes. The walk over panels, the products and the accumulation are those of
linear_softcap_cross_entropy_chunked.py; the panel is private to the op, which stays functional outside.

The softcap bounds every logit, so exp needs no running maximum: the bound itself, c, is subtracted. Offsets are 64
bits wide: 65,536 tokens × 32,768 words are 2³¹ elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.compiled import Build
from nanochat_kernels.linear_softcap_cross_entropy_chunked import linear_softcap_cross_entropy_chunked

BLOCK_V = 4096


@triton.jit
def _softcap_cross_entropy_kernel(
    panel_ptr, target_ptr, nll_ptr, vocabulary, softcap, GRADIENTS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """panel holds 2l/c. With s = sigmoid(2l/c), z = 2c·s − c; panel becomes s(1−s)·(softmax(z) − onehot)."""
    row = tl.program_id(0).to(tl.int64)
    panel_ptr += row * vocabulary
    target = tl.load(target_ptr + row)
    word = tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        inside = start + word < vocabulary
        s = tl.sigmoid(tl.load(panel_ptr + start + word, mask=inside, other=0.0).to(tl.float32))
        total += tl.where(inside, tl.exp(2 * softcap * (s - 1)), 0.0)
    log_sum = tl.log(tl.sum(total, axis=0))
    s_target = tl.sigmoid(tl.load(panel_ptr + target).to(tl.float32))
    tl.store(nll_ptr + row, log_sum - 2 * softcap * (s_target - 1))
    if GRADIENTS:
        for start in range(0, vocabulary, BLOCK_V):
            inside = start + word < vocabulary
            s = tl.sigmoid(tl.load(panel_ptr + start + word, mask=inside, other=0.0).to(tl.float32))
            p = tl.exp(2 * softcap * (s - 1) - log_sum) - tl.where(start + word == target, 1.0, 0.0)
            tl.store(panel_ptr + start + word, s * (1 - s) * p, mask=inside)


def softmax_and_gradient(panel: Tensor, targets: Tensor, nll: Tensor, softcap: float, gradients: bool) -> None:
    """panel (rows, vocabulary) holds 2l/c and is overwritten by the gradient, if wanted; nll (rows,) is filled."""
    block = min(BLOCK_V, triton.next_power_of_2(panel.size(1)))
    _softcap_cross_entropy_kernel[(panel.size(0),)](
        panel, targets, nll, panel.size(1), softcap, GRADIENTS=gradients, BLOCK_V=block, num_warps=max(block // 512, 1)
    )


def linear_softcap_cross_entropy_triton(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float = 15.0,
    reduction: str = "mean",
) -> Tensor:
    """As the reference."""
    return linear_softcap_cross_entropy_chunked(
        x, weight, targets, token_weights, vocab_size, softcap, reduction, fused="triton"
    )


def shipped() -> Iterator[Build]:
    """The launches of training and of evaluation, in bf16."""
    kernel = _softcap_cross_entropy_kernel
    types = {"panel_ptr": "*bf16", "target_ptr": "*i64", "nll_ptr": "*fp32", "vocabulary": "i32", "softcap": "fp32"}
    for gradients in (True, False):
        constants = {"GRADIENTS": gradients, "BLOCK_V": BLOCK_V}
        name = f"linear_softcap_cross_entropy {'training' if gradients else 'evaluation'}"
        yield Build(name, kernel, types, constants, BLOCK_V // 512)
