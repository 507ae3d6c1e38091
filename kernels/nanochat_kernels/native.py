"""The C++ extension (csrc/): where it is, whether it runs, and the backends that it gives to ops.

The library of tensor ops is loaded when first asked for and registers torch.ops.nanochat.*; fake implementations are
registered here, so that what calls them can be traced. Where nothing was built the package works without: `missing()`
says why and how to get it, and ops stay on their torch backends.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from nanochat_kernels.registry import Place

REMEDY = "build it with `python setup.py build_ext --inplace` or bash runs/setup.sh; it needs a C++ compiler"


@functools.cache
def library() -> Path | None:
    """The built library of tensor ops, or None."""
    return next(iter(sorted(Path(__file__).parent.glob("_ops*.so"))), None)


@functools.cache
def missing() -> str | None:
    """None when the extension is loaded and runs here, else the reason and the remedy. Loads it at the first call."""
    path = library()
    if path is None:
        return f"the C++ extension is not built; {REMEDY}"
    try:
        torch.ops.load_library(path)
        bindings()
    except (OSError, ImportError) as error:
        return f"the C++ extension does not load ({str(error).splitlines()[0]}); {REMEDY}"
    _register_fakes()
    return None


def bindings() -> ModuleType:
    """Build facts and CPU features: csrc/bindings.cpp. Raises ImportError where it is not built."""
    return importlib.import_module("nanochat_kernels._bindings")


def on_cpu(place: Place) -> str | None:
    """For `Op.available`: why the CPU kernels cannot run at a place, or None."""
    if place.device.type != "cpu":
        return "these kernels are for CPUs"
    return missing()


def load() -> None:
    """Loads the extension. Raises RuntimeError with the remedy where that cannot be done."""
    reason = missing()
    if reason:
        raise RuntimeError(reason)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, window: int
) -> Tensor:
    """nanochat_kernels.paged_attention on a CPU: each query streams the blocks it sees once, for all heads that share
    them. A row's result does not depend on the batch."""
    load()
    return torch.ops.nanochat.paged_attention(q, k_cache, v_cache, table, starts, lengths, window)


def softmax_and_gradient(panel: Tensor, targets: Tensor, nll: Tensor, softcap: float, gradients: bool) -> None:
    """The elementwise step of linear_softcap_cross_entropy_chunked.py in two walks over a row in the cache."""
    load()
    torch.ops.nanochat.softcap_cross_entropy(panel, targets, nll, softcap, gradients)


def linear_softcap_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    softcap: float = 15.0,
    reduction: str = "mean",
) -> Tensor:
    """nanochat_kernels.linear_softcap_cross_entropy on a CPU: the chunked walk with this elementwise step."""
    from nanochat_kernels.linear_softcap_cross_entropy_chunked import linear_softcap_cross_entropy_chunked

    return linear_softcap_cross_entropy_chunked(
        x, weight, targets, token_weights, vocab_size, softcap, reduction, fused="native"
    )


def _register_fakes() -> None:
    @torch.library.register_fake("nanochat::paged_attention")
    def _(q, k_cache, v_cache, table, starts, lengths, window):
        return q.new_empty(q.shape)

    @torch.library.register_fake("nanochat::packed_linear")
    def _(x, words, scales, format, outputs, epilogue="none", softcap=15.0):
        return x.new_empty(x.size(0), outputs)

    @torch.library.register_fake("nanochat::model_step")
    def _(sizes, scalars, format, weights, k, v, tokens, previous, positions, starts, lengths, full, window, outputs):
        return tokens.new_empty(outputs.size(0), -(-sizes[6] // 32) * 32, dtype=torch.float32)
