"""Can a training recipe grow the outlier channels that the study injects? Start models of the study, trained harder.

`python -m benchmarks.outliers` prints a row per recipe, in about ten minutes: how far the largest channel of any linear
layer stands out of its median one, in its inputs and in its weights, and what INT4 weights cost (quantized in torch, no
engine). The last rows are the study's own, with the outliers injected.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SEED = 0
PROBLEMS = 256
RECIPES = {
    "the study's": ("model.make.outlier_scale=1",),
    "lr x3": ("model.make.outlier_scale=1", "model.make.lr=9e-3"),
    "to 85%": ("model.make.outlier_scale=1", "model.make.accuracy=0.85"),
    "lr x3, to 85%": ("model.make.outlier_scale=1", "model.make.lr=9e-3", "model.make.accuracy=0.85"),
    "lr x3, to 98%": ("model.make.outlier_scale=1", "model.make.lr=9e-3", "model.make.accuracy=0.98"),
    "the study's, injected x4": ("model.make.outlier_scale=4",),
    "the study's, injected x16": ("model.make.outlier_scale=16",),
}


@dataclass(frozen=True)
class Look:
    """What stands out in one model.

    Attributes:
        inputs: RMS of the largest input channel over the median channel's, of the linear layer where that is largest.
        weights: the same of the columns of the weights.
        gap: mean |p - p_Q| of the tokens of worked solutions, Q the weights alone.
    """

    inputs: float
    weights: float
    gap: float


def main() -> None:
    """Print a row per recipe."""
    from benchmarks.evidence.settings import Job
    from benchmarks.evidence.tasks import answer
    from train.tasks import load_task
    from train.warmstart import make_model

    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| recipe | steps | sampled accuracy | inputs | weights | gap of INT4 g128 |\n|---|---:|---:|---:|---:|---:|")
    for name, overrides in RECIPES.items():
        config = Job("severe", "uncorrected", SEED, (*overrides, 'quant.target="int4-g128"')).config()
        assert config.model.make is not None
        task = load_task(config.train.task, SEED)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            made = make_model(
                config.model.make, task, Path(folder), max_length=config.train.rollout.max_model_len, seed=SEED,
                solution=answer,
            )  # fmt: skip
            found = look(Path(folder), config, [(p.prompt, answer(p)) for p in task.heldout[:PROBLEMS]])
        print(
            f"| {name} | {made.steps} | {made.sampled_accuracy:.2f} | {found.inputs:.1f} | {found.weights:.1f} "
            f"| {found.gap:.4f} |",
            flush=True,
        )


@torch.no_grad()
def look(folder: Path, config: Any, solved: list[tuple[str, str]]) -> Look:
    """Run a model over worked solutions, as it is and with its weights quantized."""
    from pipeline.models import load_module, load_tokenizer, target_for

    model, tokenizer = load_module(folder, config).float(), load_tokenizer(folder, config)
    tokens = tokenizer(
        [a + b for a, b in solved], add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    prompts = torch.tensor([len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt, _ in solved])
    answers = mask[:, 1:] & (torch.arange(1, ids.shape[1]) >= prompts[:, None])
    target = target_for(folder, config)
    linears = {name: model.get_submodule(name) for name in target.modules}
    inputs: dict[str, float] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, given, name=name: inputs.__setitem__(name, _stands_out(given[0][mask]))
        )
        for name, linear in linears.items()
    ]

    def probabilities() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=tokens["attention_mask"]).logits[:, :-1]
        return logits.softmax(-1).gather(-1, ids[:, 1:, None])[answers]

    trained = probabilities()
    for hook in hooks:
        hook.remove()
    weights = {name: _stands_out(linear.weight) for name, linear in linears.items()}
    deployed = target.deployed({name: weight.bfloat16() for name, weight in model.named_parameters()})
    for name, weight in deployed.items():
        model.get_parameter(name).copy_(weight)
    return Look(max(inputs.values()), max(weights.values()), (trained - probabilities()).abs().mean().item())


def _stands_out(rows: torch.Tensor) -> float:
    """RMS of the largest column over the median column's."""
    rms = rows.square().mean(0).sqrt()
    return (rms.max() / rms.median()).item()


if __name__ == "__main__":
    main()
