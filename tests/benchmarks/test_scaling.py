"""The fit finds the law that made the rows, says how far off it is, and knows what few rows cannot show."""

import json
import random

import pytest

from benchmarks import scaling
from nanochat.errors import NanochatError, UsageError

TRUTH = scaling.Law(e=0.6, a=120.0, b=400.0, alpha=0.35, beta=0.37)


def series(noise=0.0, seed=0, ratios=(4, 8, 12, 20)):
    draw, points = random.Random(seed), []
    for n in (2e7, 6e7, 1.3e8, 3e8, 7e8):
        for ratio in ratios:
            d = ratio * n
            loss = TRUTH.loss(n, d) * (1 + draw.gauss(0, noise))
            points.append(scaling.Point(f"n{n:.0e}-r{ratio}", n, d, 6 * n * d, loss, seconds=6 * n * d / 1e14))
    return points


def test_exact_rows_give_the_law_back():
    law = scaling.fit(series())
    assert law.alpha == pytest.approx(TRUTH.alpha, rel=0.02) and law.beta == pytest.approx(TRUTH.beta, rel=0.02)
    assert law.e == pytest.approx(TRUTH.e, rel=0.02)
    assert law.loss(2e9, 4e10) == pytest.approx(TRUTH.loss(2e9, 4e10), rel=1e-3)
    assert law.optimal_exponent == pytest.approx(0.37 / 0.72, abs=0.02)


def test_noise_and_an_outlier_do_not_carry_it_away():
    points = series(noise=0.002)
    points[7] = scaling.Point("outlier", points[7].n, points[7].d, points[7].flops, points[7].loss * 1.3)
    law = scaling.fit(points)
    assert law.loss(2e9, 4e10) == pytest.approx(TRUTH.loss(2e9, 4e10), rel=0.02)


def test_the_stated_error_covers_the_truth():
    points = series(noise=0.002)
    last, predicted = scaling.held_out(points)
    assert predicted == pytest.approx(last.loss, rel=0.02) and last.name == "n7e+08-r20"
    low, high = scaling.interval(points, 2e9, 4e10)
    assert low < high and low * 0.995 < TRUTH.loss(2e9, 4e10) < high * 1.005


def test_compute_alone():
    points = [scaling.Point(str(c), 1.0, 1.0, c, 0.7 + 50 * c**-0.1) for c in (1e15, 1e16, 1e17, 1e18, 1e19)]
    assert scaling.fit_compute(points).loss(1e20) == pytest.approx(0.7 + 50 * 1e20**-0.1, rel=1e-3)


def test_few_rows_are_called_few():
    said = " ".join(scaling.warnings(series(ratios=(12,))[:4]))
    assert "proves nothing" in said and "cannot be told apart" in said
    assert not scaling.warnings(series())


def test_the_command(tmp_path, capsys):
    path = tmp_path / "series.json"
    rows = [
        {"tag": f"series-d{d}-r{r}", "depth": d, "tokens": r * 1e6 * d**2, "flops": 1e12 * d**4 * r, "minutes": d,
         "val_bpb": 1 + 3 / d + 0.5 / r}
        for d in (2, 4, 6) for r in (4, 8)
    ]  # fmt: skip
    path.write_text(json.dumps([*rows, rows[0] | {"val_bpb": None}]))
    assert scaling.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "d8 at 12 tokens per parameter" in text and "left out of the fit" in text and "at the speed of" in text
    path.write_text(json.dumps(rows[:2]))
    with pytest.raises(NanochatError, match="too few"):
        scaling.main([str(path)])
    with pytest.raises(UsageError, match="miniseries.sh"):
        scaling.main([str(tmp_path / "nothing.json")])
