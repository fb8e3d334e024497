"""Does the deployed model give its own tokens the probability that it should?

A model trained here is held to its training's tolerance, against the policy as the trainer ran it. Two models that
were not are held to the suite's limit, against the baseline, on the candidate's own answers.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.signoff.check import Check, State, apart
from pipeline.signoff.evidence import DISCREPANCY, GAP, SUMMARY, Evidence, Missing, Training
from train.config import QUANTIZING_FORMS


def check_gap(evidence: Evidence) -> Check:
    """The gap between candidate and baseline, for models that were not trained here."""
    check = Check(
        name="discrepancy",
        question="Does the baseline give the candidate's own answers about the probabilities the candidate gave them?",
        source=GAP,
    )
    request, gap = evidence.measurement.request, evidence.measurement.gap
    if isinstance(request, Missing):
        return replace(check, why=f"{request}.")
    limit = request.suite.limits.gap
    check = replace(check, limit=limit)
    if isinstance(gap, Missing):
        return replace(check, why=f"{gap}.")
    state: State = "pass" if gap.prob_diff_mean <= limit else "fail"
    why = (
        f"Over {gap.tokens:,} tokens of {gap.prompts:,} answers the mean |probability difference| "
        f"{apart(gap.prob_diff_mean, limit)} is {'within' if state == 'pass' else 'above'} the limit {limit:g}; "
        f"KL (k3) {gap.k3:.4g} nats per token."
    )
    return replace(check, measured=gap.prob_diff_mean, state=state, why=why)


def check_discrepancy(training: Training) -> Check:
    """The gap between the served export and the policy as the trainer ran it, within the run's tolerance."""
    check = Check(
        name="held-out discrepancy",
        question="On unseen prompts, does the served target give each token about the probability the trainer gave it?",
        source=DISCREPANCY,
    )
    measured = training.discrepancy.number("trained", "prob_diff_mean")
    tolerance = _tolerance(training)
    form = None if isinstance(training.summary, Missing) else training.summary.table.get("form")
    if isinstance(training.config, Missing):
        return replace(check, why=f"The slack is unknown: {training.config}.")
    slack = training.config.signoff.discrepancy_slack
    limit = tolerance if isinstance(tolerance, Missing) else tolerance * slack
    if not isinstance(limit, Missing):
        check = replace(check, limit=limit)
    if isinstance(measured, Missing):
        return replace(check, why=f"{measured}.")
    check = replace(check, measured=measured)
    if isinstance(limit, Missing):
        why = f"The gap is {measured:.4g}, but there is no limit to hold it to: {tolerance}."
        # Without a constraint no limit was promised: the gap is measured, and inventing one now would be no check.
        return replace(check, state="inconclusive" if form == "none" else "not measured", why=why)
    state: State = "pass" if measured <= limit else "fail"
    relation = "within" if state == "pass" else "above"
    gap = apart(measured, limit)
    why = (
        f"The mean |probability difference| {gap} is {relation} the limit {limit:.4g}: {slack:g} times the tolerance "
        f"{tolerance:.4g} of the training."
    )
    if form in QUANTIZING_FORMS:
        why = f"{why} {blend_caveat(training)}"
    if form == "none":
        why = f"{why} The run was trained without a constraint, so nothing held the gap there."
    return replace(check, state=state, why=why)


def _tolerance(training: Training) -> float | Missing:
    """The run's limit on the gap, or why it has none that concerns the deployed target."""
    config = training.config
    if (
        not isinstance(config, Missing)
        and not config.train.rollout.target
        and not isinstance(config.train.constraint.tolerance, float)
    ):
        return Missing(SUMMARY, "its tolerance is a share of the first gap to BF16 rollouts, not to the target")
    return training.summary.number("tolerance")


def blend_caveat(training: Training) -> str:
    """What the bound covers in the forms that blend, with the gap that it does not cover beside it."""
    multiplier = training.discrepancy.number("multiplier")
    unblended = training.discrepancy.number("bf16", "prob_diff_mean")
    at = "at an unknown multiplier" if isinstance(multiplier, Missing) else f"at multiplier {multiplier:.4g}"
    gap = f"not measured ({unblended})" if isinstance(unblended, Missing) else f"{unblended:.4g}"
    return (
        f"This is the gap of the policy the trainer ran, blended towards the target {at}. "
        f"The unblended BF16 weights are not bounded; their gap is {gap}."
    )
