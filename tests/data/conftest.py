"""Fixtures of the data tests: a byte-level tokenizer, small corpora, and an HTTP server that misbehaves on demand."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


class ByteTokenizer:
    """One token per byte; 256 is <|bos|>. The interface of the real one, with nothing to train."""

    vocab_size, bos_id, fingerprint = 257, 256, "bytes"

    def encode_batch(self, texts: list[str], prepend_bos: bool = False, threads: int | None = None):
        """Concatenated ids (uint16) and offsets (n + 1, int64)."""
        documents = [[self.bos_id] * prepend_bos + list(text.encode()) for text in texts]
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        return np.array([i for document in documents for i in document], np.uint16), offsets


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def write_parquet(path: Path, texts: list[str], row_group_size: int = 7, column: str = "text") -> None:
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=row_group_size)


def make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    lengths = rng.integers(0, longest, count)
    return [f"{seed}.{i} " + "".join(rng.choice(letters, n)) for i, n in enumerate(lengths)]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Three training shards of 40 documents and a validation shard of 20, in row groups of 7."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard, count in enumerate((40, 40, 40, 20)):
        write_parquet(folder / f"shard_{shard:05d}.parquet", make_texts(count, shard))
    return folder


@dataclass
class Fault:
    """What the server does wrong with one request. Applied to the first requests for a path, in order."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    truncate: int | None = None  # bytes sent before the connection is closed
    stall: int | None = None  # bytes sent before silence
    ignore_range: bool = False
    ignore_if_range: bool = False
    change: bytes | None = None  # the content from this request on
    shift: int = 0  # the partial answer begins so many bytes too late
    before: Callable[[], None] | None = None


class Server:
    """Serves `files` (path → bytes) on localhost, with ranges, strong ETags and, if wanted, the hub's redirect."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.etags = True
        self.linked_sha256: dict[str, str] = {}
        self.silence = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.handle(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients hang up here on purpose
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.silence.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        wanted = request.headers.get("Range")
        if path.startswith("hub/"):  # as the hub does: checksum on a redirect to the storage
            request.send_response(302)
            request.send_header("Location", "/" + path[4:])
            request.send_header("X-Linked-ETag", f'"{self.linked_sha256[path[4:]]}"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        self.requests.append((path, wanted))
        fault = self.faults[path].pop(0) if self.faults.get(path) else Fault()
        if fault.before:
            fault.before()
        if fault.change is not None:
            self.files[path] = fault.change
        if fault.status or path not in self.files:
            return self.answer(request, fault.status or 404, fault.headers, fault.body or b"no", Fault())
        content = self.files[path] if fault.body is None else fault.body
        headers = {"Content-Type": "application/octet-stream"} | fault.headers
        etag = '"' + hashlib.md5(self.files[path]).hexdigest() + '"'
        if self.etags:
            headers["ETag"] = etag
        fresh = request.headers.get("If-Range") in (None, etag) or fault.ignore_if_range
        if wanted and fresh and not fault.ignore_range:
            start = int(wanted.removeprefix("bytes=").rstrip("-")) + fault.shift
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(request, 206, headers, content[start:], fault)
        self.answer(request, 200, headers, content, fault)

    def answer(self, request: BaseHTTPRequestHandler, status: int, headers: dict, body: bytes, fault: Fault) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        sent = fault.truncate if fault.truncate is not None else fault.stall
        request.wfile.write(body[:sent])
        request.wfile.flush()
        if fault.stall is not None:
            self.silence.wait(5)
        if sent is not None:
            request.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    running = Server()
    yield running
    running.close()


@pytest.fixture
def no_stray_threads() -> Iterator[None]:
    """Fails when a test leaves one of our threads behind."""
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        stray = [t.name for t in threading.enumerate() if t.name.startswith(("tokenize", "pack", "download"))]
        if not stray:
            return
        time.sleep(0.01)
    raise AssertionError(f"threads left behind: {stray}")
