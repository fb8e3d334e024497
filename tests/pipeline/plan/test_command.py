"""`boresight plan` and `check --device` as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError, load_config
from pipeline.plan.advice import advise, layout, rungs
from pipeline.plan.command import plan
from pipeline.plan.cost import Assumptions
from pipeline.plan.plan import Plan
from pipeline.preflight import preflight
from quant.gpus import UnknownGpuError, known_gpu
from tests.pipeline.test_cli import boresight

ROOT = Path(__file__).parent.parent.parent.parent
RECIPES = ROOT / "configs" / "recipes"
MODEL = RECIPES / "models" / "qwen3-0.6b.json"


def run(capsys: pytest.CaptureFixture[str], *overrides: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a plan of the 0.6B recipe."""
    settings: dict[str, Any] = {"gpu": known_gpu("h100"), "model_config": MODEL, "assumed": Assumptions()} | options
    code = plan(RECIPES / "qwen3-0.6b-int4.toml", overrides, json_out=True, **settings)
    return code, json.loads(capsys.readouterr().out)


def test_tables_are_readable_at_a_hundred_columns(tmp_path) -> None:
    """From a folder of one's own, no hub, no GPU: exit code 0, no line over 100 columns but the command to copy."""
    done = boresight(
        "plan", "configs/recipes/qwen3-0.6b-int4.toml", "--model-config", "configs/recipes/models/qwen3-0.6b.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fits: trainer" in done.stdout
    assert "assumed, not measured" in done.stdout
    assert done.stdout.splitlines()[-1] == "boresight run configs/recipes/qwen3-0.6b-int4.toml"
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 100


def test_a_plan_that_does_not_fit_says_what_would(capsys) -> None:
    """On a card of 20 GiB: exit code 1, and the printed `--set` lines, given back, make it 0; none of them can be left
    out."""
    small = known_gpu("h100").with_memory(20)
    code, out = run(capsys, gpu=small)
    assert (code, out["fits"]) == (1, False)
    changes = [line.removeprefix("--set ") for line in out["change"]]
    assert changes
    assert run(capsys, *changes, gpu=small)[0] == 0
    for left_out in changes:
        try:
            assert run(capsys, *(line for line in changes if line != left_out), gpu=small)[0] == 1
        except ConfigError as error:  # a shorter context needs both of its lengths
            assert "max_tokens" in str(error)  # noqa: PT017


def test_where_nothing_helps_it_says_so(capsys) -> None:
    """3.5 GiB hold neither trainer nor engine, whatever is changed: exit code 1 and no advice."""
    code, out = run(capsys, gpu=known_gpu("h100").with_memory(3.5))
    assert (code, out["change"]) == (1, None)


def test_more_gpus_are_more_ranks(capsys) -> None:
    """`--gpus 16` is two machines of eight trainer ranks, started by torchrun on each; the table goes from 1 to 64."""
    code, out = run(capsys, gpus=16)
    assert code == 0
    assert out["plan"]["ranks"] == 16
    assert [row["ranks"] for row in out["scaling"]] == [1, 2, 4, 8, 16, 32, 64]
    command = out["launch"][-1]
    assert command.startswith("python -m torch.distributed.run --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29400 ")
    assert command.endswith("--nnodes 2 --nproc_per_node 8 -m pipeline.rank runs/qwen3-0.6b-int4")
    masters = next(part for part in out["plan"]["trainer"] if part["name"] == "masters, FP32")
    assert masters["train"] == 4 * 596_049_920 / 16


def test_servers_gpus_are_not_the_trainers() -> None:
    """The 8B recipe has 4 servers: 8 GPUs leave 4 ranks, 4 leave none."""
    options: dict[str, Any] = {
        "gpu": known_gpu("h200"),
        "model_config": RECIPES / "models" / "qwen3-8b.json",
        "assumed": Assumptions(),
    }
    assert plan(RECIPES / "qwen3-8b-fp8.toml", (), gpus=8, **options) == 0
    with pytest.raises(ConfigError, match=r"--gpus: 4 leaves none for the trainer: train\.rollout\.servers takes 4"):
        plan(RECIPES / "qwen3-8b-fp8.toml", (), gpus=4, **options)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ((), {"model_config": Path("gone.json")}, "--model-config: no such file: gone.json"),
        ((), {"model_config": Path("broken.json")}, "--model-config: broken.json is no causal LM's config.json"),
        (("quant.target=fp8-dynamic",), {"gpu": known_gpu("a100-80")}, "needs a GPU of compute capability 8.9"),
        (("quant.target=fp8-static",), {}, "rollouts from fp8-static could not be verified"),
        (("model.path=./nowhere",), {"model_config": None}, "model.path: no such folder: ./nowhere"),
        ((), {"model_config": None}, "--model-config configs/recipes/models/qwen3-0.6b.json takes a local one"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, overrides, options, message) -> None:
    """One line; where the hub cannot be reached it names the shapes that are shipped."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(capsys, *overrides, **options)


def test_bad_input_is_exit_code_2(tmp_path) -> None:
    """Never 1: that means it does not fit."""
    done = boresight("plan", "configs/recipes/qwen3-0.6b-int4.toml", "--gpu", "h900", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no GPU 'h900' is known here; known: h200, h100" in done.stderr


def test_check_goes_by_the_named_device(tmp_path) -> None:
    """A laptop checks a GPU's recipe: accepted for an H100, refused for an A100, which has no kernel for it."""
    recipe = "configs/recipes/qwen3-8b-fp8.toml"
    done = boresight("check", recipe, "--device", "h100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H100 80 GB SXM (cuda)" in done.stdout
    assert "8.9 or newer" in boresight("check", recipe, "--device", "A100-80", cwd=tmp_path).stderr
    unknown = boresight("check", recipe, "--device", "tpu", cwd=tmp_path)
    assert (unknown.returncode, "no GPU 'tpu' is known here" in unknown.stderr) == (2, True)


def test_names_of_gpus_are_taken_in_any_case() -> None:
    """And an unknown one names those that are known."""
    assert known_gpu("RTX4090").capability == (8, 9)
    with pytest.raises(UnknownGpuError, match="a100-40"):
        known_gpu("a100")


def test_the_ladder_is_gentle_first() -> None:
    """Checkpointing, then micro-batches no smaller than a row, ranks, offload, the engine's share, the context."""
    config = load_config(
        RECIPES / "qwen3-0.6b-int4.toml", ("train.gradient_checkpointing=false", "train.microbatch_tokens=20480")
    )
    lines = [rung[0] for rung in rungs(config, 4)]
    order = ["gradient_checkpointing", "microbatch_tokens", "processes", "cpu_offload", "utilization", "max_tokens"]
    found = [next(i for i, name in enumerate(order) if re.search(name, line)) for line in lines]
    assert found == sorted(found)
    assert "train.microbatch_tokens=5120" in lines
    assert not any(line == "train.microbatch_tokens=2560" for line in lines)
    assert layout(2) == ("train.distributed.processes=2", "train.distributed.nodes=1")
    assert layout(32) == ("train.distributed.processes=8", "train.distributed.nodes=4")


def test_choices_that_cannot_work_together_are_passed_over() -> None:
    """A rung that the config refuses is no reason to stop, and none to give up."""

    def planned(lines: tuple[str, ...]) -> Plan:
        raise ConfigError("refused")

    assert advise(load_config(RECIPES / "qwen3-0.6b-int4.toml"), planned) is None


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_passes_check_and_plan(recipe, capsys) -> None:
    """On the machine it is meant for, of H200s: accepted without the hub, and the plan says that it fits, in rows for
    more ranks as far as its methods allow them."""
    gpu = known_gpu("h200")
    preflight(load_config(recipe), gpu.device)
    shape = RECIPES / "models" / f"{recipe.stem.removesuffix('-int4').removesuffix('-fp8')}.json"
    assert plan(recipe, (), gpu=gpu, model_config=shape, assumed=Assumptions(), json_out=True) == 0
    rows = json.loads(capsys.readouterr().out)["scaling"]
    assert len(rows) == 7


def test_a_mixture_whose_experts_cannot_be_read_back_is_refused_before_any_work(tmp_path) -> None:
    """On a GPU: FP8, INT8 and INT4 experts pass, and BF16 ones; experts with a scale per row in INT4, which the kernel
    that can be read has not, are refused in one line as soon as the model's config is here, unless they stay BF16."""
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text((RECIPES / "models" / "qwen3-30b-a3b.json").read_text())

    def check(*overrides: str) -> str:
        config = load_config(RECIPES / "qwen3-30b-a3b-fp8.toml", (f"model.path={tmp_path}", *overrides))
        return preflight(config, known_gpu("h200").device)[0].name

    for target in ("fp8-dynamic", "fp8-block", "int8", "int4-g128"):
        assert check(f"quant.target={target}") == target
    with pytest.raises(ConfigError, match=r"rollouts from int4-channel .* its kernel's experts cannot be read back"):
        check("quant.target=int4-channel")
    assert check("quant.target=int4-channel", 'quant.ignore=["re:.*experts.*"]') == "int4-channel"
    baseline = ("train.rollout.target=false", "train.constraint.form=none")
    assert check("quant.target=int4-channel", *baseline) == "int4-channel"
