"""The CUDA kernels, run thread by thread on the CPU (csrc/emulator.cuh): values, independence, exact draws."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nanochat_kernels import OPS, native_cuda
from nanochat_kernels.paged_attention import paged_attention_reference
from nanochat_kernels.sample import sample_reference
from nanochat_kernels.thin_linear import quantize
from tests.native.cuda_emulator import CSRC, FLAGS, ROOT, build, lent

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def emulator():
    with lent():
        yield


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_every_backend_agrees_whatever_order_threads_run_in(tmp_path, order):
    """A missing barrier shows in one of the orders."""
    path = tmp_path / "rows.jsonl"
    environment = os.environ | {
        native_cuda.EMULATOR: str(build()),
        "NANOCHAT_EMULATOR_ORDER": order,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    command = [sys.executable, "-m", "nanochat_kernels.verify", "--backends", "cuda", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(path)], env=environment, cwd=ROOT, capture_output=True, text=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert done.returncode == 0, [row for row in rows if row["verdict"] == "fail"] or done.stderr[-2000:]
    passed = {row["op"] for row in rows if row["verdict"] == "pass"}
    assert passed == {name for name, op in OPS.items() if "cuda" in op.backends}


def attention_inputs(lengths, new, block, h, g, d, dtype, seed=0):
    """Sequences lengths[s] long, the newest new[s] of them being queries; blocks in any order, NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block) for length in lengths]
    places = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    k, v = (torch.full((len(places), block, g, d), float("nan")) for _ in range(2))
    for s, length in enumerate(lengths):
        for j in range(needed[s]):
            table[s, j] = places.pop()
            used = min(block, length - j * block)
            k[table[s, j], :used], v[table[s, j], :used] = torch.randn(2, used, g, d, generator=generator)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(sum(new), h, d, generator=generator).to(dtype)
    return q, k.to(dtype), v.to(dtype), table, starts, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("window", [15, 16, 127, 128, 500, 2048])
def test_decode_at_every_kind_of_length(window):
    lengths = [1, 2, 15, 16, 17, 127, 128, 129, 255, 257, 511, 640, 2047, 2048]
    inputs = attention_inputs(lengths, [1] * len(lengths), 16, 2, 1, 32, torch.float32)
    expected = paged_attention_reference(*inputs, window)
    torch.testing.assert_close(native_cuda.paged_attention(*inputs, window), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("h", "g", "d"), [(3, 1, 64), (6, 1, 32), (2, 2, 128), (4, 4, 200), (12, 2, 8)])
def test_drafts_and_chunks_of_grouped_heads(h, g, d):
    """Several tokens a sequence: tiles that straddle sequences, groups of one, three, six and more heads."""
    inputs = attention_inputs([140, 9, 33, 1, 270], [5, 3, 1, 1, 4], 16, h, g, d, torch.float32)
    for window in (20, 300):
        expected = paged_attention_reference(*inputs, window)
        torch.testing.assert_close(native_cuda.paged_attention(*inputs, window), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("d", [32, 128, 256])
def test_fp8_cache(d):
    """The numbers that the cache holds, at the precision of bf16 queries; values at e4m3's edges among them."""
    q, k, v, *rest = attention_inputs([1, 200, 31], [1, 2, 1], 16, 4, 2, d, torch.bfloat16)
    v[v.isfinite() & (v > 1.5)] = 448.0
    k8, v8 = k.to(FP8), v.to(FP8)
    truth = paged_attention_reference(q.double(), k8.to(q.dtype).double(), v8.to(q.dtype).double(), *rest, 64)
    own = paged_attention_reference(q, k8.to(q.dtype), v8.to(q.dtype), *rest, 64)
    result = native_cuda.paged_attention(q, k8, v8, *rest, 64)
    assert (result - truth).abs().max() <= 2 * (own - truth).abs().max()


def test_attention_of_a_sequence_does_not_depend_on_the_batch():
    inputs = attention_inputs([300, 70, 411], [1, 1, 1], 16, 2, 2, 64, torch.bfloat16)
    q, k, v, table, starts, lengths = inputs
    together = native_cuda.paged_attention(*inputs, 200)
    for s, width in enumerate([27, 6, 27]):  # nor on the width of the table
        alone = (q[s : s + 1], k, v, table[s : s + 1, :width].contiguous(), starts[:2], lengths[s : s + 1])
        assert torch.equal(native_cuda.paged_attention(*alone, 200)[0], together[s])


def test_counters_are_left_as_zeros():
    inputs = attention_inputs([300, 1], [1, 1], 16, 2, 2, 32, torch.float32)
    arrivals = torch.zeros(16, dtype=torch.int32)
    first = native_cuda.paged_attention(*inputs, 400, arrivals)
    assert not arrivals.any()
    assert torch.equal(native_cuda.paged_attention(*inputs, 400, arrivals), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.int8])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 320, generator=generator).bfloat16()
    weight = torch.randn(72, 320, generator=generator)
    data, scale = (weight.bfloat16(), None) if dtype == torch.bfloat16 else quantize(weight, dtype)
    whole = native_cuda.thin_linear(x, data, scale)
    for rows in (1, 3, 8, 9):
        assert torch.equal(native_cuda.thin_linear(x[-rows:], data, scale), whole[-rows:])
    x[3] = float("nan")
    assert torch.equal(native_cuda.thin_linear(x, data, scale)[4:], whole[4:])


def test_every_8_bit_weight_is_read_exactly():
    """A row of the identity picks one weight: all 256 codes come through as what they stand for."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for dtype in (FP8, torch.int8):
        weight = codes.view(dtype)
        result = native_cuda.thin_linear(torch.eye(16).bfloat16(), weight, torch.full((16,), 0.5))
        expected = weight.float().T * 0.5
        known = ~expected.isnan()
        assert torch.equal(result.float()[known], expected[known])


def draw(function, logits: Tensor, **options) -> Tensor:
    b = logits.size(0)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    columns = {
        name: torch.full((b,), value, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in full.items()
    }
    seeds, positions = torch.arange(b) * 0x123456789AB + 5, torch.arange(b) * 7 + 2**33
    return function(logits, seeds, positions, **columns)


OPTIONS = [
    {"top_k": 1},
    {"top_k": 3, "temperature": 3.0},
    {"top_k": 50, "top_p": 0.7},
    {"top_k": 1000, "temperature": 0.3},
    {"top_p": 0.3},
    {"top_p": 0.97, "temperature": 2.0},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 0.9999, "top_k": 7},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "steep"])
def test_draws_are_those_of_the_reference(options, kind):
    """Also where equal logits straddle the limit (bf16 makes many), where all are equal, and where one has it all."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 1203 if kind == "plain" else 4096, generator=generator) * 2
    if kind == "ties":
        logits = logits.to(torch.float8_e5m2).float()
    elif kind == "equal":
        logits = torch.full_like(logits, 3.25)
    elif kind == "steep":
        logits = logits * 12 - 5
    assert torch.equal(draw(native_cuda.sample, logits, **options), draw(sample_reference, logits, **options))


def test_zeros_of_both_signs_are_equal():
    logits = torch.zeros(4, 64)
    logits[:, ::2] = -0.0
    assert torch.equal(draw(native_cuda.sample, logits, top_k=5), draw(sample_reference, logits, top_k=5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: native_cuda.thin_linear(torch.zeros(2, 24).bfloat16(), torch.zeros(8, 24).bfloat16()), "multiples"),
        (lambda: native_cuda.thin_linear(torch.zeros(17, 16).bfloat16(), torch.zeros(8, 16).bfloat16()), "16 rows"),
        (lambda: native_cuda.thin_linear(torch.zeros(2, 16).bfloat16(), torch.zeros(8, 32).bfloat16()), "C is 16"),
        (lambda: native_cuda.rms_norm(torch.zeros(2, 8200)), "8192"),
        (lambda: native_cuda.rms_norm(torch.zeros(2, 8), torch.zeros(3, 8)), "like x"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises((RuntimeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("name", ["thin_linear", "paged_qkv", "smeared_embedding", "paged_attention", "sample"])
def test_ops_are_well_formed(name):
    op = OPS[name]
    case = next(iter(op.cases()))
    args, kwargs = case.make(torch.device("cpu"), case.dtypes[-1], torch.Generator().manual_seed(0))
    namespace = torch.ops.nanochat_emulated
    if name == "sample":
        args, kwargs = (*args, *kwargs.values()), {}
    if name == "paged_qkv":
        args = (*args, 1.2)
    target = getattr(namespace, "draw_tokens" if name == "sample" else name).default
    torch.library.opcheck(target, args, kwargs, test_utils=("test_schema", "test_faketensor"))


# The emulator itself: it must see what it is there to see.

FAULTY = """
#include "device.cuh"
using namespace nanochat;
struct P { float* out; int fault; };
KERNEL(64) faulty(P p) {
  SHARED float shared[64];
  const int t = static_cast<int>(threadIdx.x);
  if (p.fault == 1 && t < 3) return;
  shared[t] = static_cast<float>(t + blockIdx.x);
  if (p.fault == 2) { if (t < 32) sync_block(); } else if (p.fault != 0) sync_block();
  float x = shared[63 - t];
  if (p.fault == 3 && t < 5) return;
  p.out[blockIdx.x * 64 + t] = sum_of_lanes<2>(x);
}
int main(int, char** v) {
  float out[128];
  launch(faulty, dim3(2), 64, 0, nullptr, P{out, v[1][0] - '0'});
  for (float x : out) std::printf("%g ", x);
}
"""


def test_the_emulator_sees_missing_barriers_and_lost_threads(tmp_path):
    compiler = shutil.which("g++")
    (tmp_path / "faulty.cpp").write_text(FAULTY)
    command = [compiler, *FLAGS, f"-I{CSRC}", str(tmp_path / "faulty.cpp"), "-o", str(tmp_path / "faulty")]
    subprocess.run(command, check=True)

    def run(fault, order="forward"):
        environment = os.environ | {"NANOCHAT_EMULATOR_ORDER": order}
        return subprocess.run([tmp_path / "faulty", str(fault)], capture_output=True, text=True, env=environment)

    right = [run(4, order).stdout for order in ("forward", "reversed")]
    assert right[0] == right[1] and right[0].split()[:2] == ["125", "125"]
    wrong = [run(0, order).stdout for order in ("forward", "reversed")]
    assert wrong[0] != right[0] or wrong[1] != right[0]  # no barrier
    assert "barrier" in run(2).stderr  # half of the block waits at one
    assert "ended before a warp-wide" in run(3).stderr


@pytest.mark.gpu
def test_a_captured_draw_follows_its_tensors_and_the_softmax():
    """One graph, replayed with other positions: a million draws of a row, χ² against its truncated softmax."""
    rows, vocabulary, replays = 4096, 64, 256
    logits = (torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(3)) * 1.5).cuda().expand(rows, -1)
    static = {
        "logits": logits.contiguous(),
        "seeds": torch.arange(rows, device="cuda"),
        "positions": torch.zeros(rows, dtype=torch.int64, device="cuda"),
        "temperature": torch.full((rows,), 0.9, device="cuda"),
        "top_k": torch.full((rows,), 20, dtype=torch.int64, device="cuda"),
        "top_p": torch.full((rows,), 0.95, device="cuda"),
        "min_p": torch.full((rows,), 0.01, device="cuda"),
    }
    native_cuda.sample(**static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = native_cuda.sample(**static)
    counts = torch.zeros(vocabulary, dtype=torch.int64, device="cuda")
    for position in range(replays):
        static["positions"].fill_(position)
        graph.replay()
        counts += torch.bincount(drawn, minlength=vocabulary)
    static["positions"].fill_(0)
    graph.replay()
    assert torch.equal(drawn, sample_reference(**static))
    ordered, order = (logits[0].double() / 0.9).sort(descending=True)
    ordered[20:] = -torch.inf
    share = ordered.softmax(0)
    kept = (share.cumsum(0) - share < 0.95) & (share >= 0.01 * share[0])
    expected = torch.zeros_like(share).index_copy(0, order, torch.where(kept, share, 0.0) / share[kept].sum())
    assert not counts[expected == 0].any()
    expected, counts = expected[expected > 0] * rows * replays, counts[expected > 0].double()
    statistic, freedom = float(((counts - expected).square() / expected).sum()), expected.numel() - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.gpu
def test_every_backend_on_this_gpu():
    from nanochat_kernels import verify

    rows = verify.run(backends=["cuda"], device="cuda")
    assert rows and all(row.ok for row in rows), [row.summary() for row in rows if not row.ok]
