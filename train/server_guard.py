"""Runs inside a rollout server: nobody without the key reaches any of its paths.

vLLM's own key check covers /v1 alone, and a server that takes new weights has far more powerful paths than that. Given
to `vllm serve` as `--middleware train.server_guard.RequireKey`; the key is the server's own, from VLLM_API_KEY. /health
stays open: it says whether the engine is alive, to anyone who restarts it when it is not.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN = "/health"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware: HTTP 401, or a refused websocket, for a request without `Authorization: Bearer KEY`.

    Raises:
        RuntimeError: VLLM_API_KEY is not set, so the server does not start.
    """

    def __init__(self, app: App) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("train.server_guard: set VLLM_API_KEY, the key that this server asks for")
        self._app = app
        self._wanted = f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": "Unauthorized"}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._wanted)
