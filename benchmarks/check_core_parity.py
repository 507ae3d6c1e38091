"""Asks this project and karpathy/nanochat's own evaluation the CORE questions with the same weights, in float32.

    python benchmarks/check_core_parity.py --peer nanochat=PATH --data BUNDLE --checkpoint FOLDER [--limit 50]

Both read the same bundle; the weights go over under the checkout's names, our vocabulary as its pickled tokenizer.
Every verdict is compared. Where two differ, the margin of our decision is shown: a choice between losses that agree to
rounding is a tie, which batching decides, and is counted apart from a real difference.
Exit code 1 if a real difference is found.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken
import torch

from nanochat.evaluation import core
from nanochat.inference.loading import default_tokenizer_dir
from nanochat.model import checkpoint
from nanochat.model.compat import our_name
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat_kernels import KernelPlan

TIE = 1e-5  # nats between the best two choices, or of a token's lead over the next


def to_nanochat_state(model: GPT) -> dict[str, torch.Tensor]:
    """Our weights under karpathy/nanochat's names: the inverse of model.compat.state_from_nanochat."""
    layers = range(model.config.layers)
    theirs = ["transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas", "smear_gate.weight"]
    theirs += ["smear_lambda", "backout_lambda", *(f"value_embeds.{i}.weight" for i in layers)]
    parts = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "attn.ve_gate", "mlp.c_fc", "mlp.c_proj"]
    theirs += [f"transformer.h.{i}.{part}.weight" for i in layers for part in parts]
    ours = model.state_dict()
    state = {name: ours[our_name(name)] for name in theirs if our_name(name) in ours}
    assert len(state) == len(ours), f"not mapped: {set(ours) - set(map(our_name, state))}"
    return state


def prepare(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """What nanochat_core_peer.py reads."""
    config = model.config
    settings = {
        "sequence_len": config.seq_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_kv_head": config.kv_heads,
        "n_embd": config.width,
        "window_pattern": config.window_pattern,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(to_nanochat_state(model), folder / "weights.pt")
    encoding = tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks(), special_tokens=dict(tokenizer.specials)
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


@torch.inference_mode()
def margin(model: GPT, tokenizer: Tokenizer, task: core.CoreTask, limit: int | None, index: int) -> float:
    """How far our verdict on one example is from another, in nats, computed without batching or sharing."""
    examples = core.load_examples(task, limit)
    texts = core.texts_of(task, examples[index], core.shots_for(examples, index, task.shots))
    prompt = core.prompt_of(task, [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts])
    if task.kind == "language_modeling":
        [(start, end)], row = prompt.spans, torch.tensor(prompt.rows)
        leads = model(row)[0, start - 1 : end - 1].topk(2).values
        return float((leads[:, 0] - leads[:, 1]).min())
    single = [core.Prompt([row], [span]) for row, span in zip(prompt.rows, prompt.spans, strict=True)]
    losses = sorted(rows[0][0] for rows in core.score(model, single))
    return losses[1] - losses[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="nanochat=PATH of a checkout of karpathy/nanochat")
    parser.add_argument("--data", type=Path, required=True, help="the evaluation bundle")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder of base_checkpoints")
    parser.add_argument("--tokenizer", type=Path, default=None, help="default: the one in the base folder")
    parser.add_argument("--limit", type=int, default=None, help="examples per task (default: all)")
    parser.add_argument("--tasks", default="", help="labels, separated by commas (default: all)")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer or default_tokenizer_dir())
    plan = KernelPlan.resolve(args.kernels, device="cpu", dtype=torch.float32, mode="prefill")
    model, _ = checkpoint.load_model(args.checkpoint, plan=plan)
    wanted = set(filter(None, args.tasks.split(",")))
    tasks, missing = core.load_tasks(args.data)
    ours, seconds = {}, {}
    for task in tasks:
        if wanted and task.label not in wanted:
            continue
        begin = time.perf_counter()
        ours[task.label] = core.evaluate_task(model, tokenizer, task, args.limit, args.batch_tokens)
        seconds[task.label] = time.perf_counter() - begin
        print(f"ours {task.label}: {ours[task.label].accuracy:.4f} in {seconds[task.label]:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, model, tokenizer)
        script, out = Path(__file__).with_name("nanochat_core_peer.py"), folder / "verdicts.json"
        command = [sys.executable, str(script), str(folder), str(args.data), str(out)]
        command += ["--peer", args.peer.partition("=")[2] or args.peer, "--limit", str(args.limit or 0)]
        subprocess.run([*command, "--tasks", args.tasks], check=True)
        peer = json.loads(out.read_text())
    differences = ties = examples = 0
    for task in tasks:
        if task.label not in ours:
            continue
        result, theirs = ours[task.label].correct, peer["verdicts"][task.label]
        assert len(result) == len(theirs)
        examples += len(result)
        for index in (i for i, pair in enumerate(zip(result, theirs, strict=True)) if pair[0] != pair[1]):
            gap = margin(model, tokenizer, task, args.limit, index)
            ties, differences = ties + (gap < TIE), differences + (gap >= TIE)
            kind = "a tie" if gap < TIE else "DIFFERENT"
            print(f"{task.label} {index}: ours {result[index]}, peer {theirs[index]}, margin {gap:.2e} nats: {kind}")
    equal = sum(result.correct == peer["verdicts"][label] for label, result in ours.items())
    print(
        f"{examples} examples: {equal} of {len(ours)} tasks equal answer by answer, {ties} ties, {differences} errors"
    )
    print(f"tasks that the bundle lacks: {', '.join(missing) or 'none'}")
    print(f"time: ours {sum(seconds.values()):.0f} s, peer {sum(peer['seconds'].values()):.0f} s")
    print("PASS" if not differences else "FAIL")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
