"""`nanochat train`: a base model from packed text.

    tokenizer + corpus → rows of T+1 tokens → steps → checkpoints, metrics, validation bits per byte, samples

The run's length and every rate follow from --depth and --ratio (schedules.py). Its folder is
<base dir>/base_checkpoints/<tag>: checkpoints beside metrics.jsonl. Starting the same command again goes on where the
last checkpoint ends; a different configuration under the same tag is refused rather than mixed in.
"""

import resource
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Literal

import torch
from rich.console import Console

from nanochat import runtime as runtimes
from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.loader import PackedLoader
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import bits_per_byte
from nanochat.model import checkpoint, costs
from nanochat.model.config import Architecture, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, base_dir
from nanochat.tokenizer import Tokenizer
from nanochat.training import micro_batch, samples
from nanochat.training.loop import Run, Stepper
from nanochat.training.loss_scale import LossScaler
from nanochat.training.metrics import MetricsLog, open_tracker
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.progress import Display, LossAverage, StepResult
from nanochat.training.ranks import on_main
from nanochat.training.schedules import REFERENCE_DEPTH, Horizon, plan_horizon, rates_at
from nanochat_kernels import KernelPlan

INTERRUPTED = 130  # exit code after SIGINT or SIGTERM: whatever waits for a trained model should not go on


@dataclass(frozen=True)
class PretrainConfig:
    """Trains a base model on a corpus. Run it again to go on after an interruption."""

    depth: int = 12
    """Layers of the model; width, heads, batch size, rates and training length follow from it."""
    data: str = "climbmix"
    """What to train on: climbmix, fineweb-edu, files:PATH, builtin or a folder of parquet shards."""
    shards: int | None = None
    """Use only the first so many training shards; all that are there by default."""
    seq_len: int = 2048
    """Tokens per row: the context length."""
    ratio: float = 12.0
    """Training tokens per parameter of the block matrices and the head."""
    steps: int | None = None
    """Number of updates, instead of what the ratio gives."""
    batch_tokens: int | None = None
    """Tokens per update over all ranks, instead of the size that suits the horizon."""
    rows: int | None = None
    """Rows a device takes at a time; found automatically by default."""
    head_dim: int = 128
    """Channels per attention head."""
    kv_heads: int | None = None
    """Key/value heads, a divisor of the query heads; as many as those by default."""
    window_pattern: str = "SSSL"
    """Attention windows, tiled over the layers: S a quarter of the context, L all of it."""
    architecture: Architecture = "2026"
    """2026, or 2025-10 for the plain transformer that Hugging Face transformers calls NanoChat."""
    device: runtimes.DeviceName = "auto"
    """Where to train."""
    dtype: runtimes.DtypeName = "auto"
    """Compute dtype; float16 trains with a loss scaler."""
    kernels: str = "auto"
    """auto, torch, fused, and/or op=backend pairs, separated by commas."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    """torch.compile, block by block. auto: on CUDA."""
    eval_every: int = 250
    """Updates between validations; 0 for none."""
    eval_tokens: int | None = None
    """Tokens of a validation: 41,943,040 on CUDA and 131,072 elsewhere by default."""
    sample_every: int = 1000
    """Updates between samples of text; 0 for none."""
    save_every: int = 250
    """Updates between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint of the tag, a number from that step; never begins anew."""
    tag: str | None = None
    """Name of the run and its folder; d<depth> by default."""
    seed: int = 42
    """Seed of the initial weights."""
    track: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send the metrics to wandb or tensorboard (optional packages)."""

    def __post_init__(self) -> None:
        for name, least in (("eval_every", 0), ("sample_every", 0), ("save_every", 0), ("keep_last", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")
        if self.eval_tokens is not None and self.eval_tokens < self.seq_len:
            raise UsageError(f"--eval-tokens {self.eval_tokens} is less than one row of {self.seq_len} tokens")
        if self.resume not in ("auto", "never") and not self.resume.isdigit():
            raise UsageError(f"--resume {self.resume!r}: use auto, never or the number of a step")


def run(config: PretrainConfig) -> int:
    """The command; returns the exit code. Raises UsageError and NanochatError."""
    runtime = runtimes.start(config.device, config.dtype, config.seed)
    try:
        return Pretraining(config, runtime).run()
    finally:
        runtimes.stop(runtime)


class Pretraining:
    """One run: everything made once, in the order in which it is needed; the loop's boundaries call back here."""

    def __init__(self, config: PretrainConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.console = Console(highlight=False, soft_wrap=True)
        self.tokenizer = Tokenizer.load(base_dir() / "tokenizer")
        self.vocab_size, self.fingerprint = self.tokenizer.vocab_size, self.tokenizer.fingerprint
        self.corpus: Corpus = open_corpus(config.data, config.shards)
        self.folder = base_dir() / "base_checkpoints" / (config.tag or f"d{config.depth}")
        self.model_config = GPTConfig.from_depth(
            config.depth,
            self.vocab_size,
            config.seq_len,
            config.head_dim,
            config.window_pattern,
            config.kv_heads,
            config.architecture,
        )
        self.start = on_main(runtime, self._choose_start)
        self.meta = checkpoint.load_meta(self.folder, self.start) if self.start is not None else {}
        self.horizon = self._plan_horizon()
        self.identity = self._identity()
        if self.meta:
            self._check_same_run()
        self.val_bpb: float | None = self.meta.get("val_bpb")
        self.seconds_before = self.meta.get("loop", {}).get("seconds", 0.0)
        self._make_model()

    def say(self, text: str) -> None:
        if self.runtime.is_main:
            self.console.print(text, markup=False)

    # What to train, and from where

    def _choose_start(self) -> int | None:
        """The step to go on from, None for a new run. On rank 0 alone."""
        found = checkpoint.latest(self.folder)
        if self.config.resume == "never":
            if found is not None:
                numbered = (self.folder.with_name(f"{self.folder.name}.{n}") for n in count(1))
                aside = next(path for path in numbered if not path.exists())
                self.folder.rename(aside)
                self.say(f"the earlier run of this tag is now {aside.name}")
            return None
        for name, damage in checkpoint.damaged(self.folder).items():
            self.say(f"ignoring {self.folder / name}: {damage}")
        if self.config.resume == "auto":
            return found
        step = int(self.config.resume)
        checkpoint.load_meta(self.folder, step)  # says what there is when there is no such step
        return step

    def _plan_horizon(self) -> Horizon:
        config = self.config
        reference = GPTConfig.from_depth(
            REFERENCE_DEPTH, self.vocab_size, config.seq_len, config.head_dim, architecture=config.architecture
        )
        saved = self.meta.get("identity", {})  # a batch chosen for another number of ranks stays what it was
        return plan_horizon(
            costs.scaling_parameters(self.model_config),
            costs.scaling_parameters(reference),
            config.ratio,
            multiple_of=config.seq_len * self.runtime.world_size,
            batch_tokens=saved.get("batch_tokens") if config.batch_tokens is None else config.batch_tokens,
            steps=config.steps,
        )

    def _identity(self) -> dict[str, Any]:
        """What must not change while a run goes on. Rows, ranks, kernels and intervals may."""
        return {
            **self.model_config.to_dict(),
            "tokenizer": self.fingerprint,
            "data": self.config.data,
            "batch_tokens": self.horizon.batch_tokens,
            "steps": self.horizon.steps,
            "ratio": self.config.ratio,
            "dtype": str(self.runtime.dtype).removeprefix("torch."),
            "seed": self.config.seed,
        }

    def _check_same_run(self) -> None:
        saved, now = self.meta.get("identity", {}), self.identity
        if saved.get("tokenizer") != now["tokenizer"]:
            raise NanochatError(
                f"{self.folder} was trained with the tokenizer {saved.get('tokenizer')}, but the one in "
                f"{base_dir() / 'tokenizer'} is {now['tokenizer']}: its token numbers mean something else. "
                "Bring the old tokenizer back, or train under another --tag (or with --resume never)"
            )
        changed = [f"{k} was {saved.get(k)!r} and is {value!r}" for k, value in now.items() if saved.get(k) != value]
        if changed:
            raise UsageError(
                f"the run {self.folder.name!r} at step {self.start} has another configuration: {'; '.join(changed)}. "
                "Give the old values to go on, another --tag for a new run, or --resume never to begin this one anew"
            )

    # What trains it

    def _make_model(self) -> None:
        config, runtime = self.config, self.runtime
        compiled = config.compile == "blocks" or (config.compile == "auto" and runtime.device.type == "cuda")
        mode = "train-compiled" if compiled else "train-eager"
        self.plan = KernelPlan.resolve(config.kernels, device=runtime.device, dtype=runtime.dtype, mode=mode)
        with torch.device("meta"):
            model = GPT(self.model_config, plan=self.plan, dtype=runtime.dtype)
        self.model = model.to_empty(device=runtime.device)
        if self.start is None:
            self.model.init_weights(torch.Generator(runtime.device).manual_seed(config.seed))
        else:
            state = checkpoint.load_state(self.folder, self.start)
            checkpoint.load_parameters(self.model, state, str(self.folder))
        parameters = dict(self.model.named_parameters())
        groups = parameter_groups(parameters, self.model_config.width, self.horizon.lr_scale, self.horizon.muon_decay)
        self.optimizer = MuonAdamW(parameters, groups, self.plan, runtime)
        if self.start is not None:
            self.optimizer.load_state_dict(checkpoint.load_optimizer(self.folder, self.start))
        if compiled:
            self.model.compile_blocks()
        self.rows, self.rows_reason = self._choose_rows()
        self.compiled = compiled

    def _choose_rows(self) -> tuple[int, str]:
        """Given, or as before the interruption (so that losses repeat), or what suits the device."""
        per_rank = micro_batch.rows_per_rank(self.horizon.batch_tokens, self.config.seq_len, self.runtime.world_size)
        if self.config.rows is not None:
            return micro_batch.check_rows(self.config.rows, per_rank), "given"
        before = self.meta.get("loop", {})
        if before.get("world_size") == self.runtime.world_size and before.get("device") == self.runtime.device.type:
            if per_rank % before["rows"] == 0:
                return before["rows"], "as before"
        return micro_batch.choose_rows(self.model, per_rank, self.runtime)

    def _loader(self, split: Literal["train", "val"], state: dict[str, Any] | None = None) -> PackedLoader:
        return PackedLoader(
            self.corpus,
            self.tokenizer,
            split,
            rows=self.rows,
            seq_len=self.config.seq_len,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            device=self.runtime.device,
            state=state,
        )

    def run(self) -> int:
        config, runtime, start = self.config, self.runtime, self.start or 0
        self._announce(start)
        if self.meta.get("finished"):
            self.say(f"this run is finished: step {start}, {self.val_bpb} bits per byte; --resume never begins it anew")
            return 0
        peak = costs.peak_bf16_flops(runtime.device)
        flops = costs.training_flops_per_token(self.model_config)
        loop = self.meta.get("loop", {})
        scaler = LossScaler(runtime, **loop.get("scaler") or {}) if runtime.dtype == torch.float16 else None
        display = Display(self.horizon.steps, start, self.console, runtime.is_main)
        self.average = LossAverage(**loop.get("average", {}))
        self.metrics = self._open_metrics(start) if runtime.is_main else None

        def utilization(result: StepResult) -> float | None:
            return flops * result.tokens / result.seconds / (peak * runtime.world_size) if peak else None

        with self._loader("train", self.meta.get("loader")) as loader:
            accumulation = self.horizon.batch_tokens // (self.rows * config.seq_len * runtime.world_size)
            self.stepper = Stepper(self.model, self.optimizer, loader, accumulation, runtime, scaler)
            self.loop = Run(
                self.stepper,
                lambda step: rates_at(step, self.horizon.steps),
                self,
                steps=self.horizon.steps,
                start=start,
                save_every=config.save_every,
                eval_every=config.eval_every,
                sample_every=config.sample_every,
                display=display,
                metrics=self.metrics,
                average=self.average,
                utilization=utilization,
            )
            try:
                finished = self.loop.train()
            finally:
                if self.metrics is not None:
                    self.metrics.close()
        return self._conclude(finished)

    def _open_metrics(self, start: int) -> MetricsLog:
        settings = asdict(self.config) | self.identity
        trackers = [open_tracker(name, self.folder, self.folder.name, settings) for name in self.config.track]
        return MetricsLog(self.folder / "metrics.jsonl", start, trackers)

    # Called by the loop between steps, on all ranks

    def save(self, step: int) -> None:
        optimizer_state = self.optimizer.state_dict()
        meta = {
            "stage": "base",
            "config": self.model_config.to_dict(),
            "identity": self.identity,
            "tokenizer": self.fingerprint,
            "run": asdict(self.config),
            "val_bpb": self.val_bpb,
            "loader": self.stepper.last_batch.state,
            "loop": {
                "rows": self.rows,
                "world_size": self.runtime.world_size,
                "device": self.runtime.device.type,
                "average": self.average.state_dict(),
                "scaler": self.stepper.scaler.state_dict() if self.stepper.scaler else None,
                "seconds": self.seconds_before + self.loop.step_seconds,
            },
            "kernels": {name: choice.backend for name, choice in self.plan.choices.items()},
            "versions": {"torch": torch.__version__},
        }

        def write() -> None:
            state = self.model.state_dict()
            checkpoint.save(self.folder, step, state, optimizer_state, meta, self.config.keep_last)

        begin = time.perf_counter()
        on_main(self.runtime, write)
        self.loop.display.note(f"step {step}: checkpoint saved in {time.perf_counter() - begin:.1f} s")

    def evaluate(self, step: int) -> None:
        tokens = self.config.eval_tokens or (80 * 2**19 if self.runtime.device.type == "cuda" else 2**17)
        token_bytes = torch.as_tensor(self.tokenizer.token_bytes())
        begin = time.perf_counter()
        with self._loader("val") as batches:
            rows = max(1, tokens // self.config.seq_len)
            self.val_bpb = bits_per_byte.evaluate(self.model, batches, rows, token_bytes, self.runtime)
        if self.metrics is not None:
            self.metrics.write(step, val_bpb=self.val_bpb, eval_seconds=time.perf_counter() - begin)
        self.loop.display.note(f"step {step}: validation {self.val_bpb:.4f} bits per byte")

    def sample(self, step: int) -> None:
        if self.runtime.is_main:
            for text in samples.greedy(self.model, self.tokenizer):
                self.loop.display.note(f"  › {text!r}")

    # The words around it

    def _announce(self, start: int) -> None:
        runtime, horizon, config = self.runtime, self.horizon, self.model_config
        counts = costs.parameter_counts(config)
        tokens = horizon.steps * horizon.batch_tokens
        per_rank = horizon.batch_tokens // (config.seq_len * runtime.world_size)
        self.say(
            f"{self.folder.name}: {config.layers} layers of {config.width} channels, {counts['total'] / 1e6:,.1f}M "
            f"parameters ({counts['matrices'] / 1e6:,.1f}M in matrices), vocabulary {config.vocab_size:,}\n"
            f"device {runtime.device} ({runtime.reasons.get('device', '')}), {runtime.world_size} rank(s), "
            f"{str(runtime.dtype).removeprefix('torch.')} ({runtime.reasons.get('dtype', '')})\n"
            f"{horizon.steps:,} steps of {horizon.batch_tokens:,} tokens, {tokens:,} in all "
            f"({tokens / costs.scaling_parameters(config):.1f} per parameter)\n"
            f"micro-batches of {self.rows} rows × {config.seq_len} tokens ({self.rows_reason}), "
            f"{per_rank // self.rows} per step and rank; compiled blocks: {'yes' if self.compiled else 'no'}\n"
            f"kernels: {', '.join(f'{n}={c.backend}' for n, c in self.plan.choices.items())}"
        )
        if start:
            self.say(f"going on from step {start}")

    def _conclude(self, finished: bool) -> int:
        step, folder = self.horizon.steps, self.folder
        if not finished:
            self.say("stopped as asked; run the same command to go on")
            return INTERRUPTED
        if self.runtime.is_main:
            checkpoint.annotate(folder, step, val_bpb=self.val_bpb, finished=True)
        seconds = self.seconds_before + self.loop.step_seconds
        bpb = f", {self.val_bpb:.4f} bits per byte" if self.val_bpb is not None else ""
        self.say(
            f"finished {step:,} steps in {seconds / 60:.1f} minutes{bpb}; "
            f"peak memory {peak_memory(self.runtime) / 1e9:.1f} GB; "
            f"the model is in {checkpoint.step_folder(folder, step)}"
        )
        return 0


def peak_memory(runtime: Runtime) -> float:
    """Bytes: the GPU's allocator's peak, or the process's resident peak."""
    if runtime.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(runtime.device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
