"""`nanochat report`: everything the stages wrote down, on one page."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nanochat.errors import NanochatError
from nanochat.report import page, sections
from nanochat.runtime import base_dir

PLOTS = "plots"


@dataclass(frozen=True)
class ReportConfig:
    """Writes report.md and report.html: machine, versions, kernels, every stage's numbers, curves and samples."""

    tag: str | None = None
    """Model tag; by default the one that each stage wrote last."""
    out: Path | None = None
    """Folder to write to; by default `report` in NANOCHAT_BASE_DIR."""


def make(tag: str | None = None) -> list[page.Block]:
    """The report's blocks. Raises NanochatError where there is nothing to report on."""
    base = base_dir()
    stages = sections.read_stages(base, tag)
    blocks = [*sections.summary(stages), *sections.data(base)]
    for record in stages.values():
        blocks += sections.stage_section(record)
    if not blocks:
        wanted = f" with the tag {tag!r}" if tag else ""
        raise NanochatError(f"there is nothing{wanted} in {base} to report on; begin with `nanochat data`")
    return [*blocks, *sections.machine(stages)]


def write(blocks: Sequence[page.Block], folder: Path) -> list[Path]:
    """Writes report.md with its plots, and report.html; returns both."""
    title = "nanochat report"
    subtitle = f"written {time.strftime('%Y-%m-%d %H:%M')}"
    files = {folder / PLOTS / f"{b.name}.svg": b.svg for b in blocks if isinstance(b, page.Plot)}
    files[folder / "report.md"] = page.markdown(title, subtitle, blocks, PLOTS)
    files[folder / "report.html"] = page.html(title, subtitle, blocks)
    try:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise NanochatError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
    return [folder / "report.md", folder / "report.html"]


def run(config: ReportConfig) -> int:
    """The command; returns the exit code."""
    for path in write(make(config.tag), config.out or base_dir() / "report"):
        Console(soft_wrap=True, highlight=False).print(f"written to {path}", markup=False)
    return 0
