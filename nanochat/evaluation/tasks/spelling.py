"""Spelling and counting letters, over any list of words (one a line): what a model of tokens cannot see and must learn.

Even items ask for the letters of a word, odd ones how often a letter stands in it, which the calculator counts. Words
are divided by a hash into training, validation and test, so that what is tested was never spelled in training.
"""

import random
import re
import zlib
from pathlib import Path

from nanochat.errors import UsageError
from nanochat.evaluation.tasks.base import Conversation, Task

SHARES = {"train": range(0, 90), "val": range(90, 95), "test": range(95, 100)}  # of a hundred


class Spelling(Task):
    """Two items for each word of the split."""

    name = "spelling"
    eval_type = "generate"

    def __init__(self, path: str | Path, split: str = "test") -> None:
        path = Path(path).expanduser()
        if split not in SHARES:
            raise UsageError(f"spelling has no split {split!r}; use one of {', '.join(SHARES)}")
        if not path.is_file():
            raise UsageError(f"{path} is not a file of words, one a line")
        listed = (line.strip().lower() for line in path.read_text(encoding="utf-8").splitlines())
        words = sorted({word for word in listed if re.fullmatch(r"[^\W\d_]{2,24}", word)})
        self.words = [word for word in words if zlib.crc32(word.encode()) % 100 in SHARES[split]]
        random.Random(0).shuffle(self.words)
        if not self.words:
            raise UsageError(f"{path} holds no words for the split {split!r}; it has {len(words)} in all")

    def __len__(self) -> int:
        return 2 * len(self.words)

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(index)
        word = self.words[index // 2]
        rng = random.Random(f"{word} {index % 2}")
        if index % 2 == 0:
            question = rng.choice(
                (f"Spell the word {word}.", f"What are the letters of {word}?", f"How is {word} spelled?")
            )
            spelled = "-".join(word)
            return self._item(question, [{"type": "text", "text": f"{word} is spelled {spelled}."}], spelled)
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        count = str(word.count(letter))
        question = rng.choice((f"How many times does {letter} occur in {word}?", f"How many {letter}s are in {word}?"))
        parts = [
            {"type": "text", "text": f"The letters are {'-'.join(word)}. "},
            {"type": "python", "text": f'"{word}".count("{letter}")'},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f" The answer is {count}."},
        ]
        return self._item(question, parts, count)

    def _item(self, question: str, parts: list[dict[str, str]], answer: str) -> Conversation:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
        return {"messages": messages, "answer": answer}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        answer = conversation["answer"]
        if answer.isdigit():
            numbers = re.findall(r"\d+", completion)
            return bool(numbers) and numbers[-1] == answer
        return re.search(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", completion.lower()) is not None
