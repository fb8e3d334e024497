"""What every test process needs before torch is imported, and which tests share a process, in which order."""

import os
from pathlib import Path

import pytest

# libgomp's spinning threads cost 200x on shared cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ENGINES = Path(__file__).parent / "integration"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mixtures of experts first and in one process: vLLM cannot start one where the first engine was dense. Then the
    other engines, which take longest; the tests of a file share a process, and with it their fixtures."""

    def mixture(item: pytest.Item) -> bool:
        return item.get_closest_marker("mixture") is not None

    items.sort(key=lambda item: (not mixture(item), ENGINES not in item.path.parents))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("mixture" if mixture(item) else str(item.path)))
