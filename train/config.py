"""The `[model]` and `[train]` tables: what is trained, on which task, how rollouts are made, how the constraint acts.

Torch-free, so that `boresight check` answers at once. Every choice that cannot work together is refused here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from quant.config import Frozen


class MakeConfig(Frozen):
    """Make a small Qwen3 model instead of loading one (demo, tests): random init, then supervised warm start.

    With `experts` it is a Qwen3-MoE: every block has that many experts of `intermediate_size`.
    """

    hidden_size: int = Field(256, ge=32)
    intermediate_size: int = Field(512, ge=32)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(64, ge=16)
    experts: int = Field(0, ge=0, description="experts per block; 0 makes a dense model")
    experts_per_token: int = Field(2, ge=1)
    tie_word_embeddings: bool = False
    solution: str | None = Field(
        None, description="module:function that writes a problem's worked solution, what the warm start imitates"
    )
    accuracy: float = Field(0.4, ge=0, le=1, description="stop the warm start at this sampled accuracy; 0 skips it")
    max_steps: int = Field(3000, ge=0, description="the warm start gives up, with an error, after this many steps")
    batch_size: int = Field(256, ge=1)
    lr: float = Field(2e-3, gt=0)
    outlier_scale: int = Field(
        16, ge=1, description="strength of the injected outlier channels, a power of two; 1 injects none"
    )

    @model_validator(mode="after")
    def _shapes(self) -> MakeConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token ({self.experts_per_token}) is over experts ({self.experts})")
        if self.outlier_scale & (self.outlier_scale - 1):
            raise ValueError(f"outlier_scale must be a power of two (exact in BF16), got {self.outlier_scale}")
        if self.accuracy > 0 and self.solution is None:
            raise ValueError("accuracy > 0 needs a solution (module:function) to imitate; or set accuracy = 0")
        return self


class ModelConfig(Frozen):
    """The `[model]` table: a model to load, or one to make."""

    path: str | None = Field(None, description="a hub id or a local folder")
    revision: str | None = Field(None, description="hub revision")
    trust_remote_code: bool = False
    make: MakeConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.make is None):
            raise ValueError("give exactly one of model.path (a hub id or folder) and model.make (a model to make)")
        return self


class TaskConfig(Frozen):
    """The `[train.task]` table: prompts with a verifiable reward."""

    source: Literal["reasoning-gym", "jsonl", "hub"]
    name: str = Field(description="a reasoning-gym dataset, a path to a JSONL file, or a hub dataset id")
    options: dict[str, Any] = Field(
        default_factory=dict, description="reasoning-gym: the dataset's settings; hub: load_dataset's name= and split="
    )
    heldout_name: str | None = Field(None, description="held-out problems from here; default: split off the training")
    heldout_options: dict[str, Any] | None = Field(None, description="options of the held-out set; default: the same")
    size: int | None = Field(None, ge=1, description="problems to take; required for reasoning-gym, else all rows")
    heldout_size: int = Field(1000, ge=1)
    prompt: str = Field("{prompt}", description="template over the row's fields; reasoning-gym: question, metadata")
    answer_field: str = Field("answer", description="the row's field with the reference answer")
    answer_split: str | None = Field(
        None, min_length=1, description="keep what follows this in the reference answer (GSM8K: ####)"
    )
    chat: bool = Field(False, description="wrap the prompt in the tokenizer's chat template, as one user message")
    grader: str = Field("exact", description="exact, math-verify, reasoning-gym, or your own as module:function")
    completion_split: str | None = Field(None, min_length=1, description="grade only what follows the last of these")

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        named = {"exact", "math-verify", "reasoning-gym"}
        if self.grader not in named and self.grader.count(":") != 1:
            raise ValueError(f"grader must be one of {sorted(named)} or module:function, got {self.grader!r}")
        if self.grader == "reasoning-gym" and self.source != "reasoning-gym":
            raise ValueError("grader 'reasoning-gym' needs source 'reasoning-gym'")
        if self.source == "reasoning-gym" and self.size is None:
            raise ValueError("size is required when source is 'reasoning-gym' (how many problems to generate)")
        shared = self.heldout_name is None and self.heldout_options is None
        if shared and self.size is not None and self.heldout_size >= self.size:
            raise ValueError(f"heldout_size ({self.heldout_size}) must be below size ({self.size}): it is split off")
        return self


class RolloutConfig(Frozen):
    """The `[train.rollout]` table: how completions are sampled from the deployed engine."""

    target: bool = Field(True, description="roll out from the quantized target; false: from BF16 (a baseline arm)")
    prompts: int = Field(48, ge=1, description="prompts per step")
    group_size: int = Field(8, ge=2, le=256, description="completions per prompt (G)")
    max_tokens: int = Field(ge=1, description="response length limit in tokens")
    max_model_len: int = Field(ge=2, description="prompt plus response, tokens")
    temperature: float = Field(1.0, gt=0, le=2)
    ignore_eos: bool = Field(False, description="sample exactly max_tokens; for benchmarks")
    top_p: float = 1.0
    top_k: int = -1
    prefix_caching: bool = Field(True, description="off is faster where prompts are shorter than a cache block")
    kv_cache_gib: float = Field(1, gt=0, description="CPU only: GiB of KV cache")
    gpu_memory_utilization: float = Field(0.45, gt=0, lt=1, description="GPU only: share of the card for the engine")
    routing_replay: bool = Field(
        False, description="mixture of experts: the trainer routes every token to the experts the engine routed it to"
    )

    @model_validator(mode="after")
    def _whole_distribution(self) -> RolloutConfig:
        why = "training rollouts use the whole distribution: truncation biases every importance ratio"
        if self.top_p != 1.0:
            raise ValueError(f"top_p must be 1.0, got {self.top_p}: {why}")
        if self.max_tokens >= self.max_model_len:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be below max_model_len ({self.max_model_len})")
        if self.top_k not in (-1, 0):
            raise ValueError(f"top_k must be -1 (off), got {self.top_k}: {why}")
        return self


class ConstraintConfig(Frozen):
    """The `[train.constraint]` table: the lever, and the multiplier that moves it."""

    form: Literal["none", "advantage", "blend"] = Field(
        "blend", description="what the multiplier acts on: nothing, the advantage (arXiv 2606.08779), or the weights"
    )
    penalty: Literal["full", "excess", "hinge"] = Field("full", description="advantage form: what is subtracted")
    tolerance: float | None = Field(None, gt=0, description="c, a mean |probability difference|; wins over the ratio")
    tolerance_ratio: float = Field(0.1, gt=0, description="c as a share of the first step's discrepancy")
    multiplier_init: float = Field(0.0, ge=0, description="lambda before the first step")
    multiplier_rate: float = Field(5.0, gt=0, description="eta of the projected dual ascent")
    multiplier_min: float = Field(0.0, ge=0)
    multiplier_max: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _bounds(self) -> ConstraintConfig:
        if not self.multiplier_min <= self.multiplier_init <= self.multiplier_max:
            raise ValueError(
                f"need multiplier_min <= multiplier_init <= multiplier_max, got "
                f"{self.multiplier_min}, {self.multiplier_init}, {self.multiplier_max}"
            )
        if self.form == "advantage" and self.penalty != "full" and self.tolerance is None and self.multiplier_init > 0:
            raise ValueError(
                f"penalty {self.penalty!r} with multiplier_init > 0 needs a tolerance: the first step would use it "
                f"before it is measured"
            )
        if self.form == "blend" and self.multiplier_max > 1:
            raise ValueError(f"form 'blend' needs multiplier_max <= 1 (a share), got {self.multiplier_max}")
        return self


class TrainConfig(Frozen):
    """The `[train]` table."""

    task: TaskConfig
    rollout: RolloutConfig
    constraint: ConstraintConfig = ConstraintConfig()
    steps: int = Field(ge=1)
    minibatches: int = Field(1, ge=1, description="optimizer steps per rollout batch; each gets whole groups")
    microbatch_tokens: int = Field(8192, ge=1, description="padded tokens in one forward-backward")
    lr: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    clip_low: float = Field(0.2, gt=0, lt=1, description="PPO clip: ratio >= 1 - clip_low")
    clip_high: float = Field(0.24, gt=0, description="PPO clip: ratio <= 1 + clip_high")
    normalize_std: bool = Field(True, description="divide the group's centred rewards by their std (GRPO)")
    correction: Literal["none", "token-tis"] = Field(
        "none", description="importance weight trainer/rollout; none where the quantized model is what ships"
    )
    correction_cap: float = Field(2.0, gt=0)
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints; the last step always has one")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.rollout.prompts % self.minibatches:
            raise ValueError(
                f"rollout.prompts ({self.rollout.prompts}) must be a multiple of minibatches ({self.minibatches})"
            )
        if not self.rollout.target and self.constraint.form != "none":
            raise ValueError(
                f"constraint.form must be 'none' when rollout.target is false (no deployed engine to be constrained "
                f"against), got {self.constraint.form!r}"
            )
        return self
