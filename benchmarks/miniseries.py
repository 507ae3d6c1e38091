"""Table and plot of a series of base models: training time, FLOPs, bits per byte and CORE.

    python benchmarks/miniseries.py TAG...        writes series.md, series.json and series.png in <base dir>/miniseries

Everything is read from the models' checkpoints and evaluations; a model without an evaluation shows dashes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from nanochat.model import checkpoint, costs
from nanochat.model.config import GPTConfig
from nanochat.runtime import base_dir

COLUMNS = {  # key: heading, format
    "tag": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "flops": ("FLOPs", "{:.3g}"),
    "minutes": ("minutes", "{:.1f}"),
    "val_bpb": ("bits per byte", "{:.4f}"),
    "core": ("CORE", "{:.4f}"),
}


def measure(tag: str) -> dict[str, Any]:
    """What one model cost and reached."""
    folder = checkpoint.find("base", tag)
    meta = checkpoint.load_meta(folder)
    config, run = GPTConfig.from_dict(meta["config"]), meta["identity"]
    tokens = meta["step"] * run["batch_tokens"]
    evaluation = folder / f"eval_{meta['step']:06d}.json"
    found = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.exists() else {}
    core, bpb = found.get("core") or {}, found.get("bpb") or {}
    return {
        "tag": tag,
        "depth": config.layers,
        "ratio": run["ratio"],
        "parameters": costs.parameter_counts(config)["total"],
        "tokens": tokens,
        "flops": float(costs.training_flops_per_token(config) * tokens),
        "minutes": meta["loop"]["seconds"] / 60,
        "val_bpb": bpb.get("val", meta.get("val_bpb")),
        "core": core.get("core"),
        "core_label": core.get("label"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, right-aligned but for the names."""
    lines = ["| " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |", "|---" + "|--:" * 6 + "|"]
    for row in rows:
        cells = ("—" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte and CORE against FLOPs and against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for column, (x, x_name) in enumerate((("flops", "training FLOPs"), ("minutes", "training time, minutes"))):
        for line, (y, y_name) in enumerate((("val_bpb", "bits per byte"), ("core", "CORE"))):
            axis, known = axes[line][column], sorted((r[x], r[y], r["tag"]) for r in rows if r[y] is not None)
            axis.plot([k[0] for k in known], [k[1] for k in known], "o", color="tab:blue")
            for across, up, tag in known:
                axis.annotate(tag.removeprefix("series-"), (across, up), xytext=(4, 4), textcoords="offset points")
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            axis.set_xlabel(x_name if line == 1 else "")
            axis.set_ylabel(y_name if column == 0 else "")
    axes[1][0].axhline(0.256525, color="gray", linestyle="--", label="GPT-2")
    axes[1][1].axhline(0.256525, color="gray", linestyle="--")
    axes[1][0].legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tags", nargs="+", metavar="TAG")
    rows = [measure(tag) for tag in parser.parse_args().tags]
    folder = base_dir() / "miniseries"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "series.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (folder / "series.md").write_text(table(rows), encoding="utf-8")
    plot(rows, folder / "series.png")
    print(table(rows) + f"\nwritten to {folder}")


if __name__ == "__main__":
    main()
