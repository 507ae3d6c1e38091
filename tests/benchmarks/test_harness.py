"""What must never become a row: a wrong result, a borrowed one, and one that another backend made."""

import json
import time

import pytest
import torch

from benchmarks import harness, kernels
from nanochat_kernels import OPS, KernelPlan, Op
from nanochat_kernels.registry import Case, Choice, Cost

CPU = torch.device("cpu")


def reference(x):
    return (x * 2 + 1).tanh().exp().sum(-1)


def fused(x):
    """The same by other operations."""
    return x.add(0.5).mul_(2).tanh_().exp_().sum(-1)


def wrong(x):
    y = fused(x)
    y.view(-1)[-1] *= 1.001  # one element
    return y


def fallback(x):
    try:
        raise RuntimeError("no such instruction here")
    except RuntimeError:
        return reference(x)


def slow(x):
    time.sleep(0.005)
    return fused(x)


def make(device, dtype, generator):
    return (torch.randn(64, 96, generator=generator).to(device, dtype),), {}


def toy(**backends) -> Op:
    return Op(
        "toy",
        torch=reference,
        cases=lambda: iter([Case("one", make, size="model")]),
        cost=lambda args, kwargs: Cost(2 * args[0].numel() * 4, 5 * args[0].numel()),
        **backends,
    )


def work(op: Op) -> kernels.Work:
    return kernels.Work(op, next(iter(op.cases())), torch.float32, "prefill", CPU)


@pytest.fixture
def rows(tmp_path):
    return harness.Rows("kernels", CPU, tmp_path)


def test_a_right_backend_gets_a_row(rows):
    assert kernels.run_work(work(toy(fused=fused)), [], rows, 0.01) == []
    assert [row["backend"] for row in rows.rows] == ["torch", "fused"]
    row = harness.read(rows.path)[1]
    assert row["p20"] <= row["median"] <= row["p80"] and row["bytes"] == 2 * 64 * 96 * 4
    assert {"commit", "device", "versions", "quiet", "clocks", "driver", "threads"} <= set(row)


def test_a_wrong_result_is_refused(rows):
    refused = kernels.run_work(work(toy(wrong=wrong)), [], rows, 0.01)
    assert len(refused) == 1 and "wrong is red" in refused[0]
    assert [row["backend"] for row in rows.rows] == ["torch"]


def test_a_wrong_result_of_a_large_case_is_refused(rows, monkeypatch):
    """Where float64 would take too long, the comparison in the case's own dtype must see it too."""
    monkeypatch.setattr(harness, "EXACT_FLOPS", 0)
    assert kernels.run_work(work(toy(fused=fused)), [], rows, 0.01) == []
    refused = kernels.run_work(work(toy(wrong=wrong)), [], rows, 0.01)
    assert len(refused) == 1 and "wrong is red" in refused[0]


def test_a_silent_fallback_is_refused(rows):
    refused = kernels.run_work(work(toy(fallback=fallback)), [], rows, 0.01)
    assert len(refused) == 1 and "fell back" in refused[0]
    assert [row["backend"] for row in rows.rows] == ["torch"]


def test_a_fallback_inside_a_custom_op_is_refused(rows):
    @torch.library.custom_op("nanochat_test::hidden", mutates_args=())
    def hidden(x: torch.Tensor) -> torch.Tensor:
        return reference(x)

    assert "fell back" in kernels.run_work(work(toy(hidden=hidden)), [], rows, 0.01)[0]


def test_no_declared_backend_looks_like_its_reference():
    """The rule above must not accuse an honest backend of this repository."""
    place = kernels.Place(CPU, torch.float32, "train-eager")
    for op in OPS.values():
        case = next(iter(op.cases()))
        for backend in list(op.backends)[1:]:
            probe = op.available.get(backend)
            if not (probe and probe(place)):
                assert not harness.runs_the_reference(op, backend, case, CPU, torch.float32), (op, backend)


def test_a_plan_that_took_another_backend_is_an_error():
    choices = {name: Choice("torch", True, "for the test") for name in OPS}
    with pytest.raises(harness.HarnessError, match="rms_norm: triton was asked for, torch would run"):
        harness.require(KernelPlan(choices), "rms_norm", "triton")
    harness.require(KernelPlan(choices), "rms_norm", "torch")


def test_a_half_written_line_costs_one_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    harness.append(path, {"median": 1.0})
    with open(path, "a") as file:
        file.write('{"median": 2.')  # killed here
    harness.append(path, {"median": 3.0})
    assert [row["median"] for row in harness.read(path)] == [1.0, 3.0]


def test_quantiles():
    timing = harness.Timing([5, 1, 2, 4, 3])
    assert (timing.median, timing.quantile(0.2), timing.quantile(0.8)) == (3, 1.8, 4.2)
    record = harness.Timing(range(1, 1001)).record()
    assert record["count"] == 1000 and len(record["samples"]) <= harness.SAMPLES_KEPT


def test_sides_take_turns():
    seen = []
    sides = {name: lambda name=name: seen.append(name) or {"n": len(seen)} for name in "AB"}
    runs = harness.interleave(sides, 2)
    assert seen == ["A", "B", "A", "B"] and runs == {"A": [{"n": 1}, {"n": 3}], "B": [{"n": 2}, {"n": 4}]}


def test_a_peer_that_fails_says_why(tmp_path):
    import sys

    script = tmp_path / "peer.py"
    script.write_text("import sys; sys.exit('the peer has no GPU')")
    with pytest.raises(harness.NanochatError, match="the peer has no GPU"):
        harness.run_json([sys.executable, str(script)])
    script.write_text("print('noise'); import os, json; print(json.dumps({'base': os.environ['NANOCHAT_BASE_DIR']}))")
    here = harness.run_json([sys.executable, str(script)], isolated=True)["base"]
    assert here != __import__("os").environ["NANOCHAT_BASE_DIR"]


def test_rows_of_kernels_are_what_auto_reads(tmp_path, monkeypatch):
    """A recorded row decides what `auto` takes: the fields that recorded.py wants are there."""
    from nanochat_kernels import recorded
    from nanochat_kernels.registry import Place

    rows = harness.Rows("kernels", CPU, tmp_path / recorded.device_class(CPU))
    op = OPS["softcapped_logits"]
    case = next(iter(op.cases()))
    kernels.run_work(kernels.Work(op, case, torch.float32, "decode", CPU), [], rows, 0.01)
    found = recorded.fastest(Place(CPU, torch.float32, "decode"), tmp_path)
    assert {backend for backend, _ in found["softcapped_logits"]} == {"torch", "inplace"}
    assert json.loads(rows.path.read_text().splitlines()[0])["op"] == "softcapped_logits"
