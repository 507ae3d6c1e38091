"""Pretraining as a user meets it: a run, its files, interruptions of every kind, ranks, and what is refused."""

import os
import random
import shutil
import signal
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from nanochat.errors import NanochatError, UsageError
from nanochat.model import checkpoint
from nanochat.tokenizer import Tokenizer
from nanochat.training import metrics, pretrain, stage
from nanochat.training.pretrain import PretrainConfig
from nanochat.training.progress import Display

TINY = PretrainConfig(
    depth=2,
    head_dim=32,
    data="builtin",
    seq_len=32,
    batch_tokens=16 * 32,
    rows=4,
    steps=20,
    eval_every=10,
    eval_tokens=512,
    sample_every=0,
    save_every=5,
    keep_last=9,
    device="cpu",
    dtype="float32",
    kernels="torch",
)


def folder_of(base, tag="d2"):
    return base / "base_checkpoints" / tag


def losses(folder):
    lines = [line for line in metrics.read(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(len(lines))), "steps are missing or out of order"
    return [line["loss"] for line in lines]


def bpbs(folder):
    return {line["step"]: line["val_bpb"] for line in metrics.read(folder / "metrics.jsonl") if "val_bpb" in line}


def test_a_run_from_start_to_end(base, capsys):
    config = replace(TINY, steps=60, rows=None, eval_every=30, sample_every=60, kernels="auto")
    assert pretrain.run(config) == 0
    folder = folder_of(base)
    values = losses(folder)
    assert len(values) == 60 and values[0] == pytest.approx(torch.tensor(400.0).log().item(), abs=0.02)
    assert sum(values[-5:]) / 5 < values[0] - 0.5
    assert bpbs(folder).keys() == {30, 60} and bpbs(folder)[60] < bpbs(folder)[30]
    assert checkpoint.steps(folder) == [20, 25, 30, 35, 40, 45, 50, 55, 60]
    meta = checkpoint.load_meta(folder)
    assert meta["stage"] == "base" and meta["val_bpb"] == bpbs(folder)[60] and meta["finished"]
    assert meta["tokenizer"] == Tokenizer.load(base / "tokenizer").fingerprint
    model, _ = checkpoint.load_model(folder)
    assert model.config.layers == 2 and model.config.vocab_size == 400
    out = capsys.readouterr().out
    assert "tok/s" in out and "ETA" in out and "data wait" in out and "'Once upon a time" in out
    assert "MFU" not in out  # unknown for a CPU
    # the same command again has nothing to do
    assert pretrain.run(config) == 0
    assert "finished" in capsys.readouterr().out and len(losses(folder)) == 60


@pytest.fixture(scope="session")
def uninterrupted(prepared_base):
    """The folder of a run of TINY that nothing disturbed, on one thread; not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(prepared_base))
        pretrain.run(replace(TINY, tag="uninterrupted"))
    torch.set_num_threads(threads)
    return folder_of(prepared_base, "uninterrupted")


def copy_until(source, target, step):
    """The same run as it was when only `step` updates had been saved."""
    shutil.copytree(source, target)
    for later in [s for s in checkpoint.steps(target) if s > step]:
        shutil.rmtree(checkpoint.step_folder(target, later))
    return target


def assert_close(found, expected):
    assert max(abs(x - y) for x, y in zip(losses(found), losses(expected), strict=True)) < 1e-5
    assert bpbs(found) == pytest.approx(bpbs(expected), abs=1e-5)


def test_micro_batches_do_not_change_the_losses(base, uninterrupted, one_thread):
    pretrain.run(replace(TINY, rows=16))
    assert_close(folder_of(base), uninterrupted)


RUN = """
import sys
from dataclasses import replace
from nanochat import runtime
from nanochat.training.pretrain import PretrainConfig, Pretraining
settings = {settings!r}
r = runtime.start("cpu", "float32")
for tag in sys.argv[1:]:
    config = PretrainConfig(**(settings | dict(tag=tag)))
    assert Pretraining(config, r).run() == 0
runtime.stop(r)
"""


def script(config):
    return RUN.format(settings=dict(vars(config)))


def test_killed_at_random_moments_the_losses_repeat_bit_for_bit(base, uninterrupted, spawn_ranks, one_thread):
    config = replace(TINY, save_every=3)
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    folder = folder_of(base, "killed")
    for kill_after in (rng.randrange(1, 9), rng.randrange(9, 18)):
        (process,) = spawn_ranks(script(config), ["killed"])
        deadline = time.monotonic() + 100
        while len(metrics.read(folder / "metrics.jsonl")) < kill_after and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    pretrain.run(replace(config, tag="killed"))
    assert losses(folder) == losses(uninterrupted), f"seed {seed}"
    assert bpbs(folder) == bpbs(uninterrupted)
    ours, theirs = checkpoint.load_state(folder), checkpoint.load_state(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_losses_of_one_process(base, uninterrupted, run_ranks, one_thread, world_size):
    """From the first step, from where one process had stopped, and back to one process."""
    ranks, half = folder_of(base, "ranks"), folder_of(base, "half")
    copy_until(uninterrupted, half, 15)
    run_ranks(script(TINY), ["ranks", "half"], world_size)
    assert_close(ranks, uninterrupted)
    assert_close(half, uninterrupted)
    assert losses(half)[:15] == losses(uninterrupted)[:15] and losses(half) != losses(uninterrupted)
    copy_until(ranks, folder_of(base, "back"), 10)
    pretrain.run(replace(TINY, tag="back"))
    assert_close(folder_of(base, "back"), uninterrupted)


def test_a_signal_ends_the_step_and_saves(base, uninterrupted, one_thread, monkeypatch):
    update = Display.update

    def interrupt(self, step, *rest):
        update(self, step, *rest)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "update", interrupt)
        assert pretrain.run(TINY) == stage.INTERRUPTED
    folder = folder_of(base)
    assert checkpoint.latest(folder) == len(losses(folder)) == 8  # the step under way when asked is the last
    assert pretrain.run(TINY) == 0
    assert losses(folder) == losses(uninterrupted)


def test_resume_never_moves_the_earlier_run_aside(base):
    config = replace(TINY, steps=4, eval_every=0)
    pretrain.run(config)
    pretrain.run(replace(config, seed=7, resume="never"))
    assert sorted(p.name for p in (base / "base_checkpoints").glob("d2*")) == ["d2", "d2.1"]
    assert losses(folder_of(base)) != losses(folder_of(base, "d2.1"))


def test_resume_from_a_chosen_step_and_past_a_damaged_one(base, uninterrupted, one_thread, capsys):
    before = losses(uninterrupted)
    shutil.copytree(uninterrupted, folder_of(base))
    pretrain.run(replace(TINY, resume="10"))
    assert losses(folder_of(base)) == before and "later checkpoints (15, 20) are now in d2.1" in capsys.readouterr().out
    assert checkpoint.steps(folder_of(base, "d2.1")) == [15, 20]
    os.truncate(checkpoint.step_folder(folder_of(base), 20) / "model.safetensors", 100)
    capsys.readouterr()
    pretrain.run(TINY)
    out = capsys.readouterr().out
    assert "ignoring" in out and "step_000020" in out and "going on from step 15" in out
    assert losses(folder_of(base)) == before
    with pytest.raises(NanochatError, match="no checkpoint of step 7.*it has 5, 10, 15, 20"):
        pretrain.run(replace(TINY, resume="7"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(base, dtype):
    config = replace(TINY, dtype=dtype, kernels="auto", steps=8, eval_every=0)
    pretrain.run(config)
    folder = folder_of(base)
    pretrain.run(replace(config, resume="5"))
    assert len(losses(folder)) == 8 and losses(folder)[-1] < losses(folder)[0]
    state = checkpoint.load_state(folder)
    assert state["wte.weight"].dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert state["lm_head.weight"].dtype == torch.float32


def test_full_disk_keeps_the_last_checkpoint(base, monkeypatch):
    usage, real = namedtuple("usage", "total used free"), shutil.disk_usage
    full = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1) if full else real(path))
    save = checkpoint.save

    def save_and_fill(*arguments):
        save(*arguments)
        full.append(True)

    monkeypatch.setattr(checkpoint, "save", save_and_fill)
    with pytest.raises(NanochatError, match="no room for .*step_000010.*step 5 is untouched"):
        pretrain.run(TINY)
    assert checkpoint.steps(folder_of(base)) == [5]


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(base, monkeypatch):
    from nanochat.model.gpt import GPT

    def poisoned(self, *rest):
        draw(self, *rest)
        with torch.no_grad():
            self.blocks[1].mlp.fc.weight.fill_(1e30)  # finite, but its square is not

    draw = GPT.init_weights
    monkeypatch.setattr(GPT, "init_weights", poisoned)
    with pytest.raises(NanochatError, match="loss of step 0 is nan.*blocks.1"):
        pretrain.run(TINY)
    assert checkpoint.latest(folder_of(base)) is None and losses(folder_of(base)) == []


def test_another_tokenizer_is_refused(base):
    pretrain.run(replace(TINY, steps=5, eval_every=0))
    tokenizer = Tokenizer.load(base / "tokenizer")
    (base / "tokenizer").unlink()
    tokenizer.with_vocab_size(390).save(base / "tokenizer")
    with pytest.raises(NanochatError, match="trained with the tokenizer .*--tag"):
        pretrain.run(replace(TINY, steps=5, eval_every=0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"steps": 30}, "steps was 5 and is 30"),
        ({"window_pattern": "L"}, "window_pattern was 'SSSL' and is 'L'.*--resume never"),
    ],
)
def test_another_configuration_is_refused(base, change, words):
    pretrain.run(replace(TINY, steps=5, eval_every=0))
    with pytest.raises(UsageError, match=words):
        pretrain.run(replace(TINY, **({"steps": 5, "eval_every": 0} | change)))
    pretrain.run(replace(TINY, steps=5, eval_every=0, rows=8, kernels="torch"))  # these may change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_tokens": 500}, "--batch-tokens 500.*480 or 512"),
        ({"batch_tokens": 16}, "--batch-tokens 16.*use 32"),
        ({"rows": 5}, "--rows 5.*1, 2, 4, 8, 16"),
        ({"resume": "sometimes"}, "--resume 'sometimes'"),
        ({"keep_last": 0}, "--keep-last 0"),
        ({"tag": "../up"}, "--tag '../up'"),
        ({"eval_tokens": 3}, "--eval-tokens 3"),
        ({"device": "cuda"}, "device 'cuda'"),
    ],
)
def test_wrong_calls(base, change, words):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=words):
        pretrain.run(replace(TINY, **change))
    assert not folder_of(base).exists()


def test_no_tokenizer_and_no_data(base):
    (base / "data").unlink()
    with pytest.raises(NanochatError, match="nanochat data"):
        pretrain.run(TINY)
    (base / "tokenizer").unlink()
    with pytest.raises(NanochatError, match="nanochat tok-train"):
        pretrain.run(TINY)


def test_a_missing_tracker_says_what_to_install(base):
    pytest.importorskip("nanochat.training.metrics")
    try:
        import wandb  # noqa: F401

        pytest.skip("wandb is installed")
    except ImportError:
        pass
    with pytest.raises(NanochatError, match=r"pip install 'nanochat\[wandb\]'"):
        pretrain.run(replace(TINY, track=("wandb",)))


def test_the_command_line(base, capfd):
    from nanochat.cli import main

    words = "train --depth 2 --head-dim 32 --data builtin --seq-len 32 --batch-tokens 256 --steps 2 --eval-every 0"
    assert main([*words.split(), "--sample-every", "0", "--device", "cpu"]) == 0
    assert main([*words.split(), "--rows", "3"]) == 2
    assert "--rows 3 does not divide" in capfd.readouterr().err
    assert main([*words.split(), "--kernels", "attention=nonsense", "--tag", "x"]) == 2
    assert Path(folder_of(base) / "metrics.jsonl").exists()


def test_two_processes_cannot_train_the_same_run(base):
    held = FileLock(base / "base_checkpoints" / ".d2.lock")
    (base / "base_checkpoints").mkdir(exist_ok=True)
    with held, pytest.raises(NanochatError, match="another process is training"):
        pretrain.run(TINY)
    assert checkpoint.latest(folder_of(base)) is None
