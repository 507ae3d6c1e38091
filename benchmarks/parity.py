"""Trains karpathy/nanochat and this project from the same weights on the same batches, and compares what comes out.

    python benchmarks/parity.py --peer nanochat=PATH --data FOLDER_OF_SHARDS --tokenizer FOLDER [--steps 300]

The checkout runs first, in a process and a base folder of its own, with its own loader, model, optimizer and evaluation
(float32, uncompiled). Its initial weights and its batches are then loaded into ours. Two verdicts:
the first 20 losses agree within 1e-5, and the bits per byte on the same validation rows, after all steps, within 0.2%.
Exit code 1 if either does not hold.

Ours runs on the reference kernels, which round as the checkout does. That matters here: at initialization some
gradients are nothing but rounding noise, of which AdamW makes full steps, and small batches (512 tokens) amplify the
difference between two equally exact kernels from 1e-6 to visible within 20 steps.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tiktoken
import torch

from nanochat.model.compat import state_from_nanochat
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.training.optimizer import MuonAdamW, parameter_groups
from nanochat.training.schedules import MUON_DECAY, REFERENCE_BATCH, rates_at
from nanochat_kernels import KernelPlan

LOSSES, LOSS_LIMIT, BPB_LIMIT = 20, 1e-5, 0.002


def prepare_base(folder: Path, data: Path, tokenizer: Tokenizer) -> None:
    """A base folder as the checkout expects it: parquet shards, and our ranks as its pickled tokenizer."""
    shards = folder / "base_data_climbmix"
    shards.mkdir()
    for shard in sorted(data.glob("*.parquet")):
        (shards / shard.name).symlink_to(shard.resolve())
    encoding = tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks(), special_tokens=dict(tokenizer.specials)
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    torch.save(torch.from_numpy(tokenizer.token_bytes()).int(), folder / "tokenizer" / "token_bytes.pt")


def run_peer(peer: Path, base: Path, out: Path, args: argparse.Namespace, vocab_size: int) -> None:
    script = Path(__file__).with_name("nanochat_peer.py")
    command = [sys.executable, str(script), "parity", str(out), "--peer", str(peer), "--vocab-size", str(vocab_size)]
    for name in ("depth", "seq_len", "rows", "steps", "val_steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    subprocess.run(command, check=True, env=os.environ | {"NANOCHAT_BASE_DIR": str(base)})


def bits_per_byte(model: GPT, rows: np.ndarray, token_bytes: torch.Tensor) -> float:
    """rows: (steps, B, T+1) token ids, the validation batches the checkout used."""
    nats = total = 0.0
    with torch.no_grad():
        for batch in torch.from_numpy(rows.astype(np.int64)):
            targets = batch[:, 1:]
            sizes = token_bytes[targets.flatten()]
            losses = model(batch[:, :-1], targets, reduction="none")
            nats += (losses * (sizes > 0)).double().sum().item()
            total += sizes.sum().item()
    return float(nats / np.log(2) / total)


def run_ours(out: Path, args: argparse.Namespace, vocab_size: int) -> tuple[list[float], float]:
    cpu, run = torch.device("cpu"), np.load(out / "run.npz")
    config = GPTConfig.from_depth(args.depth, vocab_size, args.seq_len)
    plan = KernelPlan.resolve(args.kernels, device=cpu, dtype=torch.float32, mode="train-eager")
    model = GPT(config, plan)
    with np.load(out / "weights.npz") as weights:
        model.load_state_dict(state_from_nanochat({name: torch.from_numpy(weights[name]) for name in weights.files}))
    parameters = dict(model.named_parameters())
    lr_scale = (args.rows * args.seq_len / REFERENCE_BATCH) ** 0.5
    groups = parameter_groups(parameters, config.width, lr_scale, MUON_DECAY)
    optimizer = MuonAdamW(parameters, groups, plan, Runtime(cpu, torch.float32))
    losses = []
    for step, tokens in enumerate(run["batches"]):
        batch = torch.from_numpy(tokens.astype(np.int64))
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.step(rates_at(step, args.steps))
        print(f"ours step {step} loss {losses[-1]:.6f} (peer {run['losses'][step]:.6f})", flush=True)
    return losses, bits_per_byte(model, run["val"], torch.from_numpy(run["token_bytes"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="nanochat=PATH of a checkout of karpathy/nanochat")
    parser.add_argument("--data", required=True, type=Path, help="folder of parquet shards, the last for validation")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder that `nanochat tok-train` wrote")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--val-steps", type=int, default=40)
    parser.add_argument("--kernels", default="torch", help="ours; other kernels round differently, see above")
    parser.add_argument("--keep", type=Path, help="folder for what the checkout did: found there, it is not run again")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base"), args.keep or Path(folder, "out")
        if not (out / "run.npz").exists():
            base.mkdir()
            prepare_base(base, args.data, tokenizer)
            run_peer(Path(args.peer.removeprefix("nanochat=")), base, out, args, tokenizer.vocab_size)
        losses, bpb = run_ours(out, args, tokenizer.vocab_size)
        run = np.load(out / "run.npz")
        worst = float(np.abs(np.array(losses[:LOSSES]) - run["losses"][:LOSSES]).max())
        apart = abs(bpb / float(run["bpb"]) - 1)
    print(f"largest difference of the first {min(LOSSES, args.steps)} losses: {worst:.2e} (limit {LOSS_LIMIT:g})")
    print(
        f"validation bpb after {args.steps} steps: ours {bpb:.6f}, peer {float(run['bpb']):.6f}, apart by {apart:.3%}"
    )
    return 0 if worst <= LOSS_LIMIT and apart <= BPB_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
