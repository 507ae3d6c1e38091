"""The loop that pretraining and fine-tuning share: micro-batches into steps, and what happens between steps.

    Stepper      one update: `accumulation` forward and backward passes, the optimizer, one look at the results
    Run          step after step, checkpoints, evaluations and samples in between, until done or asked to stop

Losses of micro-batches are averaged, and so are gradients over ranks: the loss is divided by both counts before the
backward pass, so that whatever adds gradients up computes the mean. A step reads its results from the device once, at
its end: loss, gradient norm and whether a rank was asked to stop travel in one small tensor, summed over ranks.

A step is deterministic: with the same seeds, data, rows per micro-batch and number of ranks, losses repeat bit for bit
on the CPU, also across a kill and a resume. Another number of ranks, or other rows, changes the order of sums only.
"""

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import NanochatError
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.training.loss_scale import LossScaler
from nanochat.training.metrics import MetricsLog
from nanochat.training.optimizer import MuonAdamW
from nanochat.training.progress import Display, LossAverage, StepResult
from nanochat.training.schedules import StepRates

GC_EVERY = 5000  # steps


class MicroBatch(Protocol):
    """A loader's batch: (rows, T) int64, and how long training waited for it."""

    @property
    def inputs(self) -> Tensor: ...

    @property
    def targets(self) -> Tensor: ...

    @property
    def wait_seconds(self) -> float: ...


def mean_loss(model: GPT, batch: MicroBatch) -> Tensor:
    """Mean nats per target of one micro-batch: pretraining's loss, where every position has a target."""
    return model(batch.inputs, batch.targets)


class Stepper:
    """Makes updates. `last_batch` is the batch that was used last; its state restarts the loader after it.

    `loss` maps the model and a micro-batch to a 0-d tensor; a step's loss is the mean over micro-batches and ranks.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        batches: Iterator[Any],
        accumulation: int,
        runtime: Runtime,
        scaler: LossScaler | None = None,
        loss: Callable[[GPT, Any], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.accumulation, self.runtime, self.scaler = accumulation, runtime, scaler
        self.loss = mean_loss if loss is None else loss
        self.parameters = list(model.parameters())
        self.last_batch: Any = None

    def step(self, step: int, rates: StepRates, stop_asked: bool = False) -> StepResult:
        """Update number `step`, counted from 0. Raises NanochatError when the loss or a gradient is not finite."""
        begin = time.perf_counter()
        share = 1.0 / (self.accumulation * self.runtime.world_size)
        total: Tensor | None = None
        waited, tokens = 0.0, 0
        for _ in range(self.accumulation):
            batch: MicroBatch = next(self.batches)
            self.last_batch = batch
            waited += batch.wait_seconds
            tokens += batch.inputs.numel() * self.runtime.world_size
            loss = self.loss(self.model, batch)
            if self.runtime.device.type == "cpu" and not math.isfinite(loss.item()):
                raise self._forward_failed(step, loss.item(), batch)  # reading costs nothing here, weights are intact
            total = loss.detach() if total is None else total + loss.detach()
            (loss * (share * self.scaler.scale if self.scaler else share)).backward()
            if self.model.fp8:
                self.model.fp8.observe()
        skip = self.scaler.unscale(self.parameters) if self.scaler else False
        self.optimizer.step(rates, skip)
        if self.model.fp8:
            self.model.fp8.advance()
        assert total is not None
        norm_squared = torch.zeros_like(total) if skip else self.optimizer.grad_norm_squared()
        loss_mean, norm_squared_sum, stop = self._read(total * share, norm_squared, stop_asked)
        if not math.isfinite(loss_mean) or not math.isfinite(norm_squared_sum):
            raise self._update_failed(step, loss_mean)
        return StepResult(
            loss=loss_mean,
            grad_norm=math.sqrt(norm_squared_sum),
            tokens=tokens,
            seconds=time.perf_counter() - begin,
            data_wait=waited,
            stop=stop > 0,
            skipped=skip,
            loss_scale=self.scaler.scale if self.scaler else None,
        )

    def _read(self, loss: Tensor, norm_squared: Tensor, stop: bool) -> list[float]:
        """The step's numbers, summed over ranks: the only wait for the device."""
        packed = torch.stack([loss.float(), norm_squared.float(), torch.full_like(loss, float(stop))])
        if self.runtime.distributed:
            dist.all_reduce(packed)
        return packed.tolist()

    def _forward_failed(self, step: int, loss: float, batch: MicroBatch) -> NanochatError:
        where = first_not_finite(self.model, batch.inputs) or "the loss itself"
        return NanochatError(
            f"the loss of step {step} is {loss}: the first value that is not finite comes from {where}"
            f"{self._rank_text()}; {_REMEDY}"
        )

    def _update_failed(self, step: int, loss: float) -> NanochatError:
        names = self.optimizer.not_finite()
        if self.runtime.distributed:
            found: list[Any] = [None] * self.runtime.world_size
            dist.all_gather_object(found, names)
            names = [name for part in found for name in part]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return NanochatError(
            f"step {step} is not finite: loss {loss}, gradients not finite in {shown or 'no parameter'}; {_REMEDY}"
        )

    def _rank_text(self) -> str:
        return f" on rank {self.runtime.rank}" if self.runtime.distributed else ""


_REMEDY = (
    "training stopped, and the last checkpoint is from before it. Run again to go on from there; if it "
    "comes back, look at the data of that step, or use --dtype float32"
)


@torch.no_grad()
def first_not_finite(model: GPT, inputs: Tensor) -> str | None:
    """The first parameter that is not finite, or else the first part of the model whose output is not."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and not all(torch.isfinite(t).all() for t in tensors if isinstance(t, Tensor)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks do not run inside compiled blocks
            model.hidden(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f"the module {found[0]}" if found else None


class Boundary(Protocol):
    """What happens between steps; `step` counts the updates made. All ranks call these alike."""

    def save(self, step: int) -> None: ...

    def evaluate(self, step: int) -> None: ...

    def sample(self, step: int) -> None: ...


class Run:
    """Updates from `start` to `steps`. Intervals are in updates, 0 means only at the end (evaluate, sample: never).

    A checkpoint precedes an evaluation, which may run out of memory. SIGINT and SIGTERM let the step end, save, stop.
    `utilization` gives a step's MFU as a fraction, or None where it is unknown; `extras` more numbers of that step.
    """

    def __init__(
        self,
        stepper: Stepper,
        rates: Callable[[int], StepRates],
        boundary: Boundary,
        *,
        steps: int,
        start: int = 0,
        save_every: int = 0,
        eval_every: int = 0,
        sample_every: int = 0,
        display: Display,
        metrics: MetricsLog | None = None,
        average: LossAverage | None = None,
        utilization: Callable[[StepResult], float | None] = lambda result: None,
        extras: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.stepper, self.rates, self.boundary = stepper, rates, boundary
        self.steps, self.start = steps, start
        self.save_every, self.eval_every, self.sample_every = save_every, eval_every, sample_every
        self.display, self.metrics, self.average = display, metrics, average or LossAverage()
        self.utilization, self.extras = utilization, extras
        self.step_seconds = 0.0  # spent in updates by this process

    def train(self) -> bool:
        """True when all steps were made, False when a signal ended the run early (its checkpoint is then saved)."""
        with stop_signals() as stop, quiet_garbage_collection() as collect, self.display:
            step, stopped = self.start, False
            while True:
                last = step == self.steps
                self._boundary(step, last, stopped)
                if last or stopped:
                    return last
                rates = self.rates(step)
                result = self.stepper.step(step, rates, stop.is_set())
                self._record(step, result, rates)
                if step == self.start or step % GC_EVERY == 0:
                    collect(step == self.start)
                step += 1
                stopped = result.stop

    def _boundary(self, step: int, last: bool, stopped: bool) -> None:
        def due(every: int) -> bool:
            return every > 0 and step > 0 and (last or step % every == 0)

        if step > self.start and (last or stopped or due(self.save_every)):
            self.boundary.save(step)
        if stopped and not last:
            return
        if due(self.eval_every):
            self.boundary.evaluate(step)
        if due(self.sample_every):
            self.boundary.sample(step)

    def _record(self, step: int, result: StepResult, rates: StepRates) -> None:
        self.step_seconds += result.seconds
        mean, mfu = self.average.add(result.loss), self.utilization(result)
        self.display.update(step, result, mean, rates.lr, mfu)
        if self.metrics is not None:
            self.metrics.write(
                step,
                loss=result.loss,
                lr_multiplier=rates.lr,
                grad_norm=result.grad_norm,
                tokens_per_second=result.tokens / result.seconds,
                step_seconds=result.seconds,
                data_wait_seconds=result.data_wait,
                mfu=mfu,
                loss_scale=result.loss_scale,
                skipped=result.skipped or None,
                **self.extras(),
            )


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second SIGINT interrupts at once. Handlers are put back at the end."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield asked
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def quiet_garbage_collection() -> Iterator[Callable[[bool], None]]:
    """Python's cyclic collector off, and a function to call it by hand (True: what is alive now stays for good).

    A collection walks every object there is, the model's modules and compiled code included, in the middle of a step.
    """
    was_enabled = gc.isenabled()
    gc.disable()

    def collect(freeze: bool) -> None:
        gc.collect()
        if freeze:
            gc.freeze()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
