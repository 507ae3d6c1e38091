"""ARC (arXiv 1803.05457) and MMLU (arXiv 2009.03300): questions with lettered answers.

The letter stands behind its answer and has no space before it: so it is the very token that the model will say, and it
is bound to the text just read, which small models find easier than a letter in front.
"""

from collections.abc import Sequence
from pathlib import Path

from nanochat.evaluation.tasks.base import Conversation, Task
from nanochat.evaluation.tasks.rows import HubDataset, load_rows

LETTERS = "ABCD"
ARC_SPLITS, MMLU_SPLITS = ("train", "validation", "test"), ("auxiliary_train", "dev", "validation", "test")


def lettered(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """A conversation that asks for one letter."""
    options = "\n".join(f"* {choice}={letter}" for letter, choice in zip(letters, choices, strict=True))
    asked = f"{question}\n\nWhich of these is right? Say its letter.\n{options}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "letters": tuple(letters)}


class ChoiceTask(Task):
    """Grades a letter."""

    eval_type = "choice"
    baseline = 0.25

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


class Arc(ChoiceTask):
    """Grade-school science. `subset` is ARC-Easy or ARC-Challenge; a few questions have 3 or 5 answers, or digits."""

    def __init__(self, subset: str, split: str = "test", path: str | Path | None = None) -> None:
        self.name = subset
        self.rows = load_rows(HubDataset("allenai/ai2_arc", subset, ARC_SPLITS), split, path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self.rows[index]
        return lettered(row["question"], row["choices"]["label"], row["choices"]["text"], row["answerKey"])


class Mmlu(ChoiceTask):
    """57 subjects, four answers each; auxiliary_train is what models are tuned on."""

    name = "MMLU"

    def __init__(self, split: str = "test", path: str | Path | None = None) -> None:
        self.rows = load_rows(HubDataset("cais/mmlu", "all", MMLU_SPLITS), split, path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self.rows[index]
        conversation = lettered(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
        return {**conversation, "subject": row.get("subject", "")}
