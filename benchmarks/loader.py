"""Tokens per second of the loader, from parquet to rows, beside what training takes.

    nanochat bench loader [--data FOLDER] [--tokenizer FOLDER] [--threads 1 2] [--repeats 5]

The folder holds parquet shards with a column `text` (default: the built-in corpus). Every figure is the median of
processes of their own, taken in turn, each held to as many CPUs as it has threads, so that reading, tokenizing and
packing share them as they do beside a training run. The clock runs from the loader's creation (cold caches, empty
buffer) to the last batch; the training thread does nothing but take batches. The parts are timed alone: reading row
groups, tokenizing them in place, packing in Rust and in Python, the Rust ones being what the loader consists of.

A rank of several tokenizes the whole stream, because a row depends on all documents before it, so every rank's share of
the CPUs must keep up with the job's tokens per second. Rows give seconds per token.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import harness
from nanochat.errors import UsageError

NEEDS = {"d24": 1.0e6, "d12": 4.0e6}  # tokens/s that eight H100s take
PARTS = ("loader", "read", "tokenize", "pack", "pack in Python")


def measure(
    part: str, data: str, tokenizer_folder: str, threads: int, shape: tuple[int, int], tokens: int
) -> list[float]:
    """Tokens per second of one part in this process, and per second of CPU time: what it would do undisturbed."""
    if hasattr(os, "sched_setaffinity"):  # before torch counts the CPUs
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import torch

    from nanochat.data.columns import ColumnReader
    from nanochat.data.corpus import open_corpus
    from nanochat.data.loader import Documents, PackedLoader, Position, read_documents
    from nanochat.data.packing import BestFitPacker
    from nanochat.tokenizer import Tokenizer, native

    torch.set_num_threads(1)  # rows are widened on the device where there is one; here by the thread that takes them
    corpus, tokenizer, (rows, seq_len) = open_corpus(data), Tokenizer.load(Path(tokenizer_folder)), shape
    batches = -(-tokens // (rows * seq_len))

    def timed(work: Callable[[], int]) -> list[float]:
        begin, cpu = time.perf_counter(), time.process_time()
        done = work()
        return [done / (time.perf_counter() - begin), done / (time.process_time() - cpu)]

    def load() -> int:
        with PackedLoader(corpus, tokenizer, "train", rows=rows, seq_len=seq_len, threads=threads) as loader:
            for _ in range(batches):
                next(loader)
        return batches * rows * seq_len

    if part == "loader":
        return timed(load)
    texts: list[Documents] = []
    encoded: list[tuple[np.ndarray, np.ndarray]] = []

    def read() -> None:
        texts.extend(read_documents(ColumnReader(corpus, "train"), Position(0, 0, 0, 0), epochs=1))

    def tokenize() -> int:
        encoded.extend(tokenizer.encode_batch(text.texts, prepend_bos=True, threads=threads) for text in texts)
        return sum(len(ids) for ids, _ in encoded)

    def pack() -> int:
        make = native().BestFitPacker if part == "pack" else BestFitPacker
        packer, block, packed = make(seq_len + 1, 1000), np.empty((rows, seq_len + 1), np.int32), 0
        for (ids, offsets), text in zip(encoded, texts, strict=True):
            packer.add(ids, offsets, text.positions)
            while packer.pack(block) == rows:
                packed += rows * seq_len
        return packed

    read()
    if part == "read":  # the shards again, from the page cache, in the tokens that they become
        found = tokenize()
        return timed(lambda: read() or found)
    speeds = timed(tokenize)
    return speeds if part == "tokenize" else timed(pack)


def make_tokenizer(data: str, folder: str) -> None:
    from nanochat.data.corpus import open_corpus
    from nanochat.tokenizer import Tokenizer

    documents = list(open_corpus(data).documents("train"))
    try:
        Tokenizer.train(documents).save(Path(folder))
    except UsageError:  # the built-in corpus has fewer words than a full vocabulary
        Tokenizer.train(documents, 2048).save(Path(folder))


def run_part(part: str, threads: int, args: argparse.Namespace, tokenizer: str) -> dict[str, float]:
    """One process: {"wall": tokens/s, "cpu": tokens per second of CPU time}."""
    options = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("data", "rows", "seq-len", "tokens")]
    command = [sys.executable, "-m", "benchmarks.loader", *options, f"--tokenizer={tokenizer}"]
    return harness.run_json([*command, "--one", part, str(threads)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of parquet shards (default: the built-in corpus)")
    parser.add_argument("--tokenizer", help="its folder; one of 32,768 is trained on the data when left out")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of one run of the loader")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each figure")
    parser.add_argument("--out", help="file or folder for the rows (default: benchmarks/results/<device>)")
    parser.add_argument("--one", nargs=2, metavar=("PART", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        shape, (part, threads) = (args.rows, args.seq_len), args.one
        wall, cpu = measure(part, args.data, args.tokenizer, int(threads), shape, args.tokens)
        print(json.dumps({"wall": wall, "cpu": cpu}))
        return 0
    args.data = harness.corpus_folder(args.data)
    rows = harness.Rows("loader", harness.pick_device("cpu"), args.out)
    figures = [(part, n) for n in args.threads for part in PARTS if n == min(args.threads) or part == "loader"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.tokenizer or temporary
        if not args.tokenizer:
            make_tokenizer(args.data, folder)
        sides = {f"{part} {n}": (lambda part=part, n=n: run_part(part, n, args, folder)) for part, n in figures}
        runs = harness.interleave(sides, args.repeats)
    for (part, threads), done in zip(figures, runs.values(), strict=True):
        speed = statistics.median(run["wall"] for run in done)
        unit = {"tokens_per_s": speed, "per_cpu_s": statistics.median(run["cpu"] for run in done)}
        unit |= {f"times_{name}": speed / need for name, need in NEEDS.items()}
        timing = harness.Timing([1 / run["wall"] for run in done])
        rows.add(work="loader", case=f"{part}, {threads} thread(s)", backend="native", timing=timing, unit=unit)
    rows.table(("tokens_per_s", "per_cpu_s", *(f"times_{name}" for name in NEEDS)))
    return 0


if __name__ == "__main__":
    harness.run(main)
