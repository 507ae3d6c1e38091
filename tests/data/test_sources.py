"""Sources: what each prepares, in which folder, and that preparing again does nothing; the `data` command on top."""

import io
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import nanochat.data.builtin
from nanochat.data import convert
from nanochat.data.command import DataConfig, run
from nanochat.data.convert import convert_files, split_text
from nanochat.data.corpus import open_corpus
from nanochat.data.sources import REMOTE, RemoteSource, Request, parse_source
from nanochat.errors import NanochatError, UsageError

from .conftest import make_texts, write_parquet


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_URL", raising=False)
    monkeypatch.delenv("NANOCHAT_DATA_SHARDS", raising=False)
    return tmp_path / "base"


def test_what_the_hub_offers():
    assert (REMOTE["climbmix"].total, REMOTE["climbmix"].validation) == (6543, "shard_06542.parquet")
    assert REMOTE["fineweb-edu"].validation == "shard_01822.parquet"
    url = f"{REMOTE['climbmix'].url}/{REMOTE['climbmix'].shard_name(7)}"
    assert url == "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_00007.parquet"


def listing(folder: Path) -> list[str]:
    """What lies in a folder, locks aside."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


# Remote


@pytest.fixture
def hub(server, tmp_path, base, monkeypatch):
    """A mirror of seven shards in place of the hub."""
    for i in range(7):
        write_parquet(tmp_path / "x", make_texts(10, i))
        server.files[f"shard_{i:05d}.parquet"] = (tmp_path / "x").read_bytes()
    monkeypatch.setenv("NANOCHAT_DATA_URL", server.url + "/")
    monkeypatch.setenv("NANOCHAT_DATA_SHARDS", "7")
    return server


def test_fetching_more_never_changes_validation(hub, base, capsys):
    few = run(DataConfig("climbmix", shards=2))
    assert few.folder == base / "data" / "climbmix"
    assert sorted(name for name, _ in hub.requests) == [f"shard_0000{i}.parquet" for i in (0, 1, 6)]
    assert (
        "2 training shards with 20 documents, 10 documents for validation (shard_00006.parquet)"
        in capsys.readouterr().out
    )
    hub.requests.clear()
    more = run(DataConfig("climbmix", shards=4))
    assert sorted(name for name, _ in hub.requests) == [f"shard_0000{i}.parquet" for i in (2, 3)]
    assert more.val_shard == few.val_shard and more.train_shards[:2] == few.train_shards
    assert list(more.documents("val")) == make_texts(10, 6)
    hub.requests.clear()
    assert len(run(DataConfig("climbmix", shards=-1)).train_shards) == 6
    run(DataConfig("climbmix", shards=3))
    assert len(hub.requests) == 2


def test_a_truncated_shard_is_mended_by_the_command(hub, base):
    corpus = run(DataConfig("climbmix", shards=2))
    shard = corpus.train_shards[1].path
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50])
    with pytest.raises(NanochatError, match="damaged.*nanochat data --source climbmix"):
        list(open_corpus("climbmix").documents("train"))
    run(DataConfig("climbmix", shards=2))
    assert shard.read_bytes() == whole


def test_offline_says_what_is_missing_and_how_to_get_it(hub, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(
        NanochatError, match="NANOCHAT_OFFLINE is set, and 3 of 3.*shard_00006.*--source climbmix --shards 2"
    ):
        run(DataConfig("climbmix", shards=2))
    assert hub.requests == []


def test_shard_counts_and_mirrors_are_checked(hub, base, monkeypatch):
    for wrong in (0, 7, -2):
        with pytest.raises(UsageError, match=f"--shards {wrong}: climbmix has 6 training shards"):
            run(DataConfig("climbmix", shards=wrong))
    run(DataConfig("climbmix", shards=1))
    monkeypatch.setenv("NANOCHAT_DATA_SHARDS", "5")
    with pytest.raises(NanochatError, match="validated on shard_00006.parquet, but .* ends with shard_00004.parquet"):
        run(DataConfig("climbmix", shards=1))
    for name, value in (("SHARDS", "1"), ("SHARDS", "x"), ("URL", "ftp://here")):
        monkeypatch.setenv("NANOCHAT_DATA_SHARDS", "7")
        monkeypatch.setenv(f"NANOCHAT_DATA_{name}", value)
        with pytest.raises(UsageError, match=f"NANOCHAT_DATA_{name}='{value}'"):
            parse_source("climbmix")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")
    with pytest.raises(NanochatError, match="cannot write to .*NANOCHAT_BASE_DIR"):
        RemoteSource("x", "http://127.0.0.1:9", 3).prepare(Request(shards=1), tmp_path)


# A user's own files


def write_files(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text("first text\n")
    (folder / "sub" / "b.md").write_bytes(b"\xef\xbb\xbfsecond text")  # with a byte order mark
    (folder / "c.jsonl").write_text('{"text": "third\\u2028text", "id": 1}\n\n{"text": "fourth"}\n{"text": " "}\n')
    (folder / "ignored.csv").write_text("not text")
    (folder / ".hidden" / "d.txt").write_text("hidden")
    write_parquet(folder / "e.parquet", make_texts(100))


def test_files_become_a_corpus_once(tmp_path, base):
    write_files(tmp_path / "mine")
    spec = f"files:{tmp_path / 'mine'}"
    with pytest.raises(NanochatError, match="run `nanochat data --source files:"):
        open_corpus(spec)
    corpus = run(DataConfig(spec))
    texts = [*corpus.documents("train"), *corpus.documents("val")]
    expected = ["first text\n", "second text", "third\u2028text", "fourth", *make_texts(100)]
    assert sorted(texts) == sorted(expected)
    assert corpus.folder.parent == base / "data" and corpus.folder.name.startswith("files-mine-")
    assert corpus.val_shard.documents() == 104 // 20
    assert texts != expected, "shuffled, so that validation is like training"
    stamps = [p.stat().st_mtime_ns for p in sorted(corpus.folder.iterdir())]
    run(DataConfig(spec))
    assert stamps == [p.stat().st_mtime_ns for p in sorted(corpus.folder.iterdir())]
    assert listing(corpus.folder.parent) == [corpus.folder.name]


def test_conversion_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_CHARACTERS", 1000)
    write_files(tmp_path / "mine")
    for name in ("one", "two"):
        convert_files(tmp_path / "mine", tmp_path / name)
    one, two = ([p.read_bytes() for p in sorted((tmp_path / n).glob("*.parquet"))] for n in ("one", "two"))
    assert one == two and len(one) > 3
    facts = json.loads((tmp_path / "one" / "corpus.json").read_text())
    assert facts["validation"] == f"shard_{len(one) - 1:05d}.parquet"


def test_changed_files_are_converted_again(tmp_path, base):
    write_files(tmp_path / "mine")
    spec = f"files:{tmp_path / 'mine'}"
    run(DataConfig(spec))
    (tmp_path / "mine" / "a.txt").write_text("another first text\n")
    with pytest.raises(NanochatError, match="has changed since it was converted; run `nanochat data"):
        open_corpus(spec)
    corpus = run(DataConfig(spec))
    assert "another first text\n" in [*corpus.documents("train"), *corpus.documents("val")]
    assert listing(corpus.folder.parent) == [corpus.folder.name]
    for path in sorted((tmp_path / "mine").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "mine").rmdir()
    assert open_corpus(spec).train_shards == corpus.train_shards


def test_a_long_text_is_split_and_loses_nothing(tmp_path, base):
    book = "".join(f"Chapter {i}. " + "word " * 500 + "\n\n" for i in range(40))
    (tmp_path / "book.txt").write_text(book)
    corpus = run(DataConfig(f"files:{tmp_path / 'book.txt'}"))
    texts = [*corpus.documents("train"), *corpus.documents("val")]
    assert all(len(t) <= 8192 and t.endswith("\n\n") for t in texts) and sum(map(len, texts)) == len(book)
    for text in ("a b" * 5000, "x" * 20000, "line\n" * 4000, "", "short"):
        pieces = list(split_text(text, 100))
        assert "".join(pieces) == text and all(len(p) <= 100 for p in pieces)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "no"}\n', r"a.jsonl, line 2 is not a JSON object with a \"text\""),
        ("a.jsonl", b'{"text": "fine"}\nnonsense\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: .* is int, not a string"),
        ("a.txt", b"caf\xe9 au lait", "a.txt is not UTF-8 at byte 3; convert it"),
        ("a.parquet", b"PAR1 half", "a.parquet is truncated or damaged"),
        ("a.txt", b"alone", r"holds 1 document\(s\); 2 are needed"),
        ("a.csv", b"a,b", "holds no .txt, .md, .jsonl, .parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, base, name, content, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(content)
    with pytest.raises(NanochatError, match=message):
        run(DataConfig(f"files:{tmp_path / 'mine'}"))
    assert listing(base / "data") == []


def test_missing_file_is_a_wrong_call(tmp_path, base):
    with pytest.raises(UsageError, match="no such file or folder"):
        run(DataConfig(f"files:{tmp_path / 'nothing'}"))


def test_folder_of_shards_is_used_in_place(corpus_folder, base):
    for spec in (str(corpus_folder), f"files:{corpus_folder}"):
        before = sorted(corpus_folder.iterdir())
        assert run(DataConfig(spec)).folder == corpus_folder.resolve()
        assert sorted(corpus_folder.iterdir()) == before and not base.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, base, monkeypatch):
    write_files(tmp_path / "mine")

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(NanochatError, match="No space left.*NANOCHAT_BASE_DIR"):
        run(DataConfig(f"files:{tmp_path / 'mine'}"))
    assert listing(base / "data") == []


# Built in: the generator itself has tests of its own


@pytest.fixture
def generator(monkeypatch):
    """Stands in for the generator; counts its calls."""
    calls = []

    def write_corpus(folder: Path, characters: int) -> None:
        calls.append(characters)
        folder.mkdir(parents=True)
        for i in range(3):
            write_parquet(folder / f"shard_{i:05d}.parquet", ["x" * (characters // 3)])
        if characters == 13:
            raise RuntimeError("unlucky")

    monkeypatch.setattr(nanochat.data.builtin, "write_corpus", write_corpus)
    return calls


def test_builtin_is_generated_once_for_each_size(base, generator):
    corpus = run(DataConfig("builtin", characters=300))
    assert len(corpus.train_shards) == 2 and corpus.val_shard.path.name == "shard_00002.parquet"
    run(DataConfig("builtin", characters=300))
    assert generator == [300]
    assert len(next(run(DataConfig("builtin", characters=600)).documents("train"))) == 200
    with pytest.raises(RuntimeError):
        run(DataConfig("builtin", characters=13))
    assert len(next(open_corpus("builtin").documents("train"))) == 200, "the corpus before stays"
    assert listing(base / "data") == ["builtin"]
    with pytest.raises(UsageError, match="--characters 0"):
        run(DataConfig("builtin", characters=0))


def test_command_line_form(capsys):
    import tyro

    assert tyro.cli(DataConfig, args=["--source", "files:x", "--shards", "-1"]) == DataConfig("files:x", shards=-1)
    with pytest.raises(SystemExit) as error, io.StringIO():
        tyro.cli(DataConfig, args=["--shards", "many"])
    assert error.value.code == 2


def test_the_real_generator_and_tokenizer_go_through_the_loader(base):
    pytest.importorskip("nanochat_rustbpe", reason="the tokenizer's Rust module is not built")
    from nanochat.data.loader import PackedLoader
    from nanochat.tokenizer import Tokenizer

    corpus = run(DataConfig("builtin", characters=200_000))
    documents = list(corpus.documents("train"))
    tokenizer = Tokenizer.train(documents, 400)
    with PackedLoader(corpus, tokenizer, "train", rows=4, seq_len=64) as loader:
        for _ in range(5):
            batch = next(loader)
            assert (batch.inputs[:, 0] == tokenizer.bos_id).all()
            for row in batch.inputs.tolist():
                end = (row + [tokenizer.bos_id]).index(tokenizer.bos_id, 1)
                assert any(text.startswith(tokenizer.decode(row[1:end])) for text in documents)
        state = batch.state
        expected = next(loader).inputs
    with PackedLoader(corpus, tokenizer, "train", rows=4, seq_len=64, state=state) as loader:
        assert (next(loader).inputs == expected).all()
