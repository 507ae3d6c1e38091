"""Numbers of a run: one JSON line per step in a file beside the checkpoints, and optionally wandb or TensorBoard.

The file is the record. A line is {"step": n, ...}: losses and speeds of update n (counted from 0), or values measured
when n updates had been made, such as val_bpb. On resume from step s, lines of s and later are cut off: they will be
made again. Services that cannot forget (wandb) simply see those steps twice.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nanochat.errors import NanochatError, UsageError

TRACKERS = ("wandb", "tensorboard")


class Tracker(Protocol):
    """A service that receives numbers by step."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends to `path`, which is first cut back to the lines before `start_step`."""

    def __init__(self, path: Path, start_step: int, trackers: list[Tracker] | None = None) -> None:
        self.path, self.trackers = path, trackers or []
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_back(path, start_step)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """One line, flushed: a kill loses nothing that was written. None values are left out."""
        record = {"step": step} | {name: value for name, value in values.items() if value is not None}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise NanochatError(f"cannot write {self.path}: {error}; free some space and run again to go on") from error
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step)

    def close(self) -> None:
        self._file.close()
        for tracker in self.trackers:
            tracker.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        if record is not None:
            records.append(record)
    return records


def cut_back(path: Path, step: int) -> None:
    """Truncates the file before its first line of `step` or later, or before a damaged one."""
    if not path.exists():
        return
    keep = 0
    with open(path, "rb+") as file:
        for line in file:
            record = _parse(line)
            if record is None or record["step"] >= step:
                break
            keep += len(line)
        file.truncate(keep)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
        return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
    except ValueError:
        return None


def open_tracker(name: str, folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    """A tracker by name. Raises UsageError for an unknown one and NanochatError where its package is missing."""
    if name not in TRACKERS:
        raise UsageError(f"unknown tracker {name!r}; use {' or '.join(TRACKERS)}")
    try:
        return _Wandb(run_name, config) if name == "wandb" else _TensorBoard(folder / "tensorboard")
    except ImportError as error:
        raise NanochatError(
            f"--track {name} needs a package that is not installed ({error}); "
            f"install it with: pip install 'nanochat[{name}]'"
        ) from error


class _Wandb:
    def __init__(self, run_name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project="nanochat", name=run_name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
