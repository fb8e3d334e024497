"""The train stage: RL against the deployed target, in this process or, as one rank, together with others.

Every rank runs `train_here`; the first alone has the engine, prints, and touches the run directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import console, stop
from pipeline.config import RunConfig
from pipeline.run_dir import RunDir, append_jsonl, discard, model_dir_of, read_json, read_jsonl, write_json, write_jsonl
from pipeline.trackers import live_curves
from quant.storage import publish, remove, writing

if TYPE_CHECKING:
    from train.distributed import World

SAMPLES_PER_STEP = 4  # rollouts kept per step for a reader
CAP_WARNING_STEPS = 10
CALIBRATION_PROMPTS = 64


def train(run: RunDir, config: RunConfig) -> None:
    """RL against the deployed target, from the last checkpoint if there is one; ends with a verified final sync.

    Raises:
        RanksError: trainer processes were asked for, and one of them failed.
    """
    if config.train.distributed.ranks > 1:
        from pipeline.launch import train_in_ranks

        train_in_ranks(run, config)
        return
    from train.distributed import World

    train_here(run, config, World())


def train_here(run: RunDir, config: RunConfig, world: World) -> None:
    """What `train` does, as one of the ranks that do it."""
    from pipeline.engines import rollout_engine
    from pipeline.models import load_module, load_tokenizer, quiet_libraries, target_for
    from quant.export import export as write_export
    from quant.export import write_tensors
    from quant.verify import digests
    from train.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint
    from train.distributed import apart
    from train.policy import Policy
    from train.tasks import TaskError, fingerprint, load_task
    from train.trainer import Trainer, initial_state

    quiet_libraries()
    prepared = read_json(run.prepared)
    model_dir = model_dir_of(run, prepared)
    with (
        console.stage("train", f"{config.train.steps} steps, rollouts from {_rollout_name(config)}"),
        ExitStack() as stack,
    ):
        task = load_task(config.train.task, config.seed)
        if fingerprint(task) != prepared["problems"]:
            raise TaskError(
                f"train.task: {config.train.task.name!r} holds other problems than when {run.root} was prepared, so "
                f"held-out ones could be trained on; restore them, or start a new run"
            )
        tokenizer = load_tokenizer(model_dir, config)
        module = load_module(model_dir, config)
        target = target_for(model_dir, config)
        rollout_target = target if config.train.rollout.target else None
        policy = Policy(module, config.train, seed=config.seed, world=world)
        if config.train.lora:
            learned, total = (sum(p.numel() for p in part) for part in (policy.masters.values(), module.parameters()))
            console.say(f"  {learned:,} parameters of adapters learn, {total:,} of the model stay frozen")
        # everything that is read has been read: only now touch what an earlier run left
        if world.first:
            if run.summary.is_file():
                run.train.rename(_free_name(run.train))
            discard(run.export, run.evaluate, run.signoff, run.report, run.stop)
        scales = (
            policy.static_scales(target, calibration_prompts(task, tokenizer, config)) if target.static_scales else {}
        )
        checkpoint = run.engine if rollout_target else model_dir
        if rollout_target is not None:
            weights = policy.whole_weights()
            if world.first:
                write_export(weights.items(), target, model_dir=model_dir, out=checkpoint, source_step=0, scales=scales)
            del weights
        engine = None
        if world.first:
            with apart():
                engine = stack.enter_context(
                    rollout_engine(config, checkpoint, policy=policy, tokenizer=tokenizer, folder=run.train)
                )
        state = replace(initial_state(config.train), scales=scales)
        latest = world.shared(lambda: latest_checkpoint(run.train, warn=console.warn))
        if latest is not None:
            state = load_checkpoint(latest, policy)
            console.say(f"  resuming after step {state.step} from {latest}")
        if world.first:
            _keep_steps_before(run, state.step)
        trainer = Trainer(
            config.train, policy=policy, engine=engine, target=rollout_target, task=task, tokenizer=tokenizer,
            seed=config.seed, state=state, calibrate_every=config.quant.calibrate_every,
            faults=run.train if world.first else None,
        )  # fmt: skip
        console.step_header()
        started, first = time.perf_counter(), trainer.state.step
        with (
            stop.deferred("after this step, with a checkpoint") as stopping,
            CheckpointWriter(run.train, keep=config.train.keep_checkpoints) as writer,
            live_curves(run, config, config.train.trackers if world.first else ()) as trackers,
        ):

            def ending() -> bool:
                """Whether it was asked to stop, by a signal or, several ranks, by the file; the same on every rank."""
                return world.shared(lambda: stopping() or (world.size > 1 and run.stop.exists()))

            while trainer.state.step < config.train.steps and not ending():
                report = trainer.step()
                done = trainer.state.step
                if world.first:
                    append_jsonl(run.metrics, [report.metrics])
                    append_jsonl(run.rollouts, _readable(report.samples, done - 1))
                    trackers.log(report.metrics)
                    rate = (time.perf_counter() - started) / (done - first)
                    console.step_line(report.metrics, config.train.steps, rate * (config.train.steps - done))
                if done % config.train.checkpoint_every == 0 or done == config.train.steps or ending():
                    writer.save(policy, trainer.state)
        if trainer.state.step < config.train.steps:
            return  # stopped by the file; a signal has raised
        synced = trainer.finish()
        weights = policy.whole_weights()
        if not world.first:
            return
        write_json(run.last_sync, {"step": synced.step, "tensors": digests(synced.tensors.items())})
        scales = trainer.state.scales
        if target.static_scales and rollout_target is None:  # nothing was deployed that they could have been made for
            scales = policy.static_scales(target, calibration_prompts(task, tokenizer, config))
        write_tensors(run.scales, scales)
        if world.size == 1:
            policy.run_at(weights)
        else:  # the policy's own module is in shards
            module = load_module(model_dir, config)
            for name, parameter in module.named_parameters():
                parameter.data = weights[name]
        partial = run.policy.with_name(".policy.partial")
        remove(partial)
        with writing(run.policy):
            module.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        publish(partial, run.policy)
        if config.train.lora:
            from train.lora import Adapters

            assert isinstance(policy.learned, Adapters)
            hub_id = config.model.path if config.model.path and not Path(config.model.path).is_dir() else None
            policy.learned.save(
                run.adapter, base_model=hub_id or str(model_dir.resolve()), revision=hub_id and config.model.revision
            )
        summary = _summary(config, read_jsonl(run.metrics), trainer.state)
        for text in summary["warnings"]:
            console.warn(text)
        write_json(run.summary, summary)


def calibration_prompts(task: Any, tokenizer: Any, config: RunConfig) -> list[list[int]]:
    """Token ids of training prompts: what there is to calibrate on before any rollout."""
    from train.tasks import render

    texts = render(task.train[:CALIBRATION_PROMPTS], tokenizer, chat=config.train.task.chat)
    return tokenizer(texts, add_special_tokens=False).input_ids


def _keep_steps_before(run: RunDir, step: int) -> None:
    """Drop what a stopped run logged after its last checkpoint."""
    for path in (run.metrics, run.rollouts):
        rows = read_jsonl(path) if path.is_file() else []
        write_jsonl(path, (row for row in rows if row["step"] < step))


def _readable(samples: Any, step: int) -> Iterator[dict[str, Any]]:
    """A few rollouts of a step, spread over its prompts, then a few of those that could not be graded."""
    spread = range(0, len(samples), max(1, len(samples) // SAMPLES_PER_STEP))[:SAMPLES_PER_STEP]
    failed = [i for i, sample in enumerate(samples) if sample.failed is not None and i not in spread]
    for sample in (samples[i] for i in (*spread, *failed[:SAMPLES_PER_STEP])):
        yield {
            "step": step,
            "id": sample.problem.id,
            "prompt": sample.problem.prompt,
            "answer": sample.problem.answer,
            "completion": sample.text,
            "reward": sample.reward,
            "finish_reason": sample.finish_reason,
            **({} if sample.failed is None else {"failed": sample.failed}),
        }


def _summary(config: RunConfig, rows: list[dict[str, Any]], state: Any) -> dict[str, Any]:
    """What the curves amount to, and what about them should worry the user."""
    from train.multiplier import values_by_block

    constraint = config.train.constraint
    warnings = []
    if constraint.moves:
        values = [row["multiplier"] for row in rows]
        recent = values[-CAP_WARNING_STEPS:]
        if min(recent) >= constraint.multiplier_max:
            warnings.append(
                f"the multiplier sat at its cap {constraint.multiplier_max} for the last {len(recent)} steps: "
                f"the tolerance {state.tolerance:.4g} is out of reach for this lever; raise it or change the target"
            )
        if max(*values, state.multiplier.value) <= constraint.multiplier_min:
            warnings.append(
                f"the multiplier never left its floor {constraint.multiplier_min}: the tolerance "
                f"{state.tolerance:.4g} was never exceeded, so the constraint did nothing"
            )
    broken = sum(row["discrepancy"] != row["discrepancy"] for row in rows)
    if broken:
        warnings.append(f"the discrepancy was NaN in {broken} steps; the multiplier was not moved by them")
    failed = [row["reward_failed"] for row in rows if row["reward_failed"] > 0]
    if failed:
        warnings.append(
            f"in {len(failed)} of {len(rows)} steps the grader failed on samples, at worst on {max(failed):.1%} of a "
            f"step's; they were left out, not counted as wrong (reward_failed/* in metrics.jsonl, rollouts.jsonl)"
        )
    return {
        "steps": state.step,
        "form": constraint.form,
        "rollouts": _rollout_name(config),
        "tolerance": state.tolerance,
        "first_discrepancy": state.first_discrepancy,
        "multiplier": state.multiplier.value,
        **({"tolerance_floor": state.tolerance_floor} if state.tolerance_floor is not None else {}),
        **({"multiplier_blocks": blocks} if (blocks := values_by_block(state.multiplier)) else {}),
        "warnings": warnings,
    }


def _free_name(folder: Path) -> Path:
    """`folder.1`, or the next number that is free."""
    number = 1
    while (candidate := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return candidate


def _rollout_name(config: RunConfig) -> str:
    return config.quant.target if config.train.rollout.target else "BF16"
