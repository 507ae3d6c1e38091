"""A tokenizer whose tokens are bytes, a small model whose weights all matter, and the folder of real data."""

import json
from pathlib import Path

import pytest
import torch

from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte b is token b; the special tokens are 256 to 264."""
    pytest.importorskip("nanochat_rustbpe", reason="the Rust tokenizer is not built")
    return Tokenizer.from_ranks({bytes([b]): b for b in range(256)})


@pytest.fixture(scope="session")
def model() -> GPT:
    """Windows of 128 and 512 tokens."""
    config = GPTConfig(vocab_size=265, seq_len=512, layers=2, width=32, heads=2, kv_heads=1, head_dim=16)
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 1.0 if name.endswith(("wte.weight", "lm_head.weight")) else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def make_bundle():
    """Writes a bundle of two small tasks, of which one has no data, into a folder."""

    def make(folder: Path) -> Path:
        data = folder / "eval_data"
        data.mkdir(parents=True)
        rows = [{"query": f"{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(12)]
        (data / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "core.yaml").write_text(
            "icl_tasks:\n"
            "- {label: choice, dataset_uri: choice.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}\n"
            "- {label: absent, dataset_uri: no.jsonl, num_fewshot: [0], icl_task_type: schema}\n"
        )
        (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,50\nabsent,50\n")
        return folder

    return make
