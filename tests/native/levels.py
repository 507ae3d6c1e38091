"""The SIMD levels that run here, as a parametrization: every kernel test runs on each of them."""

import pytest

from nanochat_kernels import native

LEVELS = native.bindings().simd_levels().split() if native.missing() is None else []
each_level = pytest.mark.parametrize(
    "level", LEVELS or [pytest.param("none", marks=pytest.mark.skip(reason=native.missing() or ""))]
)
