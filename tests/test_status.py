"""`nanochat` alone: it reads the base folder and names the next command."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import cli, status
from nanochat.model import checkpoint

ALL = ("data", "tok-train", "train", "sft", "rl")


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def next_command(base, available=ALL):
    return status.next_command(list(status.items(base)), available)


def test_an_empty_machine(base, capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert "next: nanochat data" in shown and shown.count("none yet") == 5


def test_each_stage_leads_to_the_next(base, capsys):
    assert next_command(base) == "nanochat data"
    folder = base / "data" / "stories"
    folder.mkdir(parents=True)
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"text": ["once upon a time"]}), folder / name)
    assert next_command(base) == "nanochat tok-train --data stories"
    (base / "tokenizer").mkdir()
    assert next_command(base) == "nanochat tok-train --data stories", "an empty folder is no tokenizer"
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    assert next_command(base) == "nanochat train --data stories"
    (base / "data" / "stories").rename(base / "data" / "climbmix")
    assert next_command(base) == "nanochat train", "the default corpus needs no flag"
    checkpoint.save(base / "base_checkpoints" / "d4", 20, {"weight": torch.zeros(2)}, None, {"val_bpb": 1.25})
    assert next_command(base) == "nanochat sft"
    assert next_command(base, available=("data", "tok-train", "train")) is None
    status.show(ALL)
    shown = capsys.readouterr().out
    assert "climbmix: 2 shards" in shown and "d4: step 20, 1.2500 bits per byte" in shown


def test_a_damaged_checkpoint_is_told_not_hidden(base, capsys):
    saved = checkpoint.save(base / "base_checkpoints" / "d4", 20, {"weight": torch.zeros(2)}, None, {})
    (saved / "model.safetensors").write_bytes(b"short")
    status.show(ALL)
    assert "no complete checkpoint" in capsys.readouterr().out
