"""Does training against the deployed model pay, and does the constraint add to it? Arms x seeds on the demo task.

`make study` runs it: per seed one warm-started model, then every arm from that model with equal budgets, each in a
process of its own. Scores are taken on the exported INT4 folder and on the BF16 weights, on the held-out problems,
by a fresh vLLM engine: greedy (what the demo's sign-off measures) and sampled at T = 1 (what RL optimizes). Rerunning
skips what is done. The table goes to docs/study.md, the unconstrained arm's curve of the first seed to configs/curves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ARMS: Mapping[str, tuple[str, ...]] = {
    "bf16-then-quantize": ("train.rollout.target=false", 'train.constraint.form="none"'),
    "int4-unconstrained": ('train.constraint.form="none"',),
    "int4-blend": (),
}
TITLES = {
    "bf16-then-quantize": "BF16 rollouts, then quantize",
    "int4-unconstrained": "INT4 rollouts, no constraint",
    "int4-blend": "INT4 rollouts, blend (the demo)",
}
SAMPLES = 4  # per problem at T = 1
CONFIG = Path("configs/demo-int4.toml")
CURVE = Path("configs/curves/demo-int4-unconstrained.jsonl")
CURVE_FIELDS = ("step", "reward", "discrepancy", "k3", "codes_changed")


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("runs/study"))
    parser.add_argument("--set", action="append", default=[], help="override for every arm, such as train.steps=100")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="run one arm in this process")
    options = parser.parse_args()
    if options.one:
        run_arm(options.one[0], int(options.one[1]), options.root, tuple(options.set))
        return
    for seed in range(options.seeds):
        for arm in ("start", *ARMS):
            if not _score_file(options.root, arm, seed).is_file():
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.study",
                    "--root",
                    str(options.root),
                    "--one",
                    arm,
                    str(seed),
                ]
                for override in options.set:
                    command += ["--set", override]
                subprocess.run(command, check=True)
    text = table(options.root, options.seeds)
    print(text)
    if not options.set:
        from pipeline.run_dir import read_jsonl, write_jsonl, write_text

        write_text(Path("docs/study.md"), text)
        rows = read_jsonl(options.root / "int4-unconstrained-0" / "train" / "metrics.jsonl")
        write_jsonl(CURVE, ({field: row[field] for field in CURVE_FIELDS} for row in rows))


def run_arm(arm: str, seed: int, root: Path, overrides: tuple[str, ...]) -> None:
    """Prepare, train and export one arm, then score what it ships. `start` makes the seed's model and scores that."""
    from pipeline.config import load_config
    from pipeline.models import target_for
    from pipeline.run import export, open_run, prepare, train
    from pipeline.run_dir import RunDir, read_json, read_jsonl, write_json
    from quant.export import export as write_export
    from quant.export import read_tensors

    common = (*overrides, f"seed={seed}", f"name={arm}-{seed}", "signoff.baseline_arm=null")
    config = load_config(CONFIG, (*common, *ARMS.get(arm, ())))
    run = open_run(root / f"{arm}-{seed}", config)
    start = RunDir(root / f"start-{seed}")
    scores: dict[str, float] = {}
    if arm == "start":
        prepare(run, config)
        bf16 = run.made_model
        write_export(read_tensors(bf16), target_for(bf16, config), model_dir=bf16, out=run.export, source_step=0)
    else:
        write_json(run.prepared, read_json(start.prepared) | {"model_dir": str(start.made_model.resolve())})
        train(run, config)
        export(run, config)
        bf16 = run.policy
        last = read_jsonl(run.metrics)[-10:]
        scores["gap"] = fmean(row["discrepancy"] for row in last)
        scores["multiplier"] = fmean(row["multiplier"] for row in last)
    for name, folder in (("int4", run.export), ("bf16", bf16)):
        for kind, value in score(folder, config, start.heldout).items():
            scores[f"{name}_{kind}"] = value
    write_json(_score_file(root, arm, seed), scores)


def score(folder: Path, config: Any, heldout: Path) -> dict[str, float]:
    """Greedy accuracy and mean accuracy of SAMPLES samples at T = 1 of one model folder on the held-out problems."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from vllm import LLM, SamplingParams

    from pipeline.run_dir import read_jsonl

    rows = read_jsonl(heldout)
    rollout, split = config.train.rollout, config.train.task.completion_split
    llm = LLM(model=str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=rollout.max_model_len)
    _keep.append(llm)

    def accuracy(temperature: float, n: int) -> float:
        sampling = SamplingParams(temperature=temperature, n=n, max_tokens=rollout.max_tokens, seed=config.seed)
        outputs = llm.generate([row["prompt"] for row in rows], sampling, use_tqdm=False)
        return fmean(
            float(sample.text.rsplit(split, 1)[-1].strip() == row["answer"])
            for row, output in zip(rows, outputs, strict=True)
            for sample in output.outputs
        )

    return {"greedy": accuracy(0.0, 1), "sampled": accuracy(1.0, SAMPLES)}


_keep: list[Any] = []  # vLLM's engines in one process share state that goes with the first one collected


def table(root: Path, seeds: int) -> str:
    """A Markdown table: mean +- standard deviation over seeds, accuracies in percent."""
    columns = ("int4_greedy", "int4_sampled", "bf16_greedy", "bf16_sampled")
    lines = [
        "| arm | INT4, greedy | INT4, sampled | BF16, greedy | BF16, sampled | gap, last 10 steps | lambda |",
        "|---|---|---|---|---|---|---|",
    ]
    found: dict[str, list[dict[str, float]]] = {}
    for arm in ("start", *ARMS):
        scores = [json.loads(_score_file(root, arm, seed).read_text()) for seed in range(seeds)]
        found[arm] = scores
        cells = [_cell([100 * s[c] for s in scores], ".1f") for c in columns]
        for field, form in (("gap", ".4f"), ("multiplier", ".2f")):
            cells.append(_cell([s[field] for s in scores], form) if field in scores[0] else "-")
        lines.append(f"| {TITLES.get(arm, 'before RL')} | " + " | ".join(cells) + " |")
    lines.append("")
    for other in ("bf16-then-quantize", "int4-unconstrained"):
        for column in ("int4_greedy", "int4_sampled"):
            differences = [
                100 * (a[column] - b[column]) for a, b in zip(found["int4-blend"], found[other], strict=True)
            ]
            kind = column.removeprefix("int4_")
            lines.append(
                f"- blend minus {TITLES[other]}, INT4 served, {kind}: {_cell(differences, '+.1f')} points "
                f"({', '.join(f'{d:+.1f}' for d in differences)})"
            )
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], form: str) -> str:
    spread = f" ± {stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"


def _score_file(root: Path, arm: str, seed: int) -> Path:
    return root / f"{arm}-{seed}" / "score.json"


if __name__ == "__main__":
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
