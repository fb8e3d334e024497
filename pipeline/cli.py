"""`boresight`: run, check, diagnose, and every stage alone. Parses first; torch is imported only when work starts."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline import console, stop
from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.lock import hold
from pipeline.run_dir import RunDir
from quant.errors import BoresightError, one_line

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

# of the system, where a library was about to write; what we write ourselves says more
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
           errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EPIPE)  # fmt: skip
USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError, which typer does not export

Config = Annotated[Path, typer.Argument(help="a TOML config")]
Overrides = Annotated[list[str], typer.Option("--set", help="override a field: --set train.steps=5")]
Runs = Annotated[Path, typer.Option(help="folder of run directories")]
Run = Annotated[Path, typer.Argument(help="a run directory")]
Stage = Literal["prepare", "train", "export", "evaluate", "signoff"]


@app.command()
def run(
    config: Config,
    overrides: Overrides = [],  # noqa: B006 (typer copies it)
    runs: Runs = Path("runs"),
    until: Annotated[
        Stage, typer.Option(help="stop after this stage; without it, the same command goes on")
    ] = "signoff",
) -> None:
    """The whole flow: prepare, train, export, evaluate, sign off. Resumes a run directory that exists."""
    from pipeline.run import run_all

    opened, resolved = _open(config, overrides, runs)
    raise typer.Exit(run_all(opened, resolved, until))


@app.command()
def diagnose(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    prompts: Annotated[int, typer.Option(min=1, help="training problems, each with group_size completions")] = 32,
    runs: Runs = Path("runs"),
) -> None:
    """Where the gap to the target comes from: numerics, engine, weights, activations; which blocks; what tolerance.

    Prepares the model where `run` would, and goes no further. Nothing is trained.
    """
    opened, resolved = _open(config, overrides, runs)
    from pipeline.diagnose import diagnose as stage

    stage(opened, resolved, prompts=prompts)


@app.command("sweep-tolerance")
def sweep_tolerance(
    config: Config,
    ratios: Annotated[str, typer.Option(help="tolerances, as shares of the first step's gap")] = "0.05,0.1,0.3,1",
    overrides: Overrides = [],  # noqa: B006
    runs: Runs = Path("runs"),
) -> None:
    """One model, one training run per tolerance and one without a constraint: reward and gap against the tolerance.

    Resumes: finished arms are skipped, a stopped one goes on from its last checkpoint.
    """
    from pipeline.sweep import parse_ratios, sweep

    sweep(config, tuple(overrides), parse_ratios(ratios), runs)


@app.command()
def check(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="a GPU by name, such as h100; default: this machine's")] = None,
) -> None:
    """Validate a config against this machine, or a named GPU, without importing torch."""
    from pipeline.preflight import preflight
    from quant.gpus import known_gpu

    resolved = load_config(config, tuple(overrides))
    target, there = preflight(resolved, known_gpu(device).device if device else None)
    train = resolved.train
    console.table(
        {
            "model": _model_told(resolved),
            "target": f"{target.name}: {target.description}",
            "device": f"{there.name} ({there.kind})",
            "task": f"{train.task.source} {train.task.name}, graded by {train.task.grader}",
            "step": f"{train.rollout.prompts} prompts x {train.rollout.group_size}, {train.steps} steps",
            "constraint": train.constraint.form,
        }
    )
    console.say(f"{config}: ok")


@app.command()
def plan(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    gpu: Annotated[str, typer.Option(help="h200, h100, a100-80, a100-40, l40s or rtx4090")] = "h100",
    gpus: Annotated[int | None, typer.Option(min=1, help="how many, servers' included; default: the config's")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GiB of one, where it is another than known")] = None,
    model_config: Annotated[Path | None, typer.Option(help="a local config.json in place of the model's")] = None,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="mean response; default: max_tokens")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="mean prompt")] = 256,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="assumed share of the BF16 peak in training")] = 0.35,
    bandwidth: Annotated[
        float, typer.Option(min=0.01, max=1, help="assumed share of memory bandwidth in decode")
    ] = 0.6,
    network: Annotated[float, typer.Option(min=0.1, help="GB/s between machines, per GPU and direction")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="bytes and seconds for other programs")] = False,
) -> None:
    """What a run will need: memory by part, tokens, time and traffic of a step, and how to start it.

    Needs no GPU and no weights. Exit code 0: it fits; 1: it does not, and what to change is printed; 2: bad input.
    """
    from quant.gpus import known_gpu

    card = known_gpu(gpu)  # before torch is imported
    from pipeline.plan.command import plan as compute
    from pipeline.plan.cost import Assumptions

    assumed = Assumptions(
        response_tokens=response_tokens, prompt_tokens=prompt_tokens, mfu=mfu, bandwidth_share=bandwidth,
        network_gbs=network,
    )  # fmt: skip
    code = compute(
        config,
        tuple(overrides),
        gpu=card if gpu_memory is None else card.with_memory(gpu_memory),
        gpus=gpus,
        model_config=model_config,
        assumed=assumed,
        json_out=as_json,
    )
    raise typer.Exit(code)


@app.command()
def targets() -> None:
    """The shipped targets: what each is, what it needs, and whether this machine runs it."""
    from quant.config import TargetSpec, shipped
    from quant.hardware import detect_device, unsupported_reason

    device = detect_device()
    console.say(f"targets on {device.name} ({device.kind})")
    for spec in map(TargetSpec.load, shipped()):
        cpu = "no CPU kernel" if spec.needs.cpu is None else f"CPU with {', '.join(spec.needs.cpu)}"
        gpu = "no GPU kernel" if spec.needs.cuda is None else f"GPU {'.'.join(map(str, spec.needs.cuda))}+"
        scales = ", static scales" if spec.calibrated else ""
        here = "runs here" if unsupported_reason(spec, device) is None else "not here"
        console.say(f"  {spec.name:<16} {here}  ({cpu}, {gpu}{scales})\n    {spec.description}")
    console.say('use one with [quant] target = "name", or a path to a file of your own like configs/targets/*.toml')


@app.command()
def train(run_dir: Run) -> None:
    """Train again: goes on from the last checkpoint, or starts over when it was complete (train/ is kept aside).

    What later stages made is removed: it would not belong to the new weights.
    """
    from pipeline.run import train as stage

    _stage(run_dir, stage, needs=lambda opened: opened.prepared)


@app.command()
def export(run_dir: Run) -> None:
    """Export again from a trained run directory."""
    from pipeline.run import export as stage

    _stage(run_dir, stage, needs=lambda opened: opened.summary)


@app.command()
def evaluate(run_dir: Run) -> None:
    """Serve and evaluate again from an exported run directory."""
    from pipeline.run import evaluate_whole as stage

    _stage(run_dir, stage, needs=lambda opened: opened.export / "manifest.json")


@app.command()
def signoff(
    run_dir: Annotated[Path | None, typer.Argument(help="a run directory or a measurement's, to judge again")] = None,
    baseline: Annotated[str | None, typer.Option(help="hub id, folder or URL of the model that sets the bar")] = None,
    candidate: Annotated[str | None, typer.Option(help="hub id, folder or URL of the model to be deployed")] = None,
    suite: Annotated[str, typer.Option(help="a shipped suite's name, or the path of your own .toml")] = "smoke",
    target: Annotated[str | None, typer.Option(help="what the candidate must be, such as int4-g128")] = None,
    overrides: Annotated[list[str], typer.Option("--set", help="a suite's field: --set limits.margin=0.01")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, help="of the sampling")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the evidence; default: runs/signoff-CANDIDATE")] = None,
) -> None:
    """Judge a run again, or any two models that vLLM can serve. Exit code 0 approved, 1 refused, 2 could not judge.

    An endpoint's API key is read from BORESIGHT_API_KEY. The same command again goes on where it was stopped.
    """
    if run_dir is not None:
        if baseline or candidate or target or overrides or out:
            raise ConfigError("signoff: give a run directory, or --baseline and --candidate, not both")
        from pipeline.run import sign_off

        opened = RunDir(run_dir)
        if not opened.config.is_file() and not opened.request.is_file():
            raise ConfigError(f"{run_dir} holds nothing to judge: neither a run's config.json nor {opened.request}")
        hold(run_dir)
        raise typer.Exit(sign_off(run_dir))
    if baseline is None or candidate is None:
        raise ConfigError("signoff: give a run directory, or both --baseline and --candidate")
    from pipeline.compare import compare

    raise typer.Exit(compare(baseline, candidate, suite, target, tuple(overrides), seed, out))


def _model_told(config: RunConfig) -> str:
    """The model, and whether anything is known about it yet."""
    path = config.model.path
    if path is None:
        return "made here (model.make)"
    return path if os.path.exists(path) else f"{path}: no folder here, so a hub's; not looked up, its shapes unchecked"


def _open(config: Path, overrides: list[str], runs: Path) -> tuple[RunDir, RunConfig]:
    """The config's run directory, locked for this process."""
    from pipeline.preflight import preflight
    from pipeline.run import open_run

    resolved = load_config(config, tuple(overrides))
    root = runs / resolved.name
    if not root.exists():
        preflight(resolved)  # what is refused leaves nothing behind, not even a lock
    hold(root)
    return open_run(root, resolved), resolved


def _stage(root: Path, stage: Callable[[RunDir, RunConfig], None], *, needs: Callable[[RunDir], Path]) -> None:
    opened = RunDir(root)
    if not opened.config.is_file():
        raise ConfigError(f"{root} is not a run directory: it has no config.json")
    if not needs(opened).is_file():
        raise ConfigError(f"{root} is not ready for this stage: {needs(opened)} is missing; run the stage before it")
    hold(root)
    stage(opened, load_config(opened.config))


def main() -> None:
    """Entry point: the user's mistakes and known failures end in one line and exit code 2, never a traceback; a run
    that was stopped by SIGINT or SIGTERM in 130 or 143."""
    # libgomp's spinning threads cost 200x on shared cores; must be set before torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # libraries warning each other about their next releases; nothing a user of this command can act on
    for category in (FutureWarning, DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    sys.path.insert(0, os.getcwd())  # a user's own reward lies beside the config, not in site-packages
    stop.install()
    try:
        if len(sys.argv) == 1:
            app()  # prints the help
        raise SystemExit(app(standalone_mode=False))  # else a mistake of usage would end in six lines and a box
    except USAGE as usage:
        console.error(one_line(usage.format_message()))
        raise SystemExit(2) from None
    except stop.Stopped as stopped:
        console.say(f"stopped by {stopped}; to go on: {shlex.join(['boresight', *sys.argv[1:]])}")
        raise SystemExit(stopped.exit_code) from None
    except BoresightError as error:
        console.error(str(error))
        raise SystemExit(2) from error
    except Exception as error:  # a crash must not end in 1, which means refused
        if isinstance(error, OSError) and error.errno in REFUSED:
            console.error(one_line(f"{error.filename or 'a write'}: {error.strerror}"))
            raise SystemExit(2) from error
        traceback.print_exc()
        raise SystemExit(3) from None
