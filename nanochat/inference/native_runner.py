"""The step in C++ (csrc/model_step.cpp): one call from tokens to logits, weights packed once, threads forked once.

    torch, per layer       ~20 operators, each with its dispatch, allocation and fork of threads
    native, per step       one fork; a phase of a layer costs a fraction of a microsecond beyond its memory traffic

A decode step reads every weight once and computes little, so its time is bytes ÷ bandwidth: `weights` chooses how many
bytes. Activations and sums are float32 whatever the format. The cache may be float32 or bfloat16 (`cache_dtype` is what
this format should use). A row's numbers do not depend on what else is in the batch, nor on how a prompt was cut into
chunks, bit for bit.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.inference.paged_cache import PagedCache
from nanochat.inference.step import StepBatch
from nanochat.model.gpt import GATE_CHANNELS, GPT, SMEAR_CHANNELS, SOFTCAP, Block, Embedding
from nanochat_kernels import native
from nanochat_kernels.packed_weights import FORMATS, PackedWeight, pack

ALIGNMENT = 64  # bytes, a cache line


class NativeRunner:
    """A `Runner` for a model on the CPU. weights: fp32, bf16, int8 or int4 for everything that meets a matrix product.

    Embedding tables stay where the model has them: a step reads single rows. Raises UsageError where the C++ extension
    is missing or the model is not on the CPU.
    """

    def __init__(self, model: GPT, weights: str = "fp32") -> None:
        if weights not in FORMATS:
            raise UsageError(f"weights {weights!r}: use one of {', '.join(FORMATS)}")
        if model.device.type != "cpu":
            raise UsageError(f"weights {weights!r} are for the CPU kernels, but the model is on {model.device}")
        reason = native.missing()
        if reason:
            raise UsageError(f"weights {weights!r} need the C++ extension: {reason}")
        self.model, self.format = model, weights
        self.cache_dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        self._bound: tuple[tuple, list[int], list[Tensor]] | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Packs the model's present weights."""
        model, config = self.model, self.model.config
        linears = [self._pack(model.lm_head.weight)]
        for block in cast("Iterable[Block]", model.blocks):
            attn = block.attn
            linears.append(self._pack(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight])))
            linears += [self._pack(linear.weight) for linear in (attn.o, block.mlp.fc, block.mlp.proj)]
        self.nbytes = sum(linear.nbytes for linear in linears)
        self._bound = None
        head, *rest = _in_one_place(linears)
        none = torch.empty(0)
        smear = model.smear_gate.weight.detach().float().flatten() if config.is_current else none
        self.head, self.layers = [smear, head.words, head.scales], []
        for i, block in enumerate(cast("Iterable[Block]", model.blocks)):
            for linear in rest[4 * i : 4 * i + 4]:
                self.layers += [linear.words, linear.scales]
            gate = block.attn.gate
            self.layers.append(none if gate is None else gate.weight.detach().float().contiguous())
            table = None if gate is None else cast("Embedding", model.value_embeds[str(i)])
            self.layers.append(none if table is None else table.weight.detach())
        self.scalars = [config.qk_scale, SOFTCAP, 0.0, 0.0] + [1.0, 0.0] * config.layers
        if config.is_current:
            pairs = torch.stack([model.resid_scale, model.x0_scale], dim=1).flatten().tolist()
            self.scalars = [config.qk_scale, SOFTCAP, model.smear_scale.item(), model.backout_scale.item(), *pairs]

    def __call__(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        """(M, vocab_size) float32 logits, softcapped. Writes the new keys and values into the cache."""
        sizes, weights = self._arguments(cache)
        logits = torch.ops.nanochat.model_step(
            sizes,
            self.scalars,
            self.format,
            weights,
            cache.k,
            cache.v,
            batch.tokens,
            batch.previous,
            batch.positions,
            batch.starts,
            batch.lengths,
            *batch.tables,
            batch.outputs,
        )
        return logits[:, : self.model.config.vocab_size]

    def _arguments(self, cache: PagedCache) -> tuple[list[int], list[Tensor]]:
        """What the op takes besides the batch, in the order of csrc/cpu_ops.cpp; kept for the next step."""
        key = (cache.context, cache.groups)
        if self._bound is None or self._bound[0] != key:
            config = self.model.config
            sizes = [config.width, config.heads, config.kv_heads, config.head_dim, config.layers, config.middle_layer]
            sizes += [config.padded_vocab_size, GATE_CHANNELS, SMEAR_CHANNELS]
            for window, group in zip(config.windows, cache.groups, strict=True):
                sizes += [min(window, cache.context), group]
            rope = [t.float().contiguous() for t in self.model.rope(cache.context, torch.device("cpu"))]
            self._bound = key, sizes, [self.model.wte.weight.detach(), *rope, *self.head, *self.layers]
        return self._bound[1:]

    def _pack(self, weight: Tensor) -> PackedWeight:
        return pack(weight, self.format)


def _in_one_place(weights: list[PackedWeight]) -> list[PackedWeight]:
    """The same, moved into one allocation with huge pages, in the order of a step."""

    def rounded(tensor: Tensor) -> int:
        return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT

    arena = torch.ops.nanochat.allocate(sum(rounded(w.words) + rounded(w.scales) for w in weights))
    at = 0

    def move(tensor: Tensor) -> Tensor:
        nonlocal at
        place = arena[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        at += rounded(tensor)
        return place.copy_(tensor)

    return [PackedWeight(w.format, w.outputs, w.inputs, move(w.words), move(w.scales)) for w in weights]
