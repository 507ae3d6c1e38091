"""Rows of a dataset: from the Hugging Face hub, downloaded once, or from a local file or folder.

The hub keeps a parquet export of every dataset and lists its files by configuration and split; HF_ENDPOINT names
another address for it. Rows are shuffled with a fixed seed, so that a cap takes a fair part of a sorted dataset; the
permutation is numpy's default_rng(42), which is also what the `datasets` library's shuffle(seed=42) gives.
"""

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests

from nanochat.data.download import OFFLINE_VARIABLE, Policy, download, is_offline, parquet_problem
from nanochat.errors import NanochatError, UsageError
from nanochat.runtime import base_dir

SHUFFLE_SEED = 42
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub: repository, configuration, and its splits."""

    repository: str
    configuration: str
    splits: tuple[str, ...]


class Rows(Sequence[dict[str, Any]]):
    """Rows as dicts, in the fixed random order; made from the columns only when asked for."""

    def __init__(self, source: pa.Table | list[Any], shuffle: bool = True) -> None:
        self.source = source
        size = source.num_rows if isinstance(source, pa.Table) else len(source)
        self.order = np.random.default_rng(SHUFFLE_SEED).permutation(size) if shuffle else np.arange(size)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = int(self.order[index])
        if isinstance(self.source, pa.Table):
            return self.source.slice(at, 1).to_pylist()[0]
        return self.source[at]


def load_rows(dataset: HubDataset, split: str, path: str | Path | None = None, shuffle: bool = True) -> Rows:
    """The rows of a split of a hub dataset, or, given a path, those of that file or folder, whatever the split."""
    if path is not None:
        return Rows(read_rows(Path(path).expanduser()), shuffle)
    if split not in dataset.splits:
        raise UsageError(f"{dataset.repository} has no split {split!r}; use one of {', '.join(dataset.splits)}")
    return Rows(pa.concat_tables([pq.read_table(file) for file in _fetch(dataset, split)]), shuffle)


def read_rows(path: Path) -> pa.Table | list[Any]:
    """A parquet, JSONL or JSON file (also gzipped), or all such files in a folder, in order of their names."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise UsageError(f"{path} holds no {', '.join(SUFFIXES)} file")
        parts = [read_rows(file) for file in files]
        if all(isinstance(part, pa.Table) for part in parts):
            return pa.concat_tables(parts)
        return [row for part in parts for row in (part.to_pylist() if isinstance(part, pa.Table) else part)]
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a file or folder of {', '.join(SUFFIXES)}")
    try:
        if path.name.endswith(".parquet"):
            return pq.read_table(path)
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.name.endswith(".gz")
            else open(path, encoding="utf-8") as file
        ):
            if ".jsonl" not in path.name:
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise UsageError(f"{path} holds a JSON {type(rows).__name__}; a list of rows is needed")
                return rows
            return [_parsed(line, path, number) for number, line in enumerate(file, 1) if line.strip()]
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NanochatError(f"{path} cannot be read: {error}") from error


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise NanochatError(f"line {number} of {path} is not JSON ({error}): {line[:60]!r}") from error


def _fetch(dataset: HubDataset, split: str) -> list[Path]:
    """The split's parquet files below the base folder, downloaded where missing; any number of processes may ask."""
    folder = base_dir() / "tasks" / dataset.repository.replace("/", "--") / dataset.configuration / split
    listing = folder / "files.json"
    if not listing.exists() and is_offline():
        raise NanochatError(
            f"{OFFLINE_VARIABLE} is set and {dataset.repository} ({split}) is not in {folder}; unset it, or give "
            "a path: name:PATH reads a local copy"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".download.lock"):
        if not listing.exists():
            urls = _listed(dataset, split)
            names = [f"{number:05d}.parquet" for number in range(len(urls))]
            for name, url in zip(names, urls, strict=True):
                if not (folder / name).exists() or parquet_problem(folder / name):
                    download(url, folder / name, Policy())
            partial = listing.with_suffix(".partial")
            partial.write_text(json.dumps(names))
            os.replace(partial, listing)  # last: its presence says that all files are there
        return [folder / name for name in json.loads(listing.read_text())]


def _listed(dataset: HubDataset, split: str) -> list[str]:
    """The addresses of a split's parquet files, as the hub's interface lists them."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/api/datasets/{dataset.repository}/parquet/{dataset.configuration}/{split}"
    try:
        answer = requests.get(url, timeout=(15, 60))
        answer.raise_for_status()
        urls = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise NanochatError(
            f"the hub does not list {dataset.repository} ({error}); try again, or use a local copy: name:PATH"
        ) from error
    if not urls or not all(isinstance(address, str) for address in urls):
        raise NanochatError(f"{url} lists no files; use a local copy: name:PATH")
    return urls
