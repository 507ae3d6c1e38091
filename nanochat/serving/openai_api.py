"""What may be asked over HTTP: OpenAI's requests as strict pydantic models, and the shape of its errors.

A field that is not listed is refused rather than ignored: a client that sets `logit_bias` should learn that it has no
effect here. Types are strict too ("temperature": "1" is an error), numbers must be finite, text must be valid Unicode.
Bounds are narrower than an int64 everywhere, so that nothing a client sends can overflow further down.

Beyond OpenAI's fields: top_k, min_p, repetition_penalty, ignore_eos, priority and calculator (run the tool or not). An
assistant's message may carry `parts`, the calls of the calculator among them, as the server's own answers do.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.errors import UsageError
from nanochat.inference.sampling import SamplingParams, row_seed
from nanochat.tokenizer import Tokenizer

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64  # of one /v1/completions request
_TOKENS = 1 << 24  # above any context
_STOPS = 16

Text = Annotated[str, Field(max_length=1 << 24)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class ApiError(Exception):
    """An answer that is not the one hoped for: HTTP status, and OpenAI's `code`, `type` and `param`."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        names = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object. What came from the client is cut and freed of half characters."""
        message = self.message.encode("utf-8", "replace").decode()
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()[:100]
        return {"error": {"message": message[:2000], "type": self.type, "param": param, "code": self.code}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message. Only an assistant's may be other than text."""

    type: Literal["text", "python", "python_output"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    parts: Annotated[list[TextPart], Field(max_length=1024)] | None = None
    """An assistant's message as this server gave it; goes before `content`."""
    refusal: None = None
    """Clients send an answer back as they got it; it is always null."""

    def for_template(self) -> dict[str, Any]:
        """As `chat_format.Conversation.parse` takes it."""
        content: Any = self.content if self.parts is None or self.role != "assistant" else self.parts
        if isinstance(content, list):
            content = [{"type": part.type, "text": part.text} for part in content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What both kinds of request share."""

    model: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_TOKENS)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    ignore_eos: bool = False
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    calculator: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted and not used, as it changes no answer."""

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to report with each token; None for not even its own."""
        raise NotImplementedError

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """ApiError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")

    def params(self, room: int) -> list[SamplingParams]:
        """One set for each of the n choices, for a prompt that leaves `room` tokens. ApiError when more are asked."""
        wanted = self.wanted_tokens
        if wanted is not None and wanted > room:
            raise ApiError(
                400,
                f"max_tokens is {wanted}, but the prompt leaves room for {room} in the model's context; ask for fewer "
                "or shorten the prompt",
                "context_length_exceeded",
                "max_tokens",
            )
        given = {
            name: value
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )  # fmt: skip
            if (value := getattr(self, name)) is not None
        }
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(63) if self.seed is None else self.seed & ((1 << 63) - 1)
        return [
            SamplingParams(
                **given,
                max_tokens=wanted or room,
                stop=stop,
                seed=row_seed(seed, choice),
                tools=self.calculator,
                ignore_eos=self.ignore_eos,
                logprobs=self.wanted_logprobs,
            )
            for choice in range(self.n or 1)
        ]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_TOKENS)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens are two names of one limit and differ; give one",
                param="max_completion_tokens",
            )


Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(Sampling):
    """POST /v1/completions. A text is begun with <|bos|>; token ids are taken as they are."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = False

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported: prompts are not scored", param="echo")
        if (self.n or 1) * len(self.prompts()) > MAX_PROMPTS:
            raise ApiError(400, f"n times the prompts is more than {MAX_PROMPTS} answers; split the request", param="n")

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a chat as the model would be given it."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    model: Annotated[str, Field(max_length=256)] | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")


def check_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids; UsageError for one outside the vocabulary."""
    if (largest := max(ids)) >= tokenizer.vocab_size:
        raise UsageError(f"token id {largest} is outside the vocabulary; ids are 0 to {tokenizer.vocab_size - 1}")
    return ids


def invalid_request(errors: list[dict[str, Any]]) -> ApiError:
    """pydantic's complaints as one 400. Of a union's alternatives only the first complaint is told."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part != "body"]
    # alternatives of a union put the names of types in the path; fields are what a client knows
    shown = ".".join(part for part in where if part.isidentifier() or part.isdigit()) or "body"
    kind = first.get("type")
    if kind == "extra_forbidden":
        name = where[-1] if where else "?"
        message, code = f"unknown field {name!r}: it is not supported here, and never silently ignored", "unknown_field"
    elif kind == "missing":
        message, code = f"{shown} is missing", "missing_field"
    elif kind == "json_invalid":
        detail = (first.get("ctx") or {}).get("error", "")
        message, code = f"the body is not valid JSON: {detail}", "invalid_json"
    else:
        message, code = f"{shown}: {first.get('msg', 'not valid')}", "invalid_value"
    param = where[0] if where and not where[0].isdigit() else None  # digits: where the JSON broke off
    return ApiError(400, message, code, param)
