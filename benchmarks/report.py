"""The recorded rows as a page: rooflines, speed-ups, training over commits, decode curves; and the README's tables.

    nanochat bench report [--results FOLDER] [--out FOLDER] [--readme]

Writes report.html (one file, plots inside) and report.md beside a folder of plots, from the newest row of every figure.
--readme rewrites what stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` in README.md, from rows that were
taken on a quiet machine at a clean commit, and leaves a block alone where there are none: nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, harness
from nanochat.errors import UsageError
from nanochat.measure.machine import commit
from nanochat.report.page import Block, Facts, Heading, Plot, Table, html, markdown
from nanochat.runtime import base_dir

Row = dict[str, Any]
COLORS = ("#2f6fde", "#e07b39", "#2e9e6b", "#8a63d2", "#c2385b", "#14909c", "#8d6e1f", "#5b6472")
PHASES = ("data", "forward", "backward", "optimizer", "communication")
CLOCK = ("ms", 1e3)


# ---- rows ------------------------------------------------------------------------------------------------------------


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of every figure, in order of first appearance."""
    found: dict[compare.Key, Row] = {}
    for row in sorted(rows, key=lambda row: str(row.get("date", ""))):
        found[compare.key_of(row)] = row
    return list(found.values())


def side(row: Row) -> str:
    """What ran: a backend of ours or a peer."""
    return str(row.get("peer") or row.get("backend") or "")


def kernel_groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(op and case, dtype, mode) → side → row."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if "op" in row:
            key = (f"{row['op']} · {short(row['case'])}", str(row.get("dtype")), str(row.get("mode")))
            groups.setdefault(key, {})[side(row)] = row
    return groups


def short(case: str) -> str:
    return re.sub(r"^step w(\d+) b(\d+) t(\d+) ?", r"w\1 ", case)


def mark(row: Row) -> str:
    """A dagger at figures from a machine that was not quiet."""
    return "" if row.get("quiet", True) else " †"


# ---- plots -----------------------------------------------------------------------------------------------------------


def figure(columns: int = 1, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    drawn = Figure(figsize=(9.6, height), layout="constrained")
    axes = list(drawn.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors="#475467", labelsize=8)
        axis.grid(color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return drawn, axes


def svg(drawn: Any) -> str:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()


def roofline(rows: Sequence[Row]) -> str | None:
    """Achieved FLOP/s against FLOPs per byte, under the measured ceilings."""
    points = [row for row in rows if "op" in row and row.get("flops") and row.get("bytes") and row.get("ceilings")]
    if not points:
        return None
    drawn, [axis] = figure(height=4.6)
    limits = points[-1]["ceilings"]
    peak = max(rate for name, rate in limits.items() if name.startswith("gemm"))
    intensities = [row["flops"] / row["bytes"] for row in points]
    low, high = min(intensities) / 3, max(*intensities, peak / limits["bandwidth"]) * 3
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axis.plot(xs, [min(x * limits["bandwidth"], peak) / 1e9 for x in xs], color="#1d2430", linewidth=1.6)
    axis.annotate(f"{limits['bandwidth'] / 1e9:,.1f} GB/s", (xs[20], xs[20] * limits["bandwidth"] / 1e9),
                  xytext=(6, -14), textcoords="offset points", fontsize=8)  # fmt: skip
    axis.annotate(
        f"{peak / 1e9:,.0f} GFLOP/s", (xs[170], peak / 1e9), xytext=(0, 5), textcoords="offset points", fontsize=8
    )
    ops = list(dict.fromkeys(row["op"] for row in points))
    for row, x in zip(points, intensities, strict=True):
        ours = "peer" not in row and row.get("backend") != "torch"
        axis.plot(x, row["flops"] / row["median"] / 1e9, "o" if ours else "x", markersize=5 if ours else 4,
                  color=COLORS[ops.index(row["op"]) % len(COLORS)], alpha=0.9 if ours else 0.6)  # fmt: skip
    for number, op in enumerate(ops):
        axis.plot([], [], "o", color=COLORS[number % len(COLORS)], label=op, markersize=4)
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="lower right")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    return svg(drawn)


def speedups(rows: Sequence[Row]) -> str | None:
    """Bars: how many times faster than the torch reference each backend and peer is, where there is more than one."""
    groups = {key: sides for key, sides in kernel_groups(rows).items() if "torch" in sides and len(sides) > 1}
    if not groups:
        return None
    names = list(dict.fromkeys(name for sides in groups.values() for name in sides if name != "torch"))
    labels, y = [], 0.0
    bars = sum(len(sides) - 1 for sides in groups.values())
    drawn, [axis] = figure(height=1.0 + 0.2 * bars + 0.12 * len(groups))
    for (name, dtype, mode), sides in groups.items():
        others = [(other, row) for other, row in sides.items() if other != "torch"]
        labels.append((y + (len(others) - 1) / 2, f"{name}\n{dtype}, {mode}" if len(others) > 1 else f"{name}, {mode}"))
        for other, row in others:
            ratio = sides["torch"]["median"] / row["median"]
            color = COLORS[names.index(other) % len(COLORS)]
            axis.barh(y, ratio, color=color, height=0.8, alpha=0.55 if "peer" in row else 1.0)
            axis.annotate(f"{ratio:.2f}{mark(row)}", (ratio, y), xytext=(3, -3), textcoords="offset points", fontsize=7)
            y += 1
        y += 0.6
    axis.axvline(1, color="#1d2430", linewidth=1)
    for number, name in enumerate(names):
        axis.barh(0, 0, color=COLORS[number % len(COLORS)], label=name)
    axis.set_yticks([position for position, _ in labels], [text for _, text in labels], fontsize=6.5)
    axis.invert_yaxis()
    axis.legend(fontsize=7, frameon=False, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.set(xlabel="times the reference's speed", xscale="log")
    axis.xaxis.set_major_formatter("{x:g}")
    return svg(drawn)


def over_commits(rows: Sequence[Row]) -> str | None:
    """Tokens per second of every training figure, and its share of the peak, commit after commit."""
    steps = sorted((row for row in rows if row.get("work") == "train_step"), key=lambda row: str(row.get("date")))
    if not steps:
        return None
    commits = list(dict.fromkeys(row["commit"] for row in steps))
    lines: dict[str, list[Row]] = {}
    for row in steps:
        lines.setdefault(f"{row['case']} {row['dtype']} {side(row)} ×{row.get('ranks', 1)}", []).append(row)
    drawn, axes = figure(2, height=3.6)
    share = "mfu" if any("mfu" in row for row in steps) else "gemm_share"
    for number, (name, line) in enumerate(lines.items()):
        xs, style = [commits.index(row["commit"]) for row in line], "--" if "peer" in line[0] else "-"
        for axis, value in zip(axes, ("tokens_per_s", share), strict=True):
            ys = [row.get(value, math.nan) for row in line]
            axis.plot(xs, ys, style, marker="o", markersize=4, color=COLORS[number % len(COLORS)], label=name)
    for axis, label in zip(
        axes, ("tokens/s", "MFU" if share == "mfu" else "share of the measured GEMM ceiling"), strict=True
    ):
        axis.set(ylim=(0, None), ylabel=label)
        axis.set_xticks(range(len(commits)), commits, rotation=30, fontsize=7)
    axes[0].legend(fontsize=6.5, frameon=False, loc="lower left")
    return svg(drawn)


def breakdown(rows: Sequence[Row]) -> str | None:
    """Stacked bars: where a training step's time goes."""
    steps = [row for row in rows if row.get("work") == "train_step" and "forward_share" in row]
    if not steps:
        return None
    drawn, [axis] = figure(height=1.0 + 0.34 * len(steps))
    for y, row in enumerate(steps):
        left = 0.0
        for phase, color in zip(PHASES, COLORS, strict=False):
            width = 100 * row.get(f"{phase}_share", 0.0)
            axis.barh(y, width, left=left, color=color, height=0.7, label=phase if y == 0 else None)
            if width > 6:
                axis.text(left + width / 2, y, f"{width:.0f}%", ha="center", va="center", fontsize=7, color="white")
            left += width
    names = [f"{row['case']} {row['dtype']}\n{side(row)} ×{row.get('ranks', 1)}" for row in steps]
    axis.set_yticks(range(len(steps)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="% of the step", xlim=(0, 100))
    axis.legend(fontsize=7, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(drawn)


def shape_of(row: Row) -> dict[str, Any]:
    """Model, batch and context of a decode row, which its case spells: "d12 b8 p256"."""
    found = re.match(r"(d\d+) b(\d+) p(\d+)", str(row.get("case", "")))
    return {"model": found[1], "batch": int(found[2]), "context": int(found[3])} if found else {}


def decode_curves(rows: Sequence[Row]) -> str | None:
    """Milliseconds per decode step against context and against batch, one line per model, weights and runner."""
    steps = [row | shape_of(row) for row in rows if row.get("work") == "decode"]
    steps = [row for row in steps if "batch" in row and "context" in row]
    if not steps:
        return None
    drawn, axes = figure(2, height=3.6)
    for axis, (x, fixed) in zip(axes, (("context", "batch"), ("batch", "context")), strict=True):
        lines: dict[str, dict[float, float]] = {}
        for row in steps:
            label = [
                row.get("model", ""),
                side(row),
                row.get("weights") or row.get("dtype"),
                f"{fixed} {row.get(fixed, '?')}",
            ]
            lines.setdefault(" ".join(str(part) for part in label if part), {})[row.get(x, 0)] = 1e3 * row["median"]
        drawn_lines = {name: line for name, line in lines.items() if len(line) > 1} or lines
        for number, (name, line) in enumerate(drawn_lines.items()):
            xs = sorted(line)
            color = COLORS[number % len(COLORS)]
            axis.plot(xs, [line[at] for at in xs], marker="o", markersize=4, label=name, color=color)
        axis.set(xlabel=f"{x}, {'tokens' if x == 'context' else 'sequences'}", ylabel="ms per step", ylim=(0, None))
        axis.legend(fontsize=6.5, frameon=False)
    return svg(drawn)


# ---- tables and page -------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def kernels_table(rows: Sequence[Row]) -> Table | None:
    lines = []
    for (name, dtype, mode), sides in kernel_groups(rows).items():
        for who, row in sides.items():
            base = sides.get("torch")
            ratio = f"{base['median'] / row['median']:.2f}×" if base and who != "torch" else ""
            shares = (percent(row.get(f"{share}_share")) for share in ("bandwidth", "flops", "roofline"))
            lines.append((name, f"{mode} {dtype}", who, harness.human(row["median"]) + mark(row), ratio, *shares))
    headers = ("op · case", "where", "backend", "median", "against torch", "bandwidth", "FLOP/s", "roofline")
    return Table(headers, tuple(lines)) if lines else None


def train_table(rows: Sequence[Row]) -> Table | None:
    lines = []
    for row in rows:
        if row.get("work") == "train_step":
            share = row.get("mfu", row.get("gemm_share"))
            speed, step = number(row["tokens_per_s"]) + mark(row), harness.human(row["median"])
            what = (row["case"], row["dtype"], side(row), str(row.get("ranks", 1)))
            lines.append((*what, speed, step, percent(share), f"{row['first_step_s']:.1f} s", row["commit"]))
    headers = ("work", "dtype", "kernels", "ranks", "tokens/s", "step", "share of peak", "first step", "commit")
    return Table(headers, tuple(lines)) if lines else None


def prediction_table(rows: Sequence[Row]) -> Table | None:
    lines = [
        (
            row["case"],
            row["dtype"],
            harness.human(row["median"]),
            harness.human(row["measured_s"]),
            f"{row['error']:+.1%}",
        )
        for row in rows
        if row.get("work") == "prediction" and "measured_s" in row
    ]
    return Table(("step", "dtype", "predicted", "measured", "error"), tuple(lines)) if lines else None


def other_tables(rows: Sequence[Row]) -> Iterator[Block]:
    """Every other work, a table each: what identifies a row, its median, and its rates."""
    works: dict[str, list[Row]] = {}
    for row in rows:
        if "work" in row and row["work"] not in ("train_step", "prediction"):
            works.setdefault(re.split(r"[,:]", row["work"])[0], []).append(row)
    for work, found in works.items():
        fields = dict.fromkeys(n for row in found for n in row if n.endswith(("_per_s", "_share", "_ms")))
        rates = [n for n in fields if isinstance(found[0].get(n, 0.0), (int, float))][:5]
        names = [n for n in ("work", "case", "backend", "peer", "dtype", "mode") if any(n in row for row in found)]
        lines = tuple(
            (*(str(row.get(n, "")) for n in names), harness.human(row["median"]) + mark(row),
             *(percent(row.get(n)) if n.endswith("_share") else number(row.get(n)) for n in rates))
            for row in found
        )  # fmt: skip
        yield Heading(work.replace("_", " ").capitalize())
        yield Table((*names, "median", *(n.replace("_per_s", "/s").replace("_", " ") for n in rates)), lines)


def device_blocks(device: str, rows: Sequence[Row]) -> Iterator[Block]:
    latest = newest(rows)
    last = max(latest, key=lambda row: str(row.get("date", "")))
    limits = next((row["ceilings"] for row in reversed(latest) if "ceilings" in row), {})
    yield Heading(str(last.get("device_name", device)), f"{device}, {last.get('threads')} thread(s)")
    facts = [("bandwidth", f"{limits['bandwidth'] / 1e9:,.1f} GB/s")] if limits else []
    facts += [(name, f"{number(rate / 1e9)} GFLOP/s") for name, rate in limits.items() if name.startswith("gemm")]
    yield Facts((*facts, ("figures", str(len(latest))), ("newest commit", str(last.get("commit", "")))))
    if any(not row.get("quiet", True) for row in latest):
        yield Heading("", "† taken while other work ran on the machine: good for finding faults, not for quoting")
    yield from _section("Kernels", [
        ("roofline", roofline(latest), "Dots: custom backends; crosses: reference and peers; line: the measured best."),
        ("speedups", speedups(latest), "Each backend and peer (pale) against the torch reference of the same op."),
    ], kernels_table(latest), device)  # fmt: skip
    yield from _section("Training", [
        ("training", over_commits(rows), "Tokens per second and share of the peak, by commit."),
        ("breakdown", breakdown(latest), "Where a step's time goes."),
    ], train_table(latest), device)  # fmt: skip
    yield from _section("Prediction", [], prediction_table(latest), device)
    yield from _section("Decoding", [("decode", decode_curves(latest), "Time per decode step.")], None, device)
    yield from other_tables(latest)


def _section(title: str, drawn: list[tuple[str, str | None, str]], table: Table | None, device: str) -> Iterator[Block]:
    """A heading, its plots and its table, where there is any."""
    blocks: list[Block] = [Plot(f"{device}_{name}", text, caption) for name, text, caption in drawn if text]
    blocks += [table] if table else []
    if blocks:
        yield Heading(title)
        yield from blocks


def make(results: Path) -> list[Block]:
    """The page's blocks, device by device. Raises UsageError where there are no rows."""
    blocks: list[Block] = []
    by_device: dict[str, list[Row]] = {}
    for path in sorted(results.rglob("*.jsonl")):
        for row in harness.read(path):
            by_device.setdefault(str(row.get("device", "unknown")), []).append(row)
    for device, rows in by_device.items():
        blocks += device_blocks(device, rows)
    if not blocks:
        raise UsageError(f"{results} holds no rows: nanochat bench kernels (train, infer, all) makes some")
    return blocks


# ---- README ----------------------------------------------------------------------------------------------------------

TABLES = {"kernels": kernels_table, "train": train_table, "prediction": prediction_table}


def fill_readme(text: str, rows: Sequence[Row]) -> str:
    """README's text with the blocks between its markers made anew from quiet rows of clean commits."""
    fit = newest([row for row in rows if row.get("quiet") and not row.get("dirty")])
    for name, table_of in TABLES.items():
        table = table_of(fit)
        if table is None:
            continue
        body = markdown("", "", [table], "").split("\n", 3)[3].strip()
        devices = ", ".join(dict.fromkeys(f"{row['device_name']}, {row['threads']} thread(s)" for row in fit))
        body = f"{body}\n\n{devices}. Made by `nanochat bench report --readme`."
        block = f"<!-- bench:{name} -->\n{body}\n<!-- /bench:{name} -->"
        text = re.sub(rf"<!-- bench:{name} -->.*?<!-- /bench:{name} -->", lambda _, b=block: b, text, flags=re.S)  # type: ignore[misc]
    return text


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--out", type=Path, help="default: bench_report in NANOCHAT_BASE_DIR")
    parser.add_argument("--readme", action="store_true", help="also make the README's tables anew")
    args = parser.parse_args(arguments)
    blocks, out = make(args.results), args.out or base_dir() / "bench_report"
    (out / "plots").mkdir(parents=True, exist_ok=True)
    title, subtitle = "nanochat benchmarks", f"commit {commit()[0]}, from the rows under {args.results.name}"
    for block in blocks:
        if isinstance(block, Plot):
            write(out / "plots" / f"{block.name}.svg", block.svg)
    write(out / "report.md", markdown(title, subtitle, blocks, "plots"))
    write(out / "report.html", html(title, subtitle, blocks))
    if args.readme:
        readme = harness.ROOT / "README.md"
        rows = [row for path in sorted(args.results.rglob("*.jsonl")) for row in harness.read(path)]
        write(readme, fill_readme(readme.read_text(encoding="utf-8"), rows))
    harness.console().print(f"written to {out / 'report.html'} and {out / 'report.md'}", markup=False)
    return 0


if __name__ == "__main__":
    harness.run(main)
