"""Microbenchmarks of native code and the tokenizer, driven by pytest-benchmark: `pytest benchmarks --benchmark-only`.

For the work at a desk: `--benchmark-save=before`, change something, `--benchmark-compare=before`. The inputs are those
of callgrind_works.py, small and the same on every machine; figures worth keeping come from `nanochat bench`.
"""

import pytest

from benchmarks import callgrind_works

pytest.importorskip("pytest_benchmark")
WORKS = {work.name: work for work in callgrind_works.works()}


@pytest.mark.parametrize("name", WORKS)
def test_native(benchmark, name):
    call, units = WORKS[name].prepare()
    benchmark.extra_info |= {"units": units, "unit": WORKS[name].unit}
    benchmark(call)


def test_decode_bytes(benchmark):
    import nanochat_rustbpe

    encoding = nanochat_rustbpe.Encoding({bytes([i]): i for i in range(256)}, nanochat_rustbpe.PATTERN_2)
    ids = encoding.encode("".join(callgrind_works.texts())[:10_000])
    assert len(benchmark(encoding.decode_bytes, ids)) == 10_000
