"""A server under unkind load: `python -m benchmarks.serve_soak --seconds 180`. Exit 0 when every promise was kept.

    load    64 clients stream chats; a third hang up at random; one request in twenty is malformed
    kill    in the middle of streams one engine is killed: only its own requests fail, and it is replaced
    drain   in the middle of streams the server is told to end: all streams end properly, the exit code is 0

Promises: every well-formed request gets its whole answer, malformed ones get 4xx, blocks of the cache go back to zero,
resident memory grows by at most 2% after the first minute (the first third of shorter runs), the 99th percentile of
/health is at most 50 ms. /health is asked from a process of its own: the load's event loop must not measure itself.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import signal
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import tyro

from benchmarks import harness
from benchmarks.server_process import Server, ask, metric, quantile, serving

SHARED = "You are a patient librarian who answers in short sentences and never loses count. " * 4
NO_RESIDUE_WITHIN = 10.0  # seconds after the load


@dataclass(frozen=True)
class SoakConfig:
    """Load, kill and drain a server, and check what it promises."""

    seconds: float = 180.0
    """Of load."""
    clients: int = 64
    """That stream at the same time."""
    depth: int = 4
    """Of the random model."""
    workers: int = 2
    """Engine processes."""
    leaving: float = 1 / 3
    """Share of the requests whose client hangs up."""
    malformed: float = 0.05
    """Share of the requests that are no requests."""
    most_tokens: int = 128
    """Of an answer."""
    dtype: str = "auto"
    """Of the server."""
    weights: str = "auto"
    """Of the server."""
    kernels: str = "auto"
    """Of the server."""
    health_ms: float = 50.0
    """What the 99th percentile of /health may be."""
    growth: float = 0.02
    """What memory may grow by."""
    seed: int = 0
    """Of the load."""
    out: str | None = None
    """File or folder for the row."""


def chat(draw: random.Random, tokens: int) -> bytes:
    """A well-formed request: a shared beginning, a question of its own, an answer of exactly `tokens`."""
    question = " ".join(
        draw.choice("alpha bravo charlie delta echo foxtrot".split()) for _ in range(draw.randint(3, 40))
    )
    body = {
        "messages": [{"role": "system", "content": SHARED}, {"role": "user", "content": question}],
        "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        "temperature": draw.choice([0, 0.8]), "seed": draw.randint(0, 1 << 40), "calculator": False,
    }  # fmt: skip
    return json.dumps(body).encode()


def malformed(draw: random.Random) -> tuple[str, bytes]:
    """(path, body) of a request that has to be answered with a 4xx."""
    start = b'{"messages": [{"role": "user", "content": "x"}], '
    chats = [
        b"{", b"\xff\xfe\x00", b"[" * 50_000, b"", start + b'"temperature": NaN}', start + b'"seed": 1e999}',
        start + b'"max_tokens": 99999999999999999999999999}', start + b'"seed": ' + b"9" * 6000 + b"}",
        start + b'"n": "two"}', start + b'"unknown": 1}', start + b'"top_p": -Infinity}', b" " * 10_000_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": 7}', b'{"messages": []}',
    ]  # fmt: skip
    prompts = [[1 << 20], [-1], [1 << 40], ["a", 1], {"a": 1}]
    if draw.random() < 0.25:
        return "/v1/completions", json.dumps({"prompt": draw.choice(prompts), "max_tokens": 4}).encode()
    return "/v1/chat/completions", draw.choice(chats)


class Tally:
    """What happened, and what should not have."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0

    def fault(self, what: str) -> None:
        self.faults[what] += 1


async def client(server: Server, config: SoakConfig, number: int, until: float, tally: Tally) -> None:
    """One request after the other until the time is over; the last one is finished."""
    draw = random.Random(config.seed * 1000 + number)
    while time.monotonic() < until:
        chance = draw.random()
        if chance < config.malformed:
            path, body = malformed(draw)
            reply = await ask(server.address, body, path)
            tally.counts["malformed"] += 1
            if not 400 <= reply.status < 500:
                tally.fault(f"malformed {body[:60]!r} got {reply.status} {reply.error}")
            continue
        tokens = draw.randint(1, config.most_tokens)
        leaves = chance < config.malformed + config.leaving
        reply = await ask(
            server.address, chat(draw, tokens), leave_after=draw.expovariate(2.0) if leaves else None
        )  # fmt: skip
        if leaves and not reply.complete and reply.error is None:
            tally.counts["left"] += 1
            continue
        tally.counts["answered"] += 1
        whole = reply.status == 200 and reply.complete and reply.tokens == tokens and reply.finish == "length"
        if not whole:
            tally.fault(f"answer of {tokens}: status {reply.status}, {reply.tokens} tokens, error {reply.error}")
            continue
        tally.tokens += tokens
        if reply.times:
            tally.first.append(reply.times[0] - reply.begin)
            tally.between += [b - a for a, b in zip(reply.times, reply.times[1:], strict=False)]


def probe(url: str, connection: Connection) -> None:
    """A process: asks /health twenty times a second, until told to stop; sends the seconds it took."""
    took: list[float] = []
    while not connection.poll(0.05):
        begin = time.perf_counter()
        with urllib.request.urlopen(url + "/health", timeout=10) as answer:
            answer.read()
        took.append(time.perf_counter() - begin)
    connection.send(took)


def scrape(server: Server) -> str:
    with urllib.request.urlopen(server.url + "/metrics", timeout=10) as answer:
        return answer.read().decode()


async def load(server: Server, config: SoakConfig, tally: Tally) -> list[tuple[float, int]]:
    """The load, and the memory (seconds, bytes) once a second."""
    begin = time.monotonic()
    until = begin + config.seconds
    memory = []

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - begin, await asyncio.to_thread(server.resident)))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(server, config, number, until, tally) for number in range(config.clients)))
    watching.cancel()
    return memory


async def kill(server: Server, config: SoakConfig, tally: Tally) -> None:
    """One engine dies under streams: its own end with an error, the others with their answers."""
    draw = random.Random(config.seed)
    bodies = [chat(draw, 3 * config.most_tokens) for _ in range(16)]
    asked = [asyncio.create_task(ask(server.address, body)) for body in bodies]
    await asyncio.sleep(1.0)
    await asyncio.to_thread(server.workers()[0].kill)
    replies = await asyncio.gather(*asked)
    whole = sum(reply.complete and reply.tokens == 3 * config.most_tokens for reply in replies)
    lost = sum(reply.error == "engine_died" for reply in replies)
    tally.counts["lost with their engine"], tally.counts["untouched by its death"] = lost, whole
    if whole + lost != len(replies) or not lost or (config.workers > 1 and not whole):
        errors = Counter((reply.status, reply.error) for reply in replies)
        tally.fault(f"after a kill {whole} answers were whole and {lost} lost of {len(replies)}: {errors}")
    end = time.monotonic() + 60
    while "".join(server.log).count("is ready") < config.workers + 1:
        if time.monotonic() > end:
            tally.fault("the dead engine was not replaced within 60 s")
            return
        await asyncio.sleep(0.1)


async def drain(server: Server, config: SoakConfig, tally: Tally) -> None:
    """SIGTERM under streams: they end properly, and the process with code 0."""
    draw = random.Random(config.seed + 1)
    asked = [asyncio.create_task(ask(server.address, chat(draw, config.most_tokens))) for _ in range(16)]
    await asyncio.sleep(0.7)
    server.process.send_signal(signal.SIGTERM)
    replies = await asyncio.gather(*asked)
    whole = sum(reply.complete and reply.tokens == config.most_tokens for reply in replies)
    tally.counts["finished while draining"] = whole
    if whole != len(replies):
        tally.fault(f"draining lost answers: {Counter((reply.status, reply.error) for reply in replies)}")
    code = await asyncio.to_thread(server.process.wait, 90)
    if code:
        tally.fault(f"the server ended with code {code} after SIGTERM")


def judge_memory(memory: list[tuple[float, int]], config: SoakConfig, tally: Tally) -> float:
    """Growth from the end of the first minute (of the first third, if that is shorter) to the end."""
    settled = min(60.0, config.seconds / 3)
    early = [size for at, size in memory if settled - 5 <= at <= settled + 1] or [memory[0][1]]
    late = [size for at, size in memory if at >= memory[-1][0] - 5]
    growth = sum(late) / len(late) / (sum(early) / len(early)) - 1
    if growth > config.growth:
        tally.fault(f"memory grew by {growth:.1%}, more than {config.growth:.0%}")
    return growth


def soak(config: SoakConfig) -> tuple[Tally, dict[str, Any]]:
    """All phases; the tally and the figures."""
    tally, context = Tally(), multiprocessing.get_context("spawn")
    flags = ["--dtype", config.dtype, "--weights", config.weights, "--kernels", config.kernels]
    with serving(config.depth, flags, config.workers) as server:
        ours, theirs = context.Pipe()
        prober = context.Process(target=probe, args=(server.url, theirs), daemon=True)
        prober.start()
        begin = time.monotonic()
        memory = asyncio.run(load(server, config, tally))
        seconds = time.monotonic() - begin
        ours.send("stop")
        health = ours.recv()
        prober.join()
        end = time.monotonic() + NO_RESIDUE_WITHIN
        while (blocks := metric(scrape(server), "nanochat_engine_blocks_used")) and time.monotonic() < end:
            time.sleep(0.2)
        if blocks:
            tally.fault(f"{blocks:.0f} blocks of the cache are still held after the load")
        health_p99 = quantile(health, 0.99)
        if health_p99 > config.health_ms / 1000:
            tally.fault(f"/health took {1000 * health_p99:.0f} ms at the 99th percentile")
        growth = judge_memory(memory, config, tally)
        asyncio.run(kill(server, config, tally))
        asyncio.run(drain(server, config, tally))
        for line in server.log:
            if "Traceback" in line:
                tally.fault("a traceback in the server's log")
    figures = {
        "clients": config.clients, "workers": config.workers, "seconds": round(seconds, 1), **tally.counts,
        "output_tokens_per_s": round(tally.tokens / seconds, 1), "rss_bytes": memory[-1][1],
        "rss_growth": round(growth, 4), "health_p50_ms": round(1000 * quantile(health, 0.5), 2),
        "health_p99_ms": round(1000 * health_p99, 2), "health_asked": len(health),
        "ttft_p50_s": round(quantile(tally.first, 0.5), 4), "ttft_p99_s": round(quantile(tally.first, 0.99), 4),
        "inter_token_p50_s": round(quantile(tally.between, 0.5), 4),
        "inter_token_p99_s": round(quantile(tally.between, 0.99), 4), "faults": dict(tally.faults),
    }  # fmt: skip
    return tally, figures


def main() -> int:
    config = tyro.cli(SoakConfig, description=__doc__)
    tally, figures = soak(config)
    for what, times in tally.faults.items():
        harness.say(f"{times} × {what}", "red")
    if config.out:
        rows = harness.Rows("serve_soak", torch.device("cpu"), out=config.out)
        rows.add(work="soak", case=f"d{config.depth}", backend="serve", dtype=config.dtype, mode=config.weights,
                 timing=harness.Timing([figures["inter_token_p50_s"]]), **figures)  # fmt: skip
    print(json.dumps(figures))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    harness.run(main)
