"""The model against golden values of karpathy/nanochat (benchmarks/nanochat_peer.py golden), and its promises."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.errors import UsageError
from nanochat.inference.kv_cache import KVCache
from nanochat.model.compat import our_name, state_from_nanochat
from nanochat.model.config import GPTConfig
from nanochat.model.costs import parameter_counts
from nanochat.model.gpt import GPT
from nanochat_kernels import KernelPlan

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
GOLDEN_CONFIG = GPTConfig(vocab_size=61, seq_len=160, layers=3, width=32, heads=4, kv_heads=2, head_dim=8)
TINY = GPTConfig(vocab_size=61, seq_len=300, layers=4, width=32, heads=4, kv_heads=2, head_dim=8)


def golden_tensors(prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(GOLDEN[name]) for name in GOLDEN.files if name.startswith(prefix)
    }


def golden_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(GOLDEN["tokens"][step]).long()
    targets = tokens[:, 1:].clone()
    targets[1, 10:20] = -1
    return tokens[:, :-1], targets


def golden_model(kind: str, plan: KernelPlan | None = None) -> GPT:
    model = GPT(GOLDEN_CONFIG, plan)
    model.load_state_dict(state_from_nanochat(golden_tensors(f"{kind}/weights/")))
    return model


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Every parameter random, so that no path is silent as it is at initialisation."""
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model


def close(ours: torch.Tensor, golden: torch.Tensor, relative: float) -> None:
    """Largest error against the largest value: rounding differs per element, not per tensor."""
    scale = golden.abs().max().clamp_min(1e-12)
    assert ((ours - golden).abs().max() / scale).item() <= relative


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_logits_loss_and_gradients_equal_the_original(kind: str, kernels: str) -> None:
    plan = KernelPlan.resolve(kernels, device=torch.device("cpu"), dtype=torch.float32, mode="train-eager")
    model = golden_model(kind, plan)
    x, y = golden_batch(0)
    close(model(x)[:, ::7], torch.from_numpy(GOLDEN[f"{kind}/logits"]), 5e-6)
    loss = model(x, y)
    assert abs(loss.item() - GOLDEN[f"{kind}/losses"][0]) <= 2e-6
    loss.backward()
    golden = {our_name(name): grad for name, grad in golden_tensors(f"{kind}/grads/").items()}
    ours = dict(model.named_parameters())
    assert golden.keys() == ours.keys()
    for name, grad in golden.items():
        if grad.abs().max() < 1e-9:
            assert ours[name].grad.abs().max() < 1e-9, name
        else:
            close(ours[name].grad, grad, 2e-5)


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("tail", [1, 7, 100, 999])
def test_the_last_positions_alone_are_those_of_the_whole(kernels: str, tail: int) -> None:
    model = random_model(TINY)
    whole = GPT(TINY, KernelPlan.resolve(kernels, dtype=torch.float32, mode="prefill"))
    whole.load_state_dict(model.state_dict())
    idx = torch.randint(0, 61, (2, 260), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole.hidden(idx)
        torch.testing.assert_close(whole.hidden(idx, tail=tail), expected[:, -tail:], rtol=0, atol=2e-5)
        cache = KVCache(TINY, 2, 300)
        whole.hidden(idx[:, :230], cache, tail=1)
        cache.advance(idx[:, :230])
        rest = min(tail, 30)
        torch.testing.assert_close(whole.hidden(idx[:, 230:], cache, tail=tail), expected[:, -rest:], rtol=0, atol=2e-5)
    with pytest.raises(UsageError, match="tail is 0"):
        model.hidden(idx, tail=0)


def test_a_position_depends_on_nothing_after_it() -> None:
    model = random_model(TINY)
    idx = torch.randint(0, 61, (1, 260), generator=torch.Generator().manual_seed(1))
    changed = idx.clone()
    changed[0, 200:] = (changed[0, 200:] + 1) % 61
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :200], after[:, :200])
    assert not torch.allclose(before[:, 200:], after[:, 200:])


def test_a_short_window_hides_what_lies_further_back() -> None:
    short_only = GPTConfig(
        vocab_size=61, seq_len=300, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, window_pattern="S"
    )
    assert short_only.windows == (128, 300)
    model = random_model(short_only)
    q = torch.randn(1, 300, 4, 8)
    k, v = torch.randn(1, 300, 4, 8), torch.randn(1, 300, 4, 8)
    base = model.plan.attention(q, k, v, 128)
    k2 = k.clone()
    k2[:, :100] += 1.0
    moved = model.plan.attention(q, k2, v, 128)
    torch.testing.assert_close(base[:, 228:], moved[:, 228:])  # position 228 sees 100 … 228
    assert not torch.allclose(base[:, 227], moved[:, 227])  # position 227 still sees 99


def test_parameters_are_what_the_costs_say() -> None:
    for config in (TINY, GOLDEN_CONFIG, GPTConfig.from_depth(2, 1000, architecture="2025-10")):
        with torch.device("meta"):
            model = GPT(config)
        assert sum(p.numel() for p in model.parameters()) == parameter_counts(config)["total"]


def test_initialisation_is_a_silent_identity() -> None:
    model = GPT(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    x = torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(1))
    loss = model(x, x.roll(-1, 1))
    assert abs(loss.item() - np.log(61)) < 0.05  # an untrained model knows nothing
    again = GPT(TINY)
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_embedding_tables_live_in_the_compute_dtype() -> None:
    model = GPT(TINY, dtype=torch.bfloat16)
    assert model.wte.weight.dtype == model.value_embeds["1"].weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == model.blocks[0].attn.q.weight.dtype == torch.float32
    assert GPT(TINY, dtype=torch.float16).wte.weight.dtype == torch.float32


def test_losses_of_masked_rows_are_zero_and_never_nan() -> None:
    model = random_model(TINY)
    x = torch.zeros(2, 40, dtype=torch.long)
    nothing = torch.full((2, 40), -1)
    loss = model(x, nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_compiled_blocks_give_the_same_loss() -> None:
    model, compiled = random_model(TINY), random_model(TINY)
    for block in compiled.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    x = torch.randint(0, 61, (2, 140), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x, x), compiled(x, x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 0}, "depth 0"),
        ({"depth": 4, "window_pattern": "SX"}, "window pattern 'SX'"),
        ({"depth": 4, "kv_heads": 3}, "2 query heads cannot share 3"),
        ({"depth": 4, "vocab_size": 0}, "vocab_size is 0"),
        ({"depth": 4, "head_dim": 7}, "head size 7 is odd"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GPTConfig.from_depth(**({"vocab_size": 1000} | change))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="'surprise'"):
        GPTConfig.from_dict(TINY.to_dict() | {"surprise": 1})
    assert GPTConfig.from_dict(TINY.to_dict()) == TINY
