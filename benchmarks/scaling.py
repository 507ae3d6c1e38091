"""Scaling laws of a miniseries: loss against compute, parameters and tokens, and what the next depth would reach.

    nanochat bench scaling [FOLDER/series.json] [--next 14 16] [--ratio 12]

Rows come from benchmarks/miniseries.py (runs/miniseries.sh writes them under <base dir>/miniseries). The method is the
third of arXiv 2203.15556, with bits per byte in the place of the loss:

    L(N, D) = E + A·N^−α + B·D^−β       N: matrices and head (what a token meets), D: training tokens

fitted by minimizing a Huber loss (δ = 1e-3) of log L − LSE(a − α·log N, b − β·log D, e) from a grid of starts, so that
outliers and the scale of L count little (Levenberg-Marquardt on all starts at once, in the place of L-BFGS: five
parameters want no more). From the fit follow the compute-optimal split N* ∝ C^(β/(α+β)) and the next depth's loss. Its
error is stated twice: as an interval from fits to resampled rows, and, where there are enough rows, by predicting the
last row from the others. A power law in compute alone, L = E + K·C^−γ, stands beside it.

Few rows make no law: five parameters want at least six, and toy depths of one ratio cannot tell N from D. The text says
which of these applies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from nanochat.errors import NanochatError, UsageError
from nanochat.measure.estimator import horizon
from nanochat.model import costs
from nanochat.model.config import GPTConfig
from nanochat.runtime import base_dir

HUBER = 1e-3
RESAMPLES = 25
ITERATIONS = 200
STARTS = list(
    itertools.product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, -0.3, 0.2), (0.2, 0.5, 0.8), (0.2, 0.5, 0.8))
)


@dataclass(frozen=True)
class Point:
    """One trained model: parameters that meet a token, training tokens, FLOPs, loss (bits per byte)."""

    name: str
    n: float
    d: float
    flops: float
    loss: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A·N^−α + B·D^−β."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    residual: float = 0.0  # mean Huber loss of the fit

    def loss(self, n: float, d: float) -> float:
        return self.e + self.a * n**-self.alpha + self.b * d**-self.beta

    @property
    def optimal_exponent(self) -> float:
        """x in N* ∝ C^x, the compute-optimal size."""
        return self.beta / (self.alpha + self.beta)


@dataclass(frozen=True)
class ComputeLaw:
    """L(C) = E + K·C^−γ."""

    e: float
    k: float
    gamma: float

    def loss(self, flops: float) -> float:
        return self.e + self.k * flops**-self.gamma


Terms = list[tuple[int, int, torch.Tensor]]  # index of a log factor, index of its exponent, log of its variable


def _predict(theta: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """log L (S, M) of every start at every point, and its derivatives (S, M, P). Parameter 0 is the log of E."""
    parts = [theta[:, i, None] - theta[:, j, None] * x[None, :] for i, j, x in terms]
    stacked = torch.stack([theta[:, 0, None].expand_as(parts[0]), *parts])
    shares = stacked.softmax(0)
    slopes = torch.zeros(*parts[0].shape, theta.size(1), dtype=theta.dtype)
    slopes[..., 0] = shares[0]
    for (i, j, x), share in zip(terms, shares[1:], strict=True):
        slopes[..., i], slopes[..., j] = share, -x * share
    return stacked.logsumexp(0), slopes


def _huber(error: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=HUBER).mean(1)


def _minimize(start: torch.Tensor, terms: Terms, target: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Levenberg-Marquardt with Huber weights, all starts (S, P) side by side; returns the best and its loss."""
    theta, damping = start.clone(), torch.full((len(start),), 1e-2, dtype=start.dtype)
    predicted, slopes = _predict(theta, terms)
    loss = _huber(predicted - target)
    for _ in range(ITERATIONS):
        error = predicted - target
        weights = (HUBER / error.abs().clamp_min(1e-300)).clamp_max(1.0)
        weighted = slopes * weights[..., None]
        gradient, curvature = (weighted * error[..., None]).sum(1), weighted.mT @ slopes
        diagonal = torch.diag_embed(torch.diagonal(curvature, dim1=-2, dim2=-1) + 1e-12)
        step = torch.linalg.solve(curvature + damping[:, None, None] * diagonal + 1e-14 * _eye(theta), gradient)
        trial = theta - torch.nan_to_num(step).clamp(-2.0, 2.0)
        trial_predicted, trial_slopes = _predict(trial, terms)
        trial_loss = _huber(trial_predicted - target)
        better = trial_loss < loss
        theta = torch.where(better[:, None], trial, theta)
        predicted = torch.where(better[:, None], trial_predicted, predicted)
        slopes = torch.where(better[:, None, None], trial_slopes, slopes)
        loss = torch.where(better, trial_loss, loss)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
    best = int(loss.argmin())
    return theta[best], float(loss[best])


def _eye(theta: torch.Tensor) -> torch.Tensor:
    return torch.eye(theta.size(1), dtype=theta.dtype)


def fit(points: Sequence[Point], starts: Sequence[tuple[float, ...]] = STARTS) -> Law:
    """The law through these points. Variables are centered in log space, so that starts are near any data."""
    log_n, log_d, log_l = (
        torch.tensor([math.log(getattr(p, name)) for p in points], dtype=torch.float64) for name in ("n", "d", "loss")
    )
    mid_n, mid_d = log_n.mean(), log_d.mean()
    mean = float(log_l.mean())
    # a and b are given as what the terms contribute at the center: e^(mean − something), in nats below the loss
    grid = [[mean + e, mean - 0.3 * a, mean - 0.3 * b, alpha, beta] for a, b, e, alpha, beta in starts]
    start = torch.tensor(grid, dtype=torch.float64)
    theta, residual = _minimize(start, [(1, 3, log_n - mid_n), (2, 4, log_d - mid_d)], log_l)
    e, a, b, alpha, beta = theta.tolist()
    a, b = a + alpha * float(mid_n), b + beta * float(mid_d)
    return Law(math.exp(e), math.exp(a), math.exp(b), alpha, beta, residual)


def fit_compute(points: Sequence[Point]) -> ComputeLaw:
    """L(C) alone."""
    log_c, log_l = (torch.tensor([math.log(x) for x in xs], dtype=torch.float64)
                    for xs in ([p.flops for p in points], [p.loss for p in points]))  # fmt: skip
    center, mean = log_c.mean(), float(log_l.mean())
    grid = [
        [mean + e, mean - k, gamma] for e in (-1.0, -0.3, 0.0) for k in (0.0, 1.0, 2.0) for gamma in (0.1, 0.3, 0.6)
    ]
    theta, _ = _minimize(torch.tensor(grid, dtype=torch.float64), [(1, 2, log_c - center)], log_l)
    e, k, gamma = theta.tolist()
    return ComputeLaw(math.exp(e), math.exp(k + gamma * float(center)), gamma)


def interval(points: Sequence[Point], n: float, d: float, seed: int = 0) -> tuple[float, float]:
    """10% and 90% of the loss predicted by fits to points drawn with replacement (at least 4 different ones)."""
    draw, found = random.Random(seed), []
    few = STARTS[:: len(STARTS) // 12]
    while len(found) < RESAMPLES:
        chosen = draw.choices(points, k=len(points))
        if len({point.name for point in chosen}) >= min(4, len(points)):
            found.append(fit(chosen, few).loss(n, d))
    found.sort()
    return found[len(found) // 10], found[-1 - len(found) // 10]


def held_out(points: Sequence[Point]) -> tuple[Point, float] | None:
    """The largest model and what a fit to the others predicts for it; None with fewer than 6 points."""
    if len(points) < 6:
        return None
    last = max(points, key=lambda point: point.flops)
    law = fit([point for point in points if point is not last])
    return last, law.loss(last.n, last.d)


def read(path: Path, vocab_size: int) -> list[Point]:
    """Points from miniseries.py's series.json, or from JSON lines with the same fields."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no series ({error}): runs/miniseries.sh makes one") from error
    return [_point(row, vocab_size) for row in rows if row.get("val_bpb") is not None]


def _point(row: dict[str, Any], vocab_size: int) -> Point:
    config = GPTConfig.from_depth(row["depth"], row.get("vocab_size", vocab_size), row.get("seq_len", 2048))
    size = row.get("scaling_parameters") or costs.scaling_parameters(config)
    return Point(row["tag"], size, row["tokens"], row["flops"], row["val_bpb"], 60 * row.get("minutes", 0.0))


def warnings(points: Sequence[Point]) -> list[str]:
    """What the rows cannot show."""
    found = []
    if len(points) < 6:
        found.append(f"{len(points)} models for five parameters: the law passes through them and proves nothing")
    ratios = [p.d / p.n for p in points]
    if max(ratios) / min(ratios) < 1.5:
        found.append("one ratio of tokens to parameters: N and D grow together, so α and β cannot be told apart")
    span = max(p.flops for p in points) / min(p.flops for p in points)
    if span < 10:
        found.append(f"compute spans a factor of {span:.1f} only")
    return found


def predict_next(points: Sequence[Point], law: Law, depth: int, ratio: float, args: argparse.Namespace) -> str:
    """One line about a depth that was not trained: loss with its interval, tokens, FLOPs, time at the series' speed."""
    config = GPTConfig.from_depth(depth, args.vocab_size, args.seq_len)
    n = costs.scaling_parameters(config)
    plan = horizon(config, ratio, args.vocab_size) if args.seq_len >= 1024 else None
    tokens = plan.tokens if plan else ratio * n
    flops = costs.training_flops_per_token(config) * tokens
    low, high = interval(points, n, tokens)
    largest = max(points, key=lambda point: point.flops)
    time = (
        f", {flops / largest.flops * largest.seconds / 3600:.2f} h at the speed of {largest.name}"
        if largest.seconds
        else ""
    )
    return (
        f"d{depth} at {ratio:g} tokens per parameter: {law.loss(n, tokens):.4f} bits per byte "
        f"({low:.4f} to {high:.4f}), {tokens:,.0f} tokens, {flops:.3g} FLOPs{time}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="?", type=Path, help="default: <base dir>/miniseries/series.json")
    parser.add_argument(
        "--next", type=int, nargs="+", default=[], help="depths to predict (default: the next even one)"
    )
    parser.add_argument("--ratio", type=float, default=12.0, help="tokens per parameter of the predictions")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args(arguments)
    points = read(args.series or base_dir() / "miniseries" / "series.json", args.vocab_size)
    if len(points) < 3:
        raise NanochatError(f"{len(points)} evaluated model(s) are too few for a law: train at least 3, better 6")
    law, compute, say = fit(points), fit_compute(points), harness.console().print
    from rich.table import Table

    table = Table("model", "N", "D", "FLOPs", "bits per byte", "law", "error")
    for p in sorted(points, key=lambda point: point.flops):
        predicted = law.loss(p.n, p.d)
        table.add_row(p.name, f"{p.n:.3g}", f"{p.d:.3g}", f"{p.flops:.3g}", f"{p.loss:.4f}", f"{predicted:.4f}",
                      f"{predicted / p.loss - 1:+.2%}")  # fmt: skip
    say(table)
    say(
        f"L = {law.e:.3f} + {law.a:.3g}·N^-{law.alpha:.3f} + {law.b:.3g}·D^-{law.beta:.3f}; "
        f"best size N* ∝ C^{law.optimal_exponent:.2f}"
    )
    say(f"L = {compute.e:.3f} + {compute.k:.3g}·C^-{compute.gamma:.3f}")
    if check := held_out(points):
        last, predicted = check
        say(f"{last.name}, left out of the fit: predicted {predicted:.4f}, measured {last.loss:.4f}: "
            f"{predicted / last.loss - 1:+.2%}")  # fmt: skip
    for complaint in warnings(points):
        harness.say(complaint, "yellow")
    deepest = max(json_depth(args, points))
    for depth in args.next or [deepest + 2]:
        say(predict_next(points, law, depth, args.ratio, args))
    return 0


def json_depth(args: argparse.Namespace, points: Sequence[Point]) -> list[int]:
    """Depths in the names of the points ("series-d12-r8"); 10 where they say nothing."""
    import re

    return [int(found[1]) for point in points if (found := re.search(r"d(\d+)", point.name))] or [10]


if __name__ == "__main__":
    harness.run(main)
