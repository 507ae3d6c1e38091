"""Steps and the loop around them, on a model small enough to reason about."""

import gc
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from nanochat.errors import NanochatError
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.training import loss_scale
from nanochat.training.loop import Run, Stepper, first_not_finite, quiet_garbage_collection, stop_signals
from nanochat.training.loss_scale import LossScaler
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.progress import Display, LossAverage, StepResult
from nanochat.training.schedules import rates_at
from nanochat_kernels import KernelPlan

ALONE = Runtime(torch.device("cpu"), torch.float32)


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor
    wait_seconds: float = 0.25


def batches(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 60, (rows, 17), generator=generator)
        yield Batch(tokens[:, :-1], tokens[:, 1:])


def make(dtype=torch.float32, rows=4, accumulation=1, scaler=None):
    model = GPT(GPTConfig(60, 16, layers=2, width=32, heads=4, kv_heads=4, head_dim=8), dtype=dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    runtime = Runtime(ALONE.device, dtype)
    optimizer = MuonAdamW(parameters, parameter_groups(parameters, 32, 1.0, 0.1), KernelPlan.reference(), runtime)
    return Stepper(model, optimizer, batches(rows), accumulation, runtime, scaler)


def rates(step):
    return rates_at(step, 10)


def test_what_a_step_reports():
    stepper = make(rows=4, accumulation=3)
    seen = list(zip(range(3), batches(4), strict=False))
    expected = sum(stepper.model(b.inputs, b.targets).item() for _, b in seen) / 3
    total = sum(stepper.model(b.inputs, b.targets) / 3 for _, b in seen)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(total, stepper.parameters)]).norm().item()
    result = stepper.step(0, rates(0))
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert (result.tokens, result.data_wait, result.stop, result.skipped) == (3 * 4 * 16, 0.75, False, False)


def test_a_bad_gradient_is_named():
    stepper = make()
    weight = stepper.model.blocks[1].attn.o.weight
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        NanochatError, match="step 3 is not finite: loss 4.*gradients not finite in blocks.1.attn.o.weight;"
    ):
        stepper.step(3, rates(3))


def test_a_bad_loss_is_traced_to_its_source():
    stepper = make()
    with torch.no_grad():
        stepper.model.blocks[0].mlp.fc.weight.fill_(1e30)
        stepper.model.blocks[0].mlp.proj.weight.fill_(1.0)
    before = stepper.model.lm_head.weight.clone()
    with pytest.raises(NanochatError, match="loss of step 5 is nan.*module blocks.0.mlp"):
        stepper.step(5, rates(5))
    assert torch.equal(before, stepper.model.lm_head.weight)  # no update was made with it
    with torch.no_grad():
        stepper.model.wte.weight[3, 3] = float("nan")
    assert first_not_finite(stepper.model, torch.zeros(1, 4, dtype=torch.long)) == "the parameter wte.weight"


def test_float16_overflow_skips_and_recovers():
    scaler = LossScaler(ALONE, scale=2.0**30)
    stepper = make(torch.float16, scaler=scaler)
    before = [p.clone() for p in stepper.parameters]
    result = stepper.step(0, rates(0))
    assert result.skipped and scaler.scale == 2.0**29 and stepper.optimizer.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.parameters, strict=True))
    results = [stepper.step(i, rates(i)) for i in range(1, 25)]
    assert not results[-1].skipped and stepper.optimizer.updates > 0 and 1 <= scaler.scale < 2.0**30
    assert LossScaler(ALONE, **scaler.state_dict()).scale == scaler.scale


def test_the_scale_grows_and_gives_up(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    parameter = torch.nn.Parameter(torch.zeros(3))
    scaler = LossScaler(ALONE, scale=4.0)
    for _ in range(2):
        parameter.grad = torch.tensor([4.0, 8.0, 0.0])
        assert not scaler.unscale([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0, 0.0] and scaler.scale == 8.0
    with pytest.raises(NanochatError, match="overflow even at a loss scale of 1;.*bfloat16"):
        for _ in range(9):
            parameter.grad = torch.tensor([float("inf"), 0.0, 0.0])
            assert scaler.unscale([parameter])


class Recorder:
    def __init__(self):
        self.calls = []

    def save(self, step):
        self.calls.append(("save", step))

    def evaluate(self, step):
        self.calls.append(("evaluate", step))

    def sample(self, step):
        self.calls.append(("sample", step))


class FakeStepper:
    """Makes no updates; asks to stop after `stop_after`."""

    def __init__(self, stop_after=None):
        self.steps, self.stop_after = [], stop_after

    def step(self, step, rates, stop_asked):
        self.steps.append(step)
        return StepResult(1.0, 1.0, 10, 0.1, 0.0, stop=stop_asked or step == self.stop_after)


def run_fake(stepper, **settings):
    recorder = Recorder()
    run = Run(stepper, rates, recorder, display=Display(10, 0, Console(quiet=True)), **settings)
    return run.train(), recorder.calls


def test_boundaries_come_in_order():
    finished, calls = run_fake(FakeStepper(), steps=5, save_every=2, eval_every=2, sample_every=5)
    assert finished
    assert calls == [
        *(("save", 2), ("evaluate", 2), ("save", 4), ("evaluate", 4)),
        *(("save", 5), ("evaluate", 5), ("sample", 5)),
    ]


def test_a_resumed_run_repeats_the_evaluation_but_not_the_checkpoint():
    stepper = FakeStepper()
    _, calls = run_fake(stepper, steps=6, start=4, save_every=2, eval_every=2)
    assert stepper.steps == [4, 5] and calls == [("evaluate", 4), ("save", 6), ("evaluate", 6)]


def test_no_intervals_means_one_checkpoint_at_the_end():
    assert run_fake(FakeStepper(), steps=3) == (True, [("save", 3)])


def test_stopping_saves_and_does_nothing_else():
    assert run_fake(FakeStepper(stop_after=2), steps=9, eval_every=1, sample_every=1)[0] is False
    assert run_fake(FakeStepper(stop_after=2), steps=9, save_every=5) == (False, [("save", 3)])


def test_signals_set_the_event_and_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)
        with pytest.raises(KeyboardInterrupt):  # whoever asks twice means at once
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_garbage_collector_rests_and_comes_back():
    with pytest.raises(RuntimeError), quiet_garbage_collection() as collect:
        assert not gc.isenabled()
        collect(True)
        raise RuntimeError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_average_is_corrected_for_its_start():
    average = LossAverage()
    assert average.add(5.0) == pytest.approx(5.0)
    assert average.add(3.0) == pytest.approx((0.09 * 5 + 0.1 * 3) / 0.19)
    assert LossAverage(**average.state_dict()).mean == average.mean
