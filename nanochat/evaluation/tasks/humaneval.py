"""HumanEval (arXiv 2107.03374): complete a Python function so that it passes its tests, which run in the sandbox."""

import re
from pathlib import Path

from nanochat.evaluation.sandbox import run_python
from nanochat.evaluation.tasks.base import Conversation, Task
from nanochat.evaluation.tasks.rows import HubDataset, load_rows

DATASET = HubDataset("openai/openai_humaneval", "openai_humaneval", ("test",))
TIMEOUT = 5.0  # seconds
_FENCED = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:from\s+\S+\s+import\s+.+|import\s+.+)$", re.MULTILINE)


def program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """What is run: the model's code, with the prompt's imports or continuing the prompt, then the tests.

    Code in the first fence of the answer counts, else all of it. An answer that does not define the function again is
    taken for its body.
    """
    fenced = _FENCED.search(completion)
    code = fenced.group(1) if fenced else completion
    if re.search(rf"^\s*def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        code = "\n".join([*_IMPORT.findall(prompt), "", code])
    else:
        code = prompt + code
    return f"{code}\n\n{test}\n\ncheck({entry_point})\n"


class HumanEval(Task):
    """The prompt is the beginning of a program; passing all tests within the time is right."""

    name = "HumanEval"
    eval_type = "generate"

    def __init__(self, split: str = "test", path: str | Path | None = None) -> None:
        self.rows = load_rows(DATASET, split, path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
        ]
        return {"messages": messages, "test": row["test"], "entry_point": row["entry_point"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        prompt = conversation["messages"][0]["content"]
        code = program(prompt, completion, conversation["test"], conversation["entry_point"])
        return run_python(code, timeout=TIMEOUT).ok
