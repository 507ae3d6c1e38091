"""Builds csrc/ into nanochat_kernels; everything else about the package stands in pyproject.toml.

Two shared objects come out, because they live by different rules. `_ops` holds the tensor operations: a plain library
without a Python symbol, loaded with torch.ops.load_library, so that it does not depend on the Python version.
`_bindings` (csrc/bindings.cpp) is a pybind11 module for what is not a tensor operation.

After a change in csrc/: `python setup.py build_ext --inplace`, seconds, as only what changed is compiled again.

NANOCHAT_BUILD = auto (default): CUDA when nvcc is found, otherwise CPU, otherwise nothing, and it says so;
                 cuda | cpu: exactly that, an error when it cannot be done;  none: pure Python.
CUDA hangs on nvcc being found, not on a GPU being present, so that a build machine needs none.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
MODES = ("auto", "cuda", "cpu", "none")
# Few files include torch's headers (20 s each); those with SIMD code say in themselves for which CPU they are compiled.
CXX_FLAGS = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-g0"]
BINDINGS = ("bindings.cpp", "simd.cpp")
NVCC_FLAGS = ["-O3", "-std=c++20", "-Werror=all-warnings"]


def find_compilers() -> tuple[str | None, str | None]:
    """The C++ compiler and nvcc, each None where there is none. nvcc may come from wheels too."""
    cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *(str(Path(p) / "nvidia" / "cu13") for p in sys.path)]
    candidates = [shutil.which("nvcc"), *(str(Path(home) / "bin" / "nvcc") for home in homes if home)]
    return cxx, next((nvcc for nvcc in candidates if nvcc and Path(nvcc).is_file()), None)


def torch_has_cuda() -> bool:
    """A CPU build of torch has no CUDA to compile against, though nvcc may be there (the dev extra brings it)."""
    import torch

    return torch.version.cuda is not None


def choose_mode() -> str:
    """`cuda`, `cpu` or `none` for what NANOCHAT_BUILD asks and this machine has."""
    asked = os.environ.get("NANOCHAT_BUILD", "auto")
    if asked not in MODES:
        raise SystemExit(f"NANOCHAT_BUILD={asked!r} is not one of {', '.join(MODES)}")
    cxx, nvcc = find_compilers()
    if asked == "cuda" and not (cxx and nvcc):
        raise SystemExit("NANOCHAT_BUILD=cuda needs a C++ compiler and nvcc: put it on PATH or set CUDA_HOME")
    if asked == "cpu" and not cxx:
        raise SystemExit("NANOCHAT_BUILD=cpu needs a C++ compiler (c++, g++ or clang++; or set CXX)")
    if asked != "auto":
        return asked
    if not cxx:
        print("nanochat: no C++ compiler found, building without extensions (the torch backends serve every op)")
        return "none"
    return "cuda" if nvcc and torch_has_cuda() else "cpu"


def cudart_folder() -> list[str]:
    """A folder where the linker finds libcudart.so: NVIDIA's wheels bring it under its versioned name alone."""
    versioned = sorted((Path(os.environ["CUDA_HOME"]) / "lib").glob("libcudart.so.*"))
    if not versioned:
        return []
    link = ROOT / "build" / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(versioned[0])
    return [str(link.parent)]


def build_arguments() -> dict:
    """What setup() needs to build csrc/: nothing where there are no sources or nothing is to be built."""
    mode = choose_mode()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja lies beside python
    sources = sorted(path for path in CSRC.glob("*.cpp") if path.name != "bindings.cpp")
    if mode == "none" or not sources:
        return {}
    if mode == "cuda":
        os.environ.setdefault("CUDA_HOME", str(Path(find_compilers()[1] or "").parent.parent))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        sources += sorted(CSRC.glob("*.cu"))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    extension = CUDAExtension if mode == "cuda" else CppExtension
    # as system headers, torch's own may warn; -isystem wins over the -I that the builder adds
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if mode == "cuda" else ""
    facts = [f"-DNANOCHAT_CUDA={int(mode == 'cuda')}", f'-DNANOCHAT_ARCHS="{archs}"']
    # what at::parallel_for is made of; torch brings the library
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = {"cxx": [*CXX_FLAGS, *openmp, *system, *facts], "nvcc": NVCC_FLAGS}
    headers = [str(path.relative_to(ROOT)) for path in (*CSRC.glob("*.h"), *CSRC.glob("*.cuh"))]
    targets = {"nanochat_kernels._ops": sources, "nanochat_kernels._bindings": [CSRC / name for name in BINDINGS]}
    modules = [
        extension(
            name,
            [str(path.relative_to(ROOT)) for path in paths],
            extra_compile_args=flags,
            extra_link_args=openmp,
            library_dirs=cudart_folder() if mode == "cuda" else [],
            depends=headers,
        )
        for name, paths in targets.items()
    ]
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


def packages() -> list[str]:
    """Every package of both trees, each under its import name."""
    found = [path.parent.relative_to(ROOT) for path in sorted(ROOT.glob("nanochat/**/__init__.py"))]
    found += [path.parent.relative_to(ROOT / "kernels") for path in sorted(ROOT.glob("kernels/*/**/__init__.py"))]
    return [".".join(path.parts) for path in found]


setup(packages=packages(), package_dir={"nanochat_kernels": "kernels/nanochat_kernels"}, **build_arguments())
