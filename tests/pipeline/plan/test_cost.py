"""Time and traffic against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.plan.cost import Assumptions, decode_seconds, experts_read, forward_flops, fsdp_traffic
from pipeline.plan.plan import Model, Plan, make_plan, model_of
from pipeline.plan.shape import Shape, meta_model, shape_of
from quant.gpus import known_gpu

ROOT = Path(__file__).parent.parent.parent.parent
MODELS = ROOT / "configs" / "recipes" / "models"


def shape(name: str) -> Shape:
    config = load_config(ROOT / "configs" / "gsm8k-int4.toml")
    return shape_of(*meta_model(config, MODELS / f"{name}.json"))


def planned(recipe: str, model: str, *overrides: str, gpu: str = "h200", **assumed: Any) -> Plan:
    config = load_config(ROOT / "configs" / "recipes" / f"{recipe}.toml", overrides)
    return make_plan(config, bound(recipe, model), known_gpu(gpu), Assumptions(**assumed))


def bound(recipe: str, model: str) -> Model:
    config = load_config(ROOT / "configs" / "recipes" / f"{recipe}.toml")
    source, module = meta_model(config, MODELS / f"{model}.json")
    return model_of(config, shape_of(source, module), module)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3-0.6b", 596_049_920, 596_049_920),
        ("qwen3-1.7b", 1_720_574_976, 1_720_574_976),
        ("qwen3-8b", 8_190_735_360, 8_190_735_360 - 151_936 * 4096),
        ("qwen3-30b-a3b", 30_532_122_624,
         30_532_122_624 - 151_936 * 2048 - 120 * 48 * 3 * 2048 * 768),
    ],
)  # fmt: skip
def test_shapes_have_the_published_parameters(name, total, active) -> None:
    """The shipped shapes make models of the sizes that their makers publish (0.6B, 1.7B, 8.2B, 30.5B); active leaves
    out an untied embedding's look-up and the 120 of 128 experts that a token does not meet."""
    made = shape(name)
    assert (made.total, round(made.active)) == (total, active)


def test_forward_flops_by_hand() -> None:
    """Qwen3-8B, 10 tokens at length 1,000: 2 x 7.568 billion, and per layer 2 x 4,096 x 1,000 for attention."""
    made = shape("qwen3-8b")
    assert forward_flops(made, 10, 1000) == 10 * (2 * 7_568_405_504 + 36 * 2 * 4096 * 1000)


def test_decode_is_bound_by_what_is_slower() -> None:
    """100 steps of 4 sequences: 10 bytes of weights and 5 of cache each at 10 bytes a second are 300 s; with 4 x 20
    FLOPs at 10 a second it is 800 s."""
    rates: dict[str, float] = {
        "steps": 100,
        "batch": 4,
        "weight_bytes": 10,
        "kv_bytes": 5,
        "bytes_per_s": 10,
        "flops_per_s": 10,
    }
    assert decode_seconds(flops=1, **rates) == 300
    assert decode_seconds(flops=20, **rates) == 800


def test_experts_read_grows_to_all_of_them() -> None:
    """One token reads k of E; two read 1 - (1 - k/E)^2; a large batch all; a dense model always everything."""
    assert experts_read(128, 8, 1) == 8 / 128
    assert experts_read(4, 1, 2) == 1 - (3 / 4) ** 2
    assert experts_read(128, 8, 10_000) == pytest.approx(1)
    assert experts_read(0, 0, 1) == 1


def test_traffic_by_hand() -> None:
    """1,000 parameters on 4 ranks, three quarters pass through each: two trained micro-batches of 8 bytes a parameter,
    five scored and one gathered W of 2; alone, nothing is sent."""
    sent = fsdp_traffic(1000, 4, trained=2, scored=5, gathers=1)
    assert (sent.training, sent.scoring, sent.weights) == (12_000, 7_500, 1_500)
    assert fsdp_traffic(1000, 1, trained=2, scored=5, gathers=1).total == 0


def test_a_plan_follows_its_config() -> None:
    """Twice the assumed rates halve the times; the reference policy adds a pass; running ahead hides the shorter of
    rollout and training; a mini-batch more scores half of the tokens before the update."""
    plain = planned("qwen3-8b-fp8", "qwen3-8b")
    fast = planned("qwen3-8b-fp8", "qwen3-8b", mfu=0.7, bandwidth_share=1.2)
    assert fast.times.training == pytest.approx(plain.times.training / 2)
    assert fast.times.decode == pytest.approx(plain.times.decode / 2)
    assert plain.times.scoring == 0
    forward = plain.times.training / 4  # forward, again with checkpointing, and a backward of two
    alone = "train.distributed.processes=1"  # over ranks there is no reference policy
    reference = planned("qwen3-8b-fp8", "qwen3-8b", alone, "train.loss.reference_kl=0.01")
    assert reference.times.scoring == pytest.approx(planned("qwen3-8b-fp8", "qwen3-8b", alone).times.training / 4)
    halves = planned("qwen3-8b-fp8", "qwen3-8b", "train.minibatches=2")
    assert halves.times.scoring == pytest.approx(forward / 2)
    ahead = planned("qwen3-8b-fp8", "qwen3-8b", "train.rollout.ahead=true")
    made, learned = plain.times.prefill + plain.times.decode, plain.times.training + plain.times.traffic
    assert ahead.times.total == pytest.approx(plain.times.sync + max(made, learned))
    assert plain.tokens.tokens == 512 * (256 + 8192)


def test_lora_learns_its_adapters_alone() -> None:
    """Rank 16 on every linear layer of Qwen3-0.6B but the head: 16 (in + out) parameters each, 10.09 million in all,
    have masters and moments; the base is held once more, frozen."""
    path = ROOT / "configs" / "recipes" / "qwen3-0.6b-int4.toml"
    config = load_config(path, ("train.lora.rank=16",))
    source, module = meta_model(config, MODELS / "qwen3-0.6b.json")
    model = model_of(config, shape_of(source, module), module)
    layer = 2 * (1024 + 2048) + 2 * (1024 + 1024) + 3 * (1024 + 3072)  # q and o, k and v, gate, up and down
    parts = {p.name: p for p in make_plan(config, model, known_gpu("h100"), Assumptions()).trainer}
    assert parts["masters, FP32"].sync == 4 * 16 * 28 * layer
    assert parts["frozen base, BF16"].sync == 2 * model.shape.total


def test_a_small_card_is_a_small_card() -> None:
    """The same plan on a card of a quarter of the memory does not fit, and asks for no less."""
    large = planned("qwen3-8b-fp8", "qwen3-8b")
    config = load_config(ROOT / "configs" / "recipes" / "qwen3-8b-fp8.toml")
    quarter = replace(known_gpu("h200"), memory_gib=known_gpu("h200").memory_gib / 4)
    small = make_plan(config, bound("qwen3-8b-fp8", "qwen3-8b"), quarter, Assumptions())
    assert large.fits
    assert not small.fits
    assert math.isclose(small.trainer_peak, large.trainer_peak)
