"""A real `vllm serve`, sampled from and evaluated over HTTP, against transformers and against lm-eval by hand."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.client import ServeError, Server, sample
from eval.config import EvalConfig
from eval.harness import evaluate_task, load_samples
from eval.lm_tasks import write_task
from eval.records import EvalResult, Sample
from eval.serve import serve_all
from eval.suite import Generation, SuiteTask
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


def measure(
    server: Server, model: Path, folder: Path, task: SuiteTask, generation: Generation
) -> tuple[EvalResult, list[Sample]]:
    result = evaluate_task(
        server, task, generation, label="tiny", model=str(model), tokenizer=model, out=folder, concurrency=16,
        max_model_len=LENGTH, seed=0,
    )  # fmt: skip
    return result, load_samples(folder / result.samples)


def by_hand(command: str, out: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval logs when the command is run from anywhere, in the problems' order."""
    binaries = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # as eval.serve does, for the same reason
    done = subprocess.run(
        f"{command} --output_path {out} --log_samples", shell=True, cwd="/", env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (logged,) = out.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, logged.read_text().splitlines()), key=lambda row: row["doc_id"])


def heldout(folder: Path, answers: list[str]) -> SuiteTask:
    data = folder / "heldout.jsonl"
    rows = [{"id": f"q{i}", "prompt": p, "answer": a} for i, (p, a) in enumerate(zip(prompts(), answers, strict=True))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(
        folder / "task", name="heldout", data=data, grader="exact", completion_split=None, temperature=0.0,
        max_tokens=12,
    )  # fmt: skip
    return SuiteTask(name="heldout", lm_eval="heldout", include=str(folder / "task"), chat=False)


def test_accuracy_over_http_is_what_lm_eval_by_hand_gives(server: Server, model: Path, folder: Path) -> None:
    """Greedy: a quarter of the answers is right by construction; every in-process response is the same string."""
    greedy = Generation(temperature=0.0, max_tokens=12)
    wrong = ["2024-01-01"] * len(prompts())
    result, first = measure(server, model, folder, heldout(folder, wrong), greedy)
    assert (result.accuracy, result.n) == (0.0, 40)
    assert [row.prompt for row in first] == prompts()

    answers = [row.responses[0].strip() if i % 4 == 0 else "2024-01-01" for i, row in enumerate(first)]
    result, samples = measure(server, model, folder, heldout(folder, answers), greedy)
    assert result.accuracy == 0.25
    assert result.stderr == pytest.approx((0.25 * 0.75 / 39) ** 0.5)
    assert [row.scores for row in samples] == [(float(i % 4 == 0),) for i in range(40)]
    assert [row.responses for row in samples] == [row.responses for row in first]
    assert json.loads((folder / "tiny.json").read_text())["by_hand"] == result.by_hand

    logged = by_hand(result.by_hand, folder / "by_hand", "heldout")
    assert [(row["resps"][0][0],) for row in logged] == [row.responses for row in samples]
    assert [(row["exact_match"],) for row in logged] == [row.scores for row in samples]


@pytest.mark.parametrize("chat", [False, True])
def test_repeats_are_different_answers_with_known_ends(server: Server, model: Path, folder: Path, chat: bool) -> None:
    """k = 4 at T = 0.7: four different answers to nearly every problem, and the same four the next time; the tokens are
    those of the tokenizer, plus the end-of-sequence token exactly where the model ended the answer."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": f"{2 * i}"}) + "\n" for i in range(20)))
    (folder / "sums").mkdir(exist_ok=True)
    (folder / "sums" / "sums.yaml").write_text(
        "task: sums\ndataset_path: nobody/has-this\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: prompt\ndoc_to_target: "{{answer}}"\ngeneration_kwargs: {until: []}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    task = SuiteTask(name="sums", lm_eval="sums", include=str(folder / "sums"), data=str(rows), repeats=4, chat=chat)
    generation = Generation(temperature=0.7, max_tokens=30)
    out = folder / f"chat_{chat}"
    result, samples = measure(server, model, out, task, generation)
    again = measure(server, model, out, task, generation)[1]
    assert [row.responses for row in again] == [row.responses for row in samples]
    assert sum(len(set(row.responses)) == 4 for row in samples) >= 18

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ends = [end for row in samples for end in row.ends]
    assert set(ends) == {"stop", "length"}
    for row in samples:
        for text, end, count in zip(row.responses, row.ends, row.tokens, strict=True):
            assert count is not None
            # special tokens that were sampled are not in the text
            assert len(tokenizer(text, add_special_tokens=False).input_ids) + (end == "stop") <= count <= 30
            assert count == 30 or end == "stop"
    assert result.response_tokens == sum(count for row in samples for count in row.tokens if count)
    assert (result.n, result.repeats, result.chat) == (20, 4, chat)
    if chat:
        assert json.loads(samples[3].prompt) == [{"role": "user", "content": "3+3="}]


def test_multiple_choice_is_what_transformers_says(server: Server, model: Path, folder: Path) -> None:
    """From a local file: the likeliest of three continuations is transformers' argmax wherever its lead is clear, and
    it scores 1 exactly where it is the answer."""
    rng = random.Random(1)
    rows = [
        {"question": f"{i}+1=", "choices": [f"{rng.randrange(100)}" for _ in range(3)], "answer": rng.randrange(3)}
        for i in range(24)
    ]
    task_dir = folder / "choice"
    task_dir.mkdir()
    (task_dir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task_dir / "choice.yaml").write_text(
        f"task: choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {task_dir / 'rows.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ntarget_delimiter: ""\n'
        'doc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    task = SuiteTask(name="choice", lm_eval="choice", include=str(task_dir), chat=False)
    result, samples = measure(server, model, folder / "choice_out", task, Generation())
    assert (result.n, result.response_tokens, samples[0].ends, samples[0].tokens) == (24, None, (None,), (None,))
    assert [row.answer for row in samples] == [row["choices"][row["answer"]] for row in rows]
    assert [row.scores for row in samples] == [(float(row.responses[0] == row.answer),) for row in samples]

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    clear = 0
    for row, sample_ in zip(rows, samples, strict=True):
        likelihoods = []
        for choice in row["choices"]:
            ids, start = tokenizer(row["question"] + choice).input_ids, len(tokenizer(row["question"]).input_ids)
            with torch.no_grad():
                logprobs = reference(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            likelihoods.append(float(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum()))
        best = sorted(likelihoods)
        if best[-1] - best[-2] > 0.1:
            clear += 1
            assert sample_.responses == (row["choices"][likelihoods.index(best[-1])],)
    assert clear >= 12


def test_a_server_that_is_killed_ends_the_sampling(server: Server) -> None:
    """SIGKILL of the API server while 64 long answers are under way: one error within seconds that names the address.
    The last test of this server."""
    asked = [[5 + i % 7] for i in range(64)]

    def ask_until_it_is_gone() -> None:
        while True:
            sample(server, asked, max_tokens=LENGTH - 2, temperature=1.0, seed=0, concurrency=4)

    def kill() -> None:
        time.sleep(0.3)
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    started = time.monotonic()
    with pytest.raises(ServeError, match=rf"prompt \d+: no answer from {server.base_url}/completions"):
        ask_until_it_is_gone()
    killer.join()
    assert time.monotonic() - started < 60
