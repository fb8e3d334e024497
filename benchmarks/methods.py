"""What every method of configs/methods costs: a step of it over a step of plain GRPO, the two in turn in one run.

`make methods` writes docs/methods.md. Its words come from the comments at the head of each example, its config lines
from the example's own keys, its numbers from here: nothing on the page is typed by hand. All run on the demo's model
with random weights, its INT4 target and responses of one length, so that only the method differs; the reward is noise,
so that every group has a gradient and nothing drifts. Plain GRPO and the method have an engine each, because a sync
sends what changed since the last one. Left out: what a method is worth (`benchmarks.study` is the way to find out).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from pipeline import console
from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.run_dir import read_json, write_json, write_text
from quant.errors import BoresightError

METHODS = Path("configs/methods")
CONFIG = Path("configs/demo-int4.toml")
PAGE = Path("docs/methods.md")
COSTS = Path("runs/methods/costs.json")
ROUNDS = 5
WARMUP = 1  # steps that are not counted: in the first, lambda leaves 0, AdamW makes its moments, all weights are sent
SHARED = (
    "model.make.accuracy=0", "train.rollout.ignore_eos=true", "train.rollout.max_tokens=16",
    "train.rollout.kv_cache_gib=0.25", "signoff.baseline_arm=null",
)  # fmt: skip
PLAIN = 'train.constraint.form="none"'  # the schema's default is a constraint
GROUPS = (
    "constraint forms",
    "multiplier rules",
    "corrections",
    "losses and sampling",
    "advantages and critics",
    "schedules",
    "engines",
    "parameterization",
)
FIELDS = ("group", "what", "when", "source")
# what an example says about its model, task and size of a step, which is no part of the method
SETTING = (
    "name", "seed", "model.make", "quant.target", "eval", "train.task", "train.steps", "train.lr", "train.minibatches",
    "train.microbatch_tokens", "train.attention", "train.rollout.prompts", "train.rollout.group_size",
    "train.rollout.max_tokens", "train.rollout.max_model_len", "train.rollout.prefix_caching",
)  # fmt: skip


class MethodError(BoresightError, ValueError):
    """An example of a method cannot be put on the page; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Method:
    """One example of configs/methods.

    Attributes:
        name: the file's, without its ending.
        group: the table it is in, one of GROUPS.
        what: what it does.
        when: when to use it, and when not.
        source: where it comes from.
        lines: the `key = value` lines that turn it on, as `--set` takes them; in the file's order.
    """

    name: str
    group: str
    what: str
    when: str
    source: str
    lines: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Method:
        """The header's fields, and those of the method's keys that the schema would not have at that value anyway.

        Raises:
            MethodError: a header without one of FIELDS, with other words, or with a group that is not one of GROUPS.
        """
        text = path.read_text()
        fields = header(text, path)
        if fields["group"] not in GROUPS:
            raise MethodError(f"{path}: group {fields['group']!r} is not one of {', '.join(GROUPS)}")
        lines = [
            f"{key} = {json.dumps(value, ensure_ascii=False)}"
            for key, value in _flat(tomllib.loads(text)).items()
            if not any(key == setting or key.startswith(setting + ".") for setting in SETTING)
        ]
        return cls(path.stem, **fields, lines=_needed(lines))

    def config(self) -> RunConfig:
        """Plain GRPO on the demo's model with this method turned on."""
        return load_config(CONFIG, (*SHARED, PLAIN, *self.lines))


@dataclass(frozen=True)
class Cost:
    """Ratios of a method's seconds to those of plain GRPO, one per round.

    Attributes:
        step: of whole steps.
        rest: of steps without their rollouts.
    """

    step: tuple[float, ...]
    rest: tuple[float, ...]


def main() -> None:
    """Measure every method, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round: to see that it runs, not to measure")
    parser.add_argument("--rewrite", action="store_true", help="write the page again from the last run's numbers")
    options = parser.parse_args()
    found = methods()
    if not options.rewrite:
        with tempfile.TemporaryDirectory() as folder, console.stage("methods", f"{len(found)} against plain GRPO"):
            measure(found, Path(folder), rounds=1 if options.quick else ROUNDS)
    write_text(PAGE, page(found, read_json(COSTS)))
    console.say(f"wrote {PAGE}")


def methods() -> list[Method]:
    """Every example, in the page's order."""
    found = [Method.read(path) for path in sorted(METHODS.glob("*.toml"))]
    return sorted(found, key=lambda method: GROUPS.index(method.group))


def header(text: str, path: Path) -> dict[str, str]:
    """The fields of an example's leading comment, `# what: ...` with lines that go on below.

    Raises:
        MethodError: a field is missing, or a comment before the first field.
    """
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        start = re.fullmatch(rf"# ({'|'.join(FIELDS)}): (.+)", line)
        if start:
            fields[start[1]] = [start[2]]
        elif fields:
            fields[list(fields)[-1]].append(line.lstrip("# "))
        else:
            raise MethodError(f"{path}: begins with {line!r}; expected '# group: ...'")
    missing = [field for field in FIELDS if field not in fields]
    if missing:
        raise MethodError(f"{path}: the comment at its head has no {', '.join(missing)}; needed: {', '.join(FIELDS)}")
    return {field: " ".join(fields[field]) for field in FIELDS}


def measure(found: Sequence[Method], folder: Path, *, rounds: int) -> None:
    """Write COSTS: plain GRPO against itself, then every method against plain GRPO."""
    from quant.hardware import detect_device

    bench = Bench.build(folder)
    plain = bench.trainer(bench.config, bench.plain_engine)
    _warm(plain)
    costs: dict[str, Cost] = {}
    started = time.perf_counter()
    for name, config in {"plain GRPO": bench.config, **{method.name: method.config() for method in found}}.items():
        costs[name] = bench.cost(plain, config, rounds)
        left = (time.perf_counter() - started) / len(costs) * (len(found) + 1 - len(costs))
        console.say(
            f"  {len(costs):>2}/{len(found) + 1} {name:<22} step {median(costs[name].step):6.2f}   "
            f"without rollout {median(costs[name].rest):5.2f}   ETA {left:4.0f} s"
        )
    rollout = bench.config.train.rollout
    write_json(
        COSTS,
        {
            "device": detect_device().name,
            "rounds": rounds,
            "sequences": rollout.prompts * rollout.group_size,
            "tokens": rollout.max_tokens,
            "parameters": bench.parameters,
            "target": bench.config.quant.target,
            "plain": {"step": costs["plain GRPO"].step, "rest": costs["plain GRPO"].rest},
            "methods": {method.name: {"step": costs[method.name].step, "rest": costs[method.name].rest}
                        for method in found},
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What plain GRPO and the methods share.

    Attributes:
        config: plain GRPO.
        model: folder of the BF16 model that all start from.
        export: folder of its deployed checkpoint.
        target: what is deployed.
        task: the demo's problems, with noise for a reward.
        tokenizer: the model's.
        parameters: how many the model has.
        plain_engine: plain GRPO's.
        engine: the methods', one after the other.
    """

    config: RunConfig
    model: Path
    export: Path
    target: Any
    task: Any
    tokenizer: Any
    parameters: int
    plain_engine: Any
    engine: Any

    @classmethod
    def build(cls, folder: Path) -> Bench:
        """Make the model, its export and two engines."""
        from dataclasses import replace

        from pipeline.models import load_tokenizer, quiet_libraries, target_for
        from quant.export import export, read_tensors
        from train.grading import in_process
        from train.tasks import load_task
        from train.vllm_engine import VllmEngine
        from train.warmstart import make_model

        quiet_libraries()
        config = load_config(CONFIG, (*SHARED, PLAIN))
        assert config.model.make is not None
        rollout = config.train.rollout
        task = load_task(config.train.task, config.seed)
        model, deployed = folder / "model", folder / "export"
        made = make_model(
            config.model.make, task, model, max_length=rollout.max_model_len, seed=config.seed, solution=None
        )
        target = target_for(model, config)
        export(read_tensors(model), target, model_dir=model, out=deployed, source_step=0)
        return cls(
            config, model, deployed, target,
            replace(task, grade=in_process(lambda problem, text: Random(text).random())),
            load_tokenizer(model, config), made.parameters,
            *(VllmEngine(deployed, rollout, seed=config.seed) for _ in range(2)),
        )  # fmt: skip

    def trainer(self, config: RunConfig, engine: Any) -> Any:
        """A trainer at its first step, on this engine or, where the config asks for another, on one of its own."""
        from pipeline.models import load_module
        from train.exact_engine import ExactEngine, end_tokens
        from train.policy import Policy
        from train.trainer import Trainer, initial_state
        from train.vllm_engine import VllmEngine

        assert config.quant == self.config.quant, "all methods are measured on one target"
        policy = Policy(load_module(self.model, config), config.train, seed=config.seed)
        rollout = config.train.rollout
        if rollout.engine == "exact":
            engine = ExactEngine(policy, end_tokens(policy.module, self.tokenizer))
        elif rollout != self.config.train.rollout:
            engine = VllmEngine(self.export if rollout.target else self.model, rollout, seed=config.seed)
        return Trainer(
            config.train, policy=policy, engine=engine, target=self.target if rollout.target else None, task=self.task,
            tokenizer=self.tokenizer, seed=config.seed, state=initial_state(config.train),
        )  # fmt: skip

    def cost(self, plain: Any, config: RunConfig, rounds: int) -> Cost:
        """Steps of plain GRPO and of a method in turn."""
        method = self.trainer(config, self.engine)
        acts = config.train.constraint.acts and not config.train.constraint.quantizes
        _warm(method)
        pairs = []
        for _ in range(rounds):
            pair = plain.step().metrics, method.step().metrics
            assert not acts or pair[1]["multiplier"] > 0, "an idle lever: its cost would be that of plain GRPO"
            assert pair[1].get("extra_rounds", 0) == 0, "the page says that no group was sampled again"
            pairs.append(pair)
        return Cost(
            tuple(b["seconds/total"] / a["seconds/total"] for a, b in pairs),
            tuple(_rest(b) / _rest(a) for a, b in pairs),
        )


def _warm(trainer: Any) -> None:
    for _ in range(WARMUP):
        trainer.step()


def _rest(metrics: Mapping[str, float]) -> float:
    """Seconds of a step without its rollout."""
    return metrics["seconds/total"] - metrics["seconds/rollout"]


def page(found: Sequence[Method], costs: Mapping[str, Any]) -> str:
    """The Markdown page.

    Args:
        costs: what COSTS holds; a method that came after the measurement has none yet.
    """
    rounds, noise = costs["rounds"], {kind: [min(r), max(r)] for kind, r in costs["plain"].items()}
    lines = [
        "# Methods",
        "",
        f"Written by `make methods` on {costs['device']}, with the words of the comments in `configs/methods/`. The "
        "examples prove that the methods run, not that they help: what was compared is in [evidence.md](evidence.md).",
        "",
        "- *step*: seconds of a training step over those of plain GRPO, the two in turn in one run, median of "
        f"{rounds} round{'s' * (rounds != 1)}; *rest*: the same without the rollouts. Work of the first step alone is "
        "not in it",
        f"- noise: plain GRPO against itself gave {_span(noise['step'])} for *step* and {_span(noise['rest'])} for "
        "*rest*: differences of that size say nothing",
        f"- plain GRPO is `{PLAIN.replace('=', ' = ')}`, no correction, rollouts from {costs['target']}. Every method "
        "is measured with its own lines added to that. Without such a line a config has the default lever, "
        "blend-start, and so have the examples",
        "- – was not measured yet",
        f"- demo-shaped steps, {costs['sequences']} responses of {costs['tokens']} tokens, a model of "
        f"{costs['parameters'] / 1e6:.1f}M parameters with random weights, a reward that is noise. Dynamic sampling "
        "had nothing to sample again there",
        "- a line goes into a config's tables, or on the command line: `--set 'train.loss.name=\"dapo\"'`",
    ]
    for group in GROUPS:
        members = [method for method in found if method.group == group]
        if members:
            lines += ["", f"## {group.capitalize()}", "",
                      "| method | what it does | when to use it | step | rest | config | source |",
                      "|---|---|---|---:|---:|---|---|"]  # fmt: skip
            lines += [row(method, costs["methods"].get(method.name)) for method in members]
    return "\n".join(lines) + "\n"


def row(method: Method, cost: Mapping[str, Sequence[float]] | None) -> str:
    """A method's line of its table; dashes where its cost was not measured."""
    words = [text.replace("|", r"\|") for text in (method.what, method.when)]
    numbers = [f"{median(cost[kind]):.2f}" if cost else "–" for kind in ("step", "rest")]
    config = "<br>".join(f"`{line}`" for line in method.lines)
    link = f"[{method.name}](../{METHODS}/{method.name}.toml)"
    return f"| {' | '.join([link, *words, *numbers, config, method.source])} |"


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} to {values[1]:.2f}"


def _needed(lines: Sequence[str]) -> tuple[str, ...]:
    """Those lines without which the demo, or plain GRPO, would not become the same; of a table of defaults, the first.

    Both, because a method that needs the constraint off must say so where the default is on.
    """
    kept = list(lines)
    for line in reversed(lines):
        fewer = [other for other in kept if other != line]
        if all(_train(base, fewer) == _train(base, kept) for base in ((), (PLAIN,))):
            kept = fewer
    return tuple(kept)


def _train(base: Sequence[str], lines: Sequence[str]) -> Any:
    """The demo's `[train]` with these lines; None where they cannot be combined."""
    try:
        return load_config(CONFIG, (*base, *lines)).train
    except ConfigError:
        return None


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
