"""runs/speedrun.sh and runs/miniseries.sh in miniature: a fresh clone, two processes, a local server for the hub.

The server hands out real text where ../shared/data has it, generated text elsewhere. The speedrun is killed in the
middle of each stage. The miniseries trains the same model without a break, so that equal bits per byte prove that
nothing was lost or repeated; its second model is killed too.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
REAL_TEXT = ROOT.parent / "shared/data/text"
SCRIPTS = ("stages.sh", "speedrun.sh", "miniseries.sh")
WORDS = "the a cat dog house tree runs sees red big small and of in on under happy bird sky sun water old new".split()
TRAIN = (
    "--steps 8 --batch-tokens 1024 --seq-len 128 --head-dim 32 --eval-every 0 --sample-every 0 --save-every 2 "
    "--device cpu --compile off --kernels torch"
)


def test_scripts_name_only_flags_that_exist() -> None:
    text = "".join((ROOT / "runs" / name).read_text() for name in SCRIPTS)
    calls = re.findall(r"^\s*(?:nano|on_ranks) ([a-z-]+)((?: .*)?)$", text, re.M)
    assert {"data", "tok-train", "train", "eval"} <= {name for name, _ in calls}
    for name, rest in calls:
        if name not in COMMANDS:
            continue  # a stage still to come; SKIP leaves it out
        fields = {field.name for field in dataclasses.fields(COMMANDS[name].load()[0])}
        for flag in re.findall(r"--([a-z-]+)", rest.replace(" --nproc", "")):
            assert flag.replace("-", "_") in fields, f"nanochat {name} has no --{flag}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "runs" / name)], check=True)


class SlowHandler(SimpleHTTPRequestHandler):
    """Hands files out in pieces with pauses, so that there is a middle of a download."""

    pause = 0.0

    def copyfile(self, source, outputfile) -> None:
        while piece := source.read(1 << 13):
            outputfile.write(piece)
            time.sleep(type(self).pause)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Address and number of shards of a server: real text where there is some, else three shards of random words."""
    folder = REAL_TEXT
    if not folder.is_dir():
        rng, folder = random.Random(0), tmp_path / "hub"
        folder.mkdir()
        for i in range(3):
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) + "." for _ in range(300)]
            pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet", row_group_size=50)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", len(list(folder.glob("shard_*.parquet")))
    server.shutdown()
    server.server_close()


class Scripts:
    """Runs scripts of a fresh clone, to their end or until something happens."""

    def __init__(self, tmp_path: Path, hub: tuple[str, int]) -> None:
        self.clone, self.base, self.log = tmp_path / "clone", tmp_path / "base", tmp_path / "log"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)
        bundle = tmp_path / "bundle"
        (bundle / "eval_data").mkdir(parents=True)
        rows = [{"query": f"{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(12)]
        (bundle / "eval_data/choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (bundle / "core.yaml").write_text(
            "icl_tasks:\n"
            "- {label: choice, dataset_uri: choice.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}\n"
        )
        (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,50\n")
        self.env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.clone}:{self.clone / 'kernels'}",
            "NANOCHAT_BASE_DIR": str(self.base),
            "NANOCHAT_DATA_URL": hub[0],
            "NANOCHAT_DATA_SHARDS": str(hub[1]),
            "OMP_NUM_THREADS": "1",
            "SETUP": "0",
            "FIRST_SHARDS": "1",
            "SHARDS": "2",
            "RANKS": "2",
            "DEPTH": "1",
            "VOCAB": "320",
            "TRAIN_FLAGS": TRAIN,
            "EVAL_FLAGS": f"--parts core,bpb --data {bundle} --eval-tokens 1024 --device cpu --kernels torch",
            "SFT_FLAGS": "--data builtin --steps 4 --batch-tokens 1024 --eval-every 0 --save-every 1 --device cpu "
            "--compile off --kernels torch",
            "CHAT_EVAL_FLAGS": "--tasks spelling --max-problems 2 --max-tokens 8 --device cpu --kernels torch",
            "SKIP": "" if "report" in COMMANDS else "report",
            "MIN_CORE": "-9",
        }

    def start(self, name: str, **env: str) -> subprocess.Popen:
        with open(self.log, "w") as log:
            return subprocess.Popen(
                ["bash", f"runs/{name}"], cwd=self.clone, env=self.env | env, stdout=log, stderr=subprocess.STDOUT
            )

    def run(self, name: str, **env: str) -> tuple[int, str]:
        """(exit code, everything it printed)"""
        code = self.start(name, **env).wait(timeout=900)
        return code, self.log.read_text()

    def kill_when(self, name: str, happened: Callable[[str], bool], **env: str) -> None:
        """Starts a script and kills it, and all that it started, as soon as `happened(what it printed)`."""
        script, deadline = self.start(name, **env), time.monotonic() + 600
        while not happened(self.log.read_text()):
            assert script.poll() is None, f"ended before it could be killed:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        family = [*psutil.Process(script.pid).children(recursive=True), psutil.Process(script.pid)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        script.wait()
        psutil.wait_procs(family, timeout=30)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_speedrun_killed_in_every_stage_and_miniseries(tmp_path: Path, hub: tuple[str, int], monkeypatch) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout to clone")
    scripts = Scripts(tmp_path, hub)
    base, model = scripts.base, scripts.base / "base_checkpoints/speedrun-d1"

    monkeypatch.setattr(SlowHandler, "pause", 0.5)
    scripts.kill_when("speedrun.sh", lambda said: any(base.glob("data/**/*.part")))
    assert not list(base.glob("data/**/shard_*.parquet"))
    monkeypatch.setattr(SlowHandler, "pause", 0.0)
    scripts.kill_when("speedrun.sh", lambda said: "tokenizer: 320" in said)
    assert not (base / "tokenizer/settings.json").exists()
    scripts.kill_when("speedrun.sh", lambda said: (model / "step_000004").exists())
    assert not (model / "step_000008").exists()
    scripts.kill_when("speedrun.sh", lambda said: "CORE and bits per byte of" in said)
    assert not list(model.glob("eval_*.json"))

    code, said = scripts.run("speedrun.sh", MIN_CORE="0.9")
    assert code == 1 and "NOT above 0.9" in said and "] done" not in said, said
    tuned = base / "sft_checkpoints/speedrun-d1"
    scripts.kill_when("speedrun.sh", lambda said: (tuned / "step_000002").exists())
    assert not (tuned / "step_000004").exists()
    scripts.kill_when("speedrun.sh", lambda said: "] chat evaluation" in said)
    assert (tuned / "step_000004").exists() and not list(tuned.glob("chat_eval_*.json"))
    code, said = scripts.run("speedrun.sh")
    assert (tuned / "chat_eval_000004.json").exists()
    assert code == 0 and "is finished" in said and said.count("is there") >= 2 and "] done" in said, said

    code, said = scripts.run("miniseries.sh", SERIES="1:8 2:x")
    assert code == 1 and "2:x, which is not DEPTH:RATIO" in said, said
    second = base / "base_checkpoints/series-d2-r8"
    scripts.kill_when("miniseries.sh", lambda said: (second / "step_000004").exists(), SERIES="1:8 2:8")
    assert not (second / "step_000008").exists()
    assert [row["tag"] for row in json.loads((base / "miniseries/series.json").read_text())] == ["series-d1-r8"]
    code, said = scripts.run("miniseries.sh", SERIES="1:8 2:8")
    assert code == 0, said
    rows = json.loads((base / "miniseries/series.json").read_text())
    assert [row["tag"] for row in rows] == ["series-d1-r8", "series-d2-r8"]
    assert all(row["tokens"] == 8 * 1024 and row["flops"] > 0 and row["minutes"] > 0 for row in rows)
    assert rows[0]["flops"] < rows[1]["flops"] and rows[0]["core"] is not None
    assert (base / "miniseries/series.md").read_text().count("| series-d") == 2
    assert (base / "miniseries/series.png").stat().st_size > 10_000

    interrupted = json.loads((model / "eval_000008.json").read_text())
    assert interrupted["bpb"]["val"] == pytest.approx(rows[0]["val_bpb"], rel=1e-6)
