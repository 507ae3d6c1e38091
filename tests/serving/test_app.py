"""The API over real sockets with an engine that says what it is told."""

import json

import httpx
import pytest

from tests.serving.conftest import wait_until

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def sse(response: httpx.Response) -> list[dict]:
    """The events of a stream, which has to end with [DONE]."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_a_whole_chat_answer(live):
    answer = live.client.post("/v1/chat/completions", json=HELLO).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "nanochat"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "w0 w1 w2 "} and choice["finish_reason"] == "length"
    prompt = len("hello") + 4  # <|bos|> <|user_start|> … <|user_end|> <|assistant_start|>
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3}


def test_a_streamed_chat_answer(live):
    body = HELLO | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = sse(response)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = {0: "", 1: ""}
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "w0 w1 w2 ", 1: "w0 w1 w2 "}
    assert [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]] == ["length"] * 2
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 6


def test_completions_of_texts_and_ids(live):
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 1, "echo": True}
    answer = live.client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abw0 ", "abw0 ", "cw0 ", "cw0 "]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3 + 2
    answer = live.client.post("/v1/completions", json={"prompt": [256, 97], "max_tokens": 2}).json()
    assert answer["choices"][0]["text"] == "w0 w1 " and answer["usage"]["prompt_tokens"] == 2


def test_calls_of_the_calculator_stand_beside_the_text(live):
    body = {"messages": [{"role": "user", "content": "TOOL"}], "max_tokens": 9}
    message = live.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42."},
    ]
    assert message == {"role": "assistant", "content": "It is 42.", "parts": parts}
    with live.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        deltas = [event["choices"][0]["delta"] for event in sse(response)]
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 42."
    streamed = [delta["part"] for delta in deltas if "part" in delta]
    assert "".join(part["text"] for part in streamed if part["type"] == "python") == "6*7"
    # what the server said may be sent back as it came
    turns = [HELLO["messages"][0], message | {"refusal": None}, {"role": "user", "content": "why?"}]
    ids = live.client.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert "".join(chr(id) if id < 256 else "|" for id in ids) == "||hello||It is |6*7||42|42.||why?||"


def test_facts(live):
    assert live.client.get("/health").json() == {"status": "ok"}
    assert live.client.get("/ready").json() == {"ready": True, "engines": 2, "of": 2, "draining": False}
    (model,) = live.client.get("/v1/models").json()["data"]
    assert model["id"] == "nanochat" and model["context"] == 2048
    assert live.client.get("/v1/models/nanochat").json() == model
    assert live.client.get("/v1/models/other").status_code == 404
    assert live.client.post("/tokenize", json={"prompt": "hi"}).json() == {
        "tokens": [256, 104, 105], "count": 3, "context": 2048,
    }  # fmt: skip
    page = live.client.get("/")
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert live.metric("nanochat_generated_tokens_total") > 0


LONE = "\\ud800"
REFUSED = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 100_000, 400),
    (b'"text"', 400),
    (b"null", 400),
    (b'{"messages": []}', 400),
    (b'{"messages": "hello"}', 400),
    (b'{"messages": [{"role": "user"}]}', 400),
    (b'{"messages": [{"role": "user", "content": 7}]}', 400),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', 400),
    (b'{"messages": [{"role": "assistant", "content": "x"}]}', 400),
    (f'{{"messages": [{{"role": "user", "content": "{LONE}"}}]}}'.encode(), 400),
    (f'{{"messages": [{{"role": "user", "content": "x"}}], "{LONE}": 1}}'.encode(), 400),
    (f'{{"messages": [{{"role": "user", "content": "x"}}], "stop": ["{LONE}"]}}'.encode(), 400),
] + [
    (b'{"messages": [{"role": "user", "content": "x"}], ' + field + b"}", status)
    for field, status in [
        (b'"temperature": NaN', 400),
        (b'"temperature": 1e999', 400),
        (b'"temperature": -1', 400),
        (b'"temperature": "1"', 400),
        (b'"temperature": true', 400),
        (b'"temperature": ' + b"9" * 400, 400),
        (b'"seed": ' + b"9" * 5000, 400),
        (b'"seed": 1e400', 400),
        (b'"seed": 1.5', 400),
        (b'"max_tokens": 0', 400),
        (b'"max_tokens": 100000000000000000000', 400),
        (b'"max_tokens": 2600', 400),
        (b'"n": 1000', 400),
        (b'"top_k": 18446744073709551616', 400),
        (b'"top_p": 0', 400),
        (b'"stop": [""]', 400),
        (b'"stop": ' + json.dumps(["x"] * 100).encode(), 400),
        (b'"logit_bias": {}', 400),
        (b'"top_logprobs": 3', 400),
        (b'"logprobs": true, "top_logprobs": 21', 400),
        (b'"stream_options": {"include_usage": true}', 400),
        (b'"max_tokens": 3, "max_completion_tokens": 4', 400),
        (b'"model": "gpt-5"', 404),
    ]
]


@pytest.mark.parametrize("body, status", REFUSED, ids=[repr(body[-40:]) for body, _ in REFUSED])
def test_bad_bodies_are_refused(live, body, status):
    response = live.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error_of(response)


@pytest.mark.parametrize("prompt", [[265], [-1], [2**40], [[1, 2], [300]], [1.5], ["a", 1], [], [[]], {"a": 1}, None])
def test_bad_prompts_are_refused(live, prompt):
    response = live.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert response.status_code == 400, response.text
    error_of(response)


def test_messages_of_errors_help(live):
    def complaint(**fields):
        return error_of(live.client.post("/v1/chat/completions", json=HELLO | fields))

    assert complaint(logit_bias={})["message"].startswith("unknown field 'logit_bias'")
    assert complaint(logit_bias={})["param"] == "logit_bias"
    assert complaint(temperature=-1)["message"].startswith("temperature: ")
    long = [{"role": "user", "content": "x" * 2600}]
    assert complaint(messages=long)["code"] == "context_length_exceeded"
    assert complaint(max_tokens=2045)["code"] == "context_length_exceeded"
    assert "take turns" in complaint(messages=HELLO["messages"] * 2)["message"]
    assert error_of(live.client.get("/nowhere"))["type"] == "not_found_error"
    assert live.client.get("/v1/chat/completions").status_code == 405
    wrong_type = live.client.post(
        "/v1/chat/completions", content=json.dumps(HELLO), headers={"content-type": "text/plain"}
    )
    assert wrong_type.status_code in (400, 415)


def test_large_bodies_are_refused_while_they_are_read(live):
    def pieces():  # no Content-Length: the limit has to be noticed on the way
        for _ in range(160):
            yield b" " * 65536

    for content in (pieces(), b" " * 10_000_000):
        response = live.client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 413, response.text
        assert "limit" in error_of(response)["message"]


def test_a_key_is_asked_for_on_everything_but_health_and_the_page(strict):
    wrong = (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic s3cret"},
        {"authorization": b"Bearer \xff"},
    )
    for headers in wrong:
        for method, path in (
            ("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/tokenize"),
            ("GET", "/openapi.json"), ("GET", "/nothing"),
        ):  # fmt: skip
            response = httpx.request(method, strict.url + path, headers=headers)
            assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/"):
            assert httpx.get(strict.url + path, headers=headers).status_code == 200
    assert strict.client.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_other_origins_and_names_are_refused_unless_asked_for(live, strict):
    asks = {"origin": "http://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(live.url + "/v1/models", headers=asks).headers
    allowed = httpx.options(strict.url + "/v1/models", headers=asks).headers
    assert allowed["access-control-allow-origin"] == "http://a.example"
    assert live.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert live.client.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200


SLOW = {"messages": [{"role": "user", "content": "SLOW"}], "max_tokens": 400}


def test_too_much_is_refused_with_a_time_to_wait(strict):
    with strict.client.stream("POST", "/v1/chat/completions", json=SLOW | {"stream": True}) as response:
        lines = response.iter_lines()  # kept: httpx ends the stream when it is collected
        next(lines)
        for more in ({"n": 3}, {"max_tokens": 120}):  # too many answers, too many tokens
            refused = strict.client.post("/v1/chat/completions", json=HELLO | more)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
    wait_until(lambda: strict.router.reserved == 0)
    assert strict.client.post("/v1/chat/completions", json=HELLO | {"max_tokens": 120}).status_code == 200


def test_a_client_that_leaves_stops_its_answers(live):
    before = sum(engine.stats.get("cancelled", 0) for engine in live.router.engines)
    with live.client.stream("POST", "/v1/chat/completions", json=SLOW | {"stream": True, "n": 2}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        live.client.post("/v1/chat/completions", json=SLOW, timeout=0.3)
    # 400 steps would take 8 s
    wait_until(lambda: live.router.in_flight == live.router.reserved == 0, 2)
    wait_until(lambda: sum(engine.stats.get("cancelled", 0) for engine in live.router.engines) == before + 3, 2)
    assert live.metric("nanochat_engine_running") == 0


def test_time_outs(strict):
    response = strict.client.post("/v1/chat/completions", json=SLOW)
    assert response.status_code == 504 and error_of(response)["code"] == "timeout"
    with strict.client.stream("POST", "/v1/chat/completions", json=SLOW | {"stream": True}) as streamed:
        last = [line for line in streamed.iter_lines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: strict.metric("nanochat_engine_running") == 0)


def test_no_prompt_reaches_the_log_unless_asked_for(live, strict, caplog):
    secret = HELLO | {"messages": [{"role": "user", "content": "the tulips are blue"}]}
    for server, log_prompts in ((live, False), (strict, True)):
        caplog.clear()
        with caplog.at_level("DEBUG"):
            assert server.client.post("/v1/chat/completions", json=secret).status_code == 200
            assert server.client.post("/v1/chat/completions", json=secret | {"tulips are blue": 1}).status_code == 400
            wait_until(lambda: "POST '/v1/chat/completions' 400" in caplog.text)
        assert ("tulips" in caplog.text) == log_prompts


def test_an_engine_that_fails_a_request_says_so(live):
    response = live.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "ODD"}]})
    assert response.status_code == 503 and error_of(response)["code"] == "engine_error"
