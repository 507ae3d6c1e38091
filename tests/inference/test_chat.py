"""The terminal chat: input, commands, what is shown, and the command itself with a saved model."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from nanochat.chat_format import render_prompt
from nanochat.errors import NanochatError, UsageError
from nanochat.inference import chat as chat_module
from nanochat.inference.batch_engine import BatchConfig, BatchEngine, Output
from nanochat.inference.chat import Chat, ChatConfig, Printer, converse, read_message, run
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import SamplingParams
from nanochat.model import checkpoint


class FakeEngine:
    """Answers every prompt with the same events and remembers what it was asked."""

    def __init__(self, tokenizer, events=(("text", "Hi"), ("text", " there")), context=200):
        self.tokenizer, self.events, self.context, self.asked = tokenizer, events, context, []
        self.left, self.error = [], RuntimeError("broken")

    def add(self, request):
        self.asked.append((list(request.tokens), request.params))
        self.left = list(self.events)

    @property
    def has_work(self):
        return bool(self.left)

    def step(self):
        kind, text = self.left.pop(0)
        if kind == "interrupt":
            raise KeyboardInterrupt
        return [Output("chat", 0, text, kind, False, "error" if text == "ERROR" else None)]

    def cancel(self, id):
        self.left = []


def make_chat(tokenizer, terminal=False, **kwargs):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, highlight=False, width=40, color_system=None)
    base = kwargs.pop("base", False)
    return Chat(FakeEngine(tokenizer, **kwargs), SamplingParams(), console, base=base), out


def typed(*lines):
    """A stand-in for input(): these lines, then the end of input."""
    left = list(lines)

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    return read


@pytest.mark.parametrize(
    "lines, message",
    [
        (["one line"], "one line"),
        (["first \\", "second\\", "third"], "first \nsecond\nthird"),
        (['"""', "def f():", "    pass", '"""'], "def f():\n    pass"),
        (['"""all in one"""'], "all in one"),
    ],
)
def test_messages_of_several_lines(lines, message):
    assert read_message(typed(*lines)) == message


def test_an_answer_streams_and_is_remembered(tokenizer):
    chat, out = make_chat(tokenizer)
    converse(chat, typed("hello", "", "again", "/quit", "never"))
    assert out.getvalue() == "Hi there\nHi there\n"
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == [{"type": "text", "text": "Hi there"}]
    first, second = (tokenizer.decode(ids) for ids, _ in chat.engine.asked)
    assert first == "<|bos|><|user_start|>hello<|user_end|><|assistant_start|>"
    assert second.startswith(first + "Hi there<|assistant_end|>") and "again" in second
    assert chat.engine.asked[0][1].seed != chat.engine.asked[1][1].seed


def test_tool_calls_are_shown_as_such(tokenizer):
    events = [
        ("text", "It is "),
        ("python", "12"),
        ("python", "*12"),
        ("output", "144"),
        ("text", "!"),
        ("python", "1"),
    ]
    for encoding, arrow in (("utf-8", "→"), ("ascii", "->")):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
        printer = Printer(Console(file=out, highlight=False))
        for kind, text in events:
            printer.show(Output("chat", 0, text, kind, False, None))
        printer.end()
        assert out.buffer.getvalue().decode(encoding) == f"It is [12*12 {arrow} 144]![1]\n"


def test_markup_and_markdown_in_an_answer_are_plain_text(tokenizer):
    text = "[bold]x[/bold] :smile: *y* \\ " + "long " * 20
    for terminal in (False, True):
        chat, out = make_chat(tokenizer, terminal, events=[("text", text)])
        chat.ask("?")
        assert out.getvalue() == text + "\n"  # not wrapped either


def test_a_terminal_shows_control_characters_and_does_not_obey_them(tokenizer):
    chat, out = make_chat(tokenizer, True, events=[("text", "a\x1b[31mb\x07\x9b2Jc\n")])
    chat.ask("?")
    assert out.getvalue() == "a\ufffd[31mb\ufffd\ufffd2Jc\n\n"


def test_an_interrupted_answer_stays_and_a_failed_one_does_not(tokenizer, capsys):
    chat, out = make_chat(tokenizer, True, events=[("text", "Well"), ("interrupt", ""), ("text", "never")])
    converse(chat, typed("hello"))
    assert out.getvalue().startswith("Well\n") and not chat.engine.has_work
    assert chat.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "Well"}]}
    chat, out = make_chat(tokenizer, events=[("text", "Well"), ("text", "ERROR")])
    converse(chat, typed("hello"))
    assert chat.messages == [] and "a step of the engine failed: broken" in capsys.readouterr().err


def test_answers_equal_the_reference_engines_and_turns_are_found_in_the_cache(tokenizer, make_model):
    model = make_model()
    engine = BatchEngine(model, tokenizer, BatchConfig(max_batch=1))
    params = SamplingParams(temperature=0.8, top_k=50, max_tokens=20, seed=3)
    chat = Chat(engine, params, Console(file=io.StringIO()))
    question = "what is a long question made of, if not of words?"
    prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
    chat.ask(question)
    ((expected,),) = Engine(model, tokenizer).generate([prompt], params)
    assert chat.messages[1]["content"] == expected.parts
    before = engine.stats().cached_prompt_tokens
    chat.ask("and?")
    assert engine.stats().cached_prompt_tokens > before and engine.stats().blocks_used == 0


def test_commands(tokenizer, tmp_path, capsys):
    chat, out = make_chat(tokenizer)
    path = tmp_path / "talk.json"
    converse(
        chat,
        typed("/help", "/system Be brief.", "/temp 0.2", "/topk 7", "/max 9", "hello", f"/save {path}", "/retry"),
    )
    saved = json.loads(path.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert chat.params == replace(SamplingParams(), temperature=0.2, top_k=7, max_tokens=9)
    assert len(chat.engine.asked) == 2 and len(chat.messages) == 2
    assert "Be brief.\n\nhello" in tokenizer.decode(chat.engine.asked[0][0])
    converse(chat, typed("/clear"))
    assert chat.messages == []
    notes = capsys.readouterr().err
    assert all(name in notes for name in chat_module.COMMANDS)


@pytest.mark.parametrize(
    "line, complaint",
    [("/tmep 1", "unknown command /tmep"), ("/temp hot", "'hot' is not a number"), ("/temp -1", "temperature is -1"),
     ("/retry", "ask something first"), ("/save /nowhere/at/all.json", "cannot save")],
)  # fmt: skip
def test_wrong_commands_are_explained_and_survived(tokenizer, capsys, line, complaint):
    chat, out = make_chat(tokenizer)
    converse(chat, typed(line, "hello"))
    assert complaint in capsys.readouterr().err and out.getvalue() == "Hi there\n"


def test_old_turns_make_room(tokenizer, capsys):
    chat, _ = make_chat(tokenizer, context=80)
    converse(chat, typed("first question", "second question", "third question"))
    last = tokenizer.decode(chat.engine.asked[-1][0])
    assert "third" in last and "first" not in last and len(chat.engine.asked[-1][0]) <= 60
    assert "dropped" in capsys.readouterr().err


def test_a_base_model_continues_text(tokenizer):
    chat, _ = make_chat(tokenizer, base=True)
    chat.ask("Once upon")
    assert tokenizer.decode(chat.engine.asked[0][0]) == "<|bos|>Once upon"


@pytest.fixture
def home(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def save_model(home, make_model, tokenizer, stage):
    model = make_model()
    tokenizer.save(home / "tokenizer")
    meta = {"step": 3, "config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint, "stage": stage}
    checkpoint.save(home / f"{stage}_checkpoints" / "tiny", 3, model.state_dict(), None, meta)


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_one_answer_from_a_checkpoint(home, make_model, tokenizer, capsys, monkeypatch, stage):
    save_model(home, make_model, tokenizer, stage)
    config = ChatConfig(prompt="hello", device="cpu", max_tokens=12, kernels="torch")
    assert run(config) == 0
    first = capsys.readouterr().out
    assert first.endswith("\n") and len(first) > 1
    pipe = SimpleNamespace(isatty=lambda: False, read=lambda: "hello")
    monkeypatch.setattr("sys.stdin", pipe)
    assert run(replace(config, prompt=None)) == 0
    assert capsys.readouterr().out == first


def test_the_furthest_stage_is_taken(home, make_model, tokenizer):
    from nanochat.inference.loading import find_stage

    save_model(home, make_model, tokenizer, "base")
    assert find_stage("auto", None)[0] == "base"
    save_model(home, make_model, tokenizer, "sft")
    assert find_stage("auto", None)[0] == "sft" and find_stage("base", "tiny")[0] == "base"


def test_clear_errors(home, make_model, tokenizer, monkeypatch):
    with pytest.raises(NanochatError, match="no checkpoint in .*nanochat train"):
        run(ChatConfig(prompt="hi", device="cpu"))
    with pytest.raises(UsageError, match="question is empty"):
        run(ChatConfig(prompt=" "))
    with pytest.raises(UsageError, match="temperature"):
        run(ChatConfig(prompt="hi", temperature=-2))
    save_model(home, make_model, tokenizer, "sft")
    ranks = {bytes([b]): 255 - b for b in range(256)}
    type(tokenizer).from_ranks(ranks).save(home / "tokenizer")
    with pytest.raises(NanochatError, match="tokenizer"):
        run(ChatConfig(prompt="hi", device="cpu"))
