"""`nanochat data`: makes a corpus ready and says what it holds."""

from dataclasses import dataclass

from rich.console import Console

from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.sources import Request, parse_source


@dataclass(frozen=True)
class DataConfig:
    """Downloads, converts or generates the text that models are trained on. Running it again continues."""

    source: str = "climbmix"
    """climbmix, fineweb-edu, files:PATH, builtin or a folder of parquet shards"""
    shards: int = 8
    """training shards to download (about 90 MB each), -1 for all; files and builtin have no need of it"""
    characters: int | None = None
    """size of the built-in corpus in characters, by default enough for the quickstart"""


def run(config: DataConfig) -> Corpus:
    """Prepares the corpus, prints a summary of it and returns it. Raises UsageError and NanochatError."""
    source = parse_source(config.source)
    source.prepare(Request(shards=config.shards, characters=config.characters))
    corpus = open_corpus(config.source)
    size = sum(shard.path.stat().st_size for shard in (*corpus.train_shards, corpus.val_shard)) / 1e6
    train, val = sum(shard.documents() for shard in corpus.train_shards), corpus.val_shard.documents()
    Console().print(
        f"{corpus.name}: {len(corpus.train_shards)} training shards with {train:,} documents, {val:,} documents for "
        f"validation ({corpus.val_shard.path.name}), {size:,.1f} MB in {corpus.folder}",
        highlight=False,
        soft_wrap=True,
    )
    return corpus
