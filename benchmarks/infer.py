"""`nanochat bench infer`: one user, or a few, waiting for tokens: time to the first, time per token, bandwidth.

    nanochat bench infer                                              # d12, every weight format of the CPU kernels
    nanochat bench infer --peer nanochat=../nanochat --batch 1,8      # beside a checkout of karpathy/nanochat
    nanochat bench infer --peer transformers --sides fp32             # beside transformers' NanoChat class
    nanochat bench infer --quality --text FOLDER                     # what each format costs in bits per byte

A side is a way to hold the weights: fp32, bf16, int8, int4 (C++ kernels; on a GPU bf16, fp8, int8 by CUDA kernels),
torch, torch-bf16 (the same engine through torch's ops). On a GPU decode steps are replayed as graphs; a side named
NAME-eager launches one kernel at a time, so `bf16,bf16-eager,torch-bf16,torch-bf16-eager` tells what graphs and what
fused kernels bring. Sides and peers take turns, A B A B; ours stay in this process, a peer starts in a process of its
own every time. What is timed is the whole engine with its draw (greedy), not a kernel. Weights are random: speed does
not depend on them, quality does, so `--quality` takes a checkpoint.

A decode step cannot be faster than its bytes: packed weights once, keys and values in sight per row. `mbu` is those
bytes ÷ time ÷ the read bandwidth measured in the same run; `weights_share` counts the weights alone, still over the
whole step with its attention, draw and bookkeeping. `stream_share` says how fast the kernels stream weights: it times
the model alone, for a token that sees only itself, against the bandwidth measured just before, the best of five both.
The last line of output is one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import psutil
import torch
import tyro

from benchmarks import harness, weights_quality
from benchmarks.serve import SPECIALS, any_tokenizer
from nanochat.doctor import read_bandwidth
from nanochat.errors import NanochatError, UsageError
from nanochat.inference.batch_engine import BatchConfig, BatchEngine, Request
from nanochat.inference.cuda_graphs import GraphRunner
from nanochat.inference.native_runner import NativeRunner
from nanochat.inference.paged_cache import BLOCK_SIZE, PagedCache
from nanochat.inference.runner import make_runner
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.step import Runner, StepBatch, TorchRunner
from nanochat.measure import machine
from nanochat.model.config import GPTConfig
from nanochat.model.costs import decode_flops, linear_parameters
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan
from nanochat_kernels.registry import Cost

NATIVE = {"cpu": ("fp32", "bf16", "int8", "int4"), "cuda": ("bf16", "fp8", "int8")}
THROUGH_TORCH = ("torch", "torch-bf16")
EAGER = "-eager"
PEER_SCRIPT = Path(__file__).with_name("infer_peer.py")


@dataclass(frozen=True)
class InferConfig:
    """Latency of generation."""

    depth: int = 12
    """Layers of the model."""
    sides: str = "auto"
    """Separated by commas; auto = every weight format of the device's kernels."""
    device: str = "auto"
    """auto, cpu or cuda."""
    batch: str = "1"
    """Rows at a time, separated by commas."""
    prompt: int = 256
    """Tokens of each prompt."""
    decode: int = 128
    """Tokens of each answer."""
    rounds: int = 5
    """How often the sides take turns."""
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """nanochat=PATH (float32 on a CPU), nanochat-bf16=PATH, transformers."""
    vocab_size: int = 32768
    """Of the model."""
    seq_len: int = 2048
    """Context of the model."""
    threads: int = 0
    """Of torch; 0 = its default."""
    kernels: str = "auto"
    """Of the draw, and of the torch sides."""
    seed: int = 0
    """Of weights and prompts."""
    out: str | None = None
    """File or folder for the rows."""
    quality: bool = False
    """Measure bits per byte of each format instead of time."""
    text: str = "builtin"
    """Corpus for --quality."""
    tag: str | None = None
    """Checkpoint for --quality; by default the newest base model."""
    eval_tokens: int = 65536
    """Tokens scored by --quality."""

    def __post_init__(self) -> None:
        if not all(part.isdigit() and int(part) for part in self.batch.split(",")):
            raise UsageError(f"--batch {self.batch}: use whole numbers of at least 1, separated by commas")
        for name, least in (("depth", 1), ("prompt", 1), ("decode", 2), ("rounds", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        if self.prompt + self.decode > self.seq_len:
            raise UsageError(f"{self.prompt} + {self.decode} tokens do not fit in a context of {self.seq_len}")
        for peer in self.peer:
            kind, _, path = peer.partition("=")
            if kind not in ("nanochat", "nanochat-bf16", "transformers") or (kind != "transformers" and not path):
                raise UsageError(f"--peer {peer}: use nanochat=PATH, nanochat-bf16=PATH or transformers")

    def chosen(self, device: torch.device) -> list[str]:
        """The sides to measure on `device`; UsageError for one that it does not have."""
        native = NATIVE[device.type]
        if self.sides == "auto":
            return list(native)
        names = [part.strip() for part in self.sides.split(",") if part.strip()]
        known = [*native, *THROUGH_TORCH]
        known += [name + EAGER for name in known] if device.type == "cuda" else []
        for name in set(names) - set(known):
            raise UsageError(f"--sides {self.sides}: {name} is not one of {', '.join(known)} on {device.type}")
        return names


def format_of(side: str) -> str:
    return side.removesuffix(EAGER).removeprefix("torch").removeprefix("-") or "fp32"


def runner_of(side: str, model: GPT, kernels: str) -> Runner:
    device, name = model.device, side.removesuffix(EAGER)
    if name in THROUGH_TORCH:
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        plan = KernelPlan.resolve(kernels, device, dtype, "decode")
        cast = GPT(model.config, plan, dtype).to(device).eval()
        cast.load_state_dict(model.state_dict())
        runner: Runner = TorchRunner(cast, plan)
        return GraphRunner(runner, device) if device.type == "cuda" and runner.capturable and side == name else runner
    made = make_runner(model, name)  # type: ignore[arg-type]
    return made.runner if isinstance(made, GraphRunner) and side != name else made


def weight_bytes(runner: Runner, config: GPTConfig) -> int:
    """Bytes of the matrices that every step reads, as they are held."""
    held = runner.runner if isinstance(runner, GraphRunner) else runner
    return getattr(held, "nbytes", linear_parameters(config) * runner.cache_dtype.itemsize)


def step_bytes(runner: Runner, config: GPTConfig, rows: int, context: int) -> float:
    """What one decode step reads: weights as held, looked-up embedding rows, keys and values in sight."""
    width = runner.cache_dtype.itemsize
    keys = sum(min(window + 1, context) for window in config.windows)
    values = config.kv_heads * config.head_dim
    tables = config.width + sum(config.has_value_embedding(i) for i in range(config.layers)) * values
    return weight_bytes(runner, config) + rows * (4 * tables + 2 * values * keys * width)


class Ours:
    """One side at one batch size: an engine that is asked for the same answers again and again."""

    def __init__(self, config: InferConfig, model: GPT, runner: Runner, batch: int) -> None:
        blocks = batch * (-(-(config.prompt + config.decode) // BLOCK_SIZE) + 1)
        settings = BatchConfig(batch, max(512, batch), num_blocks=blocks, prefix_cache=False)
        self.engine = BatchEngine(model, any_tokenizer(config.vocab_size), settings, runner)
        draw = random.Random(config.seed)
        params = SamplingParams(temperature=0.0, max_tokens=config.decode, ignore_eos=True, tools=False)
        self.requests = [
            Request(str(i), tuple(draw.randrange(config.vocab_size - SPECIALS) for _ in range(config.prompt)), params)
            for i in range(batch)
        ]

    def __call__(self) -> dict[str, Any]:
        """{"first": seconds until every row has a token, "steps": seconds of each decode step}."""
        begin = last = time.perf_counter()
        for request in self.requests:
            self.engine.add(request)
        first, steps, started = 0.0, [], set()
        while self.engine.has_work:
            outputs = self.engine.step()
            now = time.perf_counter()
            if any(output.finish == "error" for output in outputs):
                raise harness.HarnessError(f"a step failed: {self.engine.error}")
            if len(started) == len(self.requests):
                steps.append(now - last)
            started |= {output.id for output in outputs}
            if not first and len(started) == len(self.requests):
                first = now - begin
            last = now
        return {"first": first, "steps": steps}


class Stream:
    """The C++ step for one token that sees only itself: all weights, and next to nothing else."""

    def __init__(self, model: GPT, runner: NativeRunner) -> None:
        self.runner, self.cache = runner, PagedCache(model.config, (1, 1), dtype=runner.cache_dtype)
        one, table = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32)
        bounds, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        self.batch = StepBatch(one, one - 1, one, bounds, lengths, (table, table), one)

    def __call__(self) -> dict[str, Any]:
        """{"bandwidth": weight bytes per second}, the best of five."""
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            self.runner(self.batch, self.cache)
            seconds.append(time.perf_counter() - begin)
        return {"bandwidth": self.runner.nbytes / min(seconds)}


def bandwidth_of(device: torch.device) -> float:
    """Bytes/s now: what reading alone reaches on a CPU, what copying reaches on a GPU."""
    return machine.ceilings(device).bandwidth if device.type == "cuda" else read_bandwidth()


def peer_of(config: InferConfig, peer: str, batch: int, device: torch.device) -> Callable[[], dict[str, Any]]:
    kind, _, path = peer.partition("=")
    settings = {"depth": config.depth, "batch": batch, "prompt": config.prompt, "decode": config.decode,
                "vocab-size": config.vocab_size, "seq-len": config.seq_len,
                "threads": torch.get_num_threads()}  # fmt: skip
    command = [sys.executable, str(PEER_SCRIPT), kind.removesuffix("-bf16"), "--path", path]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command += ["--device", device.type]
    dtype = "bfloat16" if kind.endswith("bf16") or device.type == "cuda" else "float32"
    return lambda: harness.run_json(command, isolated=True, env={"NANOCHAT_DTYPE": dtype, "PYTHONPATH": ""})


def compare(config: InferConfig, model: GPT, runners: dict[str, Runner], batch: int, rows: harness.Rows) -> dict:
    """One batch size: all sides in turn; adds their rows and returns what the summary says of them."""
    engines = {name: Ours(config, model, runner, batch) for name, runner in runners.items()}
    for engine in engines.values():
        engine()  # warm up: tables, buffers, first touch of memory
    sides: dict[str, Callable[[], dict[str, Any]]] = {"bandwidth": lambda: {"bandwidth": bandwidth_of(model.device)}}
    streams = {name: f"{name} weights" for name, runner in runners.items() if isinstance(runner, NativeRunner)}
    sides |= {side: Stream(model, cast(NativeRunner, runners[name])) for name, side in streams.items()}
    peers = {p.partition("=")[0]: peer_of(config, p, batch, model.device) for p in config.peer}
    runs = harness.interleave(sides | engines | peers, config.rounds)
    read = [run["bandwidth"] for run in runs.pop("bandwidth")]
    streamed = {name: [run["bandwidth"] for run in runs.pop(side)] for name, side in streams.items()}
    bandwidth = max(read)
    context = config.prompt + config.decode // 2
    found: dict[str, Any] = {"read_bandwidth": bandwidth}
    for name, results in runs.items():
        ours = name in engines
        medians = [harness.Timing(run["steps"]).median for run in results]
        steps = harness.Timing([second for run in results for second in run["steps"]])
        first = harness.Timing([run["first"] for run in results])
        step = harness.Timing(medians).median  # the median of the rounds' medians
        fields = {"case": f"d{config.depth} b{batch} p{config.prompt}", "threads": torch.get_num_threads(),
                  "backend": ("torch" if name.startswith("torch") else "native") if ours else None,
                  "peer": None if ours else name, "dtype": format_of(name) if ours else None,
                  "graph": isinstance(runners.get(name), GraphRunner)}  # fmt: skip
        cell = {"first_s": first.median, "step_s": step, "p50_s": steps.median, "p95_s": steps.quantile(0.95),
                "tokens_per_s": batch / step}  # fmt: skip
        cost = None
        if ours:
            moved = step_bytes(runners[name], model.config, batch, context)
            weights = None if name.startswith("torch") else weight_bytes(runners[name], model.config)
            cost = Cost(moved, batch * decode_flops(model.config, context))
            cell |= {"mbu": moved / step / bandwidth, "cache_bytes": engines[name].engine.cache.nbytes}
            if weights:
                cell |= {"weight_bytes": weights, "weights_share": weights / step / bandwidth}
            if name in streamed:
                cell["stream_share"] = harness.Timing([s / r for s, r in zip(streamed[name], read, strict=True)]).median
        else:
            cell["peak_rss"] = max(run["peak_rss"] for run in results)
        rows.add(work="first token", mode="prefill", timing=first, **fields)
        rows.add(work="decode", mode="decode", timing=harness.Timing(medians), cost=cost, unit=cell, **fields)
        found[name] = {key: float(f"{value:.4g}") for key, value in cell.items()}
    for peer in (name for name in runs if name not in engines):
        for name in engines:
            found[name][f"times_{peer}"] = round(found[peer]["step_s"] / found[name]["step_s"], 2)
            found[name][f"first_times_{peer}"] = round(found[peer]["first_s"] / found[name]["first_s"], 2)
    return found


def main() -> int:
    config = tyro.cli(InferConfig, description=__doc__)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.quality:
        formats = [side for side in config.chosen(torch.device("cpu")) if not side.startswith("torch")]
        print(json.dumps(weights_quality.measure(formats, config.text, config.tag, config.eval_tokens)))
        return 0
    for peer in config.peer:
        kind, _, path = peer.partition("=")
        if path and not (Path(path) / "nanochat" / "engine.py").exists():
            raise NanochatError(f"--peer {peer}: there is no checkout of karpathy/nanochat in {path}")
    device = harness.pick_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = config.chosen(device)
    plan = KernelPlan.resolve(config.kernels, device, dtype, "decode")
    model = GPT(GPTConfig.from_depth(config.depth, config.vocab_size, config.seq_len), plan, dtype).eval()
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(device)
    rows = harness.Rows("infer", device, out=config.out)
    runners = {}
    for side in chosen:
        begin = time.perf_counter()
        runners[side] = runner_of(side, model, config.kernels)
        harness.say(f"{side}: packed in {time.perf_counter() - begin:.1f} s")
    found = {f"b{batch}": compare(config, model, runners, int(batch), rows) for batch in config.batch.split(",")}
    rows.table(("tokens_per_s", "mbu", "p95_s"))
    found["rss"] = psutil.Process().memory_info().rss
    print(json.dumps({"work": "infer", "depth": config.depth, "device": str(device), "threads": torch.get_num_threads(),
                      "quiet": not rows.disturbed, **found}))  # fmt: skip
    return 0


if __name__ == "__main__":
    harness.run(main)
