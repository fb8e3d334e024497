"""`boresight signoff` on real servers: a candidate equal to the baseline is approved, planted damage is refused.

The baseline is served once and given by its URL, as someone else's server would be. It is a BF16 model whose weights
are the INT4 export's, dequantized: the same function on other kernels. What
counts as right is what the baseline says (to three problems of five), so that a random model has an accuracy to lose.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eval.client import Server, sample
from eval.config import ServingConfig
from eval.lm_tasks import write_task
from eval.serve import serve
from eval.source import KEY_VARIABLE
from pipeline.compare import compare
from pipeline.run import sign_off
from quant.config import QuantConfig
from quant.export import export
from quant.target import Target
from tests.machine import CODES, CUTS_OFF, INT4
from tests.tiny import tiny_folder, tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
LENGTH, ANSWER, PROBLEMS = 64, 4, 400
SERVING = ServingConfig()
# W4A8 rounds activations too, and other kernels cut products off: either turns one greedy answer in twenty of a random
# model into another, 5.3 and 5 points of 60
MARGIN = 0.06 if INT4 == "int4-g128" and not CUTS_OFF else 0.1
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bf16` and `quantized`, of one function; `quantized` as our export wrote it."""
    folder = tmp_path_factory.mktemp("damage")
    model = tiny_model()
    target = Target.for_model(QuantConfig(target=INT4).spec(), model)
    weights = dict(model.named_parameters())
    tiny_folder(folder / "bf16")
    export(weights.items(), target, model_dir=folder / "bf16", out=folder / "quantized", source_step=0)
    with torch.no_grad():
        for name, value in target.deployed({name: w.detach() for name, w in weights.items()}).items():
            weights[name].copy_(value)
    model.save_pretrained(folder / "bf16")
    return folder


@pytest.fixture(scope="module")
def baseline(models: Path) -> Iterator[Server]:
    """The baseline, served once by someone else: the damaged candidates are compared with its URL."""
    with serve(models / "bf16", SERVING, max_model_len=LENGTH, log=models / "baseline.log") as server:
        yield server


@pytest.fixture(scope="module")
def suite(models: Path, baseline: Server) -> Path:
    """400 problems; the baseline's own greedy answer is the reference of three in five."""
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "bf16")
    prompts = [f"{7 * i + 13}+{i * i}=" for i in range(PROBLEMS)]
    said = sample(
        baseline, tokenizer(prompts).input_ids, max_tokens=ANSWER, temperature=0.0, seed=0, concurrency=64
    )  # fmt: skip
    texts = tokenizer.batch_decode([list(one.token_ids) for one in said], skip_special_tokens=True)
    rows = [
        {"id": str(i), "prompt": prompt, "answer": text if i % 5 < 3 else "no such answer"}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    data = models / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(
        models / "task", name="sums", data=data, grader="exact", completion_split=None, temperature=0.0,
        max_tokens=ANSWER,
    )  # fmt: skip
    path = models / "suite.toml"
    path.write_text(
        f'name = "damage"\nmax_model_len = {LENGTH}\nrepeat_baseline = false\n'
        f"[generation]\nmax_tokens = {ANSWER}\n[limits]\nmargin = {MARGIN}\ngap = 0.0001\n"
        'waive = ["tokenizer and template"]\n'  # an endpoint does not say its end tokens
        '[[task]]\nname = "sums"\nlm_eval = "sums"\ninclude = "task"\nchat = false\n'
    )
    return path


@pytest.fixture(scope="module")
def candidates(models: Path) -> dict[str, Path]:
    """The export as it is; and a copy without its manifest, as a stranger's would be, with two faults."""
    damaged = models / "damaged"
    shutil.copytree(models / "quantized", damaged)
    (damaged / "manifest.json").unlink()
    random = torch.Generator().manual_seed(0)
    low, high = (-(2**31), 2**31) if CODES == "weight_packed" else (-8, 8)  # eight codes in an integer, or one
    changed(
        damaged, f"model.layers.0.mlp.down_proj.{CODES}",
        lambda codes: torch.randint(low, high, codes.shape, generator=random).to(codes.dtype),
    )  # fmt: skip
    words = damaged / "chat_template.jinja"
    words.write_text("Be brief. " + words.read_text())
    return {"equal": models / "quantized", "damaged": damaged}


@pytest.fixture(scope="module")
def verdicts(
    models: Path, candidates: dict[str, Path], suite: Path, baseline: Server
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Exit code and signoff.json of each candidate, by the real command; all at once, a server's start is serial."""
    env = os.environ | {KEY_VARIABLE: baseline.api_key}
    running = {}
    for name, folder in candidates.items():
        command = [
            sys.executable, "-c", "from pipeline.cli import main; main()", "signoff", "--target", INT4,
            "--baseline", f"{baseline.base_url}#{baseline.model}", "--candidate", str(folder),
            "--suite", str(suite), "--set", f"repeat_baseline={str(name == 'equal').lower()}",
            "--out", str(models / f"signoff-{name}"),
        ]  # fmt: skip
        running[name] = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = {}
    for name, process in running.items():
        output = process.communicate()[0].decode()
        path = models / f"signoff-{name}" / "signoff.json"
        assert path.is_file(), output
        assert baseline.api_key not in output
        found[name] = process.returncode, json.loads(path.read_text())
    return found


def judged(candidate: Path, against: Path, suite: Path) -> tuple[int, dict[str, Any]]:
    """The exit code and signoff.json, of a candidate that is refused before anything is served."""
    out = candidate.with_name(f"signoff-{candidate.name}")
    code = compare(str(against), str(candidate), str(suite), INT4, (), 0, out)
    return code, json.loads((out / "signoff.json").read_text())


def failed(signoff: dict[str, Any]) -> dict[str, str]:
    """The failed checks' reasons."""
    return {check["name"]: check["why"] for check in signoff["checks"] if check["state"] == "fail"}


def changed(folder: Path, name: str, change: Any) -> None:
    """Rewrite one tensor of a candidate."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_candidate_equal_to_the_baseline_is_approved(models: Path, verdicts: dict[str, Any]) -> None:
    """The same function, INT4 kernels against BF16 ones: every check passes but the one that an endpoint leaves
    unmeasured, which was waived; the engine's own noise is shown. Of the same answers, the first 30 problems with a
    margin of 2 points are too small to judge."""
    code, signoff = verdicts["equal"]
    assert code == 0, failed(signoff) or signoff["why"]
    assert [check["name"] for check in signoff["checks"] if check["state"] != "pass"] == ["tokenizer and template"]
    assert signoff["waived"] == ["tokenizer and template"]
    assert signoff["tasks"][0]["noise"]["n"] == PROBLEMS
    scheme = {"int4-g128": "CompressedTensorsWNA16", "w4a8": "CompressedTensorsW4A8Int"}[INT4]
    assert scheme in next(c["why"] for c in signoff["checks"] if c["name"] == "quantized kernels")
    out = models / "signoff-equal"
    for name in ("summary.md", "report.html"):
        assert "approved" in (out / name).read_text().lower()

    small = models / "signoff-30"
    shutil.copytree(out, small)
    request = json.loads((small / "evaluate/request.json").read_text())
    request["suite"]["limits"]["margin"] = 0.02
    (small / "evaluate/request.json").write_text(json.dumps(request))
    for path in (small / "evaluate/tasks/sums").glob("samples_*.jsonl"):
        rows = path.read_text().splitlines(keepends=True)[:30]
        path.write_text("".join(rows))
        result = path.with_name(path.name.removeprefix("samples_").replace("jsonl", "json"))
        accuracy = sum(json.loads(row)["scores"][0] for row in rows) / 30
        result.write_text(json.dumps(json.loads(result.read_text()) | {"n": 30, "accuracy": accuracy}))
    assert sign_off(small) == 2
    signoff = json.loads((small / "signoff.json").read_text())
    assert signoff["verdict"] == "could not judge"
    assert "too small to judge" in signoff["checks"][0]["why"]


def test_noise_and_another_template_are_refused_each_for_its_own_reason(verdicts: dict[str, Any]) -> None:
    """Other codes in one projection: accuracy and discrepancy say so. Two words more in the chat template: no answer of
    this suite changes, because it asks in plain text, but the template is named. Files and kernels are in order."""
    code, signoff = verdicts["damaged"]
    assert code == 1
    reasons = failed(signoff)
    assert {"served accuracy", "discrepancy", "tokenizer and template"} <= reasons.keys()
    assert not {"artifact integrity", "quantized kernels"} & reasons.keys()
    assert "chat template renders probe" in reasons["tokenizer and template"]


def test_a_wrong_scale_is_refused_unserved(models: Path, suite: Path) -> None:
    """Four times the scale of one projection: a digest that is not the manifest's."""
    folder = models / "scale"
    shutil.copytree(models / "quantized", folder)
    changed(folder, "model.layers.1.self_attn.v_proj.weight_scale", lambda values: 4 * values)
    code, signoff = judged(folder, models / "bf16", suite)
    assert code == 1
    assert list(failed(signoff)) == ["artifact integrity"]
    assert "model.safetensors" in failed(signoff)["artifact integrity"]


def test_a_shorter_context_is_refused_unserved(models: Path, suite: Path) -> None:
    folder = models / "short"
    shutil.copytree(models / "quantized", folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LENGTH // 2}))
    code, signoff = judged(folder, models / "bf16", suite)
    assert code == 1
    assert list(failed(signoff)) == ["tokenizer and template"]
    assert "context is shorter: 32 tokens against" in failed(signoff)["tokenizer and template"]


def test_bf16_under_the_candidates_name_is_refused_unserved(models: Path, suite: Path) -> None:
    """It is as accurate as it can be, and is not what is to be deployed."""
    folder = models / "really-bf16"
    shutil.copytree(models / "bf16", folder)
    code, signoff = judged(folder, models / "bf16", suite)
    assert code == 1
    assert list(failed(signoff)) == ["quantized kernels"]
    assert "served in BF16, not as " + INT4 in failed(signoff)["quantized kernels"]
