"""`nanochat train`: a base model from packed text.

    tokenizer + corpus → rows of T+1 tokens → steps → checkpoints, metrics, validation bits per byte, samples

The run's length and every rate follow from --depth and --ratio (schedules.py). Its folder is
<base dir>/base_checkpoints/<tag>: checkpoints beside metrics.jsonl. Starting the same command again goes on where the
last checkpoint ends; a different configuration under the same tag is refused rather than mixed in.
"""

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nanochat import runtime as runtimes
from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.loader import PackedLoader
from nanochat.errors import UsageError
from nanochat.evaluation import bits_per_byte
from nanochat.model import costs
from nanochat.model.config import Architecture, GPTConfig
from nanochat.runtime import Runtime
from nanochat.training import micro_batch, samples
from nanochat.training.schedules import REFERENCE_DEPTH, Horizon, plan_horizon, rates_at
from nanochat.training.stage import Compile, Stage, check_settings


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
    fp8: bool = False
    """The blocks' matrix products in FP8 (Ada, Hopper and later GPUs; emulated on a CPU). Evaluation is not."""
    kernels: str = "auto"
    """auto, torch, fused, and/or op=backend pairs, separated by commas."""
    compile: Compile = "auto"
    """torch.compile, block by block. auto: on CUDA."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: a third more work, far less memory."""
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
    """auto goes on from the newest checkpoint of the tag, a number from that step, setting later ones aside; never
    begins anew and sets the earlier run aside."""
    tag: str | None = None
    """Name of the run and its folder; d<depth> by default."""
    seed: int = 42
    """Seed of the initial weights."""
    track: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send the metrics to wandb or tensorboard (optional packages)."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.eval_tokens is not None and self.eval_tokens < self.seq_len:
            raise UsageError(f"--eval-tokens {self.eval_tokens} is less than one row of {self.seq_len} tokens")


def run(config: PretrainConfig) -> int:
    """The command; returns the exit code. Raises UsageError and NanochatError."""
    runtime = runtimes.start(config.device, config.dtype, config.seed)
    try:
        with closing(Pretraining(config, runtime)) as stage:
            return stage.run()
    finally:
        runtimes.stop(runtime)


class Pretraining(Stage):
    """One run: everything made once, in the order in which it is needed; the loop's boundaries call back here."""

    name = "base"

    def __init__(self, config: PretrainConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.corpus: Corpus = open_corpus(config.data, config.shards)
        self.model_config = GPTConfig.from_depth(
            config.depth,
            self.tokenizer.vocab_size,
            config.seq_len,
            config.head_dim,
            config.window_pattern,
            config.kv_heads,
            config.architecture,
        )
        self.open_run(config.tag or f"d{config.depth}")
        self.horizon = self._plan_horizon()
        self.check_same_run(self._identity())
        rates = self.horizon.lr_scale, self.horizon.muon_decay
        self.make_model(self.model_config, *rates, source=None, fp8=config.fp8)
        per_rank = micro_batch.rows_per_rank(self.horizon.batch_tokens, config.seq_len, runtime.world_size)
        self.rows, self.rows_reason = self.choose_rows(per_rank)

    def _plan_horizon(self) -> Horizon:
        config = self.config
        reference = GPTConfig.from_depth(
            REFERENCE_DEPTH,
            self.tokenizer.vocab_size,
            config.seq_len,
            config.head_dim,
            architecture=config.architecture,
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
            "dtype": self.dtype_name + ("+fp8" if self.config.fp8 else ""),
            "seed": self.config.seed,
        }

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
        config, steps, start = self.config, self.horizon.steps, self.start or 0
        self._announce(start)
        if self.meta.get("finished"):
            self.say(f"this run is finished: step {start}, {self.val_bpb} bits per byte; --resume never begins it anew")
            return 0
        with self._loader("train", self.meta.get("loader")) as loader:
            accumulation = self.horizon.batch_tokens // (self.rows * config.seq_len * self.runtime.world_size)
            finished = self.train(loader, accumulation, steps, lambda step: rates_at(step, steps))
        return self.conclude(finished, steps, f", {self.val_bpb:.4f} bits per byte" if self.val_bpb is not None else "")

    # Called by the loop between steps, on all ranks

    def extra_meta(self) -> dict[str, Any]:
        return {"loader": self.stepper.last_batch.state}

    def evaluate(self, step: int) -> None:
        tokens = self.config.eval_tokens or (80 * 2**19 if self.runtime.device.type == "cuda" else 2**17)
        token_bytes = torch.as_tensor(self.tokenizer.token_bytes())
        begin = time.perf_counter()
        with self._loader("val") as batches:
            rows = max(1, tokens // self.config.seq_len)
            self.val_bpb = bits_per_byte.evaluate(self.model, batches, rows, token_bytes, self.runtime)
        self.record(step, val_bpb=self.val_bpb, eval_seconds=time.perf_counter() - begin)
        self.loop.display.note(f"step {step}: validation {self.val_bpb:.4f} bits per byte")

    def sample(self, step: int) -> None:
        if not self.runtime.is_main:
            return
        with self.eager():
            texts = samples.greedy(self.model, self.tokenizer)
        for text in texts:
            self.loop.display.note(f"  › {text!r}")

    def _announce(self, start: int) -> None:
        horizon, config = self.horizon, self.model_config
        tokens = horizon.steps * horizon.batch_tokens
        per_rank = horizon.batch_tokens // (config.seq_len * self.runtime.world_size)
        self.say(
            f"{self.describe()}\n"
            f"{horizon.steps:,} steps of {horizon.batch_tokens:,} tokens, {tokens:,} in all "
            f"({tokens / costs.scaling_parameters(config):.1f} per parameter)\n"
            f"micro-batches of {self.rows} rows × {config.seq_len} tokens ({self.rows_reason}), "
            f"{per_rank // self.rows} per step and rank; compiled blocks: {'yes' if self.compiled else 'no'}\n"
            f"{self.kernels_text()}"
        )
        if self.model.fp8 and self.model.fp8.emulated:
            self.say("fp8: emulated; the numbers are those of FP8 training, the speed is not")
        if start:
            self.say(f"going on from step {start}")
