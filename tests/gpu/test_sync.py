"""What the CPU tests prove, on a GPU: every target it can run and read back, synced into a live engine."""

from __future__ import annotations

import pytest
import torch

from quant.config import QuantConfig, TargetSpec, shipped
from quant.hardware import detect_device, unsupported_reason
from tests.integration.test_sync import PROMPTS, SEEDS, Case
from tests.machine import KV

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quant", [*(QuantConfig(target=name) for name in shipped()), KV], ids=lambda q: q.target)
def test_synced_engine_equals_a_fresh_one(tmp_path, quant, tied) -> None:
    """Tokens and log-probs after a sync are those of a fresh engine, bit for bit, and its kernels read back exactly."""
    spec: TargetSpec = quant.spec()
    reason = unsupported_reason(spec, detect_device())
    if reason or not spec.read_back:
        pytest.skip(reason or f"{spec.name} cannot be read back yet")
    engine, new = Case(0, quant, tied).start(tmp_path), Case(1, quant, tied)
    expected = new.start(tmp_path).generate(PROMPTS, SEEDS)
    new.sync_to(engine)
    assert engine.generate(PROMPTS, SEEDS) == expected
