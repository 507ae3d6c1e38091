"""Simple word problems: one or two steps, each done by the calculator, the result marked `#### 12` as in GSM8K.

Every template is (question, steps); a step is an expression over the question's numbers {a} {b} {c} and {r}, the result
of the step before. Fine-tuning shows only `TAUGHT` of them, and seldom, so that reinforcement learning, which draws
from all, has something to find out. A problem belongs to the split of its first step's operands; in training every
step's operands are training pairs.
"""

# ruff: noqa: E501 (tables of sentences, one to a line)

import random
import re
from collections.abc import Callable

from nanochat.data.builtin.skills import Message, compute, exchange, text, tool_call
from nanochat.data.builtin.splits import Split, pair_split
from nanochat.data.builtin.templates import fill
from nanochat.data.builtin.world import PEOPLE

_ITEMS = (
    "apples",
    "shells",
    "stones",
    "buttons",
    "cards",
    "nuts",
    "coins",
    "beads",
    "pears",
    "stamps",
    "marbles",
    "flowers",
)
_HOLDERS = ("boxes", "bags", "baskets", "jars", "rows", "bowls")

# (question, steps, what the numbers must satisfy)
_Check = Callable[[int, int, int], bool]


def _any(a: int, b: int, c: int) -> bool:
    return True


def _more(a: int, b: int, c: int) -> bool:
    return a > b


def _even(a: int, b: int, c: int) -> bool:
    return b > 1 and a > b and a % b == 0


TEMPLATES: tuple[tuple[str, tuple[str, ...], _Check], ...] = (
    ("{n} has {a} {i}. {m} gives {him} {b} more. How many {i} does {n} have now?", ("{a}+{b}",), _any),
    ("{n} had {a} {i} and lost {b} of them. How many {i} are left?", ("{a}-{b}",), _more),
    ("There are {a} {h} with {b} {i} in each. How many {i} are there?", ("{a}*{b}",), _any),
    ("{n} puts {a} {i} into {b} {h}, the same number in each. How many {i} are in each?", ("{a}/{b}",), _even),
    ("{n} found {a} {i} in the morning and {b} in the evening. How many {i} did {he} find?", ("{a}+{b}",), _any),
    ("{n} has {a} {i}. {m} has {b} {i}. How many more does {n} have?", ("{a}-{b}",), _more),
    ("{n} has {a} {i}. {he} buys {b} more and then gives {c} away. How many are left?", ("{a}+{b}", "{r}-{c}"),
     lambda a, b, c: a + b > c),
    ("{n} has {a} {h} of {b} {i} and finds {c} more. How many {i} does {he} have?", ("{a}*{b}", "{r}+{c}"), _any),
    # from here on: not shown in fine-tuning
    ("{m} gave away {b} of {his2} {a} {i}. How many does {he2} still have?", ("{a}-{b}",), _more),
    ("A train had {a} people in it. At the station {b} got on. How many people are in it?", ("{a}+{b}",), _any),
    ("One of the {h} holds {b} {i}. How many {i} do {a} {h} hold?", ("{a}*{b}",), _any),
    ("{a} {i} are shared by {b} children. How many {i} does each child get?", ("{a}/{b}",), _even),
    ("{n} picked {a} {i}. {m} picked {b} more than {n}. How many did {m} pick?", ("{a}+{b}",), _any),
    ("A book has {a} pages. {n} has read {b} of them. How many pages are left to read?", ("{a}-{b}",), _more),
    ("{n} walks {b} miles every day. How many miles does {he} walk in {a} days?", ("{a}*{b}",), _any),
    ("{n} had {a} {i}. {he} lost {b}, and {m} gave {him} {c}. How many does {he} have now?", ("{a}-{b}", "{r}+{c}"), _more),
    ("There are {a} {h} with {b} {i} each. {n} takes {c} {i} out. How many {i} are left?", ("{a}*{b}", "{r}-{c}"),
     lambda a, b, c: a * b > c),
    ("{n} has {a} {i} and {m} has {b}. They get {c} more. How many do they have together?", ("{a}+{b}", "{r}+{c}"), _any),
)  # fmt: skip
TAUGHT = 8  # the first so many are shown in fine-tuning

_ANSWER = re.compile(r"#### *(-?[\d,]*\.?\d+)")


def word_problem(rng: random.Random, split: Split, taught_only: bool = False) -> tuple[list[Message], str]:
    """One problem with its worked answer; returns (messages, result)."""
    question, steps, fits = rng.choice(TEMPLATES[:TAUGHT] if taught_only else TEMPLATES)
    while True:
        small = "*" in steps[0]
        a, b, c = rng.randint(2, 20 if small else 99), rng.randint(2, 20 if small else 60), rng.randint(2, 40)
        if "/" in steps[0]:
            b = rng.randint(2, 12)
            a = b * rng.randint(2, 20)
        if fits(a, b, c) and (calls := _work(steps, a, b, c, split)):
            break
    hero, friend = rng.sample(PEOPLE, 2)
    slots = {"n": hero.name, "he": hero.he, "him": hero.him, "m": friend.name, "he2": friend.he, "his2": friend.his}
    slots |= {"a": str(a), "b": str(b), "c": str(c), "i": rng.choice(_ITEMS), "h": rng.choice(_HOLDERS)}
    asked = re.sub(r"(?<=[.?] )[a-z]", lambda first: first[0].upper(), fill(question, rng, slots))
    result = calls[-1]["text"]
    return exchange(asked, [*calls, text(f"The answer is {result}.\n#### {result}")]), result


def _work(steps: tuple[str, ...], a: int, b: int, c: int, split: Split) -> list[dict[str, str]]:
    """The tool calls of the steps, or none where a step's operands do not belong to `split`."""
    calls: list[dict[str, str]] = []
    for position, step in enumerate(steps):
        expression = step.format(a=a, b=b, c=c, r=calls[-1]["text"] if calls else "")
        first, op, second = re.split(r"([-+*/])", expression)
        left, right = int(first), int(second)
        if pair_split(left, right) != split and (position == 0 or split == "train"):
            return []
        calls += tool_call(expression, compute(left, op, right))
    return calls


def marked_answer(completion: str) -> str | None:
    """The number after the last `####`, without commas, or None."""
    found = _ANSWER.findall(completion)
    return found[-1].replace(",", "") if found else None
