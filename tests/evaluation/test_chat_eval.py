"""Grading a chat model: letters, sampled answers, pass@k, ranks, and the command."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

from nanochat.chat_format import render_prompt
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import chat_eval, core
from nanochat.evaluation.chat_eval import ChatEvalConfig, TaskScore, chat_core, evaluate_task, pass_at_k
from nanochat.evaluation.tasks import Task, question_of
from nanochat.evaluation.tasks.choice import ChoiceTask, lettered
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams
from nanochat.model import checkpoint
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan

PARAMS = SamplingParams(temperature=1.0, max_tokens=5, seed=1)


class Letters(ChoiceTask):
    name = "letters"

    def __len__(self):
        return 11

    def __getitem__(self, index):
        letters = "ABCDE"[: 3 + index % 3]
        return lettered("x" * (index * 17 % 60), letters, [str(i) for i in range(len(letters))], letters[index % 3])


class Bytes(Task):
    """Right if the answer's first character is an even one: about half of what a random model says."""

    name, eval_type = "bytes", "generate"

    def __init__(self, size=9, long=()):
        self.size, self.long = size, long

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        question = "?" * (600 if index in self.long else 5 * index)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "!"}]}

    def evaluate(self, conversation, completion):
        return bool(completion) and ord(completion[0]) % 2 == 0


def test_letters_are_read_off_the_logits(model, tokenizer):
    task, engine = Letters(), Engine(model, tokenizer)
    for batch_tokens in (1, 200, 10_000):
        score = evaluate_task(engine, task, PARAMS, batch_tokens=batch_tokens)
        expected = []
        for item in (task[i] for i in range(len(task))):
            with torch.no_grad():
                logits = model(torch.tensor([render_prompt(tokenizer, question_of(item))]))[0, -1]
            best = max(item["letters"], key=lambda letter: logits[ord(letter)].item())
            expected.append(int(best == item["messages"][-1]["content"]))
        assert score.correct == expected and score.kind == "choice" and score.samples == 1
    assert score.centered == pytest.approx((score.accuracy - 0.25) / 0.75)


def test_generated_answers_do_not_depend_on_the_batch(model, tokenizer):
    engine = Engine(model, tokenizer)
    scores = [evaluate_task(engine, Bytes(), PARAMS, samples=4, batch_rows=rows) for rows in (1, 8, 100)]
    assert scores[0].correct == scores[1].correct == scores[2].correct
    assert 0 < sum(scores[0].correct) < 36
    fewer = evaluate_task(engine, Bytes(), PARAMS, samples=4, max_problems=3)
    assert fewer.correct == scores[0].correct[:3]
    other = evaluate_task(engine, Bytes(), replace(PARAMS, seed=2), samples=4)
    assert other.correct != scores[0].correct


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_greedy_answers_are_those_of_one_problem_at_a_time(model, tokenizer, kernels, monkeypatch):
    """Every answer's text, as it is handed to the grader, against the reference engine."""
    served = GPT(model.config, KernelPlan.resolve(kernels, mode="decode"))
    served.load_state_dict(model.state_dict())
    task, heard = Bytes(12, long=(4,)), {}

    def evaluate(item, text):
        heard[len(question_of(item)[0]["content"])] = text
        return True

    monkeypatch.setattr(task, "evaluate", evaluate)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    evaluate_task(Engine(served.eval(), tokenizer), task, params, batch_rows=5)
    engine = Engine(model, tokenizer)
    asked = [question_of(task[index]) for index in range(12) if index != 4]
    expected = {len(q[0]["content"]): engine.generate([render_prompt(tokenizer, q)], params)[0][0].text for q in asked}
    assert heard == expected and len(set(expected.values())) > 6


def test_problems_that_do_not_fit_are_wrong_and_counted(model, tokenizer):
    heard = []
    engine, task = Engine(model, tokenizer), Bytes(4, long=(1, 2))
    score = evaluate_task(engine, task, PARAMS, report=lambda done, total: heard.append((done, total)))
    assert score.too_long == 2 and score.correct[1:3] == [0, 0] and heard[-1] == (4, 4)
    assert evaluate_task(engine, Bytes(1, long=(0,)), PARAMS).accuracy == 0


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    rng = random.Random(0)
    for samples, correct, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 1, 4)):
        marks = [1] * correct + [0] * (samples - correct)
        drawn = [any(rng.sample(marks, k)) for _ in range(4000)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(drawn) / 4000, abs=0.03)
    score = TaskScore("t", "generate", 0.0, 4, [0, 4, 2])
    assert score.accuracy == score.pass_at(1) == 0.5 and score.pass_at(4) == pytest.approx(2 / 3)
    assert score.to_dict()["pass_at"].keys() == {"1", "2", "4"}


def test_chat_core_is_the_mean_centered_accuracy():
    scores = [TaskScore("a", "choice", 0.25, 1, [1, 0]), TaskScore("b", "generate", 0.0, 1, [1, 1, 0])]
    assert chat_core(scores) == pytest.approx((0.25 / 0.75 + 2 / 3) / 2)
    assert math.isclose(chat_core([TaskScore("c", "choice", 0.25, 1, [1, 0, 0, 0])]), 0.0)


def _on_rank(rank, world, path, state, config, tokenizer):
    from nanochat.model.gpt import GPT

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    model = GPT(config)
    model.load_state_dict(state)
    engine = Engine(model, tokenizer)
    scores = [evaluate_task(engine, Letters(), PARAMS), evaluate_task(engine, Bytes(), PARAMS, samples=2)]
    core_result = core.evaluate_core(model, tokenizer, path / "bundle")
    (path / f"{rank}.json").write_text(json.dumps([*(score.correct for score in scores), core_result.tasks[0].correct]))
    torch.distributed.destroy_process_group()


def test_ranks_share_the_problems_and_agree(model, tokenizer, tmp_path, make_bundle):
    """Chat tasks and CORE."""
    engine = Engine(model, tokenizer)
    alone = [evaluate_task(engine, Letters(), PARAMS), evaluate_task(engine, Bytes(), PARAMS, samples=2)]
    expected = [score.correct for score in alone]
    expected.append(core.evaluate_core(model, tokenizer, make_bundle(tmp_path / "bundle")).tasks[0].correct)
    mp.spawn(_on_rank, (2, tmp_path, model.state_dict(), model.config, tokenizer), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


@pytest.fixture
def home(tmp_path, monkeypatch, model, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    tokenizer.save(tmp_path / "tokenizer")
    meta = {"step": 7, "config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "stage": "sft"}
    checkpoint.save(tmp_path / "sft_checkpoints" / "tiny", 7, model.state_dict(), None, meta)
    return tmp_path


def test_the_command(home, capsys):
    config = ChatEvalConfig(
        tasks="builtin:arithmetic,spelling", max_problems=4, max_tokens=4, device="cpu", samples=2, temperature=1.0
    )
    assert chat_eval.run(config) == 0
    written = json.loads((home / "sft_checkpoints" / "tiny" / "chat_eval_000007.json").read_text())
    assert written["tasks"].keys() == {"builtin:arithmetic", "builtin:spelling"}
    assert written["tasks"]["builtin:spelling"]["problems"] == 4
    assert json.loads((home / "results" / "sft.json").read_text())["chat_eval"] == written
    assert checkpoint.load_meta(home / "sft_checkpoints" / "tiny")["chat_core"] == written["chat_core"]
    assert "builtin:arithmetic" in capsys.readouterr().out


def test_without_a_network_the_default_is_what_there_is(home, capsys):
    assert chat_eval.run(ChatEvalConfig(max_problems=2, max_tokens=3, device="cpu")) == 0
    written = json.loads((home / "sft_checkpoints" / "tiny" / "chat_eval_000007.json").read_text())
    assert set(written["missing"]) == {"arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval"}
    assert written["label"] == "ChatCORE over builtin:spelling"
    with pytest.raises(NanochatError, match="NANOCHAT_OFFLINE"):
        chat_eval.run(ChatEvalConfig(tasks="gsm8k", device="cpu"))


@pytest.mark.parametrize(
    "wrong, complaint",
    [({"samples": 0}, "--samples is 0"), ({"samples": 4}, "temperature 0"), ({"max_problems": 0}, "--max-problems"),
     ({"batch_rows": 0}, "--batch-rows")],
)  # fmt: skip
def test_wrong_calls(wrong, complaint):
    with pytest.raises(UsageError, match=complaint):
        ChatEvalConfig(**wrong)


def test_tasks_for_training_cannot_be_graded(home):
    with pytest.raises(UsageError, match="cannot be graded"):
        chat_eval.run(ChatEvalConfig(tasks="builtin:story", device="cpu"))
