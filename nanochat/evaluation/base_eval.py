"""`nanochat eval`: what a base model knows. CORE, bits per byte on both splits of a corpus, and samples to read."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nanochat import runtime
from nanochat.data.corpus import SPLITS, open_corpus
from nanochat.data.loader import PackedLoader
from nanochat.errors import UsageError
from nanochat.evaluation import bits_per_byte, bundle, core, results
from nanochat.inference.loading import Loaded, StageName, load
from nanochat.inference.sampling import SamplingParams
from nanochat.runtime import DeviceName, DtypeName, Runtime

PARTS = ("core", "bpb", "samples")
PROMPTS = (
    "The capital of France is",
    "Water is made of",
    "If yesterday was Friday, then tomorrow is",
    "The planets of the solar system are",
    "Once upon a time there was",
    "5 + 7 =",
)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a base model."""

    stage: StageName = "base"
    """Of which stage: base, sft, rl, or auto for the furthest there is."""
    tag: str | None = None
    """Model tag; by default the one written last."""
    step: int | None = None
    """Checkpoint step; by default the newest."""
    parts: str = "core,bpb,samples"
    """What to do, separated by commas."""
    data: Path | None = None
    """Folder of the CORE bundle; by default it is downloaded."""
    max_per_task: int | None = None
    """Examples of each CORE task at most, for a quick look."""
    batch_tokens: int = 0
    """Tokens of CORE prompts read together; 0 = 65,536 on CUDA, 2,048 elsewhere."""
    text: str | None = None
    """Corpus for bits per byte: a source as for `nanochat data`, or a folder; by default the one trained on."""
    eval_tokens: int = 0
    """Tokens of each split for bits per byte; 0 = 41,943,040 on CUDA, 131,072 elsewhere."""
    rows: int = 8
    """Rows of a batch for bits per byte."""
    seed: int = 42
    """Seed of the samples that are not greedy."""
    device: DeviceName = "auto"
    """auto takes the first there is of cuda, mps, cpu."""
    dtype: DtypeName = "auto"
    """Compute dtype; auto takes bfloat16 where the GPU has it."""
    kernels: str = "auto"
    """auto, torch, fused, or op=backend,..."""

    def __post_init__(self) -> None:
        unknown = self.chosen() - set(PARTS)
        if unknown or not self.chosen():
            raise UsageError(f"--parts {self.parts!r}: use {', '.join(PARTS)}, separated by commas")
        for name, least in (("batch_tokens", 0), ("eval_tokens", 0), ("rows", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if self.max_per_task is not None and self.max_per_task < 1:
            raise UsageError(f"--max-per-task is {self.max_per_task}; it must be at least 1")

    def chosen(self) -> set[str]:
        return {part.strip() for part in self.parts.split(",") if part.strip()}


def run(config: EvalConfig) -> int:
    """The command. Returns the exit code."""
    machine = runtime.start(config.device, config.dtype, config.seed)
    try:
        loaded = load(machine, config.stage, config.tag, config.step, config.kernels, mode="prefill")
        console = Console(quiet=not machine.is_main, highlight=False, markup=False, soft_wrap=True)
        console.print(f"{loaded.name}, on {machine.device} in {str(machine.dtype).removeprefix('torch.')}")
        found: dict[str, Any] = {"model": loaded.name, "step": loaded.step, "config": _plain(config)}
        if "samples" in config.chosen():
            found["samples"] = _samples(loaded, config, console) if machine.is_main else []
        if "bpb" in config.chosen():
            found["bpb"] = _bits_per_byte(loaded, config, machine, console)
        if "core" in config.chosen():
            found["core"] = _core(loaded, config, machine, console)
        if machine.is_main:
            path = loaded.folder / f"eval_{loaded.step:06d}.json"
            results.write_json(path, found)
            results.record(loaded.stage, "eval", found)
            console.print(f"written to {path}")
    finally:
        runtime.stop(machine)
    return 0


def _plain(config: EvalConfig) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def _samples(loaded: Loaded, config: EvalConfig, console: Console) -> list[dict[str, str]]:
    """Greedy continuations of the prompts, then texts from nothing at temperature 1."""
    tokenizer, engine = loaded.tokenizer, loaded.engine()
    asked = [*PROMPTS, "", "", ""]
    greedy = SamplingParams(temperature=0.0, max_tokens=24, tools=False)
    free = SamplingParams(temperature=1.0, max_tokens=96, tools=False)
    params = [greedy] * len(PROMPTS) + [
        SamplingParams(**{**asdict(free), "seed": config.seed + number}) for number in range(3)
    ]
    answers = engine.generate([[tokenizer.bos_id, *tokenizer.encode(text)] for text in asked], params)
    samples = [{"prompt": text, "text": answer.text} for text, [answer] in zip(asked, answers, strict=True)]
    for sample in samples:
        console.print(f"> {sample['prompt']}|{sample['text']}")
    return samples


def _bits_per_byte(loaded: Loaded, config: EvalConfig, machine: Runtime, console: Console) -> dict[str, float | str]:
    text = config.text or loaded.meta.get("run", {}).get("data")
    if not text:
        raise UsageError("the checkpoint does not say what it was trained on; name a corpus with --text")
    corpus, seq_len = open_corpus(text), loaded.model.config.seq_len
    tokens = config.eval_tokens or (80 * 2**19 if machine.device.type == "cuda" else 2**17)
    token_bytes = torch.from_numpy(loaded.tokenizer.token_bytes())
    found: dict[str, float | str] = {"corpus": text}
    split: Literal["train", "val"]
    for split in SPLITS:  # type: ignore[assignment]
        with PackedLoader(
            corpus, loaded.tokenizer, split, rows=config.rows, seq_len=seq_len, rank=machine.rank,
            world_size=machine.world_size, device=machine.device,
        ) as batches:  # fmt: skip
            rows = max(1, tokens // seq_len)
            found[split] = bits_per_byte.evaluate(loaded.model, batches, rows, token_bytes, machine)
        console.print(f"{split}: {found[split]:.4f} bits per byte over {rows * seq_len:,} tokens")
    return found


def _core(loaded: Loaded, config: EvalConfig, machine: Runtime, console: Console) -> dict[str, Any]:
    folder = bundle.fetch(config.data)
    table = Table("task", "examples", "accuracy", "centered", "seconds")
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not machine.is_main) as bars:
        bar = bars.add_task("CORE", total=None)

        def tell(label: str, result: core.TaskResult | None, done: int, total: int) -> None:
            nonlocal begin
            bars.update(bar, description=label, completed=done, total=total)
            if result is not None:
                now = time.perf_counter()
                numbers = [f"{result.accuracy:.4f}", f"{result.centered:.4f}", f"{now - begin:.1f}"]
                table.add_row(label, str(len(result.correct)), *numbers)
                begin = now

        model, limits = loaded.model, (config.max_per_task, config.batch_tokens)
        result = core.evaluate_core(model, loaded.tokenizer, folder, *limits, tell)
    table.add_row(result.label, "", "", f"{result.core:.4f}", "")
    console.print(table)
    if result.missing:
        console.print(f"The bundle in {folder} lacks {', '.join(result.missing)}; the mean is over the others.")
    return result.to_dict()
