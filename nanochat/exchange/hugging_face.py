"""A model as a folder that Hugging Face transformers loads.

transformers has a NanoChat class of its own, for the architecture of October 2025: such models are written for it,
under its names. Today's architecture travels with its own modeling file (hf_files/modeling_nanochat_2026.py), under
our names, and is loaded with trust_remote_code=True.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json  [modeling file]
"""

import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.exchange.tokenizer_json import write_tokenizer_json
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT, SOFTCAP
from nanochat.tokenizer import BOS, Tokenizer
from nanochat_kernels.numerics import EPS

MODELING = "modeling_nanochat_2026"
END = "<|assistant_end|>"
# The chat format of nanochat/chat_format.py: a system message opens the first user message.
CHAT_TEMPLATE = """
{{- '<|bos|>' -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = message['content'] + '\\n\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user_start|>' + ns.system + message['content'] + '<|user_end|>' -}}
    {%- set ns.system = '' -%}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'python' -%}
          {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
        {%- elif part['type'] == 'python_output' -%}
          {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
        {%- else -%}
          {{- part['text'] -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{- '<|assistant_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
""".strip()


def write_model(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> str:
    """Writes `folder`, complete or not at all, and returns how to load it. `dtype` is that of the stored weights."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty; choose a new folder, or remove it first")
    hidden = folder.with_name(f".{folder.name}.partial")
    current = model.config.is_current
    state = model.state_dict() if current else native_state(model)
    settings = (_own_config if current else _native_config)(model.config, tokenizer)
    name = str(dtype).removeprefix("torch.")
    ends = [tokenizer.encode_special(END), tokenizer.bos_id]
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        _write_json(hidden / "config.json", settings | {"dtype": name, "torch_dtype": name})
        _write_json(
            hidden / "generation_config.json",
            {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": ends[0]},
        )
        weights = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in state.items()}
        save_file(weights, hidden / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer_json(tokenizer, hidden / "tokenizer.json")
        _write_json(hidden / "tokenizer_config.json", _tokenizer_config(model.config))
        if current:
            source = resources.files("nanochat.exchange.hf_files") / f"{MODELING}.py"
            (hidden / f"{MODELING}.py").write_bytes(source.read_bytes())
        if folder.exists():
            folder.rmdir()
        os.replace(hidden, folder)
    except OSError as error:
        raise NanochatError(f"cannot write {folder}: {error}; nothing was left there") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    how = f'AutoModelForCausalLM.from_pretrained("{folder}"{", trust_remote_code=True" if current else ""})'
    note = ""
    if model.config.bf16_rotary:
        note = (
            "\nThis model was trained with rotary tables in bfloat16. transformers makes them in the dtype it computes "
            "in: load with dtype=torch.bfloat16 for the same values; in float32 logits differ by about a thousandth"
        )
    return f"wrote {folder}; load it with transformers: {how}{note}"


def native_state(model: GPT) -> dict[str, Tensor]:
    """A 2025-10 model under the names of transformers' NanoChatForCausalLM, without the padding of the vocabulary."""
    rows = model.config.vocab_size
    state = {"model.embed_tokens.weight": model.wte.weight[:rows], "lm_head.weight": model.lm_head.weight[:rows]}
    names = {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"} | {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
    for i, block in enumerate(model.blocks):
        for ours, theirs in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = block.get_submodule(ours).get_parameter("weight")
    return state


def _native_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "relu2",
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "final_logit_softcapping": SOFTCAP,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **_special_ids(tokenizer),
    }


def _own_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Nanochat2026ForCausalLM"],
        "model_type": "nanochat_2026",
        "auto_map": {
            "AutoConfig": f"{MODELING}.Nanochat2026Config",
            "AutoModelForCausalLM": f"{MODELING}.Nanochat2026ForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_len,
        "windows": list(config.windows),
        "rotary_base": config.rope_base,
        "tie_word_embeddings": False,
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    # padding is an end token: were it <|bos|>, a prompt given without a mask would have its beginning masked
    end = tokenizer.encode_special(END)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": end, "pad_token_id": end}


def _tokenizer_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "padding_side": "left",
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
