"""Packed weights: what they lose, and products with them against float64, at every SIMD level."""

import threading

import pytest
import torch

from nanochat_kernels import native
from nanochat_kernels.packed_weights import FORMATS, GROUP, INTEGER, PER_WORD, pack, round_inputs, unpack
from tests.native.levels import LEVELS, each_level

# (outputs, inputs): below one panel, odd, whole panels, several spans of decoding
SHAPES = ((1, 1), (5, 3), (33, 65), (64, 64), (96, 130), (70, 257), (160, 768))
TOLERANCE = 2e-6  # relative to Σ|x·w|: float32 sums in order


def product(x, packed, epilogue="none"):
    return torch.ops.nanochat.packed_linear(x, packed.words, packed.scales, packed.format, packed.outputs, epilogue)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_unpacking_gives_back_what_the_format_can_hold(format, shape):
    weight = normal(*shape)
    kept = unpack(pack(weight, format))
    assert kept.shape == weight.shape
    if format == "fp32":
        assert torch.equal(kept, weight)
    elif format == "bf16":
        assert torch.equal(kept, weight.bfloat16().float())
    elif format == "int8":
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((kept - weight).abs() <= step * 0.5001).all()
    else:
        for g in range(0, shape[1], GROUP):
            part = torch.nn.functional.pad(weight[:, g : g + GROUP], (0, max(0, g + GROUP - shape[1])))
            steps = (part.amax(1) - part.amin(1)) / 15
            error = (kept - weight)[:, g : g + GROUP].square().sum(1)
            assert (error <= GROUP * (steps / 2) ** 2 * 1.02 + 1e-9).all()  # never worse than rounding to a plain grid


def test_int4_is_better_than_a_plain_grid_on_average():
    weight = normal(64, 512)
    groups = weight.view(64, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low - groups).square().mean()
    assert (unpack(pack(weight, "int4")) - weight).square().mean() < 0.93 * plain


@pytest.mark.parametrize("format", FORMATS)
def test_constant_and_empty_groups_survive(format):
    for value in (0.0, 1.0, -3.5):
        weight = torch.full((3, 70), value)
        assert torch.allclose(unpack(pack(weight, format)), weight, rtol=1e-2, atol=1e-6)


@each_level
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_products_agree_with_float64(level, format, shape, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    packed = pack(normal(*shape), format)
    x = normal(11, shape[1], seed=1)
    dense = unpack(packed).double()
    taken = round_inputs(x, format).double()
    expected, size = taken @ dense.T, taken.abs() @ dense.abs().T
    for rows in (1, 2, 3, 4, 6, 7, 11):
        got = product(x[:rows], packed)
        assert got.shape == (rows, shape[0]) and got.dtype == torch.float32
        assert ((got - expected[:rows]).abs() <= TOLERANCE * size[:rows] + 1e-30).all()


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_are_rounded_by_half_a_step_of_their_group(format):
    x = normal(5, 300) * torch.tensor([1.0, 1e-3, 1e4, 0.0, 1e-38])[:, None]
    error = (round_inputs(x, format) - x).abs()
    if format not in INTEGER:
        assert not error.any()
        return
    for part, kept in zip(x.split(GROUP, 1), error.split(GROUP, 1), strict=True):
        step = part.abs().amax(1, keepdim=True) / 127
        assert (kept <= 0.51 * step + 1e-37).all()


@each_level
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_the_batch(level, format, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    packed, x = pack(normal(96, 448), format), normal(13, 448, seed=1)
    for epilogue in ("none", "relu2", "softcap"):
        whole = product(x, packed, epilogue)
        for begin in range(13):
            for end in (begin + 1, begin + 2, begin + 3, begin + 4, begin + 7):
                assert torch.equal(product(x[begin:end], packed, epilogue), whole[begin:end])


@each_level
def test_epilogues(level, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    x = torch.cat([torch.linspace(-200, 200, 8001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([0.0, 1e-30, 3e4])])
    packed = pack(torch.ones(1, 1), "fp32")
    got = product(x[:, None], packed, "softcap")[:, 0]
    exact = 15 * torch.tanh(x.double() / 15)
    assert ((got - exact).abs() <= 3e-7 * exact.abs() + 1e-36).all()
    assert torch.equal(product(x[:, None], packed, "relu2")[:, 0], x.clamp_min(0).square())


@each_level
@pytest.mark.parametrize("format", FORMATS)
def test_strided_and_misaligned_inputs(level, format, monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", level)
    packed, x = pack(normal(64, 128), format), normal(5, 128, seed=1)
    expected = product(x, packed)
    wide = torch.full((5, 301), float("nan"))
    wide[:, 3:131] = x
    assert torch.equal(product(wide[:, 3:131], packed), expected)  # rows apart, four bytes off any vector's boundary
    assert torch.equal(product(x.T.contiguous().T, packed), expected)
    shifted = torch.empty(packed.words.numel() + 1, dtype=torch.int32)[1:].view(packed.words.shape)
    moved = torch.ops.nanochat.packed_linear(x, shifted.copy_(packed.words), packed.scales, format, 64)
    assert torch.equal(moved, expected)


@each_level
def test_levels_agree_within_rounding(level, monkeypatch):
    packed, x = pack(normal(64, 512), "int8"), normal(4, 512, seed=1)
    results = []
    for each in (level, "portable"):
        monkeypatch.setenv("NANOCHAT_SIMD", each)
        results.append(product(x, packed))
    assert (results[0] - results[1]).abs().max() <= 1e-4  # the same integers, added up in another width


@pytest.mark.skipif(not LEVELS, reason="the C++ extension is not built")
def test_wrong_calls_are_refused():
    packed, x = pack(normal(64, 128), "int8"), normal(2, 128)
    with pytest.raises(RuntimeError, match="inputs"):
        product(x[:, :1], packed)
    with pytest.raises(RuntimeError, match="int32"):
        torch.ops.nanochat.packed_linear(x, packed.words.float(), packed.scales, "int8", 64)
    with pytest.raises(RuntimeError, match="scales"):
        torch.ops.nanochat.packed_linear(x, packed.words, packed.scales[:3], "int8", 64)
    with pytest.raises(ValueError, match="int9"):
        torch.ops.nanochat.packed_linear(x, packed.words, packed.scales, "int9", 64)
    with pytest.raises(ValueError, match="int9"):
        pack(x, "int9")


@pytest.mark.skipif(not LEVELS, reason="the C++ extension is not built")
def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("NANOCHAT_SIMD", "sse9")
    with pytest.raises(RuntimeError, match="sse9.*portable"):
        product(normal(1, 64), pack(normal(32, 64), "fp32"))
    with pytest.raises(RuntimeError, match="sse9"):
        native.bindings().simd_level()


@pytest.mark.skipif(not LEVELS, reason="the C++ extension is not built")
def test_several_threads_at_once():
    packed, x = [pack(normal(96, 256, seed=s), "int4") for s in range(4)], normal(7, 256, seed=9)
    expected, failures = [product(x, p) for p in packed], []

    def work(i):
        for _ in range(50):
            if not torch.equal(product(x, packed[i]), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


@pytest.mark.skipif(not LEVELS, reason="the C++ extension is not built")
def test_the_op_is_registered_as_torch_wants_it():
    packed, x = pack(normal(64, 128), "bf16"), normal(3, 128)
    args = (x, packed.words, packed.scales, "bf16", 64)
    torch.library.opcheck(torch.ops.nanochat.packed_linear.default, args, test_utils=("test_schema", "test_faketensor"))


def test_every_format_has_its_number_of_weights_in_a_word():
    assert {format: 32 // per for format, per in PER_WORD.items()} == {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
