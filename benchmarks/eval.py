"""CORE evaluation: examples per second, alone or beside karpathy/nanochat's own evaluation of the same weights.

    nanochat bench eval [--bundle FOLDER] [--depth 4] [--limit 20] [--peer nanochat=PATH]

The bundle is CORE's (core.yaml, eval_data/); without one, questions of the built-in tasks' kind are made up: multiple
choice with four endings behind ten shared examples, which is CORE's common shape and what prefix sharing is about. The
model has random weights, which costs the same as trained ones. Rows give seconds per example, tokenizing included, and
beside a peer how many of the verdicts are equal.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from nanochat.evaluation import core
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat_kernels import KernelPlan

WORDS = "time year people way day man thing woman life child world school state family student group country".split()


def write_bundle(folder: Path, examples: int = 40, shots: int = 10, seed: int = 0) -> None:
    """A bundle with one multiple-choice and one language-modeling task of made-up sentences."""
    draw = random.Random(seed)

    def sentence(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    tasks = {
        "choices": ("multiple_choice", [
            {"query": sentence(24) + "?", "choices": [sentence(6) for _ in range(4)], "gold": draw.randrange(4)}
            for _ in range(examples)
        ]),
        "endings": ("language_modeling", [
            {"context": sentence(40), "continuation": sentence(3)} for _ in range(examples)
        ]),
    }  # fmt: skip
    (folder / "eval_data").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for label, (kind, rows) in tasks.items():
        path = f"{label}.jsonl"
        (folder / "eval_data" / path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lines += [
            f"- label: {label}",
            f"  dataset_uri: {path}",
            f"  num_fewshot: [{shots}]",
            f"  icl_task_type: {kind}",
        ]
        lines += ['  continuation_delimiter: "\\nAnswer: "'] if kind == "multiple_choice" else []
    (folder / "core.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    baselines = "".join(f"{label},0\n" for label in tasks)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + baselines, encoding="utf-8")


def make_model(args: argparse.Namespace, vocab_size: int, device: torch.device) -> GPT:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = KernelPlan.resolve(args.kernels, device=device, dtype=dtype, mode="prefill")
    model = GPT(GPTConfig.from_depth(args.depth, vocab_size, args.seq_len), plan, dtype).to(device)
    draw = torch.Generator(device).manual_seed(0)
    model.init_weights(draw)
    with torch.no_grad():  # none is left at zero, so that verdicts depend on every layer
        for name, weight in model.named_parameters():
            if name.endswith(("attn.o.weight", "mlp.proj.weight", "lm_head.weight")):
                weight.normal_(0.0, weight.size(1) ** -0.5, generator=draw)
    return model.eval()


def ours(model: GPT, tokenizer: Tokenizer, bundle: Path, args: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        seconds, verdicts = {}, {}
        for task in core.load_tasks(bundle)[0]:
            begin = time.perf_counter()
            verdicts[task.label] = core.evaluate_task(model, tokenizer, task, args.limit, args.batch_tokens).correct
            seconds[task.label] = time.perf_counter() - begin
        return {"seconds": seconds, "verdicts": verdicts}

    return run


def theirs(model: GPT, tokenizer: Tokenizer, bundle: Path, args: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """karpathy/nanochat's evaluation of the same weights, in a process of its own."""
    from benchmarks.check_core_parity import prepare

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            prepare(folder, model, tokenizer)
            script, out = Path(__file__).with_name("nanochat_core_peer.py"), folder / "verdicts.json"
            command = [sys.executable, str(script), str(folder), str(bundle), str(out)]
            command += ["--peer", args.peer.removeprefix("nanochat="), "--limit", str(args.limit)]
            harness.run_process(command)
            return json.loads(out.read_text(encoding="utf-8"))

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="CORE's bundle (default: two made-up tasks)")
    parser.add_argument("--tokenizer", type=Path, help="default: one of 2,048 trained on the built-in corpus")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=20, help="examples per task")
    parser.add_argument("--batch-tokens", type=int, default=0, help="read together; 0 = what suits the device")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", help="nanochat=PATH of a checkout of karpathy/nanochat (a CPU, float32)")
    parser.add_argument("--out", help="file or folder for the rows (default: benchmarks/results/<device>)")
    args = parser.parse_args()
    device = harness.pick_device()
    rows = harness.Rows("eval", device, args.out)
    with tempfile.TemporaryDirectory() as temporary:
        bundle = args.bundle or Path(temporary) / "bundle"
        if args.bundle is None:
            write_bundle(bundle)
        if args.tokenizer:
            tokenizer = Tokenizer.load(args.tokenizer)
        else:
            from nanochat.data.corpus import open_corpus

            tokenizer = Tokenizer.train(open_corpus(harness.corpus_folder(None)).documents("train"), 2048)
        model = make_model(args, tokenizer.vocab_size, device)
        sides = {"ours": ours(model, tokenizer, bundle, args)}
        if args.peer:
            sides["nanochat"] = theirs(model, tokenizer, bundle, args)
        runs = harness.interleave(sides, args.rounds)
    counts = {label: len(verdicts) for label, verdicts in runs["ours"][-1]["verdicts"].items()}
    for name, done in runs.items():
        each = [sum(run["seconds"].values()) / sum(counts.values()) for run in done]
        equal = {}
        if name != "ours":
            pairs = [(done[-1]["verdicts"][label], runs["ours"][-1]["verdicts"][label]) for label in counts]
            equal["equal_verdicts"] = sum(a == b for theirs, mine in pairs for a, b in zip(theirs, mine, strict=True))
            harness.say(f"{equal['equal_verdicts']} of {sum(counts.values())} verdicts equal those of {name}")
        rows.add(
            timing=harness.Timing(each), unit={"examples_per_s": 1 / harness.Timing(each).median}, work="core",
            case=f"d{args.depth} {args.bundle.name if args.bundle else 'made up'} limit {args.limit}",
            backend=args.kernels if name == "ours" else None, peer=None if name == "ours" else name,
            dtype=str(model.dtype).removeprefix("torch."), tasks=done[-1]["seconds"], **equal,
        )  # fmt: skip
    rows.table(("examples_per_s",))
    return 0


if __name__ == "__main__":
    harness.run(main)
