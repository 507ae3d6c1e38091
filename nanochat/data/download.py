"""Verified, resumable downloads of parquet shards over HTTP: a file in place is a whole and right file, always.

Bytes go to `<name>.part`; beside it `<name>.part.json` keeps what the server said of the content (size, ETag, the
SHA-256 that the hub gives in X-Linked-ETag). An attempt that is cut off continues with Range and If-Range, so that
content which changed meanwhile comes anew instead of being glued to the old. The part is renamed only when size,
checksum and parquet footer are right. What can heal by itself (connection, stall, 429, 5xx, a wrong page) is tried
again, after a time that doubles with jitter, or that the server asked for; attempts are counted since the last new
byte, so a poor line that makes progress never gives up. A lock on the folder leaves the work to one of many processes.
"""

import email.utils
import errno
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import requests

from nanochat import __version__
from nanochat.data.progress import DownloadProgress, Report
from nanochat.errors import NanochatError

OFFLINE_VARIABLE = "NANOCHAT_OFFLINE"
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class Policy:
    """How patient a download is. Times in seconds."""

    attempts: int = 8  # in a row without a new byte
    backoff: float = 1.0  # before the second attempt; doubles
    backoff_max: float = 60.0
    retry_after_max: float = 900.0  # a server that asks for more is taken as a refusal
    connect_timeout: float = 15.0
    stall_timeout: float = 30.0  # without a byte
    chunk_bytes: int = 1 << 16  # written at once; what a cut-off connection may lose
    threads: int = 4


@dataclass(frozen=True)
class Content:
    """What a server says of the content it sends: tells whether two answers are of the same file."""

    url: str
    size: int | None
    etag: str | None  # strong ones only: a weak one does not promise equal bytes
    modified: str | None
    sha256: str | None

    @property
    def validator(self) -> str | None:
        """The value for If-Range, by which the server itself notices that the content has changed."""
        return self.etag or self.modified


class Retry(Exception):
    """An attempt failed in a way that may heal. `discard`: what was received is wrong and must go."""

    def __init__(self, reason: str, discard: bool = False, after: float = 0.0):
        super().__init__(reason)
        self.discard, self.after = discard, after


class Stopped(Exception):
    """Another shard failed for good, or the user interrupted."""


def is_offline() -> bool:
    """Whether NANOCHAT_OFFLINE forbids the network."""
    return os.environ.get(OFFLINE_VARIABLE, "").lower() not in ("", "0", "false", "no")


def parquet_problem(path: Path) -> str | None:
    """Why `path` is not a parquet file with a readable footer; None when it is one."""
    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        return str(error).splitlines()[0]
    return None


def fetch_shards(
    names: Sequence[str], base_url: str, folder: Path, policy: Policy, remedy: str, report: Report | None = None
) -> list[str]:
    """Makes `names` present and readable in `folder`, downloading `<base_url>/<name>`; the names that were missing.

    Any number of processes may call this at once: one works, the others wait for it. Raises NanochatError, naming the
    file, the last reason and `remedy`; shards already finished and parts that can be continued are kept.
    """
    if not _missing(names, folder):
        return []
    if is_offline():
        missing = _missing(names, folder)
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise NanochatError(
            f"{OFFLINE_VARIABLE} is set, and {len(missing)} of {len(names)} shards are missing in {folder}: {listed}; "
            f"unset it and {remedy}, or copy the files there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".download.lock", thread_local=False)
    with DownloadProgress(len(names)) as bars:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            bars.note(f"another process is downloading to {folder}; waiting for it")
            lock.acquire()
        try:
            missing = _missing(names, folder)
            bars.already(len(names) - len(missing))
            _fetch_in_parallel(missing, base_url, folder, policy, remedy, _both(bars.report, report))
            return missing
        finally:
            lock.release()


def _missing(names: Sequence[str], folder: Path) -> list[str]:
    """Those of `names` that are absent from `folder` or unreadable there."""
    return [name for name in names if not (folder / name).exists() or parquet_problem(folder / name)]


def _both(first: Report, second: Report | None) -> Report:
    def report(name: str, done: int, size: int | None, finished: bool = False) -> None:
        first(name, done, size, finished)
        if second:
            second(name, done, size, finished)

    return report


def _fetch_in_parallel(
    names: Sequence[str], base_url: str, folder: Path, policy: Policy, remedy: str, report: Report
) -> None:
    stop = threading.Event()

    def fetch(name: str) -> None:
        try:
            download(f"{base_url}/{name}", folder / name, policy, report=report, stop=stop)
        except NanochatError as error:
            raise NanochatError(f"{error}; {remedy} to continue") from error

    with ThreadPoolExecutor(policy.threads, "download") as pool:
        futures = [pool.submit(fetch, name) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C: the parts stay and are continued next time
            stop.set()
            pool.shutdown(cancel_futures=True)
    errors = [f.exception() for f in futures if not f.cancelled() and f.exception()]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        assert error is not None
        raise error


def download(
    url: str,
    path: Path,
    policy: Policy = Policy(),
    *,
    problem: Callable[[Path], str | None] = parquet_problem,
    report: Report = lambda name, done, size, finished=False: None,
    stop: threading.Event | None = None,
) -> None:
    """Downloads `url` to `path`; afterwards `path` is complete and verified, or untouched.

    `problem(part)` says what is wrong with the received file. `report(name, done, size, finished)` is given the bytes
    that are on disk. Raises NanochatError when it cannot be had, Stopped when `stop` was set.
    """
    part = path.with_name(path.name + ".part")
    stop = stop or threading.Event()
    failures, furthest = 0, _size(part)
    while True:
        try:
            content = _receive(url, path.name, part, policy, report, stop)
            _verify(part, content, problem)
            os.replace(part, path)
            _facts_path(part).unlink(missing_ok=True)
            _sync_folder(path.parent)
            report(path.name, _size(path), _size(path), True)
            return
        except Retry as retry:
            reached = _size(part)
            failures = 1 if reached > furthest and not retry.discard else failures + 1
            furthest = max(furthest, reached)
            if retry.discard:
                _discard(part)
            if failures >= policy.attempts:
                raise NanochatError(
                    f"{path.name} could not be downloaded from {url}: {retry} ({failures} attempts)"
                ) from retry
            pause = min(policy.backoff * 2 ** (failures - 1), policy.backoff_max) * random.uniform(0.5, 1.0)
            if stop.wait(max(pause, retry.after)):
                raise Stopped(path.name) from retry


def _receive(url: str, name: str, part: Path, policy: Policy, report: Report, stop: threading.Event) -> Content:
    """One attempt: continues `part` or begins it, to the length that the server says. Raises Retry, NanochatError."""
    saved, offset = _load_facts(url, part)
    if saved and offset == saved.size:
        return saved
    headers = {"Accept-Encoding": "identity", "User-Agent": f"nanochat/{__version__}"}
    if saved and offset:
        headers["Range"] = f"bytes={offset}-"
        if saved.validator:
            headers["If-Range"] = saved.validator
    try:
        with requests.get(
            url, headers=headers, stream=True, timeout=(policy.connect_timeout, policy.stall_timeout)
        ) as answer:
            _check_status(answer, url, policy)
            content = _describe(answer, url)
            if answer.status_code == 206:
                _check_continues(answer, content, saved, offset)
            else:
                offset = 0  # the whole content: the range was ignored, or the content changed
            _check_space(part, content, offset)
            report(name, offset, content.size)
            _save(answer, name, part, content, offset, policy, report, stop)
    except requests.Timeout as error:
        raise Retry(f"no byte for {policy.stall_timeout:g} s") from error
    except requests.RequestException as error:
        stalled = "timed out" in str(error)  # requests wraps a stall in the middle of a body as a ConnectionError
        raise Retry(f"no byte for {policy.stall_timeout:g} s" if stalled else f"connection failed: {error}") from error
    size = _size(part)
    if content.size is not None and size != content.size:
        raise Retry(f"{size} bytes received, {content.size} expected", discard=size > content.size)
    return content


def _check_status(answer: requests.Response, url: str, policy: Policy) -> None:
    status = answer.status_code
    if status == 416:
        raise Retry("the server has less than was received before", discard=True)
    if status in _TRANSIENT:
        after = _retry_after(answer)
        if after > policy.retry_after_max:
            raise NanochatError(f"{url} answers {status} and asks to come back in {after:.0f} s; try again then")
        raise Retry(f"the server answers {status} {answer.reason}", after=after)
    if status not in (200, 206):
        raise NanochatError(f"{url} answers {status} {answer.reason}")
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        raise Retry("the server sends a web page, not data (a login or proxy page?)")


def _check_continues(answer: requests.Response, content: Content, saved: Content | None, offset: int) -> None:
    """Refuses a partial answer that is not the rest of what is on disk."""
    expected = f"bytes {offset}-"
    if saved is None or not answer.headers.get("Content-Range", "").startswith(expected):
        raise Retry(f"the server sends {answer.headers.get('Content-Range')}, not {expected}", discard=True)
    if (content.size, content.validator, content.sha256) != (saved.size, saved.validator, saved.sha256):
        raise Retry("the content changed during the download", discard=True)


def _check_space(part: Path, content: Content, offset: int) -> None:
    free = shutil.disk_usage(part.parent).free
    needed = (content.size or 0) - offset
    if needed > free + (_size(part) if offset == 0 else 0):
        raise NanochatError(
            f"{part.parent} has {free / 1e6:.1f} MB free, {needed / 1e6:.1f} MB are needed; free some space"
        )


def _save(
    answer: requests.Response, name: str, part: Path, content: Content, offset: int,
    policy: Policy, report: Report, stop: threading.Event,
) -> None:  # fmt: skip
    """Appends the body of `answer` to `part` from `offset`; unbuffered, so that what is reported is what is written."""
    try:
        with open(part, "r+b" if part.exists() else "w+b", buffering=0) as file:
            file.truncate(offset)
            file.seek(offset)
            _facts_path(part).write_text(json.dumps(asdict(content)))
            for chunk in answer.iter_content(policy.chunk_bytes):
                if stop.is_set():
                    raise Stopped(name)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
                offset += len(chunk)
                report(name, offset, content.size)
            os.fsync(file.fileno())
    except requests.RequestException:
        raise  # is an OSError too
    except OSError as error:
        if error.errno in _NO_SPACE:
            _discard(part)  # a full disk is worse with a part of no use on it
        raise NanochatError(
            f"could not write {part}: {error.strerror}; free some space or set NANOCHAT_BASE_DIR"
        ) from error


def _verify(part: Path, content: Content, problem: Callable[[Path], str | None]) -> None:
    if content.sha256:
        found = _sha256(part)
        if found != content.sha256:
            raise Retry(f"checksum {found[:12]}… received, {content.sha256[:12]}… expected", discard=True)
    wrong = problem(part)
    if wrong:
        raise Retry(f"what was received is not a parquet file ({wrong})", discard=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _describe(answer: requests.Response, url: str) -> Content:
    """Size and validators of an answer. The hub gives the checksum of large files on the redirect to its storage."""
    total = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    length = answer.headers.get("Content-Length", "")
    linked = [hop.headers["X-Linked-ETag"] for hop in (*answer.history, answer) if "X-Linked-ETag" in hop.headers]
    sha256 = linked[0].strip('"').lower() if linked else ""
    etag = answer.headers.get("ETag")
    return Content(
        url=url,
        size=int(total[1]) if total else int(length) if answer.status_code == 200 and length.isdecimal() else None,
        etag=etag if etag and not etag.startswith("W/") else None,
        modified=answer.headers.get("Last-Modified"),
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else None,
    )


def _retry_after(answer: requests.Response) -> float:
    """Seconds that Retry-After asks for, written as a number or as a date; 0 where it is absent or unreadable."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _load_facts(url: str, part: Path) -> tuple[Content | None, int]:
    """What is known of `part` and its length; (None, 0) when it cannot be continued."""
    try:
        saved = Content(**json.loads(_facts_path(part).read_text()))
        offset = part.stat().st_size
    except (OSError, ValueError, TypeError):
        return None, 0
    usable = saved.url == url and (saved.validator or saved.sha256) and (saved.size is None or offset <= saved.size)
    return (saved, offset) if usable else (None, 0)


def _facts_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _facts_path(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
