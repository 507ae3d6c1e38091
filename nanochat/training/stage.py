"""What the stages of training have in common: a folder, a place to go on from, a model, an optimizer, a loop, an end.

    open_run      which checkpoint of this tag to go on from, if any; a different configuration is refused
    make_model    the model and its optimizer, from a checkpoint of this run, of an earlier stage, or drawn anew
    train         the loop of loop.py with metrics, display and signals, until the last step or until asked to stop

A stage is a subclass that says what to train on (`Stepper`'s batches), how fast (rates) and how to judge it; the loop
calls its `save`, `evaluate` and `sample` between steps, on all ranks. `extra_meta` is what it needs besides to go on.
"""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from nanochat import runtime as runtimes
from nanochat.errors import NanochatError, UsageError
from nanochat.model import checkpoint, costs
from nanochat.model.config import GPTConfig
from nanochat.model.fp8 import Fp8
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, base_dir
from nanochat.tokenizer import Tokenizer
from nanochat.training import micro_batch
from nanochat.training.loop import Run, Stepper
from nanochat.training.loss_scale import LossScaler
from nanochat.training.metrics import MetricsLog, open_tracker
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.progress import Display, LossAverage, StepResult
from nanochat.training.ranks import on_main
from nanochat.training.schedules import StepRates
from nanochat_kernels import KernelPlan

INTERRUPTED = 130  # exit code after SIGINT or SIGTERM: whatever waits for a trained model should not go on
Compile = Literal["auto", "off", "blocks"]


class StageConfig(Protocol):
    """The settings that every stage of training has; they mean the same everywhere."""

    @property
    def device(self) -> runtimes.DeviceName: ...
    @property
    def dtype(self) -> runtimes.DtypeName: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def kernels(self) -> str: ...
    @property
    def compile(self) -> Compile: ...
    @property
    def checkpoint_activations(self) -> bool: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def sample_every(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def keep_last(self) -> int: ...
    @property
    def resume(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def track(self) -> tuple[Literal["wandb", "tensorboard"], ...]: ...


def check_settings(config: StageConfig, *others: tuple[str, int]) -> None:
    """Refuses intervals below 0 and a --resume that means nothing; `others` are further (field, least value)."""
    common = (("eval_every", 0), ("sample_every", 0), ("save_every", 0), ("keep_last", 1))
    for name, least in (*common, *others):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if config.resume not in ("auto", "never") and not config.resume.isdigit():
        raise UsageError(f"--resume {config.resume!r}: use auto, never or the number of a step")


class Stage:
    """One run of one stage. Subclasses call open_run, check_same_run and make_model in this order, then train."""

    name = "base"  # as in the folder of its checkpoints
    config: Any  # a StageConfig and a dataclass
    start: int | None
    rows: int  # of a micro-batch
    meta: dict[str, Any]
    identity: dict[str, Any]

    def __init__(self, config: Any, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.console = Console(highlight=False, soft_wrap=True)
        self.tokenizer = Tokenizer.load(base_dir() / "tokenizer")
        self.fingerprint = self.tokenizer.fingerprint
        self.metrics: MetricsLog | None = None
        self.lock: FileLock | None = None  # rank 0's hold on the tag
        self.val_bpb: float | None = None

    def close(self) -> None:
        """Lets go of the tag. Stages belong in `contextlib.closing`: a loop and its stage refer to each other, so the
        collector alone would do it some time later."""
        if self.lock is not None:
            self.lock.release()

    def say(self, text: str) -> None:
        if self.runtime.is_main:
            self.console.print(text, markup=False)

    # Where to go on from

    def open_run(self, tag: str) -> None:
        """Sets folder, start (None for a new run) and meta, which is empty for a new run."""
        if not re.fullmatch(r"\w[\w.-]*", tag):
            raise UsageError(f"--tag {tag!r} must be a plain name of letters, digits, '.', '_' and '-'")
        self.folder = base_dir() / f"{self.name}_checkpoints" / tag
        self.start = on_main(self.runtime, self._choose_start)
        self.meta = checkpoint.load_meta(self.folder, self.start) if self.start is not None else {}
        self.val_bpb = self.meta.get("val_bpb")
        self.seconds_before: float = self.meta.get("loop", {}).get("seconds", 0.0)

    def _choose_start(self) -> int | None:
        """The step to go on from, None for a new run. On rank 0 alone, which holds the tag from here to its end."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
        try:
            self.lock.acquire(timeout=0)  # the system lets go of it when the process ends, however it ends
        except Timeout:
            raise NanochatError(
                f"another process is training {self.folder} right now; wait for its end or give this run another --tag"
            ) from None
        found = checkpoint.latest(self.folder)
        if self.config.resume == "never":
            if found is not None:
                aside = self._free_name()
                self.folder.rename(aside)
                self.say(f"the earlier run of this tag is now {aside.name}")
            return None
        for name, damage in checkpoint.damaged(self.folder).items():
            self.say(f"ignoring {self.folder / name}: {damage}")
        if self.config.resume == "auto":
            return found
        step = int(self.config.resume)
        checkpoint.load_meta(self.folder, step)  # says what there is when there is no such step
        later = [s for s in checkpoint.steps(self.folder) if s > step]
        if later:  # they belong to a past that is about to change; auto must not pick them up again
            aside = self._free_name()
            aside.mkdir()
            for other in later:
                path = checkpoint.step_folder(self.folder, other)
                path.rename(aside / path.name)
            self.say(f"later checkpoints ({', '.join(map(str, later))}) are now in {aside.name}")
        return step

    def _free_name(self) -> Path:
        """The first of <tag>.1, <tag>.2, … that does not exist."""
        numbered = (self.folder.with_name(f"{self.folder.name}.{n}") for n in count(1))
        return next(path for path in numbered if not path.exists())

    def check_same_run(self, identity: dict[str, Any]) -> None:
        """Takes `identity`, what must not change while a run goes on, and compares it with what was saved."""
        self.identity = identity
        if not self.meta:
            return
        saved = self.meta.get("identity", {})
        self.check_tokenizer(self.folder, saved.get("tokenizer"))
        changed = [
            f"{k} was {saved.get(k)!r} and is {value!r}" for k, value in identity.items() if saved.get(k) != value
        ]
        if changed:
            raise UsageError(
                f"the run {self.folder.name!r} at step {self.start} has another configuration: {'; '.join(changed)}. "
                "Give the old values to go on, another --tag for a new run, or --resume never to begin this one anew"
            )

    def check_tokenizer(self, folder: Path, fingerprint: str | None) -> None:
        """Refuses a model that was trained with another tokenizer than the one that is there."""
        if fingerprint != self.fingerprint:
            raise NanochatError(
                f"{folder} was trained with the tokenizer {fingerprint}, but the one in "
                f"{base_dir() / 'tokenizer'} is {self.fingerprint}: its token numbers mean something else. "
                "Bring the old tokenizer back, or train under another --tag (or with --resume never)"
            )

    @property
    def dtype_name(self) -> str:
        return str(self.runtime.dtype).removeprefix("torch.")

    # What trains it

    def make_model(
        self,
        model_config: GPTConfig,
        lr_scale: float,
        muon_decay: float,
        source: tuple[Path, int] | None,
        moments: bool = True,
        fp8: bool = False,
    ) -> None:
        """The model and its optimizer: from this run's checkpoint, else from `source` (folder, step), else drawn anew.

        An earlier stage's optimizer lends its moments if `moments`; rates and decay are this stage's.
        """
        config, runtime = self.config, self.runtime
        self.model_config = model_config
        self.compiled = config.compile == "blocks" or (config.compile == "auto" and runtime.device.type == "cuda")
        mode = "train-compiled" if self.compiled else "train-eager"
        self.plan = KernelPlan.resolve(config.kernels, device=runtime.device, dtype=runtime.dtype, mode=mode)
        with torch.device("meta"):
            model = GPT(model_config, plan=self.plan, dtype=runtime.dtype)
        self.model = model.to_empty(device=runtime.device)
        self.model.rope(model_config.seq_len, runtime.device)  # now: tables made while generating could not train
        if self.start is not None:
            source = self.folder, self.start
        if source is None:
            self.model.init_weights(torch.Generator(runtime.device).manual_seed(config.seed))
        else:
            checkpoint.load_parameters(self.model, checkpoint.load_state(*source), str(source[0]))
        parameters = dict(self.model.named_parameters())
        groups = parameter_groups(parameters, model_config.width, lr_scale, muon_decay)
        self.optimizer = MuonAdamW(parameters, groups, self.plan, runtime)
        self.model.fp8 = Fp8(self.model) if fp8 else None
        if source is not None and (moments or self.start is not None):
            if checkpoint.has_optimizer(*source):
                saved = checkpoint.load_optimizer(*source)
                self.optimizer.load_state_dict(saved)
                if self.model.fp8:
                    self.model.fp8.load_state_dict(saved)
            else:
                self.say(f"{source[0]} was imported without an optimizer's state: the moments start at zero")
        self.model.checkpoint_activations = config.checkpoint_activations
        if self.compiled:
            self.model.compile_blocks()

    def choose_rows(self, per_rank: int) -> tuple[int, str]:
        """Rows of a micro-batch, a divisor of a step's on one rank, and why: given, as before an interruption (so that
        losses repeat), or what suits the device."""
        if self.config.rows is not None:
            return micro_batch.check_rows(self.config.rows, per_rank), "given"
        before = self.meta.get("loop", {})
        if before.get("world_size") == self.runtime.world_size and before.get("device") == self.runtime.device.type:
            if per_rank % before["rows"] == 0:
                return before["rows"], "as before"
        return micro_batch.choose_rows(self.model, per_rank, self.runtime)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """For passes of shapes of their own, which are not worth compiling. The model is in evaluation mode inside."""
        self.model.eval()
        try:
            if self.compiled:
                with torch.compiler.set_stance("force_eager"):
                    yield
            else:
                yield
        finally:
            self.model.train()

    # The loop

    def train(
        self,
        batches: Iterator[Any],
        accumulation: int,
        steps: int,
        rates: Callable[[int], StepRates],
        loss: Callable[[GPT, Any], torch.Tensor] | None = None,
        extras: Callable[[], Mapping[str, Any]] = dict,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Trains to `steps`; False when a signal ended it early. `before` runs when everything is ready."""
        config, runtime, start, loop = self.config, self.runtime, self.start or 0, self.meta.get("loop", {})
        flops, peak = costs.training_flops_per_token(self.model_config), costs.peak_bf16_flops(runtime.device)

        def utilization(result: StepResult) -> float | None:
            return flops * result.tokens / result.seconds / (peak * runtime.world_size) if peak else None

        scaler = LossScaler(runtime, **loop.get("scaler") or {}) if runtime.dtype == torch.float16 else None
        self.average = LossAverage(**loop.get("average", {}))
        on_main(runtime, lambda: self._open_metrics(start))
        self.stepper = Stepper(self.model, self.optimizer, batches, accumulation, runtime, scaler, loss)
        self.loop = Run(
            self.stepper,
            rates,
            self,
            steps=steps,
            start=start,
            save_every=config.save_every,
            eval_every=config.eval_every,
            sample_every=config.sample_every,
            display=Display(steps, start, self.console, runtime.is_main),
            metrics=self.metrics,
            average=self.average,
            utilization=utilization,
            extras=extras,
        )
        try:
            before()
            return self.loop.train()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _open_metrics(self, start: int) -> None:
        settings = asdict(self.config) | self.identity
        trackers = [open_tracker(name, self.folder, self.folder.name, settings) for name in self.config.track]
        self.metrics = MetricsLog(self.folder / "metrics.jsonl", start, trackers)

    # Called by the loop between steps, on all ranks

    def extra_meta(self) -> dict[str, Any]:
        """What a checkpoint must say for the stage to go on, beyond what they all say. Plain JSON."""
        return {}

    def save(self, step: int) -> None:
        optimizer_state = self.optimizer.state_dict()
        if self.model.fp8:
            optimizer_state |= self.model.fp8.state_dict()
        meta = {
            "stage": self.name,
            "config": self.model_config.to_dict(),
            "identity": self.identity,
            "tokenizer": self.fingerprint,
            "run": asdict(self.config),
            "val_bpb": self.val_bpb,
            "loop": {
                "world_size": self.runtime.world_size,
                "device": self.runtime.device.type,
                "average": self.average.state_dict(),
                "scaler": self.stepper.scaler.state_dict() if self.stepper.scaler else None,
                "seconds": self.seconds_before + self.loop.step_seconds,
                "rows": self.rows,
            },
            "kernels": {name: choice.backend for name, choice in self.plan.choices.items()},
            "versions": {"torch": torch.__version__},
            **self.extra_meta(),
        }

        def write() -> None:
            state = self.model.state_dict()
            checkpoint.save(self.folder, step, state, optimizer_state, meta, self.config.keep_last)

        begin = time.perf_counter()
        on_main(self.runtime, write)
        self.loop.display.note(f"step {step}: checkpoint saved in {time.perf_counter() - begin:.1f} s")

    def evaluate(self, step: int) -> None:
        raise NotImplementedError

    def sample(self, step: int) -> None:
        raise NotImplementedError

    def record(self, step: int, **values: Any) -> None:
        """Adds values measured after `step` updates to the metrics, on rank 0."""
        if self.metrics is not None:
            self.metrics.write(step, **values)

    # The words around it

    def describe(self) -> str:
        """The model and the machine, in two lines."""
        runtime, config = self.runtime, self.model_config
        counts = costs.parameter_counts(config)
        return (
            f"{self.folder.name}: {config.layers} layers of {config.width} channels, {counts['total'] / 1e6:,.1f}M "
            f"parameters ({counts['matrices'] / 1e6:,.1f}M in matrices), vocabulary {config.vocab_size:,}\n"
            f"device {runtime.device} ({runtime.reasons.get('device', '')}), {runtime.world_size} rank(s), "
            f"{self.dtype_name} ({runtime.reasons.get('dtype', '')})"
        )

    def kernels_text(self) -> str:
        return f"kernels: {', '.join(f'{n}={c.backend}' for n, c in self.plan.choices.items())}"

    def conclude(self, finished: bool, steps: int, result: str = "", **notes: Any) -> int:
        """Marks the last checkpoint as finished, with notes on what was measured after it; or says how to go on.

        Returns the exit code.
        """
        if not finished:
            self.say("stopped as asked; run the same command to go on")
            return INTERRUPTED
        seconds = self.seconds_before + self.loop.step_seconds
        if self.runtime.is_main:
            checkpoint.annotate(self.folder, steps, val_bpb=self.val_bpb, finished=True, **notes)
        self.say(
            f"finished {steps:,} steps in {seconds / 60:.1f} minutes{result}; "
            f"peak memory {peak_memory(self.runtime) / 1e9:.1f} GB; "
            f"the model is in {checkpoint.step_folder(self.folder, steps)}"
        )
        return 0


def peak_memory(runtime: Runtime) -> float:
    """Bytes: the GPU's allocator's peak, or the process's resident peak."""
    if runtime.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(runtime.device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
