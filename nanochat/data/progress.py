"""What a download shows: a bar for the shards and one for each shard under way, told in bytes that are on disk.

A resumed shard begins where its part ends, and one that starts over goes back; speed counts only what came just now.
Without a terminal (a log file, a pipe) one line for each finished shard takes the bars' place.
"""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Report(Protocol):
    """Receives the bytes of a file that are on disk, the size that the server gave (None: unknown), and the end."""

    def __call__(self, name: str, done: int, size: int | None, finished: bool = False) -> None: ...


class DownloadProgress:
    """Shows the download of `total` shards; a context manager, its methods callable from any thread."""

    def __init__(self, total: int, console: Console | None = None):
        self.total, self.finished = total, 0
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._position: dict[str, int] = {}
        self._begun: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "DownloadProgress":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def note(self, message: str) -> None:
        """Prints one line above the bars."""
        self._progress.console.print(message, highlight=False)

    def already(self, count: int) -> None:
        """Says that `count` shards were there before."""
        self.finished = count
        if count < self.total:
            self.note(f"{count} of {self.total} shards are there; downloading {self.total - count}")

    def report(self, name: str, done: int, size: int | None, finished: bool = False) -> None:
        """Moves the bar of `name` to `done` bytes; takes it down when finished."""
        started, first = self._begun.setdefault(name, (time.monotonic(), done))
        task = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = self._progress.add_task(name, total=size, completed=done)
        elif done < self._position[name]:
            self._begun[name] = time.monotonic(), done
            self._progress.reset(task, total=size, completed=done)
        else:
            self._progress.update(task, total=size, completed=done)
        self._position[name] = done
        if finished:
            self.finished += 1
            seconds = max(time.monotonic() - started, 1e-3)
            speed = (done - first) / 1e6 / seconds
            self._progress.remove_task(task)
            self.note(f"{name}: {done / 1e6:.1f} MB, {speed:.1f} MB/s ({self.finished} of {self.total})")
