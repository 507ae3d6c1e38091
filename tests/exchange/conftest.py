"""Checkpoints that karpathy/nanochat wrote (make_fixtures.py), and models of ours to export."""

import json
from pathlib import Path

import pytest
import torch

from nanochat.exchange.upstream import read_tokenizer
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

FIXTURES = Path(__file__).with_name("fixtures")


@pytest.fixture(params=["2025-10", "2026-07"])
def theirs(request: pytest.FixtureRequest) -> tuple[Path, dict]:
    """A folder with a checkpoint of theirs, and what their code gives for it."""
    folder = FIXTURES / request.param
    return folder, json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return read_tokenizer(FIXTURES / "2026-07/tokenizer/tokenizer.pkl")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def make_model(architecture: str, vocab_size: int = 329, seq_len: int = 512) -> GPT:
    """Every parameter random, windows shorter than the texts, grouped heads, a vocabulary that needs padding."""
    config = GPTConfig(
        vocab_size=vocab_size,
        seq_len=seq_len,
        layers=5,
        width=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        window_pattern="SL",
        architecture=architecture,  # type: ignore[arg-type]
    )
    model, generator = GPT(config), torch.Generator().manual_seed(3)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5))
    return model


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The plainest loop there is: no cache, the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
