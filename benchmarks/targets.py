"""Every target on every model family: does it run here, is its sync bit-exact, how large is its gap, what does it cost?

`make targets` writes docs/targets.md. Per family one small model is made and warm-started on the demo task, with mild
outlier channels; each family is measured in a process of its own. A cell that this machine cannot run says why, and
shows what can be known without the kernel: the size of the export and the gap that the weights alone make.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import paired

CONFIG = Path("configs/demo-int4.toml")
OUTLIERS = "model.make.outlier_scale=8"
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "dense, untied": (),
    "dense, tied": ("model.make.tie_word_embeddings=true",),
    "MoE": ("model.make.experts=4", "model.make.intermediate_size=256", "train.rollout.target=false",
            'train.constraint.form="none"'),
}  # fmt: skip
KV = "int4-g128 + FP8 KV"  # the addition, on one target
BF16_EXPERTS = "int4-g128, experts BF16"
EXPERTS = "re:.*experts.*"
PROMPTS = 48


@dataclass(frozen=True)
class Cell:
    """One target on one family.

    Attributes:
        refused: why this machine cannot run it; None when it did run.
        exact: after a sync, tokens and log-probs are those of a fresh engine, bit for bit; None if not run.
        gap, k3: mean |probability difference| and k3 of the engine's own samples under the BF16 model; None if not run.
        weights_gap: mean |probability difference| between Q(W) and W in the trainer, on the BF16 engine's samples.
        size: bytes of the export's tensors over those of the BF16 model.
        speed: tokens/s over the BF16 engine's, the two in turn; None if not run.
    """

    refused: str | None
    exact: bool | None
    gap: float | None
    k3: float | None
    weights_gap: float
    size: float
    speed: float | None


def main() -> None:
    """Measure every family in a process of its own, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/targets"))
    parser.add_argument("--one", metavar="FAMILY", help="measure one family in this process")
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.root)
        return
    for family in FAMILIES:
        if not _file(options.root, family).is_file():
            command = [sys.executable, "-m", "benchmarks.targets", "--root", str(options.root), "--one", family]
            subprocess.run(command, check=True)
    text = table({family: json.loads(_file(options.root, family).read_text()) for family in FAMILIES})
    print(text)
    from pipeline.run_dir import write_text

    write_text(Path("docs/targets.md"), text)


def measure(family: str, root: Path) -> None:
    """Make the family's model if need be, then fill its cells."""
    from pipeline.config import load_config
    from pipeline.models import load_module, load_tokenizer, quiet_libraries
    from pipeline.run import open_run, prepare
    from pipeline.run_dir import write_json
    from quant.config import QuantConfig, shipped
    from train.policy import Policy
    from train.tasks import load_task, render
    from train.vllm_engine import VllmEngine

    quiet_libraries()
    name = family.replace(", ", "-")
    common = (
        OUTLIERS,
        f"name={name}",
        "signoff.baseline_arm=null",
        f"train.rollout.prompts={PROMPTS}",
        "train.rollout.kv_cache_gib=0.1",
    )
    # a mixture whose experts are quantized would be refused here; the model is the same for every target
    runnable = (f'quant.ignore=["{EXPERTS}"]',) if family == "MoE" else ()
    config = load_config(CONFIG, (*common, *FAMILIES[family], *runnable))
    run = open_run(root / name, config)
    if not run.prepared.is_file():
        prepare(run, config)
    model_dir, task = run.made_model, load_task(config.train.task, config.seed)
    tokenizer = load_tokenizer(model_dir, config)
    texts = render(task.step_problems(0, PROMPTS, 0), tokenizer, chat=False)
    bench = Bench(
        model_dir=model_dir,
        config=config,
        policy=Policy(load_module(model_dir, config), config.train),
        prompts=tokenizer(texts, add_special_tokens=False).input_ids,
        baseline=VllmEngine(model_dir, config.train.rollout, seed=0),
    )
    cells: dict[str, Any] = {}
    wanted = {target: QuantConfig(target=target) for target in shipped()}
    wanted[KV] = QuantConfig(target="int4-g128", kv_cache="fp8")
    if family == "MoE":
        wanted[BF16_EXPERTS] = QuantConfig(target="int4-g128", ignore=(EXPERTS,))
    for label, quant in wanted.items():
        cells[label] = asdict(bench.cell(quant))
        print(family, label, cells[label], flush=True)
    write_json(_file(root, family), cells)


@dataclass(frozen=True)
class Bench:
    """One family's model, its BF16 engine, and what both are asked."""

    model_dir: Path
    config: Any
    policy: Any
    prompts: list[list[int]]
    baseline: Any

    def cell(self, quant: Any) -> Cell:
        """Measure one target."""
        from quant.export import export, read_tensors
        from quant.hardware import detect_device, unsupported_reason
        from quant.target import Target
        from train.sync import sync
        from train.timing import Stopwatch
        from train.vllm_engine import VllmEngine

        spec = quant.spec()
        target = Target.for_model(spec, self.policy.module)
        weights = self.policy.weights()
        scales = self.policy.static_scales(target, self.prompts)
        experts = any(".experts." in module for module in target.modules)
        refused = unsupported_reason(spec, detect_device(), experts=experts)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            export(weights.items(), target, model_dir=self.model_dir, out=out / "now", source_step=1, scales=scales)
            size = _bytes(read_tensors(out / "now")) / _bytes(read_tensors(self.model_dir))
            weights_gap = self._gap(self.baseline, weights | target.deployed(weights))["prob_diff_mean"]
            if refused is not None:
                return Cell(refused, None, None, None, weights_gap, size, None)
            # an engine that starts from other weights, synced to these, against a fresh one of these
            other = {name: weight * 1.25 for name, weight in weights.items()}
            export(other.items(), target, model_dir=self.model_dir, out=out / "old", source_step=0, scales=scales)
            engine = VllmEngine(out / "old", self.config.train.rollout, seed=0)
            fresh = VllmEngine(out / "now", self.config.train.rollout, seed=0)
        sync(weights, target, engine, step=1, previous=None, clock=Stopwatch(), scales=scales)
        exact = self._samples(engine) == self._samples(fresh)
        gap = self._gap(engine, weights)
        speed = paired(lambda: self._samples(engine), lambda: self._samples(self.baseline))
        return Cell(None, exact, gap["prob_diff_mean"], gap["k3"], weights_gap, size, speed)

    def _samples(self, engine: Any) -> Any:
        return engine.generate(self.prompts, list(range(len(self.prompts))))

    def _gap(self, engine: Any, weights: Mapping[str, Any]) -> dict[str, float]:
        """Mismatch of an engine's samples with the trainer at these weights."""
        from train.discrepancy import mismatch_metrics
        from train.records import TokenBatch

        completions = [c for group in self._samples(engine) for c in group]
        size = self.config.train.rollout.group_size
        batch = TokenBatch.collate([p for p in self.prompts for _ in range(size)], completions)
        self.policy.run_at(weights)
        return mismatch_metrics(self.policy.all_logprobs(batch), batch.rollout_logprobs, batch.mask)


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The Markdown page."""
    from quant.config import TargetSpec, shipped
    from quant.hardware import detect_device

    lines = [
        "# Targets",
        "",
        f"Written by `make targets` on {detect_device().name}. One small model per family, warm-started on the demo "
        "task, outlier channels of strength 8.",
        "",
        "- *gap*: mean |probability difference| between the deployed engine's own samples and the BF16 trainer; where "
        "the machine has no kernel, the part that the weights alone make, in brackets (trainer at Q(W), on the BF16 "
        "engine's samples)",
        "- *k3*: KL estimate, nats per token",
        "- *size*: bytes of the export over those of the BF16 model, embeddings and head included",
        "- *speed*: tokens/s over the BF16 engine in the same run. Matrices of a model this small are no measure of "
        "what narrow weights save: measure your own",
        "- *sync exact*: after a sync from other weights, tokens and log-probs equal a fresh engine's, bit for bit",
    ]
    for family, cells in found.items():
        lines += ["", f"## {family}", "", "| target | runs here | sync exact | gap | k3 | size | speed |",
                  "|---|---|---|---:|---:|---:|---:|"]  # fmt: skip
        for label, cell in cells.items():
            gap = f"({cell['weights_gap']:.4f})" if cell["gap"] is None else f"{cell['gap']:.4f}"
            k3 = "" if cell["k3"] is None else f"{cell['k3']:.1e}"
            speed = "" if cell["speed"] is None else f"{cell['speed']:.2f}"
            runs = "yes" if cell["refused"] is None else "no"
            exact = {None: "", True: "yes", False: "**no**"}[cell["exact"]]
            lines.append(f"| {label} | {runs} | {exact} | {gap} | {k3} | {cell['size']:.2f} | {speed} |")
    lines += ["", "## What each needs", "", "| target | CPU | NVIDIA GPU | calibration |", "|---|---|---|---|"]
    for label in next(iter(found.values())):
        if label in shipped():
            spec = TargetSpec.load(label)
            cpu = "no kernel" if spec.needs.cpu is None else ", ".join(spec.needs.cpu)
            cuda = "no kernel" if spec.needs.cuda is None else ".".join(map(str, spec.needs.cuda)) + " or newer"
            lines.append(f"| {label} | {cpu} | {cuda} | {'static scales' if spec.calibrated else 'none'} |")
    lines += [
        "",
        "On a CPU with AVX-512 but without BF16 instructions (Intel before Cooper Lake) vLLM's INT4 and INT8 "
        "kernels cut BF16 numbers off where others round them: the outputs, and INT4 weights, which are code * "
        "scale toward zero there. Codes and scales are read back exactly all the same, but the model is another by "
        "that much: of a random one, one greedy answer in twenty. Sign off on the kind of CPU that will serve.",
        "",
        "Quantized experts of a mixture need AMX on a CPU, or a GPU; an FP8 KV cache needs AVX-512 on a CPU. Refused "
        "here for a dense model:",
        "",
    ]
    dense = [cells for family, cells in found.items() if family != "MoE"]
    reasons = {cell["refused"] for cells in dense for cell in cells.values() if cell["refused"]}
    return "\n".join([*lines, *(f"- {reason}" for reason in sorted(reasons))]) + "\n"


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for _, tensor in tensors)


def _file(root: Path, family: str) -> Path:
    return root / family.replace(", ", "-") / "cells.json"


if __name__ == "__main__":
    main()
