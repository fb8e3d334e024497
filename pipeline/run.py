"""The flow, one function per stage: prepare -> train -> export -> evaluate -> sign off.

Each stage reads and writes the run directory alone, can be run again from disk, and is skipped by `run` when its
last-written artifact exists.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.suite import Request
from pipeline import console
from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.evaluation import HELDOUT, evaluation_suite
from pipeline.lock import LOCK
from pipeline.preflight import preflight
from pipeline.provenance import provenance
from pipeline.run_dir import RunDir, discard, model_dir_of, read_json, read_jsonl, write_json, write_jsonl, write_text
from pipeline.training import train
from quant.verify import VerificationError


def open_run(root: Path, config: RunConfig) -> RunDir:
    """Make a run directory, or open one that holds the same configuration.

    What has not been used yet may change: evaluation, sign-off and the export's recipe at any time (what was made with
    the old ones is removed), target and training settings until training has begun, so that what `diagnose` suggests
    goes into the run it was measured for.

    Raises:
        ConfigError: the directory holds a run of another configuration; names the first field that differs.
    """
    run = RunDir(root)
    if run.config.is_file():
        held = load_config(run.config)
        field = _first_difference(_used(run, held), _used(run, config))
        if field is None and run.train.exists() and run.target.is_file():
            field = _first_difference(read_json(run.target), config.target.model_dump(mode="json"), "quant.target: ")
        if field is not None:
            raise ConfigError(
                f"{root} holds a run of another configuration ({field} differs); "
                f"choose another name with --set name=... or remove the folder"
            )
        if held.eval != config.eval:
            discard(run.discrepancy)
        if held.quant != config.quant:
            discard(run.export, run.evaluate, run.signoff, run.report)
        if run.train.exists():
            write_text(run.config, config.to_json())
            return run
    elif root.exists() and any(path.name != LOCK for path in root.iterdir()):
        raise ConfigError(f"{root} is not empty and holds no run; choose another name with --set name=...")
    target, device = preflight(config)
    text = config.to_json()
    write_json(run.target, target.model_dump(mode="json"))
    write_json(run.provenance, provenance(text, device, trust_remote_code=config.model.trust_remote_code))
    write_text(run.config, text)
    return run


def _used(run: RunDir, config: RunConfig) -> dict[str, Any]:
    """What the run directory's content already depends on."""
    if run.train.exists():
        grading = {"grader_workers", "grader_timeout", "grader_memory_gib", "max_failed"}  # how, not what is graded
        free = {"eval": True, "signoff": True, "quant": {"recipe", "recipe_sequences"}}
        how = {"keep_checkpoints": True, "distributed": True, "trackers": True, "rollout": {"servers"}}
        return config.model_dump(exclude=free | {"train": {"task": grading} | how})
    return config.model_dump(include={"name": True, "seed": True, "model": True, "train": {"task", "rollout"}})


def run_all(run: RunDir, config: RunConfig, until: str = "signoff") -> int:
    """Every stage that is not complete, in order.

    Args:
        run: its directory.
        config: of the run.
        until: the stage to stop after.

    Returns:
        The sign-off's exit code: 0 approved, 1 refused, 2 open; 0 before it.
    """
    stages = (
        ("prepare", run.prepared, prepare),
        ("train", run.summary, train),
        ("export", run.export / "manifest.json", export),
        ("evaluate", run.discrepancy, _evaluate_or_export_again),
    )
    for name, artifact, function in stages:
        if artifact.is_file():
            console.skipped(name, artifact)
        else:
            function(run, config)
        if name == until:
            return 0
    return sign_off(run.root)


def evaluate_whole(run: RunDir, config: RunConfig) -> None:
    """`evaluate`, of an export that is still what its manifest says.

    Raises:
        VerificationError: a file of the export is missing, added or changed.
    """
    from quant.export import verify_export

    try:
        verify_export(run.export)
    except VerificationError as error:
        raise VerificationError(f"{error}; make it again with: boresight export {run.root}") from error
    evaluate(run, config)


def _evaluate_or_export_again(run: RunDir, config: RunConfig) -> None:
    """A damaged export is made again from the trained weights, which must give the last sync's bytes."""
    from quant.export import verify_export

    try:
        verify_export(run.export)
    except VerificationError as error:
        console.warn(f"{error}; it is made again from {run.policy}")
        export(run, config)
    evaluate(run, config)


def prepare(run: RunDir, config: RunConfig) -> None:
    """Get the BF16 model (make it, find it, or download it) and write the held-out problems."""
    from pipeline.models import load_tokenizer, quiet_libraries
    from train.tasks import check_lengths, fingerprint, load_task, render

    quiet_libraries()
    start = time.perf_counter()
    with console.stage("prepare", config.model.path or "making a small model"):
        task = load_task(config.train.task, config.seed)
        record = _make(run, config, task) if config.model.make else _find(config)
        tokenizer = load_tokenizer(model_dir_of(run, record), config)
        rollout = config.train.rollout
        for problems in (task.train, task.heldout):
            prompts = render(problems, tokenizer, chat=config.train.task.chat)
            check_lengths(problems, prompts, tokenizer, room=rollout.max_model_len - rollout.max_tokens)
        write_jsonl(
            run.heldout,
            ({"id": p.id, "prompt": text, "answer": p.answer} for p, text in zip(task.heldout, prompts, strict=True)),
        )
        data = {"train_problems": len(task.train), "heldout_problems": len(task.heldout), "problems": fingerprint(task)}
        write_json(run.prepared, record | data | {"seconds": time.perf_counter() - start})


def _make(run: RunDir, config: RunConfig, task: Any) -> dict[str, Any]:
    from train.tasks import load_function
    from train.warmstart import make_model

    make = config.model.make
    assert make is not None
    solution = load_function(make.solution, "model.make.solution") if make.solution else None
    start = time.perf_counter()

    def progress(step: int, accuracy: float) -> None:
        seconds = time.perf_counter() - start
        console.say(f"  warm start, step {step}: sampled accuracy {accuracy:.3f} after {seconds:.0f} s")

    made = make_model(
        make, task, run.made_model, max_length=config.train.rollout.max_model_len, seed=config.seed, solution=solution,
        progress=progress,
    )  # fmt: skip
    return {
        "made": True,
        "source": "random init, supervised warm start, injected outlier channels",
        "model_dir": None,  # in the run directory, wherever that is moved
        "outlier_scale": make.outlier_scale,
        **asdict(made),
    }


def _find(config: RunConfig) -> dict[str, Any]:
    assert config.model.path is not None
    folder = Path(config.model.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        try:
            folder = Path(snapshot_download(config.model.path, revision=config.model.revision, allow_patterns=patterns))
        except (OSError, RuntimeError, ValueError) as error:  # the hub's, of many kinds
            raise ConfigError(f"model.path: the hub cannot give {config.model.path!r}: {error}") from error
    return {"made": False, "source": config.model.path, "model_dir": str(folder.resolve()), "outlier_scale": None}


def export(run: RunDir, config: RunConfig) -> None:
    """Write the deployed checkpoint from the trained BF16 model; it must equal the last sync, bit for bit, unless a
    calibrated recipe was asked to choose other codes."""
    from pipeline.models import load_tokenizer, target_for
    from quant.calibrate import calibrated_export
    from quant.export import export as write_export
    from quant.export import read_tensors

    recipe = config.quant.recipe
    with console.stage("export", config.quant.target + (f" by {recipe}" if recipe else "")):
        last = read_json(run.last_sync)
        target = target_for(run.policy, config)
        discard(run.evaluate, run.signoff, run.report)
        if recipe is not None:
            texts = [row["prompt"] + row["completion"] for row in read_jsonl(run.rollouts)]
            tokenizer = load_tokenizer(run.policy, config)
            manifest = calibrated_export(
                run.policy, target, recipe=recipe, out=run.export, source_step=last["step"],
                sequences=tokenizer(texts[-config.quant.recipe_sequences :], add_special_tokens=False).input_ids,
            )  # fmt: skip
        else:
            manifest = write_export(
                read_tensors(run.policy), target, model_dir=run.policy, out=run.export, source_step=last["step"],
                scales=dict(read_tensors(run.scales)),
                # BF16 rollouts never synced the target: there is nothing to be equal to
                synced=last["tensors"] if config.train.rollout.target else None,
            )  # fmt: skip
        console.say(f"  {len(manifest['tensors'])} tensors of step {manifest['source_step']} in {run.export}")


def evaluate(run: RunDir, config: RunConfig) -> None:
    """Serve the export and the BF16 model, run lm-eval on both, measure the served discrepancy on held-out prompts.

    Goes on where an evaluation of the same models by the same tasks stopped.
    """
    from eval.lm_tasks import write_task
    from eval.measure import Probe, measure
    from pipeline.models import load_tokenizer, quiet_libraries

    quiet_libraries()
    settings, rollout = config.eval, config.train.rollout
    with console.stage("evaluate", f"starting servers, logs in {run.evaluate} (half a minute or more on a CPU)"):
        discard(run.discrepancy, run.signoff, run.report)
        write_task(
            run.heldout_task, name=HELDOUT, data=run.heldout.resolve(), grader=config.eval_grader,
            completion_split=config.train.task.completion_split, temperature=settings.temperature,
            max_tokens=settings.max_tokens or rollout.max_tokens,
        )  # fmt: skip
        prompts = [row["prompt"] for row in read_jsonl(run.heldout)[: settings.discrepancy_prompts]]
        probe = Probe(
            prompts=load_tokenizer(run.policy, config)(prompts, add_special_tokens=False).input_ids,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
        )
        request = Request(
            baseline=str(run.policy), candidate=str(run.export), suite=evaluation_suite(config, run.heldout_task),
            target=config.target, seed=config.seed,
        )  # fmt: skip
        served = measure(request, settings, run.evaluate, probe=probe, say=console.say)
        write_json(run.discrepancy, _served_discrepancy(run, config, served))


def _served_discrepancy(run: RunDir, config: RunConfig, served: Any) -> dict[str, Any]:
    """Mismatch between what the server sampled and what the trainer computes for the same tokens."""
    from pipeline.models import load_module, target_for
    from train.blend import blended
    from train.discrepancy import mismatch_metrics
    from train.multiplier import by_weight
    from train.policy import Policy
    from train.records import Completion, TokenBatch

    summary = read_json(run.summary)
    module = load_module(run.policy, config)
    target = target_for(run.policy, config)
    policy = Policy(module, config.train)
    batch = TokenBatch.collate(
        [sample.prompt_ids for sample in served],
        [Completion(s.token_ids, s.logprobs, s.finish_reason) for s in served],
    )
    weights = policy.weights()
    share = summary["multiplier"] if config.train.constraint.quantizes else 0.0
    deployed = target.deployed(weights)
    blocks = summary.get("multiplier_blocks")
    trained = blended(weights, deployed, by_weight(blocks, deployed) if blocks else share)
    measured = {}
    for name, at in (("bf16", weights), ("trained", trained)):
        policy.run_at(at)
        measured[name] = mismatch_metrics(policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)
    return {"prompts": len(served), "tokens": batch.response_tokens, "multiplier": share, **measured}


def sign_off(root: Path) -> int:
    """Judge the artifacts; write signoff.json, summary.md and report.html; print the verdict. Returns the exit code."""
    from pipeline.signoff.markdown import write_summary
    from pipeline.signoff.report import write_report
    from pipeline.signoff.verdict import write_signoff

    with console.stage("sign off"):
        signoff = write_signoff(root)
        write_summary(root, signoff)
        report = write_report(root)
    for text in signoff.warnings:
        console.warn(text)
    console.verdict(signoff.verdict, {check.name: (check.state, check.why) for check in signoff.checks}, report)
    return signoff.exit_code


def _first_difference(held: dict[str, Any], given: dict[str, Any], prefix: str = "") -> str | None:
    """The dotted name of the first field that differs, or None."""
    for key in sorted(held.keys() | given.keys()):
        one, other = held.get(key), given.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            inner = _first_difference(one, other, f"{prefix}{key}.")
            if inner is not None:
                return inner
        elif one != other and not (isinstance(one, (list, tuple)) and list(one) == list(other or ())):
            return f"{prefix}{key}"
    return None
