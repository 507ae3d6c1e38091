"""A corpus: a folder of parquet shards with a string column `text`, of which the last is for validation.

The validation shard is pinned by name in `corpus.json`, so that fetching more shards never changes what a model is
measured on; a folder without that file (anybody's own shards) uses its last shard by name. Everything is addressed as
(shard, row group, index): a document can be named in a checkpoint by four integers and read again.

Files are opened for each row group: parsing a footer takes about a millisecond, tokenizing a row group a hundred times
as long, and nothing is kept open or shared between threads.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.errors import NanochatError, UsageError

Split = Literal["train", "val"]
SPLITS = ("train", "val")
CORPUS_FILE = "corpus.json"
TEXT_COLUMN = "text"


@dataclass(frozen=True)
class Shard:
    """One parquet file. `remedy` is what a user should do when it is damaged."""

    path: Path
    remedy: str = "replace it by an intact copy"

    def open(self) -> pq.ParquetFile:
        """The parquet file, its footer read and its text column found; raises NanochatError naming file and remedy."""
        try:
            file = pq.ParquetFile(self.path)
        except FileNotFoundError as error:
            raise NanochatError(f"shard {self.path} is missing; {self.remedy}") from error
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        schema = file.schema_arrow
        if TEXT_COLUMN not in schema.names:
            raise NanochatError(
                f"shard {self.path} has no column {TEXT_COLUMN!r}, only {', '.join(schema.names) or 'none'}; "
                f"rename the column that holds the text to {TEXT_COLUMN!r}"
            )
        kind = schema.field(TEXT_COLUMN).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise NanochatError(f"column {TEXT_COLUMN!r} of shard {self.path} holds {kind}; it must hold strings")
        return file

    def row_groups(self) -> int:
        """How many row groups the shard has."""
        return self.open().num_row_groups

    def documents(self) -> int:
        """How many documents the shard has, from its footer."""
        return self.open().metadata.num_rows

    def read(self, row_group: int) -> list[str]:
        """The texts of one row group, in file order; a null text reads as the empty string."""
        file = self.open()
        try:
            column = file.read_row_group(row_group, columns=[TEXT_COLUMN]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error, f" in row group {row_group}") from error
        return [text or "" for text in column.to_pylist()]

    def _damaged(self, error: Exception, where: str = "") -> NanochatError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return NanochatError(f"shard {self.path} is truncated or damaged{where} ({reason}); {self.remedy}")


@dataclass(frozen=True)
class Corpus:
    """The shards of one corpus, in order of their names."""

    name: str
    folder: Path
    train_shards: tuple[Shard, ...]
    val_shard: Shard
    remedy: str = field(default="", compare=False)

    def shards(self, split: Split) -> tuple[Shard, ...]:
        """The shards of a split, "train" or "val"."""
        if split not in SPLITS:
            raise UsageError(f"unknown split {split!r}; use train or val")
        return self.train_shards if split == "train" else (self.val_shard,)

    def read_row_group(self, shard_index: int, row_group: int, split: Split = "train") -> list[str]:
        """The texts of one row group of the split's shard number `shard_index`."""
        return self.shards(split)[shard_index].read(row_group)

    def documents(self, split: Split) -> Iterator[str]:
        """Every text of a split once, in order."""
        for shard in self.shards(split):
            for row_group in range(shard.row_groups()):
                yield from shard.read(row_group)

    def digest(self, split: Split) -> str:
        """Sixteen hexadecimal digits that change when a shard is added, removed, renamed or resized."""
        summary = [(shard.path.name, shard.path.stat().st_size) for shard in self.shards(split)]
        return hashlib.sha256(json.dumps(summary).encode()).hexdigest()[:16]


def read_corpus_file(folder: Path) -> dict:
    """What `corpus.json` says ({} where there is none): "validation" names the pinned shard."""
    path = folder / CORPUS_FILE
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise NanochatError(f"{path} is not valid JSON ({error}); delete it and prepare the corpus again") from error


def shard_names(folder: Path) -> list[str]:
    """Names of the parquet files directly in `folder`, sorted."""
    return sorted(p.name for p in folder.glob("*.parquet") if p.is_file())


def open_folder(folder: Path, name: str, shards: int | None, remedy: str) -> Corpus:
    """Opens a folder of shards: the first `shards` training shards (all when None) and the validation shard.

    Raises NanochatError where there is no data, too few shards or no validation shard; `remedy` ends the message.
    """
    names = shard_names(folder) if folder.is_dir() else []
    if not names:
        raise NanochatError(f"no data for {name!r}: {folder} holds no parquet shards; {remedy}")
    validation = read_corpus_file(folder).get("validation", names[-1])
    train = [n for n in names if n != validation]
    if validation not in names:
        raise NanochatError(f"the validation shard {validation} is missing in {folder}; {remedy}")
    if not train:
        raise NanochatError(f"{folder} holds the validation shard {validation} but no training shard; {remedy}")
    if shards is not None and shards < 1:
        raise UsageError(f"{shards} training shards asked for; the least is 1")
    if shards is not None and len(train) < shards:
        raise NanochatError(f"{shards} training shards asked for, {folder} holds {len(train)}; {remedy}")
    damaged = f"delete it, then {remedy}"
    chosen = tuple(Shard(folder / n, damaged) for n in train[:shards])
    return Corpus(name, folder, chosen, Shard(folder / validation, damaged), remedy)


def open_corpus(spec: str, shards: int | None = None, base: Path | None = None) -> Corpus:
    """Opens what `spec` names: a source (see `nanochat.data.sources`) or the path of a folder of parquet shards.

    `shards` limits the training shards to the first so many. `base` is the folder that holds everything
    (NANOCHAT_BASE_DIR by default). Nothing is fetched or converted here: the error for missing data names the command.
    """
    from nanochat.data.sources import parse_source  # sources build corpora, so they import this module

    source = parse_source(spec)
    source.check_current(base)
    return open_folder(source.folder(base), source.name, shards, source.remedy(shards))
