"""tok-train and tok-eval over a corpus of parquet shards, and the caps on what they read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import tok_commands
from nanochat.errors import NanochatError, UsageError
from nanochat.tok_commands import CappedReader, TokEvalConfig, TokTrainConfig, tok_eval, tok_train
from nanochat.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    """Two shards: the texts to train on, a few to validate on."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for index, column in enumerate((texts, texts[:5])):
        pq.write_table(pa.table({"text": pa.array(column, pa.string())}), shards / f"shard_{index:05d}.parquet")
    return shards


def test_train_then_eval(folder: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "tokenizer"
    tok_train(TokTrainConfig(data=str(folder), vocab_size=700, doc_cap=10**9, threads=2, out=out))
    tokenizer = Tokenizer.load(out)
    assert tokenizer.fingerprint == Tokenizer.train(texts, 700).fingerprint
    printed = capsys.readouterr().out
    assert tokenizer.fingerprint in printed and f"{len(texts):,}" in printed
    tok_eval(TokEvalConfig(data=str(folder), tokenizer=out))
    printed = capsys.readouterr().out
    for name in ("(train)", "(val)", *tok_commands.SNIPPETS):
        assert name in printed


def test_the_caps_count(folder: Path, texts: list[str], tmp_path: Path):
    out = tmp_path / "tokenizer"
    tok_train(TokTrainConfig(data=str(folder), vocab_size=300, doc_cap=100, max_chars=1500, out=out))
    seen = list(CappedReader(texts, 1500, 100))
    assert Tokenizer.load(out).fingerprint == Tokenizer.train(seen, 300).fingerprint


def test_capped_reader():
    reader = CappedReader(["aaaa", "bb", "cccc", "never"], max_chars=8, doc_cap=3)
    reports: list[int] = []
    assert list(reader.reporting(reports.append, every=2)) == ["aaa", "bb", "ccc"]
    assert (reader.documents, reader.characters) == (3, 8) and reports == [5, 8]


def test_wrong_calls(folder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="vocabulary of 100 is too small"):
        tok_train(TokTrainConfig(data=str(folder), vocab_size=100))
    with pytest.raises(UsageError, match="--doc-cap 0 is too small"):
        tok_train(TokTrainConfig(data=str(folder), doc_cap=0))
    with pytest.raises(UsageError, match="no vocabulary of 10000000 can be made"):
        tok_train(TokTrainConfig(data=str(folder), vocab_size=10_000_000, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(NanochatError, match="nanochat tok-train"):
        tok_eval(TokEvalConfig(data=str(folder), tokenizer=tmp_path / "none"))


def test_no_reference_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: pytest.fail(f"would fetch {path}"))
    assert tok_commands.cached_reference("gpt2") is None
    assert tok_commands.cached_reference("cl100k_base") is None
