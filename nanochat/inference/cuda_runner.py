"""The decode step on Hopper over the kernels of csrc/: eight launches a layer, nothing that waits for the device.

    norm → W_qkv → rotate, norm, gate, cache write → attention → W_o → norm → W_fc, relu² → W_proj

Up to 16 rows the matrix products are thin_linear, which reads the weights once in the format they are kept in: bf16, or
FP8 and int8 at half the bytes; above, torch's products in bf16 (8-bit weights are widened for the call from 65 rows on:
a prompt is long enough to pay for that). The next token's memory traffic is weights plus the keys and values inside the
windows; an FP8 cache halves the latter.

Everything but long prompts can be captured in a CUDA graph: shapes are fixed by the batch's, lengths and positions are
read on the device. A float32 model runs too, on torch's products, so that results can be compared closely.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.inference.paged_cache import PagedCache
from nanochat.inference.step import StepBatch
from nanochat.model.gpt import GPT, SOFTCAP, Block, Embedding
from nanochat_kernels import native_cuda
from nanochat_kernels.paged_attention import paged_attention_sdpa
from nanochat_kernels.registry import Place
from nanochat_kernels.thin_linear import MULTIPLE, ROWS, quantize

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
CHUNKS = 4  # of 16 rows for which 8-bit weights are read again: still fewer bytes than to widen them for torch
PROMPT = 8  # new tokens per sequence from which torch's attention is taken: the kernel reads a key once per four tokens


@dataclass(frozen=True)
class Weight:
    """(outputs, inputs) in the format it is kept in; scale (outputs,) float32 for 8 bits, else None."""

    data: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> "Weight":
        if dtype.itemsize > 1:
            return cls(weight.detach().to(dtype).contiguous(), None)
        return cls(*quantize(weight.detach(), dtype))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def product(self, x: Tensor, epilogue: str = "none") -> Tensor:
        """(N, outputs) of x (N, inputs): in x's dtype, float32 after the softcap."""
        most = ROWS if self.scale is None else CHUNKS * ROWS
        if x.dtype == torch.bfloat16 and x.size(0) <= most and x.size(1) % MULTIPLE == 0:
            parts = [native_cuda.thin_linear(p, self.data, self.scale, epilogue, SOFTCAP) for p in x.split(ROWS)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        y = F.linear(x, self.data.to(x.dtype))
        if self.scale is not None:
            y = (y.float() * self.scale).to(x.dtype)
        if epilogue == "relu2":
            return y.relu_().square_()
        return y.float().div_(SOFTCAP).tanh_().mul_(SOFTCAP) if epilogue == "softcap" else y


@dataclass(frozen=True)
class Layer:
    """One block's weights as the step reads them. embeddings and gate: of layers with a value embedding."""

    qkv: Weight
    o: Weight
    fc: Weight
    proj: Weight
    scale: Tensor | None
    x0_scale: Tensor | None
    embeddings: Tensor | None
    gate: Tensor | None


class CudaRunner:
    """A `Runner` for a bf16 or float32 model on an NVIDIA GPU. weights: bf16, fp8 or int8 (fp32 for a float32 model).

    cache_dtype is what the PagedCache must hold: the model's dtype, or float8_e4m3fn when `fp8_cache`. Raises
    UsageError where the kernels cannot run or the format does not fit the model.
    """

    def __init__(self, model: GPT, weights: str = "bf16", fp8_cache: bool = False) -> None:
        if weights not in FORMATS:
            raise UsageError(f"weights {weights!r}: use one of {', '.join(FORMATS)}")
        reason = native_cuda.needs_cuda_ops(Place(model.device, model.dtype, "decode"))
        if reason:
            raise UsageError(f"weights {weights!r} by CUDA kernels: {reason}; use --weights auto")
        if (weights == "fp32") != (model.dtype == torch.float32) or (fp8_cache and model.dtype != torch.bfloat16):
            dtype = str(model.dtype).removeprefix("torch.")
            raise UsageError(f"weights {weights!r} do not fit a model in {dtype}: choose both alike, or --weights auto")
        self.model, self.format = model, weights
        self.cache_dtype = torch.float8_e4m3fn if fp8_cache else model.dtype
        self.arrivals = torch.zeros(0, dtype=torch.int32, device=model.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts or quantizes the model's present weights."""
        model, config, dtype = self.model, self.model.config, FORMATS[self.format]
        self.head = Weight.of(model.lm_head.weight[: config.vocab_size], dtype)
        self.layers = [self._layer(i, block) for i, block in enumerate(cast("Iterable[Block]", model.blocks))]
        self.table = model.wte.weight.detach().to(model.dtype)
        self.smear: tuple[Tensor | None, Tensor | None] = (None, None)
        if config.is_current:
            self.smear = model.smear_gate.weight.detach().float().flatten(), model.smear_scale.detach().float()
            self.backout = -model.backout_scale.detach().to(model.dtype).float()
        self.nbytes = sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.o, layer.fc, layer.proj))
        self.nbytes += self.head.nbytes

    def _layer(self, i: int, block: Block) -> Layer:
        model, dtype = self.model, FORMATS[self.format]
        attn, gate, current = block.attn, block.attn.gate, model.config.is_current
        table = None if gate is None else cast("Embedding", model.value_embeds[str(i)]).weight
        return Layer(
            qkv=Weight.of(torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]), dtype),
            o=Weight.of(attn.o.weight, dtype),
            fc=Weight.of(block.mlp.fc.weight, dtype),
            proj=Weight.of(block.mlp.proj.weight, dtype),
            scale=model.resid_scale[i].detach().clone() if current else None,
            x0_scale=model.x0_scale[i].detach().clone() if current else None,
            embeddings=None if table is None else table.detach().to(model.dtype),
            gate=None if gate is None else gate.weight.detach().to(model.dtype).contiguous(),
        )

    @torch.no_grad()
    def __call__(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        """(M, vocab_size) float32 logits, softcapped. Writes the new keys and values into the cache."""
        return self.head.product(self.hidden(batch, cache)[batch.outputs], "softcap")

    def hidden(self, batch: StepBatch, cache: PagedCache) -> Tensor:
        """(N, C): the final norm's output."""
        config, norm = self.model.config, native_cuda.rms_norm
        cos, sin = self.model.rope(cache.context, batch.tokens.device)
        x = x0 = native_cuda.smeared_embedding(batch.tokens, batch.previous, self.table, *self.smear)
        first = x0 if config.is_current else None
        delta = middle = None
        for i, layer in enumerate(self.layers):
            y, x = norm(x, delta, layer.scale, first, layer.x0_scale)
            qkv = layer.qkv.product(y)
            table, caches = batch.tables[cache.groups[i]], (cache.k[i], cache.v[i])
            native_cuda.paged_qkv(
                qkv,
                y,
                batch.tokens,
                batch.positions,
                table,
                batch.starts,
                cos,
                sin,
                layer.embeddings,
                layer.gate,
                *caches,
                config.qk_scale,
            )
            q = qkv[:, : config.width].unflatten(1, (config.heads, config.head_dim))
            attended = self._attend(q, caches, table, batch, min(config.windows[i], cache.context))
            y, x = norm(x, layer.o.product(attended.flatten(1)))
            delta = layer.proj.product(layer.fc.product(y, "relu2"))
            if i == config.middle_layer:
                middle = x + delta
        if not config.is_current:
            return norm(x, delta)[0]
        return norm(x, delta, None, middle, self.backout)[0]

    def _attend(self, q: Tensor, caches: tuple[Tensor, Tensor], table: Tensor, batch: StepBatch, window: int) -> Tensor:
        long = q.size(0) > PROMPT * batch.lengths.size(0)
        if long and caches[0].dtype == q.dtype and q.is_cuda and not torch.cuda.is_current_stream_capturing():
            return paged_attention_sdpa(q, *caches, table, batch.starts, batch.lengths, window)
        if self.arrivals.numel() < q.size(0) * q.size(1):
            self.arrivals = torch.zeros(q.size(0) * q.size(1), dtype=torch.int32, device=q.device)
        return native_cuda.paged_attention(q, *caches, table, batch.starts, batch.lengths, window, self.arrivals)
