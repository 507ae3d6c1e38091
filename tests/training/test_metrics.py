"""The metrics file: what is written can be read, and a resume cuts exactly what will be written again."""

import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.training import metrics
from nanochat.training.metrics import MetricsLog


def test_lines_and_a_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(6):
        if step == 4:
            log.write(step, val_bpb=2.0)
        log.write(step, loss=1.0 / 3 + step, mfu=None)
    log.close()
    assert metrics.read(path)[:2] == [{"step": 0, "loss": 1 / 3}, {"step": 1, "loss": 1 + 1 / 3}]
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert len(metrics.read(path)) == 7
    log = MetricsLog(path, 4)  # the evaluation of step 4 will be made again
    log.write(4, loss=9.0)
    log.close()
    assert [line["step"] for line in metrics.read(path)] == [0, 1, 2, 3, 4] and metrics.read(path)[-1]["loss"] == 9.0


def test_a_new_run_begins_an_empty_file(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write(0, loss=1.0)
    log.close()
    MetricsLog(tmp_path / "m.jsonl", 0).close()
    assert metrics.read(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize("garbage", [b"not json\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n"])
def test_damaged_lines_are_cut(tmp_path, garbage):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n' + garbage + b'{"step": 1}\n')
    metrics.cut_back(path, 5)
    assert path.read_bytes() == b'{"step": 0}\n'


def test_trackers_receive_the_numbers(tmp_path):
    class Fake:
        seen: list = []

        def log(self, values, step):
            self.seen.append((step, dict(values)))

        def close(self):
            self.seen.append("closed")

    log = MetricsLog(tmp_path / "m.jsonl", 0, [Fake()])
    log.write(3, loss=1.0, note="text", mfu=None)
    log.close()
    assert Fake.seen == [(3, {"step": 3, "loss": 1.0}), "closed"]


def test_unknown_and_missing_trackers(tmp_path):
    with pytest.raises(UsageError, match="unknown tracker 'nonsense'"):
        metrics.open_tracker("nonsense", tmp_path, "run", {})
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(NanochatError, match=r"nanochat\[tensorboard\]"):
            metrics.open_tracker("tensorboard", tmp_path, "run", {})
