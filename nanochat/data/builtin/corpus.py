"""The pretraining text of the built-in world: stories for most of it, and the ground for what chat needs.

A small model learns to copy (numbers, words it has never seen) and to spell its own tokens only from much practice, and
pretraining is where most tokens are spent. So part of the corpus is practice: sums written as the calculator wants
them, words echoed and spelled, letters counted. Every piece is drawn from the training split, the validation
documents too: they measure fit, not generalization, and so nothing in any shard touches a held-out pair or word.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.builtin import skills, stories, world
from nanochat.data.builtin.skills import a_letter, compute, count_expression, practice_word
from nanochat.data.builtin.templates import generator, prose
from nanochat.errors import UsageError

CHARACTERS = 12_000_000  # of the default corpus: more than quickstart's tokens, so that no text is seen twice
TRAIN_SHARDS = 4
VALIDATION_SHARE = 0.04
ROW_GROUP = 256  # documents


def _story(rng: random.Random) -> str:
    title, told = stories.story(rng)
    return f"{title}\n\n{told}" if rng.random() < 0.4 else told


def _people(rng: random.Random) -> str:
    return "\n".join(stories.portrait(rng, person) for person in rng.sample(world.PEOPLE, 2))


def _facts(rng: random.Random) -> str:
    lines = []
    for question, answer in rng.sample(world.questions(), 8):
        asked, said = prose([question], rng, {}), prose([answer], rng, {})
        lines.append(rng.choice((said, f"{asked} {said}", f"Question: {asked}\nAnswer: {said}")))
    return "\n".join(lines)


def _sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(4, 8)):
        op = rng.choice("++--**/")
        a, b = skills.operands(rng, op, "train")
        said, result = skills.arithmetic_phrase(rng, op, a, b), compute(a, op, b)
        lines.append(rng.choice((f"{said}: {a}{op}{b}={result}", f"{said} is {a}{op}{b}={result}, so it is {result}.")))
    return "\n".join(lines)


def _echoes(rng: random.Random) -> str:
    speaker, listener = (person.name for person in rng.sample(world.PEOPLE, 2))
    lines = []
    for _ in range(rng.randint(2, 4)):
        count = rng.randint(1, 5)
        if rng.random() < 0.5:
            said = ", ".join(str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(count))
        else:
            said = ", ".join(practice_word(rng, "train") for _ in range(count))
        lines.append(f"{speaker} says: {said}\n{listener} repeats: {said}")
    return "\n".join(lines)


def _letters(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(4, 8)):
        word = practice_word(rng, "train")
        letter, style = a_letter(rng, word), rng.randrange(4)
        if style == 0:
            lines.append(f"{word}: {'-'.join(word)}")
        elif style == 1:
            lines.append(f'"{word}" is spelled {"-".join(word)}.')
        else:
            shown = f'"{word}"' if style == 2 else word
            expression = count_expression(word, letter, quoted=style == 2)
            said = rng.choice((f"the letter {letter} in {shown}", f"{letter} in {shown}", f"{letter}'s in {shown}"))
            lines.append(f"{said}: {expression}={word.count(letter)}")
    return "\n".join(lines)


# maker: parts in a hundred of the characters, about
_KINDS: dict[Callable[[random.Random], str], int] = {
    _story: 50, _people: 9, _facts: 11, _sums: 10, _echoes: 8, _letters: 12,
}  # fmt: skip
_LENGTH: dict[Callable[[random.Random], str], int] = {
    _story: 640,
    _people: 500,
    _facts: 480,
    _sums: 200,
    _echoes: 190,
    _letters: 210,
}  # characters, on average


def document(split: Literal["train", "val"], seed: int, index: int) -> str:
    """The document of that index: text without special tokens."""
    rng = generator("document", split, seed, index)
    makers: list[Callable[[random.Random], str]] = list(_KINDS)
    (maker,) = rng.choices(makers, [_KINDS[maker] / _LENGTH[maker] for maker in makers])
    return maker(rng)


def documents(split: Literal["train", "val"], seed: int = 0, characters: int = CHARACTERS) -> Iterator[str]:
    """Documents of a split until together they hold at least their share of `characters` (validation: 4 percent)."""
    share = VALIDATION_SHARE if split == "val" else 1 - VALIDATION_SHARE
    wanted, index = characters * share, 0
    while wanted > 0:
        text = document(split, seed, index)
        yield text
        wanted -= len(text)
        index += 1


def write_corpus(folder: str | Path, characters: int = CHARACTERS, seed: int = 0) -> list[Path]:
    """Write the corpus as parquet shards (column `text`); returns their paths, the last one being validation.

    The same bytes every time; each shard is written to a temporary name, synced and renamed.
    """
    if characters < 10_000:
        raise UsageError(f"a built-in corpus of {characters} characters is too small: ask for at least 10000")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train = list(documents("train", seed, characters))
    bounds = [len(train) * i // TRAIN_SHARDS for i in range(TRAIN_SHARDS + 1)]
    shards = [train[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    shards.append(list(documents("val", seed, characters)))
    paths = []
    for index, texts in enumerate(shards):
        path = folder / f"shard_{index:05d}.parquet"
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        try:
            pq.write_table(
                pa.table({"text": pa.array(texts, pa.string())}),
                temporary,
                row_group_size=ROW_GROUP,
                compression="zstd",
            )
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths
