"""The CPU kernels as a program of their own, built with sanitizers: out-of-bounds, undefined behavior, data races."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.levels import LEVELS

ROOT = Path(__file__).parents[2]
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
SOURCES = ("simd", "cpu_dispatch", "cpu_avx2", "cpu_avx512", "cpu_avx512vnni", "cpu_neon", "cpu_portable", "model_step")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ("address,undefined", "thread"))
def test_kernels_under_sanitizers(sanitizers, tmp_path):
    objects = []
    driver = Path(__file__).with_name("sanitize_kernels.cpp")
    for source in (*(ROOT / "csrc" / f"{name}.cpp" for name in SOURCES), driver):
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run(
            [COMPILER, "-O1", "-g", "-std=c++20", "-Wall", "-Wextra", f"-fsanitize={sanitizers}",
             "-fno-sanitize-recover=all", "-I", ROOT / "csrc", "-c", source, "-o", objects[-1]], check=True,
        )  # fmt: skip
    program = tmp_path / "sanitized"
    link = [COMPILER, f"-fsanitize={sanitizers}", *objects, "-pthread", "-o", program]
    subprocess.run(link, check=True)
    for level in LEVELS or ["portable"]:
        done = subprocess.run(
            [program], env=os.environ | {"NANOCHAT_SIMD": level, "ASAN_OPTIONS": "detect_leaks=1"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{level}: {done.stdout[-500:]}{done.stderr[-3000:]}"
        assert f"fine at {level}" in done.stdout
