"""Configuration: every shipped file loads, overrides work, and each mistake gets one line naming field and value."""

import tomllib
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_config
from quant.config import TargetSpec
from train.config import ConstraintConfig, RolloutConfig

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
DEMO = ROOT / "configs" / "demo-int4.toml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_round_trip(path, tmp_path) -> None:
    """A shipped TOML loads, and its resolved JSON loads to the same configuration."""
    config = load_config(path)
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "targets").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_targets_load_under_their_own_name(path) -> None:
    """The file's name is the target's."""
    assert TargetSpec.load(path.stem).name == path.stem


def test_the_settings_page_writes_the_defaults_out() -> None:
    """The first TOML block of docs/settings.md says nothing that a config without it would not have."""
    text = (ROOT / "docs" / "settings.md").read_text().split("```toml\n")[1].split("```")[0]
    train = tomllib.loads(text)["train"]
    assert train["constraint"].keys() >= {"form", "distill_from", "distill_every", "distill_weight"}
    for name, value in train["constraint"].items():
        assert getattr(ConstraintConfig(), name) == value, name
    assert train["rollout"] == {"target": RolloutConfig.model_fields["target"].default}


def test_overrides_are_toml_values_or_bare_strings() -> None:
    """Numbers, booleans, quoted and bare strings, null."""
    config = load_config(
        DEMO,
        (
            "train.steps=5", "name=other", 'train.constraint.form="none"', "train.task.size=null",
            "train.task.source=jsonl", "train.task.grader=exact", "train.normalize_std=false",
        ),
    )  # fmt: skip
    assert (config.train.steps, config.name, config.train.constraint.form) == (5, "other", "none")
    assert config.train.task.size is None
    assert config.train.normalize_std is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", r"train\.stepz: unknown key, did you mean 'steps'\?$"),
        ("train.task.zzz=5", r"train\.task\.zzz: unknown key, allowed: answer_field, .*, size, source$"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1, got 0"),
        ("train.steps=many", r"train\.steps: .*integer.*, got 'many'"),
        ("train.rollout.top_p=0.9", r"train\.rollout: top_p must be 1.0, got 0.9: training rollouts use the whole"),
        ("train.rollout.top_k=50", r"train\.rollout: top_k must be -1 \(off\), got 50"),
        ("train.rollout.max_tokens=64", r"max_tokens \(64\) must be below max_model_len \(64\)"),
        ("train.minibatches=5", r"rollout\.prompts \(48\) must be a multiple of minibatches \(5\)"),
        ("train.rollout.target=false", r"constraint\.form must be 'none' when rollout\.target is false"),
        ("train.constraint.multiplier_init=2", r"multiplier_min <= multiplier_init <= multiplier_max"),
        ("train.constraint.multiplier_max=3", r"form 'blend\+distill' needs multiplier_max <= 1"),
        ("train.constraint.tolerance=0", r"tolerance must be above 0, or 'auto', got 0.0"),
        ("train.constraint.tolerance=nan", r"tolerance: Input should be a finite number or 'auto', got nan$"),
        ("train.constraint.tolerance=atuo", r"\.constraint\.tolerance: Input should be a valid number or 'auto', got"),
        ("train.lora={modules=5}", r"train\.lora\.modules: Input should be a valid string or a valid tuple, got 5$"),
        ("train.correction.bounds=[0.5]", r"train\.correction\.bounds\.1: Field required$"),
        ('train.constraint={form="distill", groups="block"}', r"groups 'block' needs form 'blend' .*, got 'distill'"),
        ("train.constraint.stage=reward", r"stage 'reward' is one of form 'advantage', got form 'blend\+distill'"),
        ('train.constraint={form="blend", distill_every=2}', r"distill_every needs form 'distill' or .*, got 'blend'"),
        ('train.constraint={form="blend", distill_half_life=9}', r"distill_half_life needs form .*, got 'blend'"),
        ("train.constraint.multiplier_warmup=60", r"multiplier_warmup \(60\) must be below steps \(60\)"),
        ("model.make.outlier_scale=12", r"outlier_scale must be a power of two .*, got 12"),
        ("model.path=some/model", r"model: give exactly one of model\.path .* and model\.make"),
        ("train.task.grader=best", r"grader must be one of .* or module:function, got 'best'"),
        ("train.task.grader=json:loads", r"eval\.grader: say how the served model is graded"),
        ("train.loss.name=ppo", r"train\.loss\.name: .*'grpo'.*, got 'ppo'"),
        ('train.loss={name="gspo", normalize="token-mean"}', r"loss 'gspo' does not go with normalize 'token-mean'"),
        ('train.loss={name="dapo", normalize="sequence-mean"}', r"loss 'dapo' does not go with normalize 'sequence-m"),
        ('train.loss={name="reinforce", clip_low=0.2}', r"loss 'reinforce' has no clip"),
        ('train.loss={name="qurl", ratio="bypass"}', r"loss 'qurl' needs ratio 'decoupled'"),
        ("train.loss.name=qurl", r"loss 'qurl' needs correction\.weight 'token-tis'.*, got 'none'"),
        ("train.correction={bounds=[0.5, 2.0]}", r"bounds have no use with weight 'none'"),
        ('train.correction={weight="icepop", bounds=[5, 0.5]}', r"bounds must be \[low, high\] .*, got \[5\.0, 0\.5\]"),
        ('train.correction={masks=["veto", "veto"]}', r"masks names one twice: \['veto', 'veto'\]"),
        ("train.sampling.extra_rounds=2", r"extra_rounds = 2 needs dynamic = true"),
        ("train.sampling.overlong_buffer=21", r"overlong_buffer \(21\) must be at most rollout\.max_tokens \(20\)"),
        ("train.rollout.servers.count=2", r"rollout\.servers needs engine = 'servers', got 'vllm'"),
        ("train.rollout.ahead=true", r"ahead needs engine = 'servers', got 'vllm'"),
        ('train.rollout={engine="servers", sleep=true, max_tokens=4, max_model_len=8}', r"sleep needs engine = 'vllm'"),
        ('train.rollout={engine="servers", routing_replay=true, max_tokens=4, max_model_len=8}', r"carry no routing"),
        ("nonsense", r"--set 'nonsense': expected key=value"),
        ("name=../up", r"name: .*got '\.\./up'"),
    ],
)  # fmt: skip
def test_each_mistake_gets_one_clear_line(override, message) -> None:
    """Field, what was given, what is allowed; one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(DEMO, (override,))
    assert "\n" not in str(caught.value)


def test_a_ratio_that_already_corrects_is_not_corrected_twice() -> None:
    """Bypass with an importance weight; the same weight is welcome where there is no ratio."""
    weighted = ("train.loss.ratio=bypass", "train.correction.weight=token-tis")
    with pytest.raises(ConfigError, match=r"correction\.weight must be 'none' with loss\.ratio 'bypass'"):
        load_config(DEMO, weighted)
    assert load_config(DEMO, (*weighted, "train.loss.name=reinforce")).train.loss.clip_high is None


def test_a_loss_brings_its_papers_clip_and_a_mask_its_bounds() -> None:
    """Where nothing is given; one given distance leaves the other; the resolved config has the numbers."""
    loss = load_config(DEMO, ("train.loss.name=gspo",)).train.loss
    assert (loss.clip_low, loss.clip_high, loss.normalize) == (3e-4, 4e-4, "sequence-mean")
    loss = load_config(DEMO, ("train.loss.name=dapo", "train.loss.clip_low=0.1")).train.loss
    assert (loss.clip_low, loss.clip_high) == (0.1, 0.28)
    loss = load_config(DEMO).train.loss
    assert (loss.name, loss.clip_low, loss.clip_high, loss.normalize) == ("grpo", 0.2, 0.24, "token-mean")
    assert load_config(DEMO, ("train.correction.weight=icepop",)).train.correction.bounds == (0.5, 5.0)


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    """No file, and a file that is not TOML."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such config file"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: cannot be parsed"):
        load_config(tmp_path / "broken.toml")
