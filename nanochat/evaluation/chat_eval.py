"""`nanochat chat-eval`: a chat model's accuracy on tasks, and ChatCORE, the mean of the centered accuracies.

Choices are read off the logits of their letters right after the question: one forward pass, many questions at once.
Generated answers come from the serving engine, which starts a problem whenever another's answer is complete, and are
graded meanwhile; with n samples a problem, of which c are right,

    pass@k = 1 − C(n−c, k)/C(n, k)     (arXiv 2107.03374, unbiased)     accuracy = pass@1 = c/n, averaged

Problem i goes to rank i mod W; its seed depends on i alone, so the result depends neither on ranks nor on the batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from math import comb
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nanochat import runtime
from nanochat.chat_format import render_prompt
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import core, results
from nanochat.evaluation.tasks import Task, make_task, question_of
from nanochat.inference.batch_engine import BatchEngine
from nanochat.inference.engine import Engine
from nanochat.inference.loading import StageName, load
from nanochat.inference.runner import WeightsName
from nanochat.inference.sampling import SamplingParams, row_seed
from nanochat.model import checkpoint
from nanochat.model.gpt import GPT
from nanochat.runtime import DeviceName, DtypeName
from nanochat.tokenizer import Tokenizer

DEFAULT_TASKS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spelling")
GRADERS = 4  # answers graded at the same time: each may be a process in the sandbox
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ChatEvalConfig:
    """Grade a chat model."""

    stage: StageName = "auto"
    """auto takes the furthest stage that has a checkpoint: rl, sft, base."""
    tag: str | None = None
    """Model tag; by default the one written last."""
    step: int | None = None
    """Checkpoint step; by default the newest."""
    tasks: str = ""
    """Names separated by commas, each with :PATH for local data; by default all that can be had."""
    max_problems: int | None = None
    """The first so many problems of each task; by default all."""
    samples: int = 1
    """Answers to each problem, for pass@k; give a temperature too."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 = from all."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    batch_rows: int = 64
    """Answers generated together."""
    batch_tokens: int = 0
    """Tokens of lettered questions read together; 0 = 65,536 on CUDA, 2,048 elsewhere."""
    weights: WeightsName = "auto"
    """How weights are held when answers are generated: auto (as the model computes), fp32, bf16, int8, int4."""
    seed: int = 42
    """The same seed gives the same answers."""
    device: DeviceName = "auto"
    """auto takes the first there is of cuda, mps, cpu."""
    dtype: DtypeName = "auto"
    """Compute dtype; auto takes bfloat16 where the GPU has it."""
    kernels: str = "auto"
    """auto, torch, fused, or op=backend,..."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch_rows", 1), ("batch_tokens", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if self.max_problems is not None and self.max_problems < 1:
            raise UsageError(f"--max-problems is {self.max_problems}; it must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise UsageError(
                f"{self.samples} samples at temperature 0 would be equal; set --temperature, for instance 1"
            )

    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, top_k=self.top_k, max_tokens=self.max_tokens, seed=self.seed)


@dataclass(frozen=True)
class TaskScore:
    """One task's result. `correct` counts the right ones of each problem's answers."""

    name: str
    kind: str
    baseline: float
    samples: int
    correct: list[int] = field(repr=False)
    too_long: int = 0
    """Problems that do not fit in the context: counted as wrong."""

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / (len(self.correct) * self.samples)

    @property
    def centered(self) -> float:
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    def pass_at(self, k: int) -> float:
        return sum(pass_at_k(self.samples, c, k) for c in self.correct) / len(self.correct)

    def to_dict(self) -> dict[str, Any]:
        ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, self.samples) if k <= self.samples})
        return {
            "kind": self.kind,
            "problems": len(self.correct),
            "accuracy": self.accuracy,
            "centered": self.centered,
            "baseline": self.baseline,
            "pass_at": {str(k): self.pass_at(k) for k in ks},
            "too_long": self.too_long,
        }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k answers, drawn from `samples` of which `correct` are right, is right."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def chat_core(scores: Sequence[TaskScore]) -> float:
    """Mean centered accuracy: 0 for guessing, 1 for everything right."""
    return sum(score.centered for score in scores) / len(scores)


@torch.no_grad()
def answer_letters(
    model: GPT, tokenizer: Tokenizer, task: Task, indices: Sequence[int], batch_tokens: int, report: Report
) -> list[bool]:
    """Verdicts on lettered questions: the letter whose token is the most likely next one is the answer."""
    items = [task[index] for index in indices]
    asked = [render_prompt(tokenizer, question_of(item)) for item in items]
    prompts = [core.Prompt([ids], [(len(ids), len(ids))]) for ids in asked]
    verdicts = [False] * len(items)
    done = 0
    for batch in core.batches(prompts, batch_tokens or core.tokens_together(model.device)):
        ids, lengths = core.padded([asked[i] for i in batch], model.device)
        hidden = model.hidden(ids)[torch.arange(len(batch), device=ids.device), lengths - 1]
        for i, logits in zip(batch, model.logits(hidden).cpu(), strict=True):
            letters = items[i]["letters"]
            tokens = [tokenizer.encode(letter) for letter in letters]
            best = int(logits[torch.tensor([token[0] for token in tokens])].argmax())
            verdicts[i] = task.evaluate(items[i], letters[best])
        done += len(batch)
        report(done, len(items))
    return verdicts


def generate_answers(
    engine: Engine,
    task: Task,
    indices: Sequence[int],
    params: SamplingParams,
    samples: int,
    batch_rows: int,
    weights: WeightsName,
    report: Report,
) -> tuple[list[int], int]:
    """How many of each problem's sampled answers are right, and how many problems did not fit in the context."""
    asked = {index: render_prompt(engine.tokenizer, question_of(task[index])) for index in indices}
    fitting = [index for index in indices if len(asked[index]) < engine.context]
    if not fitting:
        return [0] * len(indices), len(indices)
    prompts = [asked[index] for index in fitting]
    each = [replace(params, seed=row_seed(params.seed, 1 + index)) for index in fitting]
    rows = min(batch_rows, len(fitting) * samples)
    serving = BatchEngine.offline(engine, prompts, params.max_tokens, rows, weights)
    verdicts: dict[int, list[Future[bool]]] = {index: [] for index in indices}
    done = len(indices) - len(fitting)
    with ThreadPoolExecutor(GRADERS) as pool:
        for number, _, answer in serving.complete(prompts, each, samples):
            given = verdicts[fitting[number]]
            given.append(pool.submit(task.evaluate, task[fitting[number]], answer.text))
            if len(given) == samples:
                done += 1
                report(done, len(indices))
        correct = [sum(verdict.result() for verdict in verdicts[index]) for index in indices]
    return correct, len(indices) - len(fitting)


def evaluate_task(
    engine: Engine,
    task: Task,
    params: SamplingParams,
    *,
    samples: int = 1,
    max_problems: int | None = None,
    batch_rows: int = 64,
    batch_tokens: int = 0,
    weights: WeightsName = "auto",
    report: Report = lambda done, total: None,
) -> TaskScore:
    """One task on all ranks; every rank returns the whole result. report(done, total) counts this rank's problems.

    weights: as `make_runner` takes them, for generated answers; letters are read with the model as it is.
    """
    total = len(task) if max_problems is None else min(len(task), max_problems)
    ranks = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
    mine = range(rank, total, world)
    counts = torch.zeros(total + 1, dtype=torch.int64, device=engine.model.device)  # the last: problems too long
    if task.eval_type == "choice":
        samples = 1
        right = answer_letters(engine.model, engine.tokenizer, task, mine, batch_tokens, report)
        counts[list(mine)] = torch.tensor(right, dtype=torch.int64, device=counts.device)
    elif task.eval_type == "generate":
        found, too_long = generate_answers(engine, task, mine, params, samples, batch_rows, weights, report)
        counts[list(mine)] = torch.tensor(found, dtype=torch.int64, device=counts.device)
        counts[-1] = too_long
    else:
        raise UsageError(f"{task.name} cannot be graded; it is for training")
    if ranks:
        dist.all_reduce(counts)
    *correct, too_long = counts.tolist()
    return TaskScore(task.name, str(task.eval_type), task.baseline, samples, correct, too_long)


def load_tasks(names: str) -> tuple[list[Task], dict[str, str]]:
    """The tasks named, all of which must be there; without names the default ones, and why others cannot be had."""
    if names.strip():
        return [make_task(name) for name in names.split(",")], {}
    tasks, missing = [], {}
    for name in DEFAULT_TASKS:
        try:
            tasks.append(make_task(name))
        except NanochatError as error:
            missing[name] = str(error)
    return tasks, missing


def run(config: ChatEvalConfig) -> int:
    """The command. Returns the exit code."""
    params = config.sampling()
    machine = runtime.start(config.device, config.dtype, config.seed)
    try:
        loaded = load(machine, config.stage, config.tag, config.step, config.kernels)
        tasks, missing = load_tasks(config.tasks)
        console = Console(quiet=not machine.is_main, highlight=False, markup=False, soft_wrap=True)
        console.print(f"{loaded.name}: {', '.join(task.name for task in tasks)}")
        for name, reason in missing.items():
            console.print(f"without {name}: {reason}")
        engine, scores = loaded.engine(), []
        with Progress(console=Console(stderr=True), transient=True, disable=not machine.is_main) as bars:
            for task in tasks:
                bar = bars.add_task(task.name, total=None)

                def report(done: int, total: int, bar: Any = bar) -> None:
                    bars.update(bar, completed=done, total=total)

                scores.append(
                    evaluate_task(
                        engine,
                        task,
                        params,
                        samples=config.samples,
                        max_problems=config.max_problems,
                        batch_rows=config.batch_rows,
                        batch_tokens=config.batch_tokens,
                        weights=config.weights,
                        report=report,
                    )
                )
                bars.remove_task(bar)
        console.print(table_of(scores, missing))
        if machine.is_main:
            content = {
                "model": loaded.name,
                "step": loaded.step,
                "label": label_of(scores, missing),
                "chat_core": chat_core(scores),
                "tasks": {score.name: score.to_dict() for score in scores},
                "missing": missing,
                "config": asdict(config),
            }
            path = loaded.folder / f"chat_eval_{loaded.step:06d}.json"
            results.write_json(path, content)
            results.record(loaded.stage, "chat_eval", content)
            checkpoint.annotate(loaded.folder, loaded.step, chat_core=content["chat_core"])
            console.print(f"written to {path}")
    finally:
        runtime.stop(machine)
    return 0


def label_of(scores: Sequence[TaskScore], missing: dict[str, str]) -> str:
    """The name of the mean: ChatCORE only when it is over the default tasks."""
    if len(scores) == len(DEFAULT_TASKS) and not missing:
        return "ChatCORE"
    return f"ChatCORE over {', '.join(score.name for score in scores)}"


def table_of(scores: Sequence[TaskScore], missing: dict[str, str]) -> Table:
    table = Table("task", "problems", "accuracy", "centered")
    most = max(score.samples for score in scores)
    if most > 1:
        table.add_column(f"pass@{most}")
    for score in scores:
        row = [score.name, str(len(score.correct)), f"{score.accuracy:.2%}", f"{score.centered:.4f}"]
        if most > 1:
            row.append(f"{score.pass_at(score.samples):.2%}")
        table.add_row(*row)
    table.add_row(label_of(scores, missing), "", "", f"{chat_core(scores):.4f}", end_section=True)
    return table
