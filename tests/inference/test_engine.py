"""Generation with a cache against the plain model, and what must not depend on the batch."""

from dataclasses import replace

import pytest
import torch

from nanochat.errors import UsageError
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams, row_seed

GREEDY = SamplingParams(temperature=0.0, max_tokens=200)
BOS, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = 256, 260, 261, 262, 263, 264


class Scripted:
    """A model made to say certain tokens at certain steps, and left free at the others (None)."""

    def __init__(self, model, script, specials: bool = False) -> None:
        self.model, self.script, self.specials, self.step = model, script, specials, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def logits(self, hidden):
        logits = self.model.logits(hidden).clone()
        if not self.specials:
            logits[:, 256:] = -100.0
        if self.step < len(self.script) and self.script[self.step] is not None:
            logits[:, self.script[self.step]] = 100.0
        self.step += 1
        return logits


def prompts_of(tokenizer, *texts: str) -> list[list[int]]:
    return [[BOS, *tokenizer.encode(text)] for text in texts]


@torch.inference_mode()
def from_scratch(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits without any cache for every token of an answer: (answer, bytes)."""
    return model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1, :256]


@pytest.mark.parametrize(
    "architecture, kv_heads", [("2026", 4), ("2026", 2), ("2026", 1), ("2025-10", 4), ("2025-10", 1)]
)
def test_200_greedy_tokens_equal_recomputation_across_the_window_edge(make_model, tokenizer, architecture, kv_heads):
    model = make_model(architecture, kv_heads)
    [prompt] = prompts_of(tokenizer, "once upon a time, " * 6)  # 109 tokens: the answer crosses the window of 128
    [[answer]] = Engine(Scripted(model, []), tokenizer).generate([prompt], GREEDY)
    assert len(answer.tokens) == 200 and answer.finish == "length"
    assert answer.tokens == from_scratch(model, prompt, answer.tokens).argmax(-1).tolist()
    assert len(set(answer.tokens)) >= 10, "a model that repeats itself proves little"


def test_greedy_tokens_equal_recomputation_step_by_step(make_model, tokenizer):
    model = make_model()
    [prompt] = prompts_of(tokenizer, "once upon a time, " * 6)
    sequence = list(prompt)
    with torch.inference_mode():
        for _ in range(40):
            sequence.append(int(model(torch.tensor([sequence]))[0, -1, :256].argmax()))
    [[answer]] = Engine(Scripted(model, []), tokenizer).generate([prompt], replace(GREEDY, max_tokens=40))
    assert prompt + answer.tokens == sequence


def test_generation_across_tool_calls_equals_recomputation(make_model, tokenizer):
    model = make_model()
    [prompt] = prompts_of(tokenizer, "how much is it? " * 7)
    call = [PYTHON_START, *tokenizer.encode("12*12"), PYTHON_END]
    output = [OUTPUT_START, *tokenizer.encode("144"), OUTPUT_END]
    free = [None] * (6 + len(output))  # after the call its output is forced, whatever the model would say
    script = [*[None] * 5, *call, *free, *call]
    [[answer]] = Engine(Scripted(model, script), tokenizer).generate([prompt], GREEDY)
    first = 5 + len(call)
    assert answer.tokens[5 : first + len(output)] == call + output
    second = 5 + len(call) + len(free)
    assert answer.tokens[second : second + len(call) + len(output)] == call + output
    assert [i for i, sampled in enumerate(answer.sampled) if not sampled] == [
        *range(first, first + len(output)),
        *range(second + len(call), second + len(call) + len(output)),
    ]
    expected = from_scratch(model, prompt, answer.tokens).argmax(-1).tolist()
    scripted = {*range(5, first + len(output)), *range(second, second + len(call) + len(output))}
    assert all(answer.tokens[i] == expected[i] for i in range(200) if i not in scripted)
    assert [part["type"] for part in answer.parts[:4]] == ["text", "python", "python_output", "text"]
    assert [part["text"] for part in answer.parts[1:3]] == ["12*12", "144"]
    assert "144" not in answer.text


def test_a_batch_of_different_prompts_equals_one_at_a_time(make_model, tokenizer):
    engine = Engine(Scripted(make_model(), []), tokenizer)
    prompts = prompts_of(tokenizer, "a", "a longer prompt, " * 12, "of middling length", "b" * 130)
    params = [SamplingParams(0.8, top_k=40, max_tokens=n, seed=n) for n in (70, 30, 60, 9)]
    together = [answer for [answer] in engine.generate(prompts, params)]
    alone = [engine.generate([prompt], p)[0][0] for prompt, p in zip(prompts, params, strict=True)]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [len(a.tokens) for a in together] == [70, 30, 60, 9]


def test_samples_share_a_prefill_and_equal_their_own_seeds(make_model, tokenizer):
    engine = Engine(Scripted(make_model(), []), tokenizer)
    prompts = prompts_of(tokenizer, "tell me", "tell me something else")
    params = SamplingParams(1.0, max_tokens=20, seed=11)
    answers = engine.generate(prompts, params, samples=3)
    assert len({tuple(a.tokens) for row in answers for a in row}) == 6
    for prompt, row in zip(prompts, answers, strict=True):
        for sample, answer in enumerate(row):
            [[alone]] = engine.generate([prompt], replace(params, seed=row_seed(11, sample)))
            assert alone.tokens == answer.tokens
    assert answers == engine.generate(prompts, params, samples=3)
    assert answers != engine.generate(prompts, replace(params, seed=12), samples=3)


@pytest.mark.parametrize("marker", [ASSISTANT_END, BOS])
def test_stop_tokens_end_a_row(make_model, tokenizer, marker):
    model = Scripted(make_model(), [None, None, marker])
    [[answer]] = Engine(model, tokenizer).generate(prompts_of(tokenizer, "hi"), GREEDY)
    assert answer.finish == "stop" and len(answer.tokens) == 3 and answer.tokens[-1] == marker


def test_stop_strings_are_cut_and_never_shown(make_model, tokenizer):
    script = tokenizer.encode("one two STOP three")
    engine = Engine(Scripted(make_model(), script), tokenizer)
    params = replace(GREEDY, stop=("STOP", "three"))
    events = list(engine.stream(prompts_of(tokenizer, "count"), params))
    assert "".join(event.text for event in events) == "one two "
    assert events[-1].finish == "stop" and len(events) == len("one two STOP")


def test_streamed_text_has_no_half_characters(make_model, tokenizer):
    script = [*tokenizer.encode("naïve 🙂!"), 0xF0, 0x9F]
    engine = Engine(Scripted(make_model(), script), tokenizer)
    events = list(engine.stream(prompts_of(tokenizer, "hi"), replace(GREEDY, max_tokens=len(script))))
    assert "".join(event.text for event in events) == "naïve 🙂!\ufffd"
    assert all("\ufffd" not in event.text for event in events[:-1])


def test_the_context_limit_ends_a_row_and_full_rows_stand_still(make_model, tokenizer):
    engine = Engine(Scripted(make_model(), []), tokenizer, context=150)
    prompts = [[BOS] * 149, [BOS] * 140, [BOS] * 3, [BOS] * 4, [BOS] * 5]
    answers = [answer for [answer] in engine.generate(prompts, GREEDY)]
    assert [a.finish for a in answers] == ["context"] * 5
    assert [len(a.tokens) for a in answers] == [1, 10, 147, 146, 145]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == from_scratch(engine.model.model, prompt, answer.tokens).argmax(-1).tolist()


def test_a_model_that_has_generated_can_still_be_trained(make_model, tokenizer):
    """Whatever generation leaves behind in the model (rotary tables, say) must serve a backward pass too."""
    model = make_model(seed=9)
    Engine(model, tokenizer).generate([[BOS, 1, 2]], replace(GREEDY, max_tokens=3))
    ids = torch.arange(20)[None]
    model(ids, ids).backward()
    assert model.blocks[0].attn.q.weight.grad.abs().sum() > 0


def test_penalties_change_what_is_drawn(make_model, tokenizer):
    engine = Engine(Scripted(make_model(), []), tokenizer)
    prompts = prompts_of(tokenizer, "abc", "abcdef")
    params = [
        replace(GREEDY, max_tokens=60, frequency_penalty=10.0, presence_penalty=10.0),
        replace(GREEDY, max_tokens=60),
    ]
    [punished], [free] = engine.generate(prompts, params)
    assert len(set(punished.tokens)) == 60
    assert free.tokens == engine.generate(prompts[1:], params[1])[0][0].tokens


def test_an_unknown_expression_forces_nothing(make_model, tokenizer):
    script = [PYTHON_START, *tokenizer.encode("import os"), PYTHON_END, 65, ASSISTANT_END]
    [[answer]] = Engine(Scripted(make_model(), script), tokenizer).generate(prompts_of(tokenizer, "hi"), GREEDY)
    assert all(answer.sampled) and answer.text == "A"


def test_tools_can_be_switched_off(make_model, tokenizer):
    script = [PYTHON_START, *tokenizer.encode("1+1"), PYTHON_END, 65, ASSISTANT_END]
    engine = Engine(Scripted(make_model(), script), tokenizer)
    [[answer]] = engine.generate(prompts_of(tokenizer, "hi"), replace(GREEDY, tools=False))
    assert all(answer.sampled) and len(answer.tokens) == len(script)


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5),
     ("min_p", 1.0), ("repetition_penalty", 0.0), ("presence_penalty", 99.0), ("max_tokens", 0),
     ("stop", ("",)), ("seed", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=field):
        replace(GREEDY, **{field: value})


def test_prompts_that_cannot_run_are_refused(make_model, tokenizer):
    engine = Engine(make_model(), tokenizer)
    with pytest.raises(UsageError, match="no tokens"):
        engine.generate([[]], GREEDY)
    with pytest.raises(UsageError, match="512.*shorten"):
        engine.generate([[BOS] * 512], GREEDY)
    with pytest.raises(UsageError, match="2 sampling settings for 1 prompts"):
        engine.generate([[BOS]], [GREEDY, GREEDY])
    with pytest.raises(UsageError, match="at least 1"):
        engine.generate([[BOS]], GREEDY, samples=0)
    assert engine.generate([], GREEDY) == []
