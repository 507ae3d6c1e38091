"""A checkpoint and the tokenizer it was trained with, ready to generate or to be evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.errors import NanochatError
from nanochat.inference.engine import Engine
from nanochat.model import checkpoint
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime, base_dir
from nanochat.tokenizer import Tokenizer, default_tokenizer_dir
from nanochat_kernels import KernelPlan

StageName = Literal["auto", "base", "sft", "rl"]
BEST_FIRST = ("rl", "sft", "base")


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and where they came from."""

    model: GPT
    tokenizer: Tokenizer
    stage: str
    folder: Path
    step: int
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.stage} {self.folder.name}, step {self.step}"

    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)


def find_stage(stage: StageName, tag: str | None) -> tuple[str, Path]:
    """The stage and folder of the checkpoints; "auto" takes the furthest stage that has any: rl, sft, base."""
    if stage != "auto":
        return stage, checkpoint.find(stage, tag)
    for name in BEST_FIRST:
        try:
            return name, checkpoint.find(name, tag)
        except NanochatError:
            continue
    wanted = "no checkpoint" if tag is None else f"no checkpoint with the tag {tag!r}"
    raise NanochatError(
        f"there is {wanted} in {base_dir()}; train a model with `nanochat train` and then `nanochat sft`, "
        "or point NANOCHAT_BASE_DIR to the folder of an earlier run"
    )


def load(
    runtime: Runtime, stage: StageName = "auto", tag: str | None = None, step: int | None = None, kernels: str = "auto",
    mode: str = "decode",
) -> Loaded:  # fmt: skip
    """The model in the runtime's dtype, kernels chosen for `mode`; checks that the tokenizer is the one it knows."""
    name, folder = find_stage(stage, tag)
    tokenizer = Tokenizer.load(default_tokenizer_dir())
    plan = KernelPlan.resolve(kernels, device=runtime.device, dtype=runtime.dtype, mode=mode)
    model, meta = checkpoint.load_model(folder, step, runtime.device, runtime.dtype, plan)
    trained_with = meta.get("tokenizer")
    if trained_with not in (None, tokenizer.fingerprint):
        raise NanochatError(
            f"{folder} was trained with the tokenizer {trained_with}, but {default_tokenizer_dir()} holds "
            f"{tokenizer.fingerprint}; put the old tokenizer back or train again"
        )
    return Loaded(model.eval(), tokenizer, name, folder, meta["step"], meta)
