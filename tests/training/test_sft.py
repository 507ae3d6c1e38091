"""Fine-tuning: what is learned and what is not, rows and ranks that do not matter, interruptions, wrong calls."""

import random
import signal
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from nanochat.chat_format import render
from nanochat.errors import NanochatError, UsageError
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.training import metrics, sft
from nanochat.training.conversations import (
    ConversationBatch,
    ConversationLoader,
    mean_over_targets,
    rows_in_an_epoch,
)
from nanochat.training.loop import Stepper
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.schedules import StepRates, sft_rates_at
from nanochat.training.sft import SftConfig
from nanochat_kernels import KernelPlan

TINY = SftConfig(
    data="builtin",
    from_tag="tiny",
    tag="run",
    steps=12,
    batch_tokens=8 * 128,
    rows=4,
    eval_every=6,
    eval_tokens=512,
    save_every=3,
    keep_last=9,
    device="cpu",
    dtype="float32",
    kernels="torch",
)
ALONE = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def tokenizer(prepared_base):
    return Tokenizer.load(prepared_base / "tokenizer")


def talk(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


TALKS = [talk(f"Say {n} words{' please' * (n % 7)}.", f"They are {'word ' * (n % 11)}.") for n in range(300)]


def loader(tokenizer, runtime=ALONE, talks=TALKS, **shape):
    return ConversationLoader(talks, tokenizer, runtime, **({"rows": 4, "seq_len": 64} | shape))


def folder_of(base, tag="run"):
    return base / "sft_checkpoints" / tag


def losses(folder):
    lines = [line for line in metrics.read(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(len(lines))), "steps are missing or out of order"
    return [line["loss"] for line in lines]


def bpbs(folder):
    return {line["step"]: line["val_bpb"] for line in metrics.read(folder / "metrics.jsonl") if "val_bpb" in line}


# Batches


def test_only_what_the_assistant_says_is_a_target(tokenizer):
    """Every target of every row is found again by rendering the conversations one by one."""
    expected = {}
    for item in TALKS:
        ids, mask = render(tokenizer, item)
        expected[tuple(ids)] = [token if learned else -1 for token, learned in zip(ids, mask, strict=True)][1:]
    seen = 0
    with loader(tokenizer, accumulation=3, seq_len=256) as batches:
        for batch in islice(batches, 3):
            assert batch.inputs.shape == batch.targets.shape == (4, 256)
            for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
                starts = [i for i, token in enumerate(inputs) if token == tokenizer.bos_id]
                assert starts[0] == 0
                for start, end in zip(starts, [*starts[1:], 256], strict=True):
                    if end - start == 1 or end == 256:  # padding, or perhaps a conversation that goes on in the target
                        assert end == 256 or targets[start] == -1
                        continue
                    wanted = expected[tuple(inputs[start:end])]
                    assert targets[start : end - 1] == wanted and targets[end - 1] == -1
                    seen += 1
    assert seen > 20


def test_a_restart_continues_exactly(tokenizer):
    with loader(tokenizer, accumulation=2) as batches:
        first = list(islice(batches, 40))  # 20 steps: more than one epoch
    for step in (1, 7, 19):
        with loader(tokenizer, accumulation=2, state=first[2 * step - 1].state) as batches:
            for ours, theirs in zip(islice(batches, 4), first[2 * step :], strict=False):
                assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.targets, theirs.targets)
                assert ours.share == theirs.share and ours.state == theirs.state


def test_ranks_share_the_rows_of_one_process(tokenizer):
    ranks = [loader(tokenizer, Runtime(ALONE.device, ALONE.dtype, r, r, 2), rows=2, accumulation=2) for r in range(2)]
    with loader(tokenizer, rows=8) as alone, ranks[0], ranks[1]:
        for _ in range(3):
            whole = next(alone)
            for rank, batches in enumerate(ranks):
                parts = [next(batches), next(batches)]
                assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs[rank::2])
                assert parts[0].share == pytest.approx(4 * whole.share)


def test_a_long_conversation_is_cut_and_nonsense_is_named(tokenizer):
    with loader(tokenizer, talks=[talk("long", "word " * 500)]) as batches:
        assert (next(batches).targets >= 0).sum() > 200
    with loader(tokenizer, talks=[{"messages": [{"role": "robot", "content": "?"}]}]) as batches:
        with pytest.raises(NanochatError, match="conversation 0 of the mixture.*robot"):
            next(batches)
    with pytest.raises(UsageError, match="no conversations"):
        loader(tokenizer, talks=[])


def test_the_length_of_an_epoch(tokenizer):
    """The estimate against ten epochs in the middle of a long run."""
    with loader(tokenizer, rows=1) as batches:
        ends = (number for number, batch in enumerate(batches) if batch.state["next"] >= 4000)
        begin = next(ends)
        end = next(number for number, batch in enumerate(batches, begin) if batch.state["next"] >= 7000)
    assert rows_in_an_epoch(TALKS, tokenizer, 64) == pytest.approx((end - begin) / 10, rel=0.25)


def small_stepper(batches, accumulation):
    model = GPT(GPTConfig(60, 16, layers=2, width=32, heads=4, kv_heads=4, head_dim=8))
    model.init_weights(torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    optimizer = MuonAdamW(parameters, parameter_groups(parameters, 32, 1.0, 0.0), KernelPlan.reference(), ALONE)
    return Stepper(model, optimizer, batches, accumulation, ALONE, loss=mean_over_targets)


def test_the_loss_is_a_mean_over_targets_however_they_are_spread():
    """Rows with 16, 1 and 0 targets: two micro-batches give the loss and the update of one."""
    ids = torch.randint(0, 60, (4, 17), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[1, 1:], targets[2:] = -1, -1

    def batches(rows):
        share = (4 // rows) / 17
        return (
            ConversationBatch(ids[i : i + rows, :-1], targets[i : i + rows], 0.0, share, {}) for i in range(0, 4, rows)
        )

    found = []
    for rows in (4, 2, 1):
        stepper = small_stepper(batches(rows), 4 // rows)
        loss = stepper.step(0, StepRates(1.0, 0.9, 0.0)).loss
        found.append((loss, stepper.model.lm_head.weight.detach()))
    reference = small_stepper(batches(4), 1).model
    assert found[0][0] == pytest.approx(reference(ids[:, :-1], targets).item(), rel=1e-6)
    for loss, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(weight, found[0][1], rtol=1e-4, atol=1e-6)


def test_nothing_to_learn_changes_nothing_and_is_finite():
    nothing = ConversationBatch(torch.zeros(2, 16, dtype=torch.int64), torch.full((2, 16), -1), 0.0, 2.0, {})
    stepper = small_stepper(iter([nothing, nothing]), 2)
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters() if "blocks" in name}
    result = stepper.step(0, StepRates(1.0, 0.9, 0.0))
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    for name, parameter in stepper.model.named_parameters():
        assert torch.isfinite(parameter).all()
        if name in before:
            assert torch.equal(parameter, before[name])


def test_the_schedule():
    assert sft_rates_at(0, 100, 0.8) == StepRates(0.8, 0.85, 0.0)
    assert sft_rates_at(50, 100, 0.8).lr == 0.8 and sft_rates_at(75, 100, 0.8).lr == pytest.approx(0.4)
    assert sft_rates_at(99, 100, 0.8).lr == pytest.approx(0.016) and sft_rates_at(300, 999, 1).momentum == 0.95


# Runs


@pytest.fixture(scope="session")
def uninterrupted(prepared_chat):
    """A run of TINY that nothing disturbed, on one thread; not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(prepared_chat))
        assert sft.run(replace(TINY, tag="uninterrupted", chat_core=2, chat_core_tasks="builtin:arithmetic")) == 0
    torch.set_num_threads(threads)
    return folder_of(prepared_chat, "uninterrupted")


def test_a_run_from_start_to_end(uninterrupted, prepared_chat):
    values = losses(uninterrupted)
    assert len(values) == 12 and values[-1] < values[0]
    assert bpbs(uninterrupted).keys() == {6, 12}
    scores = [line for line in metrics.read(uninterrupted / "metrics.jsonl") if "chat_core" in line]
    assert [line["step"] for line in scores] == [6, 12] and "accuracy/builtin:arithmetic" in scores[0]
    meta = checkpoint.load_meta(uninterrupted)
    assert meta["stage"] == "sft" and meta["finished"] and meta["identity"]["base_step"] == 8
    assert "Who are you?" in (prepared_chat / "results" / "sft.json").read_text()


def test_it_begins_with_the_weights_and_the_moments_of_the_base_model(chat_base):
    config = replace(TINY, steps=1, eval_every=0, lr=1e-9)
    sft.run(config)
    ours, base = folder_of(chat_base), chat_base / "base_checkpoints" / "tiny"
    before, after = checkpoint.load_state(base), checkpoint.load_state(ours)
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    old, new = checkpoint.load_optimizer(base), checkpoint.load_optimizer(ours)
    assert new["updates"] == old["updates"] + 1
    name = "lm_head.weight.exp_avg_sq"
    assert (new[name] >= old[name] * 0.95).all() and old[name].max() > 0


RUN = """
import sys
from nanochat import runtime
from nanochat.training.sft import FineTuning, SftConfig
r = runtime.start("cpu", "float32")
assert FineTuning(SftConfig(**({settings!r} | dict(tag=sys.argv[1]))), r).run() == 0
runtime.stop(r)
"""


def script(config):
    return RUN.format(settings=dict(vars(config)))


def test_killed_at_a_random_moment_the_losses_repeat_bit_for_bit(chat_base, uninterrupted, spawn_ranks, one_thread):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    folder, kill_after = folder_of(chat_base), rng.randrange(1, 11)
    (process,) = spawn_ranks(script(TINY), ["run"])
    deadline = time.monotonic() + 100
    while len(metrics.read(folder / "metrics.jsonl")) < kill_after and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sft.run(TINY) == 0
    assert losses(folder) == losses(uninterrupted), f"seed {seed}"
    assert bpbs(folder) == bpbs(uninterrupted)
    ours, theirs = checkpoint.load_state(folder), checkpoint.load_state(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_and_rows_give_the_losses_of_one_process(chat_base, uninterrupted, run_ranks, one_thread):
    run_ranks(script(replace(TINY, rows=1)), ["run"], 2)
    assert np.allclose(losses(folder_of(chat_base)), losses(uninterrupted), atol=1e-5)
    assert bpbs(folder_of(chat_base)) == pytest.approx(bpbs(uninterrupted), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "nonsense"}, "unknown task 'nonsense'"),
        ({"batch_tokens": 100}, "--batch-tokens 100.*use 128"),
        ({"rows": 3}, "--rows 3.*1, 2, 4, 8"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"epochs": 0.0}, "--epochs 0.0"),
        ({"steps": 0}, "--steps 0"),
        ({"resume": "sometimes"}, "--resume 'sometimes'"),
    ],
)
def test_wrong_calls(chat_base, change, words):
    with pytest.raises(UsageError, match=words):
        sft.run(replace(TINY, **change))
    assert not folder_of(chat_base).exists()


def test_what_is_missing_or_changed_is_said(chat_base, base):
    with pytest.raises(NanochatError, match="no base checkpoint called 'huge'.*it has tiny"):
        sft.run(replace(TINY, from_tag="huge"))
    sft.run(replace(TINY, steps=1, eval_every=0))
    with pytest.raises(UsageError, match="lr was 0.8 and is 0.5.*--resume never"):
        sft.run(replace(TINY, steps=1, eval_every=0, lr=0.5))


def test_a_base_model_without_optimizer_state_starts_with_fresh_moments(chat_base, capsys):
    """As an imported one is; activations recomputed in the backward pass change nothing."""
    folder = chat_base / "base_checkpoints" / "tiny"
    meta, state = checkpoint.load_meta(folder), dict(checkpoint.load_state(folder))
    checkpoint.save(folder.with_name("bare"), meta["step"], state, None, meta, None)
    imported = replace(TINY, from_tag="bare", steps=2, eval_every=0)
    assert sft.run(replace(imported, tag="kept")) == 0
    assert "moments start at zero" in capsys.readouterr().out
    assert sft.run(replace(imported, tag="again", checkpoint_activations=True)) == 0
    assert losses(folder_of(chat_base, "kept")) == losses(folder_of(chat_base, "again"))
