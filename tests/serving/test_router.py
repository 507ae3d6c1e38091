"""The router: who gets a request, and what happens when an engine dies, hangs or cannot start."""

import os
import signal
import threading

import pytest

from nanochat.serving.router import HASH_BLOCK, REMEMBERED, Engine, Limits, chain_of
from tests.serving.conftest import all_ready, live_server, wait_until
from tests.serving.fake_engine import FakeBuild


def ask(live, text, **fields):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3} | fields
    return live.client.post("/v1/chat/completions", json=body)


def test_chains_are_equal_as_far_as_texts_are():
    a, b = list(range(4 * HASH_BLOCK)), list(range(4 * HASH_BLOCK))
    b[2 * HASH_BLOCK] += 1
    assert chain_of(a)[:2] == chain_of(b)[:2] and not set(chain_of(a)[2:]) & set(chain_of(b)[2:])
    assert len(chain_of(a[:-1])) == 3 and chain_of([1] * (HASH_BLOCK - 1)) == []
    engine = Engine(0)
    engine.remember(chain_of(a))
    assert engine.matched(chain_of(b)) == 2 and engine.matched([]) == 0
    for number in range(REMEMBERED):
        engine.remember([number])
    assert len(engine.prefixes) == REMEMBERED and engine.matched(chain_of(a)) == 0


def test_requests_go_where_their_beginning_is_and_otherwise_where_there_is_least(live):
    router = live.router
    long = "a" * 4 * HASH_BLOCK
    ask(live, long)
    (home,) = [engine for engine in router.engines if engine.matched(chain_of(live_ids(live, long)))]
    for number in range(6):
        ask(live, long + str(number))
    others = [engine for engine in router.engines if engine is not home]
    assert not any(engine.matched(chain_of(live_ids(live, long))) for engine in others)
    with live.client.stream("POST", "/v1/chat/completions", json={
        "messages": [{"role": "user", "content": "SLOW"}], "stream": True, "max_tokens": 200,
    }) as response:  # fmt: skip
        lines = response.iter_lines()
        next(lines)
        busy = [len(engine.jobs) for engine in router.engines]
        assert sorted(busy) == [0, 1]
        chosen = router._choose(router.engines, [])
        assert not chosen.jobs


def live_ids(live, text):
    return live.client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]


@pytest.mark.parametrize("how", ["crash", pytest.param("kill", marks=pytest.mark.long)])
def test_a_dead_engine_is_replaced_and_costs_only_its_own_requests(how):
    with live_server(workers=2) as live:
        all_ready(live)
        answers = {}
        slow = [
            threading.Thread(target=lambda n=n: answers.__setitem__(n, ask(live, f"SLOW {n}", max_tokens=60)))
            for n in range(4)
        ]
        for thread in slow:
            thread.start()
        wait_until(lambda: sum(len(engine.jobs) for engine in live.router.engines) == 4)
        if how == "crash":
            response = ask(live, "CRASH")
            assert response.status_code == 503 and response.json()["error"]["code"] == "engine_died"
            assert "retry-after" in response.headers
        else:
            os.kill(live.router.engines[0].process.pid, signal.SIGKILL)
        for thread in slow:
            thread.join()
        codes = sorted(answer.status_code for answer in answers.values())
        assert codes == [200, 200, 503, 503]
        assert all(len(a.json()["choices"][0]["message"]["content"].split()) == 60
                   for a in answers.values() if a.status_code == 200)  # fmt: skip
        assert ask(live, "hello").status_code == 200  # the other one goes on
        all_ready(live)
        assert live.client.get("/ready").json()["engines"] == 2 and live.metric("nanochat_engine_restarts_total") == 1
        assert live.router.reserved == 0


def test_a_stream_says_that_its_engine_died_and_a_silent_engine_is_ended():
    with live_server(limits=Limits(max_batch=4, stall=1.0)) as live:
        all_ready(live)
        body = {"messages": [{"role": "user", "content": "SLOW"}], "stream": True, "max_tokens": 300}
        with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            first = live.router.engines[0].process.pid
            hanging = threading.Thread(target=ask, args=(live, "HANG"))
            hanging.start()
            rest = [line for line in lines if line]
        hanging.join()
        assert '"code": "engine_died"' in rest[-1]
        all_ready(live)
        assert live.router.engines[0].process.pid != first
        assert ask(live, "hello").status_code == 200


def test_an_engine_that_cannot_start_ends_the_server():
    with live_server(FakeBuild(fails="there is no checkpoint")) as live:
        stopped = threading.Event()
        live.router.on_fatal = stopped.set
        wait_until(lambda: live.router.fatal or stopped.is_set())
        assert live.router.fatal == "there is no checkpoint"
        assert ask(live, "hello").status_code == 503 and live.client.get("/ready").status_code == 503
        assert live.client.get("/health").status_code == 200
