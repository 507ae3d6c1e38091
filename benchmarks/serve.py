"""`nanochat bench serve`: the serving engine without a server: a batch of requests, as fast as it will go.

    nanochat bench serve --depth 20                                         # on a GPU: 256 requests
    nanochat bench serve --depth 4 --requests 32 --scale 0.1                # on a CPU
    nanochat bench serve --depth 12 --requests 16 --scale 0.2 --alone 4     # and some of them one at a time
    nanochat bench serve --depth 4 --requests 16 --chats --alone 8          # short chats behind one system prompt

The work is the one that others publish this figure for: random token ids, seed 0, lengths uniform in 100–1024 in and
out, the end of an answer ignored; at full size 133,966 tokens of output. Weights are random: nothing here depends on
what the model says. `--scale` shortens all lengths. `--chats` asks for another kind of work instead: prompts of 64
tokens of which 48 are the same for all and stay in the cache, answers of 128.

Reported: tokens of output per second, of prompts and output per second, tokens per step, preemptions, memory of the
cache. `--alone N` runs the first N requests one at a time in an engine of the same kind and gives the ratio.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from benchmarks import harness
from nanochat import runtime
from nanochat.errors import UsageError
from nanochat.inference.batch_engine import BatchConfig, BatchEngine, Request
from nanochat.inference.runner import WeightsName, make_runner
from nanochat.inference.sampling import SamplingParams
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat_kernels import KernelPlan

SHORTEST, LONGEST = 100, 1024
CHAT_SYSTEM, CHAT_PROMPT, CHAT_ANSWER = 48, 64, 128
SPECIALS = 9


@dataclass(frozen=True)
class ServeConfig:
    """Throughput of the serving engine on a batch of random requests."""

    depth: int = 12
    """Layers of the model."""
    requests: int = 256
    """How many."""
    scale: float = 1.0
    """Lengths are multiplied by this: for machines that are slow."""
    chats: bool = False
    """Short chats behind one system prompt, instead of the published work."""
    alone: int = 0
    """Also run the first so many requests one at a time."""
    max_batch: int = 256
    """Requests that are computed at the same time."""
    max_step_tokens: int = 0
    """Tokens of a step; 0 = 4096 on CUDA, 512 elsewhere."""
    speculate: int = 0
    """Tokens guessed ahead."""
    temperature: float = 0.0
    """0 is greedy."""
    vocab_size: int = 32768
    """Of the model."""
    seq_len: int = 2048
    """Context of the model."""
    weights: WeightsName = "auto"
    """How weights are held."""
    device: runtime.DeviceName = "auto"
    """auto, cuda, cpu."""
    dtype: runtime.DtypeName = "auto"
    """What the model computes in."""
    kernels: str = "auto"
    """auto, torch, fused, op=backend,..."""
    threads: Annotated[int, tyro.conf.arg(name="threads")] = 0
    """Of torch on a CPU; 0 = its default."""
    seed: int = 0
    """Of lengths, tokens and weights."""
    out: str | None = None
    """File or folder for the rows."""

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("requests", 1), ("alone", 0), ("max_batch", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not 0.01 <= self.scale <= 1:
            raise UsageError(f"--scale is {self.scale}; it must be from 0.01 to 1")


def requests_of(config: ServeConfig) -> list[Request]:
    """Lengths and tokens, drawn in the order in which the published benchmark draws them: prompts, then lengths."""
    draw = random.Random(config.seed)
    if config.chats:
        params = SamplingParams(config.temperature, max_tokens=CHAT_ANSWER, ignore_eos=True)
        system, *own = [
            tuple(draw.randrange(config.vocab_size - SPECIALS) for _ in range(length))
            for length in [CHAT_SYSTEM] + [CHAT_PROMPT - CHAT_SYSTEM] * config.requests
        ]
        return [Request(str(number), system + text, params, tool=False) for number, text in enumerate(own)]
    low, high = max(1, round(SHORTEST * config.scale)), max(1, round(LONGEST * config.scale))
    largest = min(10_000, config.vocab_size - SPECIALS - 1)
    prompts = [tuple(draw.randint(0, largest) for _ in range(draw.randint(low, high))) for _ in range(config.requests)]
    outputs = [draw.randint(low, high) for _ in range(config.requests)]
    return [
        Request(str(number), prompt, SamplingParams(config.temperature, max_tokens=output, ignore_eos=True), tool=False)
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def any_tokenizer(vocab_size: int) -> Tokenizer:
    """All bytes, then pairs of them: every id has a text, which is all that is asked of it here."""
    pairs = (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    tokens = itertools.chain((bytes([byte]) for byte in range(256)), pairs)
    return Tokenizer.from_ranks({token: i for i, token in enumerate(itertools.islice(tokens, vocab_size - SPECIALS))})


def run_batch(engine: BatchEngine, requests: list[Request]) -> float:
    """Seconds for all of them."""
    begin = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            if output.finish == "error":
                raise harness.HarnessError(f"a step failed: {engine.error}")
    return time.perf_counter() - begin


def make_engine(config: ServeConfig, model: GPT, max_batch: int) -> BatchEngine:
    step = config.max_step_tokens or (4096 if model.device.type == "cuda" else 512)
    settings = BatchConfig(max_batch, max(step, max_batch), prefix_cache=config.chats, speculate=config.speculate)
    return BatchEngine(model, any_tokenizer(config.vocab_size), settings, make_runner(model, config.weights))


def main() -> int:
    config = tyro.cli(ServeConfig, description=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = harness.pick_device(config.device)
    dtype, _ = runtime.choose_dtype(config.dtype, device)
    plan = KernelPlan.resolve(config.kernels, device=device, dtype=dtype, mode="decode")
    with torch.device(device):
        shape = GPTConfig.from_depth(config.depth, config.vocab_size, config.seq_len)
        model = GPT(shape, plan, dtype).eval()
        model.init_weights(torch.Generator(device).manual_seed(config.seed))
    requests = requests_of(config)
    rows = harness.Rows("serve", device, out=config.out)
    lengths = f"{SHORTEST}–{LONGEST} tokens × {config.scale:g}"
    if config.chats:
        lengths = f"chats of {CHAT_PROMPT} + {CHAT_ANSWER} tokens, {CHAT_SYSTEM} shared"
    case = f"d{config.depth}, {config.requests} requests, {lengths}"
    sides = {"together": (config.max_batch, requests)}
    if config.alone:
        sides["one at a time"] = (1, requests[: config.alone])
    rates = {}
    for name, (max_batch, some) in sides.items():
        engine = make_engine(config, model, min(max_batch, len(some)))
        run_batch(engine, requests_of(config)[:1])  # warm up: tables, buffers, first calls
        warm = engine.stats()
        seconds = run_batch(engine, some)
        stats = engine.stats()
        generated = stats.generated_tokens - warm.generated_tokens
        read = stats.prompt_tokens - warm.prompt_tokens
        rates[name] = generated / seconds
        rows.add(
            work=f"offline, {name}", case=case, backend=type(engine.runner).__name__, mode=config.weights,
            dtype=str(dtype).removeprefix("torch."), threads=torch.get_num_threads(),
            timing=harness.Timing([seconds / generated]), max_batch=engine.config.max_batch, seconds=seconds,
            output_tokens=generated, prompt_tokens=read, steps=stats.steps - warm.steps,
            preemptions=stats.preemptions, cache_bytes=engine.cache.nbytes, speculate=config.speculate,
            unit={
                "output_tokens_per_s": rates[name],
                "tokens_per_s": (generated + read) / seconds,
                "tokens_per_step": (generated + read) / (stats.steps - warm.steps),
            },
        )  # fmt: skip
        del engine
    rows.table(("output_tokens_per_s", "tokens_per_s", "tokens_per_step", "preemptions"))
    if config.alone:
        print(f"together ÷ one at a time, output tokens per second: {rates['together'] / rates['one at a time']:.2f}")
    return 0


if __name__ == "__main__":
    harness.run(main)
