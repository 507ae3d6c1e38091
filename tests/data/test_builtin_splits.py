"""Held out means held out: in every text of every training stage, over thousands of items."""

import re
from itertools import islice
from typing import Any

import pytest

from nanochat.data.builtin import MIXTURE, conversations, documents, held_out_in, pair_split, word_problems, words
from nanochat.data.builtin.splits import SPLITS


def texts(item: dict[str, Any]) -> list[str]:
    """Every piece of text of a conversation."""
    pieces: list[str] = []
    for message in item["messages"]:
        content = message["content"]
        pieces += [content] if isinstance(content, str) else [part["text"] for part in content]
    return pieces


def test_pairs_are_split_whole_and_in_the_stated_shares() -> None:
    shares = dict.fromkeys(SPLITS, 0)
    for a in range(0, 1000, 7):
        for b in range(a, 1000, 11):
            assert pair_split(a, b) == pair_split(b, a)
            shares[pair_split(a, b)] += 1
    total = sum(shares.values())
    assert 0.73 < shares["train"] / total < 0.77 and 0.13 < shares["test"] / total < 0.17


def test_words_are_split_whole_and_plain() -> None:
    train, val, test = (set(words(split)) for split in SPLITS)
    assert not train & val and not train & test and not val & test
    assert len(train) > 3000 and len(val) > 300 and len(test) >= 500
    assert all(re.fullmatch("[a-z]{4,10}", word) for word in train | val | test)


def test_the_check_finds_what_is_held_out() -> None:
    word = words("test")[0]
    a, b = next((a, b) for a in range(100) for b in range(100) if pair_split(a, b) == "test")
    assert held_out_in(f"The {word.title()}!") == [word]
    assert held_out_in(f"{a} + {b}") and held_out_in(f"{b}*{a}=") and held_out_in(f"({a} x {b})")
    assert not held_out_in(f"{a}, {b}")


def test_the_corpus_is_free_of_held_out_text() -> None:
    for split in ("train", "val"):
        for text in islice(documents(split), 4000):
            assert not held_out_in(text), text


@pytest.mark.parametrize("kind", [*MIXTURE, None])
def test_fine_tuning_is_free_of_held_out_text(kind: str | None) -> None:
    for seed in (0, 1):
        for item in islice(conversations("train", kind, seed), 2500):
            for text in texts(item):
                assert not held_out_in(text), text


def test_reinforcement_learning_is_free_of_held_out_text() -> None:
    for item in word_problems("train"):
        for text in texts(item):
            assert not held_out_in(text), text


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_asked_of_the_model_is_held_out(split: str) -> None:
    """Checked on the numbers and words of the question itself, whatever its phrasing."""
    for item in islice(conversations(split, "arithmetic"), 1000):  # type: ignore[arg-type]
        question, call = texts(item)[:2]
        a, b = map(int, re.findall(r"\d+", call))
        assert sorted(map(int, re.findall(r"\d+", question))) == sorted([a, b])
        assert pair_split(a, b) == split
    for kind in ("letter_count", "spelling"):
        for item in islice(conversations(split, kind), 1000):  # type: ignore[arg-type]
            asked = set(re.findall("[a-z]+", texts(item)[0])) & set(words(split))
            assert asked, texts(item)[0]
    for item in word_problems(split):  # type: ignore[arg-type]
        first = next(part["text"] for part in item["messages"][1]["content"] if part["type"] == "python")
        assert pair_split(*map(int, re.findall(r"\d+", first))) == split


def test_training_questions_name_no_held_out_pair_in_words_either() -> None:
    for item in islice(conversations("train", "arithmetic"), 3000):
        a, b = map(int, re.findall(r"\d+", texts(item)[0]))
        assert pair_split(a, b) == "train"
    for text in islice(documents("train"), 3000):
        for a, b in re.findall(r"(\d+)(?: [a-z]+)* (\d+)(?:: | is | together)", text):
            assert pair_split(int(a), int(b)) == "train", text


def test_test_questions_are_enough_and_vary() -> None:
    for kind in ("arithmetic", "letter_count"):
        questions = {texts(item)[0] for item in islice(conversations("test", kind), 500)}
        assert len(questions) > 480
    assert len({item["question"] for item in islice(word_problems("test"), 500)}) > 480
