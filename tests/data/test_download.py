"""Downloads under fire: after every fault the file in place is right, or there is none and the message says why."""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from nanochat.data.download import Policy, Stopped, download, fetch_shards
from nanochat.data.progress import DownloadProgress
from nanochat.errors import NanochatError

from .conftest import Fault, Server, make_texts

pytestmark = pytest.mark.usefixtures("no_stray_threads")
QUICK = Policy(attempts=3, backoff=0.001, stall_timeout=0.3, connect_timeout=1, chunk_bytes=1000, threads=2)
NAME = "shard_00000.parquet"


def parquet_bytes(seed: int, count: int = 400) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": make_texts(count, seed)}), buffer)
    return buffer.getvalue()


GOOD, OTHER = parquet_bytes(0), parquet_bytes(1)
HALF = len(GOOD) // 2000 * 1000  # whole chunks of the policy: less than one is not written


@pytest.fixture
def target(tmp_path: Path, server: Server) -> Path:
    server.files[NAME] = GOOD
    return tmp_path / "data" / NAME


class Events:
    """Records what a progress bar would be told, and that it is what lies on disk."""

    def __init__(self, target: Path):
        self.part, self.seen = target.with_name(target.name + ".part"), []

    def __call__(self, name: str, done: int, size: int | None, finished: bool = False) -> None:
        if not finished and done:
            assert self.part.stat().st_size == done
        assert size is None or done <= size
        self.seen.append((done, size, finished))


def fetch(server: Server, target: Path, *faults: Fault, policy: Policy = QUICK, **options) -> list[str | None]:
    """Downloads with the faults laid out; the ranges that were asked for."""
    server.faults[NAME] = list(faults)
    target.parent.mkdir(exist_ok=True)
    events = Events(target)
    try:
        download(f"{server.url}/{options.pop('prefix', '')}{NAME}", target, policy, report=events, **options)
        assert events.seen[-1] == (target.stat().st_size, target.stat().st_size, True)
    finally:
        fetch.events = events.seen
    return [wanted for _, wanted in server.requests]


def leftovers(target: Path) -> list[str]:
    return sorted(p.name for p in target.parent.iterdir() if p.name != ".download.lock")


def assert_good(target: Path, content: bytes = GOOD) -> None:
    assert target.read_bytes() == content
    assert leftovers(target) == [NAME]


def test_plain_download(server, target):
    assert fetch(server, target) == [None]
    assert_good(target)
    done = [d for d, _, _ in fetch.events]
    assert done == sorted(done) and len(done) > 5


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_cut_off_download_continues_where_it_stopped(server, target, fault):
    assert fetch(server, target, Fault(**{fault: HALF})) == [None, f"bytes={HALF}-"]
    assert_good(target)
    assert (HALF, len(GOOD), False) in fetch.events  # the bar begins where the part ends


def test_many_cuts_are_survived_as_long_as_bytes_come(server, target):
    ranges = fetch(server, target, *(Fault(truncate=1000) for _ in range(6)))
    assert len(ranges) == 7 and ranges[-1] == "bytes=6000-"
    assert_good(target)


def test_a_killed_download_is_continued_by_the_next(server, target):
    with pytest.raises(NanochatError, match=f"{HALF} bytes received|connection failed"):
        fetch(server, target, Fault(truncate=HALF), *[Fault(truncate=0)] * 9)
    assert leftovers(target) == [f"{NAME}.part", f"{NAME}.part.json"]
    server.requests.clear()
    assert fetch(server, target) == [f"bytes={HALF}-"]
    assert_good(target)
    assert fetch.events[0] == (HALF, len(GOOD), False)


def test_a_part_that_was_complete_needs_no_request(server, target):
    with pytest.raises(NanochatError):
        fetch(server, target, problem=lambda part: "undecided", policy=Policy(attempts=1))
    target.with_name(NAME + ".part").write_bytes(GOOD)
    facts = {"url": f"{server.url}/{NAME}", "size": len(GOOD), "etag": '"x"', "modified": None, "sha256": None}
    target.with_name(NAME + ".part.json").write_text(json.dumps(facts))
    server.requests.clear()
    assert fetch(server, target) == []
    assert_good(target)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_errors_that_pass_are_tried_again(server, target, status):
    assert len(fetch(server, target, Fault(status=status), Fault(status=status))) == 3
    assert_good(target)


def test_errors_that_stay_are_reported_after_all_attempts(server, target):
    with pytest.raises(NanochatError, match=f"{NAME} could not be downloaded from http://.*answers 503.*3 attempts"):
        fetch(server, target, *[Fault(status=503)] * 9)
    assert len(server.requests) == 3 and leftovers(target) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_final(server, target, status):
    with pytest.raises(NanochatError, match=f"answers {status}"):
        fetch(server, target, Fault(status=status))
    assert len(server.requests) == 1 and leftovers(target) == []


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honored(server, target, form):
    wanted = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    begin = time.monotonic()
    fetch(server, target, Fault(status=429, headers={"Retry-After": wanted}))
    assert time.monotonic() - begin > 0.8
    assert_good(target)


def test_retry_after_beyond_patience_is_an_error(server, target):
    with pytest.raises(NanochatError, match="answers 429 and asks to come back in 86400 s"):
        fetch(server, target, Fault(status=429, headers={"Retry-After": "86400"}))


def test_web_page_in_place_of_data_is_refused(server, target):
    page = Fault(body=b"<html>please log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
    fetch(server, target, page)
    assert_good(target)
    target.unlink()
    with pytest.raises(NanochatError, match="web page"):
        fetch(server, target, *[page] * 9)
    assert leftovers(target) == []


def test_web_page_called_data_is_refused_by_its_footer(server, target):
    page = Fault(body=b"<html>" + b"x" * 500)
    fetch(server, target, page)
    assert_good(target)
    target.unlink()
    with pytest.raises(NanochatError, match="not a parquet file"):
        fetch(server, target, *[page] * 9)
    assert leftovers(target) == []


def test_web_page_in_the_middle_does_not_spoil_the_part(server, target):
    page = Fault(status=None, body=b"<html>", headers={"Content-Type": "text/html"})
    ranges = fetch(server, target, Fault(truncate=HALF), page)
    assert ranges == [None, f"bytes={HALF}-", f"bytes={HALF}-"]
    assert_good(target)


def test_content_that_changes_midway_is_fetched_anew(server, target):
    ranges = fetch(server, target, Fault(truncate=HALF), Fault(change=OTHER))
    assert ranges == [None, f"bytes={HALF}-"]
    assert_good(target, OTHER)
    positions = [d for d, _, _ in fetch.events]
    assert positions[positions.index(HALF) + 1] == 0, "the bar goes back when the download starts over"


def test_changed_content_glued_on_by_a_careless_server_is_noticed(server, target):
    ranges = fetch(server, target, Fault(truncate=HALF), Fault(change=OTHER, ignore_if_range=True))
    assert ranges == [None, f"bytes={HALF}-", None]
    assert_good(target, OTHER)


def test_server_without_ranges_sends_all_again(server, target):
    assert len(fetch(server, target, Fault(truncate=HALF), Fault(ignore_range=True))) == 2
    assert_good(target)


def test_server_without_validators_is_not_trusted_with_ranges(server, target):
    server.etags = False
    assert fetch(server, target, Fault(truncate=HALF)) == [None, None]
    assert_good(target)


def test_wrong_range_is_refused(server, target):
    ranges = fetch(server, target, Fault(truncate=HALF), Fault(shift=7))
    assert ranges == [None, f"bytes={HALF}-", None]
    assert_good(target)


def test_wrong_bytes_are_found_by_the_checksum_of_the_hub(server, target):
    server.linked_sha256[NAME] = hashlib.sha256(GOOD).hexdigest()
    middle = bytearray(GOOD)
    middle[HALF] ^= 1  # size and footer stay right
    fetch(server, target, Fault(body=bytes(middle)), prefix="hub/")
    assert_good(target)
    target.unlink()
    with pytest.raises(NanochatError, match="checksum [0-9a-f]{12}… received"):
        fetch(server, target, *[Fault(body=bytes(middle))] * 9, prefix="hub/")
    assert leftovers(target) == []


def test_checksum_holds_across_a_resumed_download(server, target):
    server.linked_sha256[NAME] = hashlib.sha256(GOOD).hexdigest()
    assert fetch(server, target, Fault(truncate=HALF), prefix="hub/") == [None, f"bytes={HALF}-"]
    assert_good(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == server.linked_sha256[NAME]


def test_an_existing_file_is_untouched_by_a_failure(server, target):
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(NanochatError):
        fetch(server, target, *[Fault(status=500)] * 9)
    assert target.read_bytes() == b"old"


def test_nobody_answers(tmp_path):
    with pytest.raises(NanochatError, match="connection failed"):
        download("http://127.0.0.1:9/x", tmp_path / "x", QUICK)


def test_too_little_space_is_noticed_before_the_first_byte(server, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(NanochatError, match="has 0.0 MB free, .* MB are needed; free some space"):
        fetch(server, target)
    assert leftovers(target) == []


def test_disk_that_fills_up_midway(server, target, monkeypatch):
    """The kernel itself refuses the write: a limit on file sizes stands in for the end of the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, hard))
    try:
        with pytest.raises(NanochatError, match=f"could not write .*{os.strerror(errno.EFBIG)}; free some space"):
            fetch(server, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(target) == [] and len(server.requests) == 1


def test_stop_ends_a_download_and_keeps_its_part(server, target):
    stop = threading.Event()
    with pytest.raises(Stopped):
        fetch(server, target, Fault(before=stop.set), stop=stop)
    assert not target.exists()


# Many shards


@pytest.fixture
def shards(server: Server) -> dict[str, bytes]:
    server.files = {f"shard_{i:05d}.parquet": parquet_bytes(i, 50) for i in range(5)}
    return server.files


def test_fetches_only_what_is_missing_or_damaged(server, shards, tmp_path):
    names = list(shards)
    (tmp_path / names[0]).write_bytes(shards[names[0]])
    (tmp_path / names[1]).write_bytes(shards[names[1]][:-30])
    fetched = fetch_shards(names, server.url, tmp_path, QUICK, "run it again")
    assert fetched == names[1:]
    assert {n: (tmp_path / n).read_bytes() for n in names} == shards
    assert sorted(path for path, _ in server.requests) == names[1:]
    assert fetch_shards(names, server.url, tmp_path, QUICK, "run it again") == []


def test_one_lost_shard_stops_the_rest_with_one_message(server, shards, tmp_path):
    del server.files["shard_00001.parquet"]
    with pytest.raises(NanochatError, match="shard_00001.parquet answers 404.*; run this to continue"):
        fetch_shards([*shards, "shard_00001.parquet"], server.url, tmp_path, QUICK, "run this")
    for path in tmp_path.glob("*.parquet"):
        assert path.read_bytes() == shards[path.name]


def test_offline_names_what_is_missing(server, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    (tmp_path / "shard_00000.parquet").write_bytes(shards["shard_00000.parquet"])
    with pytest.raises(NanochatError, match="NANOCHAT_OFFLINE is set, and 4 of 5 .*shard_00001.*shard_00004.*run this"):
        fetch_shards(list(shards), server.url, tmp_path, QUICK, "run this")
    assert server.requests == []
    assert fetch_shards(["shard_00000.parquet"], server.url, tmp_path, QUICK, "run this") == []
    monkeypatch.setenv("NANOCHAT_OFFLINE", "0")
    assert len(fetch_shards(list(shards), server.url, tmp_path, QUICK, "run this")) == 4


def test_many_processes_download_each_shard_once(server, shards, tmp_path):
    code = (
        "import sys; from pathlib import Path; from nanochat.data.download import *;"
        "print(len(fetch_shards(sys.argv[3:], sys.argv[1], Path(sys.argv[2]), Policy(), 'again')))"
    )
    for faults in shards:
        server.faults[faults] = [Fault(before=lambda: time.sleep(0.1))]
    command = [sys.executable, "-c", code, server.url, str(tmp_path), *shards]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [rank.communicate(timeout=60) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), results
    assert sorted(int(out) for out, _ in results) == [0, 0, 5], results
    assert sorted(path for path, _ in server.requests) == sorted(shards)


def test_killed_process_leaves_no_file_and_no_lock(server, shards, tmp_path):
    name = "shard_00000.parquet"
    asked = threading.Event()
    server.faults[name] = [Fault(stall=2000, before=asked.set)]
    code = (
        "import sys; from pathlib import Path; from nanochat.data.download import *;"
        "fetch_shards(sys.argv[3:], sys.argv[1], Path(sys.argv[2]), Policy(chunk_bytes=1000), 'again')"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path), name], stderr=subprocess.DEVNULL)
    assert asked.wait(30)
    part = tmp_path / (name + ".part")
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size == 2000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / name).exists()
    fetch_shards([name], server.url, tmp_path, QUICK, "again")
    assert (tmp_path / name).read_bytes() == shards[name]
    assert server.requests[-1] == (name, "bytes=2000-")


def test_progress_shows_bytes_on_disk_and_counts_only_new_ones():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with DownloadProgress(3, console) as bars:
        bars.already(1)
        bars.report("a", 500_000, 1_000_000)  # resumed halfway
        task = bars._progress.tasks[0]
        assert task.percentage == 50 and not task.speed
        bars.report("a", 0, 2_000_000)  # started over
        assert bars._progress.tasks[0].completed == 0 and bars._progress.tasks[0].total == 2_000_000
        bars.report("a", 2_000_000, 2_000_000)
        bars.report("a", 2_000_000, 2_000_000, True)
        assert bars._progress.tasks == [] and bars.finished == 2
    assert "a: 2.0 MB" in console.file.getvalue() and "(2 of 3)" in console.file.getvalue()
