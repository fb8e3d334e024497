"""vLLM in this process: the engine that rolls out from the deployed checkpoint.

In process because a sync is then a hand-over of tensors; servers are in train/server_pool.py. Left out: several ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from quant.errors import BoresightError
from train.config import RolloutConfig
from train.records import Completion
from train.rollout import CPU_BATCH_TOKENS, EngineWeights
from train.routing import RoutingError
from train.vllm_experts import MOE_BACKEND
from train.vllm_routing import RoutingRecorder

# vLLM's engines in one process share state that goes with the first one collected: keep them all.
_alive: list[object] = []


class UnsupportedModeError(BoresightError):
    """vLLM does not have the mode that was asked for on this device."""


class VllmEngine:
    """One in-process vLLM engine on one checkpoint folder.

    `batch_invariant` (read from vLLM's source, not run yet) sets VLLM_BATCH_INVARIANT before vLLM is imported; its
    worker then replaces torch's CUDA kernels in this process, the trainer's among them, and they stay replaced. It
    makes rollouts independent of their batch. It does not make them equal to the trainer's: the model code differs.

    With `sleep` (not run on a GPU yet) the engine sleeps at level 1 after every `generate`: its weights wait in the
    host's memory and its KV cache is given up, so that the trainer has the GPU; whatever is asked of it next wakes it.

    With `routing_replay` completions carry the experts their tokens were routed to. On a GPU vLLM returns them (by its
    source; not run on one yet), and it asks for prefix caching; on a CPU a recorder of ours reads vLLM's hooks, and
    that needs prefix caching off.

    Raises:
        ValueError: from vLLM, when the checkpoint does not fit the machine.
        RoutingError: routing cannot be recorded for this model or with this prefix caching.
        UnsupportedModeError: `batch_invariant` or `sleep` on a CPU.
    """

    def __init__(self, checkpoint: Path, config: RolloutConfig, *, seed: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override ours
        os.environ["VLLM_USE_DEEP_GEMM_E8M0"] = "0"  # it would round the scales of FP8 blocks to powers of two
        os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # on a CPU with AMX, W4A16 would get 8-bit activations
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.platforms import current_platform

        if config.sleep and current_platform.is_cpu():
            raise UnsupportedModeError("train.rollout.sleep needs a GPU: on a CPU there is no other memory to sleep in")
        if config.batch_invariant:
            if current_platform.is_cpu():
                raise UnsupportedModeError(
                    "train.rollout.batch_invariant needs a GPU: vLLM has no such kernels on a CPU"
                )
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
        from vllm import LLM

        if current_platform.is_cpu():
            # vLLM compiles a four-line helper of its sampler on first use: 19 s on a CPU, for nothing
            torch._dynamo.config.disable = True

        self.config = config
        self.version, self._asleep = 0, False
        memory: dict[str, Any] = (
            {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
            if current_platform.is_cpu()
            else {"gpu_memory_utilization": config.gpu_memory_utilization, "moe_backend": MOE_BACKEND}
        )
        if current_platform.is_cpu():
            # vLLM's sampler on a CPU cannot take back a seeded draw, as it must for a prompt that is computed in parts
            tokens = max(CPU_BATCH_TOKENS, config.max_model_len, config.prompts * config.group_size)
            memory |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
        if config.routing_replay:
            caching = not current_platform.is_cpu()
            if config.prefix_caching != caching:
                raise RoutingError(
                    f"train.rollout.prefix_caching must be {str(caching).lower()} where routing_replay records on a "
                    f"{current_platform.device_type} engine, got {str(config.prefix_caching).lower()}"
                )
            if not current_platform.is_cpu():
                memory["enable_return_routed_experts"] = True
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
            enable_sleep_mode=config.sleep,
            **memory,
        )
        _alive.append(self._llm)
        # at the process's end vLLM would search the whole heap for garbage, once per engine; all of it is gone anyway
        engine_core: Any = self._llm.llm_engine.engine_core
        engine_core._finalizer.atexit = False
        self._recorder: RoutingRecorder | None = None
        if config.routing_replay and current_platform.is_cpu():
            self._recorder = self._llm.collective_rpc(_record_routing)[0]  # in process: the live object

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See RolloutEngine. Cached keys and values of the old weights are dropped with them."""
        self._wake()
        self._llm.collective_rpc("boresight_load", args=(list(tensors.items()),))
        self.version += 1
        if self.config.prefix_caching and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: requests are still running during a weight sync")

    def read_back(self) -> EngineWeights:
        """See RolloutEngine."""
        self._wake()
        fingerprints, kernels = self._llm.collective_rpc("boresight_read_back")[0]
        return EngineWeights(fingerprints, kernels)

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        """See RolloutEngine."""
        from vllm import SamplingParams

        self._wake()
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
        routes = self._recorder.take() if self._recorder else {}
        if self.config.sleep:
            self._llm.sleep(level=1)
            self._asleep = True
        return [
            [
                Completion(
                    tuple(sample.token_ids),
                    # one entry per token: the sampled token's own log-prob (logprobs=0 asks for no others)
                    tuple(sample.logprobs.logprobs),
                    str(sample.finish_reason),
                    self._experts(output, sample, routes),
                    self.version,
                )
                for sample in output.outputs
            ]
            for output in outputs
        ]

    def metrics(self) -> dict[str, float]:
        """See RolloutEngine; nothing."""
        return {}

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of given responses, teacher-forced, at temperature 1 whatever the engine samples at.

        vLLM gives the log-probs of a prompt's tokens without temperature, so each response is scored as the end of a
        prompt. One token is generated besides, so prompt and response must be shorter than `max_model_len`.

        Args:
            prompts: N prompts' token ids.
            responses: N responses' token ids, each of at least one token.

        Returns:
            N lists, a log-prob in nats for each response token.
        """
        from vllm import SamplingParams

        self._wake()
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        outputs: Any = self._llm.generate(
            [{"prompt_token_ids": [*prompt, *response]} for prompt, response in zip(prompts, responses, strict=True)],
            sampling,
            use_tqdm=False,
        )
        if self._recorder:
            self._recorder.take()  # nobody asks where given tokens were routed
        # one entry per token but the first (prompt_logprobs=0 asks for no alternatives)
        return [o.prompt_logprobs.logprobs[-len(r) :] for o, r in zip(outputs, responses, strict=True)]

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _experts(self, output: Any, sample: Any, routes: Mapping[str, Tensor]) -> Tensor | None:
        """The experts of the prompt's and the response's computed tokens, [prompt + response - 1, layers, k] int16."""
        if not self.config.routing_replay:
            return None
        computed = len(output.prompt_token_ids) + len(sample.token_ids) - 1
        if self._recorder:
            several = len(output.outputs) > 1
            experts = routes[f"{sample.index}_{output.request_id}" if several else output.request_id]
        else:
            experts = torch.from_numpy(sample.routed_experts)
        return experts[:computed].to(torch.int16)


def _record_routing(worker: Any) -> RoutingRecorder:
    """Start recording in vLLM's worker.

    Raises:
        RoutingError: vLLM cannot capture this model's routing.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    runner = worker.model_runner
    try:
        capturer = RoutedExpertsCapturer(runner.max_num_tokens, runner.vllm_config)
        bind_routed_experts_capturer(runner.get_model(), capturer)
    except ValueError as error:
        raise RoutingError(f"vLLM cannot record this model's routing: {error}") from error
    return RoutingRecorder(runner, capturer)
