"""Engine outputs in OpenAI's clothes: whole answers, and chunks of a stream.

One `Choice` gathers what the engine says of one answer; a `Form` (chat or completion) turns that into JSON. A call of
the calculator is no text of the answer: in a stream it comes as a chunk with an empty `content` and a field `part` of
type python or python_output; a whole message has `parts`, all of them in order. Clients that know nothing of it read
the text alone.
"""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from nanochat.inference.row import parts_of
from nanochat.serving.worker import Token
from nanochat.tokenizer import Tokenizer

FINISH = {"stop": "stop", "length": "length", "context": "length"}
LOWEST = -9999.0  # JSON has no infinity; OpenAI writes this for it
PART = {"python": "python", "output": "python_output"}


def finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else LOWEST


class Choice:
    """One answer as far as it has come."""

    def __init__(self, keep_tokens: bool) -> None:
        self.pieces: list[tuple[Any, str]] = []
        self.tokens: list[Token] = []  # only where logprobs are wanted
        self.keep_tokens = keep_tokens
        self.count = 0
        self.finish: str | None = None

    def add(self, tokens: Sequence[Token]) -> None:
        self.count += len(tokens)
        self.pieces.extend((token.kind, token.text) for token in tokens if token.text)
        if self.keep_tokens:
            self.tokens.extend(tokens)
        if tokens and tokens[-1].finish:
            self.finish = FINISH.get(tokens[-1].finish, "stop")

    @property
    def text(self) -> str:
        return "".join(text for kind, text in self.pieces if kind == "text")


def usage(prompt: int, answers: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


class Form:
    """What chat and plain completions share. `object` names the whole answer, `chunk_object` a piece of a stream."""

    prefix, object, chunk_object = "", "", ""

    def __init__(self, request_id: str, model: str, tokenizer: Tokenizer, top: int | None) -> None:
        self.id, self.model, self.tokenizer, self.top = f"{self.prefix}-{request_id}", model, tokenizer, top
        self.created = int(time.time())

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage(prompt_tokens, sum(choice.count for choice in choices)),
        }

    def event(self, choices: list[dict[str, Any]], totals: dict[str, int] | None = None) -> bytes:
        """One server-sent event. ASCII alone, so that no proxy can cut a character in two."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if totals is not None:
            body["usage"] = totals
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    def first(self, index: int) -> list[dict[str, Any]]:
        """What a stream begins with, before any token."""
        return []

    def chunks(self, index: int, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Choices for the events that these tokens make: stretches of one kind are joined."""
        made: list[dict[str, Any]] = []
        held: list[Token] = []
        kind, text = "text", ""
        for token in tokens:
            if token.text and token.kind != kind:
                if text or held:
                    made.append(self.piece(index, kind, text, held))
                    text, held = "", []
                kind = token.kind
            text += token.text
            if self.top is not None:
                held.append(token)
        if text or held:
            made.append(self.piece(index, kind, text, held))
        if tokens and tokens[-1].finish:
            made.append(self.last(index, FINISH.get(tokens[-1].finish, "stop")))
        return made

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, index: int, kind: str, text: str, tokens: list[Token]) -> dict[str, Any]:
        raise NotImplementedError

    def last(self, index: int, finish: str) -> dict[str, Any]:
        raise NotImplementedError

    def bytes_of(self, token: int) -> bytes:
        return self.tokenizer.decode_bytes([token])


class ChatForm(Form):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        parts = parts_of(choice.pieces)
        if any(part["type"] != "text" for part in parts):
            message["parts"] = parts
        logprobs = None if self.top is None else self.logprobs(choice.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def first(self, index: int) -> list[dict[str, Any]]:
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]

    def piece(self, index: int, kind: str, text: str, tokens: list[Token]) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if kind in PART:
            delta = {"content": "", "part": {"type": PART[kind], "text": text}}
        made = {"index": index, "delta": delta, "finish_reason": None}
        if self.top is not None:
            made["logprobs"] = self.logprobs(tokens)
        return made

    def last(self, index: int, finish: str) -> dict[str, Any]:
        return {"index": index, "delta": {}, "finish_reason": finish}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Of the tokens that the model chose; the calculator's have no probability."""
        return {
            "content": [
                self._one(token.token, token.logprob)
                | {"top_logprobs": [self._one(id, value) for id, value in token.top_logprobs]}
                for token in tokens
                if not token.forced
            ]
        }

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class TextForm(Form):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any, echo: Sequence[str] = ()) -> None:
        super().__init__(*arguments)
        self.echo = echo
        self.offsets: dict[int, int] = {}

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = None if self.top is None else self.logprobs(index, choice.tokens)
        echo = self.echo[index] if self.echo else ""
        return {"index": index, "text": echo + choice.text, "logprobs": logprobs, "finish_reason": choice.finish}

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, self.echo[index])] if self.echo else []

    def piece(self, index: int, kind: str, text: str, tokens: list[Token]) -> dict[str, Any]:
        made = self._chunk(index, "" if kind in PART else text)
        if kind in PART:
            made["part"] = {"type": PART[kind], "text": text}
        if self.top is not None:
            made["logprobs"] = self.logprobs(index, tokens)
        return made

    def last(self, index: int, finish: str) -> dict[str, Any]:
        return self._chunk(index, "") | {"finish_reason": finish}

    def _chunk(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """OpenAI's older shape: parallel lists, and where each token's text begins."""
        chosen = [token for token in tokens if not token.forced]
        texts = [self.bytes_of(token.token).decode("utf-8", "replace") for token in chosen]
        offset, offsets = self.offsets.get(index, 0), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self.offsets[index] = offset
        tops = [{self._name(id): finite(value) for id, value in token.top_logprobs} for token in chosen]
        return {
            "tokens": [self._name(token.token) for token in chosen],
            "token_logprobs": [finite(token.logprob) for token in chosen],
            "top_logprobs": tops if self.top else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """The token as a text of its own, also when it is half a character: bytes:\\xe2\\x82, as OpenAI writes it."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
