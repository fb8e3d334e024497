"""A loss or gradient that is not finite stops the step before the optimizer, and leaves what it was about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import WORDS, tiny_model
from train.checkpoint import save_checkpoint
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.exact_engine import ExactEngine
from train.grading import in_process
from train.policy import NonFiniteError, Policy
from train.records import Problem, TokenBatch
from train.tasks import Task
from train.timing import Stopwatch
from train.trainer import Trainer, initial_state
from train.warmstart import character_tokenizer

CONFIG = TrainConfig(
    task=TaskConfig(source="jsonl", name="x"),
    rollout=RolloutConfig(engine="exact", target=False, prompts=2, group_size=2, max_tokens=8, max_model_len=32),
    constraint=ConstraintConfig(form="none"),
    steps=3,
    lr=1e-3,
    microbatch_tokens=128,
)


def trainer(faults: Path | None) -> Trainer:
    """A real trainer on the exact engine; completions earn by their length, which random weights vary."""
    problems = tuple(Problem(f"p{i}", f"{i}+{i}=", str(2 * i), {}) for i in range(4))
    task = Task(problems, problems[:1], in_process(lambda problem, text: float(len(text) % 3)))
    tokenizer = character_tokenizer([WORDS])
    policy = Policy(tiny_model(), CONFIG)
    engine = ExactEngine(policy, [tokenizer.eos_token_id])
    return Trainer(
        CONFIG, policy=policy, engine=engine, target=None, task=task, tokenizer=tokenizer, seed=0,
        state=initial_state(CONFIG), faults=faults,
    )  # fmt: skip


def plant(policy: Policy, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss NaN, or the backward pass alone."""
    computed = policy.logprobs

    def spoiled(batch: TokenBatch, rows: Sequence[int]) -> Tensor:
        logprobs = computed(batch, rows)
        if not logprobs.requires_grad:
            return logprobs
        if what == "loss":
            return logprobs * torch.nan
        logprobs.register_hook(lambda gradient: gradient * torch.nan)
        return logprobs

    monkeypatch.setattr(policy, "logprobs", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_step_stops_before_the_optimizer_and_leaves_its_batch(tmp_path, monkeypatch, what) -> None:
    """Step 2 is planted with a NaN, in the loss or in the backward pass alone: masters, moments and the loop's state
    are those after step 1, to the bit; the folder holds the step's tokens, log-probs, rewards and advantages, and the
    message says where it is, and for a gradient in how many weights."""
    run = trainer(tmp_path)
    run.step()
    save_checkpoint(tmp_path, run.policy, run.state)
    state, held = run.state, {name: master.detach().clone() for name, master in run.policy.masters.items()}
    plant(run.policy, what, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"the batch and the loop's state are in .*nonfinite-000001") as caught:
        run.step()
    assert ("loss is nan in step 1" if what == "loss" else "gradient norm is nan, not finite in ") in str(caught.value)
    assert run.state is state
    assert all(torch.equal(master, held[name]) for name, master in run.policy.masters.items())
    folder = tmp_path / "nonfinite-000001"
    record, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "batch.safetensors")
    assert record["step"] == record["state"]["step"] == 1
    assert record["weights"].startswith("checkpoint-000001 ")
    assert tensors["rewards"].shape == (2, 2)
    lengths = [len(tensors[f"response/{row:05d}"]) for row in range(4)]
    assert tensors["mask"].sum(1).tolist() == lengths
    assert tensors["advantages"].shape == tensors["rollout_logprobs"].shape == tensors["old_logprobs"].shape
    monkeypatch.undo()
    again = trainer(None)  # the same seed comes to the same batch, and without the plant to a finite step
    again.step()
    again._sync(again.policy.weights(), {}, Stopwatch())
    drawn = again._experience(1)[0].batch
    assert [list(ids) for ids in drawn.responses] == [tensors[f"response/{row:05d}"].tolist() for row in range(4)]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch) -> None:
    """The error is the plain one."""
    run = trainer(None)
    plant(run.policy, "loss", monkeypatch)
    with pytest.raises(NonFiniteError) as caught:
        run.step()
    assert "are in" not in str(caught.value)
