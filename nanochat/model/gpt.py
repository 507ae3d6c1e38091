"""The model: a decoder-only transformer, read top to bottom in the order in which a token meets it.

    tokens → embedding → norm → smear → [ attention → MLP ] × layers → backout → norm → head

What is unusual, and why:
  norm        RMSNorm without a learned weight, wherever a matrix product follows.
  smear       each position mixes in a little of the previous one: bigrams without spending attention on them.
  x0          every block sees a blend of the residual stream and the very first embedding.
  value embedding   half of the layers add a gated, per-token vector to their values: memory that costs no FLOPs.
  QK norm     queries and keys are normalised after the rotation, then scaled: attention logits cannot blow up.
  backout     what the middle layer knew is subtracted before the head, which needs the conclusions, not the notes.

Residual additions are not written where they happen but handed, as `delta`, to the next norm: the sum and the norm are
one pass over memory in every backend. The hot operations come from a KernelPlan; nothing here knows which backend runs.

Shape suffixes: B rows, T tokens, C width, H query heads, G key/value heads, D head size, V vocabulary, S cache slots.
"""

from collections.abc import Iterable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.errors import UsageError
from nanochat.model.config import GPTConfig
from nanochat.model.fp8 import Fp8, Fp8Layer, fp8_block
from nanochat_kernels import KernelPlan

SMEAR_CHANNELS = 24  # of a token's embedding decide how much of the previous one it takes
GATE_CHANNELS = 12  # of a layer's input decide how much of the value embedding enters
SOFTCAP = 15.0


class Cache(Protocol):
    """What the model needs from a key/value cache. Its owner advances it after a forward pass; the model never does."""

    slots: int  # S: how many tokens a row can hold
    empty: bool  # no row holds a token yet, so new ones see each other and nothing else
    lengths: Tensor  # (B,) int64: tokens of each row that are already in
    previous: Tensor  # (B,) int64: the last of them, −1 in an empty row; stands for the smear's state

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B,T,G,D) behind each row's length and returns all keys and values, (B,S,G,D) each."""
        ...


class Linear(nn.Module):
    """y = x·Wᵀ with a float32 master weight (out, in), cast to the activation's dtype where it is used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """A table of vectors, stored in the dtype it is used in: the optimizer stands the lower precision well."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Rope:
    """cos and sin of the rotary embedding, (positions, D/2) in the compute dtype, made when first asked for."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype) -> None:
        self.dims, self.base, self.dtype = config.head_dim, config.rope_base, dtype
        self.rounding = torch.bfloat16 if config.bf16_rotary else dtype
        self.step = config.seq_len
        self.tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables that hold at least `positions` rows."""
        if self.tables is None or self.tables[0].device != device or len(self.tables[0]) < positions:
            rows = -(-positions // self.step) * self.step
            exponents = torch.arange(0, self.dims, 2, dtype=torch.float32, device=device) / self.dims
            angles = torch.outer(torch.arange(rows, dtype=torch.float32, device=device), 1.0 / self.base**exponents)
            cos, sin = (table.to(self.rounding).to(self.dtype) for table in (angles.cos(), angles.sin()))
            self.tables = cos, sin
        return self.tables


class Attention(nn.Module):
    """Causal self-attention within a window, with rotary positions, QK norm and, in some layers, a value embedding."""

    def __init__(self, config: GPTConfig, layer: int, plan: KernelPlan) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qk_scale, self.plan = config.qk_scale, plan
        self.q = Linear(config.width, config.heads * config.head_dim)
        self.k = Linear(config.width, config.kv_heads * config.head_dim)
        self.v = Linear(config.width, config.kv_heads * config.head_dim)
        self.o = Linear(config.heads * config.head_dim, config.width)
        self.gate = Linear(GATE_CHANNELS, config.kv_heads) if config.has_value_embedding(layer) else None

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated, normalised queries (B,T,H,D) and keys, and values (B,T,G,D) of the normed input x (B,T,C)."""
        return self.rotated(self.q(x), self.k(x), self.v(x), x, cos, sin, ve)

    def rotated(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cos: Tensor, sin: Tensor, ve: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The projections (B,T,H·D), (B,T,G·D), (B,T,G·D) as `qkv` returns them. x: the channels that gates read."""
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k, v = (t.unflatten(-1, (self.kv_heads, self.head_dim)) for t in (k, v))
        gate = self.gate(x[..., :GATE_CHANNELS]) if self.gate is not None else None
        return self.plan.rope_qk_norm(q, k, v, cos, sin, ve=ve, gate=gate, scale=self.qk_scale)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        ve: Tensor | None,
        window: int,
        cache: Cache | None = None,
        layer: int = 0,
        tail: int | None = None,
    ) -> Tensor:
        """(B,T,C), or (B,tail,C) of the last positions alone. With a cache, the tokens continue its rows."""
        q, k, v = self.qkv(x, cos, sin, ve)
        first = cache is None or cache.empty  # then the new tokens are all that can be seen
        if cache is not None:
            held = cache.update(layer, k, v)
            k, v = (k, v) if first else held
        if first and tail is None:
            return self.o(self.plan.attention(q, k, v, window).flatten(-2))
        q = q if tail is None else q[:, -tail:]
        before = torch.zeros(len(x), dtype=torch.int64, device=x.device) if first else cast(Cache, cache).lengths
        return self.o(self.plan.cached_attention(q, k, v, before + x.size(1), window).flatten(-2))


class MLP(nn.Module):
    """W_proj · relu(W_fc x)², four times as wide inside."""

    def __init__(self, config: GPTConfig, plan: KernelPlan) -> None:
        super().__init__()
        self.plan = plan
        self.fc = Linear(config.width, 4 * config.width)
        self.proj = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.plan.relu2_mlp(x, self.fc.weight, self.proj.weight)


class Block(nn.Module):
    """One layer. The residual stream comes in as x + delta and leaves the same way: (x, what the MLP adds to it)."""

    def __init__(self, config: GPTConfig, layer: int, plan: KernelPlan) -> None:
        super().__init__()
        self.plan = plan
        self.attn = Attention(config, layer, plan)
        self.mlp = MLP(config, plan)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        x0: Tensor | None,
        scales: tuple[Tensor, Tensor] | None,
        rope: tuple[Tensor, Tensor],
        ve: Tensor | None,
        window: int,
        cache: Cache | None = None,
        layer: int = 0,
        fp8: Fp8Layer | None = None,
        tail: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, delta, x0: (B,T,C). scales: this layer's factors of the stream and of x0. ve: (B,T,G·D).

        With `tail`, only the last positions go on, (B,tail,C); of the others only keys and values are computed.
        """
        scale, x0_scale = scales if scales is not None else (None, None)
        if fp8 is not None:
            return fp8_block(self, fp8, x, delta, x0, (scale, x0_scale), rope, ve, window)
        y, x = self.plan.rms_norm(x, delta, scale, x0, x0_scale)
        attended = self.attn(y, *rope, ve, window, cache, layer, tail)
        y, x = self.plan.rms_norm(x if tail is None else x[:, -tail:], attended)
        return x, self.mlp(y)


class GPT(nn.Module):
    """The whole model. Parameters are allocated, not initialised: call `init_weights` or load a checkpoint.

    `dtype` is the compute dtype of activations and embedding tables (float16 keeps its tables in float32, whose
    gradients the loss scaler can unscale). Everything else is a float32 master weight.

    Setting `checkpoint_activations` keeps only what flows between blocks for the backward pass and computes the inside
    of each block a second time: about a third more work for a small part of the memory, with the same gradients.
    """

    def __init__(self, config: GPTConfig, plan: KernelPlan | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        plan = KernelPlan.reference() if plan is None else plan
        self.config, self.plan, self.dtype = config, plan, dtype
        self.checkpoint_activations = False
        self.fp8: Fp8 | None = None  # set where products with a gradient are to be FP8's
        rows, table_dtype = config.padded_vocab_size, torch.float32 if dtype == torch.float16 else dtype
        self.wte = Embedding(rows, config.width, table_dtype)
        self.blocks = nn.ModuleList(Block(config, i, plan) for i in range(config.layers))
        self.lm_head = Linear(config.width, rows)
        value_layers = [i for i in range(config.layers) if config.has_value_embedding(i)]
        value_width = config.kv_heads * config.head_dim
        self.value_embeds = nn.ModuleDict({str(i): Embedding(rows, value_width, table_dtype) for i in value_layers})
        if config.is_current:
            self.resid_scale = nn.Parameter(torch.empty(config.layers))
            self.x0_scale = nn.Parameter(torch.empty(config.layers))
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_scale = nn.Parameter(torch.empty(1))
            self.backout_scale = nn.Parameter(torch.empty(1))
        self.rope = Rope(config, dtype)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws every parameter in place. `generator` lives on the parameters' device; None means torch's global one.

        Blocks begin as the identity (both output projections are zero) and the head almost silent.
        """

        def draw(weight: Tensor, low: float = 0.0, high: float = 0.0, std: float = 0.0) -> None:
            values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            if std:
                values.normal_(0.0, std, generator=generator)
            else:
                values.uniform_(low, high, generator=generator)
            weight.copy_(values)

        bound = (3.0 / self.config.width) ** 0.5  # a uniform draw with the standard deviation 1/√C
        draw(self.wte.weight, std=0.8)
        draw(self.lm_head.weight, std=0.001)
        for block in cast("Iterable[Block]", self.blocks):
            for linear in (block.attn.q, block.attn.k, block.attn.v):
                draw(linear.weight, -bound, bound)
            draw(block.mlp.fc.weight, -0.4 * bound, 0.4 * bound)
            block.attn.o.weight.zero_()
            block.mlp.proj.weight.zero_()
            if block.attn.gate is not None:
                draw(block.attn.gate.weight, 0.0, 0.02)
        for table in cast("Iterable[nn.Embedding]", self.value_embeds.values()):
            draw(table.weight, -bound, bound)
        if self.config.is_current:
            ramp = torch.arange(self.config.layers, dtype=torch.float64) / max(self.config.layers - 1, 1)
            self.resid_scale.copy_(1.15 - 0.10 * ramp)
            self.x0_scale.copy_(0.20 - 0.15 * ramp)
            draw(self.smear_gate.weight, 0.0, 0.02)
            self.smear_scale.zero_()
            self.backout_scale.fill_(0.2)

    def compile_blocks(self) -> None:
        """Compiles the block, not the model: all layers share a few graphs, so the first step comes soon."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def embed(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """(B,T) ids → (B,T,C): the normed embedding with the previous position smeared in."""
        x, _ = self.plan.rms_norm(self.wte(idx).to(self.dtype))
        if not self.config.is_current:
            return x
        if cache is None:
            before = torch.zeros_like(x[:, :1])
        else:
            before, _ = self.plan.rms_norm(self.wte(cache.previous.clamp_min(0)[:, None]).to(self.dtype))
            before = before * (cache.previous >= 0)[:, None, None]
        gate = self.smear_scale.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * torch.cat([before, x[:, :-1]], dim=1)

    def rope_rows(self, idx: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Rotary tables of the positions of idx: (T, D/2), or (B,T,D/2) where each row has its own length."""
        tokens = idx.size(1)
        if cache is None:
            cos, sin = self.rope(tokens, idx.device)
            return cos[:tokens], sin[:tokens]
        positions = cache.lengths[:, None] + torch.arange(tokens, device=idx.device)
        cos, sin = self.rope(cache.slots, idx.device)
        return cos[positions], sin[positions]

    def hidden(self, idx: Tensor, cache: Cache | None = None, tail: int | None = None) -> Tensor:
        """(B,T) ids → (B,T,C), the final norm's output. With a cache, idx continues each of its rows.

        With `tail`, at least 1, the result is that of the last so many positions, (B,min(tail,T),C), and the last
        layer computes little more. No gradients then.
        """
        if idx.dim() != 2:
            raise UsageError(f"token ids must have the shape (rows, tokens), not {tuple(idx.shape)}")
        if tail is not None and tail < 1:
            raise UsageError(f"tail is {tail}; at least the last position is computed")
        config, rope = self.config, self.rope_rows(idx, cache)
        x = x0 = self.embed(idx, cache)
        delta = middle = None
        for i, block in enumerate(self.blocks):
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if config.has_value_embedding(i) else None
            scales = (self.resid_scale[i], self.x0_scale[i]) if config.is_current else None
            first = x0 if config.is_current else None
            layer = 0 if cache is None else i  # which would compile every block anew in training
            fp8 = self.fp8.layers[i] if self.fp8 and torch.is_grad_enabled() else None
            wanted = tail if i == config.layers - 1 else None
            arguments = (x, delta, first, scales, rope, ve, config.windows[i], cache, layer, fp8, wanted)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, delta = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, delta = block(*arguments)
            if i == config.middle_layer:
                middle = x + delta
        if not config.is_current:
            return self.plan.rms_norm(x, delta)[0]
        if tail is not None and middle is not None:
            middle = middle[:, -tail:]
        return self.plan.rms_norm(x, delta, None, middle, -self.backout_scale.to(x.dtype))[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) → float32 (..., vocab_size), capped softly to ±15."""
        return self.plan.softcapped_logits(hidden, self.lm_head.weight, self.config.vocab_size, SOFTCAP)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits float32 (B,T,vocab_size), or, given targets (B,T) with −1 for "do not score", the loss in nats.

        reduction: "mean" over the scored targets, "sum", or "none" for (B·T,). token_weights (B,T) multiply the losses.
        """
        hidden = self.hidden(idx)
        if targets is None:
            return self.logits(hidden)
        return self.plan.linear_softcap_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            None if token_weights is None else token_weights.flatten(),
            vocab_size=self.config.vocab_size,
            softcap=SOFTCAP,
            reduction=reduction,
        )
