"""An engine without a model that keeps BatchEngine's interface: a token per request and step, counting words.

A word in the prompt steers it: SLOW takes 20 ms for each step, TOOL answers with a call of the calculator, ECHO:
repeats what follows it, CRASH ends the process, HANG stands still, ODD ends the request with an error.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

from nanochat.errors import UsageError
from nanochat.serving.worker import Info

TOOL = (("text", "It is "), ("python", "6*"), ("python", "7"), ("output", "42"), ("text", "42."))


def byte_tokenizer() -> Any:
    """Byte b is token b; the special tokens are 256 to 264."""
    from nanochat.tokenizer import Tokenizer  # here, because it takes torch with it, which a worker need not wait for

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


def prompt_of(request: Any) -> bytes:
    return bytes(token for token in request.tokens if token < 256)


@dataclass
class Going:
    request: Any
    said: int = 0


@dataclass
class FakeEngine:
    """One token is one piece of text, whatever its id."""

    context: int = 2048
    max_batch: int = 4
    going: dict[str, Going] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)
    cancelled: int = 0
    steps: int = 0
    error: str = "an odd request"

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
        if any(b"SLOW" in prompt_of(going.request) for going in self.going.values()):
            time.sleep(0.02)
        self.steps += 1
        return [self._next(going) for going in list(self.going.values())]

    def _next(self, going: Going) -> FakeOutput:
        request = going.request
        prompt = prompt_of(request)
        if b"CRASH" in prompt:
            os._exit(9)
        if b"HANG" in prompt:
            time.sleep(3600)
        going.said += 1
        pieces = TOOL if b"TOOL" in prompt else None  # None: words are counted to max_tokens
        if (at := prompt.rfind(b"ECHO:")) >= 0:
            echo = prompt[at + 5 :].decode()
            pieces = tuple(("text", echo[start : start + 7]) for start in range(0, len(echo), 7))
        kind, text = ("text", f"w{going.said - 1} ") if pieces is None else pieces[going.said - 1]
        finish = "length" if going.said >= request.params.max_tokens else None
        if finish is None and pieces is not None and going.said >= len(pieces):
            finish = "stop"
        if b"ODD" in prompt:
            finish = "error"
        if finish:
            del self.going[request.id]
        top = ((104, -0.5), (105, -1.5)) if request.params.logprobs else ()
        return FakeOutput(request.id, 104, text, kind, kind == "output", finish, -0.5, top)


@dataclass(frozen=True)
class FakeBuild:
    """Makes one in the worker's process."""

    index: int = 0
    fails: str = ""
    chat: bool = True

    def __call__(self) -> tuple[FakeEngine, Info]:
        if self.fails:
            raise UsageError(self.fails)
        import nanochat.inference.batch_engine  # noqa: F401  (what the first request would have to wait for)

        engine = FakeEngine()
        return engine, Info("fake", engine.context, 265, "none", self.chat, f"process {os.getpid()}")
