"""A rank quantizes its own rows: the same bits as the whole weights, on every rank, and in one piece where asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.sharded import CASES

ROOT = Path(__file__).parent.parent.parent
RANKS = 3
ALONE = {  # whether a rank quantizes its share alone, over all quantized weights
    "rows": [True],
    "channels": [True],
    "blocks inside shards": [True],
    "blocks across shards": [False],
    "one scale for all": [False],
    "experts": [True],
    "experts of two kinds": [False, True],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    done = subprocess.run(
        [*torchrun, "-m", "tests.train.sharded", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_shards_quantize_to_the_bits_of_the_whole(ranks, case) -> None:
    """Q(W) and the blend, of uneven shares, of blocks and of stacked experts: equal bit for bit, and still in shards;
    what has a scale over more rows than a shard is gathered, and nothing else is."""
    for rank in ranks:
        found = rank[case]
        assert found["names"]
        assert found["sharded"]
        assert found["alone"] == ALONE[case]
        assert found["deployed"]
        assert found["blended"]


@pytest.mark.parametrize("case", CASES)
def test_the_first_rank_alone_gets_the_whole(ranks, case) -> None:
    """Every weight, in its bits; the others hold nothing."""
    assert all(rank[case]["gathered"] for rank in ranks)
    assert ranks[0][case]["count"] > 10
    assert [rank[case]["count"] for rank in ranks[1:]] == [0] * (RANKS - 1)


def test_a_rank_without_a_row(ranks) -> None:
    """Four experts on three ranks leave one without any, so the cases above cover it."""
    assert ranks[-1]["experts"]["empty"]
