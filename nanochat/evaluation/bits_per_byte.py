"""Bits per byte: how well a model predicts text, in a unit that does not depend on its vocabulary.

    bpb = Σ nats of the scored targets ÷ ln 2 ÷ Σ UTF-8 bytes of the scored targets

A target is scored if it stands for bytes: special tokens (0 bytes) and masked positions (−1) count in neither sum. A
larger vocabulary spreads a text over fewer, harder tokens; per byte both compare.
"""

import math
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import NanochatError
from nanochat.runtime import Runtime


class TokenBatch(Protocol):
    """What evaluation needs of a batch: (rows, T) int64, targets −1 where nothing is scored."""

    @property
    def inputs(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[TokenBatch], total_rows: int, token_bytes: Tensor, runtime: Runtime
) -> float:
    """Bits per byte over the first `total_rows` rows of the global order of `batches`, on all ranks together.

    batches: those of a loader, whose row j of batch k on rank r is row (k·rows + j)·W + r of all. Rows beyond the last
    are left out, so that the value depends neither on the ranks nor on the micro-batch. token_bytes: (vocab_size,)
    bytes of each token, 0 for special ones. Every rank returns the same number. Raises NanochatError when no target is
    scored.
    """
    device = runtime.device
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device if device.type != "mps" else "cpu")  # nats, bytes
    done = 0
    was_training = model.training
    model.eval()
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        rows = len(inputs)
        row_numbers = torch.arange(done, done + rows, device=device) * runtime.world_size + runtime.rank
        scored = (targets >= 0) & (row_numbers < total_rows)[:, None]
        sizes = token_bytes[targets.clamp_min(0)] * scored
        nats = model(inputs, targets, reduction="none").view_as(sizes).double()
        sums += torch.stack([torch.where(sizes > 0, nats, 0.0).sum(), sizes.sum().double()]).to(sums.device)
        done += rows
        if done * runtime.world_size >= total_rows:
            break
    model.train(was_training)
    if runtime.distributed:
        dist.all_reduce(sums)
    nats_sum, bytes_sum = sums.tolist()
    if not bytes_sum:
        raise NanochatError("no target stands for any bytes: the validation data hold special tokens only")
    return nats_sum / math.log(2) / bytes_sum
