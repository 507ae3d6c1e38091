"""The serving engine: many requests at once, each as if it were alone. Small loop: schedule → run → draw → hand out.

    add → waiting → [ schedule: which tokens → runner: logits → draw → accept: text, tool, finish ] → Outputs

A request joins and leaves between any two steps (continuous batching). Keys and values live in a paged cache of fixed
size (docs/paged_cache.md), shared where texts begin alike; the scheduler admits what fits and preempts what no longer
does. What a request gets depends on its prompt, settings and seed: a draw is a function of logits, seed and position,
and the logits of a row do not depend on other rows, as far as the runner keeps that promise (nanochat.inference.step).

It knows nothing of threads or sockets: whoever owns an engine calls `add`, `cancel` and `step` from one place.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.inference.blocks import Blocks
from nanochat.inference.engine import Engine
from nanochat.inference.paged_cache import BLOCK_SIZE, FULL, WINDOW, PagedCache, pool_sizes
from nanochat.inference.row import Completion, Kind, Row, Tool
from nanochat.inference.runner import WeightsName, make_runner
from nanochat.inference.sampling import BatchSampler, Penalties, SamplingParams, row_seed
from nanochat.inference.scheduler import Scheduler, Work
from nanochat.inference.scheduler import Sequence as Text
from nanochat.inference.speculate import Drafter
from nanochat.inference.step import Runner, StepBatch
from nanochat.inference.tools import calculate
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

DEFAULT = SamplingParams()
OFFLINE_STEP = {"cuda": 4096}  # tokens of a step where nobody waits for the next word
Finish = Literal["stop", "length", "context", "error"]


@dataclass(frozen=True)
class BatchConfig:
    """The engine's limits."""

    max_batch: int = 64
    """Requests that are computed at the same time; others wait."""
    max_step_tokens: int = 512
    """Tokens of a step, of prompts and answers together: a long prompt is read in pieces between others' tokens."""
    block_size: int = BLOCK_SIZE
    """Tokens of a cache block."""
    cache_bytes: int | None = None
    """Memory for keys and values; by default what max_batch full contexts need, or a share of the free memory."""
    num_blocks: int | None = None
    """The same as a number of blocks of the full group."""
    prefix_cache: bool = True
    """Share what texts have in common at their beginning."""
    speculate: int = 0
    """Tokens guessed ahead by looking them up in the text; 0 is off."""
    context: int | None = None
    """Most tokens of prompt and answer together; by default the model's sequence length."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("block_size", 1), ("speculate", 0), ("num_blocks", 1), ("context", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")
        if self.max_step_tokens < self.max_batch:
            raise UsageError(
                f"max_step_tokens is {self.max_step_tokens}; it must be at least max_batch, {self.max_batch}: "
                "every running request takes a token of a step"
            )


@dataclass(frozen=True)
class Request:
    """One text to continue. Requests with a lower priority number are served first."""

    id: str
    tokens: tuple[int, ...]
    params: SamplingParams = DEFAULT
    priority: int = 0
    tool: bool = True


class Output(NamedTuple):
    """One token of one request, in order; the last has `finish`. See nanochat.inference.row.Event for text and kind."""

    id: str
    token: int
    text: str
    kind: Kind
    forced: bool
    finish: Finish | None
    logprob: float | None = None
    """Of the token, in nats, as the model sees it: before penalties, temperature and cut-offs."""
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """Requests now; blocks of both groups now; tokens and events since the engine began."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    blocks_cached: int
    """Blocks without an owner whose content can still be found."""
    prompt_tokens: int
    cached_prompt_tokens: int
    """Tokens that were found in the cache instead of being computed, those found again after a preemption included."""
    generated_tokens: int
    preemptions: int
    cancelled: int
    steps: int
    errors: int


@dataclass(eq=False)
class Job:
    """A request on its way."""

    request: Request
    row: Row
    text: Text
    seed: int
    drafter: Drafter | None
    slot: int | None = None
    """Where its penalties are counted."""


class BatchEngine:
    """Serves one model. A runner computes the steps; by default that which `make_runner` chooses."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        config: BatchConfig = BatchConfig(),
        runner: Runner | None = None,
        tool: Tool | None = calculate,
    ) -> None:
        self.model, self.tokenizer, self.config, self.tool = model, tokenizer, config, tool
        self.context = model.config.seq_len if config.context is None else config.context
        self.runner = make_runner(model) if runner is None else runner
        sizes = pool_sizes(
            model.config, self.context, config.block_size, config.max_step_tokens, config.max_batch,
            model.device, self.runner.cache_dtype, config.cache_bytes, config.num_blocks,
        )  # fmt: skip
        self.device = model.device
        self.cache = PagedCache(
            model.config, sizes, config.block_size, self.context, model.device, self.runner.cache_dtype
        )
        self.blocks = Blocks(sizes, config.block_size, self.cache.window, self.context, config.prefix_cache)
        self.scheduler = Scheduler(self.blocks, config.max_batch, config.max_step_tokens)
        self.jobs: dict[str, Job] = {}
        self.of_text: dict[Text, Job] = {}
        self.penalties: Penalties | None = None
        self.free_slots = list(range(config.max_batch))
        self._sampler: tuple[list[Job], BatchSampler] | None = None
        self._numbers = itertools.count()
        self.error: Exception | None = None
        self._prompt_tokens = self._generated = self._cancelled = self._steps = self._errors = self._adopted = 0

    @classmethod
    def offline(
        cls,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        rows: int,
        weights: WeightsName = "auto",
    ) -> "BatchEngine":
        """An engine like the reference engine given, with memory for `rows` of these prompts and their answers."""
        model, size = engine.model, BLOCK_SIZE
        length = min(max(map(len, prompts), default=1) + max_tokens, engine.context)
        step = max(OFFLINE_STEP.get(model.device.type, 512), rows)
        runner = make_runner(model, weights)
        most, _ = pool_sizes(
            model.config, engine.context, size, step, rows, model.device, runner.cache_dtype
        )  # what memory there is sets a limit too: then fewer run together
        blocks = min(most, rows * -(-length // size))
        config = BatchConfig(rows, step, size, num_blocks=blocks, context=engine.context)
        return cls(model, engine.tokenizer, config, runner, engine.tool)

    def check(self, request: Request) -> None:
        """Raises UsageError for a request that could never run."""
        tokens, vocab_size = request.tokens, self.model.config.vocab_size
        if not tokens:
            raise UsageError("a prompt has no tokens; begin it with <|bos|>")
        if len(tokens) >= self.context:
            raise UsageError(
                f"a prompt of {len(tokens)} tokens leaves no room in a context of {self.context}; shorten it"
            )
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            raise UsageError(f"{wrong} is not a token id of this model; ids are 0 to {vocab_size - 1}")
        reason = self.scheduler.refusal(self._limit(request))
        if reason:
            raise UsageError(f"{reason}; ask for fewer tokens or give the engine a larger cache")

    def add(self, request: Request) -> None:
        """Accepts a request, to be computed when its turn comes. Raises UsageError as `check` does."""
        self._add(request, request.params.seed)

    def cancel(self, id: str) -> None:
        """Forgets a request, known or not, and frees its blocks at once. Nothing more is handed out of it."""
        job = self.jobs.get(id)
        if job is not None:
            self._cancelled += 1
            self._remove(job)

    @property
    def has_work(self) -> bool:
        return bool(self.jobs)

    @torch.no_grad()
    def step(self) -> list[Output]:
        """One step for all that run: their new tokens. If it fails, what was running ends with "error" and the engine
        goes on with an empty cache; `error` keeps the reason."""
        for text in self.scheduler.running if self.config.speculate else ():
            self._guess(self.of_text[text])
        works = self.scheduler.schedule()
        if not works:
            return []
        self._steps += 1
        try:
            batch = batch_of(works, self.device)
            logits = self.runner(batch, self.cache)
            drawing = [work for work in works if work.finishes]
            ids, logprobs = self._draw(drawing, logits)
            return self._hand_out(works, ids, logprobs)
        except Exception as error:  # whatever went wrong in a step must not end the service
            return self._fail(error)

    def stats(self) -> EngineStats:
        pools = self.blocks.pools
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting,
            blocks_used=sum(pool.used for pool in pools),
            blocks_total=sum(self.blocks.sizes),
            blocks_cached=sum(not pool.owners[block] for pool in pools for block in pool.entries),
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._adopted + sum(job.text.adopted for job in self.jobs.values()),
            generated_tokens=self._generated,
            preemptions=self.scheduler.preemptions,
            cancelled=self._cancelled,
            steps=self._steps,
            errors=self._errors,
        )

    def weights_changed(self) -> None:
        """To be called after the model's weights were changed in place: nothing computed before can be used again."""
        self.runner.refresh()
        self.blocks.forget()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT,
        samples: int = 1,
    ) -> list[list[Completion]]:
        """For every prompt its answers, as the reference engine gives them. Answer j has the seed of `row_seed`."""
        answers: list[list[Completion | None]] = [[None] * samples for _ in prompts]
        for prompt, sample, completion in self.complete(prompts, params, samples):
            answers[prompt][sample] = completion
        return [[answer for answer in row if answer is not None] for row in answers]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = DEFAULT,
        samples: int = 1,
    ) -> Iterator[tuple[int, int, Completion]]:
        """The same, each (prompt, sample, answer) as soon as it is there. Raises NanochatError when a step fails."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(each)} sampling settings for {len(prompts)} prompts; give one, or one per prompt")
        if samples < 1:
            raise UsageError(f"{samples} samples were asked for; ask for at least 1")
        if self.jobs:
            raise UsageError(f"{len(self.jobs)} requests are on their way; generate when they are done")
        number, mine = next(self._numbers), {}
        try:
            for i, prompt in enumerate(prompts):
                for j in range(samples):
                    request = Request(f"{number}.{i}.{j}", tuple(prompt), each[i])
                    mine[request.id] = (i, j, self._add(request, row_seed(each[i].seed, j)))
            while self.jobs:
                for output in self.step():
                    if output.finish == "error":
                        raise NanochatError(f"a step of the engine failed: {self.error}") from self.error
                    if output.finish:
                        i, j, job = mine[output.id]
                        yield i, j, job.row.completion()
        finally:
            for id in mine:
                self.cancel(id)

    def _add(self, request: Request, seed: int) -> Job:
        self.check(request)
        if request.id in self.jobs:
            raise UsageError(f"there is a request with the id {request.id!r} already; give each its own")
        params = request.params
        tool = self.tool if request.tool else None
        row = Row(0, len(request.tokens), params, self.tokenizer, tool, self.context)
        text = self.scheduler.add(request.tokens, request.priority)
        drafter = Drafter() if self.config.speculate and not params.penalizes else None
        job = self.jobs[request.id] = self.of_text[text] = Job(request, row, text, seed, drafter)
        self._prompt_tokens += len(request.tokens)
        return job

    def _limit(self, request: Request) -> int:
        return min(len(request.tokens) + request.params.max_tokens, self.context)

    def _remove(self, job: Job) -> None:
        self.scheduler.remove(job.text)
        self._adopted += job.text.adopted
        del self.jobs[job.request.id], self.of_text[job.text]
        self._free_slot(job)

    def _guess(self, job: Job) -> None:
        text = job.text
        if job.drafter is not None and text.pending == 1:
            room = self._limit(job.request) - len(text.tokens) - 1
            count = min(self.config.speculate, room)
            text.drafts = job.drafter.guess(text.tokens, count) if count > 0 else []

    def _draw(self, works: Sequence[Work], logits: Tensor) -> tuple[list[int], "LogProbs | None"]:
        """One token per row of the logits: the works' rows one behind the other, a row per draft and one more."""
        if not works:
            return [], None
        jobs = [self.of_text[work.sequence] for work in works for _ in range(work.drafts + 1)]
        if self._sampler is None or self._sampler[0] != jobs:
            params, seeds = [job.request.params for job in jobs], [job.seed for job in jobs]
            sampler = BatchSampler(params, seeds, None, logits.size(1), logits.device)
            self._sampler = jobs, sampler
        positions = [
            at + 1 for work in works for at in range(work.start + work.count - work.drafts - 1, work.start + work.count)
        ]
        penalized = self._penalized(jobs, logits)
        at = torch.from_numpy(np.array(positions, np.int64)).to(logits.device)
        ids = self._sampler[1].draw(self.model.plan, penalized, at)
        wanted = max(-1 if job.request.params.logprobs is None else job.request.params.logprobs for job in jobs)
        logprobs = None if wanted < 0 else LogProbs.of(logits, ids, wanted)
        return ids.tolist(), logprobs

    def _penalized(self, jobs: Sequence[Job], logits: Tensor) -> Tensor:
        """The logits, with penalties taken off those rows that have any."""
        rows = [row for row, job in enumerate(jobs) if job.request.params.penalizes]
        if not rows:
            return logits
        if self.penalties is None:
            self.penalties = Penalties(self.config.max_batch, logits.size(1), logits.device)
        for job in self.jobs.values():
            if job.text.held is None:  # preempted: another may need its slot
                self._free_slot(job)
        for row in rows:
            job = jobs[row]
            if job.slot is None:
                job.slot = self.free_slots.pop()
                answer = job.text.tokens[len(job.request.tokens) :]
                self.penalties.begin(job.slot, job.request.params, job.request.tokens, answer)
        slots = torch.tensor([jobs[row].slot for row in rows], device=logits.device)
        index = torch.tensor(rows, device=logits.device)
        return logits.index_copy(0, index, self.penalties.apply(logits[index], slots))

    def _free_slot(self, job: Job) -> None:
        if job.slot is not None:
            self.free_slots.append(job.slot)
            job.slot = None

    def _hand_out(self, works: Sequence[Work], ids: Sequence[int], logprobs: "LogProbs | None") -> list[Output]:
        outputs: list[Output] = []
        at = 0
        for work in works:
            if not work.finishes:
                self.scheduler.done(work)
                continue
            job = self.of_text[work.sequence]
            accepted, drafts = 0, work.sequence.drafts[: work.drafts]
            asked = job.request.params.logprobs
            for number in range(work.drafts + 1):
                token = ids[at + number]
                seen = (None, ()) if asked is None or logprobs is None else logprobs.row(at + number, asked)
                more = self._accept(job, token, seen)
                outputs += more
                if len(more) > 1 or more[-1].finish or number == work.drafts or drafts[number] != token:
                    break
                accepted += 1
            at += work.drafts + 1
            self.scheduler.done(work, accepted)
            if outputs[-1].finish:
                self._remove(job)
        self._count_penalties(outputs)
        self._generated += len(outputs)
        return outputs

    def _accept(self, job: Job, token: int, seen: tuple[float | None, tuple[tuple[int, float], ...]]) -> list[Output]:
        """A drawn token, and those that the tool then forces in."""
        event = job.row.accept(token)
        outputs = [Output(job.request.id, token, event.text, event.kind, False, event.finish, *seen)]
        while event.finish is None and (forced := job.row.forced()) is not None:
            event = job.row.accept(forced)
            outputs.append(Output(job.request.id, forced, event.text, event.kind, True, event.finish))
        job.text.tokens += [output.token for output in outputs]
        return outputs

    def _count_penalties(self, outputs: Sequence[Output]) -> None:
        if self.penalties is None:
            return
        taken = [
            (job.slot, output.token)
            for output in outputs
            if (job := self.jobs.get(output.id)) is not None and job.slot is not None
        ]
        if taken:
            slots, ids = torch.tensor(taken, device=self.penalties.counts.device).T
            self.penalties.record(ids, slots)

    def _fail(self, error: Exception) -> list[Output]:
        self.error = error
        self._errors += 1
        failed = [self.of_text[text] for text in self.scheduler.running]
        for job in failed:
            self._remove(job)
        self.blocks.forget()  # blocks may have been named whose content was never computed
        return [Output(job.request.id, -1, "", "text", False, "error") for job in failed]


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of rows: of the token drawn, and of the likeliest ones, on the host."""

    drawn: list[float]
    ids: list[list[int]] = field(repr=False)
    values: list[list[float]] = field(repr=False)

    @classmethod
    def of(cls, logits: Tensor, drawn: Tensor, top: int) -> "LogProbs":
        every = logits.log_softmax(-1)
        values, ids = every.topk(min(top, logits.size(1)), dim=-1)
        return cls(every.gather(1, drawn[:, None])[:, 0].tolist(), ids.tolist(), values.tolist())

    def row(self, row: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        likeliest = zip(self.ids[row][:top], self.values[row][:top], strict=True)
        return self.drawn[row], tuple(likeliest)


def batch_of(works: Sequence[Work], device: torch.device) -> StepBatch:
    """The scheduler's decision as tensors."""
    tokens: list[int] = []
    previous: list[int] = []
    positions: list[int] = []
    outputs: list[int] = []
    starts = [0]
    for work in works:
        text, end = work.sequence.tokens, work.start + work.count
        new = text[work.start : end] + work.sequence.drafts[: work.drafts]
        tokens += new
        previous += [text[work.start - 1] if work.start else -1, *new[:-1]]
        positions += range(work.start, end)
        starts.append(len(tokens))
        if work.finishes:
            outputs += range(len(tokens) - work.drafts - 1, len(tokens))
    held = [work.sequence.held for work in works if work.sequence.held is not None]
    width = max(h.blocks for h in held)
    tables = [np.frombuffer(h.tables[group], np.int32, width) for group in (FULL, WINDOW) for h in held]
    long = np.array([*tokens, *previous, *positions, *outputs], np.int64).view(np.int32)
    short = np.array([*starts, *(work.start + work.count for work in works)], np.int32)
    packed = torch.from_numpy(np.concatenate([long, short, *tables])).to(device)  # one copy to the device
    count, cells = len(tokens), len(held) * width
    wide, narrow = packed.split_with_sizes([long.size, packed.numel() - long.size])  # a third of split's time
    ids, before, at, wanted = wide.view(torch.int64).split_with_sizes([count, count, count, len(outputs)])
    begins, ends, full, window = narrow.split_with_sizes([len(starts), len(works), cells, cells])
    return StepBatch(ids, before, at, begins, ends, (full.view(-1, width), window.view(-1, width)), wanted)
