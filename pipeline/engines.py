"""Make the rollout engine that a run's config names, and end what it started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.config import RunConfig
from train.exact_engine import ExactEngine, end_tokens
from train.policy import Policy
from train.rollout import RolloutEngine
from train.server_pool import ServerPool
from train.vllm_engine import VllmEngine


@contextmanager
def rollout_engine(
    config: RunConfig, checkpoint: Path, *, policy: Policy, tokenizer: Any, folder: Path
) -> Iterator[RolloutEngine]:
    """The engine, for the duration of the block.

    Args:
        config: of the run.
        checkpoint: what the engine starts from: the exported folder, or the BF16 model's.
        policy: whose module the exact engine copies.
        tokenizer: of the model.
        folder: gets the servers' logs.
    """
    rollout = config.train.rollout
    if rollout.engine == "exact":
        yield ExactEngine(policy, end_tokens(policy.module, tokenizer))
    elif rollout.engine == "vllm":
        yield VllmEngine(checkpoint, rollout, seed=config.seed)
    else:
        console.say(f"  starting rollout servers, logs in {folder}")
        with ServerPool(checkpoint, rollout, seed=config.seed, folder=folder, warn=console.warn) as pool:
            yield pool
