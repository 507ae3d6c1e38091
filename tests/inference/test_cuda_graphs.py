"""Replayed decode steps: padding, batch sizes and buffers with a stand-in for the capture; the real one on a GPU."""

import pytest
import torch

from nanochat.inference.batch_engine import BatchConfig, BatchEngine
from nanochat.inference.cuda_graphs import Capturer, GraphRunner
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.step import TorchRunner
from nanochat_kernels import KernelPlan

BOS = 256
GREEDY = SamplingParams(0.0, max_tokens=30, ignore_eos=True)
PROMPTS = [[BOS, *range(40 * n, 40 * n + 5 + 9 * n)] for n in range(5)]


class Recorded:
    """Stands for a capture: the step is run anew at every replay, into one fixed place, and counted."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, step):
        self.captured += 1
        result = step()

        def replay():
            self.replayed += 1
            return result.copy_(step())

        return replay


def engine_of(model, tokenizer, runner) -> BatchEngine:
    return BatchEngine(model, tokenizer, BatchConfig(max_batch=5, max_step_tokens=64, num_blocks=100), runner)


def test_replayed_steps_give_the_same_answers(make_model, tokenizer):
    model, plan = make_model(), KernelPlan.resolve("torch,paged_attention=sdpa")
    params = [SamplingParams(0.0, max_tokens=n, ignore_eos=True, tools=False) for n in (30, 21, 9, 17, 30)]
    expected = engine_of(model, tokenizer, TorchRunner(model, plan)).generate(PROMPTS, params)
    capture = Recorded()
    runner = GraphRunner(TorchRunner(model, plan), model.device, capture=capture)
    engine = engine_of(model, tokenizer, runner)
    assert engine.generate(PROMPTS, params) == expected
    assert set(runner.graphs) == {1, 2, 4, 8} and capture.captured == 4 and capture.replayed > 20
    assert all(memory[-1].isfinite().all() for memory in engine.cache.k), "padding went to the scratch block"
    assert engine.generate(PROMPTS, params) == expected and capture.captured == 4
    with torch.no_grad():
        model.blocks[0].attn.v.weight.mul_(1.5)
    engine.weights_changed()
    assert not runner.graphs
    assert engine.generate(PROMPTS, params) == engine_of(model, tokenizer, TorchRunner(model, plan)).generate(
        PROMPTS, params
    )


def test_large_batches_and_prompts_run_as_they_are(make_model, tokenizer):
    model, plan, capture = make_model(), KernelPlan.resolve("torch,paged_attention=sdpa"), Recorded()
    runner = GraphRunner(TorchRunner(model, plan), model.device, largest=0, capture=capture)
    answers = engine_of(model, tokenizer, runner).generate(PROMPTS, GREEDY)
    assert capture.captured == 0
    runner.largest = 2
    engine = engine_of(model, tokenizer, runner)
    assert engine.generate(PROMPTS, GREEDY) == answers and set(runner.graphs) <= {1, 2}
    assert engine.generate(PROMPTS[:1], GREEDY) == answers[:1] and 1 in runner.graphs
    assert runner.cache is engine.cache


@pytest.mark.gpu
def test_captured_steps_give_the_same_answers(make_model, tokenizer):
    model = make_model().to("cuda")
    plan = KernelPlan.resolve("torch,paged_attention=cuda", device="cuda")
    runner = TorchRunner(model, plan)
    assert runner.capturable
    expected = engine_of(model, tokenizer, runner).generate(PROMPTS, GREEDY)
    captured = GraphRunner(runner, model.device, capture=Capturer(model.device))
    for _ in range(2):
        assert engine_of(model, tokenizer, captured).generate(PROMPTS, GREEDY) == expected
