"""`nanochat serve`: a model behind an OpenAI-compatible API and a web page.

The command loads the tokenizer, binds the port (so that a wrong call fails at once), starts one engine process per
worker and then the front. SIGTERM and Ctrl-C drain: no new connection, what is in work is finished for --drain-timeout
seconds at most. A second signal ends at once.
"""

import asyncio
import importlib.util
import logging
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat.errors import NanochatError, UsageError
from nanochat.inference.loading import StageName, find_stage
from nanochat.inference.runner import WeightsName
from nanochat.runtime import DeviceName, DtypeName
from nanochat.tokenizer import Tokenizer, default_tokenizer_dir

if TYPE_CHECKING:
    from nanochat.serving.router import Router

EXTRA = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

log = logging.getLogger("nanochat.serving")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model: OpenAI's API under /v1, a web page at /."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is everybody who can reach this machine: then set an API key."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    """Asked of everybody, on everything but /health, /ready and the page; also from NANOCHAT_API_KEY."""
    name: str = "nanochat"
    """What clients call the model."""
    stage: StageName = "auto"
    """auto takes the furthest stage that has a checkpoint: rl, sft, base (which only continues text)."""
    tag: str | None = None
    """Model tag; by default the one written last."""
    step: int | None = None
    """Checkpoint step; by default the newest."""
    workers: int = 0
    """Engine processes; 0 = one per GPU, or one on a CPU."""
    device: DeviceName = "auto"
    """auto takes the first there is of cuda, mps, cpu."""
    dtype: DtypeName = "auto"
    """Compute dtype; auto takes bfloat16 where the GPU has it."""
    kernels: str = "auto"
    """auto, torch, fused, or op=backend,..."""
    weights: WeightsName = "auto"
    """Precision of the weights in memory; auto takes the compute dtype."""
    context: int | None = None
    """Tokens of prompt and answer at most; by default the model's sequence length."""
    max_batch: int = 64
    """Answers that a worker makes at once."""
    max_step_tokens: int = 512
    """Tokens that go through the model in one step: a long prompt is split over several, between which others move."""
    cache_gib: float | None = None
    """Memory of a worker's key/value cache; by default a share of what is free."""
    prefix_cache: bool = True
    """Keep the keys and values of prompts for requests that begin alike."""
    speculate: int = 0
    """Draft tokens looked up in the prompt per step; greedy answers stay the same. 0 = off."""
    max_queue: int = 256
    """Answers that may wait; beyond it requests get 429 with Retry-After."""
    max_queued_tokens: int = 1 << 20
    """Prompt and answer tokens that all requests in work may come to."""
    max_body_mib: float = 2.0
    """Size of a request's body at most."""
    request_timeout: float = 600.0
    """Seconds that a request may take, waiting included."""
    drain_timeout: float = 60.0
    """Seconds that SIGTERM leaves to what is in work."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of other origins that may use this server; by default none."""
    log_prompts: bool = False
    """Write prompts to the log. Without it the log holds times and counts only."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug also tells requests of /health and the page."""

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, limit: str) -> None:
            if not fits:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {getattr(self, name)!r}; it must be {limit}")

        check("port", 0 <= self.port < 65536, "from 0 to 65535")
        check("workers", 0 <= self.workers <= 256, "from 0 (auto) to 256")
        check("max_queue", self.max_queue >= 0, "at least 0")
        check("max_queued_tokens", self.max_queued_tokens >= 1, "at least 1")
        check("max_batch", self.max_batch >= 1, "at least 1")
        check("max_step_tokens", self.max_step_tokens >= self.max_batch, f"at least --max-batch, {self.max_batch}")
        check("max_body_mib", 0 < self.max_body_mib <= 1024, "above 0 and at most 1024")
        check("request_timeout", self.request_timeout > 0, "above 0 seconds")
        check("drain_timeout", self.drain_timeout >= 0, "at least 0 seconds")
        check("cache_gib", self.cache_gib is None or self.cache_gib > 0, "above 0")
        check("api_key", self.api_key is None or self.api_key.strip() != "", "a key, or left out")


def require_extra() -> None:
    """NanochatError with the remedy when the packages of the `serve` extra are missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise NanochatError(
            f"serving needs {', '.join(missing)}, not installed here; run "
            "pip install --no-build-isolation -e '.[serve]'"
        )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; UsageError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with --host and --port"
        ) from error
    made.set_inheritable(False)
    return made


def worker_count(config: ServeConfig) -> int:
    import torch

    if config.workers:
        return config.workers
    return max(1, torch.cuda.device_count()) if config.device in ("auto", "cuda") else 1


def engine_builds(config: ServeConfig, stage: str, folder: Path) -> list[Any]:
    """One recipe per worker. On a CPU the cores are shared out among them."""
    from nanochat.serving.router import numbered
    from nanochat.serving.worker import EngineSpec

    workers = worker_count(config)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spec = EngineSpec(
        stage=stage,
        tag=folder.name,
        step=config.step,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
        weights=config.weights,
        max_batch=config.max_batch,
        max_step_tokens=config.max_step_tokens,
        cache_bytes=None if config.cache_gib is None else int(config.cache_gib * 2**30),
        prefix_cache=config.prefix_cache,
        speculate=config.speculate,
        context=config.context,
        threads=max(1, cores // workers),
    )
    return numbered(spec, workers)


async def serve(config: ServeConfig, builds: list[Any], tokenizer: Tokenizer, bound: socket.socket) -> "Router":
    """Runs until a signal has drained the server. Returns the router, which knows whether it ended for a reason."""
    import uvicorn

    from nanochat.serving.app import AppConfig, create_app
    from nanochat.serving.guard import GuardConfig
    from nanochat.serving.metrics import Metrics
    from nanochat.serving.router import Limits, Router

    metrics = Metrics()
    router = Router(builds, Limits(config.max_batch, config.max_queue, config.max_queued_tokens), metrics)
    guard = GuardConfig(
        api_key=config.api_key or os.environ.get("NANOCHAT_API_KEY") or None,
        max_body=int(config.max_body_mib * 2**20),
        local_only=config.host in LOOPBACK,
    )
    if guard.api_key is None and not guard.local_only:
        log.warning("listening on %s without --api-key: everybody who reaches this machine may use it", config.host)
    app = create_app(
        router,
        tokenizer,
        metrics,
        AppConfig(config.name, config.request_timeout, config.log_prompts, config.cors_origins, guard),
    )
    settings = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=30, backlog=1024, ws="none",
        timeout_graceful_shutdown=int(config.drain_timeout) + 1,
    )  # fmt: skip

    class Server(uvicorn.Server):
        """Tells the router at the first signal, so that /ready and new requests on open connections know at once."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            router.draining = True
            log.info("%s: finishing %d answers", signal.Signals(sig).name, router.in_flight)
            super().handle_exit(sig, frame)

    server = Server(settings)

    def stop_now() -> None:
        server.should_exit = True

    router.on_fatal = stop_now
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("serving %s at http://%s:%d with %d engine(s)", config.name, shown, port, len(builds))
    try:
        await server.serve(sockets=[bound])
    finally:
        await router.stop(0 if server.force_exit or router.fatal else config.drain_timeout)
    return router


def run(config: ServeConfig) -> int:
    """The command. Returns the exit code."""
    require_extra()
    stage, folder = find_stage(config.stage, config.tag)
    tokenizer = Tokenizer.load(default_tokenizer_dir())
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    bound = listen(config.host, config.port)
    # uvicorn hands the signals that ended it on to whoever handled them before: here that is nobody
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with bound:
        router = asyncio.run(serve(config, engine_builds(config, stage, folder), tokenizer, bound))
    if router.fatal:
        raise NanochatError(f"no engine could be started: {router.fatal}")
    return 0
