"""Weights and settings of karpathy/nanochat under our names, and ours under its. Only names differ: shapes and values
are the same, but for the padding of the vocabulary, which its first version did not have.

Three families of checkpoints exist, told apart by what they hold:
  a smear gate                since March 2026: today's architecture.
  nothing beyond the blocks   October 2025 to January 2026: rotary base 10,000, plain QK norm, full windows.
  scalars, no smear gate      between the two: window sizes, scales and rotary base changed from week to week without
                              leaving a trace in the file, so these are refused rather than run wrongly.

Its checkpoints as files (pickles, read with care) are the business of `nanochat import`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import NanochatError
from nanochat.model.config import GPTConfig

# (its name, our name): patterns with {i} for a layer's number
_NAMES = [
    ("transformer.wte.weight", "wte.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("value_embeds.{i}.weight", "value_embeds.{i}.weight"),
    *((f"transformer.h.{{i}}.attn.c_{x}.weight", f"blocks.{{i}}.attn.{x}.weight") for x in "qkv"),
    ("transformer.h.{i}.attn.c_proj.weight", "blocks.{i}.attn.o.weight"),
    ("transformer.h.{i}.attn.ve_gate.weight", "blocks.{i}.attn.gate.weight"),
    ("transformer.h.{i}.mlp.c_fc.weight", "blocks.{i}.mlp.fc.weight"),
    ("transformer.h.{i}.mlp.c_proj.weight", "blocks.{i}.mlp.proj.weight"),
    ("resid_lambdas", "resid_scale"),
    ("x0_lambdas", "x0_scale"),
    ("smear_gate.weight", "smear_gate.weight"),
    ("smear_lambda", "smear_scale"),
    ("backout_lambda", "backout_scale"),
]
_TO_OURS, _TO_THEIRS = dict(_NAMES), {ours: theirs for theirs, ours in _NAMES}
_COMPILED = "_orig_mod."  # what torch.compile puts in front
_TABLES = ("wte.weight", "lm_head.weight")  # whose rows are padded; value embeddings exist only in padded form


def _renamed(name: str, table: dict[str, str]) -> str | None:
    number = re.search(r"\.(\d+)\.", name)
    known = table.get(name[: number.start(1)] + "{i}" + name[number.end(1) :] if number else name)
    return known and known.replace("{i}", number[1] if number else "")


def our_name(upstream: str) -> str:
    """The name here of the parameter that karpathy/nanochat calls `upstream`; NanochatError for one it never had."""
    found = _renamed(upstream.removeprefix(_COMPILED), _TO_OURS)
    if found is None:
        raise NanochatError(f"the tensor {upstream!r} is none of karpathy/nanochat's; is this one of its checkpoints?")
    return found


def their_name(ours: str) -> str:
    """karpathy/nanochat's name of our parameter `ours`."""
    found = _renamed(ours, _TO_THEIRS)
    if found is None:
        raise NanochatError(f"the parameter {ours!r} has no counterpart in karpathy/nanochat")
    return found


def config_from_nanochat(meta: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> GPTConfig:
    """The GPTConfig for its model_config. The weights tell the architecture where given, else a window pattern does."""
    try:
        heads, width = meta["n_head"], meta["n_embd"]
        current = "window_pattern" in meta if state is None else _is_current(state)
        return GPTConfig(
            vocab_size=meta["vocab_size"],
            seq_len=meta["sequence_len"],
            layers=meta["n_layer"],
            width=width,
            heads=heads,
            kv_heads=meta["n_kv_head"],
            head_dim=width // heads,
            window_pattern=meta.get("window_pattern", "L").upper(),
            architecture="2026" if current else "2025-10",
            bf16_rotary=not current,
        )
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise NanochatError(
            f"the model settings are not karpathy/nanochat's ({type(error).__name__}: {error}); "
            "they name vocab_size, sequence_len, n_layer, n_head, n_kv_head and n_embd"
        ) from None


def _is_current(state: Mapping[str, Tensor]) -> bool:
    names = {name.removeprefix(_COMPILED) for name in state}
    if "smear_gate.weight" in names:
        return True
    extra = sorted(n for n in names if n in ("resid_lambdas", "x0_lambdas") or "value_embeds" in n or "ve_" in n)
    if extra:
        raise NanochatError(
            f"this checkpoint has {extra[0]} but no smear_gate: it comes from between January and March 2026, when the "
            "architecture changed from week to week and the file does not tell how. Supported are checkpoints from "
            "before (October 2025 to January 2026) and since 2026-03-14"
        )
    return False


def state_from_nanochat(state: Mapping[str, Tensor], config: GPTConfig | None = None) -> dict[str, Tensor]:
    """A state_dict of its GPT under our names, ready for GPT.load_state_dict.

    With `config`, tables that were written without padding get their missing rows, as zeros.
    """
    ours = {our_name(name): tensor for name, tensor in state.items() if name.split(".")[-1] not in ("cos", "sin")}
    if config is not None:
        for name in _TABLES:
            if name in ours and ours[name].size(0) == config.vocab_size:
                ours[name] = F.pad(ours[name], (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return ours


def to_nanochat_state(state: Mapping[str, Tensor], config: GPTConfig | None = None) -> dict[str, Tensor]:
    """Our parameters under karpathy/nanochat's names: the inverse of `state_from_nanochat`.

    With the `config` of a 2025-10 model the padding is cut off, which its first version cannot load.
    """
    theirs = {their_name(name): tensor for name, tensor in state.items()}
    if config is not None and not config.is_current:
        for name in map(their_name, _TABLES):
            theirs[name] = theirs[name][: config.vocab_size].contiguous()
    return theirs


def to_nanochat_config(config: GPTConfig) -> dict[str, Any]:
    """What its checkpoints call model_config."""
    settings: dict[str, Any] = {
        "sequence_len": config.seq_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_kv_head": config.kv_heads,
        "n_embd": config.width,
    }
    return settings | ({"window_pattern": config.window_pattern} if config.is_current else {})
