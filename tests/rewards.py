"""A user's own reward, as `grader = "tests.rewards:share_of_digits"` names it."""

from train.records import Problem


def share_of_digits(problem: Problem, completion: str) -> float:
    """The share of the completion's characters that are digits: a reward that random weights can earn."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))
