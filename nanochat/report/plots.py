"""The report's plots: metrics.jsonl in, SVG text out. Thin lines are single steps, thick ones their running mean."""

import io
from collections.abc import Sequence
from typing import Any

Records = Sequence[dict[str, Any]]
BLUE, ORANGE, GREEN = "#2f6fde", "#e07b39", "#2e9e6b"
BETA = 0.95  # of the running mean


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start at 0."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = BETA * mean + (1 - BETA) * value, BETA * weight + (1 - BETA)
        result.append(mean / weight)
    return result


def series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have `name`."""
    found = [(record["step"], float(record[name])) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]


def loss_and_validation(records: Records) -> str | None:
    """Training loss over the steps, and validation bits per byte beside it; None without a loss."""
    steps, losses = series(records, "loss")
    if not steps:
        return None
    val_steps, bpbs = series(records, "val_bpb")
    figure, axes = _figure(2 if bpbs else 1)
    axes[0].plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    axes[0].plot(steps, smooth(losses), color=BLUE, linewidth=1.8)
    axes[0].set(title="training loss", xlabel="step", ylabel="nats per target")
    if bpbs:
        axes[1].plot(val_steps, bpbs, color=ORANGE, marker="o", markersize=4, linewidth=1.8)
        axes[1].set(title="validation", xlabel="step", ylabel="bits per byte")
    return _svg(figure)


def speed_and_rate(records: Records) -> str | None:
    """Tokens per second and the learning rates' multiplier over the steps."""
    steps, speeds = series(records, "tokens_per_second")
    if not steps:
        return None
    rate_steps, rates = series(records, "lr_multiplier")
    figure, axes = _figure(2 if rates else 1)
    axes[0].plot(steps, speeds, color=GREEN, linewidth=1.0)
    axes[0].set(title="speed", xlabel="step", ylabel="tokens per second", ylim=(0, None))
    if rates:
        axes[1].plot(rate_steps, rates, color=BLUE, linewidth=1.8)
        axes[1].set(title="learning rate", xlabel="step", ylabel="× peak", ylim=(0, None))
    return _svg(figure)


def reward_and_pass(records: Records) -> str | None:
    """Share of right answers in training, and pass@k on held-out problems."""
    steps, rewards = series(records, "reward")
    if not steps:
        return None
    names = sorted(
        {name for record in records for name in record if name.startswith("pass@")}, key=lambda n: int(n[5:])
    )
    figure, axes = _figure(2 if names else 1)
    axes[0].plot(steps, rewards, color=BLUE, alpha=0.25, linewidth=0.8)
    axes[0].plot(steps, smooth(rewards), color=BLUE, linewidth=1.8)
    axes[0].set(title="reward", xlabel="step", ylabel="share of right answers", ylim=(0, 1))
    for number, name in enumerate(names):
        passed = series(records, name)
        axes[1].plot(
            *passed, marker="o", markersize=4, linewidth=1.8, color=(ORANGE, GREEN, BLUE, "#8a63d2")[number % 4]
        )
        axes[1].annotate(name, (passed[0][-1], passed[1][-1]), xytext=(4, 3), textcoords="offset points", fontsize=8)
    if names:
        axes[1].set(title="held-out problems", xlabel="step", ylabel="solved", ylim=(0, 1.05))
        axes[1].margins(x=0.12)
    return _svg(figure)


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#98a2b3")
        axis.tick_params(colors="#475467", labelsize=8)
        axis.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axis.title.set(fontsize=10, color="#1d2430")
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(fontsize=9, color="#475467")
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()
