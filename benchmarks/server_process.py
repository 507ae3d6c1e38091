"""`nanochat serve` in a process of its own, with a random model, and a plain client for it: what the load tests share.

The client speaks HTTP/1.1 over bare asyncio streams: 64 of them must not cost more than the server that they measure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from benchmarks.serve import any_tokenizer
from nanochat.errors import NanochatError
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT


def save_random_model(home: Path, depth: int, vocab_size: int = 32768, seq_len: int = 2048, seed: int = 0) -> None:
    """A base folder whose newest chat model knows nothing: speed does not depend on what a model says."""
    tokenizer = any_tokenizer(vocab_size)
    model = GPT(GPTConfig.from_depth(depth, vocab_size, seq_len))
    model.init_weights(torch.Generator().manual_seed(seed))
    tokenizer.save(home / "tokenizer")
    meta = {"step": 1, "config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "stage": "sft"}
    checkpoint.save(home / "sft_checkpoints" / "random", 1, model.state_dict(), None, meta)


@dataclass
class Server:
    """A running server. `log` grows as it writes."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def workers(self) -> list[psutil.Process]:
        """The engines' processes, by age; multiprocessing's own helper is none."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def resident(self) -> int:
        """Bytes of the front and its engines."""
        mine = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in (mine, *self.workers()))


@contextlib.contextmanager
def serving(depth: int, flags: Sequence[str] = (), workers: int = 1) -> Iterator[Server]:
    """Starts one with a random model and waits until all engines are ready; kills it at the end if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), depth)
        process = subprocess.Popen(
            [sys.executable, "-m", "nanochat", "serve", "--port", "0", "--workers", str(workers), *flags],
            env=os.environ | {"NANOCHAT_BASE_DIR": folder}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        server = Server(process)
        assert process.stderr is not None
        threading.Thread(target=lambda: server.log.extend(process.stderr or ()), daemon=True).start()
        try:
            end = time.monotonic() + 120
            while "".join(server.log).count("is ready") < workers:
                if process.poll() is not None or time.monotonic() > end:
                    raise NanochatError("the server did not start:\n" + "".join(server.log[-20:]))
                time.sleep(0.1)
            found = re.search(r"at (http://\S+)", "".join(server.log))
            if found is None:
                raise NanochatError("the server does not say where it is")
            server.url = found[1]
            yield server
        finally:
            process.kill()
            process.wait()


@dataclass
class Reply:
    """What came back. `times` are when each event with text arrived; `complete` says that the stream ended properly."""

    status: int = 0
    begin: float = 0.0
    times: list[float] = field(default_factory=list)
    complete: bool = False
    finish: str | None = None
    tokens: int = 0
    error: str | None = None


async def ask(
    address: tuple[str, int], body: bytes, path: str = "/v1/chat/completions", leave_after: float | None = None
) -> Reply:
    """Posts a body and reads the answer, streamed or not. With `leave_after`, hangs up after so many seconds."""
    reply = Reply(begin=time.perf_counter())
    reader, writer = await asyncio.open_connection(*address)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(leave_after):
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
                await writer.drain()
                await _read(reader, reply)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        reply.error = repr(error)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return reply


async def _read(reader: asyncio.StreamReader, reply: Reply) -> None:
    reply.status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    async for line in reader:  # the sizes of chunks stand on lines of their own and do not begin with `data:`
        if line.startswith(b"data: [DONE]"):
            reply.complete = True
        elif line.startswith(b"data: "):
            _note(json.loads(line[6:]), reply)
        elif line.startswith(b'{"'):
            whole = json.loads(line)
            reply.error = (whole.get("error") or {}).get("code")
            reply.complete = "choices" in whole


def _note(event: dict[str, Any], reply: Reply) -> None:
    if "error" in event:
        reply.error = event["error"]["code"]
        return
    if event.get("usage"):
        reply.tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        reply.finish = choice["finish_reason"] or reply.finish
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("part"):
            reply.times.append(time.perf_counter())


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels, in what /metrics says."""
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")
