"""Spread requests over servers by load; a server that is lost is done without.

Knows neither HTTP nor vLLM: `ask` is any coroutine. Every job ends with one answer, or with none when no server is
left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from train.server_client import LostServerError

Server = TypeVar("Server", bound=Hashable)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Spread(Generic[Server, Answer]):
    """What came of it.

    Attributes:
        answers: job to the server that answered it and its answer.
        redone: jobs given to another server, or still unanswered, because theirs was lost.
    """

    answers: dict[int, tuple[Server, Answer]] = field(default_factory=dict)
    redone: set[int] = field(default_factory=set)


async def spread(
    jobs: Sequence[int],
    servers: Sequence[Server],
    ask: Callable[[Server, int], Awaitable[Answer]],
    *,
    in_flight: int,
    lost: Callable[[Server, LostServerError], None],
) -> Spread[Server, Answer]:
    """Ask every job of some server: the next job goes to the one with the fewest under way, at most `in_flight`.

    Args:
        jobs: their numbers, in the order they are to be started.
        servers: at least one.
        ask: one server's answer to one job; raises LostServerError when the server is gone.
        in_flight: jobs under way at one server.
        lost: told, once, of every server that is lost; its jobs go to the others.

    Returns:
        The answers; a job is missing only when every server was lost.

    Raises:
        Exception: whatever else `ask` raises; all that is under way is cancelled.
    """
    waiting, found = deque(jobs), Spread[Server, Answer]()
    load = dict.fromkeys(servers, 0)
    under_way: dict[asyncio.Future[Answer], tuple[Server, int]] = {}
    try:
        while (waiting and load) or under_way:
            while waiting and load and min(load.values()) < in_flight:
                server, job = min(load, key=load.__getitem__), waiting.popleft()
                under_way[asyncio.ensure_future(ask(server, job))] = server, job
                load[server] += 1
            done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            gone: dict[Server, LostServerError] = {}
            again: list[int] = []
            for task in done:
                server, job = under_way.pop(task)
                load[server] -= 1
                try:
                    found.answers[job] = server, task.result()
                except LostServerError as error:
                    gone.setdefault(server, error)
                    again.append(job)
            for task, (server, job) in list(under_way.items()):
                if server in gone:  # it would not answer these either, or only after as long a wait
                    task.cancel()
                    del under_way[task]
                    again.append(job)
            waiting.extendleft(sorted(again, reverse=True))
            found.redone.update(again)
            for server, error in gone.items():
                del load[server]
                lost(server, error)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    return found
