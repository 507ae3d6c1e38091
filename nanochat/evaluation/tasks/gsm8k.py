"""GSM8K (arXiv 2110.14168): grade-school word problems whose solutions call a calculator.

A mark <<48/2=24>> in a solution becomes two parts of the assistant's message: the expression that the model is to
write, and the result that the tool will give. The answer stands after `####`.
"""

import re
from pathlib import Path
from typing import Any

from nanochat.evaluation.tasks.base import Conversation, Task
from nanochat.evaluation.tasks.rows import HubDataset, load_rows

DATASET = HubDataset("openai/gsm8k", "main", ("train", "test"))
_MARK = re.compile(r"<<([^<>]*)>>")
_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d.,]+)")


def solution_parts(solution: str) -> list[dict[str, str]]:
    """The parts of an assistant's message for a solution with calculator marks."""
    parts = []
    for number, piece in enumerate(_MARK.split(solution)):  # text, mark, text, mark, ..., text
        if number % 2 == 0:
            parts.append({"type": "text", "text": piece})
            continue
        expression, _, result = piece.rpartition("=")
        parts.append({"type": "python", "text": expression or result})
        parts.append({"type": "python_output", "text": result if expression else ""})
    return [part for part in parts if part["text"]]


def final_answer(text: str) -> str | None:
    """The number after the last ####, without commas, a trailing point or a needless .0; None where there is none."""
    found = _ANSWER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "").rstrip(".")
    return re.sub(r"\.0+$", "", number) or None


class Gsm8k(Task):
    """Graded by the number after ####."""

    name = "GSM8K"
    eval_type = "generate"

    def __init__(self, split: str = "test", path: str | Path | None = None) -> None:
        self.rows = load_rows(DATASET, split, path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row: dict[str, Any] = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": solution_parts(row["answer"])},
            ],
            "answer": final_answer(row["answer"]),
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return final_answer(completion) == conversation["answer"] is not None
