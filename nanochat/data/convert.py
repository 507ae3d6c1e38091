"""A user's own files (.txt, .md, .jsonl, .parquet) turned once into a corpus folder of parquet shards.

The same files give the same shards: files are taken in the order of their names, documents are shuffled with a fixed
seed, and the last shard, 5% of the documents (at least one, at most 10 million characters), is validation. Without the
shuffle, validation would be the last file, and a model would be measured on something else than it learns.

A .txt or .md longer than MAX_CHARACTERS is split at blank lines: packing crops what is longer than a row, so a novel
kept as one document would be seen only as its first page. Documents of .jsonl and .parquet are kept as they come.
Trade-off: all text is held in memory during the conversion; larger collections should come as parquet shards.
"""

import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.corpus import CORPUS_FILE, TEXT_COLUMN, Shard
from nanochat.errors import NanochatError, UsageError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
MAX_CHARACTERS = 8192
SHARD_CHARACTERS = 64_000_000
VALIDATION_CHARACTERS = 10_000_000
ROW_GROUP = 256
_SEED = 1337


def find_files(path: Path) -> list[Path]:
    """The readable files at `path`: itself, or those below it by relative name, the hidden ones skipped."""
    if path.is_file():
        return [path] if path.suffix.lower() in SUFFIXES else []
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(folder, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda p: p.relative_to(path).as_posix())


def fingerprint(path: Path) -> list[list]:
    """[name, bytes, modification time in ns] of every file at `path`: tells whether a conversion is out of date."""
    root = path if path.is_dir() else path.parent
    stats = [(p.relative_to(root).as_posix(), p.stat()) for p in find_files(path)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def convert_files(path: Path, folder: Path) -> None:
    """Writes the corpus of the files at `path` to `folder`, replacing one that was there; all of it or nothing.

    Raises UsageError where nothing readable is found or there are not two documents, NanochatError for damaged files.
    """
    files = find_files(path)
    if not files:
        raise UsageError(f"{path} holds no {', '.join(SUFFIXES)} file")
    made_from = fingerprint(path)
    documents = [text for file in files for text in _read(file) if text.strip()]
    if len(documents) < 2:
        raise UsageError(f"{path} holds {len(documents)} document(s); 2 are needed, one of them for validation")
    random.Random(_SEED).shuffle(documents)
    validation = _validation_count(documents)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        groups = [*_split_by_size(documents[validation:], SHARD_CHARACTERS), documents[:validation]]
        for number, group in enumerate(groups):
            write_shard(draft / f"shard_{number:05d}.parquet", group)
        facts = {"source": f"files:{path}", "validation": f"shard_{len(groups) - 1:05d}.parquet", "files": made_from}
        write_corpus_file(draft, facts)
        replace_folder(draft, folder)
    except OSError as error:
        raise NanochatError(
            f"could not write the corpus to {folder}: {error}; free space or set NANOCHAT_BASE_DIR"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_shard(path: Path, documents: list[str]) -> None:
    """One parquet shard of `documents`: column `text`, row groups of 256, zstd."""
    table = pa.table({TEXT_COLUMN: pa.array(documents, pa.string())})
    with open(path, "wb") as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


def write_corpus_file(folder: Path, facts: dict) -> None:
    """Writes `corpus.json`, whose "validation" pins the validation shard, under a temporary name, then renames it."""
    draft = folder / f"{CORPUS_FILE}.{os.getpid()}.tmp"
    with open(draft, "w") as file:
        json.dump(facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / CORPUS_FILE)


def replace_folder(draft: Path, folder: Path) -> None:
    """Puts the finished `draft` in the place of `folder`, which may exist. Two renames: a folder is never half new."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(draft, folder)
    shutil.rmtree(old, ignore_errors=True)


def _read(file: Path) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        shard = Shard(file)
        for row_group in range(shard.row_groups()):
            yield from shard.read(row_group)
    elif suffix == ".jsonl":
        yield from _read_jsonl(file)
    else:
        yield from split_text(_read_text(file))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise NanochatError(
            f"{file} is not UTF-8 at byte {error.start}; convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from error
    except OSError as error:
        raise NanochatError(f"{file} cannot be read: {error.strerror}") from error


def _read_jsonl(file: Path) -> Iterator[str]:
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[TEXT_COLUMN]
        except (ValueError, KeyError, TypeError) as error:
            raise NanochatError(
                f'{file}, line {number} is not a JSON object with a "{TEXT_COLUMN}" ({error}); '
                f'expected {{"{TEXT_COLUMN}": "..."}}'
            ) from error
        if not isinstance(text, str):
            raise NanochatError(f'{file}, line {number}: "{TEXT_COLUMN}" is {type(text).__name__}, not a string')
        yield text


def split_text(text: str, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters that join to `text`, cut after a blank line, else a line, else a word."""
    start = 0
    while len(text) - start > limit:
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start, start + limit)
            if found > start:
                end = found + len(mark)
                break
        else:
            end = start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _validation_count(documents: list[str]) -> int:
    """How many of the first documents are for validation."""
    count, characters = 0, 0
    while count < max(1, len(documents) // 20) and (count == 0 or characters < VALIDATION_CHARACTERS):
        characters += len(documents[count])
        count += 1
    return count


def _split_by_size(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Groups of consecutive documents, each closed once it holds `characters`."""
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group
