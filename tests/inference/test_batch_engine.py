"""The serving engine against the reference engine, and what must not depend on what else is being served."""

from dataclasses import replace

import pytest
import torch

from nanochat.errors import NanochatError, UsageError
from nanochat.inference.batch_engine import BatchConfig, BatchEngine, Output, Request
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams, row_seed
from nanochat.inference.step import TorchRunner
from nanochat_kernels import KernelPlan

GREEDY = SamplingParams(temperature=0.0, max_tokens=80)  # longer prompts cross the window of 128
BOS, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = 256, 260, 261, 262, 263, 264


class Scripted:
    """A model, and its own runner, made to say certain tokens at certain places of an answer; specials nowhere else.

    Places are absolute positions, so that it makes no difference in which step a token is computed.
    """

    def __init__(self, model, script=()) -> None:
        self.model, self.script = model, dict(script)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, ids, cache=None):
        start = torch.zeros(len(ids), dtype=torch.int64) if cache is None else cache.lengths
        self.at = start + ids.size(1)
        return self.model.hidden(ids, cache)

    def logits(self, hidden):
        return self.changed(self.model.logits(hidden), self.at)

    def changed(self, logits, positions):
        logits = logits.clone()
        logits[:, 256:] = -100.0
        for row, position in enumerate(positions.tolist()):
            if position in self.script:
                logits[row, self.script[position]] = 100.0
        return logits


class ScriptedRunner(TorchRunner):
    def __init__(self, model: Scripted) -> None:
        super().__init__(model.model, KernelPlan.resolve("torch,paged_attention=sdpa"))
        self.scripted, self.rows_seen = model, []

    def __call__(self, batch, cache):
        self.rows_seen.append(len(batch.tokens))
        return self.scripted.changed(super().__call__(batch, cache), batch.positions[batch.outputs] + 1)


def engine_of(model, tokenizer, script=(), **config) -> BatchEngine:
    config = {"max_batch": 8, "max_step_tokens": 64, "num_blocks": 200, **config}
    return BatchEngine(model, tokenizer, BatchConfig(**config), ScriptedRunner(Scripted(model, script)))


def prompts_of(tokenizer, *texts: str) -> list[list[int]]:
    return [[BOS, *tokenizer.encode(text)] for text in texts]


def tokens_of(answers) -> list[list[int]]:
    return [answer.tokens for [answer] in answers]


def run(engine: BatchEngine) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    return outputs


PROMPTS = ("once upon a time, " * 6, "a", "b" * 130, "once upon a time, " * 6 + "there", "of middling length " * 3)


@pytest.mark.parametrize("architecture, kv_heads", [("2026", 4), ("2026", 1), ("2025-10", 2)])
def test_greedy_answers_equal_the_reference_engines_across_the_window_edge(
    make_model, tokenizer, architecture, kv_heads
):
    model, prompts = make_model(architecture, kv_heads), prompts_of(tokenizer, *PROMPTS)
    expected = Engine(Scripted(model), tokenizer).generate(prompts, GREEDY)
    answers = engine_of(model, tokenizer).generate(prompts, GREEDY)
    assert answers == expected
    assert all(len(set(answer.tokens)) >= 6 for [answer] in answers), "a model that repeats itself proves little"


def test_sampled_answers_equal_the_reference_engines(make_model, tokenizer):
    model, prompts = make_model(), prompts_of(tokenizer, *PROMPTS)
    params = [
        SamplingParams(0.8, top_k=40, max_tokens=30, seed=5),
        SamplingParams(1.0, top_p=0.9, max_tokens=40, seed=6, frequency_penalty=0.4),
        SamplingParams(1.2, min_p=0.02, max_tokens=50, seed=7, repetition_penalty=1.3, presence_penalty=0.1),
        SamplingParams(0.0, max_tokens=20),
        SamplingParams(1.0, max_tokens=35, seed=9),
    ]
    expected = Engine(Scripted(model), tokenizer).generate(prompts, params, samples=3)
    assert engine_of(model, tokenizer, max_batch=6).generate(prompts, params, samples=3) == expected
    assert (
        expected[1][1].tokens
        == tokens_of(engine_of(model, tokenizer).generate(prompts[1:2], replace(params[1], seed=row_seed(6, 1))))[0]
    )


def test_tool_calls_equal_the_reference_engines(make_model, tokenizer):
    model = make_model()
    [prompt] = prompts_of(tokenizer, "how much is it? " * 7)
    call = [PYTHON_START, *tokenizer.encode("12*12"), PYTHON_END]
    script = {len(prompt) + 5 + i: token for i, token in enumerate(call)}
    script |= {len(prompt) + 40 + i: token for i, token in enumerate(call)}
    expected = Engine(Scripted(model, script), tokenizer).generate([prompt], GREEDY)
    engine = engine_of(model, tokenizer, script)
    answers = engine.generate([prompt], GREEDY)
    assert answers == expected
    [[answer]] = answers
    output = [OUTPUT_START, *tokenizer.encode("144"), OUTPUT_END]
    assert answer.tokens[12:17] == output and answer.sampled[12:17] == [False] * 5
    assert 6 in engine.runner.rows_seen, "the call's last token and the forced ones are computed together"
    engine.add(Request("off", tuple(prompt), GREEDY, tool=False))
    assert not any(output.forced for output in run(engine)["off"])


def test_answers_do_not_depend_on_company_chunks_preemption_or_the_cache(make_model, tokenizer):
    """One small pool for all, against every request alone in a large one."""
    model, prompts = make_model(), prompts_of(tokenizer, *PROMPTS)
    params = [replace(GREEDY, max_tokens=n, seed=n) for n in (60, 50, 70, 40, 80)]
    params[1] = replace(params[1], temperature=0.9)
    alone = [engine_of(model, tokenizer).generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    for config in (
        {"num_blocks": 13, "max_step_tokens": 16, "block_size": 16},
        {"num_blocks": 60, "max_step_tokens": 9, "block_size": 7, "prefix_cache": False},
        {"num_blocks": 100, "max_batch": 2},
    ):
        engine = engine_of(model, tokenizer, **config)
        assert engine.generate(prompts, params) == alone
        stats = engine.stats()
        assert stats.blocks_used == 0 and stats.running == stats.waiting == 0
        if config["num_blocks"] == 13:
            assert stats.preemptions > 0


@torch.inference_mode()
def test_a_rows_logits_are_the_same_bits_in_any_company(make_model, tokenizer):
    """Decode of one request alone, then among others that are decoded and prefilled."""
    model = make_model()

    def logits_of(others: int) -> torch.Tensor:
        engine = engine_of(model, tokenizer, prefix_cache=False)
        seen = []
        inner = engine.runner

        def runner(batch, cache):
            result = TorchRunner.__call__(inner, batch, cache)
            if len(batch.outputs):
                seen.append(result[0])
            return result

        engine.runner = runner
        engine.add(Request("mine", tuple(prompts_of(tokenizer, "tell me a story")[0]), replace(GREEDY, max_tokens=12)))
        for number in range(others):
            prompt = prompts_of(tokenizer, f"{number} and more " * (number + 1))[0]
            engine.add(Request(str(number), tuple(prompt), replace(GREEDY, max_tokens=30)))
        run(engine)
        return torch.stack(seen[:12])

    alone = logits_of(0)
    for others in (1, 2, 5):
        assert torch.equal(alone, logits_of(others))


def test_the_second_turn_computes_only_what_is_new(make_model, tokenizer):
    engine = engine_of(make_model(), tokenizer)
    [prompt] = prompts_of(tokenizer, "long history, " * 20)
    [[answer]] = engine.generate([prompt], replace(GREEDY, max_tokens=20))
    second = [*prompt, *answer.tokens, *tokenizer.encode("and then?")]
    before = engine.stats().cached_prompt_tokens
    engine.runner.rows_seen.clear()
    [[again]] = engine.generate([second], replace(GREEDY, max_tokens=5))
    assert engine.stats().cached_prompt_tokens - before >= len(prompt)
    assert engine.runner.rows_seen[0] <= 16 + len("and then?")
    assert again == engine_of(engine.model, tokenizer, prefix_cache=False).generate([second], replace(
        GREEDY, max_tokens=5))[0][0]  # fmt: skip


def test_changed_weights_are_not_answered_from_the_cache(make_model, tokenizer):
    model = make_model()
    engine = engine_of(model, tokenizer)
    prompts = prompts_of(tokenizer, *PROMPTS[:2])
    before = engine.generate(prompts, GREEDY)
    with torch.no_grad():
        model.blocks[0].attn.v.weight.mul_(1.5)
    engine.weights_changed()
    after = engine.generate(prompts, GREEDY)
    assert after != before and after == engine_of(model, tokenizer).generate(prompts, GREEDY)


def test_samples_share_their_prompt(make_model, tokenizer):
    engine = engine_of(make_model(), tokenizer, max_step_tokens=256)
    [prompt] = prompts_of(tokenizer, "x" * 95)
    engine.generate([prompt], SamplingParams(max_tokens=3), samples=8)
    assert engine.runner.rows_seen[0] == 96 + 7 * 16, "96 tokens once; at least the last block of each for its logits"


@pytest.mark.parametrize("speculate", [1, 4, 9])
def test_guessing_ahead_changes_nothing_but_the_number_of_steps(make_model, tokenizer, speculate):
    model = make_model()
    prompts = prompts_of(tokenizer, "one two three one two three one two", "abcabcabc", "nothing twice")
    call = [PYTHON_START, *tokenizer.encode("7*6"), PYTHON_END]
    script = {60 + i: ord("ab"[i % 2]) for i in range(60)} | {130 + i: token for i, token in enumerate(call)}
    script |= {150 + i: token for i, token in enumerate(call)}
    params = [
        replace(GREEDY, max_tokens=130),
        replace(GREEDY, max_tokens=111),
        SamplingParams(0.7, max_tokens=120, seed=3),
    ]
    plain, guessing = (engine_of(model, tokenizer, script, speculate=n) for n in (0, speculate))
    assert guessing.generate(prompts, params) == plain.generate(prompts, params)
    assert guessing.stats().steps < plain.stats().steps - 20
    assert guessing.stats().blocks_used == 0


def test_stop_strings_logprobs_and_the_end_token(make_model, tokenizer):
    model = make_model()
    [prompt] = prompts_of(tokenizer, "count")
    script = {len(prompt) + i: token for i, token in enumerate(tokenizer.encode("one STOP more"))}
    engine = engine_of(model, tokenizer, script)
    engine.add(Request("a", tuple(prompt), replace(GREEDY, stop=("STOP",), logprobs=3)))
    engine.add(Request("b", tuple(prompt), replace(GREEDY, max_tokens=4)))
    outputs = run(engine)
    assert "".join(output.text for output in outputs["a"]) == "one "
    assert [output.finish for output in outputs["a"]][-2:] == [None, "stop"]
    for output in outputs["a"]:
        assert len(output.top_logprobs) == 3 and output.top_logprobs[0] == (output.token, output.logprob)
        assert output.logprob == pytest.approx(0.0, abs=1e-3)
    assert all(output.logprob is None for output in outputs["b"]) and outputs["b"][-1].finish == "length"
    ends = {len(prompt) + 2: ASSISTANT_END}
    for ignore, length in ((False, 3), (True, 9)):
        engine = engine_of(model, tokenizer, ends)
        [[answer]] = engine.generate([prompt], replace(GREEDY, max_tokens=9, ignore_eos=ignore))
        assert len(answer.tokens) == length


def test_cancelling_frees_at_once_and_leaves_the_others_alone(make_model, tokenizer):
    model = make_model()
    prompts = prompts_of(tokenizer, *PROMPTS)
    expected = tokens_of(engine_of(model, tokenizer).generate(prompts, replace(GREEDY, max_tokens=40)))
    engine = engine_of(model, tokenizer, max_batch=3)
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), replace(GREEDY, max_tokens=40)))
    outputs: dict[str, list[int]] = {}
    for step in range(400):
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output.token)
        if step == 8:
            used = engine.stats().blocks_used
            engine.cancel("0")  # running
            assert engine.stats().blocks_used < used
            engine.cancel("4")  # waiting
            engine.cancel("nobody")
    assert not engine.has_work and engine.stats().cancelled == 2 and engine.stats().blocks_used == 0
    assert [outputs[n] for n in "123"] == expected[1:4]


def test_a_failing_step_ends_what_ran_and_nothing_else(make_model, tokenizer):
    engine = engine_of(make_model(), tokenizer, max_batch=2)
    expected = engine.generate([[BOS, 1, 2]], replace(GREEDY, max_tokens=5))
    for number in range(3):
        engine.add(Request(str(number), (BOS, 1, 2), replace(GREEDY, max_tokens=5)))
    engine.step()
    working, engine.runner = engine.runner, lambda batch, cache: 1 / 0
    assert [(output.id, output.finish) for output in engine.step()] == [("0", "error"), ("1", "error")]
    assert isinstance(engine.error, ZeroDivisionError) and engine.stats().errors == 1
    engine.runner = working
    assert [output.token for output in run(engine)["2"]] == expected[0][0].tokens
    engine.runner = lambda batch, cache: 1 / 0
    with pytest.raises(NanochatError, match="division by zero"):
        engine.generate([[BOS]], GREEDY)
    assert not engine.has_work


@pytest.mark.parametrize(
    "tokens, params, told",
    [((), GREEDY, "no tokens"), ((BOS, 265), GREEDY, "265 is not a token id"), ((-1,), GREEDY, "-1 is not"),
     ((10**30,), GREEDY, "is not a token id"), ((1,) * 512, GREEDY, "512.*shorten"),
     ((1,) * 400, GREEDY, "480 tokens need 30 blocks of the full cache, which has 20")],
)  # fmt: skip
def test_what_can_never_run_is_refused(make_model, tokenizer, tokens, params, told):
    engine = engine_of(make_model(), tokenizer, num_blocks=20)
    with pytest.raises(UsageError, match=told):
        engine.add(Request("x", tokens, params))
    assert not engine.has_work and engine.stats().blocks_used == 0


def test_calls_that_make_no_sense_are_refused(make_model, tokenizer):
    engine = engine_of(make_model(), tokenizer)
    engine.add(Request("x", (BOS,), GREEDY))
    with pytest.raises(UsageError, match="'x' already"):
        engine.add(Request("x", (BOS,), GREEDY))
    with pytest.raises(UsageError, match="1 requests are on their way"):
        engine.generate([[BOS]], GREEDY)
    engine.cancel("x")
    with pytest.raises(UsageError, match="2 sampling settings for 1 prompts"):
        engine.generate([[BOS]], [GREEDY, GREEDY])
    with pytest.raises(UsageError, match="at least 1"):
        engine.generate([[BOS]], GREEDY, samples=0)
    with pytest.raises(UsageError, match="max_step_tokens is 8"):
        BatchConfig(max_batch=9, max_step_tokens=8)
    with pytest.raises(NanochatError, match="too small.*one sequence of 512 tokens"):
        BatchEngine(make_model(), tokenizer, BatchConfig(cache_bytes=1000))
    assert engine.generate([], GREEDY) == []
