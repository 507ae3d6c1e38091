"""How the next token is chosen: what a caller may ask for, and its form for a whole batch.

Order: repetition, presence and frequency penalties; then temperature, top-k, top-p, min-p and the draw, which are one
op (nanochat_kernels.sample). The draw takes its randomness from a counter-based generator on (seed of the row,
position), so a row's tokens do not depend on the batch that it happens to share.

    repetition (arXiv 1909.05858)  logits of tokens in the prompt or the answer: l/r where l > 0, l·r where l ≤ 0
    presence, frequency            l − presence·[count > 0] − frequency·count, counted over the answer alone
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.errors import UsageError
from nanochat_kernels import KernelPlan

_MASK64 = (1 << 64) - 1
MAX_LOGPROBS = 20  # of the likeliest tokens, per token


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Values out of range raise UsageError."""

    temperature: float = 1.0
    """0 takes the most likely token; higher is more varied."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 = from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability; 1 = from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this fraction of the most likely one; 0 = none."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens of the prompt and of the answer so far; 1 = off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has used; 0 = off."""
    frequency_penalty: float = 0.0
    """Taken off once per use; 0 = off."""
    max_tokens: int = 256
    """Tokens of an answer at most, those that the tool forces in included."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int = 42
    """Two calls with the same seed, prompt and settings give the same answer."""
    tools: bool = True
    """Run the calculator when the model calls it."""
    ignore_eos: bool = False
    """Go on after a token that ends an answer; for measurements."""
    logprobs: int | None = None
    """Report log-probabilities: of the chosen token, and of so many of the likeliest; None = do not."""

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, limit: str) -> None:
            value = getattr(self, name)
            if not fits or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(f"{name} is {value!r}; it must be {limit}")

        check("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100; 0.6 to 1 is usual")
        check("top_k", self.top_k >= 0, "0 (off) or the number of tokens to draw from")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        check("min_p", 0 <= self.min_p < 1, "at least 0 (off) and below 1")
        check("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0 and at most 10; 1 is off")
        check("presence_penalty", abs(self.presence_penalty) <= 10, "between -10 and 10; 0 is off")
        check("frequency_penalty", abs(self.frequency_penalty) <= 10, "between -10 and 10; 0 is off")
        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("stop", all(self.stop), "texts of at least one character each")
        check("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}")

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def row_seed(seed: int, sample: int) -> int:
    """The seed of answer number `sample` to a request. Number 0 keeps the request's; others are mixed (splitmix64)."""
    if sample == 0:
        return seed
    z = (seed + sample * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) >> 1


class Penalties:
    """Which tokens each of B slots has seen, (B,V) bool, and how often its answer used them, (B,V) float32."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.strengths = torch.zeros(slots, 3, device=device)
        self.counts = torch.zeros(slots, vocab_size, device=device)
        self.seen = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def begin(self, slot: int, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int] = ()) -> None:
        """A slot's new owner."""
        strengths = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.strengths[slot] = torch.tensor(strengths, dtype=torch.float32)
        said = torch.tensor(list(answer), dtype=torch.int64, device=self.counts.device)
        self.counts[slot] = torch.bincount(said, minlength=self.counts.size(1)).to(self.counts.dtype)
        self.seen[slot] = self.counts[slot] > 0
        self.seen[slot, torch.tensor(list(prompt), dtype=torch.int64, device=self.counts.device)] = True

    def apply(self, logits: Tensor, slots: Tensor | None = None) -> Tensor:
        """(N,V) float32 → the same with the penalties of these slots (N,), or of all, taken off."""
        strengths, counts, seen = (x if slots is None else x[slots] for x in (self.strengths, self.counts, self.seen))
        repetition, presence, frequency = strengths.T[:, :, None]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, repeated, logits)
        return logits - presence * (counts > 0) - frequency * counts

    def record(self, ids: Tensor, slots: Tensor | None = None) -> None:
        """Counts tokens (N,) that these slots (N,), or all, have just taken."""
        slots = torch.arange(ids.size(0), device=ids.device) if slots is None else slots
        self.counts.index_put_((slots, ids), torch.ones((), device=ids.device), accumulate=True)
        self.seen[slots, ids] = True

    def select(self, slots: Tensor) -> None:
        self.strengths, self.counts, self.seen = self.strengths[slots], self.counts[slots], self.seen[slots]


class BatchSampler:
    """The settings of B rows as tensors. With `prompts`, penalties are kept too if some row asks for one, in (B,V)
    memory; without, they are the caller's affair."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]] | None,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.seeds = column(seeds, torch.int64)
        self.temperature = column([p.temperature for p in params], torch.float32)
        self.top_k = column([p.top_k for p in params], torch.int64)
        self.top_p = column([p.top_p for p in params], torch.float32)
        self.min_p = column([p.min_p for p in params], torch.float32)
        self.penalties = None
        if prompts is not None and any(p.penalizes for p in params):
            self.penalties = Penalties(len(params), vocab_size, device)
            for row, (settings, prompt) in enumerate(zip(params, prompts, strict=True)):
                self.penalties.begin(row, settings, prompt)

    def draw(self, plan: KernelPlan, logits: Tensor, positions: Tensor) -> Tensor:
        """(B,V) float32 logits and the positions (B,) int64 of the tokens to be drawn → ids (B,) int64."""
        if self.penalties is not None:
            logits = self.penalties.apply(logits)
        return plan.sample(
            logits,
            self.seeds,
            positions,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )

    def record(self, ids: Tensor) -> None:
        """The token (B,) that each row has taken, drawn or forced."""
        if self.penalties is not None:
            self.penalties.record(ids)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows."""
        for name in ("seeds", "temperature", "top_k", "top_p", "min_p"):
            setattr(self, name, getattr(self, name)[rows])
        if self.penalties is not None:
            self.penalties.select(rows)
