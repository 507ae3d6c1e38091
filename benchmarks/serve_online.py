"""`nanochat bench serve_online`: the server as its users feel it, over HTTP, with requests that come when they come.

    nanochat bench serve_online --depth 4 --rate 2 --seconds 60              # a random model in a server of its own
    nanochat bench serve_online --url http://127.0.0.1:8000 --rate 8         # a server that runs already

Conversations begin at the times of a Poisson process. Each shares a system prompt with all others and goes on for
--turns turns; a turn is asked as soon as the answer before it is complete and carries the whole conversation, as a chat
does. So the cache is met as in life: a long beginning in common, then a history that only one of them has.

Reported: time to the first token (of first and of later turns), time between tokens (median, 99th percentile), output
tokens per second, and goodput: the share of answers, and their rate, that kept to --ttft and --itl.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks import harness
from benchmarks.server_process import Reply, Server, ask, quantile, serving
from nanochat.errors import UsageError


@dataclass(frozen=True)
class OnlineConfig:
    """Latency and goodput of a server under Poisson arrivals of conversations."""

    url: str | None = None
    """A server that runs already; otherwise one with a random model is started."""
    rate: float = 1.0
    """Conversations that begin per second."""
    seconds: float = 60.0
    """During which conversations begin; those begun are finished."""
    turns: int = 3
    """Of a conversation."""
    shared: int = 400
    """Characters of the system prompt that all share; with a random model's tokens of two bytes, twice its tokens."""
    question: int = 60
    """Characters of a question, on average."""
    answer: int = 48
    """Tokens of an answer, on average (the end of an answer is ignored, so that every server does the same work)."""
    ttft: float = 1.0
    """Seconds to the first token that still count as good."""
    itl: float = 0.2
    """Seconds between tokens, on average over an answer, that still count as good."""
    depth: int = 4
    """Of the random model."""
    workers: int = 1
    """Engine processes of the server that is started."""
    dtype: str = "auto"
    """Of the server that is started."""
    weights: str = "auto"
    """Of the server that is started."""
    kernels: str = "auto"
    """Of the server that is started."""
    device: str = "auto"
    """Of the server that is started."""
    prefix_cache: bool = True
    """Of the server that is started."""
    seed: int = 0
    """Of arrivals and texts."""
    out: str | None = None
    """File or folder for the row."""

    def __post_init__(self) -> None:
        for name in ("rate", "seconds", "turns", "shared", "question", "answer"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be above 0")


@dataclass
class Turn:
    """One answer: the reply, how many tokens were asked for, and which turn of its conversation it is."""

    reply: Reply
    tokens: int
    number: int

    @property
    def whole(self) -> bool:
        return self.reply.complete and self.reply.tokens == self.tokens and bool(self.reply.times)

    @property
    def first(self) -> float:
        return self.reply.times[0] - self.reply.begin

    @property
    def between(self) -> float:
        """Seconds per token after the first, on average."""
        return (self.reply.times[-1] - self.reply.times[0]) / max(1, self.tokens - 1)


def text(draw: random.Random, size: int) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz    ") for _ in range(max(1, size)))


async def converse(server: Server, config: OnlineConfig, number: int, done: list[Turn]) -> None:
    """One conversation. What the model said is replaced by a text of like length: its bytes may be no text at all."""
    draw = random.Random(config.seed * 100_003 + number)
    shared = text(random.Random(config.seed), config.shared)
    messages = [{"role": "system", "content": shared}]
    for turn in range(config.turns):
        messages.append({"role": "user", "content": text(draw, round(draw.uniform(0.5, 1.5) * config.question))})
        tokens = max(2, round(draw.uniform(0.5, 1.5) * config.answer))
        body = {
            "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True, "calculator": False,
            "stream_options": {"include_usage": True}, "seed": number, "temperature": 0.8,
        }  # fmt: skip
        reply = await ask(server.address, json.dumps(body).encode())
        done.append(Turn(reply, tokens, turn))
        if not done[-1].whole:
            return
        messages.append({"role": "assistant", "content": text(draw, 2 * tokens)})


async def offer(server: Server, config: OnlineConfig) -> tuple[list[Turn], float]:
    """All conversations, begun when their time comes; the turns, and the seconds until the last one was done."""
    draw = random.Random(config.seed)
    done: list[Turn] = []
    tasks = []
    begin = time.perf_counter()
    due, number = draw.expovariate(config.rate), 0
    while due < config.seconds:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        tasks.append(asyncio.create_task(converse(server, config, number, done)))
        due, number = due + draw.expovariate(config.rate), number + 1
    await asyncio.gather(*tasks)
    return done, time.perf_counter() - begin


def figures(turns: list[Turn], seconds: float, config: OnlineConfig) -> dict[str, Any]:
    """What is reported; seconds unless a name says otherwise."""
    whole = [turn for turn in turns if turn.whole]
    if not whole:
        seen = Counter((turn.reply.status, turn.reply.error) for turn in turns)
        raise harness.HarnessError(f"no answer was complete; (status, error): {dict(seen)}")
    good = [turn for turn in whole if turn.first <= config.ttft and turn.between <= config.itl]
    gaps = [b - a for turn in whole for a, b in zip(turn.reply.times, turn.reply.times[1:], strict=False)]
    made: dict[str, Any] = {"answers": len(whole), "failed": len(turns) - len(whole), "seconds": round(seconds, 2)}
    for name, some in (
        ("ttft", whole),
        ("ttft_first_turn", [turn for turn in whole if turn.number == 0]),
        ("ttft_later_turns", [turn for turn in whole if turn.number > 0]),
    ):
        for q in (50, 99):
            made[f"{name}_p{q}"] = round(quantile([turn.first for turn in some], q / 100), 4)
    for q in (50, 99):
        made[f"inter_token_p{q}"] = round(quantile(gaps, q / 100), 5)
    made["output_tokens_per_s"] = round(sum(turn.tokens for turn in whole) / seconds, 1)
    made["good_share"] = round(len(good) / len(turns), 4)
    made["goodput_answers_per_s"] = round(len(good) / seconds, 3)
    return made


def main() -> int:
    config = tyro.cli(OnlineConfig, description=__doc__)
    with contextlib.ExitStack() as stack:
        if config.url:
            server = Server(None, config.url)  # type: ignore[arg-type]
        else:
            flags = ["--dtype", config.dtype, "--weights", config.weights, "--kernels", config.kernels]
            flags += ["--device", config.device, *(() if config.prefix_cache else ("--no-prefix-cache",))]
            server = stack.enter_context(serving(config.depth, flags, config.workers))
        asyncio.run(converse(server, config, -1, []))  # warm: the first step of everything
        turns, seconds = asyncio.run(offer(server, config))
    result = figures(turns, seconds, config)
    if config.out:
        rows = harness.Rows("serve_online", torch.device("cpu"), out=config.out)
        rows.add(
            work="online", case=f"d{config.depth}, {config.rate:g}/s, {config.turns} turns", backend="serve",
            dtype=config.dtype, mode=config.weights, timing=harness.Timing([t.first for t in turns if t.whole]),
            workers=config.workers, prefix_cache=config.prefix_cache, unit=result,
        )  # fmt: skip
        rows.table(("ttft_p50", "ttft_p99", "inter_token_p50", "inter_token_p99", "goodput_answers_per_s"))
    print(json.dumps({"rate": config.rate, "turns": config.turns, "workers": config.workers, **result}))
    return 0


if __name__ == "__main__":
    harness.run(main)
