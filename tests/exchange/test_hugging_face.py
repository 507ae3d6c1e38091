"""Exported folders in transformers: the same logits, the same generation, the same tokens."""

import json
from pathlib import Path

import pytest
import torch

from nanochat.chat_format import render, render_prompt
from nanochat.errors import NanochatError, UsageError
from nanochat.exchange.hugging_face import write_model
from nanochat.tokenizer import Tokenizer

from .conftest import greedy, make_model

transformers = pytest.importorskip("transformers", reason="the export is checked with transformers itself")


@pytest.fixture(scope="module", params=["2025-10", "2026"])
def exported(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """(our model, their model, the folder)"""
    folder = tmp_path_factory.mktemp("hf") / "model"
    model = make_model(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
        said = write_model(folder, model, tokenizer)
        own = request.param == "2026"
        assert ("trust_remote_code" in said) == own
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **({"trust_remote_code": True} if own else {})
        )
    return model, theirs.eval(), folder


def test_class_and_weights(exported) -> None:
    model, theirs, folder = exported
    current = model.config.is_current
    assert type(theirs).__name__ == ("Nanochat2026ForCausalLM" if current else "NanoChatForCausalLM")
    assert type(theirs).__module__.startswith("transformers.models.nanochat") != current
    assert (folder / "modeling_nanochat_2026.py").exists() == current
    assert not list(folder.parent.glob(".*"))


def test_logits(exported) -> None:
    model, theirs, _ = exported
    idx = torch.randint(0, 329, (3, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, hf = model(idx), theirs(idx).logits
    assert hf.shape == ours.shape
    assert (ours - hf).abs().max().item() <= 1e-4


def test_generate_uses_the_cache_and_gives_our_tokens(exported) -> None:
    model, theirs, _ = exported
    prompt = torch.randint(0, 320, (1, 150), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    cached = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    plain = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    assert cached[0, 150:].tolist() == plain[0, 150:].tolist() == greedy(model, prompt[0].tolist(), 20)


def test_padding_on_the_left_changes_nothing(exported) -> None:
    model, theirs, _ = exported
    short, long = (torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 60))
    batch = torch.stack([torch.cat([torch.zeros(20, dtype=torch.long), short]), long])
    mask = torch.ones_like(batch)
    mask[0, :20] = 0
    out = theirs.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert out[0, 60:].tolist() == greedy(model, short.tolist(), 12)
    assert out[1, 60:].tolist() == greedy(model, long.tolist(), 12)


def test_beam_search_carries_the_smear_along(exported) -> None:
    """Beams are reordered inside the cache; scoring what they found without a cache must give the same score."""
    _, theirs, _ = exported
    prompt = torch.randint(0, 320, (1, 30), generator=torch.Generator().manual_seed(4))
    out = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=4,
        max_new_tokens=8,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        logits = theirs(out.sequences).logits[0, 29:-1].log_softmax(-1)
    score = logits.gather(1, out.sequences[0, 30:, None]).sum()
    torch.testing.assert_close(score, out.sequences_scores[0], rtol=0, atol=1e-3)


def test_the_loss_is_next_token_cross_entropy(exported) -> None:
    model, theirs, _ = exported
    idx = torch.randint(0, 329, (2, 50), generator=torch.Generator().manual_seed(6))
    labels = idx.clone()
    labels[:, :9] = -100
    targets = torch.where(labels[:, 1:] == -100, -1, labels[:, 1:])
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx, labels=labels).loss, model(idx[:, :-1], targets), rtol=1e-5, atol=1e-5)


TEXTS = [
    "",
    "Hello! It's 2025, isn't it?\n\n  x = [1, 23, 456]\t",
    "世界 🌍 É ﬁ \u017f \u3000 end  ",
    "we're " * 50,
]


def test_tokenizer_and_chat_template(exported, tokenizer: Tokenizer) -> None:
    _, _, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 6 times 7?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "6*7"},
                {"type": "python_output", "text": "42"},
                {"type": "text", "text": "It is 42."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
    ]
    encode = {"tokenize": True, "return_dict": True}
    assert theirs.apply_chat_template(talk, **encode)["input_ids"] == render(tokenizer, talk)[0]
    asked = theirs.apply_chat_template(talk[:2], add_generation_prompt=True, **encode)["input_ids"]
    assert asked == render_prompt(tokenizer, talk[:2])


def test_bfloat16_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model("2025-10")
    write_model(tmp_path / "half", model, tokenizer, torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert (
        theirs.dtype == torch.bfloat16
        and json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    )


def test_a_folder_in_use_is_left_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write_model(tmp_path, make_model("2026"), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    blocked = tmp_path / "notes.txt" / "model"
    with pytest.raises(NanochatError, match="cannot write"):
        write_model(blocked, make_model("2026"), tokenizer)
