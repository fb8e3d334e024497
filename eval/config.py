"""The `[eval]` table: how the shipped artifact is served and measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quant.config import Frozen


class ServingConfig(Frozen):
    """How models are served to be measured: what `[eval]` and a suite's `[serving]` have in common."""

    servers_at_once: bool | None = Field(
        None, description="all servers together, or one after the other; default: together on a CPU alone"
    )
    startup_timeout: float = Field(300.0, gt=0, description="seconds a server may take to become healthy")
    kv_cache_gib: int = Field(1, ge=1, description="CPU only: GiB of KV cache")
    gpu_memory_utilization: float = Field(0.45, gt=0, lt=1, description="GPU only: share of the card for one server")
    concurrency: int = Field(64, ge=1, description="requests in flight")
    request_timeout: float = Field(
        3600.0,
        gt=0,
        description="seconds for one request; long, because an answer behind a full queue is slow, not lost",
    )


class EvalConfig(ServingConfig):
    """Serving and evaluation of the export and of the BF16 model."""

    grader: Literal["exact", "math-verify"] | None = Field(None, description="default: as in training")
    limit: int | None = Field(None, ge=1, description="evaluate on the first N held-out problems; default: all")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    max_tokens: int | None = Field(None, ge=1, description="default: the training rollouts' limit")
    max_model_len: int | None = Field(None, ge=2, description="default: the training rollouts' limit")
    suite: str | None = Field(
        None, description="more tasks than the held-out problems: a shipped suite's name, or the path of your own"
    )
    repeat_baseline: bool = Field(True, description="serve the BF16 model twice, for the engine's own noise")
    discrepancy_prompts: int = Field(256, ge=2, description="held-out prompts on which the served gap is measured")
