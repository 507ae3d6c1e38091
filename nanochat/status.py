"""`nanochat` alone: what exists so far along the pipeline, and the next command.

Everything is read from the base folder; nothing is remembered elsewhere, so the answer is right after a kill, a copy to
another machine or a deletion by hand.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat import __version__
from nanochat.data.corpus import shard_names
from nanochat.doctor import check_built
from nanochat.errors import NanochatError
from nanochat.model import checkpoint
from nanochat.runtime import base_dir

DEFAULT_CORPUS = "climbmix"


@dataclass(frozen=True)
class Item:
    """One stage of the pipeline: what it left, empty when nothing, and the command that makes it."""

    stage: str
    found: tuple[str, ...]
    command: str


def find_data(base: Path) -> tuple[str, ...]:
    """One line per corpus: its name, number of shards and size."""
    folders = sorted(path for path in (base / "data").glob("*") if path.is_dir() and shard_names(path))
    sizes = [[(folder / name).stat().st_size for name in shard_names(folder)] for folder in folders]
    return tuple(f"{f.name}: {len(s)} shards, {sum(s) / 1e6:,.1f} MB" for f, s in zip(folders, sizes, strict=True))


def find_tokenizer(base: Path) -> tuple[str, ...]:
    """The folder of the tokenizer, if one was trained."""
    folder = base / "tokenizer"
    return (f"in {folder}",) if folder.is_dir() and any(folder.iterdir()) else ()


def find_checkpoints(base: Path, stage: str) -> tuple[str, ...]:
    """One line per model tag: newest complete step and, where it is known, validation bits per byte."""
    return tuple(_describe(folder) for folder in sorted((base / f"{stage}_checkpoints").glob("*")) if folder.is_dir())


def _describe(folder: Path) -> str:
    try:
        meta = checkpoint.load_meta(folder)
    except NanochatError as error:
        return f"{folder.name}: {error}"
    bpb = meta.get("val_bpb")
    return f"{folder.name}: step {meta['step']}" + (f", {bpb:.4f} bits per byte" if isinstance(bpb, float) else "")


def items(base: Path) -> Iterator[Item]:
    """The stages in the order of the pipeline."""
    yield Item("data", find_data(base), "nanochat data")
    yield Item("tokenizer", find_tokenizer(base), "nanochat tok-train")
    for stage, command in checkpoint.STAGES.items():
        yield Item(f"{stage} model", find_checkpoints(base, stage), command)


def next_command(found: Collection[Item], available: Collection[str]) -> str | None:
    """The command of the first stage that left nothing; None when all that is available has been done.

    What learns from text is told which text, unless the default corpus is there.
    """
    corpora = [line.partition(":")[0] for item in found if item.stage == "data" for line in item.found]
    chosen = "" if not corpora or DEFAULT_CORPUS in corpora else f" --data {corpora[0]}"
    todo = (item.command for item in found if not item.found and item.command.split()[1] in available)
    command = next(todo, None)
    return f"{command}{chosen}" if command in ("nanochat tok-train", "nanochat train") else command


def show(available: Collection[str]) -> None:
    """Prints the state and the next command; `available` are the names of the commands that exist."""
    from rich.console import Console
    from rich.markup import escape

    base, console = base_dir(), Console(highlight=False, soft_wrap=True)
    found = list(items(base))
    console.print(f"[bold]nanochat[/] {__version__}, everything under {escape(str(base))}\n")
    for item in found:
        mark = "[green]✓[/]" if item.found else "[dim]·[/]"
        for line in item.found or ("none yet",):
            console.print(f"  {mark} {item.stage:<13} {escape(line)}")
    for finding in check_built():
        mark = "[green]✓[/]" if finding.state == "ok" else "[yellow]·[/]"
        console.print(f"  {mark} {finding.name:<13} {escape(finding.value)}")
    command = next_command(found, available)
    console.print(f"\nnext: [bold]{command}[/]" if command else "\nevery stage has left something")
    console.print("[dim]nanochat --help lists the commands, nanochat doctor looks at the machine[/]")
