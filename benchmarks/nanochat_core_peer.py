"""Runs karpathy/nanochat's own CORE evaluation on given weights, and writes its verdict on every example as JSON.

    NANOCHAT_BASE_DIR=FOLDER python benchmarks/nanochat_core_peer.py FOLDER BUNDLE OUT.json --peer PATH

FOLDER holds what check_core_parity.py put there: weights.pt under the checkout's names, config.json, and the tokenizer
as the checkout pickles it. In a process of its own: the checkout is also called `nanochat`. Ours is not imported.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path


def tasks_of(bundle):
    import yaml

    for task in yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        path = bundle / "eval_data" / task["dataset_uri"]
        if path.exists():
            meta = {
                "task_type": task["icl_task_type"],
                "num_fewshot": task["num_fewshot"][0],
                "continuation_delimiter": task.get("continuation_delimiter", " "),
            }
            yield task["label"], path, meta


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--tasks", default="")
    args = parser.parse_args()
    os.environ["NANOCHAT_DTYPE"] = "float32"
    os.environ["NANOCHAT_BASE_DIR"] = str(args.folder)
    sys.path.insert(0, str(Path(args.peer).resolve()))

    import torch  # noqa: I001  (of the checkout's modules some have namesakes here)
    from nanochat.core_eval import evaluate_example
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import get_tokenizer

    model = GPT(GPTConfig(**json.loads((args.folder / "config.json").read_text())))
    model.init_weights()
    model.load_state_dict(torch.load(args.folder / "weights.pt", weights_only=True), strict=True)
    model.eval()
    tokenizer = get_tokenizer()
    verdicts, seconds = {}, {}
    for label, path, meta in tasks_of(args.bundle):
        if args.tasks and label not in args.tasks.split(","):
            continue
        with open(path, encoding="utf-8") as file:
            data = [json.loads(line.strip()) for line in file]
        random.Random(1337).shuffle(data)
        data = data[: args.limit] if args.limit else data
        begin = time.perf_counter()
        verdicts[label] = [
            bool(evaluate_example(i, model, tokenizer, data, torch.device("cpu"), meta)) for i in range(len(data))
        ]
        seconds[label] = time.perf_counter() - begin
        accuracy = sum(verdicts[label]) / len(data)
        print(f"peer {label}: {accuracy:.4f} of {len(data)} in {seconds[label]:.1f} s", flush=True)
        args.out.write_text(json.dumps({"verdicts": verdicts, "seconds": seconds}))


if __name__ == "__main__":
    main()
