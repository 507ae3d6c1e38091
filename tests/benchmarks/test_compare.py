"""Verdicts: a deliberately slowed kernel is caught, noise is not."""

import random

import pytest
import torch

from benchmarks import compare, harness, kernels
from nanochat.errors import UsageError
from tests.benchmarks import test_harness as toy_ops


def row(samples, **fields):
    return {"op": "toy", "case": "one", "backend": "fused", **fields} | harness.Timing(samples).record()


def noisy(mean, spread, seed, count=30):
    draw = random.Random(seed)
    return [mean * (1 + draw.gauss(0, spread)) for _ in range(count)]


def test_noise_is_no_verdict():
    before, after = [row(noisy(1.0, 0.1, 1))], [row(noisy(1.02, 0.1, 2))]
    [verdict] = compare.compare(before, after, margin=0.03)
    assert verdict.verdict == "same" and verdict.low < 1 < verdict.high


def test_a_real_change_is_one():
    before = [row(noisy(1.0, 0.02, seed)) for seed in range(3)]
    [slower] = compare.compare(before, [row(noisy(1.1, 0.02, seed)) for seed in range(3, 6)], margin=0.03)
    assert slower.verdict == "SLOWER" and slower.low > 1.05
    [faster] = compare.compare(before, [row(noisy(0.9, 0.02, seed)) for seed in range(3, 6)], margin=0.03)
    assert faster.verdict == "faster"


def test_below_the_margin_is_the_same_however_certain():
    before, after = [row(noisy(1.0, 1e-4, 1))], [row(noisy(1.01, 1e-4, 2))]
    assert compare.compare(before, after, margin=0.03)[0].verdict == "same"
    assert compare.compare(before, after, margin=0.001)[0].verdict == "SLOWER"


def test_runs_that_disagree_widen_the_interval():
    """Three runs at 1.0, 1.2 and 0.8 against one mean of 1.05: samples alone would be certain, runs are not."""
    before = [row(noisy(mean, 0.001, i)) for i, mean in enumerate((1.0, 1.2, 0.8))]
    after = [row(noisy(mean, 0.001, 9 + i)) for i, mean in enumerate((1.05, 1.25, 0.85))]
    assert compare.compare(before, after, margin=0.03)[0].verdict == "same"


def test_only_equal_figures_meet():
    before = [row([1.0], dtype="float32"), row([1.0], dtype="bfloat16")]
    after = [row([2.0], dtype="float32"), row([1.0], dtype="float32", threads=4)]
    assert [v.ratio for v in compare.compare(before, after, 0.03)] == [2.0]


@pytest.fixture
def recorded(tmp_path):
    """Rows of the toy op before and after its backend was slowed down, measured by the benchmark itself."""
    for name, backend in (("before", toy_ops.fused), ("after", toy_ops.slow)):
        rows = harness.Rows("kernels", torch.device("cpu"), tmp_path / f"{name}.jsonl")
        rows.environment |= {"commit": {"before": "aaaa111111", "after": "bbbb222222"}[name]}
        kernels.run_work(toy_ops.work(toy_ops.toy(fused=backend)), [], rows, 0.05)
    return tmp_path


def test_a_slowed_kernel_is_caught(recorded):
    files = [str(recorded / "before.jsonl"), str(recorded / "after.jsonl")]
    assert compare.main([*files, "--only", "fused"]) == 1
    assert compare.main([*reversed(files), "--only", "fused"]) == 0  # the other way round it is an improvement
    assert compare.main([files[0], files[0]]) == 0


def test_commits_name_rows(recorded):
    before, after = (compare.load(name, recorded) for name in ("aaaa", "bbbb222222cc"))
    assert {r["commit"] for r in before} == {"aaaa111111"} and {r["commit"] for r in after} == {"bbbb222222"}
    with pytest.raises(UsageError, match="neither a file"):
        compare.load("cccc", recorded)
