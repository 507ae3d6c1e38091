"""Two sets of rows, figure by figure: ratio of the medians, confidence interval, verdict; exit 1 on a regression.

    nanochat bench compare BEFORE AFTER [--margin 0.03]        files, folders or commits (the beginning of a hash)

Rows belong together when all of harness.KEY agrees: work, case, backend, dtype, mode, threads, ranks and device. Where
a side has several rows of one key (runs at different times), all count. The ratio is time after over time before, so
above 1 is slower. Its interval comes from a bootstrap in two stages, runs first and then samples within a run:
samples of one run share the machine's mood, and only runs show how much that mood changes.

A verdict other than "same" needs both: the 95% interval excludes 1, and the ratio is farther from 1 than the margin.
With a single run per side the interval knows nothing of the mood; that is what the margin is for.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from nanochat.errors import UsageError

DRAWS = 2000
CONFIDENCE = 0.95

Row = dict[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """One figure on both sides. ratio, low, high: time after over time before and its confidence interval."""

    key: Key
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str  # "same", "faster" or "SLOWER"
    remark: str = ""


def key_of(row: Row) -> Key:
    return tuple(str(row.get(name, "")) for name in harness.KEY)


def group(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key_of(row), []).append(row)
    return found


def _draw(runs: Sequence[Sequence[float]], draw: random.Random) -> float:
    """A bootstrap median: runs with replacement, then as many samples within each."""
    chosen = draw.choices(runs, k=len(runs))
    return statistics.median(x for run in chosen for x in draw.choices(run, k=len(run)))


def judge(key: Key, before: Sequence[Row], after: Sequence[Row], margin: float, seed: int = 0) -> Verdict:
    """Compares the rows of one key."""
    sides = [[row.get("samples") or [row["median"]] for row in rows] for rows in (before, after)]
    a, b = (statistics.median(row["median"] for row in rows) for rows in (before, after))
    draw = random.Random(seed)
    ratios = sorted(_draw(sides[1], draw) / _draw(sides[0], draw) for _ in range(DRAWS))
    edge = int(DRAWS * (1 - CONFIDENCE) / 2)
    low, high, ratio = ratios[edge], ratios[-1 - edge], b / a
    verdict = "same"
    if low > 1 and ratio > 1 + margin:
        verdict = "SLOWER"
    elif high < 1 and ratio < 1 / (1 + margin):
        verdict = "faster"
    remarks = []
    if not all(row.get("quiet", True) for row in (*before, *after)):
        remarks.append("not quiet")
    if any(row.get("dirty") for row in (*before, *after)):
        remarks.append("dirty")
    return Verdict(key, a, b, ratio, low, high, verdict, ", ".join(remarks))


def load(what: str, results: Path = harness.RESULTS) -> list[Row]:
    """Rows of a file, of a folder, or of a commit among the recorded ones. Raises UsageError where there are none."""
    path = Path(what)
    if path.exists():
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        rows = [row for file in files for row in harness.read(file)]
    else:
        every = [row for file in sorted(results.rglob("*.jsonl")) for row in harness.read(file)]
        rows = [
            row
            for row in every
            if len(what) >= 4
            and (str(row.get("commit", "")).startswith(what) or what.startswith(str(row.get("commit"))))
        ]
    if not rows:
        raise UsageError(f"{what!r} is neither a file with rows nor a commit (4 digits or more) that {results} has")
    return rows


def compare(before: Sequence[Row], after: Sequence[Row], margin: float) -> list[Verdict]:
    """Verdicts for every key on both sides, the worst first."""
    left, right = group(before), group(after)
    verdicts = [judge(key, left[key], right[key], margin) for key in left if key in right]
    return sorted(verdicts, key=lambda verdict: -verdict.ratio)


def show(verdicts: Sequence[Verdict], missing: int) -> None:
    from rich.table import Table

    table = Table("figure", "before", "after", "ratio", "95%", "verdict", "remark")
    colors = {"SLOWER": "red", "faster": "green"}
    for v in verdicts:
        name = " ".join(part for part in v.key[:7] if part)
        color = colors.get(v.verdict, "dim")
        interval = f"{v.low:.3f} to {v.high:.3f}"
        times = harness.human(v.before), harness.human(v.after)
        table.add_row(name, *times, f"{v.ratio:.3f}", interval, f"[{color}]{v.verdict}[/]", v.remark)
    console = harness.console()
    console.print(table)
    counts = {name: sum(v.verdict == name for v in verdicts) for name in ("SLOWER", "faster", "same")}
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"{text}; {missing} figure(s) stand on one side only")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--margin", type=float, default=0.03, help="smaller changes are no regression (default: 0.03)")
    parser.add_argument("--only", default="", help="figures whose name contains this")
    args = parser.parse_args(arguments)
    before, after = load(args.before), load(args.after)
    verdicts = [v for v in compare(before, after, args.margin) if args.only in " ".join(v.key)]
    if not verdicts:
        raise UsageError(
            f"{args.before} and {args.after} have no figure in common: rows belong together when "
            f"{', '.join(harness.KEY)} agree"
        )
    show(verdicts, len(set(group(before)) ^ set(group(after))))
    return int(any(v.verdict == "SLOWER" for v in verdicts))


if __name__ == "__main__":
    harness.run(main)
