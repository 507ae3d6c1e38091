"""Requests that nobody would write: whatever comes, the server answers, and never with a 500.

The quick tier draws from grammars of near-misses; `--long` lets schemathesis read the server's own schema.
"""

import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize"]
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}

wild = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**25), 10**25), st.floats(), st.text(max_size=12),
        st.sampled_from(["\ud800", "\x00", "<|bos|>", "é" * 300, "user", "assistant", "system"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)  # fmt: skip
messages = st.lists(
    st.one_of(
        wild,
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["user", "assistant", "system", "developer"]), wild)},
            optional={"content": wild, "parts": wild, "refusal": wild, "name": wild},
        ),
    ),
    max_size=4,
)
FIELDS = (
    "model n temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty stop seed "
    "ignore_eos priority calculator stream_options user logprobs top_logprobs max_completion_tokens echo extra"
).split()
right = {"messages": st.just([{"role": "user", "content": "hi"}]), "prompt": st.one_of(st.just("hi"), st.just([1, 2]))}
bodies = st.fixed_dictionaries(
    {"max_tokens": st.one_of(st.integers(1, 4), wild)},
    optional={"messages": st.one_of(right["messages"], messages), "prompt": st.one_of(right["prompt"], wild)}
    | {name: st.one_of(st.integers(-2, 3), st.floats(0, 2), st.booleans(), wild) for name in FIELDS},
)


def post(live, path, body):
    response = live.client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 413), (response.status_code, response.text, body)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@given(path=st.sampled_from(PATHS), body=bodies)
@settings(max_examples=150, **QUIET)
def test_near_misses_are_answered(live, path, body):
    post(live, path, json.dumps(body).encode())


@given(
    path=st.sampled_from(PATHS), body=st.one_of(st.binary(max_size=64), wild.map(lambda it: json.dumps(it).encode()))
)
@settings(max_examples=80, **QUIET)
def test_any_bytes_are_answered(live, path, body):
    post(live, path, body)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /%0d%0aX-Injected:1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
def test_broken_http_is_survived(live, raw):
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    assert not answer.startswith(b"HTTP/1.1 5") and b"\r\nX-Injected" not in answer
    assert live.client.get("/health").status_code == 200


@pytest.mark.long
def test_the_schema_fuzzed_by_schemathesis_finds_no_500(live):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (dev extra)")
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_dict(live.client.get("/openapi.json").json())
    schema.config.update(base_url=live.url)
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/ready":
            continue  # answers 503 by design

        @given(case=operation.as_strategy())
        @settings(max_examples=60, **QUIET)
        def call(case):
            nonlocal tried
            if isinstance(case.body, dict) and "max_tokens" in case.body:
                case.body["max_tokens"] = 2
            case.call_and_validate(checks=[not_a_server_error], timeout=30)
            tried += 1

        call()
    assert tried > 200
