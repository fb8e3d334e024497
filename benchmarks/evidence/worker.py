"""One training run of the study after another, in one process on one core: the engines are started once.

A run is the trainer's own loop on the real engine, without a run directory; what it ends with is scored on the engine
that holds the deployed weights, verified bit for bit by the last sync, and on a BF16 engine. Every run loads all
weights anew and seeds every completion, so that it does not depend on what the process did before.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.run_dir import RunDir, write_json

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES = 1  # per held-out problem at T = 1
UNSEEN = 1 << 39  # the first seed of the held-out completions; training has (seed << 40) + step * prompts
CURVES = {
    "reward": 4, "discrepancy": 5, "k3": 5, "multiplier": 3, "grad_norm": 3, "response_length": 2, "truncated": 3,
    "codes_changed": 5,
}  # fmt: skip
POINTS = 50  # of a learning curve that are kept: means over equal stretches of steps


class Worker:
    """Keeps the engines of one setting, and runs its arms.

    Attributes:
        starts: folder of the models that runs start from.
    """

    def __init__(self, starts: Path) -> None:
        self.starts = starts
        self._engines: dict[str, Any] = {}

    def run(self, config: RunConfig, *, quantized: bool = True) -> dict[str, Any]:
        """Train one arm from its seed's model, and score it.

        Args:
            config: of the run.
            quantized: whether the quantized model is what is served.

        Returns:
            "scores": shares of the held-out problems; "answers": which were right, as hexadecimal bits; "curves": see
            `curve`; "seconds": of the training steps, "cpu" those of the processor; "stopped": what ended the run
            early, if anything did.
        """
        from pipeline.models import load_module, load_tokenizer, target_for
        from pipeline.training import calibration_prompts
        from train.exact_engine import ExactEngine, end_tokens
        from train.policy import NonFiniteError, Policy
        from train.sync import sync
        from train.tasks import load_task
        from train.timing import Stopwatch
        from train.trainer import Trainer, initial_state

        start = self.start(config)
        task = load_task(config.train.task, config.seed)
        tokenizer = load_tokenizer(start, config)
        module = load_module(start, config)
        target = target_for(start, config) if quantized else None
        policy = Policy(module, config.train, seed=config.seed)
        deploying = config.train.rollout.target

        def calibrated() -> dict[str, Tensor]:
            if target is None or not target.static_scales:
                return {}
            return policy.static_scales(target, calibration_prompts(task, tokenizer, config))

        scales = calibrated()
        if config.train.rollout.engine == "exact":
            engine: Any = ExactEngine(policy, end_tokens(module, tokenizer))
        else:
            engine = self.engine(config, start, quantized=deploying, scales=scales)
        trainer = Trainer(
            config.train, policy=policy, engine=engine, target=target if deploying else None, task=task,
            tokenizer=tokenizer, seed=config.seed, calibrate_every=config.quant.calibrate_every,
            state=replace(initial_state(config.train), scales=scales if deploying else {}),
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        stopped, began, began_cpu = None, time.perf_counter(), time.process_time()
        while trainer.state.step < config.train.steps:
            try:
                rows.append(dict(trainer.step().metrics))
            except NonFiniteError as error:
                stopped = str(error)
                break
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        weights = policy.weights()
        scales = trainer.state.scales if deploying else calibrated()
        answers: dict[str, list[int]] = {}
        for name, judged in (("served", target), ("bf16", None)):
            judge = self.engine(config, start, quantized=judged is not None, scales=scales)
            previous = trainer.synced if judge is engine else None
            sync(
                weights, judged, judge, step=0, previous=previous, clock=Stopwatch(), scales=scales if judged else None
            )
            for kind, temperature, samples in (("greedy", 0.0, 1), ("sampled", 1.0, SAMPLES)):
                answers[f"{name}_{kind}"] = right(judge, task, tokenizer, config, temperature, samples)
        return {
            "scores": {key: sum(row) / len(row) for key, row in answers.items()},
            "answers": {key: bits(row) for key, row in answers.items()},
            "curves": curve(rows),
            "summary": {
                "tolerance": trainer.state.tolerance,
                "first_discrepancy": trainer.state.first_discrepancy,
                "multiplier": trainer.state.multiplier.value,
                "gap_last": mean_of(rows[-10:], "discrepancy"),
                "k3_last": mean_of(rows[-10:], "k3"),
                "grad_norm_max": max((row["grad_norm"] for row in rows), default=None),
            },
            "seconds": {
                "total": round(seconds, 2),
                "cpu": round(cpu, 2),
                # a phase may be in some steps alone, such as a calibration
                **{
                    name: round(sum(row.get(name, 0.0) for row in rows), 2)
                    for name in dict.fromkeys(name for row in rows for name in row if name.startswith("seconds/"))
                },
            },
            "stopped": stopped,
        }

    def start(self, config: RunConfig) -> Path:
        """The folder of the seed's model, made once by whoever needs it first."""
        from pipeline.run import prepare

        run = RunDir(self.starts / f"{start_key(config)}-{config.seed}")
        with locked(run.root):
            if not run.prepared.is_file():
                write_json(run.config, config.model_dump(mode="json"))
                prepare(run, config)
        return run.made_model

    def engine(
        self, config: RunConfig, start: Path, *, quantized: bool, scales: Mapping[str, Tensor] | None = None
    ) -> Any:
        """The engine of these shapes, which holds whatever was loaded last: a run's first sync loads everything."""
        from pipeline.models import target_for
        from quant.export import export, read_tensors
        from train.vllm_engine import VllmEngine

        rollout = config.train.rollout
        size = rollout.prompts * rollout.group_size
        key = repr(
            (start_key(config), quantized and config.target, rollout.max_model_len, size, rollout.routing_replay)
        )
        if key not in self._engines:
            folder = start
            if quantized:
                folder = start.parent / f"engine-{os.getpid()}"
                target = target_for(start, config)
                export(read_tensors(start), target, model_dir=start, out=folder, source_step=0, scales=scales)
            self._engines[key] = VllmEngine(folder, rollout, seed=0)
        engine = self._engines[key]
        engine.config = rollout  # how to sample
        return engine


def start_key(config: RunConfig) -> str:
    """Names what a start model depends on besides the seed."""
    from hashlib import sha256

    assert config.model.make is not None
    return sha256(repr((config.model.make, config.train.task)).encode()).hexdigest()[:12]


def right(engine: Any, task: Any, tokenizer: Any, config: RunConfig, temperature: float, samples: int) -> list[int]:
    """1 for every right answer to the held-out problems, 0 for the others; a problem's samples are neighbours."""
    from train.tasks import render

    rollout = config.train.rollout
    engine.config = rollout.model_copy(update={"temperature": temperature, "group_size": samples})
    prompts = tokenizer(render(task.heldout, tokenizer, chat=False), add_special_tokens=False).input_ids
    groups = engine.generate(prompts, range(UNSEEN, UNSEEN + len(prompts)))
    engine.config = rollout
    texts = tokenizer.batch_decode([list(c.token_ids) for group in groups for c in group], skip_special_tokens=True)
    problems = [problem for problem in task.heldout for _ in range(samples)]
    grades = task.grade(list(zip(problems, texts, strict=True)), 0)  # raises where one could not be graded
    return [int(grade.reward == 1) for grade in grades]


def bits(values: Sequence[int]) -> str:
    """0s and 1s as hexadecimal, the first the highest bit, padded with 0s at the end."""
    text = "".join(map(str, values))
    text += "0" * (-len(text) % 4)
    return f"{int(text, 2):0{len(text) // 4}x}"


def curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Means of the metrics over at most POINTS equal stretches of steps; "step" is a stretch's middle."""
    count = min(POINTS, len(rows))
    edges = [round(i * len(rows) / count) for i in range(count + 1)] if rows else [0]
    stretches = [rows[a:b] for a, b in pairwise(edges)]
    found: dict[str, list[float | None]] = {"step": [mean_of(part, "step") for part in stretches]}
    for name, digits in CURVES.items():
        if rows and name in rows[0]:
            means = [mean_of(part, name) for part in stretches]
            found[name] = [None if mean is None else round(mean, digits) for mean in means]
    return found


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of what is there."""
    values = [row[name] for row in rows if row.get(name) is not None and row[name] == row[name]]
    return sum(values) / len(values) if values else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in making a folder, among the study's processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
