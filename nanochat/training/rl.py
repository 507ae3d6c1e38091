"""`nanochat rl`: a chat model practices problems whose answers can be checked.

    question → 16 answers at temperature 1 → reward: right or not → each answer's tokens weighted by reward − mean

This is REINFORCE (Williams 1992) with the mean reward of a question's answers as its baseline, as in GRPO
(arXiv 2402.03300) but with less: the answers come from the model as it is, so nothing needs clipping; no KL term holds
it to where it came from; rewards are not divided by their deviation; the loss is a mean over tokens, not over answers.
Learning rates start at 0.05 of pretraining's and fall to 0. Pass@k on held-out problems is measured before and after.
The run's folder is <base dir>/rl_checkpoints/<tag>; the same command again goes on after an interruption.
"""

import math
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nanochat import runtime as runtimes
from nanochat.errors import UsageError
from nanochat.evaluation import chat_eval, results
from nanochat.evaluation.tasks import make_task
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.runtime import Runtime
from nanochat.training import micro_batch, samples
from nanochat.training.rollouts import Rollouts, policy_loss
from nanochat.training.schedules import rl_rates_at
from nanochat.training.stage import Compile, Stage, check_settings

CPU_ROWS = 32  # answers of a micro-batch
GPU_TOKENS = 2**15  # of a micro-batch, if every answer filled the context
NOTE_EVERY = 10  # steps


@dataclass(frozen=True)
class RlConfig:
    """Improves a fine-tuned model by reinforcement learning. Run it again to go on after an interruption."""

    data: str = "gsm8k"
    """The task to practice: gsm8k, word-problems (of the built-in world), spelling; with :PATH for local data."""
    eval_data: str | None = None
    """The task to measure pass@k on; by default the held-out problems of the same."""
    from_tag: str | None = None
    """Tag of the fine-tuned model; by default the one written last."""
    from_step: int | None = None
    """Checkpoint step of the fine-tuned model; by default its newest."""
    epochs: float = 1.0
    """How often to go through the problems."""
    steps: int | None = None
    """Number of updates, instead of what the epochs give."""
    questions: int = 16
    """Questions of an update, over all ranks."""
    samples: int = 16
    """Answers to each question."""
    temperature: float = 1.0
    """Of the answers; at 1 they are what the model is being improved as."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 = from all."""
    max_tokens: int = 256
    """Tokens of an answer at most."""
    lr: float = 0.05
    """Learning rates at the start, as a share of pretraining's at its reference batch."""
    rows: int | None = None
    """Answers that a device learns from at a time; chosen by their length by default."""
    rollout_rows: int = 256
    """Answers generated together."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: a third more work, far less memory."""
    eval_every: int = 60
    """Updates between measurements of pass@k, also made before the first and after the last; 0 for none."""
    eval_problems: int = 400
    """Problems to measure on."""
    eval_samples: int = 8
    """Answers to each of them: pass@k is known up to this k."""
    sample_every: int = 0
    """Updates between sample answers; 0 for none but at the end."""
    save_every: int = 60
    """Updates between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    device: runtimes.DeviceName = "auto"
    """Where to train."""
    dtype: runtimes.DtypeName = "auto"
    """Compute dtype; float16 trains with a loss scaler."""
    kernels: str = "auto"
    """auto, torch, fused, and/or op=backend pairs, separated by commas."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint of the tag, a number from that step; never begins anew."""
    tag: str | None = None
    """Name of the run and its folder; the fine-tuned model's by default."""
    seed: int = 42
    """Seed of the order of problems and of the answers."""
    track: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send the metrics to wandb or tensorboard (optional packages)."""
    compile: ClassVar[Compile] = "off"  # rows are as long as their longest answer: every step has shapes of its own

    def __post_init__(self) -> None:
        at_least_1 = ("questions", "rollout_rows", "eval_problems", "eval_samples", "steps", "rows", "max_tokens")
        check_settings(self, ("samples", 2), *((name, 1) for name in at_least_1))
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UsageError(f"--epochs {self.epochs} must be above 0")
        if not 0 < self.lr <= 10:
            raise UsageError(f"--lr {self.lr} must be above 0 and at most 10: it multiplies pretraining's rates")
        if self.temperature == 0:
            raise UsageError("--temperature 0 gives equal answers, from which nothing can be learned; use 1")
        self.sampling()

    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, top_k=self.top_k, max_tokens=self.max_tokens, seed=self.seed)


def run(config: RlConfig) -> int:
    """The command; returns the exit code. Raises UsageError and NanochatError."""
    runtime = runtimes.start(config.device, config.dtype, config.seed)
    try:
        with closing(Reinforcement(config, runtime)) as stage:
            return stage.run()
    finally:
        runtimes.stop(runtime)


class Reinforcement(Stage):
    """One run, made in the order in which its parts are needed."""

    name = "rl"

    def __init__(self, config: RlConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        if config.questions % runtime.world_size:
            raise UsageError(f"--questions {config.questions} do not divide among {runtime.world_size} ranks")
        self.task, self.held_out = make_task(config.data, "train"), make_task(config.eval_data or config.data, "test")
        for task in (self.task, self.held_out):
            if task.eval_type != "generate":
                raise UsageError(f"{task.name} has no answers to check; practice gsm8k, word-problems or spelling")
        self.parent = checkpoint.find("sft", config.from_tag)
        self.open_run(config.tag or self.parent.name)
        saved = self.meta.get("identity", {})
        parent_step = saved.get("parent_step") if config.from_step is None else config.from_step
        parent_meta = checkpoint.load_meta(self.parent, parent_step) if not self.meta else {}
        if parent_meta:
            self.check_tokenizer(self.parent, parent_meta.get("tokenizer"))
            parent_step = parent_meta["step"]
        model_config = GPTConfig.from_dict((self.meta or parent_meta)["config"])
        self.steps = config.steps or max(1, round(config.epochs * len(self.task) / config.questions))
        names = ("data", "questions", "samples", "temperature", "top_k", "max_tokens", "lr", "seed")
        self.check_same_run(
            {
                **model_config.to_dict(),
                "tokenizer": self.fingerprint,
                "parent": self.parent.name,
                "parent_step": parent_step,
                "problems": len(self.task),
                "steps": self.steps,
                "dtype": self.dtype_name,
                **{name: getattr(config, name) for name in names},
            }
        )
        self.make_model(model_config, 1.0, 0.0, (self.parent, parent_step), moments=False)
        self.rows, self.rows_reason = self._choose_answers()
        self.pass_at: dict[str, dict[str, float]] = self.meta.get("pass_at", {})

    def _choose_answers(self) -> tuple[int, str]:
        """Answers of a micro-batch: a divisor of those of a step on one rank."""
        config = self.config
        per_rank = config.questions * config.samples // self.runtime.world_size
        if config.rows is not None:
            return micro_batch.check_rows(config.rows, per_rank), "given"
        on_gpu = self.runtime.device.type == "cuda"
        limit = max(1, GPU_TOKENS // self.model_config.seq_len) if on_gpu else CPU_ROWS
        return max(d for d in micro_batch.divisors(per_rank) if d <= limit), "by the context"

    def run(self) -> int:
        config, steps, start = self.config, self.steps, self.start or 0
        self._announce(start)
        if self.meta.get("finished"):
            self.say(f"this run is finished: step {start}; --resume never begins it anew")
            return 0
        self.rollouts = Rollouts(
            self.task,
            Engine(self.model, self.tokenizer),
            self.runtime,
            config.sampling(),
            questions=config.questions,
            samples=config.samples,
            rows=self.rows,
            together=max(1, config.rollout_rows // config.samples),
            first_step=start,
            eager=self.eager,
        )
        finished = self.train(
            self.rollouts,
            config.questions * config.samples // (self.rows * self.runtime.world_size),
            steps,
            lambda step: rl_rates_at(step, steps, config.lr),
            policy_loss,
            extras=self._extras,
            before=lambda: self.evaluate(0) if start == 0 and config.eval_every else None,
        )
        if finished and self.runtime.is_main:
            with self.eager():
                chat = samples.chat(Engine(self.model, self.tokenizer))
            results.record(self.name, "samples", chat)
            results.record(self.name, "pass_at", {"task": self.held_out.name, **self.pass_at})
        return self.conclude(finished, steps, self._gain(), pass_at=self.pass_at)

    def _extras(self) -> dict[str, Any]:
        stats, step = self.rollouts.stats, self.rollouts.step
        if step % NOTE_EVERY == 0 or step == 1:
            self.loop.display.note(
                f"step {step}/{self.steps}: {stats.reward:.1%} right, {stats.answer_tokens:.0f} tokens an answer, "
                f"{stats.mixed:.0%} of the questions answered both ways"
            )
        return {
            "reward": stats.reward,
            "answer_tokens": stats.answer_tokens,
            "mixed": stats.mixed,
            "rollout_seconds": stats.seconds,
        }

    # Called by the loop between steps, on all ranks

    def extra_meta(self) -> dict[str, Any]:
        return {"pass_at": self.pass_at}

    def evaluate(self, step: int) -> None:
        config, begin = self.config, time.perf_counter()
        with self.eager():
            score = chat_eval.evaluate_task(
                Engine(self.model, self.tokenizer),
                self.held_out,
                config.sampling(),
                samples=config.eval_samples,
                max_problems=config.eval_problems,
                batch_rows=config.rollout_rows,
            )
        found = score.to_dict()["pass_at"]
        self.pass_at[str(step)] = found | {"problems": len(score.correct)}
        self.record(
            step, **{f"pass@{k}": value for k, value in found.items()}, eval_seconds=time.perf_counter() - begin
        )
        text = ", ".join(f"pass@{k} {value:.1%}" for k, value in found.items())
        self.loop.display.note(f"step {step}: {text} of {len(score.correct)} held-out problems")

    def sample(self, step: int) -> None:
        with self.eager():
            shown = samples.chat(Engine(self.model, self.tokenizer)) if self.runtime.is_main else []
        for sample in shown:
            self.loop.display.note(f"  › {sample['prompt']}  {sample['text']!r}")

    def _gain(self) -> str:
        if len(self.pass_at) < 2:
            return ""
        first, *_, last = (self.pass_at[step]["1"] for step in sorted(self.pass_at, key=int))
        return f", pass@1 from {first:.1%} to {last:.1%}"

    def _announce(self, start: int) -> None:
        config = self.config
        self.say(
            f"{self.describe()}\n"
            f"{len(self.task):,} problems of {self.task.name}, from {self.parent.name} at step "
            f"{self.identity['parent_step']}\n"
            f"{self.steps:,} steps of {config.questions} questions × {config.samples} answers; micro-batches of "
            f"{self.rows} answers ({self.rows_reason})\n"
            f"{self.kernels_text()}"
        )
        if start:
            self.say(f"going on from step {start}")
