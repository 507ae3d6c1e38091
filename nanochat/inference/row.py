"""One answer while it is being generated: a small state machine that takes a token at a time.

    text ─<|python_start|>→ python ─<|python_end|>→ calculate → forced: <|output_start|> result <|output_end|> → text

It decodes to text that is safe to show (no half characters, nothing that may turn out to be part of a stop string),
runs the tool, and says when the answer is over. It knows nothing of tensors, models or batches: any engine can use it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nanochat.inference.sampling import SamplingParams
from nanochat.tokenizer import Tokenizer

Kind = Literal["text", "python", "output", "marker"]
Finish = Literal["stop", "length", "context"]
Tool = Callable[[str], "str | None"]


class Event(NamedTuple):
    """One token of one row. `text` is what can be shown now: often "", sometimes more than one token's."""

    row: int
    token: int
    text: str
    kind: Kind
    """What `text` is. text: the answer; python: an expression for the tool; output: the tool's result; marker: nothing,
    this was a special token."""
    forced: bool
    """True for tokens that the tool put in, which the model did not choose."""
    finish: Finish | None
    """Why the row ends with this token: a stop token or string, max_tokens, a full context; None while it goes on."""


@dataclass(frozen=True)
class Completion:
    """A finished answer. `tokens` ends with the stop token if there was one; `sampled` marks those the model chose."""

    tokens: list[int]
    sampled: list[bool]
    text: str
    """The text parts alone: what a user reads, and what is graded."""
    parts: list[dict[str, str]]
    """text, python and python_output parts in order, as a conversation's assistant message holds them."""
    finish: Finish


@dataclass(frozen=True)
class Markers:
    """Ids of the special tokens that steer generation."""

    python_start: int
    python_end: int
    output_start: int
    output_end: int
    stops: frozenset[int]
    all: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Markers":
        special = tokenizer.specials
        return cls(
            python_start=special["<|python_start|>"],
            python_end=special["<|python_end|>"],
            output_start=special["<|output_start|>"],
            output_end=special["<|output_end|>"],
            stops=frozenset((special["<|assistant_end|>"], special["<|bos|>"])),
            all=frozenset(special.values()),
        )


class StopStrings:
    """Holds text back while its end may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string was met (what follows it is dropped)."""
        if not self.stops:
            return text, False
        text = self.held + text
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


def parts_of(pieces: Iterable[tuple[Kind, str]]) -> list[dict[str, str]]:
    """Pieces of text joined to the parts of an assistant's message."""
    types = {"text": "text", "python": "python", "output": "python_output"}
    parts: list[dict[str, str]] = []
    for kind, text in pieces:
        if text and parts and parts[-1]["type"] == types[kind]:
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": types[kind], "text": text})
    return parts


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class Row:
    """The state of one answer. `forced()` says what has to come next, `accept` takes what did come."""

    def __init__(
        self,
        index: int,
        prompt_length: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        tool: Tool | None,
        context: int,
    ) -> None:
        self.index, self.params, self.tokenizer = index, params, tokenizer
        self.tool = tool if params.tools else None
        self.prompt_length, self.context = prompt_length, context
        self.markers = Markers.of(tokenizer)
        self.decoder = tokenizer.stream_decoder()
        self.stop_strings = StopStrings(params.stop)
        self.mode: Kind = "text"
        self.waiting: deque[int] = deque()  # tokens to be forced in
        self.expression: list[int] = []  # tokens since <|python_start|>
        self.tokens: list[int] = []
        self.sampled: list[bool] = []
        self.pieces: list[tuple[Kind, str]] = []
        self.finish: Finish | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.prompt_length + len(self.tokens)

    def forced(self) -> int | None:
        """The token that has to come next, whatever the model would draw."""
        return self.waiting[0] if self.waiting else None

    def accept(self, token: int) -> Event:
        """Takes the next token, which is the forced one if there is one."""
        forced = bool(self.waiting)
        if forced:
            self.waiting.popleft()
        self.tokens.append(token)
        self.sampled.append(not forced)
        kind, text, met_stop = self.mode, "", False
        marker = token in self.markers.all
        if marker:
            text = self._leftover()
            kind = kind if text else "marker"
            self._switch(token)
        else:
            text = self.decoder.push(token)
            if kind == "python":
                self.expression.append(token)
            elif kind == "text":
                text, met_stop = self.stop_strings.push(text)
        if met_stop or (token in self.markers.stops and not self.params.ignore_eos):
            self.finish = "stop"
        elif self.length >= self.context:
            self.finish = "context"
        elif len(self.tokens) >= self.params.max_tokens:
            self.finish = "length"
        if self.finish and not marker and not met_stop:
            text += self._leftover()
        if text:
            self.pieces.append((kind, text))
        return Event(self.index, token, text, kind, forced, self.finish)

    def completion(self) -> Completion:
        """The finished answer."""
        text = "".join(text for kind, text in self.pieces if kind == "text")
        return Completion(self.tokens, self.sampled, text, parts_of(self.pieces), self.finish or "length")

    def _leftover(self) -> str:
        """Text that waited for more and can wait no longer."""
        text = self.decoder.flush()
        if self.mode == "text":
            text = self.stop_strings.push(text)[0] + self.stop_strings.flush()
        return text

    def _switch(self, token: int) -> None:
        """Changes the mode at a special token, and runs the tool when its expression is complete."""
        markers = self.markers
        if token == markers.python_end and self.mode == "python":
            result = self.tool(self.tokenizer.decode(self.expression)) if self.tool else None
            if result is not None:
                self.waiting.extend((markers.output_start, *self.tokenizer.encode(result), markers.output_end))
        self.expression = []
        modes: dict[int, Kind] = {markers.python_start: "python", markers.output_start: "output"}
        self.mode = modes.get(token, "text")
