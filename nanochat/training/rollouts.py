"""Batches for reinforcement learning: the model answers questions, and every answer becomes a row with a weight.

    questions of the step → `samples` answers each (the engine, at temperature 1) → reward 0 or 1 → advantage

The advantage of an answer is its reward minus the mean over the answers to the same question: what it did better than
usual. It is the weight of every token that the model chose; prompts and the calculator's output have target −1. A
question that is always or never answered right teaches nothing.

Which questions a step asks, and the seeds of the answers, follow from the number of the step, so that is all a restart
needs; question q goes to rank q mod W, and its answers depend neither on the ranks nor on the batch (but for rounding).
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.chat_format import render_prompt
from nanochat.data.packing import IGNORED_TARGET
from nanochat.errors import NanochatError
from nanochat.evaluation.tasks import Task, question_of
from nanochat.inference.batch_engine import BatchEngine
from nanochat.inference.engine import Engine
from nanochat.inference.row import Completion
from nanochat.inference.sampling import SamplingParams, row_seed
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime


@dataclass(frozen=True)
class Answer:
    """One answer: prompt and answer together, which of these tokens the model chose, and its worth."""

    ids: list[int]
    chosen: list[bool]
    reward: float
    advantage: float


@dataclass(frozen=True)
class RolloutBatch:
    """Rows of one rank, padded to the longest: inputs, targets (rows, T) int64, weights (rows, T) float32."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    wait_seconds: float
    share: float
    """Micro-batches and ranks of the step ÷ its targets."""


@dataclass(frozen=True)
class RolloutStats:
    """One step on all ranks. Means over answers; `mixed` is the share of questions answered both right and wrong."""

    reward: float
    answer_tokens: float
    mixed: float
    seconds: float


def policy_loss(model: GPT, batch: RolloutBatch) -> Tensor:
    """This micro-batch's part of −Σ advantage · log p(token) ÷ number of tokens; 0 where none was chosen."""
    return model(batch.inputs, batch.targets, batch.weights, reduction="sum") * batch.share


def advantages(rewards: Sequence[float]) -> list[float]:
    """Rewards of the answers to one question, minus their mean."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def to_tensors(answers: Sequence[Answer], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and weights (rows, T), T being one less than the longest answer with its prompt."""
    width = max(len(answer.ids) for answer in answers) - 1
    inputs = torch.full((len(answers), width), pad_id, dtype=torch.int64)
    targets = torch.full((len(answers), width), IGNORED_TARGET, dtype=torch.int64)
    weights = torch.zeros(len(answers), width)
    for row, answer in enumerate(answers):
        ids = torch.tensor(answer.ids)
        chosen = torch.tensor(answer.chosen[1:])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = torch.where(chosen, ids[1:], IGNORED_TARGET)
        weights[row, : len(ids) - 1] = answer.advantage * chosen
    return inputs.to(device), targets.to(device), weights.to(device)


class Rollouts:
    """An endless iterator of RolloutBatch. `stats` describes the step whose batches are being given out.

    questions: of a step on all ranks. rows: answers of a micro-batch. together: questions whose answers are generated
    at the same time. eager: a context in which the engine runs.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        runtime: Runtime,
        params: SamplingParams,
        *,
        questions: int,
        samples: int,
        rows: int,
        together: int,
        first_step: int,
        eager: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.task, self.engine, self.runtime, self.params = task, engine, runtime, params
        self.questions, self.samples, self.rows, self.together = questions, samples, rows, together
        self.step, self.eager = first_step, eager
        self.stats = RolloutStats(0.0, 0.0, 0.0, 0.0)
        self._batches: Iterator[RolloutBatch] = iter(())
        self._orders: dict[int, list[int]] = {}

    def __iter__(self) -> "Rollouts":
        return self

    def __next__(self) -> RolloutBatch:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self._make_step())
            return next(self._batches)

    def problems(self, step: int) -> list[int]:
        """The problems that a step asks, by number: every epoch goes through all of them in an order of its own."""
        numbers = range(step * self.questions, (step + 1) * self.questions)
        return [self._order(n // len(self.task))[n % len(self.task)] for n in numbers]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.task)))
            random.Random(f"{self.params.seed} {epoch}").shuffle(order)
            self._orders = {epoch - 1: self._orders.get(epoch - 1, []), epoch: order}
        return self._orders[epoch]

    def _make_step(self) -> list[RolloutBatch]:
        begin, step = time.perf_counter(), self.step
        mine = list(enumerate(self.problems(step)))[self.runtime.rank :: self.runtime.world_size]
        with self.eager():
            answers = self._answer(step, mine)
        targets = self._agree_on_stats(answers, begin)
        waited = time.perf_counter() - begin
        answers.sort(key=lambda answer: len(answer.ids))  # alike lengths share a micro-batch: little padding
        parts = [answers[start : start + self.rows] for start in range(0, len(answers), self.rows)]
        share = len(parts) * self.runtime.world_size / max(1, targets)
        self.step += 1
        pad_id, device = self.engine.tokenizer.bos_id, self.runtime.device
        return [
            RolloutBatch(*to_tensors(part, pad_id, device), waited if number == 0 else 0.0, share)
            for number, part in enumerate(parts)
        ]

    def _answer(self, step: int, asked: Sequence[tuple[int, int]]) -> list[Answer]:
        """Answers to (question of the step, problem) pairs, `samples` to each."""
        items = [self.task[problem] for _, problem in asked]
        prompts = [render_prompt(self.engine.tokenizer, question_of(item)) for item in items]
        for (_, problem), prompt in zip(asked, prompts, strict=True):
            if len(prompt) >= self.engine.context:
                raise NanochatError(
                    f"problem {problem} of {self.task.name} takes {len(prompt)} tokens, the model's context is "
                    f"{self.engine.context}; train a model with a larger --seq-len"
                )
        seeds = [row_seed(self.params.seed, 1 + step * self.questions + question) for question, _ in asked]
        params = [replace(self.params, seed=seed) for seed in seeds]
        rows = min(self.together, len(asked)) * self.samples
        # Made anew for every step: its weights are those of now, and its memory is free while the model learns.
        engine = BatchEngine.offline(self.engine, prompts, self.params.max_tokens, rows)
        completions = engine.generate(prompts, params, self.samples)
        return [
            answer
            for item, prompt, row in zip(items, prompts, completions, strict=True)
            for answer in self._judge(item, prompt, row)
        ]

    def _judge(self, item: Any, prompt: list[int], completions: Sequence[Completion]) -> list[Answer]:
        rewards = [float(self.task.evaluate(item, completion.text)) for completion in completions]
        return [
            Answer([*prompt, *done.tokens], [False] * len(prompt) + done.sampled, reward, advantage)
            for done, reward, advantage in zip(completions, rewards, advantages(rewards), strict=True)
        ]

    def _agree_on_stats(self, answers: Sequence[Answer], begin: float) -> int:
        """Sets `stats` and returns the number of targets, both over all ranks."""
        groups = [answers[i : i + self.samples] for i in range(0, len(answers), self.samples)]
        sums = torch.tensor(
            [
                sum(answer.reward for answer in answers),
                sum(sum(answer.chosen) for answer in answers),
                sum(any(answer.advantage for answer in group) for group in groups),
            ],
            dtype=torch.float64 if self.runtime.device.type != "mps" else torch.float32,
            device=self.runtime.device,
        )
        if self.runtime.distributed:
            dist.all_reduce(sums)
        reward, tokens, mixed = sums.tolist()
        count = self.questions * self.samples
        seconds = time.perf_counter() - begin
        self.stats = RolloutStats(reward / count, tokens / count, mixed / self.questions, seconds)
        return round(tokens)
