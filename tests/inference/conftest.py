"""A tokenizer whose tokens are bytes, and small models whose weights all matter (fresh ones have zero projections)."""

import pytest
import torch

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer


def random_model(architecture: str = "2026", kv_heads: int = 2, seed: int = 0) -> GPT:
    """Two windows (128 and 512), four layers, every parameter nonzero; logits spread over several nats."""
    config = GPTConfig(
        vocab_size=265, seq_len=512, layers=4, width=64, heads=4, kv_heads=kv_heads, head_dim=16,
        window_pattern="SSSL", architecture=architecture,
    )  # fmt: skip
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 1.0 if name.endswith(("wte.weight", "lm_head.weight")) else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.startswith("smear_scale"):
                parameter.fill_(0.7)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte b is token b; the special tokens are 256 to 264."""
    pytest.importorskip("nanochat_rustbpe", reason="the Rust tokenizer is not built")
    return Tokenizer.from_ranks({bytes([b]): b for b in range(256)})


@pytest.fixture(scope="session")
def make_model():
    return random_model
