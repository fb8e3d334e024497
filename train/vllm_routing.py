"""Which experts vLLM routed every token to, recorded in this process from vLLM's own capture hooks.

vLLM hands these out by itself (`enable_return_routed_experts`) under its second model runner only, which needs Triton
and so a GPU. Its first runner, the one of a CPU, has the same hooks in the routers, but nobody reads them: this does.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class RoutingRecorder:
    """Reads the capture buffer after every step of a model runner and sorts its rows by request and position.

    Prefix caching must be off: tokens whose keys and values were cached are not computed and have no row.
    """

    def __init__(self, runner: Any, capturer: Any) -> None:
        """
        Args:
            runner: vLLM's first model runner; its `execute_model` is wrapped.
            capturer: vLLM's RoutedExpertsCapturer, bound to the runner's model.
        """
        self._runner = runner
        self._capturer = capturer
        self._execute = runner.execute_model
        self._steps: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        runner.execute_model = self._execute_and_record

    def take(self) -> dict[str, Tensor]:
        """The rows since the last call: request id, as `LLM.generate` reports it and with "{g}_" before it for
        completion g of several, to [positions, layers, k] integers. A preempted request's later rows win."""
        routes = {}
        for request, steps in self._steps.items():
            routes[request] = torch.full((max(s + len(rows) for s, rows in steps), *steps[0][1].shape[1:]), -1)
            for start, rows in steps:
                routes[request][start : start + len(rows)] = rows
        self._steps.clear()
        return routes

    def _execute_and_record(self, scheduled: Any, *args: Any, **options: Any) -> Any:
        output = self._execute(scheduled, *args, **options)
        counts = scheduled.num_scheduled_tokens
        if counts:
            batch = self._runner.input_batch  # its requests are in the order of the computed rows
            sizes = [counts[request] for request in batch.req_ids]
            rows = self._capturer.snapshot_routing_data(sum(sizes)).split(sizes)
            for place, (request, part) in enumerate(zip(batch.req_ids, rows, strict=True)):
                public = request.rpartition("-")[0]  # vLLM appends a random suffix
                self._steps[public].append((int(batch.num_computed_tokens_cpu[place]), part))
        return output
