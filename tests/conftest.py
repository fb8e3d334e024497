"""What every test process needs before torch is imported, and the order of those that start vLLM."""

import os
from pathlib import Path

import pytest

# libgomp's spinning threads cost 200x on shared cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ENGINES = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mixtures of experts first: vLLM cannot start one in a process whose first engine was dense. Then the other
    engines, which take longest, so that two processes end together."""
    items.sort(key=lambda item: (item.get_closest_marker("mixture") is None, ENGINES not in item.path.parents))
