"""Schedules and scaling against numbers worked out apart from the code (exact fractions, or a pocket calculator)."""

import math
from fractions import Fraction

import pytest

from nanochat.errors import UsageError
from nanochat.training import schedules as s


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, Fraction(1, 40)),
        (38, Fraction(39, 40)),
        (39, 1),
        (40, 1),
        (350, 1),  # 1000 − round(650) is still the plateau
        (351, Fraction(649, 650) + Fraction(5, 100) * Fraction(1, 650)),
        (675, Fraction(1, 2) + Fraction(5, 200)),
        (999, Fraction(1, 650) + Fraction(5, 100) * Fraction(649, 650)),
        (1000, Fraction(5, 100)),
    ],
)
def test_learning_rate(step, expected):
    assert s.lr_multiplier(step, 1000) == pytest.approx(float(expected), rel=1e-15)


def test_learning_rate_rises_even_when_the_run_is_shorter_than_the_rise():
    assert [s.lr_multiplier(i, 2) for i in range(2)] == [1 / 40, 2 / 40]
    assert s.lr_multiplier(39, 41) == 1.0  # the rise wins over the fall that has begun by then


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [(0, 1000, 0.85), (200, 1000, 0.91), (399, 1000, 0.8497 + 0.12), (400, 2000, 0.97), (699, 2000, 0.97)]
    + [(700, 2000, 0.97), (1350, 2000, 0.935), (2000, 2000, 0.90), (399, 400, 0.9697), (400, 1000, 0.97 - 0.07 / 13)],
)
def test_momentum(step, steps, expected):
    assert s.muon_momentum(step, steps) == pytest.approx(expected, rel=1e-14)


def test_decay_is_half_a_cosine():
    values = [s.muon_decay_multiplier(i, 12) for i in (0, 3, 4, 6, 8, 12)]
    assert values == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.75, 0.5, 0.25, 0.0], abs=1e-15)


def test_rates_of_a_step_gather_the_three():
    assert s.rates_at(6, 12) == s.StepRates(7 / 40, s.muon_momentum(6, 12), s.muon_decay_multiplier(6, 12))


# Depth 12: C 768, blocks 12·12·768² + gates 6·12·6, head 32,768·768. Depth 4 and 24 likewise (head size 128).
D12 = 12 * 12 * 768**2 + 6 * 12 * 6 + 32768 * 768
D4 = 4 * 12 * 256**2 + 2 * 12 * 2 + 32768 * 256
D24 = 24 * 12 * 1536**2 + 12 * 12 * 12 + 32768 * 1536


def test_depth_12_is_the_reference():
    h = s.plan_horizon(D12, D12, 12)
    assert h == s.Horizon(tokens=1_321_210_944, batch_tokens=2**19, steps=2520, lr_scale=1.0, muon_decay=0.28)


def test_depth_4():
    # tokens 138,412,608; the batch rule gives 2^19 · 0.10476^0.383 = 2^17.75 → 2^18, half the reference's batch
    h = s.plan_horizon(D4, D12, 12)
    assert (h.tokens, h.batch_tokens, h.steps) == (12 * D4, 2**18, 12 * D4 // 2**18) == (138_412_608, 2**18, 528)
    assert h.lr_scale == pytest.approx(0.5**0.5, rel=1e-15)
    assert h.muon_decay == pytest.approx(0.28 * 0.5**0.5 * 1_321_210_944 / 138_412_608, rel=1e-15)


def test_depth_24_at_the_speedruns_ratio():
    h = s.plan_horizon(D24, D12, 8)
    assert h.batch_tokens == 2**20 and h.steps == 8 * D24 // 2**20 == 5568
    assert h.muon_decay == pytest.approx(0.28 * 2**0.5 * D12 / D24, rel=1e-14)


def test_given_steps_and_batch_leave_the_decay_to_the_ratio():
    h = s.plan_horizon(D4, D12, 12, batch_tokens=4096, steps=7)
    assert (h.batch_tokens, h.steps) == (4096, 7)
    assert h.lr_scale == pytest.approx(2**-3.5, rel=1e-15)
    assert h.muon_decay == pytest.approx(0.28 * 2**-3.5 * D12 / D4, rel=1e-14)


def test_a_chosen_batch_is_whole_rows_on_every_rank():
    h = s.plan_horizon(D4, D12, 12, multiple_of=3 * 500)
    assert h.batch_tokens == 175 * 1500  # the nearest to 2^18
    assert s.plan_horizon(D4, D12, 12, multiple_of=2**20).batch_tokens == 2**20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0}, "--ratio 0"),
        ({"ratio": 12, "steps": 0}, "--steps 0"),
        ({"ratio": 12, "batch_tokens": 2**40}, "lower --batch-tokens"),
    ],
)
def test_impossible_horizons_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        s.plan_horizon(D4, D12, **settings)
