"""Checkpoints: exact round trips, atomic saves, and a clear word about every way in which one can be broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from nanochat.errors import NanochatError, UsageError
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

TINY = GPTConfig.from_depth(2, vocab_size=70, seq_len=16, head_dim=64)


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    stack = torch.randn(3, 4, 5, generator=g)
    return {
        "a": stack[1],  # a view into a larger storage, as the optimizer makes them
        "b": torch.randn(7, 3, generator=g).bfloat16(),
        "t": torch.randn(4, 6, generator=g).t(),  # not contiguous
        "step": torch.tensor(12),
        "none": torch.empty(0, 3),
    }


def save(folder, step, keep_last=None, seed=0, **meta):
    return checkpoint.save(folder, step, tensors(seed), tensors(seed + 1), meta, keep_last)


def test_round_trip_is_exact_and_readable_by_the_library(tmp_path):
    path = save(tmp_path, 5, val_bpb=1.5)
    for read in (checkpoint.load_state(tmp_path), load_file(path / "model.safetensors")):
        assert read.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert torch.equal(checkpoint.load_optimizer(tmp_path, 5)["t"], tensors(1)["t"])
    assert checkpoint.load_meta(tmp_path) == {"step": 5, "val_bpb": 1.5}


def test_model_comes_back_with_equal_logits_in_any_dtype(tmp_path):
    model = GPT(TINY)
    model.init_weights(torch.Generator().manual_seed(1))
    checkpoint.save(tmp_path, 1, model.state_dict(), None, {"config": TINY.to_dict()})
    idx = torch.randint(0, 70, (2, 9))
    again, meta = checkpoint.load_model(tmp_path)
    assert meta["step"] == 1 and again.config == TINY and torch.equal(again(idx), model(idx))
    half, _ = checkpoint.load_model(tmp_path, dtype=torch.bfloat16)
    assert half.wte.weight.dtype == torch.bfloat16 and half.lm_head.weight.dtype == torch.float32
    with pytest.raises(NanochatError, match="without optimizer.safetensors"):
        checkpoint.load_optimizer(tmp_path)


def test_newest_complete_and_keep_last(tmp_path):
    for step in (10, 20, 30, 100):
        save(tmp_path, step, keep_last=3)
    assert checkpoint.steps(tmp_path) == [20, 30, 100]
    (checkpoint.step_folder(tmp_path, 100) / "model.safetensors").write_bytes(b"short")
    assert checkpoint.latest(tmp_path) == 30
    (checkpoint.step_folder(tmp_path, 30) / "checkpoint.json").unlink()
    assert checkpoint.latest(tmp_path) == 20
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_same_step_twice_keeps_the_later(tmp_path):
    save(tmp_path, 3, seed=0)
    save(tmp_path, 3, seed=9)
    assert torch.equal(checkpoint.load_state(tmp_path, 3)["a"], tensors(9)["a"])


def test_annotate(tmp_path):
    save(tmp_path, 3, val_bpb=None)
    checkpoint.annotate(tmp_path, 3, val_bpb=0.9)
    assert checkpoint.load_meta(tmp_path)["val_bpb"] == 0.9 and checkpoint.steps(tmp_path) == [3]


def damage_truncate(path):
    os.truncate(path / "model.safetensors", 40)


def damage_flip(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)


def damage_manifest(path):
    (path / "checkpoint.json").write_text('{"meta": {')


def damage_missing(path):
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "40 bytes"),
        (damage_flip, "checksum of model.safetensors"),
        (damage_manifest, "checkpoint.json cannot be read"),
        (damage_missing, "model.safetensors is missing"),
    ],
)
def test_damage_is_named_with_a_remedy(tmp_path, damage, words):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with pytest.raises(NanochatError, match=words) as error:
        checkpoint.load_state(tmp_path, 2)
    assert "use another step (1)" in str(error.value)


def test_all_damaged_or_absent(tmp_path):
    damage_truncate(save(tmp_path, 2))
    with pytest.raises(NanochatError, match="no complete checkpoint.*step_000002"):
        checkpoint.load_state(tmp_path)
    with pytest.raises(NanochatError, match="no complete checkpoint"):
        checkpoint.load_meta(tmp_path / "empty")
    save(tmp_path, 3)
    with pytest.raises(NanochatError, match="no checkpoint of step 7.*it has 3"):
        checkpoint.load_state(tmp_path, 7)


def test_tensors_that_do_not_fit_the_configuration(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(), None, {"config": TINY.to_dict()})
    with pytest.raises(NanochatError, match="does not fit its own configuration"):
        checkpoint.load_model(tmp_path)


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(NanochatError, match="no room.*step 1 is untouched.*--keep-last"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_disk_that_fills_while_writing_leaves_nothing_behind(tmp_path):
    """A file-size limit of the kernel stands in for a full disk: the write fails half-way for real."""
    script = """
        import resource, signal, sys, torch
        from pathlib import Path
        from nanochat.errors import NanochatError
        from nanochat.model import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = Path(sys.argv[1])
        checkpoint.save(folder, 1, {"a": torch.ones(1000)}, None, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            checkpoint.save(folder, 2, {"a": torch.ones(1000), "b": torch.ones(1_000_000)}, None, {}, keep_last=1)
        except NanochatError as error:
            print(error)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "no room for" in out.stdout and "step 1 is untouched" in out.stdout, out.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert torch.equal(checkpoint.load_state(tmp_path)["a"], torch.ones(1000))


def test_killed_while_saving_keeps_the_earlier_checkpoint(tmp_path):
    script = """
        import os, signal, sys, torch
        from pathlib import Path
        from nanochat.model import checkpoint
        folder = Path(sys.argv[1])
        checkpoint.save(folder, 1, {"a": torch.ones(10)}, None, {})
        checkpoint._sync_folder = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # all written, not yet renamed
        checkpoint.save(folder, 2, {"a": torch.zeros(10)}, None, {}, keep_last=1)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], timeout=60)
    assert out.returncode == -signal.SIGKILL
    assert checkpoint.latest(tmp_path) == 1 and torch.equal(checkpoint.load_state(tmp_path)["a"], torch.ones(10))
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]  # the leftover is gone


def test_find(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(NanochatError, match="no base checkpoint in .*nanochat train"):
        checkpoint.find("base")
    for i, tag in enumerate(("d4", "d8")):
        path = save(tmp_path / "base_checkpoints" / tag, 1)
        os.utime(path / "checkpoint.json", (1000 - i, 1000 - i))
    assert checkpoint.find("base").name == "d4"  # written last, not the larger
    assert checkpoint.find("base", "d8").name == "d8"
    with pytest.raises(NanochatError, match="'d9'.*it has d4, d8"):
        checkpoint.find("base", "d9")
    with pytest.raises(UsageError, match="unknown stage"):
        checkpoint.find("nonsense")


def test_meta_must_be_plain_json(tmp_path):
    with pytest.raises(ValueError):
        save(tmp_path, 1, val_bpb=float("nan"))
    assert not list(tmp_path.iterdir())
    path = save(tmp_path, 1, loader={"shard": 1})
    assert json.loads((path / "checkpoint.json").read_text())["meta"]["loader"] == {"shard": 1}
