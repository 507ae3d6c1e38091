"""The kinds of the built-in world as tasks: what its chat model is trained on and graded by, with no network."""

from typing import cast

from nanochat.data import builtin as world
from nanochat.data.builtin.splits import Split
from nanochat.evaluation.tasks.base import Conversation, Task

GRADED = ("arithmetic", "letter_count", "spelling", "word_problem")
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class WordProblems(Task):
    """The built-in world's word problems of every template, also those that fine-tuning never shows."""

    name = "word-problems"
    eval_type = "generate"

    def __init__(self, split: str = "test") -> None:
        self.items = world.word_problems(cast(Split, SPLITS.get(split, split)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Conversation:
        return self.items[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return world.grade("word_problem", conversation, completion)


class Builtin(Task):
    """One kind of the built-in world's conversations, or, without a kind, its whole mixture (for training)."""

    def __init__(self, kind: str | None = None, split: str = "test") -> None:
        self.name = f"builtin:{kind}" if kind else "builtin"
        self.kind = kind
        self.items = world.conversations(cast(Split, SPLITS.get(split, split)), kind)
        self.eval_type = "generate" if kind in GRADED else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Conversation:
        return self.items[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return world.grade(str(self.kind), conversation, completion)
