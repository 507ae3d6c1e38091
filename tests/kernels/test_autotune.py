"""Choices of launch configurations: measured once, remembered, the same on every rank."""

import json
import multiprocessing
import os
import time
from dataclasses import dataclass

import pytest
import torch

from nanochat_kernels import autotune

pytest.importorskip("triton")


@dataclass(frozen=True)
class Launch:
    BLOCK: int
    num_warps: int = 4


CANDIDATES = (Launch(64), Launch(128), Launch(256, 8))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_AUTOTUNE_CACHE", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_AUTOTUNE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    autotune._table.cache_clear()
    yield tmp_path
    autotune._table.cache_clear()


def choose(times, key="k", seen=None):
    """times: microseconds by BLOCK, or an exception."""

    def run(launch):
        if seen is not None:
            seen.append(launch.BLOCK)
        if isinstance(times[launch.BLOCK], Exception):
            raise times[launch.BLOCK]
        return times[launch.BLOCK]

    return autotune.choose("kernel", key, CANDIDATES, run, CPU, timer=lambda call: call())


def test_the_fastest_is_taken_and_remembered(cache):
    seen = []
    assert choose({64: 3, 128: 1, 256: 2}, seen=seen) == Launch(128)
    assert seen == [64, 128, 256]
    assert choose({64: 1, 128: 9, 256: 9}, seen=seen) == Launch(128) and len(seen) == 3
    autotune._table.cache_clear()  # another process
    assert choose({64: 1, 128: 9, 256: 9}, seen=seen) == Launch(128) and len(seen) == 3
    (file,) = cache.glob("*.json")
    assert list(json.loads(file.read_text()).values()) == [{"BLOCK": 128, "num_warps": 4}]


def test_another_key_and_other_candidates_are_measured_anew():
    assert choose({64: 3, 128: 1, 256: 2}) == Launch(128)
    assert choose({64: 3, 128: 4, 256: 2}, key="other") == Launch(256, 8)
    two = CANDIDATES[:2]
    assert autotune.choose("kernel", "k", two, lambda c: -c.BLOCK, CPU, timer=lambda call: call()) == two[1]


def test_shipped_wins_near_ties_and_broken_candidates_lose():
    assert choose({64: 1.0, 128: 0.99, 256: 1.2}) == Launch(64)
    assert choose({64: RuntimeError("shared memory"), 128: 5, 256: 4}, key="b") == Launch(256, 8)
    everything_fails = dict.fromkeys((64, 128, 256), RuntimeError("no"))
    assert choose(everything_fails, key="c") == Launch(64)


def test_switched_off_nothing_is_measured_or_read(monkeypatch):
    choose({64: 3, 128: 1, 256: 2})
    monkeypatch.setenv("NANOCHAT_AUTOTUNE", "0")
    seen = []
    assert choose({64: 3, 128: 1, 256: 2}, seen=seen) == Launch(64) and not seen


def test_a_cpu_takes_the_shipped_one():
    assert autotune.choose("kernel", "k", CANDIDATES, lambda c: 1 / 0, CPU) == Launch(64)


def test_one_of_several_ranks_never_measures(monkeypatch):
    choose({64: 3, 128: 1, 256: 2})
    monkeypatch.setenv("WORLD_SIZE", "8")
    seen = []
    assert choose({64: 1, 128: 2, 256: 3}, seen=seen) == Launch(128)
    assert choose({64: 3, 128: 1, 256: 2}, key="new", seen=seen) == Launch(64) and not seen


def test_a_broken_file_counts_as_none(cache):
    choose({64: 3, 128: 1, 256: 2})
    (file,) = cache.glob("*.json")
    file.write_text('{"half')
    autotune._table.cache_clear()
    assert choose({64: 1, 128: 2, 256: 3}) == Launch(64)


def _measure(folder, fastest, queue):
    os.environ["NANOCHAT_AUTOTUNE_CACHE"] = folder

    def run(launch):
        time.sleep(0.05)
        return 1 if launch.BLOCK == fastest else 2

    queue.put(autotune.choose("kernel", "race", CANDIDATES, run, CPU, timer=lambda call: call()).BLOCK)


def test_processes_that_race_get_one_answer(cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_measure, args=(str(cache), block, queue)) for block in (64, 128, 256)]
    for worker in workers:
        worker.start()
    answers = {queue.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(answers) == 1


def _agree(rank, folder, store, queue):
    os.environ["NANOCHAT_AUTOTUNE_CACHE"] = f"{folder}/{rank}"  # a node of its own, with a file of its own
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    fastest = 128 if rank == 0 else 256
    choose({64: 9, 128: 9, 256: 9} | {fastest: 1})
    autotune.agree(CPU)
    queue.put((rank, choose({64: 1, 128: 1, 256: 1}).BLOCK, choose({64: 9, 128: 1, 256: 2}, key="later").BLOCK))
    torch.distributed.destroy_process_group()


def test_ranks_agree_on_what_rank_0_knows(cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_agree, args=(r, str(cache), str(cache / "store"), queue)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    answers = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert answers == {(0, 128, 64), (1, 128, 64)}
