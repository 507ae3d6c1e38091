"""Tokens per second of the loader, from parquet to rows, beside what training takes.

    python benchmarks/loader.py --data FOLDER [--tokenizer FOLDER] [--threads 1 2] [--repeats 5]

The folder holds parquet shards with a column `text`. Every figure is the median of processes of their own, taken in
turn, each held to as many CPUs as it has threads, so that reading, tokenizing and packing share them as they do beside
a training run. The clock runs from the loader's creation (cold caches, empty buffer) to the last batch; the training
thread does nothing but take batches. The parts are timed alone: reading row groups, tokenizing them in place, packing
in Rust and in Python, the Rust ones being what the loader consists of.

A rank of several tokenizes the whole stream, because a row depends on all documents before it, so every rank's share of
the CPUs must keep up with the job's tokens per second. The last line is one JSON row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

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

    Tokenizer.train(open_corpus(data).documents("train")).save(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of parquet shards")
    parser.add_argument("--tokenizer", help="its folder; one of 32,768 is trained on the data when left out")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of one run of the loader")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each figure")
    parser.add_argument("--one", nargs=2, metavar=("PART", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        shape = (args.rows, args.seq_len)
        print(json.dumps(measure(args.one[0], args.data, args.tokenizer, int(args.one[1]), shape, args.tokens)))
        return
    figures = {(part, n): [] for n in args.threads for part in PARTS if n == min(args.threads) or part == "loader"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.tokenizer or temporary
        if not args.tokenizer:
            make_tokenizer(args.data, folder)
        options = [
            f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("data", "rows", "seq-len", "tokens")
        ]
        for _ in range(args.repeats):
            for (part, threads), runs in figures.items():
                command = [sys.executable, __file__, *options, f"--tokenizer={folder}", "--one", part, str(threads)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    row: dict = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "repeats": args.repeats}
    for (part, threads), runs in figures.items():
        walls, per_cpu = zip(*runs, strict=True)
        speed, undisturbed = statistics.median(walls), statistics.median(per_cpu)
        beside = ", ".join(f"{speed / need:.1f} × {name}" for name, need in NEEDS.items())
        print(
            f"{part:>14}, {threads} thread(s): {speed / 1e6:7.2f}M tokens/s ({min(walls) / 1e6:.2f} to "
            f"{max(walls) / 1e6:.2f}), {undisturbed / 1e6:7.2f}M per CPU second; {beside} on 8×H100"
        )
        key = f"{part.replace(' ', '_')}_{threads}"
        row |= {key: round(speed), f"{key}_per_cpu_second": round(undisturbed)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
