"""Checkpoints that karpathy/nanochat wrote: their tokens come out, and nothing hostile in a file runs."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from nanochat import cli
from nanochat.errors import NanochatError, UsageError
from nanochat.exchange import upstream
from nanochat.exchange.commands import ExportConfig, ImportConfig, run_export, run_import
from nanochat.model import checkpoint
from nanochat.tokenizer import Tokenizer, default_tokenizer_dir

from .conftest import FIXTURES, greedy, make_model


def test_their_greedy_tokens(theirs: tuple[Path, dict], base: Path) -> None:
    folder, expected = theirs
    run_import(ImportConfig(folder))
    model, meta = checkpoint.load_model(checkpoint.find("base"))
    tokenizer = Tokenizer.load(default_tokenizer_dir())
    assert meta["step"] == 7 and meta["val_bpb"] == 1.5 and meta["tokenizer"] == tokenizer.fingerprint
    assert tokenizer.encode(expected["text"]) == expected["ids"]
    prompt = expected["prompt"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=2e-5)
    assert greedy(model, prompt, len(expected["tokens"])) == expected["tokens"]


def test_their_tokens_under_autocast(base: Path) -> None:
    """In October 2025 the model ran in bfloat16 only. Rounding differs in order, so their choice may be a near tie."""
    folder = FIXTURES / "2025-10"
    expected = json.loads((folder / "expected.json").read_text())
    run_import(ImportConfig(folder))
    model, _ = checkpoint.load_model(checkpoint.find("base"), dtype=torch.bfloat16)
    ids = expected["prompt"] + expected["tokens_bf16"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, len(expected["prompt"]) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(expected["tokens_bf16"])[:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max().item() < 0.15  # logits reach 9; a bfloat16 there is 1/32 wide


def test_to_them_and_back(theirs: tuple[Path, dict], base: Path, tmp_path: Path, monkeypatch) -> None:
    folder, expected = theirs
    run_import(ImportConfig(folder, tag="mine"))
    out = tmp_path / "out"
    run_export(ExportConfig(to_nanochat=out, tag="mine"))
    before = torch.load(folder / "model_000007.pt", weights_only=True)
    after = torch.load(out / "model_000007.pt", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    config = json.loads((folder / "meta_000007.json").read_text())["model_config"]
    assert json.loads((out / "meta_000007.json").read_text())["model_config"] == config
    assert pickle.loads((out / "tokenizer/tokenizer.pkl").read_bytes()).encode(expected["text"]) == expected["ids"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "second"))
    run_import(ImportConfig(out))
    assert checkpoint.find("base").name == "out"


def test_where_things_are_found(base: Path, tmp_path: Path) -> None:
    """Their base folder's layout tells the stage and where the tokenizer lies."""
    source = tmp_path / "theirs/chatsft_checkpoints/d3"
    shutil.copytree(FIXTURES / "2026-07", source)
    shutil.move(source / "tokenizer", tmp_path / "theirs/tokenizer")
    with pytest.raises(NanochatError, match="chatsft_checkpoints/d3"):
        upstream.read_checkpoint(tmp_path / "theirs")
    run_import(ImportConfig(source))
    assert checkpoint.find("sft").name == "d3"
    with pytest.raises(NanochatError, match="--tag"):
        run_import(ImportConfig(source))
    with pytest.raises(NanochatError, match="no step 9 .* it has 7"):
        run_import(ImportConfig(source, step=9, tag="other"))
    shutil.rmtree(tmp_path / "theirs/tokenizer")
    with pytest.raises(NanochatError, match="--tokenizer"):
        run_import(ImportConfig(source, tag="other"))
    with pytest.raises(UsageError, match="no folder"):
        run_import(ImportConfig(tmp_path / "nowhere"))


def test_another_tokenizer_is_not_replaced(base: Path) -> None:
    mine = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
    mine.save(default_tokenizer_dir())
    with pytest.raises(NanochatError, match="NANOCHAT_BASE_DIR"):
        run_import(ImportConfig(FIXTURES / "2026-07"))
    assert Tokenizer.load(default_tokenizer_dir()).fingerprint == mine.fingerprint
    assert not (base / "base_checkpoints").exists()


def test_a_tokenizer_of_another_size_is_refused(base: Path, tmp_path: Path) -> None:
    upstream.write_tokenizer(tmp_path, Tokenizer.from_ranks({bytes([i]): i for i in range(256)}))
    with pytest.raises(NanochatError, match="265 tokens, the model 329"):
        run_import(ImportConfig(FIXTURES / "2026-07", tokenizer=tmp_path / "tokenizer.pkl"))
    assert not base.exists()


def test_weights_that_do_not_fit_their_settings_are_refused(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "d3"
    shutil.copytree(FIXTURES / "2026-07", source)
    meta = json.loads((source / "meta_000007.json").read_text())
    meta["model_config"]["n_layer"] = 4
    (source / "meta_000007.json").write_text(json.dumps(meta))
    with pytest.raises(NanochatError, match="does not fit"):
        run_import(ImportConfig(source))
    assert not base.exists()


class Trap:
    """Unpickled by the book, it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


class MakesFolder(Trap):
    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def disguised(target: Path) -> bytes:
    """A real Encoding's pickle whose fields hold a trap."""
    import tiktoken

    class Encoding(tiktoken.Encoding):
        def __getstate__(self):
            return {"name": "x", "pat_str": Trap(target), "mergeable_ranks": {}, "special_tokens": {}}

    encoding = tiktoken.Encoding(
        "x", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    Encoding.__module__, Encoding.__qualname__ = "tiktoken.core", "Encoding"
    original = tiktoken.core.Encoding
    try:
        tiktoken.core.Encoding = Encoding  # so that pickle accepts the disguise
        encoding.__class__ = Encoding
        return pickle.dumps(encoding)
    finally:
        tiktoken.core.Encoding = original


@pytest.mark.parametrize("kind", ["reduce", "inside the fields", "builtins.eval", "dotted name", "protocol 0"])
def test_a_hostile_tokenizer_runs_nothing(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    content = {
        "reduce": lambda: pickle.dumps(Trap(target)),
        "inside the fields": lambda: disguised(target),
        "builtins.eval": lambda: b"cbuiltins\neval\n(S'open(%r, \"w\")'\ntR." % str(target).encode(),
        "dotted name": lambda: b"\x80\x04\x8c\x0dtiktoken.core\x8c\x18Encoding.__init__.__call\x93.",
        "protocol 0": lambda: pickle.dumps(Trap(target), protocol=0),
    }[kind]()
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(content)
    with pytest.raises(NanochatError, match="refused"):
        upstream.read_tokenizer(path)
    assert not target.exists()
    if kind in ("reduce", "protocol 0"):  # the trap is real
        pickle.loads(content)
        assert target.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", pickle.dumps({"a": 1}), pickle.dumps("gpt2")])
def test_what_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(NanochatError, match="tokenizer.pkl"):
        upstream.read_tokenizer(tmp_path / "tokenizer.pkl")


def test_a_hostile_model_runs_nothing(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "d3"
    shutil.copytree(FIXTURES / "2026-07", source)
    torch.save({"x": MakesFolder(tmp_path / "ran")}, source / "model_000007.pt")
    with pytest.raises(NanochatError, match="refused.*asks for .*posix.mkdir"):
        run_import(ImportConfig(source))
    assert not (tmp_path / "ran").exists() and not base.exists()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "list", "meta"])
def test_a_damaged_checkpoint_is_named(damage: str, base: Path, tmp_path: Path) -> None:
    source = tmp_path / "d3"
    shutil.copytree(FIXTURES / "2026-07", source)
    path = source / ("meta_000007.json" if damage == "meta" else "model_000007.pt")
    if damage == "list":
        torch.save([torch.zeros(1)], path)
    else:
        content = path.read_bytes()
        path.write_bytes(
            {"cut": content[: len(content) // 2], "text": b"<html>404</html>", "empty": b""}.get(damage, b"{")
        )
    with pytest.raises(NanochatError, match=path.name):
        run_import(ImportConfig(source))
    assert not base.exists()


def test_export_needs_a_target_and_a_model(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--hf DIR"):
        run_export(ExportConfig())
    tokenizer.save(default_tokenizer_dir())
    with pytest.raises(NanochatError, match="no base checkpoint"):
        run_export(ExportConfig(hf=tmp_path / "out"))
    run_export(ExportConfig(tokenizer_json=tmp_path / "tokenizer.json"))
    tokenizers = pytest.importorskip("tokenizers")
    text = "Isn't it 2025? 世界"
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == tokenizer.encode(text)


def test_export_refuses_a_model_of_another_tokenizer(base: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(default_tokenizer_dir())
    model = make_model("2026")
    meta = {"config": model.config.to_dict(), "tokenizer": "0123456789abcdef"}
    checkpoint.save(base / "base_checkpoints/d5", 3, model.state_dict(), None, meta)
    with pytest.raises(NanochatError, match="0123456789abcdef"):
        run_export(ExportConfig(hf=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_commands(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", "--from-nanochat", str(FIXTURES / "2026-07"), "--tag", "d3"]) == 0
    assert cli.main(["export", "--tag", "d3", "--to-nanochat", str(tmp_path / "back")]) == 0
    assert "imported step 7" in capsys.readouterr().out and (tmp_path / "back/model_000007.pt").exists()
    assert cli.main(["export"]) == 2
    assert cli.main(["import", "--from-nanochat", str(tmp_path)]) == 1
