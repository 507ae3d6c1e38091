"""CORE (arXiv 2406.11794): 22 few-shot tasks that a base model can be asked, and the mean of their centered accuracies.

A task is a list of examples, shuffled once, and a number of worked examples (shots) put in front of the question:

    multiple_choice     which of the choices has the lowest mean loss after the question?
    schema              after which of the contexts has the continuation the lowest mean loss?
    language_modeling   is every token of the continuation the most likely one?

Only the span that differs is scored: what follows the common prefix of the choices, the common suffix of the contexts.
centered = (accuracy − baseline)/(1 − baseline), so that guessing is worth 0. What the bundle on disk lacks is listed,
and the mean is over the tasks that are there.

Cost: a question's shots are most of its tokens and the same in all its rows, so they are computed once, also when
another question of the batch begins the same way, and the rows go on from copies of that cache; the head, the largest
matrix, sees the scored positions alone, and so does the last layer but for its keys and values, as far as they stand at
the end. Batches are padded on the right.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.inference.kv_cache import KVCache
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

SHUFFLE_SEED = 1337
SHOTS_SEED = 1234  # + the example's index
MIN_SHARED = 8  # tokens that rows must have in common for a pass of their own
SCORED_AT_ONCE = 4096  # positions for which logits are held at the same time

Example = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task as core.yaml describes it. `baseline` is the accuracy of guessing, from 0 to 1."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    path: Path


@dataclass(frozen=True)
class Prompt:
    """The rows of tokens that one example asks the model to read, and the span [start, end) scored in each."""

    rows: list[list[int]]
    spans: list[tuple[int, int]]

    @property
    def shared(self) -> int:
        """Tokens that can be computed once for all rows: those before the first one that predicts a scored token."""
        if len(self.rows) == 1:
            return 0
        before = min(common_prefix(self.rows), min(start for start, _ in self.spans)) - 1
        return before if before >= MIN_SHARED else 0

    @property
    def width(self) -> int:
        return max(map(len, self.rows))


@dataclass(frozen=True)
class TaskResult:
    """`correct` holds the verdict on every example, in the task's shuffled order."""

    label: str
    accuracy: float
    centered: float
    correct: list[bool]


@dataclass(frozen=True)
class CoreResult:
    """`core` is the mean over `tasks`; `missing` names the tasks whose data the bundle lacks."""

    tasks: list[TaskResult]
    missing: list[str] = field(default_factory=list)

    @property
    def core(self) -> float:
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def label(self) -> str:
        """The name of the number: CORE only if all tasks were there."""
        return f"CORE ({len(self.tasks)} of {len(self.tasks) + len(self.missing)} tasks)" if self.missing else "CORE"

    def to_dict(self) -> dict[str, Any]:
        tasks = {
            task.label: {"accuracy": task.accuracy, "centered": task.centered, "examples": len(task.correct)}
            for task in self.tasks
        }
        return {"core": self.core, "label": self.label, "tasks": tasks, "missing": self.missing}


def load_tasks(folder: Path) -> tuple[list[CoreTask], list[str]]:
    """The tasks of a bundle (core.yaml, eval_meta_data.csv, eval_data/) whose data are there; the others' labels."""
    try:
        tasks = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise NanochatError(
            f"{folder} is not an evaluation bundle ({error}); it holds core.yaml, eval_meta_data.csv and eval_data/. "
            "Without --data the bundle is downloaded"
        ) from error
    present, missing = [], []
    for task in tasks:
        path = folder / "eval_data" / task["dataset_uri"]
        if not path.exists():
            missing.append(task["label"])
            continue
        delimiter = task.get("continuation_delimiter", " ")
        shots, baseline = task["num_fewshot"][0], baselines[task["label"]]
        present.append(CoreTask(task["label"], task["icl_task_type"], shots, delimiter, baseline, path))
    if not present:
        raise NanochatError(f"{folder / 'eval_data'} holds none of the {len(tasks)} tasks that core.yaml names")
    return present, missing


def load_examples(task: CoreTask, limit: int | None = None) -> list[Example]:
    """The task's examples in their fixed random order, at most `limit` of them."""
    with open(task.path, encoding="utf-8") as file:
        examples = [json.loads(line) for line in file if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(examples)
    examples = examples[:limit] if limit else examples
    if len(examples) <= task.shots:
        raise UsageError(
            f"{task.label} draws {task.shots} shots from the other examples, but there are {len(examples)}; "
            f"allow at least {task.shots + 1} examples per task"
        )
    return examples


def shots_for(examples: Sequence[Example], index: int, count: int) -> list[Example]:
    """The worked examples in front of example `index`: drawn from the others, always the same."""
    others = [i for i in range(len(examples)) if i != index]
    return [examples[i] for i in random.Random(SHOTS_SEED + index).sample(others, count)]


def texts_of(task: CoreTask, example: Example, shots: Sequence[Example]) -> list[str]:
    """What the model reads, one text per row; for language_modeling the prompt alone, then with its continuation."""
    between = task.delimiter
    if task.kind == "multiple_choice":
        front = [f"{shot['query']}{between}{shot['choices'][shot['gold']]}\n\n" for shot in shots]
        asked = [f"{example['query']}{between}{choice}" for choice in example["choices"]]
    elif task.kind == "schema":
        front = [f"{shot['context_options'][shot['gold']]}{between}{shot['continuation']}\n\n" for shot in shots]
        asked = [f"{context}{between}{example['continuation']}" for context in example["context_options"]]
    elif task.kind == "language_modeling":
        front = [f"{shot['context'].strip()}{between}{shot['continuation']}\n\n" for shot in shots]
        prompt = f"{''.join(front)}{example['context'].strip()}{between}"
        # a space left at the end of the prompt would be part of the continuation's first token
        return [prompt.strip(), f"{prompt}{example['continuation']}"]
    else:
        raise NanochatError(f"task {task.label} has the unknown type {task.kind!r}; a newer bundle?")
    return ["".join(front) + text for text in asked]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all rows begin."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), shortest)


def prompt_of(task: CoreTask, rows: list[list[int]]) -> Prompt:
    """Which span of each row counts. Every row begins with <|bos|>."""
    if task.kind == "language_modeling":
        return Prompt(rows[1:], [(common_prefix(rows), len(rows[1]))])
    if task.kind == "schema":
        suffix = common_prefix([row[::-1] for row in rows])
        return Prompt(rows, [(max(len(row) - suffix, 1), len(row)) for row in rows])
    start = common_prefix(rows)
    return Prompt(rows, [(start, len(row)) for row in rows])


def batches(prompts: Sequence[Prompt], tokens: int) -> Iterator[list[int]]:
    """Indices of prompts that are read together: at most `tokens` with padding, the longest first, so that a batch
    that does not fit in memory is met at once."""
    batch: list[int] = []
    rows = width = 0
    for index in sorted(range(len(prompts)), key=lambda i: (-prompts[i].width, i)):
        more = len(prompts[index].rows)
        if batch and (rows + more) * width > tokens:
            yield batch
            batch, rows, width = [], 0, 0
        batch.append(index)
        rows, width = rows + more, max(width, prompts[index].width)
    if batch:
        yield batch


def tokens_together(device: torch.device) -> int:
    """How many tokens to read together: on a CPU no more than keep its products busy, or padding and activations that
    leave its cache cost more than the larger products give."""
    return 65536 if device.type == "cuda" else 2048


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,T) ids with zeros on the right, and the true lengths (B,)."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)
    return ids, torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)


def score(model: GPT, prompts: Sequence[Prompt]) -> list[list[tuple[float, bool]]]:
    """For every row of every prompt: the mean loss in nats over its span, and whether the span is what greedy decoding
    gives. A row whose span is empty has an infinite loss: it says nothing, so it is never the best."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].shared == 0)
    sharing = [i for i in order if prompts[i].shared]
    results: list[list[tuple[float, bool]]] = [[] for _ in prompts]
    for group in (sharing, order[len(sharing) :]):
        rows = [(i, j) for i in group for j in range(len(prompts[i].rows))]
        if not rows:
            continue
        hidden, front = _hidden(model, [prompts[i] for i in group])
        at, position, target = [], [], []
        for number, (i, j) in enumerate(rows):
            for t in range(*prompts[i].spans[j]):
                at.append(number)
                position.append(t - 1 - prompts[i].shared - front)
                target.append(prompts[i].rows[j][t])
        losses, hits = _score_positions(
            model, hidden[at, position], torch.tensor(target, dtype=torch.int64, device=hidden.device)
        )
        done = 0
        for i, j in rows:
            start, end = prompts[i].spans[j]
            mine = slice(done, done := done + end - start)
            results[i].append((losses[mine].mean().item() if end > start else float("inf"), all(hits[mine].tolist())))
    return results


def _hidden(model: GPT, prompts: Sequence[Prompt]) -> tuple[Tensor, int]:
    """Hidden states (rows,T,C) of what follows each prompt's shared tokens, from the first position that predicts a
    scored token on, and how many positions that leaves out. All of the prompts share, or none does."""
    device = model.device
    ids, _ = padded([row[prompt.shared :] for prompt in prompts for row in prompt.rows], device)
    first = min(start - 1 - prompt.shared for prompt in prompts for start, _ in prompt.spans)
    tail = ids.size(1) - first
    if not prompts[0].shared:
        return model.hidden(ids, tail=tail), first
    fronts = [tuple(prompt.rows[0][: prompt.shared]) for prompt in prompts]
    numbers = {front: number for number, front in enumerate(dict.fromkeys(fronts))}  # some examples have the same
    front_ids, lengths = padded(list(numbers), device)
    cache = KVCache(model.config, len(numbers), front_ids.size(1) + ids.size(1), device, model.dtype)
    model.hidden(front_ids, cache, tail=1)  # for the keys and values alone
    cache.advance(front_ids, lengths)
    rows = [numbers[front] for front, prompt in zip(fronts, prompts, strict=True) for _ in prompt.rows]
    return model.hidden(ids, cache.select(rows), tail=tail), first


def _score_positions(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses float32 (N,) and greedy hits bool (N,), on the host, of hidden states (N,C)."""
    losses, hits = [], []
    for h, target in zip(hidden.split(SCORED_AT_ONCE), targets.split(SCORED_AT_ONCE), strict=True):
        logits = model.logits(h)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(losses).cpu(), torch.cat(hits).cpu()


def is_correct(task: CoreTask, example: Example, rows: Sequence[tuple[float, bool]]) -> bool:
    """The verdict on one example from `score`'s rows."""
    if task.kind == "language_modeling":
        return rows[0][1]
    losses = [loss for loss, _ in rows]
    return losses.index(min(losses)) == example["gold"]


@torch.no_grad()
def evaluate_task(
    model: GPT,
    tokenizer: Tokenizer,
    task: CoreTask,
    limit: int | None = None,
    batch_tokens: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResult:
    """One task on all ranks: rank r of W takes the examples ≡ r mod W, and every rank returns the whole result.

    batch_tokens: read together, 0 for what suits the device. report(done, total) counts this rank's examples.
    """
    examples = load_examples(task, limit)
    ranks = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
    mine = range(rank, len(examples), world)
    bos = tokenizer.bos_id
    prompts = []
    for index in mine:
        texts = texts_of(task, examples[index], shots_for(examples, index, task.shots))
        prompts.append(prompt_of(task, [[bos, *tokenizer.encode(text)] for text in texts]))
    correct = torch.zeros(len(examples), dtype=torch.int32, device=model.device)
    done = 0
    for batch in batches(prompts, batch_tokens or tokens_together(model.device)):
        verdicts = score(model, [prompts[i] for i in batch])
        for i, rows in zip(batch, verdicts, strict=True):
            correct[mine[i]] = is_correct(task, examples[mine[i]], rows)
        done += len(batch)
        report(done, len(mine))
    if ranks:
        dist.all_reduce(correct)
    accuracy = correct.double().mean().item()
    centered = (accuracy - task.baseline) / (1 - task.baseline)
    return TaskResult(task.label, accuracy, centered, correct.bool().tolist())


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    folder: Path,
    limit: int | None = None,
    batch_tokens: int = 0,
    tell: Callable[[str, TaskResult | None, int, int], None] = lambda label, result, done, total: None,
) -> CoreResult:
    """All tasks of the bundle in `folder`. tell(label, result, done, total) hears of progress, then of each result."""
    tasks, missing = load_tasks(folder)
    results = []
    for task in tasks:

        def report(done: int, total: int, label: str = task.label) -> None:
            tell(label, None, done, total)

        results.append(evaluate_task(model, tokenizer, task, limit, batch_tokens, report))
        tell(task.label, results[-1], len(results), len(tasks))
    return CoreResult(results, missing)
