"""A user's own rewards, as `grader = "tests.rewards:share_of_digits"` names one."""

import zlib

from train.records import Problem


def share_of_digits(problem: Problem, completion: str) -> float:
    """The share of the completion's characters that are digits: a reward that random weights can earn."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def chance(problem: Problem, completion: str) -> float:
    """A number in [0, 1] that the text decides and nothing can be learned from: its gradients never end."""
    return zlib.crc32(completion.encode()) / 2**32
