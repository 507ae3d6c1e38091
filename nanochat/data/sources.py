"""Where text comes from: one interface over the hub's data sets, a user's own files and the built-in generator.

A source is written as one word or as `kind:argument`:

    climbmix       6,543 shards of karpathy/climbmix-400b-shuffle on the Hugging Face hub
    fineweb-edu    1,823 shards of karpathy/fineweb-edu-100b-shuffle
    files:PATH     a user's own .txt, .md, .jsonl or .parquet: a file or a folder
    builtin        generated, needs no network
    PATH           a folder of parquet shards, used where it is

Each knows the folder of its corpus (`<base>/data/<name>`), how to fill it (`prepare`) and the command that does so
(`remedy`). Preparing twice does nothing the second time. NANOCHAT_DATA_URL and NANOCHAT_DATA_SHARDS put a mirror, with
so many shards, in place of the hub: a local server in the tests, a house cache elsewhere.
"""

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import filelock

from nanochat.data.convert import convert_files, find_files, fingerprint, replace_folder, write_corpus_file
from nanochat.data.corpus import CORPUS_FILE, open_folder, read_corpus_file, shard_names
from nanochat.data.download import Policy, fetch_shards
from nanochat.errors import NanochatError, UsageError

URL_VARIABLE = "NANOCHAT_DATA_URL"
SHARDS_VARIABLE = "NANOCHAT_DATA_SHARDS"


@dataclass(frozen=True)
class Request:
    """How much of a source to prepare. Each source reads what concerns it."""

    shards: int = 8  # training shards of a remote source; -1 for all
    characters: int | None = None  # size of the built-in corpus; the generator's own choice when None
    policy: Policy = Policy()


class Source(Protocol):
    """What every source offers."""

    @property
    def name(self) -> str:
        """Short name, also that of the corpus folder."""

    def folder(self, base: Path | None = None) -> Path:
        """Where the corpus lies or will lie."""

    def prepare(self, request: Request, base: Path | None = None) -> None:
        """Makes the corpus complete on disk; does nothing when it already is."""

    def check_current(self, base: Path | None = None) -> None:
        """Raises NanochatError when the corpus on disk was made from something that has changed since."""

    def remedy(self, shards: int | None = None) -> str:
        """The end of an error message: what to run so that the corpus is there."""


def data_folder(base: Path | None) -> Path:
    """The folder that holds all corpora."""
    from nanochat.runtime import base_dir  # imports torch, which sources alone do not need

    return (base or base_dir()) / "data"


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Lets one process at a time make `folder`; the others find it made when they get in."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise NanochatError(f"cannot write to {folder}: {error.strerror}; set NANOCHAT_BASE_DIR") from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class RemoteSource:
    """`total` shards shard_00000.parquet … under `url`; the last is validation."""

    name: str
    url: str
    total: int

    def shard_name(self, index: int) -> str:
        """File name of shard number `index`."""
        return f"shard_{index:05d}.parquet"

    @property
    def validation(self) -> str:
        """File name of the validation shard."""
        return self.shard_name(self.total - 1)

    def folder(self, base: Path | None = None) -> Path:
        return data_folder(base) / self.name

    def check_current(self, base: Path | None = None) -> None:
        return None

    def remedy(self, shards: int | None = None) -> str:
        return f"run `nanochat data --source {self.name} --shards {shards or 8}`"

    def prepare(self, request: Request, base: Path | None = None) -> None:
        wanted = self.total - 1 if request.shards == -1 else request.shards
        if not 1 <= wanted < self.total:
            raise UsageError(
                f"--shards {request.shards}: {self.name} has {self.total - 1} training shards; give 1 to "
                f"{self.total - 1}, or -1 for all"
            )
        folder = self.folder(base)
        pinned = read_corpus_file(folder).get("validation", self.validation)
        if pinned != self.validation:
            raise NanochatError(
                f"{folder} is validated on {pinned}, but {self.url} ends with {self.validation}: it was filled from "
                f"another place; delete the folder or use another NANOCHAT_BASE_DIR"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / CORPUS_FILE).exists():
                write_corpus_file(folder, {"source": self.name, "url": self.url, "validation": self.validation})
        except OSError as error:
            raise NanochatError(f"cannot write to {folder}: {error.strerror}; set NANOCHAT_BASE_DIR") from error
        names = [self.validation, *(self.shard_name(i) for i in range(wanted))]
        fetch_shards(names, self.url, folder, request.policy, self.remedy(request.shards))


@dataclass(frozen=True)
class FilesSource:
    """A user's own text. A folder that is a corpus of parquet shards already is used in place."""

    path: Path

    @property
    def name(self) -> str:
        """`files-<stem>-<digest of the path>`, or the folder's own name when it is used in place."""
        if self._in_place:
            return self.path.name
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.path.stem) or "text"
        return f"files-{stem}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:8]}"

    @property
    def _in_place(self) -> bool:
        if not self.path.is_dir():
            return False
        if (self.path / CORPUS_FILE).exists():
            return True
        files = find_files(self.path)
        return len(files) >= 2 and all(p.suffix == ".parquet" and p.parent == self.path for p in files)

    def folder(self, base: Path | None = None) -> Path:
        return self.path if self._in_place else data_folder(base) / self.name

    def remedy(self, shards: int | None = None) -> str:
        if self._in_place:
            return f"put whole parquet shards into {self.path} (the last one by name is validation)"
        return f"run `nanochat data --source {shlex.quote(f'files:{self.path}')}`"

    def check_current(self, base: Path | None = None) -> None:
        made_from = read_corpus_file(self.folder(base)).get("files") if not self._in_place else None
        # Text that was converted and then deleted is no reason to stop: the corpus is whole without it.
        if made_from and self.path.exists() and made_from != fingerprint(self.path):
            raise NanochatError(f"{self.path} has changed since it was converted; {self.remedy()} to convert it again")

    def prepare(self, request: Request, base: Path | None = None) -> None:
        if not self.path.exists():
            raise UsageError(f"--source files:{self.path}: there is no such file or folder")
        if self._in_place:
            return
        folder = self.folder(base)
        with _one_process(folder):
            if read_corpus_file(folder).get("files") != fingerprint(self.path):
                convert_files(self.path, folder)


@dataclass(frozen=True)
class BuiltinSource:
    """The generator in the package (`nanochat.data.builtin`)."""

    name: str = "builtin"

    def folder(self, base: Path | None = None) -> Path:
        return data_folder(base) / self.name

    def check_current(self, base: Path | None = None) -> None:
        return None

    def remedy(self, shards: int | None = None) -> str:
        return "run `nanochat data --source builtin`"

    def prepare(self, request: Request, base: Path | None = None) -> None:
        from nanochat.data.builtin.corpus import CHARACTERS

        characters = CHARACTERS if request.characters is None else request.characters
        if characters < 1:
            raise UsageError(f"--characters {characters}: the built-in corpus needs at least 1 character")
        folder = self.folder(base)
        with _one_process(folder):
            if read_corpus_file(folder).get("characters") != characters:
                self._generate(folder, characters)

    def _generate(self, folder: Path, characters: int) -> None:
        from nanochat.data.builtin import write_corpus

        draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            write_corpus(draft, characters=characters)
            facts = {"source": self.name, "characters": characters, "validation": shard_names(draft)[-1]}
            write_corpus_file(draft, facts)
            replace_folder(draft, folder)
        except OSError as error:
            raise NanochatError(f"cannot write to {folder}: {error.strerror}; set NANOCHAT_BASE_DIR") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True)
class FolderSource:
    """A folder of parquet shards given by its path; never written to."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def folder(self, base: Path | None = None) -> Path:
        return self.path

    def check_current(self, base: Path | None = None) -> None:
        return None

    def remedy(self, shards: int | None = None) -> str:
        command = f"nanochat data --source {shlex.quote(f'files:{self.path}')}"
        return f"a corpus needs two shards or more; for other text run `{command}`"

    def prepare(self, request: Request, base: Path | None = None) -> None:
        open_folder(self.path, self.name, None, self.remedy())


HUB = "https://huggingface.co/datasets"
REMOTE: Mapping[str, RemoteSource] = MappingProxyType(
    {
        source.name: source
        for source in (
            RemoteSource("climbmix", f"{HUB}/karpathy/climbmix-400b-shuffle/resolve/main", 6543),
            RemoteSource("fineweb-edu", f"{HUB}/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1823),
        )
    }
)


def parse_source(spec: str) -> Source:
    """The source that `spec` names (see the top of this file); UsageError for one that is none."""
    kind, _, argument = spec.partition(":")
    if spec in REMOTE:
        return _with_mirror(REMOTE[spec])
    if spec == "builtin":
        return BuiltinSource()
    if kind == "files" and argument:
        return FilesSource(Path(argument).expanduser().resolve())
    path = Path(spec).expanduser()
    if path.is_dir():
        return FolderSource(path.resolve())
    if path.is_file():
        raise UsageError(f"{spec!r} is a file, not a corpus; write files:{spec} and run `nanochat data` on that first")
    known = ", ".join([*REMOTE, "builtin", "files:PATH"])
    raise UsageError(f"unknown data source {spec!r}; use one of {known}, or the path of a folder of parquet shards")


def _with_mirror(source: RemoteSource) -> RemoteSource:
    """`source` with the mirror of the environment, if one is set, in place of the hub."""
    url = os.environ.get(URL_VARIABLE) or source.url
    total = os.environ.get(SHARDS_VARIABLE) or str(source.total)
    if not re.match(r"https?://", url):
        raise UsageError(f"{URL_VARIABLE}={url!r} is no http(s) address")
    if not total.isdecimal() or int(total) < 2:
        raise UsageError(f"{SHARDS_VARIABLE}={total!r} must be a whole number of at least 2 (the last is validation)")
    return RemoteSource(source.name, url.rstrip("/"), int(total))
