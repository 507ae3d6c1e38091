"""A few greedy continuations, to see with one's own eyes what a number like 1.1 bits per byte means."""

from collections.abc import Sequence
from typing import Any

import torch

from nanochat.chat_format import render_prompt
from nanochat.inference.engine import Engine
from nanochat.inference.row import Completion
from nanochat.inference.sampling import SamplingParams
from nanochat.model.gpt import GPT

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "The opposite of hot is",
    "The sun rises in the",
    "2 + 3 =",
    "My favorite color is",
)


@torch.no_grad()
def greedy(model: GPT, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = 24) -> list[str]:
    """The prompts with their most likely continuations, `new_tokens` long or up to the next document.

    No cache: all rows are computed again for each token, at one fixed shape, padded on the right where a causal model
    cannot see. A handful of short rows does not deserve more.
    """
    ids, offsets = tokenizer.encode_batch(list(prompts), prepend_bos=True)
    rows = [list(map(int, ids[a:b])) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    bos = rows[0][0]
    length = min(max(map(len, rows)) + new_tokens, model.config.seq_len)
    rows = [row[:length] for row in rows]
    first = [len(row) for row in rows]
    was_training = model.training
    model.eval()
    for _ in range(new_tokens):
        growing = [row for row in rows if len(row) < length and (len(row) == 1 or row[-1] != bos)]
        if not growing:
            break
        padded = torch.tensor([row + [bos] * (length - len(row)) for row in growing], device=model.device)
        last = model.hidden(padded)[torch.arange(len(growing)), torch.tensor([len(row) - 1 for row in growing])]
        for row, token in zip(growing, model.logits(last).argmax(-1).tolist(), strict=True):
            row.append(token)
    model.train(was_training)
    ends = [row[1:-1] if len(row) > n and row[-1] == bos else row[1:] for row, n in zip(rows, first, strict=True)]
    return [tokenizer.decode(row) for row in ends]


QUESTIONS = (
    "Who are you?",
    "What is 17 * 23?",
    "How many times does the letter r appear in strawberry?",
    "Tell me a short story.",
)


def shown(completion: Completion) -> str:
    """An answer in one line; what was asked of the calculator stands in brackets with its result."""
    marks = {"python": "[{}", "python_output": " = {}]"}
    return "".join(marks.get(part["type"], "{}").format(part["text"]) for part in completion.parts)


def chat(engine: Engine, questions: Sequence[str] = QUESTIONS, max_tokens: int = 160) -> list[dict[str, str]]:
    """The likeliest answer to each question, {"prompt", "text"}: what the report and the log show of a chat model."""
    prompts = [render_prompt(engine.tokenizer, [{"role": "user", "content": text}]) for text in questions]
    fitting = [(text, ids) for text, ids in zip(questions, prompts, strict=True) if len(ids) < engine.context]
    answers = engine.generate([ids for _, ids in fitting], SamplingParams(temperature=0.0, max_tokens=max_tokens))
    return [{"prompt": text, "text": shown(answer)} for (text, _), [answer] in zip(fitting, answers, strict=True)]
