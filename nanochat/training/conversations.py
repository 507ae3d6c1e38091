"""Batches for fine-tuning: conversations packed into rows, the rest of a row being padding that nobody learns.

Conversations are read in the order of their task, epoch after epoch, rendered (chat_format.py) and packed best-fit
(packing.py) in one global order; row n goes to rank n mod W. A row's target is −1 where it is padding or not the
assistant's to say. Rows hold different numbers of targets, so every batch knows how many the whole step has, on all
ranks: the loss is divided by that, and depends neither on the micro-batch nor on the ranks.

The state is the number of the next conversation and those waiting in the packer's buffer: a restart renders the latter
again, feeds them first, and continues exactly. Rendering runs in a thread ahead of training.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.chat_format import render
from nanochat.data.loader import Ahead
from nanochat.data.packing import BestFitPacker, inputs_and_targets
from nanochat.errors import NanochatError, UsageError
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

AT_ONCE = 64  # conversations rendered between two attempts to fill a row
AHEAD = 2  # steps made ahead of training
SAMPLE = 2000  # conversations from which the length of an epoch is estimated


@dataclass(frozen=True)
class ConversationBatch:
    """One micro-batch of one rank: inputs, targets (rows, T) int64, and what its whole step has on all ranks."""

    inputs: Tensor
    targets: Tensor
    wait_seconds: float
    share: float
    """Micro-batches and ranks of the step ÷ its targets: sums of nats times this, averaged over both, are the mean."""
    state: dict[str, Any]
    """Restarts the loader after the step."""


def mean_over_targets(model: GPT, batch: ConversationBatch) -> Tensor:
    """This micro-batch's part of the step's mean loss; 0 with a gradient of 0 where it has no target."""
    return model(batch.inputs, batch.targets, reduction="sum") * batch.share


class ConversationLoader:
    """An endless iterator of ConversationBatch, `accumulation` of `rows` rows to a step; a context manager.

    conversations: anything indexable of what chat_format.render takes.
    """

    def __init__(
        self,
        conversations: Sequence[Any] | Any,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        rows: int,
        seq_len: int,
        accumulation: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        if not len(conversations):
            raise UsageError("there are no conversations to train on")
        self.conversations, self.tokenizer, self.runtime = conversations, tokenizer, runtime
        self.rows, self.seq_len, self.accumulation = rows, seq_len, accumulation
        self.packer = BestFitPacker(seq_len + 1, pad_id=tokenizer.bos_id)
        self.next = 0
        if state is not None:
            self._feed(state["buffer"])
            self.next = state["next"]
        self._steps = Ahead(self._make_steps(), AHEAD, "conversations")
        self._batches: Iterator[ConversationBatch] = iter(())

    def __enter__(self) -> "ConversationLoader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._steps.stop()
        self._steps.join()

    def __iter__(self) -> "ConversationLoader":
        return self

    def __next__(self) -> ConversationBatch:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = self._step_batches()
            return next(self._batches)

    def _feed(self, numbers: Sequence[int]) -> None:
        """Renders conversations by number, counted through all epochs, and hands them to the packer."""
        pairs = [self._render(number % len(self.conversations)) for number in numbers]
        ids = np.concatenate([np.array(i, dtype=np.int32) for i, _ in pairs] or [np.zeros(0, np.int32)])
        mask = np.concatenate([np.array(m, dtype=np.uint8) for _, m in pairs] or [np.zeros(0, np.uint8)])
        offsets = np.cumsum([0, *(len(i) for i, _ in pairs)])
        self.packer.add(ids, offsets, numbers, mask)

    def _render(self, index: int) -> tuple[list[int], list[int]]:
        try:
            return render(self.tokenizer, self.conversations[index], self.seq_len + 1)
        except UsageError as error:
            raise NanochatError(f"conversation {index} of the mixture is not one: {error}") from error

    def _make_steps(self) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
        """Rows (n, T + 1) and mask of one step after another, of all ranks, and the state after each."""
        shape = self.rows * self.accumulation * self.runtime.world_size, self.seq_len + 1
        while True:
            ids, mask = np.empty(shape, np.int32), np.empty(shape, np.uint8)
            while self.packer.pack(ids, mask) < len(ids):
                self._feed(range(self.next, self.next + AT_ONCE))
                self.next += AT_ONCE
            # what was fed but has not entered the buffer is simply rendered again
            newest = self.packer.newest
            yield ids, mask, {"buffer": self.packer.buffered(), "next": newest + 1}

    def _step_batches(self) -> Iterator[ConversationBatch]:
        runtime, begin = self.runtime, time.perf_counter()
        ids, mask, state = next(self._steps)
        waited = time.perf_counter() - begin
        inputs, targets = inputs_and_targets(ids, mask)
        share = self.accumulation * runtime.world_size / max(1, int((targets >= 0).sum()))
        own = slice(runtime.rank, None, runtime.world_size)
        inputs, targets = inputs[own], targets[own]
        for start in range(0, len(inputs), self.rows):
            part = slice(start, start + self.rows)
            yield ConversationBatch(
                torch.from_numpy(inputs[part]).to(runtime.device),
                torch.from_numpy(targets[part]).to(runtime.device),
                waited if start == 0 else 0.0,
                share,
                state,
            )


def rows_in_an_epoch(conversations: Sequence[Any] | Any, tokenizer: Tokenizer, seq_len: int) -> int:
    """About how many rows of T + 1 tokens the conversations fill, judged by the first `SAMPLE` of them."""
    known = min(SAMPLE, len(conversations))
    packer = BestFitPacker(seq_len + 1, pad_id=tokenizer.bos_id)
    lengths = [len(render(tokenizer, conversations[i], seq_len + 1)[0]) for i in range(known)]
    packer.add(np.zeros(sum(lengths), np.int32), np.cumsum([0, *lengths]), range(known))
    packer.finish()
    filled = packer.pack(np.empty((known, seq_len + 1), np.int32))
    return max(1, round(filled * len(conversations) / known))
