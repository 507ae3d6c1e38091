"""The sandbox against programs that mean harm: each ends in time, is reported for what it was, and leaves nothing."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.evaluation.sandbox import START_CALLS, SandboxResult, run_python

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the checks look for survivors in /proc")
filtered = pytest.mark.skipif(os.uname().machine not in START_CALLS, reason="no filter for this CPU")
MODES = pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "fallback"])


def processes_with(marker: str) -> list[str]:
    """Process ids whose command line or environment holds `marker`."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path("/proc", entry, "cmdline").read_bytes() + Path("/proc", entry, "environ").read_bytes()
        except OSError:
            continue
        if marker.encode() in text and int(entry) != os.getpid():
            found.append(entry)
    return found


def run(code: str, namespaces: bool = True, timeout: float = 1.0, **options: int) -> SandboxResult:
    started = time.monotonic()
    result = run_python(code, timeout=timeout, namespaces=namespaces, **options)  # type: ignore[arg-type]
    assert time.monotonic() - started < timeout + 4  # a loaded machine may be slow, but not without end
    assert not processes_with("nanochat-sandbox-")
    return result


@MODES
def test_a_good_program(namespaces: bool) -> None:
    code = "def f(x):\n    return x + 1\nassert f(1) == 2\nprint('größe')"
    result = run(code, namespaces, timeout=5.0)
    assert result.ok and result.exit_code == 0 and result.stdout == "größe\n" and not result.timed_out
    assert result.network_isolated or result.reason


@MODES
def test_failures_are_told_apart(namespaces: bool) -> None:
    failed = run("assert 1 == 2", namespaces, timeout=5.0)
    assert not failed.ok and failed.exit_code == 1 and "AssertionError" in failed.stderr
    assert run("import sys; sys.exit(3)", namespaces, timeout=5.0).exit_code == 3
    assert run("import os; os.abort()", namespaces, timeout=5.0).exit_code == -6
    assert "SyntaxError" in run("def", namespaces, timeout=5.0).stderr
    assert not run("print('\ud800')", namespaces, timeout=5.0).ok


@MODES
def test_infinite_loop(namespaces: bool) -> None:
    result = run("while True: pass", namespaces, timeout=0.5)
    assert result.timed_out and not result.ok and "time-out" in result.reason and result.exit_code is None


def test_infinite_output_is_cut_off() -> None:
    result = run("import sys\nwhile True: sys.stdout.write('x' * 10000)", timeout=0.5, max_output=5000)
    assert result.timed_out and result.stdout == "x" * 5000


def test_a_flood_that_ends_is_no_failure() -> None:
    result = run("print('y' * 10**6)", timeout=5.0, max_output=100)
    assert result.ok and len(result.stdout) == 100


@MODES
def test_ignored_signals_do_not_help(namespaces: bool) -> None:
    code = "import signal\nfor n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: signal.pause()"
    assert run(code, namespaces, timeout=0.5).timed_out


@filtered
@MODES
def test_fork_bomb(namespaces: bool) -> None:
    result = run("import os\nwhile True: os.fork()", namespaces, timeout=5.0)
    assert not result.ok and "PermissionError" in result.stderr
    for attempt in [
        "subprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.system('true') or 1/0",
    ]:
        assert not run(f"import os, subprocess\nif {attempt} != 0: raise OSError", namespaces, timeout=5.0).ok


@filtered
def test_threads_are_still_allowed() -> None:
    code = "import threading\nt = threading.Thread(target=print, args=(7,))\nt.start(); t.join()"
    assert run(code, timeout=5.0).stdout == "7\n"


def test_too_many_processes_where_they_are_allowed() -> None:
    code = "import os, time\nfor _ in range(60):\n    if os.fork() == 0: time.sleep(60)\ntime.sleep(60)"
    result = run(code, timeout=3.0, processes=True)
    assert not result.ok and not result.timed_out


@MODES
def test_daemonized_children_do_not_survive(namespaces: bool) -> None:
    code = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3, 64):
            try: os.close(descriptor)
            except OSError: pass
        os.execve(sys.executable, [sys.executable, '-c', 'import time; time.sleep(77)', 'daemon-%s'], {})
    os._exit(0)
time.sleep(0.3)
print('parent done')
""".replace("%s", str(os.getpid()))
    result = run(code, namespaces, timeout=5.0, processes=True)
    assert result.ok and result.stdout == "parent done\n"
    assert not processes_with(f"daemon-{os.getpid()}\0")


def test_killing_everything_reaches_nothing() -> None:
    if not run("", timeout=5.0).network_isolated:
        pytest.skip("no PID namespace here, and without one this would end the tests as well")
    code = "import os\nos.kill(os.getppid(), 9)\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: print('alone')"
    result = run(code, timeout=5.0)
    assert result.ok and result.stdout == "alone\n"


def test_killing_the_keeper_is_a_failed_run() -> None:
    detached = (
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntry: os.setsid()\nexcept OSError: pass\n"
    )
    for start in ("import os, time\n", detached):
        code = start + "os.kill(os.getppid(), 9)\ntime.sleep(60)"
        result = run(code, namespaces=False, timeout=5.0)
        assert not result.ok and "keeper" in result.reason


def test_no_network() -> None:
    code = """
import socket
server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen()
socket.create_connection(server.getsockname(), 0.2)
"""
    result = run(code, timeout=5.0)
    assert not result.network_isolated or (not result.ok and "unreachable" in result.stderr)
    fallback = run("print(1)", namespaces=False, timeout=5.0)
    assert not fallback.network_isolated and "namespaces" in fallback.reason


@MODES
def test_big_allocation(namespaces: bool) -> None:
    result = run("x = bytearray(10**9)", namespaces, timeout=5.0)
    assert not result.ok and "MemoryError" in result.stderr
    assert run("x = bytearray(10**8)", namespaces, timeout=5.0).ok


@MODES
def test_big_file(namespaces: bool) -> None:
    result = run("open('big', 'wb').write(b'x' * 10**8)", namespaces, timeout=5.0)
    assert not result.ok and "OSError" in result.stderr
    assert run("open('small', 'w').write('x'); print(open('small').read())", namespaces, timeout=5.0).stdout == "x\n"


def test_the_rest_of_the_disk_is_read_only(tmp_path: Path) -> None:
    result = run(f"open({str(tmp_path / 'evil')!r}, 'w')", timeout=5.0)
    if result.network_isolated:
        assert "Read-only" in result.stderr and not (tmp_path / "evil").exists()
        folder = run("import os; os.mkdir('deep'); print(os.getcwd())", timeout=5.0).stdout.strip()
        assert not Path(folder).exists()


def test_stdin_is_empty_and_the_environment_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    result = run("import os, sys\nprint(repr(sys.stdin.read()), 'SECRET' in os.environ)", timeout=5.0)
    assert result.stdout == "'' False\n"


def test_several_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: run_python(f"print({n} * 2)", timeout=10.0), range(8)))
    assert [result.stdout for result in results] == [f"{n * 2}\n" for n in range(8)]
