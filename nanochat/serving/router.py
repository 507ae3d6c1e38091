"""The front's side of the engines: starts them, shares requests out among them, replaces those that die.

Routing: the worker whose cache probably holds the longest beginning of the prompt, unless it is much busier than the
least busy one; without a match, the least busy. What a cache holds is guessed from what was sent there: a chain of
hashes over blocks of token ids, least recently used first to be forgotten. A wrong guess costs a prefill, nothing else.

Each worker has two threads here, one that reads its pipe and one that writes it: the event loop never waits for a pipe.
A `Job` is one HTTP request, its answers on one worker; whoever awaits it takes all tokens that have come since he last
looked, so a slow reader makes larger chunks instead of a longer queue.
"""

import asyncio
import itertools
import logging
import multiprocessing
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from nanochat.inference.batch_engine import Request
from nanochat.inference.sampling import SamplingParams
from nanochat.serving import worker
from nanochat.serving.metrics import Metrics
from nanochat.serving.openai_api import ApiError
from nanochat.serving.worker import Build, Info, Token

HASH_BLOCK = 64  # tokens per link of the chain
REMEMBERED = 8192  # links per worker
RESTART_WAIT = (0.0, 1.0, 2.0, 5.0, 15.0, 30.0)  # seconds before the nth start in a row that came to nothing

log = logging.getLogger("nanochat.serving")


@dataclass(frozen=True)
class Limits:
    """How much is taken on. A request beyond it is answered 429 at once rather than made to wait without end."""

    max_batch: int = 64
    max_queue: int = 256  # answers waiting, beyond those that fit into the batches
    max_queued_tokens: int = 1 << 20  # prompt and answer tokens that all answers in work may come to
    stall: float = 120.0  # seconds without a step, with work to do, after which an engine counts as dead


class Job:
    """One HTTP request's answers, numbered from 0, on their way."""

    def __init__(self, ids: Sequence[str], tokens: int) -> None:
        self.ids, self.reserved = tuple(ids), tokens
        self.open = set(range(len(ids)))
        self.fresh: dict[int, list[Token]] = {}
        self.error: ApiError | None = None
        self.begun: float | None = None
        self.submitted = time.monotonic()
        self._wake = asyncio.Event()

    async def take(self) -> dict[int, list[Token]]:
        """All tokens that have come since the last call, by answer; empty when all answers are over. ApiError."""
        while not self.fresh:
            if self.error is not None:
                raise self.error
            if not self.open:
                return {}
            self._wake.clear()
            await self._wake.wait()
        fresh, self.fresh = self.fresh, {}
        return fresh

    def push(self, index: int, tokens: list[Token]) -> None:
        self.fresh.setdefault(index, []).extend(tokens)
        if tokens[-1].finish:
            self.open.discard(index)
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        if self.open:
            self.open.clear()
            self.error = error
        self._wake.set()


class Engine:
    """One worker as the front sees it, over all its lives."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.life = 0  # which process this is; messages of an earlier one are dropped
        self.process: Any = None
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.info: Info | None = None
        self.jobs: dict[str, tuple[Job, int]] = {}
        self.stats: dict[str, float] = {}
        self.failures = 0
        self.heard = time.monotonic()
        self.prefixes: OrderedDict[int, None] = OrderedDict()

    def matched(self, chain: Sequence[int]) -> int:
        return sum(1 for _ in itertools.takewhile(self.prefixes.__contains__, chain))

    def remember(self, chain: Sequence[int]) -> None:
        for link in reversed(chain):  # the beginning is forgotten last
            self.prefixes[link] = None
            self.prefixes.move_to_end(link)
        while len(self.prefixes) > REMEMBERED:
            self.prefixes.popitem(last=False)


def chain_of(tokens: Sequence[int]) -> list[int]:
    """A hash per whole block, each over all that comes before it too."""
    chain, parent = [], 0
    for start in range(0, len(tokens) - HASH_BLOCK + 1, HASH_BLOCK):
        parent = hash((parent, tuple(tokens[start : start + HASH_BLOCK])))
        chain.append(parent)
    return chain


class Router:
    """All workers. Everything here runs on the event loop; only the pipes' threads do not."""

    def __init__(self, builds: Sequence[Build], limits: Limits, metrics: Metrics) -> None:
        self.builds, self.limits, self.metrics = list(builds), limits, metrics
        self.engines = [Engine(index) for index in range(len(builds))]
        self.draining = False  # no longer /ready; connections that are open are still answered
        self.stopped = False
        self.fatal: str | None = None
        self.on_fatal: Callable[[], None] = lambda: None
        self.reserved = 0
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = multiprocessing.get_context("spawn")

    # what the application asks

    @property
    def info(self) -> Info | None:
        """Of any engine that is or was ready; all are alike."""
        return next((engine.info for engine in self.engines if engine.info is not None), None)

    @property
    def ready(self) -> bool:
        return not self.draining and any(engine.info for engine in self.engines)

    @property
    def in_flight(self) -> int:
        return sum(len(engine.jobs) for engine in self.engines)

    def submit(self, prompts: Sequence[tuple[Sequence[int], Sequence[SamplingParams]]], priority: int = 0) -> Job:
        """Sends prompts, each with the settings of its answers, to workers; the answers of one prompt stay together.

        ApiError 429 when too much waits, 503 when no engine is ready.
        """
        if self.stopped:
            raise ApiError(503, "the server is shutting down; ask another one", "shutting_down", retry_after=5)
        engines = [engine for engine in self.engines if engine.info is not None]
        if not engines:
            raise ApiError(503, "no engine is ready yet; try again shortly", "not_ready", retry_after=2)
        answers = sum(len(params) for _, params in prompts)
        cost = sum(len(tokens) + each.max_tokens for tokens, params in prompts for each in params)
        self._admit(answers, cost, len(engines))
        self.reserved += cost
        job = Job([f"r{next(self._numbers)}" for _ in range(answers)], cost)
        numbered = enumerate(job.ids)
        for tokens, params in prompts:
            ids, chain = tuple(tokens), chain_of(tokens)
            engine = self._choose(engines, chain)
            engine.remember(chain)
            if not engine.jobs:
                engine.heard = time.monotonic()
            for each, (index, id) in zip(params, numbered):
                engine.jobs[id] = (job, index)
                engine.outbox.put(("add", Request(id, ids, each, priority=priority, tool=each.tools)))
        return job

    def cancel(self, job: Job) -> None:
        """Gives up what is left of a job; called for finished ones too, whose room it returns."""
        self.reserved -= job.reserved
        job.reserved = 0
        for engine in self.engines:
            for id in job.ids:
                if engine.jobs.pop(id, None) is not None:
                    engine.outbox.put(("cancel", id))
                    self.metrics.cancelled.inc()
        job.open.clear()

    def _admit(self, answers: int, cost: int, engines: int) -> None:
        limits = self.limits
        waiting = self.in_flight + answers - engines * limits.max_batch
        tokens = self.reserved + cost
        # a request is never refused for its size when nothing else is in work: that is the engine's `check`
        if waiting > limits.max_queue or (self.reserved and tokens > limits.max_queued_tokens):
            self.metrics.refused.inc()
            wait = max(1, min(60, round(self.metrics.mean_seconds() * max(waiting, 1) / (engines * limits.max_batch))))
            raise ApiError(
                429,
                f"too much is waiting ({max(waiting - answers, 0)} answers in the queue, {self.reserved} tokens in "
                f"work; limits {limits.max_queue} and {limits.max_queued_tokens}); try again in {wait} s",
                "queue_full",
                retry_after=wait,
            )

    def _choose(self, engines: Sequence[Engine], chain: Sequence[int]) -> Engine:
        least = min(engines, key=lambda engine: len(engine.jobs))
        best = max(engines, key=lambda engine: (engine.matched(chain), -len(engine.jobs)))
        if best.matched(chain) and len(best.jobs) - len(least.jobs) <= max(4, self.limits.max_batch // 4):
            return best
        return least

    # the life of the workers

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for engine in self.engines:
            self._spawn(self._start(engine, 0))
        self._spawn(self._watch())

    async def stop(self, patience: float) -> None:
        """Lets what is in work finish for at most `patience` seconds, then ends the workers."""
        self.draining = True
        end = time.monotonic() + patience
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.stopped = True
        for task in self._tasks:
            task.cancel()
        for engine in self.engines:
            engine.life += 1
            self._fail_jobs(engine, ApiError(503, "the server is shutting down", "shutting_down"))
            engine.outbox.put(("stop",))
            engine.outbox.put(None)
        await asyncio.gather(*(asyncio.to_thread(_end, engine.process) for engine in self.engines))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, engine: Engine, wait: float) -> None:
        await asyncio.sleep(wait)
        engine.life += 1
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker.main,
            args=(theirs, self.builds[engine.index], log.getEffectiveLevel()),
            name=f"nanochat-engine-{engine.index}",
            daemon=True,
        )
        await asyncio.to_thread(process.start)
        theirs.close()  # or the end of the process would not end our recv
        engine.process, engine.outbox, engine.heard = process, queue.SimpleQueue(), time.monotonic()
        life = engine.life
        post = self._loop.call_soon_threadsafe

        def deliver(message: Any) -> None:
            try:
                post(self._receive, engine, life, message)
            except RuntimeError:  # the loop has ended before the worker
                pass

        threading.Thread(target=_read, args=(ours, deliver), daemon=True).start()
        threading.Thread(target=_write, args=(ours, engine.outbox), daemon=True).start()

    def _receive(self, engine: Engine, life: int, message: Any) -> None:
        if life != engine.life:
            return
        engine.heard = time.monotonic()
        match message:
            case ("step", made, stats):
                for id, tokens in made.items():
                    self._deliver(engine, id, tokens)
                if stats is not None:
                    engine.stats = stats
                    self.metrics.engine(engine.index, stats)
            case ("refused", id, reason):
                job, _ = engine.jobs.pop(id, (None, 0))
                if job is not None:
                    job.fail(ApiError(400, reason, "invalid_value"))
            case ("ready", info):
                engine.info, engine.failures = info, 0
                log.info("engine %d is ready: %s, %s", engine.index, info.name, info.device)
            case ("failed", reason):
                log.error("engine %d cannot start: %s", engine.index, reason)
                if self.info is None:
                    self.fatal = reason
                    self.on_fatal()
            case None:
                self._spawn(self._died(engine))

    def _deliver(self, engine: Engine, id: str, tokens: list[Token]) -> None:
        job, index = engine.jobs.get(id, (None, 0))
        if job is None:  # cancelled meanwhile
            return
        finish = tokens[-1].finish
        if finish in ("error", "cancelled"):
            del engine.jobs[id]
            job.fail(ApiError(503, "the engine gave this request up; try again", "engine_error", retry_after=1))
            return
        if finish:
            del engine.jobs[id]
        job.push(index, tokens)

    async def _died(self, engine: Engine) -> None:
        """The pipe has ended: answers its requests, starts anew."""
        engine.life += 1
        was_ready, engine.info = engine.info is not None, None
        engine.outbox.put(None)
        engine.prefixes.clear()
        engine.stats = {}
        self.metrics.engine(engine.index, {})
        lost = len(engine.jobs)
        self._fail_jobs(
            engine,
            ApiError(503, "the engine that worked on this request died; it is being replaced, try again", "engine_died",
                     retry_after=1),
        )  # fmt: skip
        process = engine.process
        await asyncio.to_thread(_end, process)
        if self.draining or self.fatal:
            return
        engine.failures = 0 if was_ready else engine.failures + 1
        wait = RESTART_WAIT[min(engine.failures, len(RESTART_WAIT) - 1)]
        self.metrics.restarts.inc()
        log.error(
            "engine %d ended with code %s and lost %d answers; the next one starts in %g s",
            engine.index, process.exitcode, lost, wait,
        )  # fmt: skip
        await self._start(engine, wait)

    def _fail_jobs(self, engine: Engine, error: ApiError) -> None:
        jobs, engine.jobs = {id(job): job for job, _ in engine.jobs.values()}, {}
        for job in jobs.values():
            job.fail(error)

    async def _watch(self) -> None:
        """Ends an engine that has work and has not been heard of for too long; its pipe's end does the rest."""
        while True:
            await asyncio.sleep(min(5.0, self.limits.stall / 4))
            for engine in self.engines:
                silent = time.monotonic() - engine.heard
                if engine.info is not None and engine.jobs and silent > self.limits.stall:
                    log.error("engine %d has been silent for %.0f s with work to do; ending it", engine.index, silent)
                    engine.process.kill()


def _read(connection: Connection, deliver: Callable[[Any], None]) -> None:
    """A thread: passes messages on; None at the end."""
    try:
        while True:
            deliver(connection.recv())
    except (EOFError, OSError):
        deliver(None)


def _write(connection: Connection, outbox: "queue.SimpleQueue[Any]") -> None:
    """A thread: sends what is put into the outbox, until None."""
    try:
        while (message := outbox.get()) is not None:
            connection.send(message)
    except OSError:
        pass  # the reading thread notices too, and tells


def _end(process: Any) -> None:
    """Waits for a process that was told to stop; kills it when it does not."""
    if process is None:
        return
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join(5)


def numbered(build: Any, workers: int) -> list[Any]:
    """The same spec for every worker, each with its index."""
    return [replace(build, index=index) for index in range(workers)]
