"""Byte-pair training in the plainest way: recount everything after each merge. The oracle of the trainer's tests."""

from collections import Counter
from collections.abc import Iterable

import regex

Pair = tuple[int, int]


def word_counts(texts: Iterable[str], pattern: str) -> Counter[tuple[int, ...]]:
    """How often each piece occurs, as a tuple of its bytes."""
    counts: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        counts.update(tuple(piece.encode()) for piece in regex.findall(pattern, text))
    return counts


def pair_counts(words: Counter[tuple[int, ...]]) -> Counter[Pair]:
    """How often each two tokens stand side by side."""
    counts: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in zip(word, word[1:], strict=False):
            counts[pair] += count
    return counts


def join(word: tuple[int, ...], pair: Pair, token: int) -> tuple[int, ...]:
    """The word with every occurrence of `pair`, found from the left, replaced by `token`."""
    joined: list[int] = []
    at = 0
    while at < len(word):
        if word[at : at + 2] == pair:
            joined.append(token)
            at += 2
        else:
            joined.append(word[at])
            at += 1
    return tuple(joined)


def train(texts: Iterable[str], count: int, pattern: str) -> list[Pair]:
    """At most `count` merges; of equally frequent pairs, the smallest by id."""
    words = word_counts(texts, pattern)
    merges: list[Pair] = []
    while len(merges) < count:
        counts = pair_counts(words)
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        token = 256 + len(merges)
        merges.append(best)
        joined: Counter[tuple[int, ...]] = Counter()
        for word, number in words.items():
            joined[join(word, best, token)] += number
        words = joined
    return merges
