"""Draws: right frequencies, right survivors, the same in any batch, and the generator's published answers."""

import pytest
import torch

from nanochat_kernels import OPS
from nanochat_kernels.registry import Place
from nanochat_kernels.sample import gumbel, gumbel_of_all, philox


def on_this_cpu(op):
    place = Place(torch.device("cpu"), torch.float32, "train-eager")
    return [name for name in op.backends if name not in op.available or op.available[name](place) is None]


@pytest.fixture(params=on_this_cpu(OPS["sample"]))
def sample(request):
    return OPS["sample"].load(request.param)


def draw(sample, logits, seeds=None, positions=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    b = logits.size(0)
    return sample(
        logits,
        torch.arange(b) if seeds is None else seeds,
        torch.zeros(b, dtype=torch.int64) if positions is None else positions,
        temperature=torch.full((b,), float(temperature)),
        top_k=torch.full((b,), int(top_k)),
        top_p=torch.full((b,), float(top_p)),
        min_p=torch.full((b,), float(min_p)),
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The known-answer vectors of the Random123 distribution, philox4x32, 10 rounds."""
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected


def test_gumbel_moments():
    noise = gumbel_of_all(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - torch.pi**2 / 6) < 0.02


def test_gumbel_differs_by_seed_position_and_token():
    a = gumbel_of_all(torch.tensor([1, 1, 2, 1 + (1 << 40)]), torch.tensor([0, 1 << 33, 0, 0]), 1001)
    assert len({tuple(row.tolist()) for row in a}) == 4
    assert len(a[0].unique()) > 990


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_frequencies(sample, options):
    """131,072 draws against the exact distribution: every frequency within five standard deviations."""
    n = 1 << 17
    logits = torch.tensor([1.5, 0.9, 0.1, -0.4, 1.1, -2.0, 0.0])
    p = (logits / options.get("temperature", 1.0)).softmax(0)
    order = p.argsort(descending=True)
    keep = torch.ones(7, dtype=torch.bool)
    if "top_k" in options:
        keep[order[options["top_k"] :]] = False
    if "top_p" in options:
        before = p[order].cumsum(0) - p[order]
        keep[order[before >= options["top_p"]]] = False
    if "min_p" in options:
        keep &= p >= options["min_p"] * p.max()
    p = torch.where(keep, p, 0) / p[keep].sum()
    tokens = draw(sample, logits.expand(n, -1), seeds=torch.arange(n) // 4, positions=torch.arange(n) % 4, **options)
    frequency = torch.bincount(tokens, minlength=7) / n
    assert (frequency[~keep] == 0).all()
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def test_a_row_depends_on_nothing_else_in_the_batch(sample):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 100, generator=g)
    seeds, positions = torch.randint(0, 2**62, (2, 16), generator=g)
    together = draw(sample, logits, seeds, positions, temperature=1.2, top_k=20, top_p=0.9)
    for i in (0, 7, 15):
        one = slice(i, i + 1)
        alone = draw(sample, logits[one], seeds[one], positions[one], temperature=1.2, top_k=20, top_p=0.9)
        assert alone == together[i]
    order = torch.randperm(16, generator=g)
    shuffled = draw(sample, logits[order], seeds[order], positions[order], temperature=1.2, top_k=20, top_p=0.9)
    assert torch.equal(shuffled, together[order])


def test_deterministic_and_moved_on_by_the_position(sample):
    logits = torch.zeros(64, 50)
    assert torch.equal(draw(sample, logits), draw(sample, logits))
    assert not torch.equal(draw(sample, logits), draw(sample, logits, positions=torch.ones(64, dtype=torch.int64)))


def test_greedy_is_argmax_whatever_else_is_asked(sample):
    logits = torch.randn(32, 200)
    assert torch.equal(draw(sample, logits, temperature=0, top_k=5, top_p=0.1, min_p=0.9), logits.argmax(-1))


def test_mixed_rows(sample):
    logits = torch.randn(3, 64)
    f = torch.tensor
    tokens = sample(
        logits, f([1, 2, 3]), f([0, 0, 0]), temperature=f([0.0, 1.0, 5.0]), top_k=f([0, 1, 0]),
        top_p=f([1.0, 1.0, 1e-6]), min_p=f([0.0, 0.0, 0.0]),
    )  # fmt: skip
    assert torch.equal(tokens, logits.argmax(-1))


def test_exactly_k_survive_a_tie(sample):
    tokens = draw(sample, torch.zeros(4096, 10), top_k=3)
    assert set(tokens.tolist()) == {0, 1, 2}


def test_masked_tokens_are_never_drawn(sample):
    logits = torch.zeros(2048, 10)
    logits[:, 4:] = -torch.inf
    assert draw(sample, logits, temperature=2.0).max() == 3


def test_top_k_beyond_the_vocabulary(sample):
    assert draw(sample, torch.zeros(64, 5), top_k=100).unique().numel() == 5


def test_noise_of_some_tokens_is_the_noise_of_all():
    seeds, positions = torch.tensor([3, 1 << 50]), torch.tensor([7, 1 << 35])
    tokens = torch.tensor([[0, 5, 1000], [999, 2, 2]])
    some = gumbel(seeds, positions, tokens)
    assert torch.equal(some, gumbel_of_all(seeds, positions, 1001).gather(1, tokens))


@pytest.mark.parametrize("ties", [False, True])
def test_backends_draw_the_same_tokens(sample, ties):
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 500, generator=g) * 3
    if ties:
        logits = logits.round()
    for options in (
        {},
        {"top_k": 40},
        {"top_k": 40, "top_p": 0.8},
        {"top_p": 0.8},
        {"min_p": 0.05, "temperature": 0.5},
    ):
        expected = draw(OPS["sample"].reference, logits, **options)
        assert torch.equal(draw(sample, logits, **options), expected)
