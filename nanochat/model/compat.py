"""Weights of karpathy/nanochat under our names. Only names differ: shapes, padding and values are the same.

Its checkpoints as files (pickles, read with care) are the business of `nanochat import`.
"""

import re
from typing import Any

from torch import Tensor

from nanochat.errors import NanochatError
from nanochat.model.config import GPTConfig

_RENAMES = [
    (r"^_orig_mod\.", ""),  # what torch.compile puts in front
    (r"^transformer\.wte\.", "wte."),
    (r"^transformer\.h\.(\d+)\.attn\.c_proj\.", r"blocks.\1.attn.o."),
    (r"^transformer\.h\.(\d+)\.attn\.c_([qkv])\.", r"blocks.\1.attn.\2."),
    (r"^transformer\.h\.(\d+)\.attn\.ve_gate\.", r"blocks.\1.attn.gate."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_(fc|proj)\.", r"blocks.\1.mlp.\2."),
    (r"^resid_lambdas$", "resid_scale"),
    (r"^x0_lambdas$", "x0_scale"),
    (r"^smear_lambda$", "smear_scale"),
    (r"^backout_lambda$", "backout_scale"),
]


def our_name(upstream: str) -> str:
    """The name here of the parameter that karpathy/nanochat calls `upstream`."""
    for pattern, replacement in _RENAMES:
        upstream = re.sub(pattern, replacement, upstream)
    return upstream


def config_from_nanochat(meta: dict[str, Any]) -> GPTConfig:
    """The GPTConfig for upstream's model_config. Without a window pattern it is the original architecture."""
    try:
        heads, width = meta["n_head"], meta["n_embd"]
        return GPTConfig(
            vocab_size=meta["vocab_size"],
            seq_len=meta["sequence_len"],
            layers=meta["n_layer"],
            width=width,
            heads=heads,
            kv_heads=meta["n_kv_head"],
            head_dim=width // heads,
            window_pattern=meta.get("window_pattern", "L").upper(),
            architecture="2026" if "window_pattern" in meta else "2025-10",
        )
    except KeyError as missing:
        raise NanochatError(f"the model settings lack {missing}; is this a checkpoint of karpathy/nanochat?") from None


def state_from_nanochat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of karpathy/nanochat's GPT under our names, ready for GPT.load_state_dict."""
    return {our_name(name): tensor for name, tensor in state.items() if name.split(".")[-1] not in ("cos", "sin")}
