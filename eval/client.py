"""What is asked of a served model over HTTP: completions, token ids, log-probs of given tokens.

The server is one that `eval.serve` started, or one that someone else runs (`attach`). The requests are OpenAI's with
vLLM's additions (token ids in and out, /tokenize, prompt log-probs); a server without them is refused by name. The key
of someone else's server comes from the environment variable BORESIGHT_API_KEY and is never printed.

Left out: streaming (nothing here reads a completion before it is whole), and retries: a request that fails once would
make two models' measurements unlike each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from eval.records import Kernels
from eval.source import ModelSource
from quant.errors import BoresightError
from quant.server_process import KEY_VARIABLE, LOOPBACK

# Said in full: a server that someone else started fills what is left unsaid from the model's generation_config.json.
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
Answer = TypeVar("Answer")


class ServeError(BoresightError):
    """The server did not start, died, refused a request, or answered something that does not add up."""


@dataclass(frozen=True)
class Server:
    """A healthy server.

    Attributes:
        base_url: http://HOST:PORT/v1
        api_key: bearer token, never printed; empty where the server asks for none.
        model: the name it serves the model under.
        pid: of the API server, which leads the process group; None where someone else started it.
        startup_seconds: from its launch until it answered; 0 where it ran already.
        max_model_len: tokens of prompt and answer that it takes; None where it does not say.
        kernels: what its engine multiplies with; None where someone else started it.
        command: that started it; empty where someone else did.
        request_seconds: what one request may take before the server counts as hung.
    """

    base_url: str
    api_key: str = field(repr=False)
    model: str
    pid: int | None
    startup_seconds: float
    max_model_len: int | None = None
    kernels: Kernels | None = None
    command: tuple[str, ...] = ()
    request_seconds: float = 3600.0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True)
class ServedCompletion:
    """One sampled completion; T tokens, the end-of-sequence token included when it was sampled.

    Attributes:
        prompt_ids: the prompt's token ids.
        token_ids: T sampled token ids.
        logprobs: T log-probs, in nats, under the distribution each token was sampled from (after temperature).
        finish_reason: "stop" (end of sequence) or "length".
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def attach(source: ModelSource) -> Server:
    """A server that runs already, asked for what it serves.

    Raises:
        ServeError: nothing answers there, the key is refused, or it is not clear which of its models is meant.
    """
    what = f"model {source.given!r}"
    server = Server(source.location, os.environ.get(KEY_VARIABLE, ""), source.served_name or "", None, 0.0)
    with _client(server) as client:
        listed = _answer(client, "GET", f"{server.base_url}/models", None, what)
    try:
        cards = {str(card["id"]): card for card in listed["data"]}
    except (KeyError, TypeError) as error:
        raise ServeError(f"{what}: the answer of {server.base_url}/models is no list of models") from error
    names = ", ".join(map(repr, cards)) or "no model"
    if source.served_name is None and len(cards) != 1:
        raise ServeError(f"{what}: it serves {names}; say which: {source.location}#NAME")
    name = source.served_name or next(iter(cards))
    if name not in cards:
        raise ServeError(f"{what}: it serves {names}, not {name!r}")
    return Server(server.base_url, server.api_key, name, None, 0.0, cards[name].get("max_model_len"))


def answers(server: Server) -> bool:
    """Whether the server takes this key and lists its models; False while it does not listen yet."""
    try:
        with _client(server, seconds=5.0) as client:
            return client.get(f"{server.base_url}/models").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def sample(
    server: Server,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    concurrency: int,
) -> list[ServedCompletion]:
    """One completion per prompt, from the whole distribution (no top_p, top_k, min_p, penalty), in the prompts' order.

    Args:
        prompts: token ids per prompt.
        seed: prompt i is sampled with seed + i, whatever runs beside it. One request per prompt, because the server
            gives every prompt of a request the same seed.

    Raises:
        ServeError: a request was refused, or ids and log-probs do not belong together.
    """

    def request(client: httpx.Client, index: int) -> ServedCompletion:
        what = f"prompt {index}"
        body = {
            "model": server.model,
            "prompt": list(prompts[index]),
            "max_tokens": max_tokens,
            "temperature": temperature,
            **WHOLE_DISTRIBUTION,
            "seed": seed + index,
            "logprobs": 0,  # the sampled token's own, no alternatives
            "return_token_ids": True,
        }
        answer = _answer(client, "POST", f"{server.base_url}/completions", body, what)
        return _completion(index, tuple(prompts[index]), _choice(answer, what))

    return _each(server, request, len(prompts), concurrency)


def score(
    server: Server, sequences: Sequence[Sequence[int]], first: Sequence[int], *, concurrency: int
) -> list[tuple[float, ...]]:
    """Log-probs that the server gives the tokens of each sequence from `first` on, at temperature 1.

    Args:
        sequences: token ids; each at least one token shorter than the server's limit, because vLLM scores a prompt
            only on the way to one more token.
        first: per sequence, the index (>= 1) of the first token that is scored.

    Returns:
        Per sequence, one log-prob per scored token, in nats, under the model's whole distribution.

    Raises:
        ServeError: a request was refused, or the server does not score prompts.
    """
    if any(not 1 <= start < len(sequence) for sequence, start in zip(sequences, first, strict=True)):
        raise ValueError("first: from 1 (nothing comes before the first token) to the last index of its sequence")

    def request(client: httpx.Client, index: int) -> tuple[float, ...]:
        ids, start, what = sequences[index], first[index], f"sequence {index}"
        # one token is generated and dropped
        body = {"model": server.model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        answer = _answer(client, "POST", f"{server.base_url}/completions", body, what)
        held = _choice(answer, what).get("prompt_logprobs")
        if held is None or len(held) != len(ids):
            raise ServeError(f"{what}: {server.base_url} gives no log-probs of prompts (vLLM does)")
        scored = list(zip(map(str, ids[start:]), held[start:], strict=True))
        if any(token not in (entry or {}) for token, entry in scored):
            raise ServeError(f"{what}: the server scored other tokens than the ones sent")
        logprobs = tuple(float(entry[token]["logprob"]) for token, entry in scored)
        _require_logprobs(logprobs, what)
        return logprobs

    return _each(server, request, len(sequences), concurrency)


def tokenize(server: Server, text: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids as the server makes them of a completion's prompt, or of a chat's messages by its chat template.

    Messages are rendered as for an answer, up to where it begins.

    Raises:
        ServeError: it has no /tokenize (vLLM has), no chat template, or refuses the conversation.
    """
    asked: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"messages": [dict(turn) for turn in text]}
    url = f"{server.base_url.removesuffix('/v1')}/tokenize"
    with _client(server) as client:
        tokens = _answer(client, "POST", url, {"model": server.model, **asked}, "tokenize").get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise ServeError(f"tokenize: no token ids in the answer of {url}")
    return tuple(tokens)


def _client(server: Server, *, connections: int = 1, seconds: float | None = None) -> httpx.Client:
    seconds = seconds or server.request_seconds
    return httpx.Client(
        headers=server.headers,
        timeout=httpx.Timeout(seconds, connect=min(seconds, 30.0)),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        trust_env=urlsplit(server.base_url).hostname not in LOOPBACK,  # a proxy does not reach this machine's own ports
    )


def _each(server: Server, request: Callable[[httpx.Client, int], Answer], n: int, concurrency: int) -> list[Answer]:
    """The answers to n requests, so many at a time, in order."""
    with _client(server, connections=concurrency) as client, ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda index: request(client, index), range(n)))


def _answer(client: httpx.Client, method: str, url: str, body: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """The JSON object that answers one request."""
    try:
        response = client.request(method, url, json=body)
    except httpx.TransportError as error:
        raise ServeError(f"{what}: no answer from {url}: {error!r}") from error
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ServeError(f"{what}: HTTP {response.status_code} from {url}: it does not take the key in {KEY_VARIABLE}")
    if response.status_code != httpx.codes.OK:
        raise ServeError(f"{what}: HTTP {response.status_code} from {url}: {response.text[:500]}")
    try:
        answer = response.json()
    except ValueError as error:
        raise ServeError(f"{what}: the answer of {url} is not JSON: {response.text[:100]!r}") from error
    if not isinstance(answer, dict):
        raise ServeError(f"{what}: the answer of {url} is no JSON object")
    return answer


def _choice(answer: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not choices:
        raise ServeError(f"{what}: no completion in the server's answer")
    return choices[0]


def _completion(index: int, prompt_ids: tuple[int, ...], choice: Mapping[str, Any]) -> ServedCompletion:
    what = f"prompt {index}"
    if any(choice.get(key) is None for key in ("token_ids", "prompt_token_ids", "logprobs")):
        raise ServeError(f"{what}: the server does not return token ids with their log-probs (vLLM does)")
    token_ids, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
    if tuple(choice["prompt_token_ids"]) != prompt_ids:
        raise ServeError(f"{what}: the server answered another prompt than the one sent")
    if len(token_ids) != len(logprobs):
        raise ServeError(f"{what}: {len(token_ids)} token ids but {len(logprobs)} log-probs")
    _require_logprobs(logprobs, what)
    return ServedCompletion(prompt_ids, token_ids, logprobs, choice["finish_reason"])


def _require_logprobs(values: Sequence[float | None], what: str) -> None:
    if not all(value is not None and math.isfinite(value) and value <= 0 for value in values):
        raise ServeError(f"{what}: not log-probs: {values}")
