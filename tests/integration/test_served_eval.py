"""A real `vllm serve`, sampled from and evaluated over HTTP, against transformers and against lm-eval by hand."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.config import EvalConfig
from eval.harness import EvalResult, Sample, evaluate, load_samples, write_task
from eval.serve import ServeError, Server, sample, serve_all
from tests.eval.test_serve import gone
from tests.tiny import tiny_folder

pytestmark = pytest.mark.engine
LENGTH = 64
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return tiny_folder(folder / "model")


@pytest.fixture(scope="module")
def server(folder: Path, model: Path) -> Iterator[Server]:
    with serve_all({"tiny": model}, EvalConfig(), max_model_len=LENGTH, log_dir=folder) as servers:
        yield servers["tiny"]
    assert gone(servers["tiny"].pid), "a process of the server's group outlived it"


def prompts() -> list[str]:
    """Arithmetic in every length, with white space at either end of some."""
    rng = random.Random(0)
    sums = [f"{rng.randrange(10 ** rng.randint(1, 9))}+{rng.randrange(1000)}=" for _ in range(38)]
    return [*sums, " 1+1= \n", "\n2+2=\n\n"]


def test_sampled_logprobs_are_those_of_transformers(server: Server, model: Path) -> None:
    """Mean absolute difference at most 0.03 nats after temperature, end-of-sequence tokens included."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompts()).input_ids
    # enough tokens at this vocabulary that some completions end by themselves
    settings: dict[str, Any] = {"max_tokens": 48, "temperature": TEMPERATURE, "concurrency": 16}
    completions = sample(server, ids, seed=3, **settings)
    assert [list(completion.prompt_ids) for completion in completions] == ids
    assert sample(server, ids[5:7], seed=8, **settings) == completions[5:7], "seed + index decides a completion"

    ended = [completion for completion in completions if completion.finish_reason == "stop"]
    assert 0 < len(ended) < len(completions)
    assert all(completion.token_ids[-1] == tokenizer.eos_token_id for completion in ended)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    differences = []
    for completion in completions:
        sequence = torch.tensor([completion.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logits = reference(sequence).logits[0, len(completion.prompt_ids) - 1 : -1].float() / TEMPERATURE
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        differences.append((torch.tensor(completion.logprobs) - expected).abs())
    assert torch.cat(differences).mean() < 0.03


def test_only_the_key_opens_it_and_nobody_sees_the_key(server: Server, folder: Path) -> None:
    """A wrong key gets 401; the key is on no command line and in no log."""
    wrong = {"Authorization": "Bearer wrong"}
    assert httpx.get(f"{server.base_url}/models", headers=wrong, trust_env=False).status_code == 401
    with pytest.raises(ServeError, match="HTTP 401"):
        sample(replace(server, api_key="wrong"), [[5]], max_tokens=1, temperature=1.0, seed=0, concurrency=1)
    assert server.api_key not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert server.api_key not in (folder / "server_tiny.log").read_text()
    assert server.base_url.startswith("http://127.0.0.1:")


def test_a_prompt_too_long_is_refused_not_cut(server: Server) -> None:
    """The server says so, and the error carries its words."""
    with pytest.raises(ServeError, match=r"prompt 1: HTTP 400.*maximum context length is 64"):
        sample(server, [[5], [5] * 65], max_tokens=1, temperature=1.0, seed=0, concurrency=2)


def measure(server: Server, model: Path, folder: Path, answers: list[str]) -> tuple[EvalResult, list[Sample]]:
    data, task_dir = folder / "heldout.jsonl", folder / "task"
    rows = [{"id": f"q{i}", "prompt": p, "answer": a} for i, (p, a) in enumerate(zip(prompts(), answers, strict=True))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(
        task_dir, name="heldout", data=data, grader="exact", completion_split=None, temperature=0.0, max_tokens=12
    )
    result = evaluate(
        server, model=model, tokenizer=model, task_dir=task_dir, task="heldout", out=folder, label="tiny",
        limit=None, concurrency=16, max_model_len=LENGTH,
    )  # fmt: skip
    return result, load_samples(folder / result.samples)


def test_accuracy_over_http_is_what_lm_eval_by_hand_gives(server: Server, model: Path, folder: Path) -> None:
    """Greedy: a quarter of the answers is right by construction; every in-process response is the same string."""
    result, first = measure(server, model, folder, ["2024-01-01"] * len(prompts()))
    assert (result.accuracy, result.n) == (0.0, 40)
    assert [row.prompt for row in first] == prompts()

    answers = [row.response.strip() if i % 4 == 0 else "2024-01-01" for i, row in enumerate(first)]
    result, samples = measure(server, model, folder, answers)
    assert result.accuracy == 0.25
    assert result.stderr == pytest.approx((0.25 * 0.75 / 39) ** 0.5)
    assert [row.score for row in samples] == [float(i % 4 == 0) for i in range(40)]
    assert [row.response for row in samples] == [row.response for row in first]
    assert json.loads((folder / "tiny.json").read_text())["by_hand"] == result.by_hand

    binaries = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as eval.serve does, for the same reason
    command = f"{result.by_hand} --output_path {folder}/by_hand --log_samples"
    done = subprocess.run(command, shell=True, cwd="/", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (logged,) = (folder / "by_hand").rglob("samples_heldout_*.jsonl")
    by_hand = {row["doc"]["id"]: row for row in map(json.loads, logged.read_text().splitlines())}
    assert [by_hand[row.id]["resps"][0][0] for row in samples] == [row.response for row in samples]
    assert [by_hand[row.id]["exact_match"] for row in samples] == [row.score for row in samples]
