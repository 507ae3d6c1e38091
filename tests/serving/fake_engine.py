"""An engine without a model: says what it was told to, at a pace that it was told, and keeps BatchEngine's interface.

A request's first tokens steer it: a prompt that contains "CRASH" kills the process at its first step, "HANG" stands
still, "ODD" ends with an error. Otherwise the answer repeats the script, a token per step.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

from nanochat.errors import UsageError
from nanochat.serving.worker import Info
from nanochat.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """Byte b is token b; the special tokens are 256 to 264."""
    return Tokenizer.from_ranks({bytes([b]): b for b in range(256)})


@dataclass
class FakeOutput:
    id: str
    token: int
    text: str
    kind: str = "text"
    forced: bool = False
    finish: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class Going:
    request: Any
    said: int = 0


@dataclass
class FakeEngine:
    """`pieces` are (kind, text) of one answer; without them the answer counts words to max_tokens."""

    pieces: tuple[tuple[str, str], ...] = ()
    pause: float = 0.0
    context: int = 512
    max_batch: int = 4
    going: dict[str, Going] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)
    cancelled: int = 0
    steps: int = 0

    def check(self, request: Any) -> None:
        if len(request.tokens) >= self.context:
            raise UsageError(f"{len(request.tokens)} tokens do not fit in {self.context}")

    def add(self, request: Any) -> None:
        self.waiting.append(request)

    def cancel(self, id: str) -> None:
        self.waiting = [request for request in self.waiting if request.id != id]
        self.cancelled += self.going.pop(id, None) is not None

    @property
    def has_work(self) -> bool:
        return bool(self.going or self.waiting)

    def stats(self) -> dict[str, int]:
        return {
            "running": len(self.going), "waiting": len(self.waiting), "blocks_used": len(self.going),
            "blocks_total": self.max_batch, "steps": self.steps, "cancelled": self.cancelled,
        }  # fmt: skip

    def step(self) -> list[FakeOutput]:
        while self.waiting and len(self.going) < self.max_batch:
            request = self.waiting.pop(0)
            self.going[request.id] = Going(request)
        time.sleep(self.pause)
        self.steps += 1
        return [self._next(going) for going in list(self.going.values())]

    def _next(self, going: Going) -> FakeOutput:
        request = going.request
        prompt = bytes(token for token in request.tokens if token < 256)
        if b"CRASH" in prompt:
            os._exit(9)
        if b"HANG" in prompt:
            time.sleep(3600)
        going.said += 1
        pieces = self.pieces or tuple(("text", f"w{index} ") for index in range(request.params.max_tokens))
        kind, text = pieces[going.said - 1]
        last = going.said >= min(len(pieces), request.params.max_tokens)
        finish = None if not last else "length" if going.said >= request.params.max_tokens else "stop"
        if b"ODD" in prompt:
            finish = "error"
        if finish:
            del self.going[request.id]
        top = ((104, -0.5), (105, -1.5)) if getattr(request.params, "logprobs", None) else ()
        return FakeOutput(request.id, 104, text, kind, kind == "output", finish, -0.5, top)


@dataclass(frozen=True)
class FakeBuild:
    """Makes one in the worker's process."""

    pieces: tuple[tuple[str, str], ...] = ()
    pause: float = 0.0
    index: int = 0
    fails: str = ""
    chat: bool = True

    def __call__(self) -> tuple[FakeEngine, Info]:
        if self.fails:
            raise UsageError(self.fails)
        engine = FakeEngine(self.pieces, self.pause)
        return engine, Info("fake", engine.context, 265, "none", self.chat, f"process {os.getpid()}")
