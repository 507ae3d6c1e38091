"""Verdicts on instruction counts, and, where valgrind is installed, that a count repeats."""

import shutil

import pytest

from benchmarks import callgrind, callgrind_works


def test_verdicts():
    assert callgrind.judge(100.0, None, 0.02) == "new"
    assert callgrind.judge(101.9, 100.0, 0.02) == "ok" and callgrind.judge(98.1, 100.0, 0.02) == "ok"
    assert callgrind.judge(102.1, 100.0, 0.02) == "RED"
    assert callgrind.judge(97.9, 100.0, 0.02) == "fewer"


def test_inputs_are_the_same_everywhere():
    import hashlib

    text = "".join(callgrind_works.texts())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "345c01ca5139254e"


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
def test_a_count_repeats(tmp_path):
    markers = callgrind.compile_markers(tmp_path)
    first, second = (callgrind.count(["pack"], tmp_path, markers)["pack"] for _ in range(2))
    assert first > 100 and second == pytest.approx(first, rel=0.005)
