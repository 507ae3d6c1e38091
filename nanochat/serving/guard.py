"""What every request passes before a route sees it: name, key, size, and a line in the log after it.

Plain ASGI rather than a framework's middleware, which would hide disconnects from the routes. The body is counted while
it is read; a body too large is read on for a little and thrown away, because a client that is still sending does not
listen for the refusal yet.
"""

import asyncio
import hmac
import logging
import secrets
import time
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serving.metrics import Metrics
from nanochat.serving.openai_api import ApiError

OPEN_PATHS = frozenset(("/", "/health", "/ready"))
KNOWN_PATHS = OPEN_PATHS | {
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics", "/openapi.json",
}  # fmt: skip
LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "[::1]"))
DISCARD = 32 << 20  # bytes of a refused body that are read and dropped
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)

log = logging.getLogger("nanochat.access")


@dataclass(frozen=True)
class GuardConfig:
    """Who may ask, and how much."""

    api_key: str | None = None
    max_body: int = 2 << 20  # bytes
    body_timeout: float = 30.0  # seconds between two pieces of a body
    local_only: bool = True
    """Refuse requests that were made to another name than this machine's: a web page cannot then reach a server
    without a key by having its own name resolve to 127.0.0.1."""


class Guard:
    """The outermost layer but CORS."""

    def __init__(self, app: ASGIApp, config: GuardConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 499
        state = scope.setdefault("state", {})
        state["id"] = secrets.token_hex(12)
        path = scope["path"]

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS, (b"x-request-id", state["id"].encode())]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await self._discard(receive, 0)
                await _respond(refusal, send_on)
            else:
                await self.app(scope, self._counted(scope, receive), send_on)
        finally:
            known = path if path in KNOWN_PATHS else "other"
            self.metrics.requests.labels(known, str(status)).inc()
            log.log(
                logging.DEBUG if path in OPEN_PATHS else logging.INFO,
                "%s %s %s %d %.0f ms, %d tokens in, %d out",
                state["id"], scope["method"], ascii(path[:80]), status, 1000 * (time.monotonic() - begin),
                state.get("tokens", 0), state.get("generated", 0),
            )  # fmt: skip

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        config = self.config
        if config.local_only and config.api_key is None:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOCAL_NAMES:
                return ApiError(
                    403,
                    f"this server answers to localhost only, not to {name[:80]!r}; start it with --host and --api-key "
                    "to serve others",
                    "wrong_host",
                )
        if config.api_key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), config.api_key.encode()):
                return ApiError(401, "a valid API key is needed: send `Authorization: Bearer KEY`", "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > config.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the limit of {self.config.max_body} bytes", "body_too_large")

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with the limits on size and time. HTTPExceptions pass through the framework's body parsing."""
        received, complete = 0, False

        async def counted() -> Message:
            nonlocal received, complete
            if complete:  # from here on it waits for the disconnect
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.config.body_timeout)
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.config.max_body:
                await self._discard(receive, received)
                raise HTTPException(413, self._too_large().message)
            return message

        return counted

    async def _discard(self, receive: Receive, received: int) -> None:
        """Reads the rest of a body that nobody wants, within bounds of size and time."""
        try:
            async with asyncio.timeout(self.config.body_timeout):
                while received < DISCARD:
                    message = await receive()
                    received += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            pass


async def _respond(error: ApiError, send: Send) -> None:
    from nanochat.serving.app import error_response  # the one home of errors' shape

    response = error_response(error)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
