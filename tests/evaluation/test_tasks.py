"""Tasks: real rows where they are there, small ones of the hub's shape where not; grading; mixtures; the hub itself."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.chat_format import Conversation
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.tasks import TASKS, make_task, parse_mixture, question_of
from nanochat.evaluation.tasks.gsm8k import final_answer, solution_parts
from nanochat.evaluation.tasks.humaneval import program
from nanochat.evaluation.tasks.rows import Rows, read_rows


def test_gsm8k_marks_become_tool_calls():
    assert solution_parts("48/2 = <<48/2=24>>24 clips.\n#### 24") == [
        {"type": "text", "text": "48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 clips.\n#### 24"},
    ]
    assert solution_parts("<<1+1=2>>2")[0] == {"type": "python", "text": "1+1"}


@pytest.mark.parametrize(
    "text, number",
    [("#### 72", "72"), ("so\n#### 1,234", "1234"), ("#### -3.50", "-3.50"), ("#### 10.00.", "10"), ("#### $5", "5"),
     ("#### 1\n#### 2", "2"), ("72", None), ("#### none", None), ("#### .", None)],
)  # fmt: skip
def test_final_answers(text, number):
    assert final_answer(text) == number


def test_real_gsm8k(shared):
    task = make_task(f"gsm8k:{shared / 'tasks' / 'gsm8k_test_first500.jsonl'}")
    assert len(task) == 500 and task.eval_type == "generate" and task.baseline == 0
    for index in (0, 1, 250, 499):
        item = task[index]
        Conversation.parse(item)
        answer = "".join(p["text"] for p in item["messages"][-1]["content"] if p["type"] == "text")
        assert task.evaluate(item, answer) and not task.evaluate(item, "#### 123456789") and not task.evaluate(item, "")
        assert len(question_of(item)) == 1
    assert task[3] == make_task(f"gsm8k:{shared / 'tasks' / 'gsm8k_test_first500.jsonl'}")[3]


def test_every_result_in_gsm8k_is_what_the_calculator_gives(shared):
    """Nearly: a few of the dataset's own results are rounded or wrong."""
    from nanochat.inference.tools import calculate

    task = make_task(f"gsm8k:{shared / 'tasks' / 'gsm8k_train.jsonl'}", "train")
    right = total = 0
    for index in range(0, len(task), 10):
        parts = task[index]["messages"][-1]["content"]
        for call, output in zip(parts, parts[1:], strict=False):
            if call["type"] == "python":
                total += 1
                value = calculate(call["text"])
                right += value is not None and float(value) == pytest.approx(float(output["text"].replace(",", "")))
    assert total > 1000 and right / total > 0.97


def test_real_humaneval(shared):
    task = make_task(f"humaneval:{shared / 'tasks' / 'HumanEval.jsonl.gz'}")
    assert len(task) == 164
    item = task[0]
    solution = item["messages"][-1]["content"]
    body = solution.removeprefix(item["messages"][0]["content"])
    assert task.evaluate(item, solution)
    assert task.evaluate(item, f"Here it is:\n```python\n{solution}\n```\nDone.")
    assert task.evaluate(item, body)  # a continuation of the prompt
    assert not task.evaluate(item, f"def {item['entry_point']}(*args):\n    return 'no such value'")
    assert not task.evaluate(item, "")


def test_programs_for_humaneval():
    prompt = 'from typing import List\nimport math\n\ndef f(x: List):\n    """Doc."""\n'
    again = program(prompt, "```py\ndef f(x):\n    return 1\n```", "def check(c): pass", "f")
    assert again.startswith("from typing import List\nimport math\n") and again.count("def f") == 1
    body = program(prompt, "    return 1", "def check(c): pass", "f")
    assert body.startswith(prompt + "    return 1") and body.rstrip().endswith("check(f)")
    unclosed = program(prompt, "```\ndef f(x):\n    return 2", "", "f")
    assert "```" not in unclosed


ARC = {
    "id": "1", "question": "What is wet?", "choices": {"text": ["sand", "rain", "salt"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}  # fmt: skip
MMLU = {"question": "1+1?", "subject": "math", "choices": ["1", "2", "3", "4"], "answer": 1}
HUMANEVAL = {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "t", "entry_point": "f"}
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "source": "x"}


def test_choices_are_asked_with_their_letters(tmp_path):
    path = tmp_path / "arc.parquet"
    pq.write_table(pa.Table.from_pylist([ARC] * 3), path)
    for name in ("arc-easy", "ARC-Challenge"):
        task = make_task(f"{name}:{path}")
        item = task[1]
        assert len(task) == 3 and task.eval_type == "choice" and task.baseline == 0.25
        assert item["letters"] == ("1", "2", "3") and task.evaluate(item, "2") and not task.evaluate(item, "1")
        asked = question_of(item)[0]["content"]
        assert "rain=2\n" in asked and asked.startswith("What is wet?")
    path = tmp_path / "mmlu.jsonl"
    path.write_text(json.dumps(MMLU))
    item = make_task(f"mmlu:{path}")[0]
    assert item["letters"] == tuple("ABCD") and item["messages"][-1]["content"] == "B" and item["subject"] == "math"


def test_own_conversations(tmp_path, shared):
    rows = [TALK, TALK["messages"], {"instruction": "Say hi.", "input": "", "output": "hi"}]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    task = make_task(f"jsonl:{path}")
    assert [task[i]["messages"][0]["content"] for i in range(3)] == ["hi", "hi", "Say hi."]
    with pytest.raises(UsageError, match="for training"):
        task.evaluate(task[0], "x")
    real = make_task(f"jsonl:{shared / 'tasks' / 'instructions_1100.json'}")
    assert len(real) == 1100 and "\n\nfreind" in real[0]["messages"][0]["content"]
    packed = tmp_path / "own.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert len(make_task(f"identity:{packed}")) == 3


@pytest.mark.parametrize(
    "content, complaint",
    [('{"messages": []}', "row 1 of .*at least one message"), ('{"text": "x"}', "row 1 .*needs `messages`"),
     ('[{"role": "user", "content": "x"}]', "row 1 .*end with the assistant"), ("", "holds no conversations"),
     ('{"messages"', "line 1 of .* is not JSON")],
)  # fmt: skip
def test_broken_files_are_named_with_their_row(tmp_path, content, complaint):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(NanochatError, match=complaint):
        make_task(f"jsonl:{path}")


def test_spelling(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"{a}{b}ing" for a in "bcdfghklm" for b in ("a", "ea", "oo", "ss", "tt", "ni")))
    splits = {split: make_task(f"spelling:{path}", split) for split in ("train", "val", "test")}
    assert sum(len(task) for task in splits.values()) == 2 * 54
    assert len({word for task in splits.values() for word in task.words}) == 54
    task = splits["train"]
    for index in range(20):
        item = task[index]
        Conversation.parse(item)
        text = "".join(p["text"] for p in item["messages"][-1]["content"] if p["type"] == "text")
        assert task.evaluate(item, text) and not task.evaluate(item, "I do not know.") and item == task[index]
    with pytest.raises(UsageError, match="not a file of words"):
        make_task("spelling:/nowhere")


def test_builtin_kinds():
    for kind, graded in (("arithmetic", True), ("letter_count", True), ("word_problem", True), ("story", False)):
        task = make_task(f"builtin:{kind}")
        assert len(task) >= 500 and (task.eval_type == "generate") is graded
        Conversation.parse(task[0])
    task = make_task("builtin:arithmetic")
    assert task.evaluate(task[0], f"It is {task[0]['answer']}.") and not task.evaluate(task[0], "It is.")
    assert make_task("spelling").name == "builtin:spelling" and len(make_task("builtin", "train")) > 10_000
    assert len(make_task("identity", "train")) > 100


def test_mixtures(tmp_path):
    for name, count in (("a", 5), ("b", 3)):
        rows = [{"messages": [{"role": "user", "content": f"{name}{i}"}, TALK["messages"][1]]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = f"jsonl:{tmp_path}/a.jsonl+3*jsonl:{tmp_path}/b.jsonl"
    mixture = parse_mixture(spec)
    asked = [item["messages"][0]["content"] for item in mixture]
    assert sorted(asked) == sorted([f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)] * 3)
    assert asked != sorted(asked) and asked == [item["messages"][0]["content"] for item in parse_mixture(spec)]
    for wrong in ("", "gsm8k++mmlu", "0*builtin", "nope", "jsonl"):
        with pytest.raises(UsageError, match="cannot read|unknown task|needs path"):
            parse_mixture(wrong)


def test_rows_are_shuffled_as_the_datasets_library_does(tmp_path):
    rows = Rows(pa.table({"n": list(range(100))}))
    assert sorted(row["n"] for row in rows) == list(range(100))
    assert [row["n"] for row in rows[:5]] == [59, 21, 56, 18, 33]  # numpy's default_rng(42).permutation(100)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UsageError, match="holds no"):
        read_rows(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_rows(tmp_path / "no.jsonl")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with every dataset in two files; counts what it is asked for."""
    samples = {"ai2_arc": ARC, "mmlu": MMLU, "openai_humaneval": HUMANEVAL, "smol-smoltalk": TALK,
               "gsm8k": {"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}}  # fmt: skip
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = next((name for name in samples if f"/{name}/" in self.path), None)
            if self.path.endswith(".parquet") and name:
                sink = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pylist([samples[name]] * 4), sink)
                body = sink.getvalue().to_pybytes()
            elif self.path.startswith("/api/datasets/") and name:
                body = json.dumps([f"{address}{self.path}/{i}.parquet" for i in range(2)]).encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


NOT_FROM_THE_HUB = ("spelling", "identity", "jsonl", "builtin", "word-problems")


@pytest.mark.parametrize("name", [name for name in TASKS if name not in NOT_FROM_THE_HUB])
def test_hub_datasets_are_downloaded_once(hub, name):
    for split in ("train", "test"):
        task = make_task(name, split)
        assert len(task) == 8
        Conversation.parse(task[7])
    before = len(hub)
    assert len(make_task(name, "test")) == 8 and len(hub) == before


def test_hub_errors_are_clear(hub, monkeypatch):
    with pytest.raises(UsageError, match="has no split 'dev'; use one of train, test"):
        from nanochat.evaluation.tasks.conversations import SmolTalk

        SmolTalk("dev")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NanochatError, match="does not list openai/gsm8k.*local copy"):
        make_task("gsm8k")
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(NanochatError, match="NANOCHAT_OFFLINE is set and cais/mmlu"):
        make_task("mmlu")
