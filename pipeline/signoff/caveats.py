"""What the verdict alone would hide: the trainer's own warnings, and what the numbers do not say."""

from __future__ import annotations

import math
from statistics import fmean

from pipeline.signoff.check import Check
from pipeline.signoff.evidence import SUMMARY, Evidence, Missing, Rows, Training
from train.config import QUANTIZING_FORMS

LAST_STEPS = 10  # over which a curve's final value is averaged


def caveats(evidence: Evidence, accuracy: Check) -> tuple[str, ...]:
    """In the order a reader needs them."""
    candidate, request = evidence.measurement.models["candidate"], evidence.measurement.request
    found = []
    if not isinstance(candidate, Missing) and candidate.config is not None and not candidate.config["quantization"]:
        found.append("The candidate declares no quantization: this compares two unquantized models.")
    if not isinstance(request, Missing) and not request.suite.repeat_baseline:
        found.append("The baseline was served once: the engine's own noise is not known.")
    return (*found, *(() if evidence.training is None else _of_training(evidence.training, accuracy)))


def _of_training(training: Training, accuracy: Check) -> tuple[str, ...]:
    summary = {} if isinstance(training.summary, Missing) else training.summary.table
    said = summary.get("warnings") or []
    warnings = list(map(str, said)) if isinstance(said, list) else [f"{SUMMARY}: its warnings are no list."]
    if not isinstance(training.config, Missing) and training.config.quant.recipe is not None:
        warnings.append(
            f"The policy was trained against round-to-nearest codes and is deployed with those of "
            f"{training.config.quant.recipe}. Accuracy and discrepancy above are measured on what is deployed."
        )
    if summary.get("form") in ("blend", "blend+distill") and accuracy.interval is not None and accuracy.interval[0] > 0:
        warnings.append(
            "The target scores higher than the BF16 weights of the same run. The blend trains the weights to be "
            "good after quantization, not before it, so this does not say that quantization improves a model."
        )
    if isinstance(training.unconstrained, Missing):
        warnings.append(f"The unconstrained arm was not measured: {training.unconstrained}.")
    elif training.unconstrained is not None:
        warnings.append(_against_unconstrained(training, training.unconstrained))
    return tuple(warnings)


def _against_unconstrained(training: Training, unconstrained: Rows) -> str:
    """How much of the final gap the constraint may claim: the difference to the arm without one, and no more."""
    if isinstance(training.metrics, Missing):
        return f"The final gap cannot be compared with the unconstrained arm: {training.metrics}."
    ours, theirs = final_gap(training.metrics), final_gap(unconstrained)
    if ours is None or theirs is None:
        whose = "this run" if ours is None else "the unconstrained arm"
        return f"The final gap cannot be compared: {whose} has no finite discrepancy in its last {LAST_STEPS} steps."
    first = unconstrained[0].get("discrepancy")
    fell = f" (there it went from {first:.4g})" if isinstance(first, int | float) and math.isfinite(first) else ""
    text = (
        f"Mean gap in training over the last {LAST_STEPS} steps: {ours:.4g} in this run, {theirs:.4g} in the "
        f"unconstrained arm{fell}. The constraint can claim no more than this difference, {theirs - ours:+.4g}: "
        f"without a constraint the gap changes too, as the policy sharpens."
    )
    if not isinstance(training.summary, Missing) and training.summary.table.get("form") in QUANTIZING_FORMS:
        text += " This run's gap is that of the blended policy, the unconstrained arm's that of its BF16 weights."
    return text


def final_gap(rows: Rows) -> float | None:
    """Mean discrepancy of the last steps; None unless every one of them is a finite number."""
    values = [row.get("discrepancy") for row in rows[-LAST_STEPS:]]
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return fmean(numbers) if len(numbers) == len(values) else None
