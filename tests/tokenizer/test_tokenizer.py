"""The Python face: folder, errors, special tokens, export."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.tokenizer import (
    MIN_VOCAB_SIZE,
    SETTINGS_FILE,
    SPECIAL_TOKENS,
    Tokenizer,
    default_tokenizer_dir,
    parse_ranks,
)
from tests.tokenizer.conftest import ODD_TEXTS


@pytest.mark.parametrize("size", [MIN_VOCAB_SIZE, 512, 1033])
def test_vocabulary_sizes(texts: list[str], size: int):
    tokenizer = Tokenizer.train(texts, size)
    assert tokenizer.vocab_size == size
    assert list(tokenizer.specials) == list(SPECIAL_TOKENS)
    assert list(tokenizer.specials.values()) == list(range(size - 9, size))
    assert tokenizer.bos_id == size - 9 == tokenizer.encode_special("<|bos|>")
    for text in ODD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sizes_that_cannot_be(texts: list[str], tokenizer: Tokenizer):
    with pytest.raises(UsageError, match="vocabulary of 264 is too small.*at least 265"):
        Tokenizer.train(texts, 264)
    with pytest.raises(UsageError, match="no vocabulary of 5000 can be made.*holds only 3 merges.*lower"):
        Tokenizer.train(["abcd"], 5000)
    with pytest.raises(UsageError, match="cannot grow"):
        tokenizer.with_vocab_size(1 << 20)


def test_a_smaller_vocabulary_without_training_again(texts: list[str], tokenizer: Tokenizer):
    assert tokenizer.with_vocab_size(600).fingerprint == Tokenizer.train(texts, 600).fingerprint


def test_token_bytes(tokenizer: Tokenizer, texts: list[str]):
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (tokenizer.vocab_size,)
    assert not lengths[-9:].any() and (lengths[:-9] > 0).all()
    ids, _ = tokenizer.encode_batch(texts, prepend_bos=True)
    assert lengths[ids].sum() == sum(len(text.encode()) for text in texts)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path):
    folder = tmp_path / "deep" / "tokenizer"
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.specials == tokenizer.specials and loaded.ranks() == tokenizer.ranks()
    other = tokenizer.with_vocab_size(700)
    assert other.fingerprint != tokenizer.fingerprint
    other.save(folder)
    assert Tokenizer.load(folder).fingerprint == other.fingerprint
    assert sorted(os.listdir(folder)) == [f"ranks-{other.fingerprint}.tiktoken", SETTINGS_FILE]


def test_tiktoken_reads_our_ranks(tokenizer: Tokenizer, tmp_path: Path):
    from tiktoken.load import load_tiktoken_bpe

    tokenizer.save(tmp_path)
    (path,) = tmp_path.glob("*.tiktoken")
    assert load_tiktoken_bpe(str(path)) == tokenizer.ranks() == parse_ranks(path.read_bytes())


def test_a_crash_while_saving_leaves_the_old_tokenizer(tokenizer: Tokenizer, tmp_path: Path, monkeypatch):
    old = tokenizer.with_vocab_size(300)
    old.save(tmp_path)
    real, calls = os.replace, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(NanochatError, match="No space left"):
        tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == old.fingerprint
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_nothing_there(tmp_path: Path):
    with pytest.raises(NanochatError, match="no tokenizer in .*run `nanochat tok-train`"):
        Tokenizer.load(tmp_path)
    assert default_tokenizer_dir().name == "tokenizer"


def test_damage_is_noticed(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    (ranks,) = tmp_path.glob("*.tiktoken")
    settings, whole = tmp_path / SETTINGS_FILE, ranks.read_bytes()
    good = settings.read_text()

    def fails(match: str) -> None:
        with pytest.raises(NanochatError, match=match) as caught:
            Tokenizer.load(tmp_path)
        assert "nanochat tok-train" in str(caught.value)

    ranks.write_bytes(whole[:-40])
    fails("damaged: its fingerprint is")
    ranks.unlink()
    fails("missing")
    ranks.write_bytes(whole)
    for text in (good[:-30], "[]", "{}", "null"):
        settings.write_text(text)
        fails("cannot be read")
    settings.write_text(good.replace("tokenizer 1", "tokenizer 9"))
    fails("has format")
    changed = json.loads(good)
    changed["specials"]["<|bos|>"] += 100
    settings.write_text(json.dumps(changed))
    fails("damaged")
    settings.write_text(good)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_wrong_calls(tokenizer: Tokenizer):
    with pytest.raises(UsageError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(UsageError, match="lone surrogate"):
        tokenizer.encode_batch(["\ud800"])
    assert tokenizer.decode(tokenizer.encode("\ud800", errors="replace")) == "\ufffd"
    for ids in ([tokenizer.vocab_size], [-1], [1 << 40]):
        with pytest.raises(UsageError, match=f"ids are 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode(ids)
    with pytest.raises(UsageError, match="is no special token; there are <|bos|>"):
        tokenizer.encode_special("<|end|>")
    with pytest.raises(ValueError, match="line 2"):
        parse_ranks(b"IQ== 0\nnonsense\n")


def test_decoding_takes_any_sequence(tokenizer: Tokenizer):
    ids = tokenizer.encode("hello é")
    assert tokenizer.decode(np.array(ids, np.uint16)) == tokenizer.decode(iter(ids)) == "hello é"
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == "<|bos|>hello é"


def test_hugging_face_gives_the_same_ids(tokenizer: Tokenizer, texts: list[str]):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_hugging_face()))
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    for text in (text for text in [*texts[:40], *ODD_TEXTS] if "<|" not in text):
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.encode("<|bos|>").ids == [tokenizer.bos_id]
