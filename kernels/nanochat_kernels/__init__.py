"""The hot operations of nanochat: each declared once, with a readable reference and the backends that replace it.

`OPS` maps every op's name to its declaration; `KernelPlan.resolve(...)` chooses a backend for each. The package
depends on torch alone and imports nothing of nanochat. A new op is one file, named like the op, and its name in the
list below.
"""

import importlib

from nanochat_kernels.registry import Choice, KernelPlan, KernelUnavailable, Op

__all__ = ["OPS", "Choice", "KernelPlan", "KernelUnavailable", "Op"]

_NAMES = (
    "rms_norm",
    "rope_qk_norm",
    "attention",
    "cached_attention",
    "paged_attention",
    "relu2_mlp",
    "linear_softcap_cross_entropy",
    "softcapped_logits",
    "orthogonalize",
    "muon_update",
    "adamw_update",
    "fp8_quantize",
    "fp8_rms_norm",
    "fp8_linear",
    "fp8_norm_qkv",
    "fp8_norm_mlp",
    "smeared_embedding",
    "paged_qkv",
    "thin_linear",
    "sample",
)

OPS: dict[str, Op] = {name: getattr(importlib.import_module(f"nanochat_kernels.{name}"), name) for name in _NAMES}
