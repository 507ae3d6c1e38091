"""The engine's process: receives requests through a pipe, steps the batch, sends what each step made.

    front → worker   ("add", Request)   ("cancel", id)   ("stop",)
    worker → front   ("ready", Info)    ("failed", message)    ("refused", id, message)
                     ("step", {id: [Token, ...]}, stats or None)

Between two steps the pipe is emptied, so a cancellation takes effect within one step. One message carries a whole step,
and the statistics every now and then: sending per token would cost more than a small model's forward pass. A process of
its own keeps the front's event loop free of the model, and a crash of one engine away from the others. Signals are the
front's affair: the worker ends when it is told to, or when the pipe breaks because the front is gone.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat.errors import NanochatError

if TYPE_CHECKING:  # torch takes seconds to import
    from nanochat.inference.runner import WeightsName

STATS_EVERY = 0.25  # seconds, while there is work
YIELD = 5  # niceness on a CPU, which the front shares: it needs little, but at once

log = logging.getLogger("nanochat.worker")


class Token(NamedTuple):
    """One token of one answer: what the engine's Output says, less the request's name."""

    token: int
    text: str
    kind: str
    forced: bool
    finish: str | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Info:
    """What the front has to know of an engine."""

    name: str
    context: int
    vocab_size: int
    tokenizer: str  # its fingerprint
    chat: bool  # False for a base model, which knows no turns
    device: str


Build = Callable[[], tuple[Any, Info]]  # makes a BatchEngine; picklable, as it travels to the new process


@dataclass(frozen=True)
class EngineSpec:
    """How a worker makes its engine: which checkpoint, where, and with how much memory."""

    stage: str = "auto"
    tag: str | None = None
    step: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    weights: "WeightsName" = "auto"
    max_batch: int = 64
    max_step_tokens: int = 512
    cache_bytes: int | None = None
    prefix_cache: bool = True
    speculate: int = 0
    context: int | None = None
    index: int = 0
    threads: int | None = None

    def __call__(self) -> tuple[Any, Info]:
        from typing import cast

        import torch

        from nanochat import runtime
        from nanochat.inference.batch_engine import BatchConfig, BatchEngine
        from nanochat.inference.loading import StageName, load
        from nanochat.inference.runner import make_runner

        gpus = torch.cuda.device_count()
        if self.threads is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.threads)
        device, why = runtime.choose_device(cast(runtime.DeviceName, self.device), self.index % gpus if gpus else 0)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif hasattr(os, "nice"):
            os.nice(YIELD)
        dtype, why_dtype = runtime.choose_dtype(cast(runtime.DtypeName, self.dtype), device)
        machine = runtime.Runtime(device, dtype, reasons={"device": why, "dtype": why_dtype})
        loaded = load(machine, cast(StageName, self.stage), self.tag, self.step, self.kernels)
        config = BatchConfig(
            max_batch=self.max_batch,
            max_step_tokens=self.max_step_tokens,
            cache_bytes=self.cache_bytes,
            prefix_cache=self.prefix_cache,
            speculate=self.speculate,
            context=self.context,
        )
        runner = make_runner(loaded.model, self.weights, loaded.model.plan)
        engine = BatchEngine(loaded.model, loaded.tokenizer, config, runner)
        return engine, Info(
            name=loaded.name,
            context=self.context or loaded.model.config.seq_len,
            vocab_size=loaded.tokenizer.vocab_size,
            tokenizer=loaded.tokenizer.fingerprint,
            chat=loaded.stage != "base",
            device=f"{device} in {str(dtype).removeprefix('torch.')}",
        )


def main(connection: Connection, build: Build, level: int = logging.INFO) -> None:
    """The process: builds the engine, then serves until told to stop. Never returns normally with work undone."""
    for name in ("SIGINT", "SIGTERM"):  # a Ctrl-C reaches the whole group; the front drains and then says stop
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        try:
            engine, info = build()
        except NanochatError as error:
            connection.send(("failed", str(error)))
            return
        connection.send(("ready", info))
        serve(connection, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        log.debug("the front is gone")


def serve(connection: Connection, engine: Any) -> None:
    """The loop. Idle, it sleeps in recv; an exception of the engine ends the process, which the front replaces."""
    told = 0.0
    while True:
        while connection.poll() or not engine.has_work:
            message = connection.recv()
            if message[0] == "stop":
                return
            refusal = _take(engine, message)
            if refusal:
                connection.send(refusal)
            if not engine.has_work and not connection.poll():
                connection.send(("step", {}, _stats(engine)))  # blocks that a cancellation freed are seen at once
        made: dict[str, list[Token]] = {}
        for output in engine.step():
            if output.finish == "error":
                log.error("a step of the engine failed, request %s with it: %s", output.id, engine.error)
            made.setdefault(output.id, []).append(
                Token(
                    output.token,
                    output.text,
                    output.kind,
                    output.forced,
                    output.finish,
                    output.logprob,
                    tuple(output.top_logprobs),
                )  # fmt: skip
            )
        now = time.monotonic()
        stats = None
        if now - told >= STATS_EVERY or not engine.has_work:
            stats, told = _stats(engine), now
        if made or stats:
            connection.send(("step", made, stats))


def _take(engine: Any, message: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """Does what the front asks; returns what it has to be told, if anything."""
    if message[0] == "cancel":
        engine.cancel(message[1])
    elif message[0] == "add":
        try:
            engine.check(message[1])
            engine.add(message[1])
        except NanochatError as error:
            return "refused", message[1].id, str(error)
    return None


def _stats(engine: Any) -> dict[str, float]:
    stats = engine.stats()
    return asdict(stats) if is_dataclass(stats) and not isinstance(stats, type) else dict(stats)
