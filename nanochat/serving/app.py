"""The HTTP front: routes, and what one request goes through between its body and its last token.

A streamed answer's status waits for its first token, so that whatever goes wrong before it (a full queue, a dying
engine) is a proper status with an error body; later, it is an event with an `error` in it. While the answer is made
somebody listens on the connection: a client that goes away gives up its place in the batch within one step.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nanochat import __version__
from nanochat.chat_format import render_prompt
from nanochat.errors import NanochatError, UsageError
from nanochat.serving import ui
from nanochat.serving.answers import ChatForm, Choice, Form, TextForm, usage
from nanochat.serving.guard import Guard, GuardConfig
from nanochat.serving.metrics import Metrics
from nanochat.serving.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Sampling,
    TokenizeRequest,
    check_ids,
    invalid_request,
)
from nanochat.serving.router import Job, Router
from nanochat.serving.worker import Info
from nanochat.tokenizer import Tokenizer

THREAD_ABOVE = 20_000  # characters from which a prompt is tokenized beside the event loop
SEND_GRACE = 30.0  # seconds beyond the request's time-out that a client may take to read the rest

log = logging.getLogger("nanochat.serving")


@dataclass(frozen=True)
class AppConfig:
    """What the application needs to know beside its engines."""

    name: str = "nanochat"
    request_timeout: float = 600.0
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    guard: GuardConfig = field(default_factory=GuardConfig)


class EventStream(Response):
    """Server-sent events, the first of which is already there."""

    def __init__(self, first: bytes, events: AsyncIterator[bytes], patience: float) -> None:
        super().__init__(media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.first, self.events, self.patience = first, events, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.patience):  # a client that never reads does not hold its place for ever
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": self.first, "more_body": True})
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self.events.aclose()  # type: ignore[attr-defined]


class Service:
    """Prompts to answers: what the routes share."""

    def __init__(self, router: Router, tokenizer: Tokenizer, metrics: Metrics, config: AppConfig) -> None:
        self.router, self.tokenizer, self.metrics, self.config = router, tokenizer, metrics, config
        self.longest_token = max(map(len, tokenizer.ranks()))
        self.created = int(time.time())

    def info(self) -> Info:
        info = self.router.info
        if info is None:
            raise ApiError(503, "no engine is ready yet; try again shortly", "not_ready", retry_after=2)
        return info

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.config.name:
            raise ApiError(
                404, f"the model {name[:80]!r} does not exist; this server has {self.config.name!r}", "model_not_found",
                "model",
            )  # fmt: skip

    async def encode(self, messages: Any) -> list[int]:
        """The ids of a text, or of messages; a long one is worked on in a thread."""
        size = len(messages) if isinstance(messages, str) else sum(_size(message) for message in messages)
        if size > self.longest_token * self.info().context:
            raise ApiError(
                400,
                f"the prompt has {size} characters, which no context of {self.info().context} tokens holds; shorten it",
                "context_length_exceeded",
            )
        work = self._encode_text if isinstance(messages, str) else self._encode_chat
        if size > THREAD_ABOVE:
            return await asyncio.to_thread(work, messages)
        return work(messages)

    def _encode_text(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def _encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        if self.info().chat:
            return render_prompt(self.tokenizer, messages)
        last = messages[-1]["content"]  # a base model knows no turns: it continues the last text
        return self._encode_text(last if isinstance(last, str) else "".join(part["text"] for part in last or ()))

    @contextlib.asynccontextmanager
    async def work(self, request: Request, body: Sampling, prompts: Sequence[list[int]]) -> AsyncIterator[Job]:
        """A job that ends with its client, its time, or its answers, whichever comes first."""
        body.check()
        context = self.info().context
        sets = []
        for ids in prompts:
            check_ids(ids, self.tokenizer)
            if len(ids) >= context:
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens, which leaves no room in the model's context of {context}; "
                    "shorten it",
                    "context_length_exceeded",
                    "messages" if isinstance(body, ChatRequest) else "prompt",
                )
            sets.append((ids, body.params(context - len(ids))))
        job = self.router.submit(sets, body.priority)
        request.state.tokens = sum(map(len, prompts))
        self.metrics.prompted.inc(request.state.tokens)
        if self.config.log_prompts:
            log.info("prompt of %s: %r", request.state.id, [self.tokenizer.decode(ids) for ids in prompts])

        def give_up(error: ApiError) -> None:
            job.fail(error)
            self.router.cancel(job)

        async def listen() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            give_up(ApiError(499, "the client went away", "disconnected"))

        limit = self.config.request_timeout
        late = ApiError(504, f"the answer took longer than {limit:g} s and was given up; ask for less", "timeout")
        timer = asyncio.get_running_loop().call_later(limit, give_up, late)
        listener = asyncio.create_task(listen())
        try:
            yield job
            self.metrics.finished(time.monotonic() - job.submitted)
        finally:
            timer.cancel()
            listener.cancel()
            self.router.cancel(job)

    async def tokens(self, request: Request, job: Job) -> AsyncIterator[tuple[int, list[Any]]]:
        """(answer, its new tokens) as they come, measured."""
        last: dict[int, float] = {}
        while fresh := await job.take():
            now = time.monotonic()
            for index, tokens in fresh.items():
                if index in last:
                    for _ in tokens:
                        self.metrics.between.observe((now - last[index]) / len(tokens))
                elif not last:
                    self.metrics.first.observe(now - job.submitted)
                last[index] = now
                self.metrics.tokens(len(tokens))
                request.state.generated = getattr(request.state, "generated", 0) + len(tokens)
                yield index, tokens

    async def whole(self, request: Request, body: Sampling, prompts: Sequence[list[int]], form: Form) -> Response:
        async with self.work(request, body, prompts) as job:
            choices = [Choice(body.wanted_logprobs is not None) for _ in job.ids]
            async for index, tokens in self.tokens(request, job):
                choices[index].add(tokens)
        return JSONResponse(form.whole(choices, sum(map(len, prompts))))

    async def events(
        self, request: Request, body: Sampling, prompts: Sequence[list[int]], form: Form
    ) -> AsyncIterator[bytes]:
        """The stream's events. ApiError before the first of them; afterwards an event tells it."""
        begun, count = False, 0
        try:
            async with self.work(request, body, prompts) as job:
                async for index, tokens in self.tokens(request, job):
                    if not begun:
                        begun = True
                        for choice in range(len(job.ids)):
                            for piece in form.first(choice):
                                yield form.event([piece])
                    count += len(tokens)
                    made = form.chunks(index, tokens)
                    if made:
                        yield b"".join(form.event([piece]) for piece in made)
            if body.include_usage:
                yield form.event([], usage(sum(map(len, prompts)), count))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            if not begun:
                raise
            yield b"data: " + json.dumps(error.body()).encode() + b"\n\n"

    async def answer(self, request: Request, body: Sampling, prompts: Sequence[list[int]], form: Form) -> Response:
        if not body.stream:
            return await self.whole(request, body, prompts, form)
        events = self.events(request, body, prompts, form)
        first = await anext(events)
        return EventStream(first, events, self.config.request_timeout + SEND_GRACE)


def _size(message: dict[str, Any]) -> int:
    content = message["content"] or ""
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def error_response(error: ApiError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def create_app(router: Router, tokenizer: Tokenizer, metrics: Metrics, config: AppConfig) -> FastAPI:
    """The application. Its lifespan starts the router; whoever runs it stops the router, who knows how long to wait."""
    service = Service(router, tokenizer, metrics, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        router.start()
        yield

    app = FastAPI(title="nanochat", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _handle_errors(app)
    _add_answers(app, service)
    _add_facts(app, service)
    app.add_middleware(Guard, config=config.guard, metrics=metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )  # fmt: skip
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(UsageError)
    async def usage_error(_: Request, error: NanochatError) -> Response:
        return error_response(ApiError(400, str(error), "invalid_value"))

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        says = {404: f"there is nothing at {request.url.path[:100]!r}", 405: "this path takes another method"}
        response = error_response(ApiError(error.status_code, says.get(error.status_code, str(error.detail))))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "an error of the server, which has logged it", "internal_error"))


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        ids = await service.encode([message.for_template() for message in body.messages])
        form = ChatForm(request.state.id, service.config.name, service.tokenizer, body.wanted_logprobs)
        return await service.answer(request, body, [ids], form)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        given = body.prompts()
        prompts = [
            await service.encode(prompt) if isinstance(prompt, str) else check_ids(prompt, service.tokenizer)
            for prompt in given
        ]
        echo: list[str] = []
        if body.echo:
            texts = [each if isinstance(each, str) else service.tokenizer.decode(each) for each in given]
            echo = [text for text in texts for _ in range(body.n or 1)]
        form = TextForm(request.state.id, service.config.name, service.tokenizer, body.wanted_logprobs, echo=echo)
        return await service.answer(request, body, prompts, form)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        body.check()
        given: Any = body.prompt
        if body.messages is not None:
            given = [message.for_template() for message in body.messages]
        ids = await service.encode(given)
        return JSONResponse({"tokens": ids, "count": len(ids), "context": service.info().context})


def _add_facts(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        facts: dict[str, Any] = {"id": service.config.name, "object": "model", "created": service.created}
        facts["owned_by"] = "nanochat"
        info = service.router.info
        if info is not None:
            facts |= {"context": info.context, "chat": info.chat, "checkpoint": info.name}
        return facts

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model())

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        router = service.router
        engines = sum(engine.info is not None for engine in router.engines)
        facts = {"ready": router.ready, "engines": engines, "of": len(router.engines), "draining": router.draining}
        return JSONResponse(facts, 200 if router.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page, policy = ui.page()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)
