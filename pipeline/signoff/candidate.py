"""Is the candidate what it says it is? Its files, the kernels it runs on, and how it reads and ends a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from eval.facts import NO_TEMPLATE, differences
from eval.records import ModelFacts
from pipeline.signoff.check import Check, listed
from pipeline.signoff.evidence import EVALUATE, Evidence, Missing
from quant.config import QuantArgs, TargetSpec
from quant.tables import describe

CANDIDATE = f"{EVALUATE}/models/candidate.json"
BASELINE = f"{EVALUATE}/models/baseline.json"
UNSAID = {"symmetric": True, "dynamic": False}  # what compressed-tensors takes where a checkpoint does not say


class Group(BaseModel):
    """One entry of `config_groups`."""

    weights: dict[str, Any] | None = None
    input_activations: dict[str, Any] | None = None


class Declared(BaseModel):
    """As much of a checkpoint's `quantization_config` as is compared; others wrote it, so it is not taken as read."""

    quant_method: str = "an unnamed method"
    config_groups: dict[str, Group] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    ignore: tuple[str, ...] | None = None


def check_integrity(evidence: Evidence) -> Check:
    """Every weight file is whole, readable and finite, and is what its maker's manifest says."""
    check = Check(
        name="artifact integrity",
        question="Are the candidate's files whole, readable, finite, and what their manifest says?",
        source=CANDIDATE,
        limit=0,
    )
    facts = evidence.measurement.models["candidate"]
    if isinstance(facts, Missing):
        return replace(check, why=f"{facts}.")
    weights = facts.weights
    if weights is None:
        return replace(check, why=f"{_reason(facts, 'weights')}.")
    check = replace(check, measured=float(len(weights.problems)))
    if weights.problems:
        return replace(check, state="fail", why=f"{listed(weights.problems)}.")
    if weights.tensors == 0:
        return replace(check, measured=None, why="The folder holds no tensors.")
    compared = (
        "all equal to the manifest"
        if weights.manifest
        else "no manifest to hold them to: their digests are recorded here, so that what is deployed can be compared"
    )
    return replace(
        check,
        state="pass",
        why=f"{len(weights.files):,} files with {weights.tensors:,} finite tensors; {compared}.",
    )


def check_kernels(evidence: Evidence) -> Check:
    """The engine multiplies with quantized kernels wherever the checkpoint, and the target, say so."""
    check = Check(
        name="quantized kernels",
        question="Does the engine compute with the kernels of the quantization that is to be deployed?",
        source=CANDIDATE,
        limit=0,
    )
    facts, request = evidence.measurement.models["candidate"], evidence.measurement.request
    if isinstance(facts, Missing):
        return replace(check, why=f"{facts}.")
    if isinstance(request, Missing):
        return replace(check, why=f"{request}.")
    if facts.config is None:
        return replace(check, why=f"{_reason(facts, 'config')}.")
    declared: Mapping[str, Any] | None = facts.config["quantization"]
    wrong = [] if request.target is None else _unlike(declared, request.target)
    if wrong:
        return replace(check, measured=float(len(wrong)), state="fail", why=f"{listed(wrong)}.")
    kernels = facts.kernels
    if kernels is None:
        return replace(check, why=f"{_reason(facts, 'kernels')}.")
    check = replace(check, measured=float(len(kernels.fallbacks)))
    if kernels.fallbacks:
        why = f"{len(kernels.fallbacks):,} modules are declared quantized and run on an unquantized kernel"
        return replace(check, state="fail", why=f"{why}: {listed(kernels.fallbacks)}.")
    if declared is None:
        why = (
            f"The candidate declares no quantization, and none was asked for: {len(kernels.by_module):,} modules run "
            f"unquantized. Name the target to have it required."
        )
        return replace(check, state="pass", why=why)
    if kernels.quantized == 0:
        return replace(
            check, state="fail", why="The candidate declares a quantization, but no module runs on a quantized kernel."
        )
    named = ", ".join(f"{count:,} x {name}" for name, count in Counter(kernels.by_module.values()).most_common())
    why = f"{kernels.quantized:,} of {len(kernels.by_module):,} modules run quantized: {named}."
    return replace(check, state="pass", why=why)


def _unlike(declared: Mapping[str, Any] | None, target: TargetSpec) -> list[str]:
    """How a checkpoint's quantization differs from a target, in sentences."""
    if declared is None:
        return [f"the candidate declares no quantization: it is served in BF16, not as {target.name}"]
    try:
        said = Declared.model_validate(declared)
    except ValidationError as error:
        return [
            f"the candidate's quantization_config is not of the format of {target.name}: {describe(error, Declared)}"
        ]
    if not said.config_groups:
        method = said.quant_method
        return [f"the candidate's quantization is {method}, without config_groups to compare with {target.name}"]
    wrong = []
    for name, group in said.config_groups.items():
        wrong += _arguments(f"{name}.weights", group.weights, target.weights, target.name)
        wrong += _arguments(f"{name}.input_activations", group.input_activations, target.input_activations, target.name)
    cache = "bf16" if said.kv_cache_scheme is None else "fp8"
    if cache != target.kv_cache:
        wrong.append(f"the KV cache is {cache}, in {target.name} {target.kv_cache}")
    return wrong + _kept(said.ignore or (), target)


def _kept(ignored: Iterable[str], target: TargetSpec) -> list[str]:
    """Modules that a checkpoint keeps in BF16 and the target does not, in sentences.

    It names them by pattern, as the exporter here does, or one by one. Where the target keeps decoder layers at either
    end, they must be as many; that the last of them is the model's last is not looked up.
    """
    wrong, layers = list[str](), set[int]()
    first, last = target.keep_first_layers, target.keep_last_layers
    for entry in ignored:
        if entry in target.ignore or target.keeps(entry):
            continue
        layer = re.search(r"\blayers\\?\.(\d+)\\?\.", entry)
        if layer is None or first + last == 0:
            wrong.append(f"{entry} stays in BF16, which {target.name} quantizes")
        else:
            layers.add(int(layer[1]))
    ends = sorted(layers)
    as_many = len(ends) == first + last and ends[:first] == list(range(first))
    if not as_many or (last > 0 and ends[-1] - ends[first] != last - 1):
        found = ", ".join(map(str, ends)) or "none"
        wrong.append(f"layers in BF16: {found}; {target.name} keeps the first {first} and the last {last}")
    return wrong


def _arguments(place: str, found: Mapping[str, Any] | None, wanted: QuantArgs | None, target: str) -> list[str]:
    if wanted is None or found is None:
        if wanted is None and found is None:
            return []
        return [f"{place} is {'absent' if found is None else 'quantized'}, which is not {target}"]
    asked = wanted.model_dump(mode="json", exclude_none=True)
    said = UNSAID | {key: value for key, value in found.items() if value is not None}
    return [
        f"{place}.{key} is {said.get(key)!r}, in {target} {value!r}"
        for key, value in asked.items()
        if said.get(key) != value and (key in said or key != "scale_dtype")  # older checkpoints do not say it
    ]


def check_reading(evidence: Evidence) -> Check:
    """Tokenizer, chat template, end tokens and context are the baseline's, as the two servers use them."""
    check = Check(
        name="tokenizer and template",
        question="Does the candidate read and end a text as the baseline does: tokens, chat template, end, context?",
        source=f"{CANDIDATE}, {BASELINE}",
        limit=0,
    )
    candidate, baseline = evidence.measurement.models["candidate"], evidence.measurement.models["baseline"]
    if isinstance(candidate, Missing):
        return replace(check, why=f"{candidate}.")
    if isinstance(baseline, Missing):
        return replace(check, why=f"{baseline}.")
    wrong = differences(baseline, candidate)
    if wrong:
        return replace(check, measured=float(len(wrong)), state="fail", why=f"{listed(wrong)}.")
    for facts in (candidate, baseline):
        for field in ("text_ids", "chat_ids", "end_tokens", "context"):
            no_template = field == "chat_ids" and facts.missing.get(field) == NO_TEMPLATE
            if not getattr(facts, field) and not no_template:
                return replace(check, why=f"{_reason(facts, field)}.")
    texts, chats = len(candidate.text_ids or ()), len(candidate.chat_ids or ())
    why = (
        f"{texts} probe texts and {chats} conversations give equal ids."
        if chats
        else (f"{texts} probe texts give equal ids; neither has a chat template.")
    )
    return replace(check, measured=0.0, state="pass", why=why)


def _reason(facts: ModelFacts, field: str) -> str:
    return f"{EVALUATE}/models/{facts.label}.json: {facts.missing.get(field, f'has no {field}')}"
