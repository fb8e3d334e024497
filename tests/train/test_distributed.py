"""Two ranks train the policy that one process trains: same batches, same losses, same weights, same checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import tiny_model
from tests.train.recorded import CASES, STEPS, digest, made
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.config import TrainConfig
from train.distributed import World
from train.microbatches import alike, dealt

ROOT = Path(__file__).parent.parent.parent


class TwoRanks:
    """What one process and two ranks came to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        # one thread each, because sums are split by threads; the one process apart from this one, in which other tests
        # may have changed how torch computes
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        for start in ([sys.executable], torchrun):
            done = subprocess.run(
                [*start, "-m", "tests.train.recorded", str(folder)],
                cwd=ROOT, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        alone = json.loads((folder / "by-one.json").read_text())
        self.alone: dict[str, list[dict[str, Any]]] = alone["rows"]
        self.digest: str = alone["digest"]
        self.ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> TwoRanks:
    return TwoRanks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one_process(both, case) -> None:
    """Ten optimizer steps (twenty where a share is empty), with the quantizer in the forward pass, a pull through it,
    a multiplier per block and a tolerance that the first step measures, or replayed routing: every metric of every
    step is the single process's to 1e-5 of its size, and on both ranks the same bits. Forwards are of single rows, so
    the order of sums in FP32 is all that differs."""
    first, second = (rank[case]["rows"] for rank in both.ranks)
    assert first == second
    for row, alone in zip(first, both.alone[case], strict=True):
        assert row.keys() == alone.keys()
        for name, value in alone.items():
            assert row[name] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), name
    # what is made before any update, and of all rows at once, is not close but equal
    for name in ("reward", "reward_std", "discrepancy", "tokens"):
        assert first[0][name] == both.alone[case][0][name], name


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_sharded(both, case) -> None:
    """Parameters and masters are DTensors, and a rank holds half of the numbers."""
    for rank in both.ranks:
        assert rank[case]["sharded"]
        assert rank[case]["share"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_same(both, case) -> None:
    """After all steps, of 300,000 BF16 weights and more at most ten were rounded to the other neighbour; INT4 codes are
    equal in every row of weights that is."""
    ranks, alone = (load_file(both.folder / f"{case}{end}.safetensors") for end in ("", "-by-one"))
    assert ranks.keys() == alone.keys()
    differ = sum(int((ranks[name] != tensor).sum()) for name, tensor in alone.items())
    assert differ <= 10
    assert sum(tensor.numel() for tensor in alone.values()) > 300_000
    assert all(torch.allclose(ranks[name].float(), t.float(), atol=1e-7, rtol=2**-7) for name, t in alone.items())
    if case == "mixture":
        return
    target = Target.for_model(TargetSpec.load("int4-g128"), tiny_model(**CASES[case][0]))
    one, two = target.deployed(alone), target.deployed(ranks)
    assert one
    for name, values in one.items():
        same = (alone[name] == ranks[name]).all(1)
        assert same.any()
        assert torch.equal(values[same], two[name][same]), name


def test_a_checkpoint_of_two_ranks_is_one_of_one_process(both) -> None:
    """Written by two and read by one, and the reverse: masters and moments are the same bits, and the files have the
    same names and tensors."""
    again = made("tied", World())
    latest = latest_checkpoint(both.folder / "by-two")
    assert latest is not None
    state = load_checkpoint(latest, again.policy)
    assert state.step == STEPS
    assert [digest(again.policy)] * 2 == [rank["by two"] for rank in both.ranks]
    assert [both.digest] * 2 == [rank["by one"] for rank in both.ranks]
    other = latest_checkpoint(both.folder / "by-one")
    assert other is not None
    for file in ("masters.safetensors", "optimizer.safetensors"):
        one, two = load_file(other / file), load_file(latest / file)
        assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in two.items()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_on_one_rank_stops_both(both, what) -> None:
    """NaN on the second rank: both raise, in the same words, and no master or moment of either has changed."""
    first, second = (rank["planted"][what] for rank in both.ranks)
    assert first == second
    assert first["untouched"]
    assert ("loss is nan in step 1" if what == "loss" else "gradient norm is nan, not finite in") in first["message"]


LENGTHS = [3, 9, 4, 4, 7, 2, 8, 8, 1, 5, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("budget", [1, 10, 16, 1000])
def test_every_rank_gets_as_many_micro_batches(size, budget) -> None:
    """Each row is in one micro-batch of one rank, none over the budget but a single row, and empty ones are there only
    where no micro-batch was left to halve."""
    runs = list(alike(range(len(LENGTHS)), LENGTHS, budget))
    shares = [dealt(runs, LENGTHS, rank=rank, size=size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    parts = [part for share in shares for part in share]
    assert sorted(row for part in parts for row in part) == list(range(len(LENGTHS)))
    assert all(len(part) * max(LENGTHS[row] for row in part) <= budget for part in parts if len(part) > 1)
    if not all(parts):
        assert max(map(len, parts)) == 1
    if size == 1:
        assert shares == [runs]


def test_rounds_are_alike_and_no_rank_always_has_the_largest() -> None:
    """Single rows of 1 to 8 tokens on two ranks: neighbours meet in a round, and each rank gets 18 of 36 tokens."""
    lengths = [8, 1, 7, 2, 6, 3, 5, 4]
    runs = list(alike(range(8), lengths, 1))
    shares = [[lengths[row] for [row] in dealt(runs, lengths, rank=rank, size=2)] for rank in range(2)]
    assert shares == [[1, 4, 5, 8], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": {}}, "lora works in one process only"),
        ({"advantage": "gae", "normalize_std": False}, "advantage 'gae' works in one process only"),
        ({"loss": {"reference_kl": 0.1}}, "loss.reference_kl works in one process only"),
        ({"distributed": {"cpu_offload": True}}, "distributed.cpu_offload needs more than one rank"),
    ],
)
def test_what_is_for_one_process_is_refused(changes, named) -> None:
    """Before torch is imported, with the field and what it got."""
    table: dict[str, Any] = {
        "task": {"source": "jsonl", "name": "x"},
        "rollout": {"max_tokens": 8, "max_model_len": 64},
        "steps": 1,
        "distributed": {"processes": 2},
    }
    with pytest.raises(ValueError, match=named):
        TrainConfig.model_validate(table | changes)
