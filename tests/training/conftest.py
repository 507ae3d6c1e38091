"""Ranks for tests: a script started once per rank over gloo, each with one thread."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap

import pytest


def start_ranks(arguments, world_size):
    """Starts `python ARGUMENTS` on `world_size` ranks and returns the processes. One rank alone needs no group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


@pytest.fixture
def spawn_ranks():
    """spawn_ranks(script, arguments, world_size) starts Python source on all ranks; none outlives the test."""
    started = []

    def spawn(script, arguments=(), world_size=1):
        started.extend(start_ranks(["-c", textwrap.dedent(script), *map(str, arguments)], world_size))
        return started[-world_size:]

    yield spawn
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def run_ranks(spawn_ranks):
    """Like spawn_ranks, but waits for success and returns the output of rank 0."""

    def run(script, arguments=(), world_size=1, timeout=120):
        processes = spawn_ranks(script, arguments, world_size)
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output}"
        return outputs[0]

    return run


@pytest.fixture(scope="session")
def prepared_base(tmp_path_factory):
    """A base folder with a small corpus and a tokenizer, to copy from."""
    from nanochat.data.corpus import open_corpus
    from nanochat.data.sources import Request, parse_source
    from nanochat.tokenizer import Tokenizer

    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        parse_source("builtin").prepare(Request(shards=2, characters=400_000))
        Tokenizer.train(open_corpus("builtin").documents("train"), 400).save(base / "tokenizer")
    return base


@pytest.fixture
def base(prepared_base, tmp_path, monkeypatch):
    """NANOCHAT_BASE_DIR for one test: data and tokenizer are there, no checkpoint yet."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("data", "tokenizer"):
        (folder / name).symlink_to(prepared_base / name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture
def one_thread():
    """Bit-equal comparisons with ranks and other processes, which have one thread each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    """Tests begin outside torchrun, wherever pytest itself was started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def prepared_chat(prepared_base):
    """The same with a base model of a few steps, and a model fine-tuned from it for a few more."""
    import torch

    from nanochat.training import pretrain, sft

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    machine = {"device": "cpu", "dtype": "float32", "kernels": "torch"}
    machine |= {"save_every": 0, "eval_every": 0, "sample_every": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(prepared_base))
        size = {"depth": 1, "head_dim": 32, "seq_len": 128, "batch_tokens": 512, "steps": 8}
        pretrain.run(pretrain.PretrainConfig(data="builtin", tag="tiny", **size, **machine))
        sft.run(sft.SftConfig(data="builtin", from_tag="tiny", steps=8, **machine))
    torch.set_num_threads(threads)
    return prepared_base


@pytest.fixture
def chat_base(prepared_chat, base):
    """NANOCHAT_BASE_DIR for one test: the base model `tiny` and the fine-tuned `tiny` are there to start from."""
    for stage in ("base", "sft"):
        (base / f"{stage}_checkpoints").mkdir()
        shutil.copytree(prepared_chat / f"{stage}_checkpoints" / "tiny", base / f"{stage}_checkpoints" / "tiny")
    return base
