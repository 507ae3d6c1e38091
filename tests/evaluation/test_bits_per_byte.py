"""Bits per byte against a sum done by hand; the same on any split of the rows."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nanochat.errors import NanochatError
from nanochat.evaluation import bits_per_byte
from nanochat.runtime import Runtime

ALONE = Runtime(torch.device("cpu"), torch.float32)
TOKEN_BYTES = torch.tensor([1, 3, 2, 0, 5])  # token 3 is special


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor


class LossOfTarget(nn.Module):
    """A model whose loss on target t after input i is (t + 1) + i/10 nats; masked targets give a poisonous value."""

    def forward(self, inputs, targets, reduction):
        assert reduction == "none" and not self.training
        return torch.where(targets < 0, float("nan"), targets + 1.0 + inputs / 10).flatten()


def test_by_hand():
    batch = Batch(torch.tensor([[0, 1, 2, 4]]), torch.tensor([[1, 3, -1, 4]]))
    # scored: target 1 (2.0 nats, 3 bytes) and target 4 (5.4 nats, 5 bytes); 3 is special, −1 masked
    model = LossOfTarget()
    found = bits_per_byte.evaluate(model, [batch], 1, TOKEN_BYTES, ALONE)
    assert found == pytest.approx((2.0 + 5.4) / math.log(2) / 8, rel=1e-6)
    assert model.training  # as it was


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_split_of_the_rows_gives_the_same(world_size, rows, monkeypatch):
    total = 7
    tokens = torch.randint(0, 5, (60, 9), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    sizes = TOKEN_BYTES[targets[:total]]
    nats = (targets[:total] + 1.0 + inputs[:total] / 10)[sizes > 0].sum().item()
    expected = nats / math.log(2) / sizes.sum().item()

    sums = []
    monkeypatch.setattr(bits_per_byte.dist, "all_reduce", lambda tensor: sums.append(tensor.clone()))
    for rank in range(world_size):
        mine = range(rank, 60, world_size)
        batches = [
            Batch(inputs[list(mine[i : i + rows])], targets[list(mine[i : i + rows])]) for i in range(0, 20, rows)
        ]
        runtime = Runtime(ALONE.device, ALONE.dtype, rank=rank, world_size=world_size)
        value = bits_per_byte.evaluate(LossOfTarget(), batches, total, TOKEN_BYTES, runtime)
    if world_size > 1:
        nats, sizes = sum(sums).tolist()
        value = nats / math.log(2) / sizes
    assert value == pytest.approx(expected, rel=1e-6)


def test_nothing_to_score():
    batch = Batch(torch.tensor([[0, 1]]), torch.tensor([[3, -1]]))
    with pytest.raises(NanochatError, match="special tokens only"):
        bits_per_byte.evaluate(LossOfTarget(), [batch], 1, TOKEN_BYTES, ALONE)
