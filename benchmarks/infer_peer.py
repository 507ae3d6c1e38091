"""Generation by others, timed: a script of its own, started by `nanochat bench infer`, that never imports ours.

    python benchmarks/infer_peer.py nanochat --path PATH …       karpathy/nanochat's Engine (dtype: NANOCHAT_DTYPE)
    python benchmarks/infer_peer.py transformers …               transformers' NanoChat class

Random weights, greedy, the same lengths. Prints one JSON line: seconds to the first token, seconds of every further
step, peak memory. transformers' class is the architecture of October 2025: the same size per layer, without value
embeddings.
"""

import argparse
import json
import os
import resource
import sys
import time


class Words:
    """What the engine asks of a tokenizer; special tokens get ids that no model draws."""

    def encode_special(self, name):
        return 10**9

    def get_bos_token_id(self):
        return 10**9


def nanochat_steps(args):
    sys.path.insert(0, args.path)
    import torch

    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    width = args.depth * 64 + -(args.depth * 64) % 128
    config = GPTConfig(
        sequence_len=args.seq_len, vocab_size=args.vocab_size, n_layer=args.depth, n_head=width // 128,
        n_kv_head=width // 128, n_embd=width,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    engine = Engine(model.to(args.device).eval(), Words())
    prompt = torch.randint(0, args.vocab_size, (args.prompt,)).tolist()

    def run(decode):
        for _ in engine.generate(prompt, num_samples=args.batch, max_tokens=decode, temperature=0.0):
            yield

    return run


def transformers_steps(args):
    import torch
    from transformers import NanoChatConfig, NanoChatForCausalLM

    width = args.depth * 64 + -(args.depth * 64) % 128
    heads = width // 128
    config = NanoChatConfig(
        vocab_size=args.vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=args.depth,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=args.seq_len,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = getattr(torch, os.environ.get("NANOCHAT_DTYPE", "float32"))
    model = NanoChatForCausalLM(config).to(args.device, dtype).eval()
    prompt = torch.randint(0, args.vocab_size, (args.batch, args.prompt)).to(args.device)

    def run(decode):
        ids, cache = prompt, None
        with torch.inference_mode():
            for _ in range(decode):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                ids.tolist()
                yield

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("nanochat", "transformers"))
    parser.add_argument("--path", default="")
    parser.add_argument("--device", default="cpu")
    for name in ("depth", "batch", "prompt", "decode", "vocab-size", "seq-len", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    run = (nanochat_steps if args.kind == "nanochat" else transformers_steps)(args)
    for _ in run(4):  # warm up
        pass
    seconds, last = [], time.perf_counter()
    for _ in run(args.decode):
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"first": seconds[0], "steps": seconds[1:], "peak_rss": peak}))


if __name__ == "__main__":
    main()
