"""The hand-written splitter against the regex engine, for both patterns."""

import sys

import nanochat_rustbpe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.conftest import ODD_TEXTS

BYTES = {bytes([byte]): byte for byte in range(256)}
PATTERNS = {2: nanochat_rustbpe.PATTERN_2, 3: nanochat_rustbpe.PATTERN_3}
BY_HAND = {digits: nanochat_rustbpe.Encoding(BYTES, pattern) for digits, pattern in PATTERNS.items()}
# Any other string takes the regex engine, also one that means the same.
BY_REGEX = {digits: nanochat_rustbpe.Encoding(BYTES, f"(?:{pattern})") for digits, pattern in PATTERNS.items()}

# What the pattern tells apart, and characters on the edges of its classes.
TRICKY = "aZéſKǅ中'’0٣½Ⅷ \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2000\u2028\u2029\u202f\u205f\u3000\u180e\u200b.,!_$´\u0301😀\U00020000lLvVeErRsSdDmMtT"  # noqa: E501


def check(text: str, patterns: tuple[int, ...] = (2, 3)) -> None:
    for digits in patterns:
        pieces = BY_HAND[digits].split(text)
        assert pieces == BY_REGEX[digits].split(text)
        assert "".join(pieces) == text


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_odd_texts(text: str):
    check(text)


@pytest.mark.parametrize("template", ["a{0}b 1{0}{0}{0}", "'{0}x\n{0} {0}\n"])
def test_every_code_point(template: str):
    everything = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    block: list[str] = []
    for character in everything:
        block.append(template.format(character))
        if len(block) == 20_000:
            check("x".join(block), (2,))
            block.clear()
    check("x".join(block), (2,))


def test_white_space_is_25_code_points():
    white = [c for c in map(chr, range(0xD800)) if BY_HAND[2].split(f"!{c * 3}") == ["!", c * 3]]
    assert len({*white, "\r", "\n"}) == 25
    assert not {"\x1c", "\x1d", "\x1e", "\x1f"} & {*white}, "Python's isspace has these, the pattern does not"


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=st.sampled_from(TRICKY), max_size=40))
def test_tricky_characters(text: str):
    check(text)


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=60))
def test_any_unicode(text: str):
    check(text)


def test_real_text(corpus: list[str]):
    for text in corpus[:400]:
        check(text)


def test_a_custom_pattern_never_drops_text():
    words_only = nanochat_rustbpe.Encoding(BYTES, r"[a-z]+")
    assert words_only.split("one, two; ") == ["one", ", ", "two", "; "]
    assert bytes(words_only.encode("one, two; ")) == b"one, two; "
    assert nanochat_rustbpe.Encoding(BYTES, r"x*").split("axxb") == ["a", "xx", "b"]


def test_a_pattern_that_is_no_regex_is_refused():
    with pytest.raises(ValueError, match="not a valid regex"):
        nanochat_rustbpe.Encoding(BYTES, "(unclosed")
