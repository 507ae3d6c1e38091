"""OpenAI's own Python client against the whole server: front, worker process, engine, a tiny random model."""

import math

import pytest

openai = pytest.importorskip("openai", reason="the openai client is not installed (dev extra)")

from tests.serving.conftest import wait_until  # noqa: E402

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(model_server):
    with openai.OpenAI(base_url=model_server.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def chat(client, **fields):
    settings = {"model": "nanochat", "messages": HI, "max_tokens": 24, "seed": 7} | fields
    return client.chat.completions.create(**settings)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "nanochat" and client.models.retrieve("nanochat").id == "nanochat"


def test_chat_and_its_stream_are_one_answer(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 24 and whole.usage.prompt_tokens == 6


def test_a_seed_fixes_the_answer_and_n_answers_differ(client):
    first, again, other = chat(client), chat(client), chat(client, seed=8)
    texts = [answer.choices[0].message.content for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    several = chat(client, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].message.content == texts[0]
    assert len({choice.message.content for choice in several.choices}) == 3
    assert chat(client, seed=-5).choices[0].message.content == chat(client, seed=-5).choices[0].message.content


def test_greedy_answers_equal_the_reference_engines(client):
    from nanochat.chat_format import render_prompt
    from nanochat.inference.engine import Engine
    from nanochat.inference.sampling import SamplingParams
    from tests.inference.conftest import random_model
    from tests.serving.fake_engine import byte_tokenizer

    tokenizer = byte_tokenizer()
    reference = Engine(random_model(), tokenizer)
    params = SamplingParams(temperature=0, max_tokens=24)
    ((expected,),) = reference.generate([render_prompt(tokenizer, HI)], params)
    answer = chat(client, temperature=0)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == len(expected.tokens)


def test_stop_strings(client):
    full = chat(client, temperature=0).choices[0].message.content
    stop = full[len(full) // 2 :][:2]
    cut = chat(client, temperature=0, stop=[stop, "never said"])
    assert cut.choices[0].message.content == full[: full.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_logprobs(client):
    choice = chat(client, temperature=0, logprobs=True, top_logprobs=3, ).choices[0]  # fmt: skip
    content = choice.logprobs.content
    assert content and all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in content)
    for entry in content:
        best = entry.top_logprobs[0]
        assert best.token == entry.token and math.isclose(best.logprob, entry.logprob, abs_tol=1e-4)
        assert sum(math.exp(each.logprob) for each in entry.top_logprobs) <= 1 + 1e-4
    pieces = b"".join(bytes(entry.bytes) for entry in content if not entry.token.startswith("<|"))
    assert pieces.decode("utf-8", "replace").startswith(choice.message.content[:4])
    chunks = chat(client, temperature=0, logprobs=True, top_logprobs=3, stream=True)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    older = client.completions.create(model="nanochat", prompt="hi", max_tokens=4, logprobs=2, temperature=0, seed=1)
    assert len(older.choices[0].logprobs.tokens) == older.usage.completion_tokens
    assert all(len(top) == 2 for top in older.choices[0].logprobs.top_logprobs)


def test_penalties_and_limits(client):
    plain = chat(client, temperature=0).choices[0].message.content
    assert chat(client, temperature=0, frequency_penalty=2).choices[0].message.content != plain
    short = client.chat.completions.create(model="nanochat", messages=HI, max_completion_tokens=2, seed=7)
    assert short.usage.completion_tokens <= 2
    extra = {"top_k": 1, "ignore_eos": True, "priority": -1, "calculator": False}
    long = chat(client, temperature=1, max_tokens=100, extra_body=extra)
    assert long.usage.completion_tokens == 100 and long.choices[0].finish_reason == "length"


def test_errors(client):
    with pytest.raises(openai.BadRequestError, match="unknown field 'logit_bias'") as refused:
        chat(client, logit_bias={"5": 1})
    assert refused.value.param == "logit_bias" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat(client, model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(client, messages=[{"role": "user", "content": "x" * 600}])
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="nanochat", prompt=[1, 10_000], max_tokens=1)


def test_cancellation_frees_the_cache(client, model_server):
    stream = chat(client, stream=True, max_tokens=500, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert model_server.router.in_flight == 1
    stream.close()
    wait_until(lambda: model_server.router.in_flight == 0, 2)
    wait_until(lambda: model_server.router.engines[0].stats["blocks_used"] == 0, 2)
    assert model_server.router.engines[0].stats["cancelled"] >= 1


def test_a_conversation_goes_on_and_finds_its_beginning_in_the_cache(client, model_server):
    first = chat(client, messages=[{"role": "user", "content": "once upon a time " * 10}], temperature=0)
    before = model_server.router.engines[0].stats["cached_prompt_tokens"]
    turns = [{"role": "user", "content": "once upon a time " * 10}, first.choices[0].message, HI[0]]
    assert chat(client, messages=turns).choices[0].message.content
    wait_until(lambda: model_server.router.engines[0].stats["cached_prompt_tokens"] >= before + 128, 2)


def test_many_at_once_get_what_each_would_get_alone(client):
    import concurrent.futures

    def greedy(number):
        text = [{"role": "user", "content": f"question {number}" * (1 + number % 4)}]
        return chat(client, messages=text, temperature=0, max_tokens=16).choices[0].message.content

    alone = [greedy(number) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(greedy, range(12)))
    assert together == alone
