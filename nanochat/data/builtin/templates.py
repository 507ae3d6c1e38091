"""Sentences with choices: `[a|b]` draws one alternative, `{name}` takes a slot; both nest.

Every draw comes from a generator seeded by what is being made (split, seed, kind, index), so any item can be made on
its own, in any order, on any machine, with the same bytes.
"""

import random
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO]|honest|hour)")
_SENTENCE_START = re.compile(r"(^|[.!?] |\n)([a-z])")


def generator(*key: object) -> random.Random:
    """A random generator that depends on `key` alone."""
    return random.Random(int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little"))


def choose(template: str, rng: random.Random) -> str:
    """`template` with every choice made."""
    while "[" in template:
        template = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return template


def fill(template: str, rng: random.Random, slots: Mapping[str, object]) -> str:
    """`template` with choices made and slots filled. Slots may hold choices, which are made anew at each use."""
    text = choose(template, rng).format_map(slots)
    return choose(text, rng) if "[" in text else text


def prose(sentences: Sequence[str], rng: random.Random, slots: Mapping[str, object]) -> str:
    """Sentences filled and joined: a capital at the start of each, `a` before a vowel becomes `an`."""
    text = " ".join(_capitalize(fill(sentence, rng, slots)) for sentence in sentences if sentence)
    return _ARTICLE.sub(r"\1n ", text)


def _capitalize(text: str) -> str:
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)
