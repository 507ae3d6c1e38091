"""Builds the CUDA kernels as C++ over csrc/emulator.cuh, once per state of the sources, and lends them to a test."""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
STALE = 3600  # seconds after which what no longer fits the sources is deleted
FLAGS = ("-std=c++20", "-O2", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@functools.cache  # sources that change meanwhile do not make a second one in this process
def build() -> Path:
    """The library; a test that asks for it is skipped where there is no C++ compiler."""
    import torch

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the emulator of the CUDA kernels")
    package = Path(torch.__file__).parent
    include = package / "include"
    headers = sorted([*CSRC.glob("*.cuh"), CSRC / "cuda_kernels.h"])
    kernels = [(path, ["-x", "c++"]) for path in sorted(CSRC.glob("*.cu"))]
    system = [f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]
    library = ["-DNANOCHAT_EMULATED=1", "-DNANOCHAT_LIBRARY=nanochat_emulated", *system]
    # the file that includes the others changes with them
    ops = Path(__file__).with_name("emulated_ops.cpp")
    included = [CSRC / "ops.cpp", CSRC / "cuda_ops.cpp"]

    folder = ROOT / "build" / f"emulator-{sysconfig.get_platform()}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source, flags in [*kernels, (ops, library)]:
        parts = [source, *headers, *(included if source == ops else [])]
        key = hashlib.sha256(b"".join(path.read_bytes() for path in parts))
        key.update(repr((FLAGS, flags, torch.__version__, compiler)).encode())
        target = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not target.exists():
            _run(target, [compiler, *FLAGS, *flags, "-c", str(source)])
        objects.append(target)
    names = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    target = folder / f"emulated-{names}.so"
    if not target.exists():
        linked = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{package / 'lib'}"]
        _run(target, [compiler, "-shared", *map(str, objects), *linked])
    for other in {*folder.iterdir()} - {*objects, target}:
        if other.stat().st_mtime < time.time() - STALE:
            other.unlink(missing_ok=True)
    return target


def _run(target: Path, command: list[str]) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    os.replace(partial, target)


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """Within, the backends of nanochat_kernels.native_cuda serve CPU tensors."""
    from nanochat_kernels import native_cuda

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native_cuda.EMULATOR, str(build()))
        native_cuda._emulated.cache_clear()
        yield
    native_cuda._emulated.cache_clear()
