"""Predicted steps beside measured ones, and what training would take on H100s.

    nanochat bench estimator [--depth 4 --rows 8 --seq-len 512]    this machine, from its rows of `kernels` and `train`
    nanochat bench estimator --machine h100                        1, 8 and more H100s, from rows where there are some

For the machine at hand it reads the newest rows under benchmarks/results/<device>: those of `bench kernels --step dN`
give the prediction, those of `bench train` for the same work the measurement, and the error is printed and recorded.
For H100s it uses rows recorded on one, and says what was assumed where there are none.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from nanochat.errors import NanochatError
from nanochat.measure import estimator, machine
from nanochat.measure.estimator import Prediction
from nanochat.model import costs
from nanochat.model.config import GPTConfig
from nanochat_kernels import KernelPlan

Row = dict[str, Any]
RANKS = (1, 8, 16, 64)
FLEET = ((12, 12.0, 32), (20, 12.0, 16), (24, 8.0, 16), (26, 8.0, 16))  # depth, tokens per parameter, rows per pass


def read_all(folder: Path) -> list[Row]:
    """Every row under a folder, oldest first."""
    rows = [row for path in sorted(folder.rglob("*.jsonl")) for row in harness.read(path)] if folder.exists() else []
    return sorted(rows, key=lambda row: str(row.get("date", "")))


def measured(rows: list[Row], config: GPTConfig, args: argparse.Namespace, dtype: str) -> Row | None:
    """The newest step of `bench train` for the same work on one rank."""
    wanted = {"depth": config.layers, "rows": args.rows, "seq_len": args.seq_len, "vocab_size": args.vocab_size}
    found = [
        row
        for row in rows
        if row.get("work") == "train_step"
        and str(row.get("backend", "")).split(" ")[0] == args.kernels
        and row.get("dtype") == dtype
        and row.get("ranks") == 1
        and row.get("threads") == torch.get_num_threads()
        and {name: row.get("config", {}).get(name) for name in wanted} == wanted
    ]
    return found[-1] if found else None


def this_machine(device: torch.device, ceilings: machine.Ceilings) -> estimator.Machine:
    peak = costs.peak_bf16_flops(device)
    if device.type != "cuda":
        return estimator.Machine("this CPU", ceilings, peak)
    properties = torch.cuda.get_device_properties(device)
    return estimator.Machine(properties.name, ceilings, peak, properties.total_memory, estimator.H100.link)


def show_parts(prediction: Prediction) -> None:
    from rich.table import Table

    table = Table("op", "case", "count", "per step", "share", "source", title=f"the step on {prediction.machine.name}")
    total = sum(part.seconds for part in prediction.parts)
    for part in sorted(prediction.parts, key=lambda part: -part.seconds):
        entry = part.entry
        cells = (entry.op.name, entry.case.name, str(entry.count), harness.human(part.seconds))
        table.add_row(*cells, f"{part.seconds / total:.1%}", part.source)
    harness.console().print(table)


def predict_here(args: argparse.Namespace, rows: harness.Rows, known: list[Row]) -> float | None:
    """Prints and records the prediction for the machine at hand; returns the error against the measurement, if any."""
    device = rows.device
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    config = GPTConfig.from_depth(args.depth, args.vocab_size, args.seq_len)
    plan = KernelPlan.resolve(args.kernels, device=device, dtype=getattr(torch, dtype), mode=args.mode)
    same = [row for row in known if row.get("threads") == torch.get_num_threads()]
    prediction = estimator.predict(
        config, this_machine(device, rows.ceilings), same, batch_rows=args.rows, dtype=getattr(torch, dtype),
        mode=args.mode, backends={name: choice.backend for name, choice in plan.choices.items()},
    )  # fmt: skip
    show_parts(prediction)
    truth = measured(known, config, args, dtype)
    unit = {"tokens_per_s": prediction.tokens_per_second, "from_measured_rows": prediction.measured_share()}
    error = prediction.step / truth["median"] - 1 if truth else None
    if truth and error is not None:
        unit |= {"measured_s": truth["median"], "error": error}
    rows.add(
        timing=harness.Timing([prediction.step]), unit=unit, work="prediction", dtype=dtype, backend=args.kernels,
        case=f"d{args.depth} v{args.vocab_size} t{args.seq_len} b{args.rows}", ranks=1,
    )  # fmt: skip
    say = harness.console().print
    say(f"predicted {harness.human(prediction.step)}, {prediction.tokens_per_second:,.0f} tokens/s; "
        f"{prediction.measured_share():.0%} of it from rows at these shapes; memory {prediction.memory}")  # fmt: skip
    if truth is None:
        say(f"no measured step of this work on {torch.get_num_threads()} thread(s): nanochat bench train makes one")
    else:
        say(f"measured {harness.human(truth['median'])} ({truth['date']}): the prediction is {error:+.1%} off")
    return error


def show_fleet(depths: tuple[tuple[int, float, int], ...], known: list[Row], ceilings: machine.Ceilings | None) -> None:
    """Step, MFU, communication, memory and hours for GPUs in numbers."""
    from dataclasses import replace

    from rich.table import Table

    gpu = estimator.H100 if ceilings is None else replace(estimator.H100, name="H100", ceilings=ceilings)
    headers = ("model", "precision", "GPUs", "step", "tokens/s", "MFU", "sent per step", "GB", "tokens", "hours")
    table = Table(*headers, title=f"predicted for {gpu.name}")
    for depth, ratio, batch_rows in depths:
        for fp8 in (False, True):
            memory = None
            for ranks in RANKS:
                prediction, horizon, seconds = estimator.predict_run(
                    depth, gpu, known, ratio=ratio, ranks=ranks, batch_rows=batch_rows, fp8=fp8,
                    mode="train-compiled", with_memory=memory is None,
                )  # fmt: skip
                memory = prediction.memory or memory
                mark = " *" if (depth, ratio) == (estimator.GPT2_DEPTH, estimator.GPT2_RATIO) else ""
                table.add_row(
                    f"d{depth} ×{ratio:g}{mark}", "fp8" if fp8 else "bf16", str(ranks), harness.human(prediction.step),
                    f"{prediction.tokens_per_second / 1e3:,.0f}k", f"{prediction.mfu:.0%}",
                    f"{prediction.communication_bytes / 1e9:.1f} GB", f"{memory.peak / 1e9:.0f}" if memory else "",
                    f"{horizon.tokens / 1e9:.2f}B", f"{seconds / 3600:.2f}",
                )  # fmt: skip
    harness.console().print(table)
    harness.console().print(
        "* reaches GPT-2's CORE by published runs. ×N: training tokens per parameter. Memory: of one GPU at its "
        "smallest number of ranks, eager; compiled blocks keep less. Several nodes: 400 Gbit/s per GPU."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=["here", "h100", "both"], default="both")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--mode", default="train-eager", choices=["train-eager", "train-compiled"])
    parser.add_argument("--limit", type=float, help="exit 1 when the error against the measured step is larger: 0.15")
    parser.add_argument("--results", type=Path, help="folder with rows (default: benchmarks/results/<device>)")
    parser.add_argument("--out", help="file or folder for the prediction's row (default: as --results)")
    args = parser.parse_args()
    device = harness.pick_device()
    error = None
    if args.machine != "h100":
        rows = harness.Rows("estimator", device, args.out or args.results)
        error = predict_here(args, rows, read_all(args.results or rows.path.parent))
    if args.machine != "here":
        hopper = [path for path in harness.RESULTS.glob("*h100*") if path.is_dir()]
        known = [row for path in hopper for row in read_all(path)]
        show_fleet(FLEET, known, None)
    if args.limit is not None:
        if error is None:
            raise NanochatError("there is no measured step to hold the prediction against")
        return int(abs(error) > args.limit)
    return 0


if __name__ == "__main__":
    harness.run(main)
