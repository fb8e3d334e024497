"""Answers and log-likelihoods from an OpenAI-compatible server, asked as lm-eval asks.

lm-eval's own clients write the requests and read the log-likelihoods. Generation is sent from here for two reasons:
they give all requests one seed, so that k repeats on a server that obeys it are k times the same answer, and they drop
how an answer ended and how long it was. Left out: streaming, tools, images, and several prompts per request (they would
share a seed, and their token counts come as a sum).
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.client import Server
from quant.errors import BoresightError

NO_TRUNCATION = 2**31  # lm-eval cuts long prompts from the left with a warning; the server refuses them instead
LOGLIKELIHOOD_BATCH = 8  # prompts per request: a third of the time of one by one
BUSY = (429, 502, 503, 504)
ATTEMPTS = 5


class EvalError(BoresightError):
    """A task cannot be used, or what came back for it does not belong to its problems."""


@dataclass(frozen=True)
class Question:
    """One request for an answer.

    Attributes:
        prompt: the text; for a chat, lm-eval's carrier of the messages.
        settings: lm-eval's generation settings.
        seed: of the sampling.
    """

    prompt: Any
    settings: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: without the end-of-sequence token.
        end: "stop" or "length"; None where the server does not say.
        tokens: generated, the end-of-sequence token included; None where the server does not say.
    """

    text: str
    end: str | None
    tokens: int | None


class LmEvalClient:
    """One server, asked for completions or for chat answers."""

    def __init__(
        self, server: Server, *, chat: bool, tokenizer: Path | None, concurrency: int, special_tokens: bool
    ) -> None:
        """
        Args:
            chat: send messages and let the server render its template; otherwise send text.
            tokenizer: needed for log-likelihoods only, which lm-eval asks for by token ids.
            concurrency: requests in flight.
            special_tokens: whether the tokenizer adds its own to a text, such as a first token.
        """
        from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

        self.url = f"{server.base_url}/{'chat/completions' if chat else 'completions'}"
        self.headers = server.headers
        self.seconds = server.request_seconds
        self.chat = chat
        self.concurrency = concurrency
        self.special_tokens = special_tokens
        shared: dict[str, Any] = {
            "model": server.model, "base_url": self.url, "max_length": NO_TRUNCATION, "timeout": server.request_seconds,
            "header": {"Accept": "application/json", **server.headers},  # without any, lm-eval looks for a key itself
        }  # fmt: skip
        self.api: Any = (LocalChatCompletion if chat else LocalCompletionsAPI)(tokenizer_backend=None, **shared)
        self.scorer: Any = None
        if tokenizer is not None and not chat:
            self.scorer = LocalCompletionsAPI(
                tokenizer=str(tokenizer), tokenizer_backend="huggingface", add_bos_token=special_tokens,
                batch_size=LOGLIKELIHOOD_BATCH, max_retries=ATTEMPTS,
                num_concurrent=max(2, concurrency // LOGLIKELIHOOD_BATCH),  # 1 would be another code path of lm-eval's
                **shared,
            )  # fmt: skip

    def loglikelihoods(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each of lm-eval's requests.

        Raises:
            EvalError: the server failed a request.
        """
        import aiohttp

        try:
            return self.scorer.loglikelihood(list(requests))
        except (aiohttp.ClientError, TimeoutError, KeyError, TypeError) as error:  # the last two: no log-probs
            raise EvalError(f"{self.url} gave no log-probs of a prompt's tokens: {error!r}") from error

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in order.

        Raises:
            EvalError: the server refused a request, could not be reached, or ended an answer in another way.
        """
        return asyncio.run(self._answers(questions))

    async def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        import aiohttp
        from tqdm.asyncio import tqdm_asyncio

        gate = asyncio.Semaphore(self.concurrency)
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.seconds)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers) as session:

            async def ask(question: Question) -> Answer:
                async with gate:
                    return self._answer(await self._post(session, self._payload(question)))

            return await tqdm_asyncio.gather(*map(ask, questions), desc="answers")

    def _payload(self, question: Question) -> dict[str, Any]:
        settings = dict(copy.deepcopy(question.settings))
        if settings.get("skip_special_tokens") is True:
            del settings["skip_special_tokens"]  # every server's default, and a strict one refuses the word
        prompt = json.loads(question.prompt.prompt) if self.chat else question.prompt
        payload = self.api._create_payload(prompt, generate=True, gen_kwargs=settings, seed=question.seed)
        if not self.chat and not self.special_tokens:
            payload["add_special_tokens"] = False
        return payload

    async def _post(self, session: Any, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The reply; a server that is busy or a connection that breaks is tried again; a refusal or a hang is not."""
        import aiohttp

        for attempt in itertools.count(1):
            last = attempt == ATTEMPTS
            try:
                async with session.post(self.url, json=payload) as response:
                    if response.ok:
                        return await response.json()
                    if last or response.status not in BUSY:
                        raise EvalError(f"HTTP {response.status} from {self.url}: {(await response.text())[:500]}")
            except TimeoutError as error:
                raise EvalError(f"no answer from {self.url} within {self.seconds:g} s") from error
            except aiohttp.ClientError as error:
                if last:
                    raise EvalError(f"no answer from {self.url}: {error!r}") from error
            await asyncio.sleep(2.0**attempt)
        raise AssertionError  # the last attempt returns or raises

    def _answer(self, reply: Mapping[str, Any]) -> Answer:
        (choice,) = reply["choices"]
        end = choice.get("finish_reason")
        if end not in ("stop", "length", None):
            raise EvalError(f"{self.url} ended an answer with {end!r}, which is neither 'stop' nor 'length'")
        # a thinking model behind a reasoning parser that never stopped thinking has no content
        text = (choice["message"]["content"] if self.chat else choice["text"]) or ""
        return Answer(text, end, (reply.get("usage") or {}).get("completion_tokens"))
