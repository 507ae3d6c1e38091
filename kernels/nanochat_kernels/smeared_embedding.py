"""The first vector of a position: its token's embedding, normed, with a little of the token before. No gradients.

    y = e(token) + smear_scale·sigmoid(smear_weight·e(token)[:I])·e(previous)        e(i) = rmsnorm(table[i])

The previous token's id stands for the smear's state, so that generation keeps none. Two rows of the table are read per
token; the point of a kernel is the dozen launches that torch needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import EPS, normal
from nanochat_kernels.registry import Case, Cost, Op


def smeared_embedding_reference(
    tokens: Tensor,
    previous: Tensor,
    table: Tensor,
    smear_weight: Tensor | None = None,
    smear_scale: Tensor | None = None,
) -> Tensor:
    """(N, C) in the table's dtype from tokens and previous (N,) int64, −1 where nothing came before; table (V, C).

    smear_weight (I,) and smear_scale (one element), float32, both or neither.
    """
    x = F.rms_norm(table[tokens], (table.size(1),), eps=EPS)
    if smear_weight is None or smear_scale is None:
        return x
    before = F.rms_norm(table[previous.clamp_min(0)], (table.size(1),), eps=EPS)
    logit = x[:, : smear_weight.numel()] @ smear_weight.to(x.dtype)[:, None]
    gate = smear_scale.to(x.dtype) * torch.sigmoid(logit)
    return x + gate * before * (previous >= 0)[:, None]


def _cases() -> Iterator[Case]:
    def make(n, c, smear=24):
        def build(device, dtype, generator):
            tokens, previous = (torch.randint(low, 50, (n,), generator=generator).to(device) for low in (0, -1))
            previous[0] = -1
            extra = (normal((smear,), device, torch.float32, generator), torch.tensor([0.7], device=device))
            return (tokens, previous, normal((50, c), device, dtype, generator), *(extra if smear else ())), {}

        return build

    yield Case("smeared", make(5, 64))
    yield Case("plain", make(3, 64, smear=0))
    yield Case("prime", make(7, 131), size="odd")
    yield Case("d12", make(16, 768), size="model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    tokens, table = args[0], args[2]
    elements = tokens.numel() * table.size(1)
    return Cost((3 if len(args) > 3 else 2) * elements * table.element_size(), 8 * elements)


smeared_embedding = Op(
    "smeared_embedding",
    torch=smeared_embedding_reference,
    cuda="nanochat_kernels.native_cuda:smeared_embedding",
    available={"cuda": needs_cuda_ops},
    custom=("cuda",),
    cases=_cases,
    cost=_cost,
)
