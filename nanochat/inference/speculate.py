"""Prompt-lookup speculative decoding: what followed the same few tokens the last time is guessed to follow again.

    text … the cat sat on the mat … the cat sat → guess: on the mat

A step checks all guesses at once, each with the logits that a step of its own would have had, and keeps those that are
what would have been drawn there: a draw depends on the logits, the seed and the position alone, so the answer does not
change (but for rounding, where a runner's sums depend on the number of rows). It pays where a step of several rows
costs little more than one of one row: weights read from memory, few requests, texts that repeat themselves.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that have to occur again


class Drafter:
    """Guesses for one text. It indexes each token once, so a guess costs a few look-ups whatever the length."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # some tokens → where the token behind their last occurrence stands
        self.indexed = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow. `tokens` is the text of the call before, or continues it."""
        for at in range(self.indexed, len(tokens)):  # the token at `at` stands behind these
            for size in range(SHORTEST, LONGEST + 1):
                if at >= size:
                    self.after[tuple(tokens[at - size : at])] = at
        self.indexed = len(tokens)
        for size in range(LONGEST, SHORTEST - 1, -1):
            found = self.after.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if found is not None:
                return list(tokens[found : found + count])
        return []
