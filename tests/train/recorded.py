"""Trainers on recorded rollouts, the same in one process and on every rank; run by torchrun, it is one of two ranks.

`python -m torch.distributed.run ... -m tests.train.recorded FOLDER` writes what each rank came to into the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import train.trainer
from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import WORDS, tiny_model
from train.checkpoint import MOMENTS, CheckpointWriter, latest_checkpoint, load_checkpoint, save_checkpoint
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.distributed import World, whole
from train.grading import in_process
from train.policy import NonFiniteError, Policy
from train.records import Completion, Problem, TokenBatch
from train.sync import Synced
from train.tasks import Task
from train.trainer import Trainer, initial_state
from train.warmstart import character_tokenizer

PROMPTS, GROUP, STEPS, MINIBATCHES = 4, 3, 5, 2  # 6 rows to an optimizer step, 10 of these
# Sums in another order move a master by 1e-7 of its update. Where that rounds one weight to its other BF16 neighbour,
# every later step differs by 1e-5 and more; the smaller the updates, the rarer. At 1e-4 it happened here in 2 to 9 of
# them, or not in 20, as the machine's kernels have it.
LR = 5e-6
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the model's options, the training's
    "untied": ({}, {"constraint": ConstraintConfig(form="blend", multiplier_init=0.5)}),
    "tied": (
        {"tied": True},
        {
            "constraint": ConstraintConfig(form="blend+distill", multiplier_init=0.5, distill_from="start"),
            "gradient_checkpointing": True,
        },
    ),
    "mixture": (
        {"family": "qwen3-moe"},
        {"constraint": ConstraintConfig(form="none"), "advantage": "otb", "normalize_std": False},
    ),
    "measured": (
        {},
        {"constraint": ConstraintConfig(form="blend", groups="block", tolerance="auto", multiplier_init=0.5)},
    ),
    # 3 rows to an optimizer step: one of two ranks has an empty share of the second round
    "odd": ({}, {"minibatches": 4}),
}


class FakeEngine:
    """Gives completions that are a function of the seed, whatever the weights."""

    version = 0

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def metrics(self) -> dict[str, float]:
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        raise AssertionError("nothing is synced in these tests")

    def read_back(self) -> Any:
        raise AssertionError("nothing is synced in these tests")

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Completion]]:
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw = torch.Generator().manual_seed(seed)
            group = []
            for length in torch.randint(1, 9, (GROUP,), generator=draw).tolist():
                ids = torch.randint(2, 60, (length,), generator=draw)
                logprobs = -3 - torch.rand(length, generator=draw)
                routes = None
                if self.experts:  # two layers, two different experts for every token that is computed
                    routes = torch.rand(len(prompt) + length - 1, 2, self.experts, generator=draw).topk(2).indices
                group.append(Completion(tuple(ids.tolist()), tuple(logprobs.tolist()), "stop", routes))
            groups.append(group)
        return groups


def made(case: str, world: World) -> Trainer:
    """A trainer of the case, at its first step."""
    options, changes = CASES[case]
    mixture = options.get("family") == "qwen3-moe"
    rollout = RolloutConfig(
        prompts=PROMPTS, group_size=GROUP, max_tokens=8, max_model_len=64, routing_replay=mixture, prefix_caching=False
    )
    table: dict[str, Any] = {
        "task": TaskConfig(source="jsonl", name="x"), "rollout": rollout, "steps": STEPS, "lr": LR,
        "minibatches": MINIBATCHES, "microbatch_tokens": 1, "attention": "eager",
    }  # fmt: skip
    config = TrainConfig(**table | changes)
    model = tiny_model(**options)
    target = Target.for_model(TargetSpec.load("int4-g128"), model) if config.constraint.quantizes else None
    policy = Policy(model, config, world=world)
    problems = tuple(Problem(f"p{i}", f"{i}+{i}=", str(2 * i), {}) for i in range(40))
    return Trainer(
        config, policy=policy, engine=FakeEngine(8 * mixture) if world.first else None, target=target,
        task=Task(problems, problems[:1], in_process(lambda problem, text: float(len(text) % 3))),
        tokenizer=character_tokenizer([WORDS]), seed=0, state=initial_state(config),
    )  # fmt: skip


@contextmanager
def unsynced() -> Iterator[None]:
    """Nothing is sent to the fake engine."""
    real = train.trainer.sync
    train.trainer.sync = lambda *_, step, **__: Synced(step, {}, 0.0, None)
    try:
        yield
    finally:
        train.trainer.sync = real


def steps(trainer: Trainer, count: int) -> list[dict[str, float | None]]:
    """The metrics of some steps, without durations."""
    with unsynced():
        rows = [trainer.step().metrics for _ in range(count)]
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def digest(policy: Policy) -> str:
    """Of all masters and moments, gathered."""
    known = hashlib.sha256()
    for master in policy.masters.values():
        moments = policy.optimizer.state[master]
        for tensor in (master.detach(), *(moments[name] for name in MOMENTS)):
            known.update(whole(tensor).contiguous().numpy().tobytes())
    return known.hexdigest()


def planted(world: World, what: str) -> dict[str, Any]:
    """A step in which the last rank's loss, or gradient alone, is NaN."""
    trainer = made("untied", world)
    steps(trainer, 1)
    before = digest(trainer.policy)
    computed = trainer.policy.logprobs

    def spoiled(batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        logprobs = computed(batch, rows)
        if not logprobs.requires_grad:
            return logprobs
        if what == "loss":
            return logprobs * torch.nan
        logprobs.register_hook(lambda gradient: gradient * torch.nan)
        return logprobs

    if world.rank == world.size - 1:
        trainer.policy.logprobs = spoiled
    message = "none"
    try:
        steps(trainer, 1)
    except NonFiniteError as error:
        message = str(error)
    return {"message": message, "untouched": digest(trainer.policy) == before}


def by_one(folder: Path) -> None:
    """What one process comes to."""
    rows, known = {}, ""
    for case in CASES:
        trainer = made(case, World())
        rows[case] = steps(trainer, STEPS)
        save_file(dict(trainer.policy.weights()), folder / f"{case}-by-one.safetensors")
        if case == "tied":
            save_checkpoint(folder / "by-one", trainer.policy, trainer.state)
            known = digest(trainer.policy)
    (folder / "by-one.json").write_text(json.dumps({"rows": rows, "digest": known}))


def main(folder: Path) -> None:
    """What the tests ask of every rank."""
    world = World.join()
    found: dict[str, Any] = {}
    for case in CASES:
        trainer = made(case, world)
        parameters = list(trainer.policy.module.parameters())
        found[case] = {
            "sharded": all(isinstance(p, DTensor) for p in (*parameters, *trainer.policy.masters.values())),
            "share": sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters),
            "rows": steps(trainer, STEPS),
        }
        weights = trainer.policy.whole_weights()
        if world.first:
            save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / f"{case}.safetensors")
        if case == "tied":
            with CheckpointWriter(folder / "by-two", keep=1) as writer:
                writer.save(trainer.policy, trainer.state)
            found["by two"] = digest(trainer.policy)
    again = made("tied", world)
    latest = latest_checkpoint(folder / "by-one")
    assert latest is not None
    load_checkpoint(latest, again.policy)
    found["by one"] = digest(again.policy)
    found["planted"] = {what: planted(world, what) for what in ("loss", "gradient")}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    (by_one if "RANK" not in os.environ else main)(Path(sys.argv[1]))
