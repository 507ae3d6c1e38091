"""The page from rows: every plot and table is there, busy rows are marked, and the README takes quiet ones only."""

import re

import pytest

from benchmarks import harness, report
from nanochat.errors import UsageError

CEILINGS = {"bandwidth": 2e10, "launch": 1e-6, "gemm float32": 9e10}


def row(**fields):
    base = {
        "device": "cpu-test",
        "device_name": "A CPU",
        "threads": 2,
        "quiet": True,
        "dirty": False,
        "dtype": "float32",
    }
    return base | {"commit": "abc1234567", "date": "2026-01-01T00:00:00", "ceilings": CEILINGS} | fields


def kernel(backend, seconds, **fields):
    time = harness.Timing([seconds]).record()
    return row(op="rms_norm", case="d12", mode="prefill", bytes=1e8, flops=1e8, roofline_share=0.5, **fields) | time | (
        {"peer": "Liger"} if backend == "Liger" else {"backend": backend}
    )  # fmt: skip


def step(commit, seconds, **fields):
    shares = {f"{phase}_share": 0.2 for phase in report.PHASES}
    rates = {"tokens_per_s": 4096 / seconds, "gemm_share": 0.4, "first_step_s": 5.0}
    names = {"work": "train_step", "case": "d4", "backend": "auto", "ranks": 1, "commit": commit}
    return row(**(names | shares | rates | fields)) | harness.Timing([seconds]).record()


def decode(context, seconds):
    fields = {"work": "decode", "case": f"d12 b1 p{context}", "backend": "native"}
    return row(**fields) | harness.Timing([seconds]).record()


@pytest.fixture
def results(tmp_path):
    rows = [
        kernel("torch", 2e-2),
        kernel("triton", 1e-2),
        kernel("Liger", 1.5e-2),
        kernel("triton", 8e-3, date="2026-02-01"),
    ]
    rows += [step("abc1234567", 3.2), step("def1234567", 2.9, date="2026-02-01", quiet=False)]
    rows += [decode(256, 1e-2), decode(1024, 2e-2)]
    rows += [row(work="prediction", case="d4", measured_s=3.2, error=0.05) | harness.Timing([3.36]).record()]
    rows += [row(work="tokenize", case="books", backend="nanochat", mb_per_s=104.0) | harness.Timing([1e-8]).record()]
    for each in rows:
        harness.append(tmp_path / "cpu-test" / "rows.jsonl", each)
    return tmp_path


def test_the_page(results, tmp_path):
    out = tmp_path / "page"
    assert report.main(["--results", str(results), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    for expected in ("2.50×", "1.33×", "rms_norm · d12", "+5.0%", "Tokenize", "3.2 s", "†"):
        assert expected in text, expected
    drawn = {path.stem.removeprefix("cpu-test_") for path in (out / "plots").glob("*.svg")}
    assert drawn == {"roofline", "speedups", "training", "breakdown", "decode"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 5 and not re.search(r'(src|href)="https?:', page)


def test_the_newest_row_counts(results):
    rows = harness.read(results / "cpu-test" / "rows.jsonl")
    assert [r["median"] for r in report.newest(rows) if r.get("backend") == "triton"] == [8e-3]


def test_the_readme_takes_quiet_rows_of_clean_commits(results):
    text = (
        "before\n<!-- bench:train -->\nold\n<!-- /bench:train -->\nafter <!-- bench:kernels --><!-- /bench:kernels -->"
    )
    rows = harness.read(results / "cpu-test" / "rows.jsonl")
    filled = report.fill_readme(text, rows)
    assert "old" not in filled and "abc1234567" in filled and "def1234567" not in filled and "after" in filled
    assert report.fill_readme(filled, rows) == filled
    assert report.fill_readme(text, [r | {"quiet": False} for r in rows]) == text


def test_no_rows(tmp_path):
    with pytest.raises(UsageError, match="no rows"):
        report.main(["--results", str(tmp_path)])
