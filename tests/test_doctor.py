"""`nanochat doctor` on machines that lack something."""

import pytest

from nanochat import doctor


def findings(check):
    return {finding.name: finding for finding in check}


def test_a_machine_without_tools(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    found = findings(doctor.check_compilers())
    assert found["C++"].state == found["cargo"].state == "note"
    assert found["C++"].remedy and found["cargo"].remedy


def test_a_missing_tokenizer_fails_the_examination(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.run(doctor.DoctorConfig(bandwidth=False)) == 1
    assert "bash runs/setup.sh" in capsys.readouterr().out


def test_a_folder_called_kernels_is_not_the_package():
    """The name `kernels` can be found as a namespace package in this very checkout."""
    assert doctor._version("surely-not-installed") is None
    extras = findings(doctor.check_python())["extras"]
    assert ("kernels" in extras.value) == (doctor._version("kernels") is not None)


def test_disk_is_looked_up_where_the_base_folder_will_be(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "not" / "yet"))
    found = findings(doctor.check_space())
    assert str(tmp_path) in found["disk"].value and not (tmp_path / "not").exists()


def test_read_bandwidth_is_plausible():
    assert 1e8 < doctor.read_bandwidth(size=2**24, repeats=2) < 1e13


@pytest.mark.parametrize("flags", [[], ["avx2", "fma"]])
def test_simd_line(monkeypatch, flags):
    monkeypatch.setattr(doctor, "simd_flags", lambda: flags)
    assert all(flag in findings(doctor.check_cpu(measure=False))["SIMD"].value for flag in flags or ["none of"])
