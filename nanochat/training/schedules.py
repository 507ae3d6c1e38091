"""How far to train and how fast: pure functions from sizes to horizon, batch size, learning rates and decay.

One reference run, the model of depth 12, was tuned by hand; every other depth is scaled from it:

    tokens      D = ratio · (block matrices + lm_head)                   what the scaling laws call compute-optimal
    batch       B = 2^round(log2(2^19 · (D/D₁₂)^0.383))                  Power Lines, arXiv 2505.13738
    lr          × √(B/2^19)
    Muon decay  × √(B/2^19) · D₁₂/D                                      constant averaging time, arXiv 2405.13698

Over a run of N steps the learning rates rise over 40 steps, hold, and fall linearly to 5% over the last 65%.
`step` counts from 0 and names the update about to be made. Nothing here reads a clock or keeps state.
"""

import math
from dataclasses import dataclass

from nanochat.errors import UsageError

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens per step of the reference run
BATCH_EXPONENT = 0.383
MUON_DECAY = 0.28

WARMUP_STEPS = 40
WARMDOWN_SHARE = 0.65  # of all steps
FINAL_LR = 0.05  # of the peak, reached at the end
MOMENTUM_WARMUP_STEPS = 400
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90

SFT_MOMENTUM, SFT_MOMENTUM_STEPS = 0.95, 300
RL_MOMENTUM = 0.95


def warmdown_steps(steps: int) -> int:
    """How many of `steps` lie in the final fall of the learning rates."""
    return round(WARMDOWN_SHARE * steps)


def lr_multiplier(step: int, steps: int) -> float:
    """Factor of every learning rate at update `step` of `steps`; in (0, 1]."""
    fall = warmdown_steps(steps)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if step <= steps - fall:
        return 1.0
    left = (steps - step) / fall
    return left + FINAL_LR * (1.0 - left)


def muon_momentum(step: int, steps: int) -> float:
    """Muon's μ: rises from .85 to .97, falls to .90 with the learning rate. The rise wins where they overlap."""
    if step < MOMENTUM_WARMUP_STEPS:
        share = step / MOMENTUM_WARMUP_STEPS
        return (1.0 - share) * MOMENTUM_START + share * MOMENTUM_PEAK
    fall = warmdown_steps(steps)
    done = step - (steps - fall)
    if done < 0:
        return MOMENTUM_PEAK
    share = done / fall
    return (1.0 - share) * MOMENTUM_PEAK + share * MOMENTUM_END


def muon_decay_multiplier(step: int, steps: int) -> float:
    """Factor of Muon's weight decay: half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class StepRates:
    """What one update multiplies the optimizer's settings by: `lr` and `decay` are factors, `momentum` is Muon's μ."""

    lr: float
    momentum: float
    decay: float


def rates_at(step: int, steps: int) -> StepRates:
    """All of pretraining's schedules at update `step` of `steps`."""
    return StepRates(lr_multiplier(step, steps), muon_momentum(step, steps), muon_decay_multiplier(step, steps))


def sft_rates_at(step: int, steps: int, peak: float) -> StepRates:
    """Fine-tuning: `peak` of pretraining's rates for the first half, then a line to 0; μ rises again; no decay."""
    share = min(step / SFT_MOMENTUM_STEPS, 1.0)
    momentum = (1.0 - share) * MOMENTUM_START + share * SFT_MOMENTUM
    return StepRates(peak * min(1.0, 2.0 * (steps - step) / steps), momentum, 0.0)


def rl_rates_at(step: int, steps: int, peak: float) -> StepRates:
    """Reinforcement learning: a line from `peak` of pretraining's rates to 0; no decay."""
    return StepRates(peak * (steps - step) / steps, RL_MOMENTUM, 0.0)


@dataclass(frozen=True)
class Horizon:
    """A run's length and scale: steps of batch_tokens each, and what learning rates and Muon's decay become."""

    tokens: int  # what the ratio asks for; steps·batch_tokens may differ when steps were given
    batch_tokens: int
    steps: int
    lr_scale: float
    muon_decay: float


def optimal_batch(tokens: float, reference_tokens: float) -> int:
    """Tokens per step for a horizon of `tokens`, a power of two."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT))


def plan_horizon(
    parameters: int,
    reference_parameters: int,
    ratio: float,
    *,
    multiple_of: int = 1,
    batch_tokens: int | None = None,
    steps: int | None = None,
) -> Horizon:
    """The horizon of a model from its scaling parameters and those of depth 12 with the same vocabulary and head size.

    batch_tokens and steps override what the ratio gives; Muon's decay follows the ratio's tokens even then. A batch
    that is chosen here is rounded to a multiple of `multiple_of` tokens (a row on every rank); a given one is taken as
    it is. Raises UsageError where nothing is left to train.
    """
    if ratio <= 0:
        raise UsageError(f"--ratio {ratio} must be above 0: it is training tokens per parameter, 12 is the default")
    tokens, reference_tokens = int(ratio * parameters), ratio * reference_parameters
    if batch_tokens is None:
        best = optimal_batch(tokens, reference_tokens)
        batch_tokens = max(1, round(best / multiple_of)) * multiple_of
    if steps is None:
        steps = tokens // batch_tokens
        if steps < 1:
            raise UsageError(
                f"a batch of {batch_tokens:,} tokens is larger than the horizon of {tokens:,} (ratio {ratio:g}); "
                "lower --batch-tokens, raise --ratio, or give --steps"
            )
    elif steps < 1:
        raise UsageError(f"--steps {steps} is too few; train for at least 1")
    lr_scale = math.sqrt(batch_tokens / REFERENCE_BATCH)
    return Horizon(tokens, batch_tokens, steps, lr_scale, MUON_DECAY * lr_scale * (reference_tokens / tokens))
