"""Draw the next token of each row: temperature, top-k, top-p, min-p, then Gumbel-max with a counter-based generator.

    token = argmax_v (z_v/τ + G_v)  over the tokens that survive,    G_v = −log(−log u_v)

is a draw from softmax(z/τ) without a sum or a search. u comes from Philox-4x32-10 (Salmon et al., SC 2011, "Parallel
random numbers: as easy as 1, 2, 3") keyed by the row's seed and counted by (token, position): a row's draw depends on
nothing else in the batch, and integers make it the same on every device. The int64 arithmetic below wraps and is
masked to 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_kernels.native_cuda import needs_cuda_ops
from nanochat_kernels.numerics import normal
from nanochat_kernels.registry import Case, Cost, Op, Place
from nanochat_kernels.triton_support import needs_triton

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit words, held in int64, from a 128-bit counter and a 64-bit key of such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2  # the low 64 bits of the product, as a signed number
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """(B, K) float32 Gumbel noise for token ids (B, K) or (K,).

    Token v has word v mod 4 of counter (v div 4, 0, position).
    """
    seeds, positions = seeds[:, None], positions[:, None]
    index = tokens.expand(seeds.size(0), -1)
    zero = torch.zeros_like(index)
    counter = (index >> 2, zero, positions & MASK, (positions >> 32) & MASK)
    words = philox(counter, (seeds & MASK, (seeds >> 32) & MASK))
    bits = torch.stack(words, dim=-1).gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)
    return _noise(bits)


def gumbel_of_all(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The noise of every token, (B, vocab_size), at a quarter of the work: all four words of each counter are used."""
    seeds, positions = seeds[:, None], positions[:, None]
    index = torch.arange(-(-vocab_size // 4), device=seeds.device)[None, :]
    zero = torch.zeros_like(index)
    counter = (index, zero, positions & MASK, (positions >> 32) & MASK)
    words = philox(counter, (seeds & MASK, (seeds >> 32) & MASK))
    return _noise(torch.stack(words, dim=-1).flatten(1)[:, :vocab_size])


def _noise(bits: Tensor) -> Tensor:
    # u = 1 − w with w in (0, 1): log1p keeps full precision for the small w that make the large, winning values.
    w = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-w))


def sample_reference(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """(B,) int64 tokens from logits (B, V) float32, seeds and positions (B,) int64.

    temperature (B,) float32, 0 is greedy; top_k (B,) int64, 0 is off; top_p (B,) float32, 1 is off; min_p (B,)
    float32, 0 is off. Applied in this order, each on what the one before left. The most probable token always
    survives.
    """
    ordered, order = _scaled(logits, temperature).sort(dim=-1, descending=True, stable=True)
    noise = gumbel_of_all(seeds, positions, logits.size(1)).gather(1, order)
    drawn = order.gather(1, _pick(ordered, noise, top_k, top_p, min_p)).squeeze(1)
    return torch.where(temperature <= 0, logits.argmax(dim=-1), drawn)


def sample_selective(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """The reference without the sort, and noise only for tokens that can win, where the batch as a whole allows it.

    Looks at the parameters on the host: a synchronization anywhere but on a CPU.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if not (temperature.numpy() > 0).any():
        return _argmax(logits)
    scaled = _scaled(logits, temperature)
    if bool(((top_k <= 0) & (top_p >= 1) & (min_p <= 0) | (temperature <= 0)).all()):
        drawn = (scaled + gumbel_of_all(seeds, positions, logits.size(1))).argmax(dim=-1)
        return torch.where(temperature <= 0, logits.argmax(dim=-1), drawn)
    widest = int(top_k.max())
    if not (0 < widest < logits.size(1) // 4 and bool(((top_k > 0) | (temperature <= 0)).all())):
        return sample_reference(logits, seeds, positions, **options)
    # Candidates beyond the k-th, so that whatever equals it is among them: equal logits go by token id, as in the sort.
    candidates = scaled.topk(min(2 * widest + 64, logits.size(1)), dim=-1)
    if bool((candidates.values[:, widest - 1] == candidates.values[:, -1]).any()):
        return sample_reference(logits, seeds, positions, **options)
    order = candidates.indices.sort(dim=-1).values
    ordered, rank = scaled.gather(1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(1, rank)
    drawn = order.gather(1, _pick(ordered, gumbel(seeds, positions, order), top_k, top_p, min_p)).squeeze(1)
    return torch.where(temperature <= 0, order[:, 0], drawn)


def _argmax(logits: Tensor) -> Tensor:
    """numpy's, which looks at eight logits at a time: a tenth of torch's time on a CPU, and as much as a layer's."""
    return torch.from_numpy(logits.detach().float().numpy().argmax(axis=-1))


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits.float() / torch.where(temperature <= 0, 1.0, temperature)[:, None]


def _pick(ordered: Tensor, noise: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """(B, 1) the rank drawn, from logits in descending order and the noise of the same tokens."""
    rank = torch.arange(ordered.size(1), device=ordered.device)
    limit = torch.where(top_k > 0, top_k, ordered.size(1))[:, None]
    ordered = ordered.masked_fill(rank >= limit, -torch.inf)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep &= probability >= min_p[:, None] * probability[:, :1]
    keep |= rank == 0
    return (ordered + noise).masked_fill(~keep, -torch.inf).argmax(dim=-1, keepdim=True)


def _on_a_cpu(place: Place) -> str | None:
    return None if place.device.type == "cpu" else "looks at the parameters on the host: for CPUs"


def _cases() -> Iterator[Case]:
    def make(b, v, **fixed):
        def build(device, dtype, generator):
            logits = normal((b, v), device, torch.float32, generator, 3.0)
            seeds, positions = (torch.randint(0, 2**62, (b,), generator=generator).to(device) for _ in range(2))
            kwargs = {
                "temperature": torch.full((b,), fixed.get("temperature", 1.0), device=device),
                "top_k": torch.full((b,), fixed.get("top_k", 0), dtype=torch.int64, device=device),
                "top_p": torch.full((b,), fixed.get("top_p", 1.0), device=device),
                "min_p": torch.full((b,), fixed.get("min_p", 0.0), device=device),
            }
            return (logits, seeds, positions), kwargs

        return build

    f32 = (torch.float32,)
    yield Case("plain", make(8, 256), f32)
    yield Case("greedy", make(8, 256, temperature=0.0), f32)
    yield Case("top-k", make(8, 256, top_k=20, temperature=0.7), f32)
    yield Case("top-p", make(8, 256, top_p=0.9), f32)
    yield Case("min-p", make(8, 256, min_p=0.1), f32)
    yield Case("all", make(8, 256, temperature=1.3, top_k=50, top_p=0.8, min_p=0.02), f32)
    yield Case("one word", make(1, 1), f32, "odd")
    yield Case("prime", make(5, 1013, top_k=7), f32, "odd")
    yield Case("d12 decode", make(64, 32768, top_k=50), f32, "model")


def _cost(args: tuple, kwargs: dict) -> Cost:
    logits = args[0]
    return Cost(logits.numel() * logits.element_size(), 60 * logits.numel())


sample = Op(
    "sample",
    torch=sample_reference,
    selective=sample_selective,
    cuda="nanochat_kernels.native_cuda:sample",
    triton="nanochat_kernels.sample_triton:sample_triton",
    available={"selective": _on_a_cpu, "cuda": needs_cuda_ops, "triton": needs_triton},
    custom=("cuda", "triton"),
    auto=(("selective", lambda place: place.device.type == "cpu", "no sort, noise only for tokens that can win"),),
    cases=_cases,
    cost=_cost,
)
