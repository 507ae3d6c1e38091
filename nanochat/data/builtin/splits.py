"""Which operand pairs and which words belong to training, validation or test: by hash, so by construction.

Membership depends on nothing but the pair or the word itself, hence it holds in every stage: no text of pretraining,
fine-tuning or reinforcement learning contains a held-out pair as operands of an operation, or a held-out word at all.
`held_out_in` is the check; the tests run it over everything the generator makes.
"""

import re
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD_OUT_PERCENT = {"val": 10, "test": 15}

_OPERATION = re.compile(r"(?<![\d.])(\d+) ?[-+*/x] ?(\d+)(?!\d)")
_WORD = re.compile(r"[a-z]+")


def _split_of(key: str) -> Split:
    percent = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") % 100
    if percent < HELD_OUT_PERCENT["test"]:
        return "test"
    return "val" if percent < HELD_OUT_PERCENT["test"] + HELD_OUT_PERCENT["val"] else "train"


@cache
def pair_split(a: int, b: int) -> Split:
    """The split of the operand pair {a, b}, in either order and for every operation."""
    return _split_of(f"pair {min(a, b)} {max(a, b)}")


@cache
def words(split: Split) -> tuple[str, ...]:
    """The listed words of a split, for spelling and letter counting: about 4,000 in all, lower case, 4 to 10 letters.

    The stories use words of their own besides; none of those is listed as held out (a test sees to it).
    """
    listed = files(__package__).joinpath("words.txt").read_text(encoding="ascii").split()
    return tuple(word for word in listed if _split_of(f"word {word}") == split)


@cache
def held_out_words() -> frozenset[str]:
    """Every word that training text must not contain."""
    return frozenset(words("val") + words("test"))


def held_out_in(text: str) -> list[str]:
    """The held-out words and operations (`12+34`, `12 x 34`) that stand in `text`: empty for any training text."""
    found = [word for word in _WORD.findall(text.lower()) if word in held_out_words()]
    pairs = ((match[0], int(match[1]), int(match[2])) for match in _OPERATION.finditer(text))
    return found + [operation for operation, a, b in pairs if pair_split(a, b) != "train"]
