"""Runs karpathy/nanochat's own code, so that ours can be compared with it. Written for its commit 92d63d4.

A checkout of it is also called `nanochat` and fixes its dtype at import, so this file is never imported by ours: it is
started as a script in a process of its own, with the checkout first on the path.

    python benchmarks/nanochat_peer.py golden OUT.npz --peer PATH        the golden values of tests/model
    python benchmarks/nanochat_peer.py parity OUT_FOLDER --peer PATH …   weights, batches, losses, validation bpb
    python benchmarks/nanochat_peer.py speed --peer PATH …               seconds per training step, one JSON line

It needs what the checkout itself needs (rustbpe, tiktoken).
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

GOLDEN_MODEL = {
    "sequence_len": 160,
    "vocab_size": 61,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "window_pattern": "SSSL",
}
GOLDEN_STEPS, GOLDEN_HORIZON, GOLDEN_DECAY = 3, 20, 0.28


def schedule(it, horizon, decay):
    """(lr multiplier, Muon momentum, Muon decay) of step `it`, as the checkout's training script computes them."""
    down = round(0.65 * horizon)
    if it < 40:
        lr = (it + 1) / 40
    elif it <= horizon - down:
        lr = 1.0
    else:
        left = (horizon - it) / down
        lr = left + (1 - left) * 0.05
    if it < 400:
        momentum = 0.85 + (0.97 - 0.85) * it / 400
    elif it >= horizon - down:
        momentum = 0.97 + (0.90 - 0.97) * (it - horizon + down) / down
    else:
        momentum = 0.97
    return lr, momentum, decay * 0.5 * (1 + math.cos(math.pi * it / horizon))


def set_schedule(optimizer, it, horizon, decay):
    lr, momentum, wd = schedule(it, horizon, decay)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = momentum, wd


def make_optimizer(model, batch_tokens, decay):
    """With the learning rates of the checkout's training script."""
    scale = (batch_tokens / 2**19) ** 0.5
    return model.setup_optimizer(
        unembedding_lr=0.008 * scale,
        embedding_lr=0.3 * scale,
        scalar_lr=0.5 * scale,
        matrix_lr=0.02 * scale,
        weight_decay=decay,
    )


def golden_weights(model, kind):
    """Fills the model from numpy's frozen generator: "random" everywhere, or "real", shaped like its initialisation."""
    import torch

    width = model.config.n_embd
    layers = model.config.n_layer
    bound = math.sqrt(3 / width)
    fixed = {
        "resid_lambdas": 1.15 - 0.10 * np.arange(layers) / max(layers - 1, 1),
        "x0_lambdas": 0.20 - 0.15 * np.arange(layers) / max(layers - 1, 1),
        "smear_lambda": np.zeros(1),
        "backout_lambda": np.full(1, 0.2),
    }
    with torch.no_grad():
        for number, (name, p) in enumerate(sorted(model.named_parameters())):
            draw = np.random.RandomState(1000 + number)
            if kind == "random":
                value = draw.standard_normal(p.shape) * (0.3 if p.dim() == 1 else 0.8 / math.sqrt(p.shape[-1]))
                value += 1.0 if name == "resid_lambdas" else 0.0
            elif name in fixed:
                value = fixed[name]
            elif "wte" in name:
                value = draw.standard_normal(p.shape) * 0.8
            elif "lm_head" in name:
                value = draw.standard_normal(p.shape) * 0.001
            elif "c_proj" in name:
                value = np.zeros(p.shape)
            elif "gate" in name:
                value = draw.uniform(0, 0.02, p.shape)
            else:
                value = draw.uniform(-bound, bound, p.shape) * (0.4 if "c_fc" in name else 1.0)
            p.copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))


def golden(args):
    import torch

    from nanochat.gpt import GPT, GPTConfig

    config = GPTConfig(**GOLDEN_MODEL)
    tokens = np.random.RandomState(7).randint(0, config.vocab_size, (GOLDEN_STEPS, 2, config.sequence_len + 1))
    tokens[:, 0, 5:9] = 3  # a repeated token, so that embedding gradients add up
    out = {"tokens": tokens.astype(np.int16)}
    for kind in ("random", "real"):
        model = GPT(config)
        model.init_weights()
        golden_weights(model, kind)
        for name, p in model.named_parameters():
            out[f"{kind}/weights/{name}"] = p.detach().numpy().copy()
        optimizer = make_optimizer(model, 2**19, GOLDEN_DECAY)
        losses = []
        for it in range(GOLDEN_STEPS):
            batch = torch.from_numpy(tokens[it]).long()
            x, y = batch[:, :-1], batch[:, 1:].clone()
            y[1, 10:20] = -1
            loss = model(x, y)
            loss.backward()
            losses.append(loss.item())
            if it == 0:
                out[f"{kind}/logits"] = model(x).detach().numpy()[:, ::7]
                for name, p in model.named_parameters():
                    out[f"{kind}/grads/{name}"] = p.grad.numpy().copy()
            set_schedule(optimizer, it, GOLDEN_HORIZON, GOLDEN_DECAY)
            optimizer.step()
            model.zero_grad(set_to_none=True)
        out[f"{kind}/losses"] = np.array(losses)
        for name, p in model.named_parameters():
            out[f"{kind}/after/{name}"] = p.detach().numpy().copy()
    # the weights follow from the generator above, but a file that says what it tested is easier to trust
    np.savez_compressed(args.out, **out)
    print(f"wrote {args.out}")


def build(args):
    import torch

    from nanochat.gpt import GPT, GPTConfig

    width = -(-args.depth * 64 // args.head_dim) * args.head_dim
    heads = width // args.head_dim
    config = GPTConfig(
        sequence_len=args.seq_len,
        vocab_size=args.vocab_size,
        n_layer=args.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
        window_pattern=args.window_pattern,
    )
    torch.manual_seed(42)
    model = GPT(config)
    model.init_weights()
    return model


def parity(args):
    """Trains with the checkout's model, loader, optimizer and evaluation; writes all it takes to repeat it."""
    import torch

    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as loader
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.tokenizer import get_token_bytes, get_tokenizer

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = get_tokenizer()
    model = build(args)
    np.savez(out / "weights.npz", **{name: p.detach().numpy() for name, p in model.named_parameters()})
    optimizer = make_optimizer(model, args.rows * args.seq_len, args.decay)
    batches = loader(tokenizer, args.rows, args.seq_len, "train", device="cpu")
    losses, seen = [], []
    for it in range(args.steps):
        x, y = next(batches)
        seen.append(torch.cat([x, y[:, -1:]], dim=1).numpy().astype(np.uint16))
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
        set_schedule(optimizer, it, args.steps, args.decay)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        print(f"peer step {it} loss {losses[-1]:.6f}", flush=True)
    val = loader(tokenizer, args.rows, args.seq_len, "val", device="cpu")
    held_out = [tuple(t.clone() for t in next(val)) for _ in range(args.val_steps)]
    bpb = evaluate_bpb(model, held_out, args.val_steps, get_token_bytes())
    np.savez_compressed(
        out / "run.npz",
        batches=np.stack(seen),
        losses=np.array(losses),
        val=np.stack([torch.cat([x, y[:, -1:]], dim=1).numpy() for x, y in held_out]).astype(np.uint16),
        bpb=bpb,
        token_bytes=get_token_bytes().numpy(),
    )


def speed(args):
    """Seconds per step on random tokens, compiled as the checkout compiles; the first step apart."""
    import torch

    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args).to(device)
    compiled = torch.compile(model, dynamic=False)
    optimizer = make_optimizer(model, args.rows * args.seq_len, args.decay)
    draw = torch.Generator().manual_seed(0)
    seconds = []
    for it in range(args.steps):
        tokens = torch.randint(0, args.vocab_size, (args.rows, args.seq_len + 1), generator=draw).to(device)
        begin = time.perf_counter()
        loss = compiled(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        set_schedule(optimizer, it, 1000, args.decay)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize() if device == "cuda" else None
        seconds.append(time.perf_counter() - begin)
        if it == 0:
            first = time.perf_counter() - started
    print(json.dumps({"first_step_s": first, "step_s": seconds[1:], "loss": loss.item()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["golden", "parity", "speed"])
    parser.add_argument("out", nargs="?")
    parser.add_argument("--peer", required=True, help="a checkout of karpathy/nanochat")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--window-pattern", default="SSSL")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--val-steps", type=int, default=40)
    parser.add_argument("--decay", type=float, default=0.28)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    os.environ["NANOCHAT_DTYPE"] = args.dtype
    if args.task != "speed":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager: values are compared, and compiling costs minutes
    sys.path.insert(0, str(Path(args.peer).resolve()))
    {"golden": golden, "parity": parity, "speed": speed}[args.task](args)


if __name__ == "__main__":
    main()
