"""A tokenizer of bytes and small models with weights that matter (an initialised model's projections are zero)."""

import codecs

import pytest
import torch

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

NAMES = "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"


class ByteTokenizer:
    """One token per byte, then the special tokens: what the engine asks of a tokenizer, and no more."""

    def __init__(self) -> None:
        self.special_tokens = {f"<|{name}|>": 256 + i for i, name in enumerate(NAMES.split())}
        self.vocab_size = 256 + len(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def stream_decoder(self):
        return _Decoder()


class _Decoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token]))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def random_model(architecture: str = "2026", kv_heads: int = 2, seed: int = 0) -> GPT:
    """Two windows (128 and 512), three layers, every parameter nonzero; logits spread over several nats."""
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
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def make_model():
    return random_model
