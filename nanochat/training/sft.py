"""`nanochat sft`: a base model learns to answer.

    base checkpoint + mixture of conversations → packed rows → steps → checkpoints, metrics, validation, ChatCORE

The model goes on with the optimizer's moments that pretraining left, at 0.8 of its learning rates, falling to 0 over
the second half. It learns what the assistant says and nothing else (chat_format.py). The run's folder is
<base dir>/sft_checkpoints/<tag>, the tag being the base model's; the same command again goes on after an interruption.
"""

import math
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nanochat import runtime as runtimes
from nanochat.errors import UsageError
from nanochat.evaluation import bits_per_byte, chat_eval, results
from nanochat.evaluation.tasks import parse_mixture
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.runtime import Runtime
from nanochat.training import micro_batch, samples
from nanochat.training.conversations import ConversationLoader, mean_over_targets, rows_in_an_epoch
from nanochat.training.schedules import REFERENCE_BATCH, sft_rates_at
from nanochat.training.stage import Compile, Stage, check_settings

DEFAULT_MIXTURE = "smoltalk+3*mmlu+4*gsm8k+identity+spelling"


@dataclass(frozen=True)
class SftConfig:
    """Fine-tunes a base model on conversations. Run it again to go on after an interruption."""

    data: str = DEFAULT_MIXTURE
    """Conversations to learn from: tasks joined by +, each with a number of times, like 2*gsm8k+jsonl:PATH; builtin."""
    val: str | None = None
    """Conversations for validation; by default the validation parts of the same."""
    from_tag: str | None = None
    """Tag of the base model; by default the one written last."""
    from_step: int | None = None
    """Checkpoint step of the base model; by default its newest."""
    epochs: float = 1.0
    """How often to go through the conversations, about."""
    steps: int | None = None
    """Number of updates, instead of what the epochs give."""
    batch_tokens: int | None = None
    """Tokens per update over all ranks, padding included; as in pretraining by default."""
    rows: int | None = None
    """Rows a device takes at a time; found automatically by default."""
    lr: float = 0.8
    """Highest learning rates, as a share of pretraining's."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: a third more work, far less memory."""
    eval_every: int = 200
    """Updates between validations; 0 for none."""
    eval_tokens: int | None = None
    """Tokens of a validation: 41,943,040 on CUDA and 131,072 elsewhere by default, but no more than there are."""
    chat_core: int = 0
    """At each validation also ChatCORE over the first so many problems of each task; 0 for none."""
    chat_core_tasks: str = ""
    """Tasks of ChatCORE, separated by commas; by default all that can be had."""
    sample_every: int = 0
    """Updates between sample answers; 0 for none but at the end."""
    save_every: int = 200
    """Updates between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    device: runtimes.DeviceName = "auto"
    """Where to train."""
    dtype: runtimes.DtypeName = "auto"
    """Compute dtype; float16 trains with a loss scaler."""
    kernels: str = "auto"
    """auto, torch, fused, and/or op=backend pairs, separated by commas."""
    compile: Compile = "auto"
    """torch.compile, block by block. auto: on CUDA."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint of the tag, a number from that step; never begins anew."""
    tag: str | None = None
    """Name of the run and its folder; the base model's by default."""
    seed: int = 42
    """Seed of what is random: nothing but the samples."""
    track: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send the metrics to wandb or tensorboard (optional packages)."""

    def __post_init__(self) -> None:
        check_settings(self, ("chat_core", 0), ("steps", 1), ("eval_tokens", 1))
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UsageError(f"--epochs {self.epochs} must be above 0")
        if not 0 < self.lr <= 10:
            raise UsageError(
                f"--lr {self.lr} must be above 0 and at most 10: it multiplies pretraining's learning rates"
            )


def run(config: SftConfig) -> int:
    """The command; returns the exit code. Raises UsageError and NanochatError."""
    runtime = runtimes.start(config.device, config.dtype, config.seed)
    try:
        with closing(FineTuning(config, runtime)) as stage:
            return stage.run()
    finally:
        runtimes.stop(runtime)


class FineTuning(Stage):
    """One run, made in the order in which its parts are needed."""

    name = "sft"

    def __init__(self, config: SftConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self.base = checkpoint.find("base", config.from_tag)
        self.open_run(config.tag or self.base.name)
        saved = self.meta.get("identity", {})
        base_step = saved.get("base_step") if config.from_step is None else config.from_step
        base_meta = checkpoint.load_meta(self.base, base_step) if not self.meta else {}
        if base_meta:
            self.check_tokenizer(self.base, base_meta.get("tokenizer"))
            base_step = base_meta["step"]
        model_config = GPTConfig.from_dict((self.meta or base_meta)["config"])
        self.seq_len = model_config.seq_len
        batch = config.batch_tokens or saved.get("batch_tokens") or self._inherited_batch(base_meta)
        self.per_rank = micro_batch.rows_per_rank(batch, self.seq_len, runtime.world_size)
        self.conversations = parse_mixture(config.data)
        self.steps = config.steps or saved.get("steps") or self._plan_steps(batch)
        self.check_same_run(
            {
                **model_config.to_dict(),
                "tokenizer": self.fingerprint,
                "base": self.base.name,
                "base_step": base_step,
                "data": config.data,
                "conversations": len(self.conversations),
                "batch_tokens": batch,
                "steps": self.steps,
                "lr": config.lr,
                "dtype": self.dtype_name,
            }
        )
        self.batch_tokens = batch
        self.make_model(model_config, math.sqrt(batch / REFERENCE_BATCH), 0.0, (self.base, base_step))
        self.rows, self.rows_reason = self.choose_rows(self.per_rank)
        self.chat_scores: dict[str, float] = {}

    def _inherited_batch(self, base_meta: dict[str, Any]) -> int:
        """Pretraining's batch, to the next whole number of rows on these ranks."""
        unit = self.seq_len * self.runtime.world_size
        wanted = base_meta.get("identity", {}).get("batch_tokens", REFERENCE_BATCH)
        return max(1, round(wanted / unit)) * unit

    def _plan_steps(self, batch_tokens: int) -> int:
        rows = rows_in_an_epoch(self.conversations, self.tokenizer, self.seq_len) * self.config.epochs
        return max(1, round(rows * self.seq_len / batch_tokens))

    def run(self) -> int:
        steps, start = self.steps, self.start or 0
        self._announce(start)
        if self.meta.get("finished"):
            self.say(f"this run is finished: step {start}; --resume never begins it anew")
            return 0
        accumulation, state = self.per_rank // self.rows, self.meta.get("loader")
        with ConversationLoader(
            self.conversations, self.tokenizer, self.runtime,
            rows=self.rows, seq_len=self.seq_len, accumulation=accumulation, state=state,
        ) as loader:  # fmt: skip
            finished = self.train(
                loader, accumulation, steps, lambda step: sft_rates_at(step, steps, self.config.lr), mean_over_targets
            )
        if finished and self.runtime.is_main:
            results.record(self.name, "samples", self._chat())
        return self.conclude(finished, steps, f", {self.val_bpb:.4f} bits per byte" if self.val_bpb is not None else "")

    # Called by the loop between steps, on all ranks

    def extra_meta(self) -> dict[str, Any]:
        return {"loader": self.stepper.last_batch.state}

    def evaluate(self, step: int) -> None:
        config = self.config
        begin = time.perf_counter()
        held_out = parse_mixture(config.val or config.data, "val")
        tokens = config.eval_tokens or (80 * 2**19 if self.runtime.device.type == "cuda" else 2**17)
        rows = max(1, min(tokens // self.seq_len, rows_in_an_epoch(held_out, self.tokenizer, self.seq_len)))
        token_bytes = torch.as_tensor(self.tokenizer.token_bytes())
        with ConversationLoader(
            held_out, self.tokenizer, self.runtime, rows=self.rows, seq_len=self.seq_len
        ) as batches:
            self.val_bpb = bits_per_byte.evaluate(self.model, batches, rows, token_bytes, self.runtime)
        self.record(step, val_bpb=self.val_bpb, eval_seconds=time.perf_counter() - begin)
        self.loop.display.note(f"step {step}: validation {self.val_bpb:.4f} bits per byte")
        if config.chat_core:
            self._chat_core(step)

    def _chat_core(self, step: int) -> None:
        tasks, missing = chat_eval.load_tasks(self.config.chat_core_tasks)
        params = SamplingParams(temperature=0.0, max_tokens=min(512, self.seq_len), seed=self.config.seed)
        with self.eager():
            engine = Engine(self.model, self.tokenizer)
            scores = [
                chat_eval.evaluate_task(engine, task, params, max_problems=self.config.chat_core) for task in tasks
            ]
        label, value = chat_eval.label_of(scores, missing), chat_eval.chat_core(scores)
        self.record(step, chat_core=value, **{f"accuracy/{score.name}": score.accuracy for score in scores})
        parts = ", ".join(f"{score.name} {score.accuracy:.1%}" for score in scores)
        self.loop.display.note(f"step {step}: {label} {value:.4f} ({parts})")

    def sample(self, step: int) -> None:
        if self.runtime.is_main:
            for sample in self._chat():
                self.loop.display.note(f"  › {sample['prompt']}  {sample['text']!r}")

    def _chat(self) -> list[dict[str, str]]:
        with self.eager():
            return samples.chat(Engine(self.model, self.tokenizer))

    def _announce(self, start: int) -> None:
        self.say(
            f"{self.describe()}\n"
            f"{len(self.conversations):,} conversations ({self.config.data}), from {self.base.name} at step "
            f"{self.identity['base_step']}\n"
            f"{self.steps:,} steps of {self.batch_tokens:,} tokens; micro-batches of {self.rows} rows × {self.seq_len} "
            f"tokens ({self.rows_reason}), {self.per_rank // self.rows} per step and rank; compiled blocks: "
            f"{'yes' if self.compiled else 'no'}\n"
            f"{self.kernels_text()}"
        )
        if start:
            self.say(f"going on from step {start}")
