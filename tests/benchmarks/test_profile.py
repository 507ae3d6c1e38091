"""The profile on a CPU: a trace that Perfetto opens, and a table that knows every op of the plan."""

import json

import pytest

from nanochat import cli
from nanochat.measure import profile


def run(tmp_path, *arguments):
    small = "--depth 2 --vocab-size 256 --seq-len 32 --rows 2 --steps 2 --device cpu".split()
    return cli.main(["profile", *arguments, *small, "--out", str(tmp_path)])


def test_train(tmp_path, capsys):
    assert run(tmp_path, "train") == 0
    text = capsys.readouterr().out
    for name in ("rms_norm", "attention", "muon_update", "linear_softcap_cross_entropy", "ncu --set full", "gap ms"):
        assert name in text
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"forward", "backward", "optimizer", "op:attention"} <= names


def test_infer_and_kernel(tmp_path, capsys):
    assert run(tmp_path, "infer") == 0
    assert "cached_attention" in capsys.readouterr().out
    assert run(tmp_path, "kernel", "softcapped_logits=inplace") == 0
    assert "inplace" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [("kernel",), ("train", "rms_norm"), ("kernel", "nonsense")])
def test_wrong_calls(tmp_path, wrong):
    assert run(tmp_path, *wrong) == 2


def test_backward_belongs_to_its_op():
    """Time of the backward pass counts for the op whose forward pass recorded it."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    x = torch.randn(400, 400, requires_grad=True)
    with torch_profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        with profile.named(f"{profile.PREFIX}product"):
            y = x @ x
        with profile.named(f"{profile.PREFIX}sum"):
            z = y.sum()
        z.backward()
    found = profile.by_op(seen, 1, on_gpu=False)
    forward = next(e for e in seen.events() if e.name == "op:product").cpu_time_total / 1e6
    assert found["product"][0] > 1.3 * forward  # two products backward for one forward
