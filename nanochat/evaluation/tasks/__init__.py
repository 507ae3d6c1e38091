"""The tasks by name, and mixtures of them: `smoltalk+3*mmlu+4*gsm8k+identity:PATH`."""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat.errors import UsageError
from nanochat.evaluation.tasks.base import Conversation, EvalType, Mixture, Task, question_of
from nanochat.evaluation.tasks.builtin import Builtin, WordProblems
from nanochat.evaluation.tasks.choice import Arc, Mmlu
from nanochat.evaluation.tasks.conversations import Jsonl, SmolTalk
from nanochat.evaluation.tasks.gsm8k import Gsm8k
from nanochat.evaluation.tasks.humaneval import HumanEval
from nanochat.evaluation.tasks.spelling import Spelling

__all__ = ["TASKS", "Conversation", "EvalType", "Mixture", "Task", "make_task", "parse_mixture", "question_of"]


@dataclass(frozen=True)
class Entry:
    """How a name becomes a task: make(split, argument), what the argument is, what the task is about."""

    make: Callable[[str, str | None], Task]
    argument: str
    about: str


def _needed(argument: str | None, name: str, what: str) -> str:
    if not argument:
        raise UsageError(f"{name} needs {what}: write {name}:{what.upper()}")
    return argument


def _validation(split: str) -> str:
    """What hub datasets call the split that is tuned against."""
    return "validation" if split == "val" else split


def _held_out(split: str) -> str:
    """For datasets with two splits, validation is their test split."""
    return "train" if split == "train" else "test"


def _spelling(split: str, argument: str | None) -> Task:
    return Spelling(argument, split) if argument else Builtin("spelling", split)


def _mmlu(split: str, argument: str | None) -> Task:
    return Mmlu("auxiliary_train" if split == "train" else _validation(split), argument)


TASKS: dict[str, Entry] = {
    "arc-easy": Entry(lambda s, a: Arc("ARC-Easy", _validation(s), a), "path", "science questions"),
    "arc-challenge": Entry(lambda s, a: Arc("ARC-Challenge", _validation(s), a), "path", "harder science questions"),
    "mmlu": Entry(_mmlu, "path", "questions from 57 subjects"),
    "gsm8k": Entry(lambda s, a: Gsm8k(_held_out(s), a), "path", "word problems, with calculator"),
    "humaneval": Entry(lambda s, a: HumanEval("test", a), "path", "Python functions"),
    "smoltalk": Entry(lambda s, a: SmolTalk(_held_out(s), a), "path", "general conversations"),
    "spelling": Entry(_spelling, "file of words", "spelling and counting letters; the built-in world's without a file"),
    "identity": Entry(lambda s, a: Jsonl(a, "identity") if a else Builtin("identity", s), "path", "who the model is"),
    "jsonl": Entry(lambda s, a: Jsonl(_needed(a, "jsonl", "path")), "path", "your own conversations"),
    "word-problems": Entry(lambda s, a: WordProblems(s), "", "word problems of the built-in world, with calculator"),
    "builtin": Entry(lambda s, a: Builtin(a, s), "kind", "the built-in world, or one kind of it"),
}


def make_task(spec: str, split: str = "test") -> Task:
    """The task `name` or `name:argument`; names are those of TASKS, in any case. Raises UsageError."""
    return _entry(spec).make(split, spec.partition(":")[2].strip() or None)


def _entry(spec: str) -> Entry:
    name = spec.partition(":")[0].strip()
    if name.lower() not in TASKS:
        raise UsageError(f"unknown task {name!r}; use one of {', '.join(TASKS)}")
    return TASKS[name.lower()]


def parse_mixture(spec: str, split: str = "train") -> Mixture:
    """A mixture written as tasks joined by +, each with an optional number of times in front: `2*gsm8k:PATH+smoltalk`.

    Paths cannot contain a +. The order is always the same. Raises UsageError.
    """
    parsed = []
    for item in spec.split("+"):
        times, star, task = item.partition("*") if item.partition("*")[0].strip().isdigit() else ("1", "*", item)
        if not task.strip() or int(times) < 1:
            raise UsageError(f"cannot read {item!r} in the mixture {spec!r}; write it like smoltalk+3*mmlu+jsonl:PATH")
        _entry(task)
        parsed.append((int(times), task))
    return Mixture([(times, make_task(task, split)) for times, task in parsed], spec)  # now that nothing is misspelled
