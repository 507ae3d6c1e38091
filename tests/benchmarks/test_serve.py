"""The offline serving benchmark: the published work, and a small run."""

import json

import pytest

pytest.importorskip("nanochat_rustbpe", reason="the Rust tokenizer is not built")

from benchmarks import serve
from nanochat.errors import UsageError


def test_the_work_is_the_published_one():
    requests = serve.requests_of(serve.ServeConfig())
    assert len(requests) == 256 and sum(r.params.max_tokens for r in requests) == 133_966
    assert all(100 <= len(r.tokens) <= 1024 and r.params.ignore_eos for r in requests)
    small = serve.requests_of(serve.ServeConfig(scale=0.05, requests=8))
    assert all(5 <= len(r.tokens) <= 51 and 5 <= r.params.max_tokens <= 51 for r in small)


def test_a_small_run_writes_rows_and_the_ratio(tmp_path, monkeypatch, capsys):
    arguments = ["--depth", "1", "--requests", "3", "--scale", "0.02", "--alone", "2", "--vocab-size", "512"]
    monkeypatch.setattr("sys.argv", ["serve", *arguments, "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    assert serve.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["work"] for row in rows] == ["offline, together", "offline, one at a time"]
    wanted = serve.requests_of(serve.ServeConfig(requests=3, scale=0.02, vocab_size=512))
    assert rows[0]["output_tokens"] == sum(r.params.max_tokens for r in wanted)
    assert rows[0]["output_tokens_per_s"] > 0 and rows[0]["preemptions"] == 0
    assert "together ÷ one at a time" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"requests": 0}, {"depth": 0}])
def test_wrong_calls(wrong):
    with pytest.raises(UsageError):
        serve.ServeConfig(**wrong)
