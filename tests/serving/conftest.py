"""A live server over the fake engine: uvicorn in a thread, real sockets, real worker processes."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from nanochat.serving.app import AppConfig, create_app
from nanochat.serving.guard import GuardConfig
from nanochat.serving.metrics import Metrics
from nanochat.serving.router import Limits, Router, numbered
from nanochat.serving.worker import EngineSpec
from tests.inference.conftest import random_model
from tests.serving.fake_engine import FakeBuild, byte_tokenizer


@dataclass
class Live:
    """A running server: where it is and what is inside."""

    url: str
    router: Router
    client: httpx.Client

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and line[len(name)] in " {"
        )


@contextlib.contextmanager
def live_server(build: Any = None, workers: int = 1, limits: Limits | None = None, **settings: Any) -> Iterator[Live]:
    """Serves on a free port until the block ends; the workers are ready when it begins, unless they cannot be."""
    metrics = Metrics()
    router = Router(numbered(build or FakeBuild(), workers), limits or Limits(max_batch=4), metrics)
    app = create_app(router, byte_tokenizer(), metrics, AppConfig(**settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1))
    bound = socket.create_server(("127.0.0.1", 0))

    async def serve() -> None:
        await server.serve(sockets=[bound])
        await router.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    guard = settings.get("guard", GuardConfig())
    headers = {} if guard.api_key is None else {"authorization": f"Bearer {guard.api_key}"}
    try:
        with httpx.Client(base_url=url, timeout=30, headers=headers) as client:
            yield Live(url, router, client)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Waits for something to become true, or fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def all_ready(live: Live) -> None:
    wait_until(lambda: all(engine.info for engine in live.router.engines))


@pytest.fixture(scope="package")
def strict() -> Iterator[Live]:
    """One with a key, a short time-out, little room and a talkative log."""
    settings = {"guard": GuardConfig(api_key="s3cret"), "cors_origins": ("http://a.example",)}
    limits = Limits(max_batch=1, max_queue=2, max_queued_tokens=500)
    with live_server(limits=limits, request_timeout=2.0, log_prompts=True, **settings) as server:
        all_ready(server)
        yield server


@pytest.fixture(scope="package")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a tiny random chat model and a tokenizer of bytes."""
    from nanochat.model import checkpoint

    home = tmp_path_factory.mktemp("served")
    tokenizer, model = byte_tokenizer(), random_model()
    tokenizer.save(home / "tokenizer")
    meta = {"step": 3, "config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "stage": "sft"}
    checkpoint.save(home / "sft_checkpoints" / "tiny", 3, model.state_dict(), None, meta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))
        yield home


@pytest.fixture(scope="package")
def model_server(model_home: Path) -> Iterator[Live]:
    """The real engine with that model."""
    spec = EngineSpec(stage="sft", tag="tiny", device="cpu", kernels="torch", max_batch=8, threads=1)
    with live_server(spec, limits=Limits(max_batch=8)) as server:
        all_ready(server)
        yield server


@pytest.fixture(scope="package")
def live() -> Iterator[Live]:
    """One fast server for all tests that do it no harm."""
    with live_server(workers=2) as server:
        all_ready(server)
        yield server
