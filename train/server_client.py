"""What is asked of one rollout server over HTTP: new weights, what it computes with, completions.

Two kinds of failure. `LostServerError`: nobody is there any more, or not in time; the pool goes on without it.
`ServerError`: it is there and refuses; so would every other, and the run stops.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from quant.errors import BoresightError
from quant.server_process import KEY_VARIABLE, LOOPBACK
from quant.storage import remove, writing
from quant.verify import VerificationError, require_same
from train.config import RolloutConfig
from train.rank_answers import RankAnswersError, said
from train.records import Completion
from train.rollout import EngineWeights

# Said in full: a server that someone else started fills what is left unsaid from the model's generation_config.json.
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
HEALTH_SECONDS = 5.0
WATCH_SECONDS = 2.0  # between looks at a server that has not answered yet
FINISHED = ("stop", "length")


class ServerError(BoresightError):
    """A rollout server did not start, refused a request, or answered something that does not add up."""


class LostServerError(Exception):
    """A rollout server does not answer, or not in time; its message is the reason."""


@dataclass(frozen=True)
class ServerClient:
    """One rollout server's address.

    Attributes:
        name: in messages.
        url: http://HOST:PORT/v1
        key: bearer token, never printed.
        model: the name it serves the model under.
        timeout: seconds for one request.
        shared: folder for what its ranks say, which they and this process share.
        ranks: of all its replicas.
    """

    name: str
    url: str
    key: str = field(repr=False)
    model: str
    timeout: float
    shared: Path
    ranks: int = 1

    def answers(self) -> bool:
        """Whether it is healthy and takes the key."""
        try:
            with httpx.Client(**self._options(HEALTH_SECONDS)) as client:
                return client.get("/health").is_success and client.get("/v1/models").is_success
        except httpx.TransportError:
            return False

    def guarded(self) -> bool:
        """Whether it refuses, without a key, what can replace its weights."""
        with httpx.Client(**self._options(HEALTH_SECONDS) | {"headers": {}}) as client:
            return client.post("/collective_rpc", json={"method": "boresight_about"}).status_code == 401

    def models(self) -> list[str]:
        """The names it serves."""
        return [str(card["id"]) for card in self._ask("GET", "/v1/models")["data"]]

    def count_ranks(self) -> int:
        """How many processes have weights behind this address, by its own configuration."""
        parallel = self._ask("GET", "/server_info?config_format=json")["vllm_config"]["parallel_config"]
        elsewhere = parallel["data_parallel_external_lb"] or parallel["data_parallel_hybrid_lb"]
        return parallel["world_size"] * parallel[f"data_parallel_size{'_local' if elsewhere else ''}"]

    def about(self) -> dict[str, Any]:
        """`WeightSync.boresight_about`; the label is None unless all ranks say the same."""
        first, *others = self._rpc("boresight_about")
        return first | {"label": None} if any(rank["label"] != first["label"] for rank in others) else first

    def load(self, folder: str, label: str) -> None:
        """Have it load the weights in a folder (train/weight_files.py), between requests.

        Raises:
            LostServerError: it does not answer.
            ServerError: it refuses.
            VerificationError: afterwards it does not say that it holds them.
        """
        self._ask("POST", "/pause?mode=wait")
        self._rpc("boresight_load_from", folder, label)
        if not self._ask("POST", "/reset_prefix_cache")["success"]:
            raise ServerError(f"{self.name} did not drop its prefix cache: requests run during a weight sync")
        self._ask("POST", "/resume")
        held = self.about()["label"]
        if held != label:
            raise VerificationError(f"{self.name} says that it holds the weights {held} after it was sent {label}")

    def read_back(self) -> EngineWeights:
        """What it now computes with, by all its ranks: those that know the same tensor must agree on it.

        Raises:
            VerificationError: two ranks do not.
        """
        fingerprints: dict[str, str] = {}
        kernels: dict[str, str] = {}
        for rank in self._rpc("boresight_held"):
            for merged, held in ((fingerprints, rank["fingerprints"]), (kernels, rank["kernels"])):
                shared = {name: value for name, value in held.items() if name in merged}
                require_same({name: merged[name] for name in shared}, shared, f"ranks of {self.name}")
                merged |= held
        return EngineWeights(fingerprints, kernels)

    def connect(self, connections: int) -> httpx.AsyncClient:
        """A client for `complete`, to be closed."""
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(**self._options(self.timeout), limits=limits)

    async def complete(
        self, client: httpx.AsyncClient, config: RolloutConfig, prompt: Sequence[int], seed: int, version: int
    ) -> list[Completion]:
        """Sample one prompt's group; see RolloutEngine.generate.

        Raises:
            LostServerError: it went away, or did not answer in time.
            ServerError: it refuses, or ids and log-probs do not belong together.
        """
        size = config.group_size
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "n": size,
            "seed": seed * size,  # completion g gets seed + g, as in process
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "ignore_eos": config.ignore_eos,
            **WHOLE_DISTRIBUTION,
            "logprobs": 0,  # the sampled token's own, no alternatives
            "return_token_ids": True,
        }
        try:
            response = await client.post("/v1/completions", json=body)
        except httpx.TransportError as error:
            raise LostServerError(_reason(error)) from error
        answer = self._answer(response, "/v1/completions")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if any(choice["finish_reason"] not in FINISHED for choice in choices):
            raise LostServerError("it stopped in the middle of a request")  # as a server that is told to end does
        return [self._completion(choice, prompt, version) for choice in choices]

    def _completion(self, choice: Mapping[str, Any], prompt: Sequence[int], version: int) -> Completion:
        ids, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
        if choice["prompt_token_ids"] != list(prompt) or len(ids) != len(logprobs):
            raise ServerError(f"{self.name} answered another prompt, or with {len(logprobs)} log-probs for {len(ids)}")
        if not all(value is not None and math.isfinite(value) and value <= 0 for value in logprobs):
            raise ServerError(f"{self.name} answered with what are no log-probs: {logprobs}")
        return Completion(ids, logprobs, choice["finish_reason"], version=version)

    def _rpc(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of the worker extension; the answer of every rank of every replica.

        Raises:
            LostServerError: it does not answer.
            ServerError: it refuses, or a rank says nothing.
        """
        folder = self.shared / f"said-{secrets.token_hex(8)}"
        with writing(folder):
            folder.mkdir(parents=True)
        try:
            self._ask("POST", "/collective_rpc", {"method": "boresight_say", "args": [str(folder), method, *arguments]})
            return said(folder, self.ranks)
        except RankAnswersError as error:
            raise ServerError(f"{self.name}: {error}") from error
        finally:
            remove(folder)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            response = asyncio.run(self._watched(method, path, body))
        except httpx.TransportError as error:
            raise LostServerError(_reason(error)) from error
        return self._answer(response, path)

    async def _watched(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        """A request, given up when nobody listens any more: vLLM never answers what its engine died of, nor closes it.

        Raises:
            LostServerError: it stopped listening, or says that its engine is dead.
        """
        async with httpx.AsyncClient(**self._options(self.timeout)) as client:
            asked = asyncio.create_task(client.request(method, path, json=body))
            while not (await asyncio.wait({asked}, timeout=WATCH_SECONDS))[0]:
                try:
                    healthy = (await client.get("/health", timeout=HEALTH_SECONDS)).is_success
                except httpx.TransportError as error:
                    healthy = isinstance(error, httpx.TimeoutException)  # busy, for all we know
                if not healthy and not asked.done():
                    asked.cancel()
                    raise LostServerError("its engine died while it was asked")
            return asked.result()

    def _answer(self, response: httpx.Response, path: str) -> Any:
        if response.is_server_error and not self.answers():
            raise LostServerError(f"its engine is dead (HTTP {response.status_code})")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise ServerError(f"{self.name} does not take the key in {KEY_VARIABLE}")
        if not response.is_success:
            raise ServerError(f"{self.name}: HTTP {response.status_code} from {path}: {response.text[:500]}")
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(f"{self.name}: the answer of {path} is not JSON: {response.text[:100]!r}") from error

    def _options(self, seconds: float) -> dict[str, Any]:
        return {
            "base_url": self.url.removesuffix("/v1"),
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": httpx.Timeout(seconds, connect=min(seconds, 30.0)),
            "trust_env": urlsplit(self.url).hostname not in LOOPBACK,  # a proxy does not reach this machine's own ports
        }


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ReadTimeout):
        return "no answer within train.rollout.servers.request_timeout"
    return f"no answer: {type(error).__name__} {error}".strip()
