"""Every CUDA kernel compiles for Hopper without a warning, within its recorded registers and shared memory."""

import importlib.util
import json
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SLOW = {"paged_attention.cu"}  # many instances: 20 s
spec = importlib.util.spec_from_file_location("compile_check", CSRC / "compile_check.py")
compile_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compile_check)

FILES = [
    pytest.param(path, id=path.name, marks=[pytest.mark.long] if path.name in SLOW else [])
    for path in sorted(CSRC.glob("*.cu"))
]


@pytest.mark.parametrize("path", FILES)
def test_compiled_within_the_recorded_allowances(path):
    nvcc = compile_check.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc not found: set CUDA_HOME, or install the dev extra")
    allowed = json.loads(compile_check.ALLOWANCES.read_text())[path.name]
    facts = compile_check.compile_file(path, nvcc)
    assert set(facts) == set(allowed)
    red = {name: compile_check.compare(seen, allowed[name]) for name, seen in facts.items()}
    assert not any(red.values()), red


def test_nothing_recorded_spills():
    recorded = json.loads(compile_check.ALLOWANCES.read_text())
    assert set(recorded) == {path.name for path in CSRC.glob("*.cu")}
    assert all(facts["spill_bytes"] == 0 for kernels in recorded.values() for facts in kernels.values())


REPORT = """
ptxas info    : Compiling entry function '_Z6kernelIfEvT_' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelIfEvT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem
"""


def test_the_report_is_read_and_what_grew_is_red():
    facts = compile_check.read_report(REPORT)
    assert facts == {"kernel<float>": {"registers": 40, "spill_bytes": 24, "shared_bytes": 128}}
    allowed = {"registers": 39, "spill_bytes": 0, "shared_bytes": 128}
    assert compile_check.compare(facts["kernel<float>"], allowed) == ["registers 40 > 39", "spill_bytes 24 > 0"]
    assert compile_check.compare(facts["kernel<float>"], None) == ["no allowance recorded"]
