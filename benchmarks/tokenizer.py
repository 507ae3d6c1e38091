"""Tokenizer speed: ours beside tiktoken, rustbpe and gigatoken, a fresh process for every figure.

    python benchmarks/tokenizer.py --corpus FOLDER --repeats 5
    python benchmarks/tokenizer.py --corpus FOLDER --peer-python OTHER/bin/python   # where the peers are installed

The corpus is a folder of parquet shards with a column `text`, all of which are used. Each figure is the median over
`--repeats` processes, in turn rather than one after the other, so that a change in the machine's load touches all of
them alike. Encoding is timed in the first pass over the text, with cold caches; memory is the growth of the resident
set's peak. gigatoken has no two-digit pattern, so it splits with three digits. A peer not installed is left out.
"""

import argparse
import base64
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB_SIZE = 32_768
SPECIALS = 9
FIGURES = {
    "encode, nanochat, 1 thread": ("ours", "encode_ours", 1),
    "encode, nanochat, 2 threads": ("ours", "encode_ours", 2),
    "encode, tiktoken, 1 thread": ("peer", "encode_tiktoken", 1),
    "encode, tiktoken, 2 threads": ("peer", "encode_tiktoken", 2),
    "encode, rustbpe, 1 thread": ("peer", "encode_rustbpe", 1),
    "encode, gigatoken, 1 thread": ("peer", "encode_gigatoken", 1),
    "train, nanochat, 1 thread": ("ours", "train_ours", 1),
    "train, nanochat, 2 threads": ("ours", "train_ours", 2),
    "train, rustbpe, 2 threads": ("peer", "train_rustbpe", 2),
    "1 MB of one letter, nanochat": ("ours", "encode_letters", 1),
    "4 MB of one letter, nanochat": ("ours", "encode_letters", 4),
    "random bytes, nanochat": ("ours", "encode_random", 4),
}


def read_corpus(folder: str) -> list[str]:
    import pyarrow.parquet as pq

    return [text for path in sorted(Path(folder).glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]


def read_ranks(path: str) -> dict[bytes, int]:
    lines = Path(path).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def timed(size: int, work: Callable[[], Any]) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "MB/s": size / 1e6 / seconds, "MiB": grown, "ns/byte": seconds * 1e9 / size}


def _ours(ranks: str) -> Any:
    import nanochat_rustbpe

    return nanochat_rustbpe.Encoding(read_ranks(ranks), nanochat_rustbpe.PATTERN_2)


def encode_ours(texts: list[str], ranks: str, threads: int) -> Callable[[], Any]:
    encoding = _ours(ranks)
    return lambda: encoding.encode_batch(texts, threads=threads)


def encode_tiktoken(texts: list[str], ranks: str, threads: int) -> Callable[[], Any]:
    import tiktoken

    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    encoding = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=read_ranks(ranks), special_tokens={})
    if threads == 1:
        return lambda: [encoding.encode_ordinary(text) for text in texts]
    return lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)


def encode_rustbpe(texts: list[str], ranks: str, threads: int) -> Callable[[], Any]:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), VOCAB_SIZE - SPECIALS)
    return lambda: [tokenizer.encode(text) for text in texts]


def encode_gigatoken(texts: list[str], ranks: str, threads: int) -> Callable[[], Any]:
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="cl100k")
    documents = [text.encode() for text in texts]
    return lambda: tokenizer.encode_batch(documents, parallel=threads > 1)


def train_ours(texts: list[str], ranks: str, threads: int) -> Callable[[], Any]:
    import nanochat_rustbpe

    def work() -> None:
        counts = nanochat_rustbpe.WordCounts(nanochat_rustbpe.PATTERN_2)
        counts.add(iter(texts), threads)
        counts.train(VOCAB_SIZE - SPECIALS - 256)

    return work


def train_rustbpe(texts: list[str], ranks: str, threads: int) -> Callable[[], Any]:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    return lambda: tokenizer.train_from_iterator(iter(texts), VOCAB_SIZE - SPECIALS)


def encode_letters(texts: list[str], ranks: str, megabytes: int) -> Callable[[], Any]:
    encoding = _ours(ranks)
    return lambda: encoding.encode_batch(texts, threads=1)


encode_random = encode_letters


def texts_for(function: str, corpus: str, argument: int) -> list[str]:
    if function == "encode_letters":
        return ["a" * (argument << 20)]
    if function == "encode_random":
        import numpy as np

        noise = np.random.default_rng(0).integers(0, 256, argument << 20, dtype=np.uint8).tobytes()
        return [noise.decode("utf-8", errors="replace")]
    return read_corpus(corpus)


def measure_one(name: str, corpus: str, ranks: str) -> None:
    """In a process of its own: prints one figure as JSON."""
    _, function, argument = FIGURES[name]
    texts = texts_for(function, corpus, argument)
    size = sum(len(text.encode()) for text in texts)
    print(json.dumps(timed(size, globals()[function](texts, ranks, argument))))


def make_ranks(corpus: str, path: str) -> None:
    """The vocabulary that every encoder uses, in tiktoken's format."""
    import nanochat_rustbpe

    counts = nanochat_rustbpe.WordCounts(nanochat_rustbpe.PATTERN_2)
    counts.add(read_corpus(corpus))
    ranks = nanochat_rustbpe.ranks_from_merges(counts.train(VOCAB_SIZE - SPECIALS - 256))
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    Path(path).write_bytes(b"".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", required=True, help="folder of parquet shards")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each figure")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--only", default="", help="figures whose name holds this text")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return measure_one(options.one, options.corpus, options.ranks)
    from rich.console import Console  # the peers' environment need not have it
    from rich.table import Table

    console = Console()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in FIGURES if options.only in name}
    with tempfile.TemporaryDirectory() as folder:
        ranks = f"{folder}/ranks.tiktoken"
        make_ranks(options.corpus, ranks)
        for _ in range(options.repeats):
            for name, runs in results.items():
                python = sys.executable if FIGURES[name][0] == "ours" else options.peer_python
                command = [python, __file__, "--corpus", options.corpus, "--one", name, "--ranks", ranks]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    runs.append(json.loads(done.stdout.splitlines()[-1]))
                elif not runs:
                    console.print(f"{name}: left out ({(done.stderr.splitlines() or ['?'])[-1]})", highlight=False)
    table = Table("figure", "seconds", "MB/s", "ns/byte", "MiB above start", title=f"medians of {options.repeats}")
    for name, runs in results.items():
        if runs:
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            values = (
                f"{middle[key]:,.{digits}f}"
                for key, digits in (("seconds", 2), ("MB/s", 1), ("ns/byte", 1), ("MiB", 0))
            )
            table.add_row(name, *values)
    console.print(table)


if __name__ == "__main__":
    main()
