"""vLLM in this process: the engine that rolls out from the deployed checkpoint.

In process because a sync is then a hand-over of tensors. Left out: servers, several ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from train.config import RolloutConfig
from train.records import Completion
from train.rollout import EngineWeights

# vLLM's engines in one process share state that goes with the first one collected: keep them all.
_alive: list[object] = []


class VllmEngine:
    """One in-process vLLM engine on one checkpoint folder.

    Raises:
        ValueError: from vLLM, when the checkpoint does not fit the machine.
    """

    def __init__(self, checkpoint: Path, config: RolloutConfig, *, seed: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # vLLM compiles a four-line helper of its sampler on first use: 19 s on a CPU, for nothing
            torch._dynamo.config.disable = True

        self.config = config
        memory: dict[str, Any] = (
            {} if current_platform.is_cpu() else {"gpu_memory_utilization": config.gpu_memory_utilization}
        )
        self._llm = LLM(
            model=str(checkpoint),
            dtype="bfloat16",
            enforce_eager=True,
            enable_prefix_caching=config.prefix_caching,
            seed=seed,
            max_model_len=config.max_model_len,
            max_num_seqs=config.prompts * config.group_size,
            # the reported log-probs are those of the distribution sampled from, after temperature
            logprobs_mode="processed_logprobs",
            worker_extension_cls="train.vllm_worker.WeightSync",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **memory,
        )
        _alive.append(self._llm)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See RolloutEngine. Cached keys and values of the old weights are dropped with them."""
        self._llm.collective_rpc("boresight_load", args=(list(tensors.items()),))
        if self.config.prefix_caching and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: requests are still running during a weight sync")

    def read_back(self) -> EngineWeights:
        """See RolloutEngine."""
        fingerprints, kernels = self._llm.collective_rpc("boresight_read_back")[0]
        return EngineWeights(fingerprints, kernels)

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        """See RolloutEngine."""
        from vllm import SamplingParams

        size = self.config.group_size
        sampling = [
            SamplingParams(
                n=size,
                temperature=self.config.temperature,
                max_tokens=self.config.max_tokens,
                logprobs=0,
                flat_logprobs=True,
                seed=seed * size,  # vLLM seeds completion g of a prompt with seed + g
                detokenize=False,
                ignore_eos=self.config.ignore_eos,
            )
            for seed in seeds
        ]
        outputs: Any = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False
        )
        return [
            [
                Completion(
                    tuple(sample.token_ids),
                    # one entry per token: the sampled token's own log-prob (logprobs=0 asks for no others)
                    tuple(sample.logprobs.logprobs),
                    str(sample.finish_reason),
                )
                for sample in output.outputs
            ]
            for output in outputs
        ]
