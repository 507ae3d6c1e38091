"""Conversations to train on: SmolTalk, and a user's own files."""

from pathlib import Path
from typing import Any

from nanochat.chat_format import Conversation as Parsed
from nanochat.errors import UsageError
from nanochat.evaluation.tasks.base import Conversation, Task
from nanochat.evaluation.tasks.rows import HubDataset, Rows, load_rows, read_rows

SMOLTALK = HubDataset("HuggingFaceTB/smol-smoltalk", "default", ("train", "test"))


class SmolTalk(Task):
    """General conversations, the selection meant for small models (460,000 for training)."""

    name = "SmolTalk"

    def __init__(self, split: str = "train", path: str | Path | None = None) -> None:
        self.rows = load_rows(SMOLTALK, split, path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        return {"messages": self.rows[index]["messages"]}


class Jsonl(Task):
    """A user's own file. Each row is {"messages": [...]}, a list of messages, or {"instruction", "input"?, "output"}.

    Every row is read once at the start, so that what is wrong is said before training begins, with its line.
    """

    def __init__(self, path: str | Path, name: str = "jsonl") -> None:
        self.name = f"{name}:{path}"
        self.rows = Rows(_as_list(read_rows(Path(path).expanduser())), shuffle=False)
        for number in range(len(self.rows)):
            try:
                last = Parsed.parse(self[number]).messages[-1]
                if last.role != "assistant":
                    raise UsageError(f"the last message is the {last.role}'s; end with the assistant's")
            except UsageError as error:
                raise UsageError(f"row {number + 1} of {path}: {error}") from error
        if not len(self.rows):
            raise UsageError(f"{path} holds no conversations")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row: Any = self.rows[index]
        if isinstance(row, list):
            return {"messages": row}
        if isinstance(row, dict) and "instruction" in row and "output" in row:
            asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
            answer = {"role": "assistant", "content": row["output"]}
            return {"messages": [{"role": "user", "content": asked}, answer]}
        if not isinstance(row, dict) or "messages" not in row:
            raise UsageError("needs `messages`, or `instruction` and `output`")
        return row


def _as_list(rows: Any) -> list[Any]:
    return rows if isinstance(rows, list) else rows.to_pylist()
