"""FP8 in the model: gradients against float32's, histories, evaluation untouched, one graph, and what is refused."""

from dataclasses import replace

import pytest
import torch

from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import GPTConfig
from nanochat.model.fp8 import HISTORY, SLOTS, STATE, Fp8, _check_device
from nanochat.model.gpt import GPT
from nanochat_kernels.fp8_quantize import E4M3, E5M2, scale_for

CONFIG = GPTConfig.from_depth(2, vocab_size=256, seq_len=32, head_dim=32)


def make(config=CONFIG, fp8=True):
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # as after some training: no product is zero
        for block in model.blocks:
            for weight in (block.attn.o.weight, block.mlp.proj.weight):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    model.fp8 = Fp8(model) if fp8 else None
    return model


def batch(seed=0):
    idx = torch.randint(0, 256, (3, 33), generator=torch.Generator().manual_seed(seed))
    return idx[:, :-1], idx[:, 1:]


def gradients(model, seed=0):
    model.zero_grad(set_to_none=True)
    loss = model(*batch(seed))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sqnr(result, expected):
    return float(20 * torch.log10(expected.norm() / (expected - result).norm()))


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, kv_heads=1), replace(CONFIG, architecture="2025-10")])
def test_gradients_stay_near_those_of_float32(config):
    loss, expected = gradients(make(config, fp8=False))
    model = make(config)
    for _ in range(2):  # with current, then with delayed scales
        found, ours = gradients(model)
        assert found == pytest.approx(loss, rel=1e-3) and ours.keys() == expected.keys()
        matrices = [name for name in expected if name.endswith(("q.weight", "v.weight", "o.weight", "mlp.fc.weight"))]
        assert all(sqnr(ours[name], expected[name]) > 10 for name in matrices)
        assert all(torch.equal(ours[n], expected[n]) is False for n in matrices)  # FP8 it was
        model.fp8.observe()
        model.fp8.advance()


def test_every_amax_arrives_and_becomes_a_scale():
    model = make()
    gradients(model)
    model.fp8.observe()
    seen = model.fp8.seen.clone()
    assert seen.shape == (2, len(SLOTS)) and (seen > 0).all()
    gradients(model, seed=1)
    second = torch.stack([scales.grad for scales in model.fp8.scales])
    model.fp8.observe()
    assert torch.equal(model.fp8.seen, torch.maximum(seen, second))  # the larger of two micro-batches, not their sum
    largest = model.fp8.seen.clone()
    model.fp8.advance()
    for layer, amaxes in zip(model.fp8.layers, largest, strict=True):
        for scale, amax, dtype in zip(layer.scales, amaxes, SLOTS.values(), strict=True):
            assert scale == scale_for(amax, dtype)
    assert (model.fp8.seen == 0).all() and all(s.grad is None for s in model.fp8.scales)


def test_a_history_forgets_after_its_length():
    fp8 = make().fp8
    fp8.seen.fill_(1000.0)
    fp8.advance()
    for _ in range(HISTORY - 1):
        fp8.seen.fill_(1.0)
        fp8.advance()
        assert fp8.layers[0].scales[0] == scale_for(1000.0, E5M2)
    fp8.seen.fill_(1.0)
    fp8.advance()
    assert fp8.layers[0].scales.tolist() == [scale_for(1.0, E4M3 if d == E4M3 else E5M2) for d in SLOTS.values()]


def test_evaluation_knows_nothing_of_fp8():
    model, plain = make(), make(fp8=False)
    with torch.no_grad():
        assert torch.equal(model(*batch()), plain(*batch()))
        assert torch.equal(model(batch()[0]), plain(batch()[0]))


def test_weights_are_cast_again_after_an_update():
    model = make()
    before = model.fp8.layers[0].fc.data.clone()
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight.neg_()
    model.fp8.advance()
    assert torch.equal(model.fp8.layers[0].fc.data.float(), -before.float())


def test_activations_computed_again_give_the_same():
    model = make()
    loss, expected = gradients(model)
    amaxes = [s.grad for s in model.fp8.scales]
    model.fp8.forget()
    model.checkpoint_activations = True
    again, ours = gradients(model)
    assert again == loss and all(torch.equal(ours[name], expected[name]) for name in expected)
    assert all(torch.equal(s.grad, a) for s, a in zip(model.fp8.scales, amaxes, strict=True))


def test_blocks_trace_in_one_graph():
    model = make()
    loss, expected = gradients(model)
    amaxes = [s.grad for s in model.fp8.scales]
    model.fp8.forget()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    again, ours = gradients(model)
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(ours[name], expected[name], rtol=0.1, atol=1e-6) for name in expected)
    assert all(torch.allclose(s.grad, a, rtol=0.01) for s, a in zip(model.fp8.scales, amaxes, strict=True))


def test_the_state_is_restored_bit_for_bit():
    model = make()
    for seed in range(3):
        gradients(model, seed)
        model.fp8.observe()
        model.fp8.advance()
    other = make()
    other.fp8.load_state_dict({name: t.clone() for name, t in model.fp8.state_dict().items()})
    assert torch.equal(other.fp8.history, model.fp8.history) and (model.fp8.history[:3] > 0).all()
    assert gradients(other)[0] == gradients(model)[0]
    for state in ({}, {STATE: torch.zeros(HISTORY, 5, 6)}):
        with pytest.raises(NanochatError, match="amax history"):
            other.fp8.load_state_dict(state)


def test_what_cannot_be_trained_in_fp8_is_refused():
    small = GPT(GPTConfig.from_depth(1, vocab_size=64, seq_len=32, head_dim=32))
    with pytest.raises(UsageError, match=r"128×128.*o 64×64.*--depth"):
        Fp8(small)
    with pytest.raises(UsageError, match="float16"):
        _check_device(torch.device("cpu"), torch.float16)
    with pytest.raises(UsageError, match="not on mps"):
        _check_device(torch.device("mps"), torch.float32)


def test_a_gpu_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr("nanochat.model.fp8.has_fp8_products", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UsageError, match=r"8\.9 or later.*A100 has 8\.0"):
        _check_device(torch.device("cuda"), torch.bfloat16)
