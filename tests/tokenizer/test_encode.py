"""Encoding against tiktoken on the same ranks, and everything that must hold around it."""

import multiprocessing
import pickle
import sys
import threading
import time

import nanochat_rustbpe
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import Tokenizer
from tests.tokenizer.conftest import ODD_TEXTS

BYTES = {bytes([byte]): byte for byte in range(256)}
PATTERN = nanochat_rustbpe.PATTERN_2


def test_odd_texts(tokenizer: Tokenizer, oracle: tiktoken.Encoding):
    for text in ODD_TEXTS:
        assert tokenizer.encode(text) == oracle.encode_ordinary(text)


def test_own_sources(tokenizer: Tokenizer, oracle: tiktoken.Encoding, texts: list[str]):
    ids, offsets = tokenizer.encode_batch(texts)
    for index, text in enumerate(texts):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == oracle.encode_ordinary(text)


def test_real_text(tokenizer: Tokenizer, oracle: tiktoken.Encoding, corpus: list[str]):
    ids, offsets = tokenizer.encode_batch(corpus)
    for index in range(0, len(corpus), 3):
        assert ids[offsets[index] : offsets[index + 1]].tolist() == oracle.encode_ordinary(corpus[index])


def test_a_large_vocabulary_with_three_digits(corpus: list[str]):
    counts = nanochat_rustbpe.WordCounts(nanochat_rustbpe.PATTERN_3)
    counts.add(corpus)
    ranks = nanochat_rustbpe.ranks_from_merges(counts.train(20_000))
    encoding = nanochat_rustbpe.Encoding(ranks, nanochat_rustbpe.PATTERN_3)
    oracle = tiktoken.Encoding("o", pat_str=nanochat_rustbpe.PATTERN_3, mergeable_ranks=ranks, special_tokens={})
    for text in corpus[:100]:
        assert encoding.encode(text) == oracle.encode_ordinary(text)


@settings(max_examples=500, deadline=None)
@given(text=st.text(max_size=80))
def test_any_unicode(tokenizer: Tokenizer, oracle: tiktoken.Encoding, text: str):
    ids = tokenizer.encode(text)
    assert ids == oracle.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abest h\n1.", max_size=400))
def test_long_and_short_pieces(tokenizer: Tokenizer, oracle: tiktoken.Encoding, text: str):
    glued = text.replace(" ", "")
    for piece in (text, glued, glued.replace("\n", "").replace("1", "").replace(".", "")):
        assert tokenizer.encode(piece) == oracle.encode_ordinary(piece)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(b"abc"), min_size=2, max_size=6).map(bytes), unique=True, max_size=40), st.data()
)
def test_ranks_that_no_training_made(tokens: list[bytes], data: st.DataObject):
    """tiktoken joins whatever neighbors make a token; ranks in any order, tokens without a path to them."""
    ranks = BYTES | {token: 256 + index for index, token in enumerate(tokens)}
    encoding = nanochat_rustbpe.Encoding(ranks, PATTERN)
    oracle = tiktoken.Encoding("o", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for size in (30, 300):
        text = data.draw(st.text(alphabet="abc", min_size=size // 2, max_size=size))
        assert encoding.encode(text) == oracle.encode_ordinary(text)


def test_a_permuted_byte_alphabet():
    """gpt2's first ids are not the bytes in order."""
    ranks = {bytes([byte]): 255 - byte for byte in range(256)} | {b"ab": 256, b"abc": 257}
    encoding = nanochat_rustbpe.Encoding(ranks, PATTERN)
    oracle = tiktoken.Encoding("o", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode("abcabé") == oracle.encode_ordinary("abcabé")


def test_single_tokens_and_arbitrary_bytes_round_trip(tokenizer: Tokenizer):
    for token, rank in tokenizer.ranks().items():
        assert tokenizer.decode_bytes([rank]) == token
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    ids = [tokenizer.ranks()[noise[i : i + 1]] for i in range(len(noise))]
    assert tokenizer.decode_bytes(ids) == noise
    assert tokenizer.decode(ids) == noise.decode("utf-8", errors="replace")
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == noise.decode("utf-8", errors="replace")


def test_stream_shows_whole_characters_only(tokenizer: Tokenizer):
    ids = [tokenizer.ranks()[bytes([byte])] for byte in "aé😀".encode()]
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(token) for token in ids] == ["a", "", "é", "", "", "", "😀"]
    assert decoder.flush() == ""
    decoder.push(ids[1])
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""


def test_batches(tokenizer: Tokenizer, texts: list[str]):
    ids, offsets = tokenizer.encode_batch(texts, threads=1)
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(texts) + 1
    assert ids.flags.owndata or ids.base is not None
    ids[:1] = 1  # writable
    for threads in (1, 2, 3, 8):
        again, where = tokenizer.encode_batch(texts * 3, threads=threads)
        assert np.array_equal(again[where[len(texts)] : where[2 * len(texts)]], tokenizer.encode_batch(texts)[0])
    begun, where = tokenizer.encode_batch(texts, prepend_bos=True)
    assert (begun[where[:-1]] == tokenizer.bos_id).all()
    assert len(begun) == len(ids) + len(texts)
    empty, where = tokenizer.encode_batch([])
    assert len(empty) == 0 and where.tolist() == [0]
    assert tokenizer.encode_batch(["", ""])[1].tolist() == [0, 0, 0]
    with pytest.raises(TypeError, match="one str"):
        tokenizer.encode_batch("text")
    with pytest.raises(TypeError, match="must be a str, not int"):
        tokenizer.encode_batch(["a", 3])  # type: ignore[list-item]


def test_ids_above_16_bits_come_as_uint32():
    encoding = nanochat_rustbpe.Encoding(BYTES | {b"ab": 70_000}, PATTERN)
    ids, _ = encoding.encode_batch(["abc"])
    assert ids.dtype == np.uint32 and ids.tolist() == [70_000, ord("c")] == encoding.encode("abc")
    with pytest.raises(ValueError, match="300 is no token id"):
        encoding.decode_bytes([300])


def test_specials_only_when_asked(tokenizer: Tokenizer):
    text = "a<|bos|><|bos|>b<|user_end|>"
    assert not set(tokenizer.encode(text)) & set(tokenizer.specials.values())
    specials = [("<s>", 300), ("<s>>", 301), ("s>", 302)]
    quiet = nanochat_rustbpe.Encoding(BYTES, PATTERN, specials)
    willing = nanochat_rustbpe.Encoding(BYTES, PATTERN, specials, allow_specials=True)
    assert quiet.encode("a<s>>b") == list(b"a<s>>b") == willing.encode("a<s>>b", allow_specials=False)
    # leftmost first, of those the longest
    assert willing.encode("a<s>>bs>") == quiet.encode("a<s>>bs>", allow_specials=True) == [97, 301, 98, 302]
    assert willing.encode_batch(["<s>", "x"])[0].tolist() == [300, 120]
    assert pickle.loads(pickle.dumps(willing)).encode("<s>") == [300]
    assert willing.decode_bytes([301, 97]) == b"<s>>a"


def test_wrong_vocabularies_are_refused():
    def build(ranks: dict[bytes, int], specials: list[tuple[str, int]] | None = None) -> None:
        nanochat_rustbpe.Encoding(ranks, PATTERN, specials or [])

    missing = dict(BYTES)
    del missing[b"\x80"]
    for ranks, specials, message in (
        (missing, [], "0x80 is no token"),
        (BYTES | {b"ab": 5}, [], "two tokens have the id 5"),
        (BYTES | {b"": 300}, [], "token 300 is empty"),
        (BYTES | {b"ab": 1 << 22}, [], "above the largest supported"),
        (BYTES, [("<s>", 3)], "is taken"),
        (BYTES, [("<s>", 300), ("<s>", 301)], "there twice"),
        (BYTES, [("", 300)], "empty name"),
    ):
        with pytest.raises(ValueError, match=message):
            build(ranks, specials)


def test_lone_surrogates(oracle: tiktoken.Encoding, tokenizer: Tokenizer):
    encoding = tokenizer._encoding
    for text in ("a\ud800", "\udfffb", "\ud83d\ude00 x \ud800\ud800"):
        with pytest.raises(ValueError, match="lone surrogate at character"):
            encoding.encode(text)
        with pytest.raises(ValueError, match="lone surrogate"):
            encoding.encode_batch(["fine", text])
        assert encoding.encode(text, errors="replace") == oracle.encode_ordinary(text)
    with pytest.raises(ValueError, match="neither"):
        encoding.encode("a", errors="ignore")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab", "é", "1", "!", "the", "\u0301"])
def test_a_long_piece_takes_near_linear_time(tokenizer: Tokenizer, unit: str):
    def seconds(count: int) -> float:
        text = unit * count + " x"
        started = time.perf_counter()
        ids = tokenizer.encode(text)
        taken = time.perf_counter() - started
        assert tokenizer.decode(ids) == text
        return taken

    small = max(seconds(20_000), seconds(20_000), 2e-3)
    assert seconds(320_000) < 16 * 6 * small, "16 times the text may not take 96 times as long"


def test_a_million_spaces_before_a_letter(tokenizer: Tokenizer):
    text = " " * 1_000_000 + "a"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_pieces_equal_tiktoken(tokenizer: Tokenizer, oracle: tiktoken.Encoding):
    rng = np.random.default_rng(1)
    for size in (15, 16, 17, 63, 64, 65, 66, 100, 1000, 5000):
        for alphabet in ("a", "ab", "etaoin"):
            text = "".join(rng.choice(list(alphabet), size))
            assert tokenizer.encode(text) == oracle.encode_ordinary(text), size


def test_threads_share_an_encoding(tokenizer: Tokenizer, texts: list[str]):
    expected = [tokenizer.encode(text) for text in texts]
    wrong: list[int] = []

    def work() -> None:
        for index, text in enumerate(texts):
            if tokenizer.encode(text) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _encode_in_child(tokenizer: Tokenizer, text: str, queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put(tokenizer.encode_batch([text] * 64, threads=2)[0][:100].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(tokenizer: Tokenizer, texts: list[str], method: str):
    if method == "fork" and not sys.platform.startswith("linux"):
        pytest.skip("fork is the habit of Linux only")
    tokenizer.encode_batch(texts, threads=2)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_encode_in_child, args=(tokenizer, texts[0], queue))
    child.start()
    ids = queue.get(timeout=120)
    child.join(30)
    assert child.exitcode == 0 and ids == tokenizer.encode(texts[0])[:100]


def test_pickling(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint and copy.specials == tokenizer.specials
    assert copy.encode("hello there") == tokenizer.encode("hello there")
