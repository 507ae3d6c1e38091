"""Names and settings of karpathy/nanochat: one-to-one, and clear refusals."""

import pytest
import torch

from nanochat.errors import NanochatError
from nanochat.model.compat import (
    config_from_nanochat,
    our_name,
    state_from_nanochat,
    to_nanochat_config,
    to_nanochat_state,
)
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

TODAY = GPTConfig(vocab_size=61, seq_len=64, layers=12, width=32, heads=4, kv_heads=2, head_dim=8)
FIRST = GPTConfig(
    vocab_size=61,
    seq_len=64,
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    window_pattern="L",
    architecture="2025-10",
    bf16_rotary=True,
)


@pytest.mark.parametrize("config", [TODAY, FIRST])
def test_there_and_back(config: GPTConfig) -> None:
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    theirs = to_nanochat_state(model.state_dict(), config)
    assert config_from_nanochat(to_nanochat_config(config), theirs) == config
    back = state_from_nanochat(theirs, config)
    for name, tensor in model.state_dict().items():
        rows = config.vocab_size if name in ("wte.weight", "lm_head.weight") else len(tensor)
        torch.testing.assert_close(back[name][:rows], tensor[:rows], rtol=0, atol=0)
        assert back[name].shape == tensor.shape
    assert theirs["transformer.wte.weight"].size(0) == (64 if config.is_current else 61)


def test_names_of_a_compiled_model_and_of_buffers() -> None:
    assert our_name("_orig_mod.transformer.h.11.attn.c_proj.weight") == "blocks.11.attn.o.weight"
    assert state_from_nanochat({"cos": torch.zeros(1), "lm_head.weight": torch.ones(2, 2)}).keys() == {"lm_head.weight"}


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(NanochatError, match="transformer.h.0.attn.bias"):
        our_name("transformer.h.0.attn.bias")


def test_the_architectures_in_between_are_refused() -> None:
    settings = to_nanochat_config(TODAY)
    with pytest.raises(NanochatError, match="between January and March 2026"):
        config_from_nanochat(settings, {"_orig_mod.resid_lambdas": torch.ones(12)})


@pytest.mark.parametrize("settings", [{}, {"n_head": 0, "n_embd": 8}, {"n_head": "4", "n_embd": 8}])
def test_settings_of_something_else_are_refused(settings: dict) -> None:
    with pytest.raises(NanochatError, match="karpathy/nanochat"):
        config_from_nanochat(settings)


def test_bf16_tables_are_a_setting_of_the_model_not_of_the_compute_dtype() -> None:
    cos, _ = GPT(FIRST).rope(64, torch.device("cpu"))
    assert cos.dtype == torch.float32 and torch.equal(cos, cos.bfloat16().float())
