"""The report: what is there is on the page, what is not is absent, and the HTML needs nothing beside it."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from nanochat.cli import main
from nanochat.errors import NanochatError
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.report import command, page, plots, sections
from nanochat.training.metrics import MetricsLog

CONFIG = GPTConfig(60, 16, layers=1, width=32, heads=2, kv_heads=2, head_dim=16)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def make_stage(base, stage, lines, results=None, tag="small", **meta):
    """A checkpoint as a stage leaves it, with metrics and results."""
    folder = base / f"{stage}_checkpoints" / tag
    model = GPT(CONFIG)
    model.init_weights()
    identity = {"data": "builtin", "steps": 12, "seed": 7} | meta.pop("identity", {"batch_tokens": 512})
    meta = {
        "stage": stage,
        "config": CONFIG.to_dict(),
        "identity": identity,
        "loop": {"seconds": 83.0, "device": "cpu", "world_size": 1, "rows": 2},
        "kernels": {"rms_norm": "torch", "attention": "sdpa"},
        "finished": True,
    } | meta
    checkpoint.save(folder, 12, model.state_dict(), None, meta)
    log = MetricsLog(folder / "metrics.jsonl", 0)
    for step, line in enumerate(lines):
        log.write(step, **line)
    log.close()
    if results:
        (base / "results").mkdir(exist_ok=True)
        (base / "results" / f"{stage}.json").write_text(json.dumps(results))


def all_stages(base):
    steps = [{"loss": 4 - n / 6, "tokens_per_second": 900 + n, "lr_multiplier": 1 - n / 12} for n in range(12)]
    make_stage(base, "base", [*steps, {"val_bpb": 1.2345, "eval_seconds": 61}], val_bpb=1.2345)
    task = {"problems": 500, "accuracy": 0.987, "centered": 0.98, "pass_at": {"1": 0.987}}
    chat = {"model": "sft small", "label": "ChatCORE", "chat_core": 0.98, "tasks": {"arith|metic": task}}
    samples = [{"prompt": "Who are you?", "text": "I am <b>nanochat</b> & small."}]
    make_stage(base, "sft", steps, {"chat_eval": chat, "samples": samples})
    practice = [{"pass@1": 0.25, "pass@8": 0.5}, *({"loss": 0.1, "reward": n / 20} for n in range(12))]
    passed = {"0": {"1": 0.25, "8": 0.5, "problems": 400}, "12": {"1": 0.5, "8": 0.75, "problems": 400}}
    make_stage(base, "rl", practice, pass_at=passed, identity={"questions": 16, "samples": 16})


class Addresses(HTMLParser):
    """Everything a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found, self.images = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.images += [dict(attrs) for _ in [0] if tag == "img"]


def test_a_full_report(base):
    all_stages(base)
    assert main(["report"]) == 0
    text = (base / "report" / "report.md").read_text()
    for words in (
        "Base model",
        "Fine-tuning",
        "Reinforcement learning",
        "1.2345",
        "1 min 23 s",
        "98.70%",
        "25.0%",
        "75.0%",
    ):
        assert words in text, words
    assert "| attention | sdpa | sdpa | sdpa |" in text and "arith\\|metic" in text and "torch" in text
    for name in re.findall(r"\]\((.*?)\)", text):
        ET.fromstring((base / "report" / name).read_text())
    assert {p.stem for p in (base / "report" / "plots").iterdir()} == {
        "base_curves", "base_speed", "sft_curves", "sft_speed", "rl_reward",
    }  # fmt: skip


def test_the_html_needs_nothing_beside_it(base):
    all_stages(base)
    command.run(command.ReportConfig(out=base / "elsewhere"))
    text = (base / "elsewhere" / "report.html").read_text()
    parser = Addresses()
    parser.feed(text)
    assert len(parser.images) == 5 and all(value.startswith("data:image/svg+xml;base64,") for value in parser.found)
    for value in parser.found:
        ET.fromstring(base64.b64decode(value.partition(",")[2]))
    assert "<script" not in text and "url(" not in text and "@import" not in text
    assert "I am &lt;b&gt;nanochat&lt;/b&gt; &amp; small." in text


def test_missing_stages_are_absent(base):
    make_stage(base, "sft", [{"loss": 1.0}])
    blocks = command.make()
    headings = [block.text for block in blocks if isinstance(block, page.Heading)]
    assert headings == ["Fine-tuning", "Machine and versions"]
    with pytest.raises(NanochatError, match="nothing with the tag 'other'"):
        command.make("other")


def test_nothing_at_all(base, capsys):
    assert main(["report"]) == 1
    assert "nothing" in capsys.readouterr().err and not (base / "report").exists()


def test_damaged_results_and_a_stage_without_metrics(base):
    make_stage(base, "base", [])
    (base / "results").mkdir()
    (base / "results" / "base.json").write_text("{")
    blocks = command.make()
    assert not any(isinstance(block, page.Plot) for block in blocks)


def test_what_the_plots_show():
    assert plots.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert plots.smooth([1.0, 3.0]) == pytest.approx([1.0, (0.95 * 0.05 * 1 + 0.05 * 3) / (1 - 0.95**2)])
    records = [{"step": 0, "loss": 1.0}, {"step": 5, "val_bpb": 2.0}]
    assert plots.series(records, "val_bpb") == ([5], [2.0])
    assert plots.loss_and_validation([]) is None and plots.reward_and_pass(records) is None


def test_durations():
    assert [sections.duration(s) for s in (12.4, 200, 3725)] == ["12 s", "3 min 20 s", "1 h 02 min"]


def test_a_report_of_real_bytes_of_a_tokenizer(base):
    from nanochat.tokenizer import Tokenizer

    Tokenizer.train(["some text to learn from, some more text"] * 20, 280).save(base / "tokenizer")
    (table,) = [block for block in command.make() if isinstance(block, page.Table) and block.rows[0][0] == "tokenizer"]
    assert table.rows[0][1].startswith("280 tokens of 1.")
