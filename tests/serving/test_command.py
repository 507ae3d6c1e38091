"""The command itself: a process of its own, its signals, its refusals."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.serving import command
from nanochat.serving.command import ServeConfig, listen, require_extra
from tests.serving.conftest import wait_until

HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "ignore_eos": True}


class Served:
    """`nanochat serve` in a process, and what it wrote so far."""

    def __init__(self, home, *flags):
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": "1"}
        arguments = ["--port", "0", "--device", "cpu", "--kernels", "torch", "--max-batch", "8", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat", "serve", *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def url(self):
        wait_until(lambda: self.process.poll() is not None or "engine 0 is ready" in "".join(self.log), 60)
        found = re.search(r"at (http://\S+)", "".join(self.log))
        assert found, "".join(self.log)
        return found[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def children(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def gone(pid):
    import psutil

    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_sigterm_finishes_what_is_in_work_and_ends_cleanly(model_home):
    with Served(model_home) as served:
        url = served.url()
        workers = children(served.process.pid)
        with httpx.Client(base_url=url, timeout=60) as client:
            with client.stream("POST", "/v1/chat/completions", json=HI | {"stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                for pid in (served.process.pid, *workers):
                    os.kill(pid, signal.SIGTERM)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert served.process.wait(20) == 0
        wait_until(lambda: all(map(gone, workers)))
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
        assert not [line for line in served.log if "Traceback" in line or "ERROR" in line]


@pytest.mark.long
def test_workers_do_not_outlive_a_front_that_was_killed(model_home):
    with Served(model_home, "--workers", "2") as served:
        served.url()
        workers = children(served.process.pid)
        served.process.kill()
        wait_until(lambda: all(map(gone, workers)))


@pytest.mark.long
def test_draining_has_an_end(model_home):
    with Served(model_home, "--drain-timeout", "0.2") as served:
        url = served.url()
        begin = time.monotonic()
        with httpx.stream("POST", url + "/v1/chat/completions", json=HI | {"stream": True, "n": 8, "max_tokens": 480},
                          timeout=60) as response:  # fmt: skip
            lines = response.iter_lines()
            next(lines)
            served.process.terminate()
            try:
                for _ in lines:
                    pass
            except httpx.RemoteProtocolError:
                pass
        assert served.process.wait(20) == 0 and time.monotonic() - begin < 15


def test_wrong_calls_are_refused(model_home, tmp_path, monkeypatch):
    for fields, complaint in (
        ({"port": 99999}, "--port is 99999"),
        ({"max_step_tokens": 3}, "at least --max-batch, 64"),
        ({"request_timeout": 0.0}, "--request-timeout is 0.0"),
        ({"api_key": " "}, "--api-key"),
    ):
        with pytest.raises(UsageError, match=re.escape(complaint)):
            ServeConfig(**fields)
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UsageError, match="in use.*--port"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="cannot listen on"):
        listen("192.0.2.1", 0)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(NanochatError, match="no checkpoint"):
        command.run(ServeConfig(port=0))


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "EXTRA", ("json", "no_such_package"))
    with pytest.raises(NanochatError, match=r"needs no_such_package.*pip install.*\[serve\]"):
        require_extra()


def test_an_engine_that_cannot_start_ends_the_command(model_home):
    with Served(model_home, "--context", "100000000", "--cache-gib", "0.000001") as served:
        assert served.process.wait(60) == 1
        assert "error: no engine could be started: " in "".join(served.log)
