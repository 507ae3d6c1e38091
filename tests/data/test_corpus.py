"""Opening corpora: order, the pinned validation shard, and an error with a remedy for every kind of damage."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.corpus import CORPUS_FILE, open_corpus
from nanochat.errors import NanochatError, UsageError

from .conftest import make_texts, write_parquet


def test_documents_and_row_groups(corpus_folder):
    corpus = open_corpus(str(corpus_folder))
    assert [s.path.name for s in corpus.train_shards] == [f"shard_0000{i}.parquet" for i in range(3)]
    assert corpus.val_shard.path.name == "shard_00003.parquet"
    assert list(corpus.documents("train")) == make_texts(40, 0) + make_texts(40, 1) + make_texts(40, 2)
    assert list(corpus.documents("val")) == make_texts(20, 3)
    assert corpus.read_row_group(1, 2) == make_texts(40, 1)[14:21]
    assert corpus.read_row_group(0, 2, "val") == make_texts(20, 3)[14:]
    assert (corpus.val_shard.row_groups(), corpus.val_shard.documents()) == (3, 20)


def test_shards_limits_training_and_leaves_validation(corpus_folder):
    corpus = open_corpus(str(corpus_folder), shards=1)
    assert len(corpus.train_shards) == 1 and corpus.val_shard.path.name == "shard_00003.parquet"
    with pytest.raises(NanochatError, match="5 training shards asked for, .* holds 3"):
        open_corpus(str(corpus_folder), shards=5)
    with pytest.raises(UsageError, match="the least is 1"):
        open_corpus(str(corpus_folder), shards=0)


def test_pinned_validation_stays_when_shards_come(corpus_folder):
    (corpus_folder / CORPUS_FILE).write_text(json.dumps({"validation": "shard_00003.parquet"}))
    before = open_corpus(str(corpus_folder))
    write_parquet(corpus_folder / "shard_00009.parquet", ["late"])
    after = open_corpus(str(corpus_folder))
    assert after.val_shard == before.val_shard and len(after.train_shards) == 4
    assert after.digest("val") == before.digest("val") and after.digest("train") != before.digest("train")
    (corpus_folder / "shard_00003.parquet").unlink()
    with pytest.raises(NanochatError, match="validation shard shard_00003.parquet is missing"):
        open_corpus(str(corpus_folder))


@pytest.mark.parametrize("source", ["climbmix", "fineweb-edu", "builtin"])
def test_no_data_names_the_command(tmp_path, source):
    with pytest.raises(NanochatError, match=f"no data for '{source}'.*run `nanochat data --source {source}") as error:
        open_corpus(source, base=tmp_path)
    assert error.value.exit_code == 1


def test_folders_that_are_no_corpus(tmp_path):
    with pytest.raises(NanochatError, match="holds no parquet shards.*files:"):
        open_corpus(str(tmp_path))
    write_parquet(tmp_path / "only.parquet", ["a", "b"])
    with pytest.raises(NanochatError, match="no training shard; .*files:"):
        open_corpus(str(tmp_path))
    with pytest.raises(UsageError, match="write files:"):
        open_corpus(str(tmp_path / "only.parquet"))
    with pytest.raises(UsageError, match="unknown data source 'nowhere'; use one of climbmix, fineweb-edu, builtin"):
        open_corpus("nowhere")
    (tmp_path / CORPUS_FILE).write_text("{")
    with pytest.raises(NanochatError, match="not valid JSON"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_shard_names_file_and_remedy(tmp_path, keep):
    folder = tmp_path / "data" / "climbmix"
    folder.mkdir(parents=True)
    for i in range(2):
        write_parquet(folder / f"shard_0000{i}.parquet", make_texts(40))
    shard = folder / "shard_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:keep])
    corpus = open_corpus("climbmix", base=tmp_path)
    with pytest.raises(
        NanochatError, match="shard_00000.parquet is truncated or damaged.*delete it, then run `nanochat"
    ):
        list(corpus.documents("train"))


def test_damage_in_the_middle_names_the_row_group(corpus_folder):
    shard = corpus_folder / "shard_00001.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[4:40] = b"\xff" * 36  # the first page's header
    shard.write_bytes(bytes(damaged))
    with pytest.raises(NanochatError, match="shard_00001.parquet is truncated or damaged in row group 0"):
        open_corpus(str(corpus_folder)).read_row_group(1, 0)


def test_missing_or_unusable_column(tmp_path):
    for name in "ab":
        pq.write_table(pa.table({"content": ["x"], "id": [1]}), tmp_path / f"{name}.parquet")
    with pytest.raises(NanochatError, match="a.parquet has no column 'text', only content, id; rename"):
        list(open_corpus(str(tmp_path)).documents("train"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(NanochatError, match="'text' .* holds int64; it must hold strings"):
        list(open_corpus(str(tmp_path)).documents("train"))


def test_null_texts_are_empty(tmp_path):
    for name in "ab":
        pq.write_table(pa.table({"text": ["x", None]}), tmp_path / f"{name}.parquet")
    assert list(open_corpus(str(tmp_path)).documents("val")) == ["x", ""]


SHARED = Path(__file__).parents[3] / "shared" / "data" / "text"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/text")
def test_real_corpus_is_used_in_place():
    corpus = open_corpus(str(SHARED), shards=2)
    assert len(corpus.train_shards) == 2 and corpus.val_shard.documents() == 600
    assert open_corpus(f"files:{SHARED}").folder == SHARED.resolve()
    assert len(corpus.read_row_group(1, 0)) == 256
