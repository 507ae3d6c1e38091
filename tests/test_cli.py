"""The command line as a user meets it: help, refusals, exit codes."""

import ast
import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass, is_dataclass

import pytest

from nanochat import cli
from nanochat.errors import NanochatError, UsageError


@dataclass(frozen=True)
class ToyConfig:
    """A command for these tests."""

    error: str = ""
    """Which error to raise."""
    depth: int = 4
    """A number."""


def run_toy(config: ToyConfig) -> int | None:
    if config.error == "kernel":
        from nanochat_kernels import KernelPlan

        KernelPlan.resolve("rms_norm=nonsense", device="cpu", dtype=None, mode="decode")
    known = {
        "usage": UsageError("depth 5 is odd"),
        "failed": NanochatError("the disk is full"),
        "bug": ZeroDivisionError("bug"),
        "stop": KeyboardInterrupt(),
    }
    if config.error:
        raise known[config.error]
    return None


TOY = cli.Command("toy", "Machine", "help", __name__, "ToyConfig", "run_toy")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[ToyConfig.__module__])
    return lambda *arguments: cli.run_command(TOY, arguments)


def nanochat(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nanochat", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_listed_command_loads_and_helps(name, capsys):
    config, function = cli.COMMANDS[name].load()
    assert callable(function)
    if config is None:  # hands its arguments on
        assert cli.main([name, "--help"]) == 0
    else:
        assert is_dataclass(config) and config.__dataclass_params__.frozen
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code in (0, None)
    assert f"nanochat {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if command.config])
def test_every_flag_has_help(name):
    """A flag's help is the docstring under its field, or `help=` in its annotation."""
    config, _ = cli.COMMANDS[name].load()
    body = ast.parse(inspect.getsource(config)).body[0].body
    fields = [
        (node, after)
        for node, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]
    silent = [
        ast.unparse(node.target)
        for node, after in fields
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
        and "help=" not in ast.unparse(node)
    ]
    assert fields and not silent


def test_help_is_quick_and_complete():
    code = "import sys; from nanochat.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(f"  {name} " in shown.stdout for name in cli.COMMANDS)


def test_unknown_command_suggests_and_exits_2(capsys):
    assert cli.main(["docter"]) == 2
    assert "did you mean 'doctor'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--dept", "4"), ("--depth", "four"), ("stray",)])
def test_wrong_flags_exit_2_naming_the_culprit(toy, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        toy(*arguments)
    assert stop.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [("", 0), ("failed", 1), ("usage", 2), ("stop", 130)])
def test_exit_codes(toy, capsys, error, code):
    assert toy("--error", error) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.startswith("error: ") == bool(error)


def test_a_backend_that_cannot_run_is_a_wrong_call(toy, capsys):
    assert toy("--error", "kernel") == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(toy):
    with pytest.raises(ZeroDivisionError):
        toy("--error", "bug")


def test_other_ranks_say_one_line(toy, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert toy("--error", "failed") == 1
    assert capsys.readouterr().err == "error: (rank 3) the disk is full\n"


def test_doctor_as_json():
    shown = nanochat("doctor", "--json", "--no-bandwidth")
    names = {finding["name"] for finding in json.loads(shown.stdout)}
    assert {"python", "torch", "C++", "rustbpe", "memory", "disk"} <= names
    assert shown.returncode in (0, 1)


def test_closed_pipe_is_no_error():
    command = f"{sys.executable} -m nanochat --help | true; exit ${{PIPESTATUS[0]}}"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and not shown.stderr
