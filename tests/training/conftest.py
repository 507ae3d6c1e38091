"""Ranks for tests: a script started once per rank over gloo, each with one thread."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest


def start_ranks(arguments, world_size, env=None):
    """Starts `python ARGUMENTS` on `world_size` ranks and returns the processes. One rank alone needs no group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | (env or {})
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
def run_ranks():
    """run_ranks(script, arguments, world_size) runs Python source on all ranks; the output of rank 0 comes back."""
    started = []

    def run(script, arguments=(), world_size=1, env=None, timeout=120):
        processes = start_ranks(["-c", textwrap.dedent(script), *map(str, arguments)], world_size, env)
        started.extend(processes)
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output}"
        return outputs[0]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
