"""What a task is: a sequence of conversations, and, where it can be graded, how.

A conversation is {"messages": [...]} as nanochat.chat_format reads it, its last message the assistant's reference
answer; further keys belong to the task. Two kinds of evaluation:

    choice     `letters` are the possible answers; the model's is the most likely of them as its first token
    generate   the model's answer is sampled and handed to `evaluate`

`baseline` is what guessing earns, from 0 to 1; centered accuracy takes it off. A task without a kind is for training.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nanochat.errors import UsageError

Conversation = Mapping[str, Any]
EvalType = Literal["choice", "generate"]
MIX_SEED = 42


class Task(ABC):
    """A numbered set of conversations, always the same and in the same order."""

    name: str
    eval_type: EvalType | None = None
    baseline: float = 0.0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Conversation: ...

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion`, the text of the model's answer (a letter for choices), is right."""
        raise UsageError(f"{self.name} is for training: it has no right answers to compare with")


def question_of(conversation: Conversation) -> list[Any]:
    """The messages up to the reference answer: what the model is asked."""
    return list(conversation["messages"][:-1])


class Mixture(Task):
    """Tasks shuffled into one, each as often as its weight says; the order is fixed by the tasks' lengths alone."""

    def __init__(self, tasks: Sequence[tuple[int, Task]], name: str = "mixture") -> None:
        self.name = name
        self.tasks = [task for _, task in tasks]
        self.order = [
            (number, index)
            for number, (weight, task) in enumerate(tasks)
            for _ in range(weight)
            for index in range(len(task))
        ]
        random.Random(MIX_SEED).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Conversation:
        number, index = self.order[index]
        return self.tasks[number][index]
