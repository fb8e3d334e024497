"""The `[eval]` table: how the shipped artifact is served and measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quant.config import Frozen


class EvalConfig(Frozen):
    """Serving and evaluation of the export and of the BF16 model."""

    grader: Literal["exact", "math-verify"] | None = Field(None, description="default: as in training")
    limit: int | None = Field(None, ge=1, description="evaluate on the first N held-out problems; default: all")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    max_tokens: int | None = Field(None, ge=1, description="default: the training rollouts' limit")
    max_model_len: int | None = Field(None, ge=2, description="default: the training rollouts' limit")
    discrepancy_prompts: int = Field(256, ge=2, description="held-out prompts on which the served gap is measured")
    startup_timeout: float = Field(300.0, gt=0, description="seconds a server may take to become healthy")
    kv_cache_gib: int = Field(1, ge=1, description="CPU only: GiB of KV cache")
    gpu_memory_utilization: float = Field(
        0.45, gt=0, lt=1, description="GPU only: share of the card for one server; the two run at once"
    )
    concurrency: int = Field(64, ge=1, description="requests in flight")
