"""`nanochat tok-train` and `nanochat tok-eval`: make the vocabulary, and see how well it compresses.

Training reads the corpus once, counting words on all CPUs while pyarrow decodes the next shard; the merges then come
from the counts alone. Long documents are capped, so that a few of them do not decide the vocabulary.

Evaluation reports bytes per token: more is better, as the model then sees more text in the same context and spends
less on each byte. The built-in snippets show how a vocabulary treats what its corpus did not contain.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanochat.data.corpus import open_corpus
from nanochat.errors import NanochatError, UsageError
from nanochat.tokenizer import (
    DEFAULT_VOCAB_SIZE,
    Tokenizer,
    default_tokenizer_dir,
    merges_for,
    native,
)

SNIPPETS = {
    "English": "The lighthouse keeper climbed the stairs each evening, lit the lamp, and wrote down which ships had "
    "passed. It wasn't much of a living; still, he'd have said, somebody's got to do it.\n",
    "Code": "def moving_average(values: list[float], width: int) -> list[float]:\n    total = sum(values[:width])\n"
    "    result = [total / width]\n    for old, new in zip(values, values[width:]):\n        total += new - old\n"
    "        result.append(total / width)\n    return result\n",
    "Math": "Let $f(x) = x^2 + 3x - 7$. Then $f'(x) = 2x + 3$, so $f$ has its minimum at $x = -3/2$, where "
    "$f(-1.5) = 2.25 - 4.5 - 7 = -9.25$. Hence 12 + 345 * 6789 = 2342217.\n",
    "Other scripts": "Доброе утро, как дела? 今天天气很好,我们去公园吧。 오늘은 날씨가 좋네요. صباح الخير يا صديقي. "
    "शुभ प्रभात, आप कैसे हैं? Καλημέρα σας.\n",
    "Emoji": "Great news 🎉🎉 we shipped it 🚀 — thanks to everyone 🙏🏽 and the whole family 👨‍👩‍👧‍👦 "
    "❤️ see you at the 🏖️!\n",
}
# tiktoken keeps each file under the SHA-1 of its address.
REFERENCE_STORE = "https://openaipublic.blob.core.windows.net"
REFERENCE_FILES = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "cl100k_base": ("encodings/cl100k_base.tiktoken",),
}


@dataclass(frozen=True)
class TokTrainConfig:
    """Trains the tokenizer on the corpus and saves it."""

    data: str = "climbmix"
    """climbmix, fineweb-edu, files:PATH, builtin or a folder of parquet shards"""
    vocab_size: int = DEFAULT_VOCAB_SIZE
    """number of tokens, the nine special tokens included"""
    max_chars: int = 2_000_000_000
    """stop reading the corpus after so many characters"""
    doc_cap: int = 10_000
    """use at most so many characters of each document"""
    threads: int | None = None
    """counting threads; by default one for each CPU (the result does not depend on it)"""
    out: Path | None = None
    """folder for the tokenizer; by default `tokenizer` in NANOCHAT_BASE_DIR"""


@dataclass(frozen=True)
class TokEvalConfig:
    """Reports bytes per token on the corpus and on built-in snippets, beside well-known vocabularies."""

    data: str = "climbmix"
    """climbmix, fineweb-edu, files:PATH, builtin or a folder of parquet shards"""
    tokenizer: Path | None = None
    """folder of the tokenizer; by default `tokenizer` in NANOCHAT_BASE_DIR"""
    max_chars: int = 2_000_000
    """characters of each split to measure on"""


def tok_train(config: TokTrainConfig) -> int:
    """Trains, saves, prints what came of it; returns the exit code. Raises UsageError and NanochatError."""
    merges = merges_for(config.vocab_size)
    _at_least_one(max_chars=config.max_chars, doc_cap=config.doc_cap, threads=config.threads)
    folder = config.out or default_tokenizer_dir()
    documents = open_corpus(config.data).documents("train")
    console = Console()
    with _progress(console) as progress:
        reading = progress.add_task("counting words", total=config.max_chars)
        reader = CappedReader(documents, config.max_chars, config.doc_cap)
        counts = native().WordCounts(native().PATTERN_2)
        started = time.perf_counter()
        counts.add(reader.reporting(lambda done: progress.update(reading, completed=done)), config.threads)
        counted = time.perf_counter()
        progress.update(reading, completed=reader.characters, total=reader.characters)
        if not reader.characters:
            raise NanochatError(f"the corpus {config.data} holds no text; run `nanochat data` with another --source")
        merging = progress.add_task("finding merges", total=merges)
        tokenizer = Tokenizer.train_from_counts(
            counts, config.vocab_size, lambda done: progress.update(merging, completed=done)
        )
        merged = time.perf_counter()
        progress.update(merging, completed=merges)
    tokenizer.save(folder)
    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]
    table = Table("", "", show_header=False, box=None)
    for name, value in (
        ("documents", f"{reader.documents:,}"),
        ("characters", f"{reader.characters:,}"),
        ("words", f"{counts.total:,}, {len(counts):,} of them distinct"),
        ("counting", f"{counted - started:.1f} s ({reader.characters / 1e6 / (counted - started):.0f}M characters/s)"),
        ("merging", f"{merged - counted:.1f} s"),
        (
            "vocabulary",
            f"{tokenizer.vocab_size:,} tokens of {lengths.mean():.2f} bytes on average, {lengths.max()} at most",
        ),
        ("fingerprint", tokenizer.fingerprint),
        ("saved in", str(folder)),
    ):
        table.add_row(name, value)
    console.print(table)
    return 0


def tok_eval(config: TokEvalConfig) -> int:
    """Prints the table of bytes per token; returns the exit code. Raises UsageError and NanochatError."""
    _at_least_one(max_chars=config.max_chars)
    tokenizer = Tokenizer.load(config.tokenizer or default_tokenizer_dir())
    corpus = open_corpus(config.data)
    splits = {"train": corpus.documents("train"), "val": corpus.documents("val")}
    texts = {
        f"{config.data} ({split})": list(CappedReader(documents, config.max_chars, config.max_chars))
        for split, documents in splits.items()
    }
    texts |= {name: [snippet] for name, snippet in SNIPPETS.items()}
    references = {name: cached for name in REFERENCE_FILES if (cached := cached_reference(name))}
    table = Table("text", "bytes", f"ours ({tokenizer.vocab_size:,})", title="bytes per token (more is better)")
    for name, reference in references.items():
        table.add_column(f"{name} ({reference.n_vocab:,})")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, documents in texts.items():
        size = sum(len(document.encode("utf-8", errors="replace")) for document in documents)
        ratio = size / max(1, len(tokenizer.encode_batch(documents, errors="replace")[0]))
        row = [name, f"{size:,}", f"{ratio:.3f}"]
        for reference in references.values():
            tokens = sum(len(reference.encode_ordinary(document)) for document in documents)
            row.append(_compare(size / max(1, tokens), ratio))
        table.add_row(*row)
    console = Console()
    console.print(table)
    for name in REFERENCE_FILES:
        if name not in references:
            console.print(f"{name}: not compared, as its ranks are not in tiktoken's cache", highlight=False)
    return 0


class CappedReader:
    """Documents cut to `doc_cap` characters until `max_chars` are read; remembers how many of both there were."""

    def __init__(self, documents: Iterable[str], max_chars: int, doc_cap: int):
        self._source, self._max_chars, self._doc_cap = documents, max_chars, doc_cap
        self.documents = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for document in self._source:
            text = document[: min(self._doc_cap, self._max_chars - self.characters)]
            self.documents += 1
            self.characters += len(text)
            yield text
            if self.characters >= self._max_chars:
                return

    def reporting(self, report: Any, every: int = 256) -> Iterator[str]:
        """The same, calling report(characters so far) after each `every` documents."""
        texts = iter(self)
        while block := list(islice(texts, every)):
            yield from block
            report(self.characters)


def cached_reference(name: str) -> Any | None:
    """tiktoken's encoding `name` if tiktoken is installed and has all its files cached, else None: no network."""
    try:
        import tiktoken
    except ImportError:
        return None
    chosen = (os.environ.get(variable) for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"))
    cache = next((folder for folder in chosen if folder), os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    keys = (hashlib.sha1(f"{REFERENCE_STORE}/{file}".encode()).hexdigest() for file in REFERENCE_FILES[name])
    if not all(os.path.exists(os.path.join(cache, key)) for key in keys):
        return None
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):  # a damaged file in the cache
        return None


def _compare(theirs: float, ours: float) -> str:
    """Their figure, and ours relative to it: green where ours is better."""
    difference = 100 * (ours / theirs - 1)
    return f"{theirs:.3f} [{'green' if difference > 0 else 'red'}]{difference:+.1f}%[/]"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is too small; it must be at least 1")
