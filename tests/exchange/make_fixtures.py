"""Writes a tiny checkpoint with karpathy/nanochat's own code, and the greedy tokens that code then gives.

    python tests/exchange/make_fixtures.py CHECKOUT OUT_FOLDER [--optimizer]

Works with its commits 3a5e0bc (October 2025) and 92d63d4 (July 2026). A checkout is also called `nanochat`, so this
runs in a process of its own, with the checkout first on the path; it needs what the checkout needs (rustbpe, tiktoken).
OUT_FOLDER gets the checkpoint as saved there, tokenizer/ and expected.json. fixtures/ beside this file is its output.
"""

import argparse
import json
import os
import sys
from pathlib import Path

PROMPT, NEW = 200, 24
MERGES = 64
SIZES = {"sequence_len": 512, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 24}


def tokenizer():
    """A vocabulary of the bytes, the pairs of lower-case letters that come first, and the nine special tokens."""
    import tiktoken

    from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

    pairs = [bytes([a, b]) for a in b"etaoinsr" for b in b"etaoinsr"][:MERGES]
    ranks = {bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return RustBPETokenizer(
        tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials), "<|bos|>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--optimizer", action="store_true", help="take a training step and save its state as well")
    args = parser.parse_args()
    os.environ |= {"NANOCHAT_BASE_DIR": str(args.out), "NANOCHAT_DTYPE": "float32", "CUDA_VISIBLE_DEVICES": ""}
    sys.path.insert(0, str(args.checkout))

    import torch

    from nanochat.checkpoint_manager import save_checkpoint
    from nanochat.gpt import GPT, GPTConfig

    encoder = tokenizer()
    encoder.save(str(args.out / "tokenizer"))
    current = "window_pattern" in GPTConfig.__dataclass_fields__
    settings = SIZES | {"vocab_size": encoder.get_vocab_size()} | ({"window_pattern": "SL"} if current else {})
    model = GPT(GPTConfig(**settings))
    model.init_weights()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            std = 0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    optimizer = None
    if args.optimizer and current:
        optimizer = model.setup_optimizer()
        ids = torch.randint(0, settings["vocab_size"], (2, 33), generator=generator)
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    meta = {"step": 7, "val_bpb": 1.5, "model_config": settings, "user_config": {"depth": 3}}
    save_checkpoint(str(args.out), 7, model.state_dict(), optimizer and optimizer.state_dict(), meta)

    expected = {"commit": os.popen(f"git -C '{args.checkout}' rev-parse HEAD").read().strip()}
    text = "a test of the tokenizer: it's 2025, nested \n\n  and rare tones; [unique] É世🌍 " * 3
    expected |= {"text": text, "ids": encoder.encode(text)}
    prompt = torch.randint(0, settings["vocab_size"], (PROMPT,), generator=generator).tolist()
    expected["prompt"] = prompt
    if not current:  # its tables are bfloat16 and its matrices float32: it runs under autocast only
        with torch.autocast("cpu", torch.bfloat16):
            expected["tokens_bf16"] = list(model.generate(prompt, NEW, temperature=0.0))
        model.transformer.wte.float()
    expected["tokens"] = list(model.generate(prompt, NEW, temperature=0.0))
    with torch.no_grad():
        expected["logits"] = [round(x, 5) for x in model(torch.tensor([prompt]))[0, -1, :].tolist()]
    (args.out / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()
