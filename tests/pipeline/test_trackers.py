"""Trackers get the rows of metrics.jsonl; one that is not installed is refused before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import models, preflight
from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.run_dir import RunDir
from pipeline.trackers import live_curves
from tests.tiny import tiny_folder

DEMO = Path(__file__).parent.parent.parent / "configs" / "demo-int4.toml"


class FakeTracker:
    """Remembers what accelerate's trackers would send."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def start(self) -> None:
        self.calls.append(("start", None))

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


CPU = preflight.Device("cpu", "a CPU", (0, 0), frozenset({"avx512f"}))


def config(*overrides: str) -> RunConfig:
    return load_config(DEMO, ("signoff.baseline_arm=null", *overrides))


def test_a_tracker_gets_the_numbers_of_every_row(tmp_path) -> None:
    """By their names in metrics.jsonl and at their step; what was not measured is left out; closed after an error too.
    Without trackers nothing is made."""
    made: dict[str, FakeTracker] = {}

    def make(name: str, run: RunDir, given: RunConfig) -> FakeTracker:
        return made.setdefault(name, FakeTracker())

    def fail_in_a_step() -> None:
        with live_curves(run, config(), ("tensorboard", "wandb"), make) as curves:
            curves.log({"step": 3, "reward": 0.5, "codes_changed": None, "seconds/train": 1.5})
            raise RuntimeError("in a step")

    run = RunDir(tmp_path)
    with pytest.raises(RuntimeError, match="in a step"):
        fail_in_a_step()
    expected = [("start", None), ("log", (3, {"reward": 0.5, "seconds/train": 1.5})), ("finish", None)]
    assert {name: tracker.calls for name, tracker in made.items()} == {"tensorboard": expected, "wandb": expected}
    made.clear()
    with live_curves(run, config(), (), make) as curves:
        curves.log({"step": 0, "reward": 0.5})
    assert made == {}


def test_tensorboard_reads_back_what_was_logged(tmp_path) -> None:
    """The real one: two steps of two numbers, in the run directory, at their steps and with their values."""
    run = RunDir(tmp_path)
    with live_curves(run, config(), ("tensorboard",)) as curves:
        curves.log({"step": 0, "reward": 0.25, "discrepancy": 0.5, "codes_changed": None})
        curves.log({"step": 1, "reward": 0.75, "discrepancy": 0.125, "codes_changed": 0.5})
    events = EventAccumulator(str(run.train / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward", "discrepancy", "codes_changed"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 0.25), (1, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("codes_changed")] == [(1, 0.5)]


class FakeWandb(ModuleType):
    """A module and its run in one: remembers what accelerate's own tracker calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, object]] = []

    def init(self, **options: object) -> FakeWandb:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_wandb_gets_a_run_of_its_name(tmp_path, monkeypatch) -> None:
    """accelerate's tracker for it, in a process that has not used accelerate before, into a module that stands in."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    PartialState._reset_state()
    run = RunDir(tmp_path)
    with live_curves(run, config('name="mine"'), ("wandb",)) as curves:
        curves.log({"step": 2, "reward": 0.5})
    options = {"project": "boresight", "name": "mine", "dir": str(run.train / "wandb")}
    assert wandb.calls == [("init", options), ("log", (2, {"reward": 0.5})), ("finish", None)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(name, monkeypatch) -> None:
    """Before any work, with what to install."""
    found = preflight.importlib.util.find_spec
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda module: None if module == name else found(module))
    with pytest.raises(ConfigError, match=f"train.trackers: '{name}' is not installed; pip install {name}"):
        preflight.preflight(config(f'train.trackers=["{name}"]'), CPU)


def test_static_scales_are_refused_over_ranks() -> None:
    """An FP8 KV cache is calibrated in one process; the line names target and field."""
    with pytest.raises(ConfigError, match=r"train.distributed: int4-g128.* has static scales"):
        preflight.preflight(config("train.distributed.processes=2", "quant.kv_cache=fp8"), CPU)


def test_cpu_offload_is_refused_on_a_cpu() -> None:
    """There is nowhere to offload to."""
    with pytest.raises(ConfigError, match=r"train.distributed.cpu_offload: needs a GPU"):
        preflight.preflight(config("train.distributed.processes=2", "train.distributed.cpu_offload=true"), CPU)


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and on a GPU where it is not installed."""
    with pytest.raises(ConfigError, match=r"train.liger: needs a GPU"):
        preflight.preflight(config("train.liger=true"), CPU)
    found = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda module: None if module == "liger_kernel" else found(module)
    )
    gpu = preflight.Device("cuda", "a GPU", (9, 0), frozenset())
    with pytest.raises(ConfigError, match=r"train.liger: 'liger_kernel' is not installed; pip install liger-kernel"):
        preflight.preflight(config("train.liger=true"), gpu)


def test_liger_is_asked_for_no_loss_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its fused losses would take the place of our log-probs; the patching itself is a stand-in here."""
    asked = []
    monkeypatch.setattr(
        models, "apply_liger_kernel", lambda module, given: asked.append((type(module).__name__, given))
    )
    folder = tiny_folder(tmp_path / "model")
    for liger in ("false", "true"):
        models.load_module(folder, config(f"train.liger={liger}"))
    assert asked == [("Qwen3ForCausalLM", {"cross_entropy": False, "fused_linear_cross_entropy": False})]
