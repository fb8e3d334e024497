"""A pool of `vllm serve`: the engine that rolls out on several GPUs, or on several machines.

Weights go out as files, once for all servers (train/weight_files.py); every server proves by its own read-back what it
then computes with, and every completion names the weights that sampled it. A prompt is one request, sent to the server
with the fewest under way; its completions depend on its seed and the weights alone, so they are those that an engine in
this process would give, whichever server samples them and however often it is asked.

A server that dies, or does not answer in time, is taken out with one warning, its unfinished prompts go to the others,
and it is started again; it comes back at the next sync, with all weights sent and read back. Weights that differ
anywhere stop the run.

Left out: weights over NCCL (they would have to be packed for each server's own layout); a mixture's routing, which
the completions here do not carry.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from quant.storage import remove
from quant.verify import require_same
from train.config import RolloutConfig
from train.records import Completion
from train.rollout import EngineWeights
from train.server_client import LostServerError, ServerClient, ServerError
from train.server_member import Member, members
from train.spread import spread
from train.weight_files import write_weights

POLL_SECONDS = 0.2
ROUNDS = 4  # in which the prompts of one `generate` are given out, the first included; all servers are lost in between
THREADS = 32  # that sync servers at the same time
Answer = TypeVar("Answer")


class ServerPool:
    """A RolloutEngine over several servers; a context manager, after which none of ours runs.

    Attributes:
        up: servers in use, all of the same weights.
        down: servers that were lost and may come back.
    """

    def __init__(
        self, checkpoint: Path, config: RolloutConfig, *, seed: int, folder: Path, warn: Callable[[str], None]
    ) -> None:
        """Start the servers, or find those given, and wait until all are healthy.

        Args:
            checkpoint: the exported folder, or the BF16 model's.
            config: of the rollouts.
            seed: of the run.
            folder: gets the logs, and the weights on their way unless `sync_dir` says where.
            warn: told, in one line, when a server is lost.

        Raises:
            ServerError: a server does not start, or a given one is not what it must be.
        """
        assert config.servers is not None
        self.config, self.servers, self.version = config, config.servers, 0
        self._checkpoint, self._warn = checkpoint, warn
        self._sync_dir = Path(self.servers.sync_dir or folder / "sync").resolve()
        self._token = secrets.token_hex(4)  # two runs that were given the same server do not take turns unnoticed
        self._held: dict[str, Tensor] = {}  # the whole of what every server holds, by reference
        self._verified: EngineWeights | None = None  # what the last read-back of these weights gave
        self._redone = 0
        self._lock, self._closed = Lock(), False  # `generate` may be under way in a thread when the pool is closed
        self.down: list[Member] = []
        self.up = members(checkpoint, config, seed=seed, folder=folder, shared=self._sync_dir)
        if not self.servers.sync_dir:
            remove(self._sync_dir)  # of a run that was killed here
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End our servers, whatever is asked of them; those of someone else go on."""
        with self._lock:
            self._closed = True
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda member: member.close(), (*self.up, *self.down)))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See RolloutEngine. A server that is lost meanwhile is left out.

        Raises:
            ServerError: a server refuses, or none is left and none comes back.
            VerificationError: a server does not say that it holds them.
        """
        self._held.update(tensors)
        self._verified = None
        self.version += 1
        self._send(tensors, self.up)
        if not self.up:
            self._recover()

    def read_back(self) -> EngineWeights:
        """See RolloutEngine: of every server, and all must be equal. Servers that were lost and are back join here.

        Raises:
            ServerError: none is left and none comes back.
            VerificationError: two servers differ; the message names one.
        """
        for member in self.down:
            if member.ended:
                self._warn(f"{member.client.name} did not come back, {member.again} ({member.where()})")
                self._restart(member)
        self._readmit()
        while not (found := self._each(lambda client: client.read_back(), self.up)):
            self._recover()
        (first, one), *others = found.items()
        for member, other in others:
            _require_equal(one, other, f"of {member.client.name} against {first.client.name}'s")
        self._verified = one
        return one

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        """See RolloutEngine.

        Raises:
            ServerError: a server refuses a request, or none is left and none comes back.
        """
        groups: dict[int, list[Completion]] = {}
        redone: set[int] = set()
        missing = list(range(len(prompts)))
        for _ in range(ROUNDS):
            if not self.up:
                self._recover()
            found = asyncio.run(self._spread(prompts, seeds, missing))
            doubted = self._doubted({member for member, _ in found.answers.values()})
            groups |= {index: group for index, (member, group) in found.answers.items() if member not in doubted}
            missing = [index for index in missing if index not in groups]
            redone |= found.redone | set(missing)
            if not missing:
                break
        else:  # a prompt that kills whoever takes it would do so for ever
            logs = ", ".join(member.where() for member in self.down)
            raise ServerError(f"prompts lost all rollout servers {ROUNDS} times; what they say: {logs}")
        self._redone = len(redone)
        return [groups[index] for index in range(len(prompts))]

    def metrics(self) -> dict[str, float]:
        """See RolloutEngine: servers in use, and prompts that were given to a second one."""
        return {"servers_alive": len(self.up), "rollout_redone": self._redone}

    async def _spread(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], jobs: Sequence[int]) -> Any:
        async with AsyncExitStack() as stack:
            connections = {
                member: await stack.enter_async_context(member.client.connect(self.servers.in_flight))
                for member in self.up
            }

            async def ask(member: Member, job: int) -> list[Completion]:
                return await member.client.complete(
                    connections[member], self.config, prompts[job], seeds[job], self.version
                )

            return await spread(jobs, list(self.up), ask, in_flight=self.servers.in_flight, lost=self._lose)

    def _send(self, tensors: Mapping[str, Tensor], members: Sequence[Member]) -> dict[Member, None]:
        """Load into these servers, through files; who took them."""
        if not tensors:  # nothing was loaded yet: they hold their checkpoint
            return dict.fromkeys(members)
        with self._written(tensors) as folder:
            return self._each(lambda client: client.load(str(folder), self._label()), members)

    @contextmanager
    def _written(self, tensors: Mapping[str, Tensor]) -> Iterator[Path]:
        folder = self._sync_dir / f"{self._token}-{self.version:06d}-{secrets.token_hex(2)}"
        try:
            write_weights(folder, tensors)
            yield folder
        finally:
            remove(folder)

    def _label(self) -> str:
        """What servers call the present weights."""
        return f"{self._token}-{self.version}"

    def _doubted(self, members: set[Member]) -> set[Member]:
        """Those that may have been replaced behind their address while they sampled: someone else's that no longer
        hold what they were sent, or do not answer."""
        others = [member for member in members if not member.ours]
        labels = self._each(lambda client: client.about()["label"], [member for member in others if member in self.up])
        for member, label in labels.items():
            if label != (self._label() if self._held else None):
                self._lose(member, LostServerError("it no longer holds the weights that it was sent"))
        return {member for member in others if member not in self.up}

    def _each(self, ask: Callable[[ServerClient], Answer], members: Sequence[Member]) -> dict[Member, Answer]:
        """Ask several servers at once; those that are lost are taken out and have no answer."""
        answers: dict[Member, Answer] = {}
        with ThreadPoolExecutor(THREADS) as threads:
            pending = {member: threads.submit(ask, member.client) for member in members}
        for member, answer in pending.items():
            try:
                answers[member] = answer.result()
            except LostServerError as error:
                self._lose(member, error)
        return answers

    def _lose(self, member: Member, error: LostServerError) -> None:
        """Take a server out, and start it again where it is ours."""
        if self._closed:
            raise ServerError("the pool of rollout servers was closed while they were asked")
        if member in self.up:
            self.up.remove(member)
            self.down.append(member)
        self._warn(f"{member.client.name} is lost: {error}; {len(self.up)} left, {member.again} ({member.where()})")
        self._restart(member)

    def _restart(self, member: Member) -> None:
        with self._lock:
            if not self._closed:
                member.restart()

    def _readmit(self) -> None:
        """Servers that are back: given all weights, to be read back with the others."""
        back = [member for member in self.down if member.client.answers()]
        if back:
            self.down = [member for member in self.down if member not in back]
            self.up += back
            self._send(self._held, back)

    def _recover(self) -> None:
        """No server is left: wait until one is back, and prove that it holds the present weights.

        Raises:
            ServerError: none is within `startup_timeout`, or all have died again.
        """
        deadline = time.monotonic() + self.servers.startup_timeout
        while not self.up:
            logs = ", ".join(member.where() for member in self.down)
            if all(member.ended for member in self.down) or time.monotonic() > deadline:
                raise ServerError(f"no rollout server is left, and none came back; what they say: {logs}")
            time.sleep(POLL_SECONDS)
            self._readmit()
        for member, held in self._each(lambda client: client.read_back(), self.up).items():
            if self._verified is not None:
                _require_equal(self._verified, held, f"of {member.client.name} against those before it was lost")

    def _start(self) -> None:
        """Launch ours, all at once, and wait until all are healthy; check those of someone else."""
        for member in self.up:
            member.start()
        deadline = time.monotonic() + self.servers.startup_timeout
        waiting = self.up
        while waiting := [member for member in waiting if not member.ready(self._checkpoint, self.config)]:
            if time.monotonic() > deadline:
                names = ", ".join(f"{member.client.name} ({member.where()})" for member in waiting)
                raise ServerError(f"not healthy after {self.servers.startup_timeout:.0f} s: {names}")
            time.sleep(POLL_SECONDS)


def _require_equal(one: EngineWeights, other: EngineWeights, whose: str) -> None:
    require_same(one.fingerprints, other.fingerprints, f"weights read back {whose}")
    require_same(one.kernels, other.kernels, f"kernels {whose}", "kernels")
