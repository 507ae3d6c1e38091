"""`nanochat eval` end to end on a tiny model, and the bundle's download."""

import json
import shutil
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation import base_eval, bundle
from nanochat.evaluation.base_eval import EvalConfig
from nanochat.model import checkpoint


@pytest.fixture
def home(tmp_path, monkeypatch, model, tokenizer):
    home = tmp_path / "home"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    tokenizer.save(home / "tokenizer")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(2):
        pq.write_table(
            pa.table({"text": [f"document {i} {n} " * 20 for n in range(40)]}), text / f"shard_{i:05d}.parquet"
        )
    meta = {"step": 5, "config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "run": {"data": str(text)}}
    checkpoint.save(home / "base_checkpoints" / "tiny", 5, model.state_dict(), None, meta)
    return home


def test_everything_is_evaluated_and_written(home, tmp_path, capsys, make_bundle):
    config = EvalConfig(data=make_bundle(tmp_path / "bundle"), eval_tokens=2048, rows=2, device="cpu")
    assert base_eval.run(config) == 0
    written = json.loads((home / "base_checkpoints" / "tiny" / "eval_000005.json").read_text())
    assert written["core"]["label"] == "CORE (1 of 2 tasks)" and written["core"]["missing"] == ["absent"]
    assert written["core"]["core"] == pytest.approx(2 * written["core"]["tasks"]["choice"]["accuracy"] - 1)
    assert 0 < written["bpb"]["val"] < 100 and 0 < written["bpb"]["train"] < 100
    assert len(written["samples"]) == 9
    assert json.loads((home / "results" / "base.json").read_text())["eval"] == written
    out = capsys.readouterr().out
    assert "lacks absent" in out and "bits per byte" in out


def test_parts_can_be_chosen(home, tmp_path, make_bundle):
    config = EvalConfig(parts="core", data=make_bundle(tmp_path / "bundle"), max_per_task=5, device="cpu")
    assert base_eval.run(config) == 0
    written = json.loads((home / "base_checkpoints" / "tiny" / "eval_000005.json").read_text())
    assert "bpb" not in written and written["core"]["tasks"]["choice"]["examples"] == 5
    for wrong in ({"parts": "cor"}, {"parts": ""}, {"rows": 0}, {"max_per_task": 0}):
        with pytest.raises(UsageError, match="--"):
            EvalConfig(**wrong)


@pytest.fixture
def server(tmp_path):
    """Serves what is in the folder `web`."""
    web = tmp_path / "web"
    web.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(web))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield web, f"http://127.0.0.1:{server.server_port}/eval_bundle.zip"
    server.shutdown()
    server.server_close()


def test_the_bundle_is_downloaded_once_and_whole(home, server, make_bundle):
    web, url = server
    make_bundle(web / "eval_bundle")
    shutil.make_archive(str(web / "eval_bundle"), "zip", web, "eval_bundle")
    folder = bundle.fetch(url=url)
    assert folder == home / "eval_bundle" and (folder / "eval_data" / "choice.jsonl").exists()
    (web / "eval_bundle.zip").unlink()
    assert bundle.fetch(url=url) == folder
    assert sorted(path.name for path in home.iterdir() if "bundle" in path.name) == [".eval_bundle.lock", "eval_bundle"]


def test_a_zip_without_a_bundle_leaves_nothing(home, server):
    web, url = server
    with zipfile.ZipFile(web / "eval_bundle.zip", "w") as archive:
        archive.writestr("eval_bundle/readme", "nothing here")
        archive.writestr("../outside", "x")
    with pytest.raises(NanochatError, match="not an evaluation bundle"):
        bundle.fetch(url=url)
    assert not (home / "eval_bundle").exists() and not (home.parent / "outside").exists()
    assert not list(home.glob(".eval_bundle-*"))


def test_damaged_archives_are_noticed(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "some text that is stored")
    assert bundle.zip_problem(path) is None
    path.write_bytes(path.read_bytes().replace(b"some text", b"some lies"))
    assert "damaged" in str(bundle.zip_problem(path))
    path.write_bytes(b"no zip")
    assert bundle.zip_problem(path)


def test_offline_without_a_bundle(home, monkeypatch):
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(NanochatError, match="NANOCHAT_OFFLINE.*--data"):
        bundle.fetch()
