"""Tokenizer speed: ours beside tiktoken, rustbpe and gigatoken, a fresh process for every figure.

    nanochat bench tokenizer [--corpus FOLDER] [--repeats 5]
    nanochat bench tokenizer --corpus FOLDER --peer-python OTHER/bin/python         # where the peers are installed

The corpus is a folder of parquet shards with a column `text`, all of which are used (default: the built-in one). Each
figure is the median over `--repeats` processes, in turn rather than one after the other, so that a change in the
machine's load touches all of them alike. Encoding is timed in the first pass over the text, with cold caches; memory is
the growth of the resident set's peak. gigatoken has no two-digit pattern, so it splits with three digits. A peer not
installed is left out. Rows give seconds per byte.
"""

import argparse
import base64
import json
import resource
import statistics
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


def peak_kib(reset: bool = False) -> int:
    """The resident set's peak. On Linux since the last reset: getrusage's begins with what the parent process held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def timed(size: int, work: Callable[[], Any]) -> dict[str, float]:
    before = peak_kib(reset=True)
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    grown = (peak_kib() - before) / 1024
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


def run_figure(name: str, corpus: str, ranks: str, peer_python: str) -> dict[str, float]:
    """One figure in a process of its own; raises NanochatError where a peer is missing or fails."""
    from benchmarks import harness

    python = sys.executable if FIGURES[name][0] == "ours" else peer_python
    return harness.run_json([python, __file__, "--corpus", corpus, "--one", name, "--ranks", ranks])


def record(rows: Any, name: str, runs: list[dict[str, float]]) -> None:
    from benchmarks import harness

    work, who, *detail = (part.strip() for part in name.split(","))
    ours = who == "nanochat"
    timing = harness.Timing([run["ns/byte"] * 1e-9 for run in runs])
    unit = {"mb_per_s": 1e-6 / timing.median, "grown_mib": statistics.median(run["MiB"] for run in runs)}
    rows.add(
        work="tokenizer", case=", ".join([work, *detail]), backend="nanochat" if ours else None,
        peer=None if ours else who, timing=timing, unit=unit, seconds=statistics.median(run["seconds"] for run in runs),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="folder of parquet shards (default: the built-in corpus)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each figure")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--only", default="", help="figures whose name holds this text")
    parser.add_argument("--out", help="file or folder for the rows (default: benchmarks/results/<device>)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:  # the peers' environment need not have the harness
        measure_one(options.one, options.corpus, options.ranks)
        return 0
    from benchmarks import harness

    corpus = harness.corpus_folder(options.corpus)
    rows = harness.Rows("tokenizer", harness.pick_device("cpu"), options.out)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in FIGURES if options.only in name}
    with tempfile.TemporaryDirectory() as folder:
        ranks = f"{folder}/ranks.tiktoken"
        make_ranks(corpus, ranks)
        for number in range(options.repeats):
            for name, runs in list(results.items()):
                harness.say(f"round {number + 1} of {options.repeats}: {name}")
                try:
                    runs.append(run_figure(name, corpus, ranks, options.peer_python))
                except harness.NanochatError as error:
                    if FIGURES[name][0] == "ours":
                        raise
                    harness.say(f"{name}: left out ({str(error).splitlines()[-1]})")
                    del results[name]
    for name, runs in results.items():
        record(rows, name, runs)
    rows.table(("mb_per_s", "grown_mib", "seconds"))
    return 0


if __name__ == "__main__":
    if "--one" in sys.argv:
        main()
    else:
        from benchmarks import harness

        harness.run(main)
