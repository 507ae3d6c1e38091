"""The works whose instructions are counted (callgrind.py) and timed at a desk (test_microbenchmarks.py).

    python -m benchmarks.callgrind_works MARKERS.so NAME...        works between markers, inside valgrind

Nothing heavy is imported until a work needs it: under valgrind an import of torch takes a minute.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

TEXT_BYTES = 100_000


@dataclass(frozen=True)
class Work:
    """prepare() makes the inputs and returns the call to count and the units (bytes, documents, calls) it handles."""

    name: str
    unit: str
    threshold: float
    prepare: Callable[[], tuple[Callable[[], object], int]]


def texts() -> list[str]:
    """Made-up prose, the same on every machine: words with a natural spread of lengths and frequencies."""
    draw = random.Random(0)
    letters = "eeeettaaooiinnsshhrrddlluuccmmwwffggyyppbbvk"
    words = ["".join(draw.choices(letters, k=max(1, int(draw.gauss(5, 2.5))))) for _ in range(3000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    made, size = [], 0
    while size < TEXT_BYTES:
        made.append(" ".join(draw.choices(words, weights, k=draw.randint(20, 200))) + ". 1234, 56!\n")
        size += len(made[-1])
    return made


def _encode() -> tuple[Callable[[], object], int]:
    import nanochat_rustbpe

    written = texts()
    counts = nanochat_rustbpe.WordCounts(nanochat_rustbpe.PATTERN_2)
    counts.add(iter(written), 1)
    ranks = nanochat_rustbpe.ranks_from_merges(counts.train(1500))
    encoding = nanochat_rustbpe.Encoding(ranks, nanochat_rustbpe.PATTERN_2)
    return lambda: encoding.encode_batch(written, threads=1), sum(map(len, written))


def _train() -> tuple[Callable[[], object], int]:
    import nanochat_rustbpe

    written = texts()

    def work() -> None:
        counts = nanochat_rustbpe.WordCounts(nanochat_rustbpe.PATTERN_2)
        counts.add(iter(written), 1)
        counts.train(1500)

    return work, sum(map(len, written))


def _pack() -> tuple[Callable[[], object], int]:
    import nanochat_rustbpe
    import numpy as np

    draw, documents, capacity = np.random.default_rng(0), 4000, 513
    lengths = np.minimum(draw.lognormal(5, 1, documents).astype(np.int64) + 1, 4000)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = draw.integers(0, 30000, offsets[-1]).astype(np.uint16)
    keys = np.zeros((documents, 4), np.int64)
    block = np.empty((64, capacity), np.int32)

    def work() -> None:
        packer = nanochat_rustbpe.BestFitPacker(capacity, 1000)
        packer.add(ids, offsets, keys)
        while packer.pack(block) == len(block):
            pass

    return work, documents


def _kernel(op: str, case: str) -> Callable[[], tuple[Callable[[], object], int]]:
    def prepare() -> tuple[Callable[[], object], int]:
        import torch

        from nanochat_kernels import OPS

        torch.set_num_threads(1)
        function = OPS[op].load("native")
        found = next(each for each in OPS[op].cases() if each.name == case)
        args, kwargs = found.make(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))

        def work() -> None:
            with torch.no_grad():
                function(*args, **kwargs)

        work()  # loads the library, fills torch's caches
        return work, 1

    return prepare


def _packed(form: str) -> Callable[[], tuple[Callable[[], object], int]]:
    """A matrix-vector product with packed weights: what a decoded token on a CPU consists of."""

    def prepare() -> tuple[Callable[[], object], int]:
        import torch

        from nanochat_kernels import native
        from nanochat_kernels.packed_weights import pack

        native.load()
        torch.set_num_threads(1)
        draw = torch.Generator().manual_seed(0)
        packed, x = pack(torch.randn(256, 512, generator=draw), form), torch.randn(1, 512, generator=draw)
        product = torch.ops.nanochat.packed_linear
        return lambda: product(x, packed.words, packed.scales, packed.format, packed.outputs), 1

    return prepare


RUST = (
    Work("encode", "byte", 0.02, _encode),
    Work("train a vocabulary", "byte", 0.02, _train),
    Work("pack", "document", 0.02, _pack),
)


def kernel_works() -> list[Work]:
    """Products with packed weights, and every op that has a CPU kernel of ours on its first small case."""
    from nanochat_kernels import OPS, native
    from nanochat_kernels.packed_weights import FORMATS

    if native.missing():
        return []
    names = [(name, next(iter(op.cases())).name) for name, op in OPS.items() if "native" in op.backends]
    found = [Work(f"{name} ({case})", "call", 0.04, _kernel(name, case)) for name, case in names]
    return [*found, *(Work(f"packed_linear {form}", "call", 0.04, _packed(form)) for form in FORMATS)]


def works() -> list[Work]:
    return [*RUST, *kernel_works()]


def run_marked(markers: str, names: list[str]) -> None:
    """Inside valgrind: for each work its inputs, one call that warms up, one between the markers; prints the units."""
    library = ctypes.CDLL(markers)
    known = {work.name: work for work in RUST}  # without importing torch, where none of its kernels is asked for
    if not set(names) <= set(known):
        known |= {work.name: work for work in kernel_works()}
        gc.disable()  # or a collection falls between the markers in one run and not in the next
    for name in names:
        call, units = known[name].prepare()
        # Kernels pass twice: the first time between markers resolves symbols, 15,000 instructions.
        for mark in (name,) if known[name] in RUST else ("warm", name):
            call()
            library.start()
            call()
            library.stop(mark.encode())
        print(f"units {units} {name}", flush=True)


if __name__ == "__main__":
    run_marked(sys.argv[1], sys.argv[2:])
