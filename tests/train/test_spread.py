"""Which server gets which prompt, and what happens when one is lost; with servers that only wait."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest

from train.server_client import LostServerError
from train.spread import Spread, spread


@dataclass(eq=False)
class FakeServer:
    """Answers after some ticks of the event loop; dies at its n-th request, or never."""

    name: str
    ticks: int = 1
    dies_at: int | None = None
    asked: list[int] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    async def answer(self, job: int) -> str:
        self.asked.append(job)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            dead = self.dies_at is not None and len(self.asked) >= self.dies_at
            for _ in range(self.ticks):
                await asyncio.sleep(0)
            if dead:
                raise LostServerError("no answer")
            return f"answer {job}"
        finally:
            self.under_way -= 1


def run(servers: list[FakeServer], jobs: int, in_flight: int) -> tuple[Spread[FakeServer, str], list[tuple[str, str]]]:
    lost: list[tuple[str, str]] = []
    found = asyncio.run(
        spread(
            range(jobs), servers, FakeServer.answer, in_flight=in_flight,
            lost=lambda server, error: lost.append((server.name, str(error))),
        )
    )  # fmt: skip
    return found, lost


def test_every_job_is_answered_once_and_the_faster_server_does_more() -> None:
    """100 jobs over a server that takes 1 tick and one that takes 90: each job is asked once, never more than 4 are
    under way at one server, and the fast one does at least five times as many."""
    fast, slow = FakeServer("fast", 1), FakeServer("slow", 90)
    found, lost = run([fast, slow], 100, in_flight=4)
    assert {job: answer for job, (_, answer) in found.answers.items()} == {i: f"answer {i}" for i in range(100)}
    assert sorted(fast.asked + slow.asked) == list(range(100))
    assert fast.most == slow.most == 4
    assert len(fast.asked) >= 5 * len(slow.asked) > 0
    assert (lost, found.redone) == ([], set())


def test_equal_servers_share_evenly() -> None:
    """12 jobs, 3 equal servers, room for all: 4 each, in turn."""
    servers = [FakeServer(name) for name in "abc"]
    run(servers, 12, in_flight=100)
    assert [server.asked for server in servers] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_what_a_lost_server_had_is_redone_by_the_others_and_nothing_twice() -> None:
    """A server dies at its third request with others under way: it is reported once, gets no more, all jobs are
    answered, and only its unanswered ones were asked a second time."""
    dying, other = FakeServer("dying", 2, dies_at=3), FakeServer("other", 2)
    found, lost = run([dying, other], 40, in_flight=2)
    assert lost == [("dying", "no answer")]
    assert sorted(found.answers) == list(range(40))
    twice = {job for job, times in Counter(dying.asked + other.asked).items() if times == 2}
    assert twice == found.redone == {job for job in dying.asked if found.answers[job][0] is other}
    assert 1 <= len(twice) <= 2
    assert max(Counter(other.asked).values()) == 1


def test_without_servers_the_rest_stays_unanswered() -> None:
    """Both die: what was answered before is kept, the rest is missing, and the call ends."""
    servers = [FakeServer("a", 1, dies_at=3), FakeServer("b", 2, dies_at=2)]
    found, lost = run(servers, 20, in_flight=1)
    assert sorted(name for name, _ in lost) == ["a", "b"]
    assert len(found.answers) == 3
    assert all(answer == f"answer {job}" for job, (_, answer) in found.answers.items())


def test_a_refusal_ends_everything_under_way() -> None:
    """Any other error passes through, and no request is left running."""

    async def refuse(server: FakeServer, job: int) -> str:
        if job == 5:
            raise ValueError("HTTP 400")
        return await server.answer(job)

    server = FakeServer("a", 1000)
    with pytest.raises(ValueError, match="HTTP 400"):
        asyncio.run(spread(range(9), [server], refuse, in_flight=9, lost=lambda server, error: None))
    assert (server.under_way, server.most) == (0, 8)
