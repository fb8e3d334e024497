"""Rows in micro-batches alike in length, and the micro-batches dealt out to ranks that walk in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def alike(rows: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows sorted by length, in runs of at most `budget` padded tokens, or of one row.

    Args:
        rows: indices into `lengths`.
        lengths: tokens of each sequence.
        budget: padded tokens of one run.
    """
    run: list[int] = []
    for row in sorted(rows, key=lambda r: lengths[r]):
        if run and lengths[row] * (len(run) + 1) > budget:
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def dealt(runs: Sequence[list[int]], lengths: Sequence[int], *, rank: int, size: int) -> list[list[int]]:
    """One rank's micro-batches, as many as every other's: gathering weights and reducing gradients take all ranks.

    Ranks wait for each other in every block, so a round takes as long as its largest micro-batch: a round is made of
    neighbours in size. Every other round is dealt out backwards, so that no rank always gets the largest. What is
    missing to a full round comes from halving the largest micro-batches, and where all are single rows, from empty
    ones.

    Args:
        runs: the micro-batches of all ranks.
        lengths: tokens of each sequence.
        rank: whose share.
        size: ranks.
    """
    runs = list(runs)
    if size == 1:
        return runs

    def tokens(run: Sequence[int]) -> int:
        return len(run) * max((lengths[row] for row in run), default=0)

    while len(runs) % size:
        largest = max((run for run in runs if len(run) > 1), key=tokens, default=None)
        if largest is None:
            runs.append([])
            continue
        runs.remove(largest)
        runs += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    runs.sort(key=tokens)
    rounds = [runs[start : start + size] for start in range(0, len(runs), size)]
    return [around[rank if i % 2 == 0 else size - 1 - rank] for i, around in enumerate(rounds)]
