"""What the report says, read from the base folder: checkpoints' meta, metrics.jsonl and results/<stage>.json.

Every section is a generator of blocks that yields nothing where its stage left nothing, so a report can be made at any
time. Nothing is measured here, and nothing is known that the stages did not write down.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import __version__, doctor, status
from nanochat.errors import NanochatError
from nanochat.model import checkpoint, costs
from nanochat.model.config import GPTConfig
from nanochat.report import plots
from nanochat.report.page import Block, Facts, Heading, Plot, Table, Talk
from nanochat.tokenizer import Tokenizer
from nanochat.training import metrics

TITLES = {"base": "Base model", "sft": "Fine-tuning", "rl": "Reinforcement learning"}


@dataclass(frozen=True)
class StageRecord:
    """What one stage left: the meta of its newest checkpoint, its metrics, its results."""

    stage: str
    folder: Path
    meta: dict[str, Any]
    records: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def tokens(self) -> int | None:
        """Tokens of training, padding included; unknown where steps have no fixed size."""
        batch = self.meta.get("identity", {}).get("batch_tokens")
        return batch * self.meta["step"] if batch else None

    @property
    def seconds(self) -> float:
        """Time in updates, those of earlier tries included."""
        return float(self.meta.get("loop", {}).get("seconds", 0.0))

    @property
    def eval_seconds(self) -> float:
        return sum(record.get("eval_seconds", 0.0) for record in self.records)


def read_stages(base: Path, tag: str | None) -> dict[str, StageRecord]:
    """The stages that have a checkpoint of `tag`; of the tag written last where it is None."""
    found = {}
    for stage in checkpoint.STAGES:
        try:
            folder = checkpoint.find(stage, tag)
            meta = checkpoint.load_meta(folder)
        except NanochatError:
            continue
        records = metrics.read(folder / "metrics.jsonl")
        found[stage] = StageRecord(stage, folder, meta, records, _results(base, stage))
    return found


def _results(base: Path, stage: str) -> dict[str, Any]:
    try:
        content = json.loads((base / "results" / f"{stage}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 12 s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s" if minute else f"{second} s"


def summary(stages: dict[str, StageRecord]) -> Iterator[Block]:
    """The few numbers that a reader wants first, and the table of stages."""
    if not stages:
        return
    newest = list(stages.values())[-1]
    counts = costs.parameter_counts(GPTConfig.from_dict(newest.meta["config"]))
    tokens = sum(record.tokens or 0 for record in stages.values())
    facts = [
        ("parameters", f"{counts['total'] / 1e6:,.1f}M"),
        ("tokens trained on", f"{tokens / 1e6:,.1f}M" if tokens >= 1e6 else f"{tokens:,}"),
        ("time in training", duration(sum(record.seconds for record in stages.values()))),
    ]
    if isinstance(bpb := stages["base"].meta.get("val_bpb") if "base" in stages else None, float):
        facts.append(("base bits per byte", f"{bpb:.4f}"))
    scores = newest.results.get("chat_eval", {}).get("tasks", {})
    facts += [(name, f"{score['accuracy']:.1%}") for name, score in scores.items()]
    yield Facts(tuple(facts))
    rows = tuple(
        (
            TITLES[record.stage],
            record.folder.name,
            f"{record.meta['step']:,}" + ("" if record.meta.get("finished") else " (not finished)"),
            f"{record.tokens:,}" if record.tokens else "",
            duration(record.seconds),
            duration(record.eval_seconds) if record.eval_seconds else "",
            f"{record.meta['val_bpb']:.4f}" if isinstance(record.meta.get("val_bpb"), float) else "",
        )
        for record in stages.values()
    )
    yield Table(("stage", "tag", "steps", "tokens", "training", "validation", "bits per byte"), rows)


def machine(stages: dict[str, StageRecord]) -> Iterator[Block]:
    yield Heading("Machine and versions")
    wanted = doctor.examine(doctor.DoctorConfig(bandwidth=False))
    rows = [(finding.name, finding.value) for finding in wanted if finding.area in ("GPU", "CPU", "software", "built")]
    yield Table(("", "found"), (("nanochat", __version__), *rows))
    plans = {stage: record.meta.get("kernels", {}) for stage, record in stages.items()}
    ops = list(dict.fromkeys(op for plan in plans.values() for op in plan))
    if ops:
        rows_ = tuple((op, *(plan.get(op, "") for plan in plans.values())) for op in ops)
        yield Table(("op", *(TITLES[stage] for stage in plans)), rows_, "Kernel plan: the backend of every operation")


def data(base: Path) -> Iterator[Block]:
    corpora = status.find_data(base)
    try:
        tokenizer = Tokenizer.load(base / "tokenizer")
    except NanochatError:
        tokenizer = None
    if not corpora and tokenizer is None:
        return
    yield Heading("Data and tokenizer")
    rows = [tuple(line.split(": ", 1)) for line in corpora]
    if tokenizer is not None:
        sizes = tokenizer.token_bytes()
        mean = float(sizes[sizes > 0].mean())
        rows.append(("tokenizer", f"{tokenizer.vocab_size:,} tokens of {mean:.2f} bytes on average"))
        rows.append(("its fingerprint", tokenizer.fingerprint))
    yield Table(("", "size"), tuple(rows))


def stage_section(record: StageRecord) -> Iterator[Block]:
    """Everything about one stage: its settings, curves, results and samples."""
    yield Heading(TITLES[record.stage], f"{record.folder.name}, step {record.meta['step']:,}")
    yield Table(("setting", "value"), tuple(_settings(record)))
    drawn = {"curves": plots.loss_and_validation, "speed": plots.speed_and_rate}
    captions = {
        "curves": "Loss and validation over the steps; the thick line is a running mean.",
        "speed": "Tokens per second and the schedule of the learning rates.",
        "reward": "Right answers in practice, and solved held-out problems.",
    }
    if record.stage == "rl":
        drawn = {"reward": plots.reward_and_pass}
    for name, draw in drawn.items():
        if svg := draw(record.records):
            yield Plot(f"{record.stage}_{name}", svg, captions[name])
    yield from _results_blocks(record)


def _settings(record: StageRecord) -> Iterator[tuple[str, str]]:
    run, loop, config = record.meta.get("run", {}), record.meta.get("loop", {}), record.meta["config"]
    if record.stage == "base":
        shape = "layers", "width", "heads", "kv_heads", "vocab_size", "seq_len", "window_pattern"
        yield "model", ", ".join(f"{name} {config[name]}" for name in shape)
        flops = costs.training_flops_per_token(GPTConfig.from_dict(config))
        yield "cost", f"{flops / 1e6:,.1f} MFLOP per token in training"
    identity = record.meta.get("identity", {})
    names = ("data", "base", "parent", "batch_tokens", "steps", "ratio", "lr", "questions", "samples", "dtype", "seed")
    for name in names:
        if name in identity or name in run:
            value = identity.get(name, run.get(name))
            yield name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
    yield (
        "device",
        f"{loop.get('device', '?')}, {loop.get('world_size', 1)} rank(s), {loop.get('rows', '?')} rows at a time",
    )
    losses = [line["loss"] for line in record.records if "loss" in line]
    if losses and record.stage != "rl":
        yield "loss", f"{losses[0]:.3f} at first, {plots.smooth(losses)[-1]:.3f} at last"


def _results_blocks(record: StageRecord) -> Iterator[Block]:
    results = record.results
    evaluation = results.get("eval", {})
    if core := evaluation.get("core"):
        rows = [(name, f"{task['accuracy']:.4f}", f"{task['centered']:.4f}") for name, task in _tasks(core).items()]
        label = core.get("label", "CORE")
        yield Table(("task", "accuracy", "centered"), (*rows, (label, "", f"{core['core']:.4f}")), "CORE")
    if chat := results.get("chat_eval"):
        ks = list(dict.fromkeys(k for task in chat["tasks"].values() for k in task.get("pass_at", {}) if k != "1"))
        rows = [
            (
                name,
                f"{task['problems']:,}",
                f"{task['accuracy']:.2%}",
                f"{task['centered']:.4f}",
                *(f"{task['pass_at'][k]:.2%}" if k in task["pass_at"] else "" for k in ks),
            )
            for name, task in chat["tasks"].items()
        ]
        rows.append((chat["label"], "", "", f"{chat['chat_core']:.4f}", *("" for _ in ks)))
        headers = ("task", "problems", "accuracy", "centered", *(f"pass@{k}" for k in ks))
        yield Table(headers, tuple(rows), f"Chat evaluation of {chat['model']}")
    if passed := record.meta.get("pass_at"):
        ks = [k for k in next(iter(passed.values())) if k != "problems"]
        rows = [
            (step, str(found["problems"]), *(f"{found[k]:.1%}" for k in ks))
            for step, found in sorted(passed.items(), key=lambda item: int(item[0]))
        ]
        yield Table(("step", "problems", *(f"pass@{k}" for k in ks)), tuple(rows), "Held-out problems solved")
    for name, samples in (("Continuations", evaluation.get("samples")), ("Answers", results.get("samples"))):
        if samples:
            yield Talk(name, tuple((sample["prompt"] or "(from nothing)", sample["text"]) for sample in samples))


def _tasks(core: dict[str, Any]) -> dict[str, Any]:
    tasks = core.get("tasks", {})
    return tasks if isinstance(tasks, dict) else {task["label"]: task for task in tasks}
