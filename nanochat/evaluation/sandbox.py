"""Runs untrusted Python (HumanEval's completions) so that it can neither hurt this process nor outlive its run.

Three processes. *We* start the *keeper*, this file as a script in a session of its own (`python -I sandbox.py`); the
keeper gives up what it can and starts the *program*; it reports on a pipe of its own and nothing it says is taken from
the program's output. Where the kernel lets an ordinary user make namespaces, the program gets its own

- PID namespace: it sees no process but its own to signal, and when its first process ends the kernel ends all others;
- network namespace: no interface is up, so there is no network, not even localhost;
- mount namespace: everything is read-only but the working folder, a small tmpfs;
- user namespace, as an ordinary user of it: exec drops every capability that setting up took.

Elsewhere (macOS, containers that forbid it; `reason` says so) the keeper becomes the subreaper of its descendants, so
that daemonized children fall back to it, and kills them until none is left. In either case: rlimits on address
space, CPU time, file size and open files; an empty environment; output past the cap is dropped; and, as RLIMIT_NPROC
does not bind root and a keeper that only counts loses the race against a fork bomb (tried: thousands of processes in
half a second), a seccomp filter that refuses to start processes at all, threads excepted. It is a fence against
accidents and mischief by a language model, not a proof against kernel exploits.
"""

import ctypes
import errno
import json
import os
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MAX_PROCESSES = 32  # where processes are allowed, or the filter is not known for this CPU
MAX_OPEN_FILES = 64
DISK_BYTES = 16 * 2**20  # of the working folder, and of any one file
START_ALLOWANCE = 5.0  # seconds beyond its time-out after which a keeper that says nothing is killed
POLL = 0.01  # seconds between two looks of the keeper at the program

CLONE_FLAGS = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, IPC, user, PID, network
CLONE_THREAD = 0x00010000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SECCOMP_MODE_FILTER, SECCOMP_ALLOW, SECCOMP_FAIL, SECCOMP_KILL = 2, 0x7FFF0000, 0x00050000, 0x80000000
CLONE3 = 435  # on every architecture; its flags lie in memory, where a filter cannot look
START_CALLS = {"x86_64": (0xC000003E, 56, (57, 58)), "aarch64": (0xC00000B7, 220, ())}  # audit code, clone, forks
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
MS_NOSUID_NODEV, MS_PRIVATE_RECURSIVE = 2 | 4, (1 << 18) | 16384


@dataclass(frozen=True)
class SandboxResult:
    """What became of a program. `ok` means that it ran to its end with exit code 0.

    `exit_code` is negative for a signal, None when we ended it. `reason` says in words why it is not ok, and which
    isolation this machine refused.
    """

    ok: bool
    timed_out: bool
    exit_code: int | None
    stdout: str
    stderr: str
    network_isolated: bool
    reason: str


def run_python(
    code: str,
    timeout: float = 5.0,
    memory_bytes: int = 512 * 2**20,
    max_output: int = 64 * 2**10,
    namespaces: bool = True,
    processes: bool = False,
) -> SandboxResult:
    """Run `code` as the main module of a fresh Python without site packages, for at most `timeout` seconds.

    `memory_bytes` bounds the address space of each process, `max_output` the bytes kept of stdout and of stderr.
    `namespaces=False` takes the fallback on purpose; `processes=True` lets the program start others.
    Safe in any thread; nothing of the run survives the call.
    """
    folder = tempfile.mkdtemp(prefix="nanochat-sandbox-")
    report_read, report_write = os.pipe()
    try:
        order = {
            "code": code,
            "folder": folder,
            "timeout": timeout,
            "memory": memory_bytes,
            "report": report_write,
            "namespaces": namespaces,
            "processes": processes,
        }
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[report_write],
            start_new_session=True,
            env={},
            cwd=folder,
        )
        os.close(report_write)
        report_write = -1
        stdout, stderr = _converse(keeper, json.dumps(order).encode(), timeout + START_ALLOWANCE, max_output)
        os.set_blocking(report_read, False)
        try:
            report = json.loads(os.read(report_read, 2**16))
        except (BlockingIOError, ValueError):
            report = {}  # the keeper was killed: what it kept falls to us
            _sweep(f"HOME={folder}".encode())
    finally:
        os.close(report_read)
        if report_write >= 0:
            os.close(report_write)
        shutil.rmtree(folder, ignore_errors=True)
    return _result(report, stdout, stderr)


def _converse(keeper: subprocess.Popen[bytes], order: bytes, limit: float, max_output: int) -> tuple[bytes, bytes]:
    """Give the keeper its order and collect output until it ends; end its group if it does not."""
    assert keeper.stdin and keeper.stdout and keeper.stderr
    pipes = {keeper.stdout: bytearray(), keeper.stderr: bytearray()}
    deadline = time.monotonic() + limit
    try:
        try:
            keeper.stdin.write(order)
            keeper.stdin.close()
        except BrokenPipeError:
            pass
        with selectors.DefaultSelector() as selector:
            for pipe in pipes:
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ)
            ended = False
            while selector.get_map() and time.monotonic() < deadline:
                ready = selector.select(0 if ended else POLL)
                for key, _ in ready:
                    data = os.read(key.fd, 2**16)
                    if not data:
                        selector.unregister(key.fileobj)
                    kept = pipes[key.fileobj]  # type: ignore[index]
                    kept += data[: max_output - len(kept)]
                if ended and not ready:
                    break
                ended = keeper.poll() is not None
    finally:
        try:
            os.killpg(keeper.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        keeper.wait()
        for pipe in pipes:
            pipe.close()
    return bytes(pipes[keeper.stdout]), bytes(pipes[keeper.stderr])


def _sweep(marker: bytes) -> None:
    """End every process whose first environment held `marker`, and wait until none is left (at most a second)."""
    deadline = time.monotonic() + 1.0
    while os.path.isdir("/proc") and time.monotonic() < deadline:
        found = False
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if marker in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found = True
                    os.kill(int(entry), signal.SIGKILL)
            except OSError:
                continue  # it ended meanwhile, or is another user's
        if not found:
            return
        time.sleep(0.002)


def _result(report: dict, stdout: bytes, stderr: bytes) -> SandboxResult:
    exit_code, ended_for, refused = report.get("exit_code"), report.get("ended_for", ""), report.get("refused", "")
    if not report:
        ended_for = "the sandbox's keeper ended without a report"
    elif not ended_for and exit_code != 0:
        ended_for = f"exit code {exit_code}"
    return SandboxResult(
        ok=not ended_for and exit_code == 0,
        timed_out=ended_for == "time-out",
        exit_code=exit_code,
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        network_isolated=bool(report.get("network_isolated")),
        reason="; ".join(filter(None, [ended_for, refused])),
    )


# The keeper's half: only the standard library, no threads, one order on stdin.


def _keep() -> None:
    order = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    os.set_inheritable(order["report"], False)
    _prctl(libc, PR_SET_PDEATHSIG, signal.SIGKILL)
    refused = _isolate(libc, order["folder"]) if order["namespaces"] else "no namespaces were asked for"
    isolated = not refused
    program = Path(order["folder"], "program.py")
    program.write_text(order["code"], encoding="utf-8", errors="surrogatepass")
    if not isolated:
        _prctl(libc, PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        try:
            if isolated:
                _be_init(libc, order, program)
            _become(libc, order, program)
        finally:
            os._exit(127)
    exit_code, ended_for = _watch(child, order["timeout"], isolated)
    if not isolated:
        _kill_descendants()
    report = {"exit_code": exit_code, "ended_for": ended_for, "network_isolated": isolated, "refused": refused}
    os.write(order["report"], json.dumps(report).encode())


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)


def _isolate(libc: ctypes.CDLL, folder: str) -> str:
    """Enter new namespaces (children also a PID namespace); returns why not, or an empty string."""
    uid, gid = os.geteuid(), os.getegid()
    if not hasattr(libc, "unshare"):
        return "this system has no namespaces"
    if libc.unshare(CLONE_FLAGS) != 0:
        return f"the kernel refused namespaces ({os.strerror(ctypes.get_errno())})"
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
    except OSError as error:
        return f"the user namespace could not be set up ({error.strerror})"
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    options = f"size={DISK_BYTES},mode=700".encode()
    if (
        libc.mount(None, b"/", None, MS_PRIVATE_RECURSIVE, None) == 0
        and libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)) == 0
    ):
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, options)
        os.chdir(folder)
    return ""


def _be_init(libc: ctypes.CDLL, order: dict, program: Path) -> None:
    """The PID namespace's first process: starts the program, reaps orphans, ends as the program ended."""
    _prctl(libc, PR_SET_PDEATHSIG, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        try:
            _become(libc, order, program)
        finally:
            os._exit(127)
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    while True:
        pid, status = os.wait()
        if pid == child:  # a signal cannot be passed on from inside as such; 128 + n is the shell's way to say it
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _become(libc: ctypes.CDLL, order: dict, program: Path) -> None:
    """Take on the limits and become the program."""
    _prctl(libc, PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    cpu = int(order["timeout"]) + 1
    limits = {
        "RLIMIT_AS": order["memory"],
        "RLIMIT_CPU": cpu,
        "RLIMIT_FSIZE": DISK_BYTES,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    if order["namespaces"]:  # counted per user namespace; outside one it would count all that the user runs
        limits["RLIMIT_NPROC"] = MAX_PROCESSES
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            pass  # macOS refuses some; the others hold
    if not order["processes"]:
        _forbid_processes(libc)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    environment = {"PATH": os.defpath, "HOME": order["folder"], "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-X", "utf8", str(program)], environment)


def _forbid_processes(libc: ctypes.CDLL) -> None:
    """Make fork, vfork, and clone without CLONE_THREAD fail with EPERM in this process and what it becomes."""
    machine = os.uname().machine
    if machine not in START_CALLS or not hasattr(libc, "prctl"):
        return
    audit, clone, forks = START_CALLS[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF operations on 32-bit words
    steps = [
        (load, 0, 0, 4),  # architecture of the call; another one has other numbers
        (equal, 1, 0, audit),
        (give, 0, 0, SECCOMP_KILL),
        (load, 0, 0, 0),  # the call's number
        (at_least, 0, 1, 0x40000000),  # x32, a second numbering
        (give, 0, 0, SECCOMP_KILL),
        (equal, 0, 1, CLONE3),
        (give, 0, 0, SECCOMP_FAIL | errno.ENOSYS),  # glibc then starts a thread by clone
    ]
    for number in forks:
        steps += [(equal, 0, 1, number), (give, 0, 0, SECCOMP_FAIL | errno.EPERM)]
    steps += [
        (equal, 1, 0, clone),
        (give, 0, 0, SECCOMP_ALLOW),
        (load, 0, 0, 16),  # clone's flags
        (any_bit, 0, 1, CLONE_THREAD),
        (give, 0, 0, SECCOMP_ALLOW),
        (give, 0, 0, SECCOMP_FAIL | errno.EPERM),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def _watch(child: int, timeout: float, isolated: bool) -> tuple[int | None, str]:
    """Wait for the child; end it when its time or its processes are used up. Returns (exit code, why ended)."""
    deadline = time.monotonic() + timeout
    ended_for = ""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return (128 - code if isolated and code > 128 else code), ""
        if time.monotonic() > deadline:
            ended_for = "time-out"
        elif len(_descendants()) > MAX_PROCESSES + 1:
            ended_for = f"more than {MAX_PROCESSES} processes"
        if ended_for:
            os.kill(child, signal.SIGKILL)  # of a PID namespace: returns from waitpid once all in it are dead
            os.waitpid(child, 0)
            return None, ended_for
        time.sleep(POLL)


def _descendants() -> list[int]:
    """Every process below this one, from /proc (none where there is no /proc)."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it ended meanwhile
            children.setdefault(parent, []).append(int(entry))
    found, frontier = [], [os.getpid()]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def _kill_descendants() -> None:
    """End everything below this process. As subreaper it inherits every orphan, so none can slip away for good."""
    while True:
        for pid in _descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


if __name__ == "__main__":
    _keep()
