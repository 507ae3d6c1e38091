"""What every test may rely on: a base folder of its own, one thread per worker, and skips that say why."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Two threads on tiny tensors mostly wait for each other; a test that wants more sets torch.set_num_threads itself.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NANOCHAT_OFFLINE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _own_base_dir(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the user's own data, checkpoints and tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        reason = f"needs a CUDA device; torch {torch.__version__} finds none"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
