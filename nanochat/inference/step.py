"""One step of the serving engine: what a model is asked to compute, and the readable runner that computes it.

A step takes new tokens of many sequences at once, some a single one (decode), some a piece of their prompt (chunked
prefill), written one behind the other without padding. The runner puts their keys and values in the paged cache and
gives back the logits of the positions from which a token will be drawn.

TorchRunner goes through the model's own ops. On a CPU in float32 a sequence's numbers do not depend on what else is in
the batch: torch's matrix products give a row the same bits whatever number of rows there are, as long as there are at
least ROWS of them (seen with MKL on AVX2; fewer rows take another path), so fewer are padded; attention goes sequence
by sequence. The one remainder is where a prompt is cut into chunks: a query's keys may be added up in another order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from nanochat.inference.paged_cache import PagedCache
from nanochat.model.gpt import GPT, SMEAR_CHANNELS, SOFTCAP, Block
from nanochat_kernels import KernelPlan

ROWS = 4  # fewest rows of a matrix product


@dataclass(frozen=True)
class StepBatch:
    """S sequences with N new tokens in all, on the model's device. A sequence of length 0 with one token is padding."""

    tokens: Tensor
    """(N,) int64: the new tokens of all sequences, one sequence behind the other."""
    previous: Tensor
    """(N,) int64: the token before each, −1 at position 0: stands for the smear's state."""
    positions: Tensor
    """(N,) int64, absolute; −1 for padding."""
    starts: Tensor
    """(S+1,) int32: sequence s owns tokens starts[s] … starts[s+1] − 1."""
    lengths: Tensor
    """(S,) int32: tokens of each sequence, the new ones included."""
    tables: tuple[Tensor, Tensor]
    """(full, window), each (S, M) int32 block ids, −1 where there is none."""
    outputs: Tensor
    """(M,) int64: which of the N tokens' logits are wanted."""


class Runner(Protocol):
    """Computes steps, with keys and values of `cache_dtype`. It may hold the weights in a form of its own, which
    `refresh` makes anew after they changed."""

    cache_dtype: torch.dtype

    def __call__(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        """(M, vocab_size) float32 logits, softcapped. Writes the new keys and values into the cache, those of all
        sequences before it reads any: sequences that share blocks may begin in the same step."""
        ...

    def refresh(self) -> None: ...


class TorchRunner:
    """The model's forward pass for a StepBatch, op by op, with its weights cast to the compute dtype once."""

    def __init__(self, model: GPT, plan: KernelPlan | None = None) -> None:
        self.model, self.plan = model, model.plan if plan is None else plan
        self.cache_dtype = model.dtype
        self.rows = ROWS if model.device.type == "cpu" and model.dtype == torch.float32 else 1
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the weights again; in float32 they are the model's own."""
        model, dtype = self.model, self.model.dtype
        self.mlps = [(block.mlp.fc.weight.to(dtype), block.mlp.proj.weight.to(dtype)) for block in self._blocks()]
        self.head = model.lm_head.weight.to(dtype)
        self.attention = [
            [linear.weight.to(dtype) for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.o)]
            for block in self._blocks()
        ]

    @property
    def capturable(self) -> bool:
        """Can a step be captured in a CUDA graph, because no op of it looks at its inputs on the host?"""
        return self.model.device.type == "cuda" and self.plan.choices["paged_attention"].backend == "cuda"

    def _blocks(self) -> Iterable[Block]:
        return cast("Iterable[Block]", self.model.blocks)

    @torch.no_grad()
    def __call__(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        hidden = self.hidden(batch, cache)
        wanted = batch.outputs.size(0)
        outputs = _padded(batch.outputs, self.rows)
        return self.plan.softcapped_logits(hidden[outputs], self.head, self.model.config.vocab_size, SOFTCAP)[:wanted]

    def hidden(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        """(N or more, C): the final norm's output, for the batch's tokens first."""
        model, config, plan = self.model, self.model.config, self.plan
        new = batch.tokens.size(0)
        tokens, previous = _padded(batch.tokens, self.rows), _padded(batch.previous, self.rows)
        counts = (batch.starts[1:] - batch.starts[:-1]).long()
        sequences = torch.arange(counts.size(0), device=counts.device).repeat_interleave(counts, output_size=new)
        slots = cache.slots(batch.tables, sequences, batch.positions)
        positions = _padded(batch.positions.clamp_min(0), self.rows)
        cos, sin = (table[positions] for table in model.rope(cache.context, tokens.device))
        x = x0 = self.embed(tokens, previous)
        delta = middle = None
        for i, block in enumerate(self._blocks()):
            ve = model.value_embeds[str(i)](tokens).to(x.dtype) if config.has_value_embedding(i) else None
            scales = (model.resid_scale[i], x0, model.x0_scale[i]) if config.is_current else ()
            y, x = plan.rms_norm(x, delta, *scales)
            q, k, v = self._qkv(i, block, y, cos, sin, ve)
            cache.write(i, slots, k[:new], v[:new])
            attended = plan.paged_attention(
                q[:new],
                cache.k[i],
                cache.v[i],
                batch.tables[cache.groups[i]],
                batch.starts,
                batch.lengths,
                min(config.windows[i], cache.context),
            )
            attended = torch.nn.functional.linear(_padded(attended.flatten(1), self.rows), self.attention[i][3])
            y, x = plan.rms_norm(x, attended)
            delta = plan.relu2_mlp(y, *self.mlps[i])
            if i == config.middle_layer:
                middle = x + delta
        if not config.is_current:
            return plan.rms_norm(x, delta)[0]
        return plan.rms_norm(x, delta, None, middle, -model.backout_scale.to(x.dtype))[0]

    def embed(self, tokens: Tensor, previous: Tensor) -> Tensor:
        """(N,) ids and the ids before them → (N,C): the normed embeddings with the previous ones smeared in."""
        model, plan = self.model, self.plan
        x, _ = plan.rms_norm(model.wte(tokens).to(model.dtype))
        if not model.config.is_current:
            return x
        before, _ = plan.rms_norm(model.wte(previous.clamp_min(0)).to(model.dtype))
        gate = model.smear_scale.to(x.dtype) * torch.sigmoid(model.smear_gate(x[:, :SMEAR_CHANNELS]))
        return x + gate * (before * (previous >= 0)[:, None])

    def _qkv(
        self, layer: int, block: Block, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated, normalised queries (N,H,D) and keys (N,G,D), and values (N,G,D) of the normed input x (N,C)."""
        attn = block.attn
        heads = (attn.heads, attn.kv_heads, attn.kv_heads)
        q, k, v = (
            torch.nn.functional.linear(x, weight).unflatten(-1, (h, attn.head_dim))[None]
            for weight, h in zip(self.attention[layer], heads, strict=False)
        )
        gate = attn.gate(x[None, :, : attn.gate.weight.size(1)]) if attn.gate is not None else None
        q, k, v = self.plan.rope_qk_norm(
            q, k, v, cos, sin, ve=None if ve is None else ve[None], gate=gate, scale=attn.qk_scale
        )
        return q[0], k[0], v[0]


def _padded(x: Tensor, rows: int) -> Tensor:
    """x (N, ...) with its first row repeated until there are at least `rows`."""
    missing = rows - x.size(0)
    return x if missing <= 0 or not x.size(0) else torch.cat([x, x[:1].expand(missing, *x.shape[1:])])
