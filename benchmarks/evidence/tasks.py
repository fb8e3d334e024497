"""Worked solutions of the study's tasks: what a warm start imitates, what RL then finds shorter or better."""

from __future__ import annotations

from train.records import Problem


def answer(problem: Problem) -> str:
    """The bare answer."""
    return problem.answer


def running_totals(problem: Problem) -> str:
    """A long answer: `15 - 43 - 75` is continued as `15;-28;-103=-103`, every partial sum and then the last."""
    left, *rest = str(problem.fields["expression"]).split()
    totals = [int(left)]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        totals.append(totals[-1] + int(sign + term))
    return ";".join(map(str, totals)) + f"={totals[-1]}"
