"""`nanochat train --fp8`: the loss curve, a kill, ranks, and what is refused."""

import signal
import time
from dataclasses import replace

import pytest
import torch

from nanochat.errors import UsageError
from nanochat.model import checkpoint
from nanochat.model.fp8 import STATE
from nanochat.training import metrics, pretrain
from tests.training.test_pretrain import TINY, folder_of, losses, script

FP8 = replace(TINY, fp8=True, tag="fp8", eval_every=0)


@pytest.fixture(scope="module")
def whole(prepared_base):
    """The folder of an FP8 run that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(prepared_base))
        assert pretrain.run(replace(FP8, tag="whole-fp8")) == 0
    torch.set_num_threads(threads)
    return folder_of(prepared_base, "whole-fp8")


def history(folder):
    return checkpoint.load_optimizer(folder)[STATE]


def test_the_curve_is_that_of_full_precision(base, one_thread):
    config = replace(FP8, batch_tokens=8 * 32, rows=8, steps=60, save_every=0)
    for tag, fp8 in (("fp8", True), ("full", False)):
        pretrain.run(replace(config, tag=tag, fp8=fp8))
    full, fp8 = (losses(folder_of(base, tag)) for tag in ("full", "fp8"))
    assert fp8 != full  # it was FP8
    assert sum(full[-5:]) / 5 < full[0] - 0.4  # and something was learned
    assert max(abs(a - b) for a, b in zip(fp8, full, strict=True)) < 0.02 * full[0]
    assert (history(folder_of(base, "fp8")) > 0).all()


def test_killed_and_resumed_the_history_is_the_same(base, whole, spawn_ranks, one_thread):
    config = replace(FP8, save_every=3)
    folder = folder_of(base, "fp8")
    (process,) = spawn_ranks(script(config), ["fp8"])
    deadline = time.monotonic() + 100
    while len(metrics.read(folder / "metrics.jsonl")) < 8 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 3 <= checkpoint.latest(folder) < 20
    assert pretrain.run(config) == 0
    assert losses(folder) == losses(whole) and torch.equal(history(folder), history(whole))
    ours, theirs = checkpoint.load_state(folder), checkpoint.load_state(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_agree_on_the_largest_amax(base, whole, run_ranks, one_thread):
    run_ranks(script(replace(FP8, steps=3, rows=4)), ["two"], world_size=2)
    pretrain.run(replace(FP8, steps=3, tag="one"))
    two, one = (history(folder_of(base, tag)) for tag in ("two", "one"))
    # the first step's amaxes come before any rounding could differ
    torch.testing.assert_close(two[2], one[2], rtol=1e-4, atol=0)
    for a, b in zip(losses(folder_of(base, "two")), losses(folder_of(base, "one")), strict=True):
        assert abs(a - b) < 0.02


def test_a_run_stays_what_it_began_as(base, whole):
    pretrain.run(replace(FP8, steps=2))
    with pytest.raises(UsageError, match=r"dtype was 'float32\+fp8' and is 'float32'"):
        pretrain.run(replace(FP8, steps=2, fp8=False))


def test_it_says_that_it_emulates_and_refuses_what_it_cannot(base, capsys):
    pretrain.run(replace(FP8, steps=1, tag="said"))
    assert "fp8: emulated" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--depth"):
        pretrain.run(replace(FP8, depth=1, tag="small"))
