"""nanochat's model for Hugging Face transformers in one file, loaded with `trust_remote_code=True`.

    tokens -> embedding -> norm -> smear -> [ attention -> MLP ] x layers -> backout -> norm -> head

RMSNorm carries no weights. Each position mixes in a little of the previous embedding (smear); every block sees a blend
of the residual stream and the first embedding; every second layer adds a gated per-token vector to its values; queries
and keys are rotated, normalised and sharpened; what the middle layer knew is subtracted before the head (backout).

The smear needs the previous token's embedding when generating. It lives in the key/value cache as one layer more, with
C channels and no values, so that beam search, cropping and copying a cache keep it right without knowing of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

EPS = 1.1920929e-07  # of every norm: float32's epsilon
SMEAR_CHANNELS, GATE_CHANNELS = 24, 12
GATE_SCALE, QK_SCALE, SOFTCAP = 3.0, 1.2, 15.0
IGNORED = -100  # the label of a token that is not scored


class Nanochat2026Config(PretrainedConfig):
    """Sizes. `windows[i]` is how many keys before its own a query of layer i sees."""

    model_type = "nanochat_2026"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32768,
        padded_vocab_size=32768,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=128,
        max_position_embeddings=2048,
        windows=(768, 768, 768, 2048) * 3,
        rotary_base=100000.0,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.windows = list(windows)
        self.rotary_base = rotary_base
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def has_value_embedding(self, layer):
        return layer % 2 == (self.num_hidden_layers - 1) % 2


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), cos and sin (B, 1, T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, config: Nanochat2026Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k = linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v = linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o = linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        gated = config.has_value_embedding(layer)
        self.gate = linear(GATE_CHANNELS, config.num_key_value_heads) if gated else None

    def forward(self, x: Tensor, rope, ve: Tensor | None, mask: Tensor, cache: Cache | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if ve is not None and self.gate is not None:
            gate = GATE_SCALE * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))
            v = v + (gate.unsqueeze(-1) * ve.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        q, k = (QK_SCALE * norm(rotate(y, *rope)) for y in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
        return self.o(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Nanochat2026Config):
        super().__init__()
        self.fc = linear(config.hidden_size, 4 * config.hidden_size)
        self.proj = linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: Nanochat2026Config, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, ve: Tensor | None, mask: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attn(norm(x), rope, ve, mask, cache)
        return x + self.mlp(norm(x))


class Nanochat2026ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = Nanochat2026Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def __init__(self, config: Nanochat2026Config):
        super().__init__(config)
        rows, layers = config.padded_vocab_size, config.num_hidden_layers
        value_width = config.num_key_value_heads * config.head_dim
        self.wte = nn.Embedding(rows, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(layers))
        self.lm_head = linear(config.hidden_size, rows)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(rows, value_width) for i in range(layers) if config.has_value_embedding(i)}
        )
        self.resid_scale = nn.Parameter(torch.ones(layers))
        self.x0_scale = nn.Parameter(torch.zeros(layers))
        self.smear_gate = linear(SMEAR_CHANNELS, 1)
        self.smear_scale = nn.Parameter(torch.zeros(1))
        self.backout_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a checkpoint; this model is not trained from scratch here."""

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.lm_head

    def _smear(self, x: Tensor, cache: Cache | None, seen: Tensor | None) -> Tensor:
        """x[t] + gate(x[t])·x[t−1], where x[−1] and embeddings of padding are 0. seen: (B, S), 0 for padding."""
        history = x.unsqueeze(1)
        if cache is not None:
            layer = self.config.num_hidden_layers
            while len(cache.layers) <= layer:
                cache.layers.append(DynamicLayer())
            history, _ = cache.update(history, history[..., :0], layer)
        before = F.pad(history[:, 0], (0, 0, 1, 0))[:, -x.size(1) - 1 : -1]
        if seen is not None:
            before = before * F.pad(seen, (1, 0))[:, -x.size(1) - 1 : -1, None].to(x.dtype)
        return x + self.smear_scale * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS])) * before

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D/2) for positions (B, T)."""
        dims = self.config.head_dim
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=positions.device) / dims
        angles = positions[..., None].float() * (1.0 / self.config.rotary_base**exponents)
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **ignored,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) continue what is in past_key_values; attention_mask (B, S) is 0 for padding, on either side.

        Logits are float32, capped softly to ±15; logits_to_keep > 0 returns those of the last positions only.
        """
        config, tokens = self.config, input_ids.size(1)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        slots = torch.arange(past + tokens, device=input_ids.device)
        if position_ids is None:
            positions = slots[None] if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
            position_ids = positions[:, -tokens:]
        distance = slots[past:, None] - slots
        visible = distance >= 0
        if attention_mask is not None:  # a padded position sees itself, so that its softmax has something to sum
            visible = (visible & attention_mask[:, None, None].bool()) | (distance == 0)

        x = norm(self.wte(input_ids))
        x = x0 = self._smear(x, past_key_values, attention_mask)
        rope = self._rope(position_ids, x.dtype)
        for i, block in enumerate(self.blocks):
            ve = self.value_embeds[str(i)](input_ids) if config.has_value_embedding(i) else None
            x = self.resid_scale[i] * x + self.x0_scale[i] * x0
            x = block(x, rope, ve, visible & (distance <= config.windows[i]), past_key_values)
            if i == config.num_hidden_layers // 2:
                middle = x
        x = norm(x - self.backout_scale * middle)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)[..., : config.vocab_size].float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)
