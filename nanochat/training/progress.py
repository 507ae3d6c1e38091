"""What a training run shows: a bar that is redrawn on a terminal, a line every few steps anywhere else.

Loss is a running average (β = 0.9, bias-corrected). MFU appears only where the device's peak is known. Data wait is
the share of the time in which training stood still for the loader: above a percent, the loader is the bottleneck.
"""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

EMA_BETA = 0.9
LINES_AT_START = 3  # steps that get a line of their own when output is not a terminal
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class StepResult:
    """What one update reports. loss: mean nats per target over all ranks; times in seconds on this rank."""

    loss: float
    grad_norm: float
    tokens: int
    seconds: float
    data_wait: float
    stop: bool = False  # some rank was asked to stop
    skipped: bool = False  # float16 gradients overflowed
    loss_scale: float | None = None


class LossAverage:
    """Exponential moving average of the loss, corrected for its start at 0."""

    def __init__(self, value: float = 0.0, weight: float = 0.0) -> None:
        self.value, self.weight = value, weight

    def add(self, loss: float) -> float:
        self.value = EMA_BETA * self.value + (1 - EMA_BETA) * loss
        self.weight = EMA_BETA * self.weight + (1 - EMA_BETA)
        return self.mean

    @property
    def mean(self) -> float:
        return self.value / self.weight if self.weight else float("nan")

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "weight": self.weight}


class Display:
    """Shows the progress of `steps` updates; a context manager. Disabled on ranks other than 0."""

    def __init__(self, steps: int, done: int, console: Console, enabled: bool = True) -> None:
        self.steps, self.console, self.enabled = steps, console, enabled
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, text="")
        self._first = done
        self._last_line = 0.0
        self._step_seconds: float | None = None

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, result: StepResult, loss: float, lr: float, mfu: float | None) -> None:
        """After update `step`, counted from 0. loss: the average to show; mfu: a fraction, or None when unknown."""
        if not self.enabled:
            return
        done = step + 1
        # the first step compiles: it says nothing about the steps to come
        if step > self._first or self._step_seconds is None:
            previous = self._step_seconds if step > self._first + 1 else None
            self._step_seconds = result.seconds if previous is None else 0.9 * previous + 0.1 * result.seconds
        eta = _duration((self.steps - done) * (self._step_seconds or 0.0))
        text = f"loss {loss:.4f}  lr ×{lr:.3f}  {result.tokens / result.seconds:,.0f} tok/s"
        text += f"  {mfu:.1%} MFU" if mfu is not None else ""
        text += f"  data wait {result.data_wait / result.seconds:.1%}  {result.seconds:.2f} s/step  ETA {eta}"
        text += "  (overflow: step skipped)" if result.skipped else ""
        self._bar.update(self._task, completed=done, text=text)
        now = time.monotonic()
        early = step < self._first + LINES_AT_START
        due = early or done == self.steps or now - self._last_line > SECONDS_BETWEEN_LINES
        if due and not self.console.is_terminal:
            self._last_line = now
            self.note(f"step {step}/{self.steps}  {text}")


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
