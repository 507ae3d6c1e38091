"""Reinforcement learning: the gradient is REINFORCE's, rewards rise, interruptions and ranks do not matter."""

import random
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.tasks import Task, make_task
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.training import metrics, rl, rollouts
from nanochat.training.loop import Stepper
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.rl import RlConfig
from nanochat.training.rollouts import Answer, RolloutBatch, Rollouts, advantages, policy_loss, to_tensors
from nanochat.training.schedules import StepRates, rl_rates_at
from nanochat_kernels import KernelPlan

TINY = RlConfig(
    data="spelling",  # of the built-in world: short questions
    from_tag="tiny",
    tag="run",
    steps=5,
    questions=4,
    samples=4,
    rows=8,
    max_tokens=12,
    eval_every=5,
    eval_problems=6,
    eval_samples=2,
    save_every=2,
    keep_last=9,
    device="cpu",
    dtype="float32",
    kernels="torch",
)
ALONE = Runtime(torch.device("cpu"), torch.float32)


class Wish(Task):
    """An answer is right when it begins with one of the wished-for tokens: a reward that a few steps can raise."""

    name, eval_type = "wish", "generate"

    def __init__(self, first=" abcdefgh"):
        self.first = tuple(first)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        question = {"role": "user", "content": f"Number {index}?"}
        return {"messages": [question, {"role": "assistant", "content": "a"}]}

    def evaluate(self, conversation, completion):
        return completion.startswith(self.first)


@pytest.fixture(scope="session")
def tokenizer(prepared_base):
    return Tokenizer.load(prepared_base / "tokenizer")


def small_model():
    config = GPTConfig(400, 64, layers=2, width=32, heads=2, kv_heads=2, head_dim=16)
    model = GPT(config, KernelPlan.reference())
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # beginning blocks are the identity; make them count
        for block in model.blocks:
            block.attn.o.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def rollouts_of(model, tokenizer, task, runtime=ALONE, **shape):
    settings = {"questions": 4, "samples": 8, "rows": 16, "together": 4, "first_step": 0, "eager": nullcontext} | shape
    return Rollouts(task, Engine(model, tokenizer), runtime, SamplingParams(max_tokens=4, top_k=50), **settings)


def losses(folder, name="loss"):
    lines = [line for line in metrics.read(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(len(lines))), "steps are missing or out of order"
    return [line[name] for line in lines]


def folder_of(base, tag="run"):
    return base / "rl_checkpoints" / tag


# The loss


def test_advantages_have_mean_zero():
    assert advantages([1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5] and advantages([1.0, 1.0]) == [0.0, 0.0]


def test_answers_become_rows():
    """Prompt [1 2], chosen 3, the calculator's 4, chosen 5; the shorter answer is padded."""
    long = Answer([1, 2, 3, 4, 5], [False, False, True, False, True], 1.0, 0.5)
    short = Answer([1, 6, 7], [False, False, True], 0.0, -0.25)
    inputs, targets, weights = to_tensors([long, short], 9, ALONE.device)
    assert inputs.tolist() == [[1, 2, 3, 4], [1, 6, 9, 9]]
    assert targets.tolist() == [[-1, 3, -1, 5], [-1, 7, -1, -1]]
    assert weights.tolist() == [[0, 0.5, 0, 0.5], [0, -0.25, 0, 0]]


def test_the_gradient_is_that_of_reinforce():
    """∇(−Σ A·log p(token) / tokens), written out with log-softmax and an explicit loop."""
    model = small_model()
    answers = [
        Answer([1, 2, 3, 4, 5], [False, False, True, False, True], 1.0, 0.75),
        Answer([1, 6, 7], [False, False, True], 0.0, -0.25),
    ]
    logp = 0.0
    for answer in answers:
        logits = model(torch.tensor([answer.ids[:-1]])).log_softmax(-1)[0]
        for position, (token, chosen) in enumerate(zip(answer.ids[1:], answer.chosen[1:], strict=True)):
            if chosen:
                logp = logp + answer.advantage * logits[position, token]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(-logp / 3, parameters, materialize_grads=True)
    loss = policy_loss(model, RolloutBatch(*to_tensors(answers, 0, ALONE.device), 0.0, 1 / 3))
    assert loss.item() == pytest.approx(-logp.item() / 3, rel=1e-5)
    for found, wanted in zip(torch.autograd.grad(loss, parameters, materialize_grads=True), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_rows_without_a_chosen_token_give_no_nan():
    """An answer that is all forced, and padding alone: loss 0, finite weights, blocks as they were."""
    model = small_model()
    parameters = dict(model.named_parameters())
    optimizer = MuonAdamW(parameters, parameter_groups(parameters, 32, 1.0, 0.0), KernelPlan.reference(), ALONE)
    before = model.blocks[0].mlp.fc.weight.detach().clone()
    empty = to_tensors([Answer([1, 2], [False, False], 0.0, 0.0)] * 3, 0, ALONE.device)
    batch = RolloutBatch(*empty, 0.0, 1.0)
    result = Stepper(model, optimizer, iter([batch]), 1, ALONE, loss=policy_loss).step(0, rl_rates_at(0, 5, 1.0))
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    assert torch.equal(model.blocks[0].mlp.fc.weight, before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_schedule():
    assert [rl_rates_at(step, 4, 0.05).lr for step in (0, 1, 2, 3)] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])


# Rollouts


def test_ranks_ask_what_one_process_asks(tokenizer):
    model = small_model()
    whole = rollouts_of(model, tokenizer, Wish())
    assert [len(set(whole.problems(step))) for step in (0, 1, 9)] == [4, 4, 4]
    assert sorted(whole.problems(0) + whole.problems(1) + whole.problems(2)[:2]) == list(range(10))
    everything = [next(whole), next(whole)]
    assert everything[0].wait_seconds > 0 and everything[1].wait_seconds == 0
    rows = {tuple(row[row >= 0].tolist()) for batch in everything for row in batch.targets}
    found = set()
    for rank in range(2):
        part = rollouts_of(model, tokenizer, Wish(), Runtime(ALONE.device, ALONE.dtype, rank, rank, 1))
        part.runtime = replace(part.runtime, world_size=2)
        part._agree_on_stats = lambda answers, begin: 1
        batch = next(part)
        found |= {tuple(row[row >= 0].tolist()) for row in batch.targets}
    assert found == rows


def test_practice_raises_the_reward(tokenizer):
    torch.manual_seed(0)
    model = small_model()
    parameters = dict(model.named_parameters())
    optimizer = MuonAdamW(parameters, parameter_groups(parameters, 32, 0.3, 0.0), KernelPlan.reference(), ALONE)
    batches = rollouts_of(model, tokenizer, Wish())
    stepper = Stepper(model, optimizer, batches, 2, ALONE, loss=policy_loss)
    rewards = []
    for step in range(25):
        stepper.step(step, StepRates(1.0, 0.9, 0.0))
        rewards.append(batches.stats.reward)
    assert rewards[0] < 0.5 and sum(rewards[-3:]) / 3 > 0.9, rewards
    assert batches.stats.answer_tokens <= 4 and 0 <= batches.stats.mixed <= 1


def test_a_question_that_does_not_fit_is_named(tokenizer):
    model = small_model()
    model.config = replace(model.config, seq_len=8)
    with pytest.raises(NanochatError, match="problem . of wish takes .* tokens, the model's context is 8"):
        next(rollouts_of(model, tokenizer, Wish()))


# Runs


@pytest.fixture(scope="session")
def uninterrupted(prepared_chat):
    """A run of TINY that nothing disturbed, on one thread; not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(prepared_chat))
        patch.setattr(rl, "make_task", lambda name, split: Wish() if name == "spelling" else make_task(name, split))
        assert rl.run(replace(TINY, tag="uninterrupted")) == 0
    torch.set_num_threads(threads)
    return folder_of(prepared_chat, "uninterrupted")


@pytest.fixture
def wish(monkeypatch):
    monkeypatch.setattr(rl, "make_task", lambda name, split: Wish() if name == "spelling" else make_task(name, split))


def test_a_run_from_start_to_end(uninterrupted, prepared_chat):
    assert any(losses(uninterrupted, "reward")) and any(losses(uninterrupted))
    measured = {line["step"]: line for line in metrics.read(uninterrupted / "metrics.jsonl") if "pass@1" in line}
    assert measured.keys() == {0, 5} and measured[0]["pass@2"] >= measured[0]["pass@1"]
    meta = checkpoint.load_meta(uninterrupted)
    assert meta["stage"] == "rl" and meta["finished"] and meta["pass_at"].keys() == {"0", "5"}
    before = checkpoint.load_state(prepared_chat / "sft_checkpoints" / "tiny")
    after = checkpoint.load_state(uninterrupted)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert '"pass_at"' in (prepared_chat / "results" / "rl.json").read_text()


RUN = """
import sys
sys.path.insert(0, {tests!r})
from test_rl import Wish
from nanochat import runtime
from nanochat.training import rl
rl.make_task = lambda name, split: Wish()
r = runtime.start("cpu", "float32")
assert rl.Reinforcement(rl.RlConfig(**({settings!r} | dict(tag=sys.argv[1]))), r).run() == 0
runtime.stop(r)
"""


def script(config):
    return RUN.format(settings=dict(vars(config)), tests=__file__.rpartition("/")[0])


def test_killed_at_a_random_moment_the_losses_repeat_bit_for_bit(
    chat_base, uninterrupted, spawn_ranks, wish, one_thread
):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    folder, kill_after = folder_of(chat_base), rng.randrange(1, 5)
    (process,) = spawn_ranks(script(TINY), ["run"])
    deadline = time.monotonic() + 100
    while len(metrics.read(folder / "metrics.jsonl")) < kill_after and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert rl.run(TINY) == 0
    assert losses(folder) == losses(uninterrupted), f"seed {seed}"
    assert losses(folder, "reward") == losses(uninterrupted, "reward")
    ours, theirs = checkpoint.load_state(folder), checkpoint.load_state(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_give_the_losses_of_one_process(chat_base, uninterrupted, run_ranks, one_thread):
    run_ranks(script(replace(TINY, rows=2)), ["run"], 2)
    assert losses(folder_of(chat_base), "reward") == pytest.approx(losses(uninterrupted, "reward"))
    assert losses(folder_of(chat_base)) == pytest.approx(losses(uninterrupted), abs=1e-5)


def test_practicing_word_problems(chat_base):
    assert rl.run(replace(TINY, data="word-problems", steps=1, eval_every=0, questions=2, rollout_rows=4)) == 0
    assert len(losses(folder_of(chat_base))) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "smoltalk"}, None),
        ({"data": "identity"}, "identity has no answers to check"),
        ({"samples": 1}, "--samples 1 must be at least 2"),
        ({"temperature": 0.0}, "--temperature 0 gives equal answers"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"rows": 3}, "--rows 3.*1, 2, 4, 8, 16"),
        ({"from_tag": "huge"}, "no sft checkpoint called 'huge'"),
    ],
)
def test_wrong_calls(chat_base, monkeypatch, change, words):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(NanochatError if words is None or "sft" in words else UsageError, match=words):
        rl.run(replace(TINY, **change))
    assert not folder_of(chat_base).exists()


def test_another_configuration_is_refused(chat_base, wish):
    rl.run(replace(TINY, steps=1, eval_every=0))
    with pytest.raises(UsageError, match="samples was 4 and is 8"):
        rl.run(replace(TINY, steps=1, eval_every=0, samples=8))
    assert rollouts.IGNORED_TARGET == -1
