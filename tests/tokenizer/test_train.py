"""Training against the plain Python reference, and what must not change its result."""

import random
import threading
import time

import nanochat_rustbpe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer import reference
from tests.tokenizer.conftest import ODD_TEXTS

PATTERN = nanochat_rustbpe.PATTERN_2
# The reference's regex module may know a newer Unicode, in which characters unassigned so far are letters.
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])


def counts_of(texts, threads: int = 1, pattern: str = PATTERN) -> nanochat_rustbpe.WordCounts:
    counts = nanochat_rustbpe.WordCounts(pattern)
    counts.add(texts, threads)
    return counts


def all_merges(counts: nanochat_rustbpe.WordCounts) -> list[tuple[int, int]]:
    """Every merge there is, found by asking for too many."""
    try:
        counts.train(1_000_000)
    except ValueError as error:
        return counts.train(int(str(error).split("holds only ")[1].split()[0]))
    raise AssertionError("a million merges in a small text")


def test_counts_equal_the_reference(texts: list[str]):
    counted = {bytes(word): count for word, count in reference.word_counts(texts, PATTERN).items()}
    counts = counts_of(texts, threads=2)
    assert dict(counts.items()) == counted
    assert len(counts) == len(counted) and counts.total == sum(counted.values())


def test_merges_equal_the_reference(texts: list[str]):
    sample = [text[:1500] for text in texts]
    assert counts_of(sample).train(150) == reference.train(sample, 150, PATTERN)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="aab \n", max_size=60), max_size=6))
def test_ties_and_overlaps_equal_the_reference(texts: list[str]):
    """Few letters: runs that overlap themselves, many equal counts, merges until nothing is left to join."""
    expected = reference.train(texts, 1_000_000, PATTERN)
    assert all_merges(counts_of(texts)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(ASSIGNED, max_size=30), max_size=6))
def test_any_unicode_equals_the_reference(texts: list[str]):
    assert all_merges(counts_of(texts)) == reference.train(texts, 1_000_000, PATTERN)


def test_the_queue_reaches_its_bound_and_goes_on():
    """A skewed corpus: one word so frequent that the first bound is far too high for the rest."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(2, 9))) for _ in range(300)]
    texts = ["the " * 60_000, " ".join(words)]
    assert all_merges(counts_of(texts)) == reference.train(texts, 1_000_000, PATTERN)


def test_threads_order_and_grouping_do_not_matter(texts: list[str]):
    expected = counts_of(texts).train(700)
    shuffled = random.Random(3).sample(texts, len(texts))
    for threads in (1, 2, 5):
        assert counts_of(shuffled, threads).train(700) == expected
    counts = nanochat_rustbpe.WordCounts(PATTERN)
    for text in texts:
        counts.add([text], 2)
    assert counts.train(700) == expected


def test_bytes_and_iterators(texts: list[str]):
    expected = dict(counts_of(texts).items())
    assert dict(counts_of(iter(texts)).items()) == expected
    assert dict(counts_of(text.encode() for text in texts).items()) == expected


def test_smaller_vocabularies_are_prefixes_and_counts_can_be_kept(texts: list[str]):
    counts = counts_of(texts)
    large = counts.train(900)
    assert counts.train(250) == large[:250]
    again = nanochat_rustbpe.WordCounts(PATTERN)
    again.add_counts(counts.items())
    assert again.train(900) == large


def test_counts_are_64_bit():
    counts = nanochat_rustbpe.WordCounts(PATTERN)
    counts.add_counts([(b"ab", 1 << 40), (b"cd", (1 << 40) + 1), (b"ab", 3)])
    assert counts.train(2) == [(ord("a"), ord("b")), (ord("c"), ord("d"))]
    assert counts.total == (1 << 41) + 4


def test_asking_for_too_many_says_how_many_there_are():
    with pytest.raises(ValueError, match="holds only 3 merges, but 10 were asked for; lower .* by at least 7"):
        counts_of(["abcd"]).train(10)
    with pytest.raises(ValueError, match="holds only 0 merges"):
        counts_of([]).train(1)
    assert counts_of(["abcd"]).train(0) == []


@pytest.mark.parametrize("text", [" " * 1_000_000 + "a", "a" * 1_000_000, "ab" * 300_000, "\n" * 500_000])
def test_one_huge_word(text: str):
    started = time.perf_counter()
    merges = counts_of([text]).train(15)
    assert merges == reference.train([text[:70_000]], 15, PATTERN) or len(set(text)) > 1
    assert len(merges) == 15
    assert time.perf_counter() - started < 20


def test_long_words_equal_the_reference():
    """Words beyond what one byte of distance reaches."""
    rng = random.Random(5)
    texts = ["".join(rng.choices("abc", k=k)) for k in (253, 254, 255, 256, 257, 600)] + ["xyz " * 40]
    assert counts_of(texts).train(120) == reference.train(texts, 120, PATTERN)


def test_errors_come_through_and_leave_no_thread_waiting():
    before = threading.active_count()

    def broken():
        yield "fine " * 400_000
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        counts_of(broken(), threads=2)
    with pytest.raises(ValueError, match="not valid UTF-8"):
        counts_of((b"\xff" * 1_000_000 for _ in range(40)), threads=2)
    with pytest.raises(TypeError, match="must be a str, not int"):
        counts_of(["a", 3])
    with pytest.raises(ValueError, match="lone surrogate"):
        counts_of(["\ud800"])
    assert threading.active_count() == before


def test_progress_can_stop_the_run(corpus: list[str]):
    counts = counts_of(corpus, threads=2)
    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    counts_many = nanochat_rustbpe.WordCounts(PATTERN)
    counts_many.add_counts((word * 7, count) for word, count in counts.items())
    with pytest.raises(KeyboardInterrupt):
        counts_many.train(60_000, stop)
    assert len(seen) == 1 and 0 < seen[0] < 60_000


def test_odd_texts_train(texts: list[str]):
    assert counts_of(ODD_TEXTS).train(20) == reference.train(ODD_TEXTS, 20, PATTERN)
