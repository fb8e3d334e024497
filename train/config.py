"""The `[model]` and `[train]` tables: what is trained, on which task, how rollouts are made, how the constraint acts.

Torch-free, so that `boresight check` answers at once. Every choice that cannot work together is refused here.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from quant.config import Frozen

# a policy loss's clip distances, low and high, where the config gives none
CLIPS = {"grpo": (0.2, 0.24), "dapo": (0.2, 0.28), "qurl": (0.2, 0.24), "gspo": (3e-4, 4e-4)}


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
    grader_workers: int = Field(2, ge=1, le=256, description="processes that grade; exact is graded without them")
    grader_timeout: float = Field(
        10.0, gt=0, le=3600, description="seconds for one sample; then its worker is killed and the sample has failed"
    )
    grader_memory_gib: float | None = Field(
        None,
        gt=0,
        description="address space of a grading worker, beyond which it gets a MemoryError; default: no limit",
    )
    max_failed: float = Field(
        0.5, ge=0, lt=1, description="share of a step's samples that may fail to be graded; more stops the run"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        named = {"exact", "math-verify", "reasoning-gym"}
        module, _, function = self.grader.partition(":")
        if self.grader not in named and not all(name.isidentifier() for name in (*module.split("."), function)):
            raise ValueError(f"grader must be one of {sorted(named)} or module:function, got {self.grader!r}")
        if self.grader == "reasoning-gym" and self.source != "reasoning-gym":
            raise ValueError("grader 'reasoning-gym' needs source 'reasoning-gym'")
        if self.source == "reasoning-gym" and self.size is None:
            raise ValueError("size is required when source is 'reasoning-gym' (how many problems to generate)")
        shared = self.heldout_name is None and self.heldout_options is None
        if shared and self.size is not None and self.heldout_size >= self.size:
            raise ValueError(f"heldout_size ({self.heldout_size}) must be below size ({self.size}): it is split off")
        return self


class ServersConfig(Frozen):
    """The `[train.rollout.servers]` table: the `vllm serve` processes that roll out, started here or found by URL."""

    count: int = Field(1, ge=1, le=1024, description="servers to start on this machine")
    urls: tuple[str, ...] = Field(
        (), description="servers that run already, as http://host:port/v1; then none is started"
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one replica, which shard the model")
    data_parallel: int = Field(
        1,
        ge=1,
        description="replicas behind one server; for a mixture that no single GPU's replica holds, with "
        "expert_parallel; else more servers do the same, and one that dies takes no other with it",
    )
    expert_parallel: bool = Field(
        False,
        description="mixture, GPU only, untested there: the GPUs of a server share the experts out as wholes, "
        "instead of each expert's width",
    )
    startup_timeout: float = Field(600.0, gt=0, description="seconds until a server must be healthy")
    request_timeout: float = Field(600.0, gt=0, description="seconds for one request; then the server counts as dead")
    in_flight: int = Field(
        32, ge=1, description="prompts under way at one server; each is a request for group_size completions"
    )
    sync_dir: str | None = Field(
        None, description="folder for weight updates that all servers can read; default: in the run directory"
    )

    @property
    def gpus(self) -> int:
        """Of one server: the ranks that hold weights."""
        return self.tensor_parallel * self.data_parallel

    @model_validator(mode="after")
    def _consistent(self) -> ServersConfig:
        for given in self.urls:
            url = urlsplit(given)
            if url.username is not None or url.password is not None:
                raise ValueError("urls: a URL with a user or a password in it; the key goes into BORESIGHT_API_KEY")
            if url.scheme not in ("http", "https") or not url.hostname or url.path != "/v1" or url.query:
                raise ValueError(f"urls must look like http://host:port/v1, got {given!r}")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError(f"urls must be different servers, got {list(self.urls)}")
        if self.expert_parallel and self.gpus == 1:
            raise ValueError(
                "expert_parallel needs tensor_parallel * data_parallel above 1: ranks to share experts out to"
            )
        return self


class RolloutConfig(Frozen):
    """The `[train.rollout]` table: how completions are sampled from the deployed engine."""

    engine: Literal["vllm", "servers", "exact"] = Field(
        "vllm",
        description="vllm: in the trainer's process; servers: a pool of `vllm serve`; exact: sample from the trainer's "
        "own model in the trainer's own shape, discrepancy exactly 0 (arXiv 2605.14220), for diagnosis",
    )
    servers: ServersConfig | None = Field(None, description="engine 'servers' alone has them: docs/servers.md")
    ahead: bool = Field(
        False, description="engine servers: sample a step's rollouts while the step before trains; one step stale"
    )
    batch_invariant: bool = Field(
        False,
        description="GPU only, engine vllm, untested: vLLM's batch-invariant kernels (VLLM_BATCH_INVARIANT=1), in the "
        "whole process; an answer then does not depend on its batch",
    )
    sleep: bool = Field(
        False,
        description="GPU only, engine vllm, untested: its weights wait in the host's memory and its KV cache is given "
        "up while the trainer trains (vLLM's sleep mode)",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _servers_of_the_engine(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("engine") == "servers" and table.get("servers") is None:
            return {**table, "servers": {}}
        return table

    @model_validator(mode="after")
    def _served(self) -> RolloutConfig:
        if self.servers is not None and self.engine != "servers":
            raise ValueError(f"rollout.servers needs engine = 'servers', got {self.engine!r}: nothing else has servers")
        if self.ahead and self.engine != "servers":
            raise ValueError(f"ahead needs engine = 'servers', got {self.engine!r}: it samples beside the training")
        if self.sleep and self.engine != "vllm":
            raise ValueError(f"sleep needs engine = 'vllm', got {self.engine!r}: it shares the trainer's GPU")
        if self.routing_replay and self.engine == "servers":
            raise ValueError("engine 'servers' needs routing_replay = false: its completions carry no routing")
        return self

    @model_validator(mode="after")
    def _exact_is_the_trainer(self) -> RolloutConfig:
        if self.engine == "exact" and self.target:
            raise ValueError(
                "engine 'exact' needs target = false: no quantized kernel equals the BF16 trainer bit for bit"
            )
        if self.engine == "exact" and self.routing_replay:
            raise ValueError("engine 'exact' needs routing_replay = false: it routes as the trainer does")
        if self.engine == "exact" and self.batch_invariant:
            raise ValueError("engine 'exact' needs batch_invariant = false: that is a mode of vLLM's")
        return self


DISTILL_EVERY = 4
DEFAULT_FORM = "blend+distill"
BLEND_FORMS = ("blend", "blend+distill")
QUANTIZING_FORMS = (*BLEND_FORMS, "straight-through")  # the trainer's own forward sees the quantization


class ConstraintConfig(Frozen):
    """The `[train.constraint]` table: the lever, and the multiplier that moves it. Any lever goes with any rule."""

    form: Literal["none", "advantage", "blend", "distill", "blend+distill", "straight-through"] = Field(
        DEFAULT_FORM,
        description="what the multiplier acts on: nothing, the advantage (arXiv 2606.08779), the weights, a KL pull "
        "through the quantizer, or both; straight-through always trains at the deployed weights, without a multiplier",
    )
    stage: Literal["advantage", "reward"] = Field(
        "advantage",
        description="advantage form: subtract per token after the group's normalization, or from the reward",
    )
    penalty: Literal["full", "excess", "hinge"] = Field("full", description="advantage form: what is subtracted")
    distill_weight: float = Field(0.4, gt=0, description="form 'blend+distill': the KL's weight, times lambda")
    distill_every: int = Field(DISTILL_EVERY, ge=1, description="forms with a KL: it is added in one of so many steps")
    distill_half_life: int | None = Field(
        None, ge=1, description="forms with a KL: steps in which its weight falls to a half; default: it stays"
    )
    distill_from: Literal["policy", "start"] = Field(
        "start",
        description="forms with a KL: what Q(W) is pulled towards, the policy at W or the one that training began with",
    )
    groups: Literal["model", "block"] = Field(
        "model", description="blend forms: one multiplier for the model, or one per transformer block"
    )
    tolerance: float | Literal["auto"] | None = Field(
        "auto",
        description="c, a mean |probability difference|: a number; null, tolerance_ratio of the first step's gap; or "
        "'auto', that share, but with rollout.target never below the gap that is left where trainer and engine both "
        "run at the deployed weights: quantized activations leave one that no weights close",
    )
    tolerance_ratio: float = Field(0.02, gt=0, description="c as a share of the first step's gap, of the policy at W")
    multiplier_rule: Literal["dual", "pid"] = Field(
        "dual", description="projected dual ascent (arXiv 2606.08779) or a PID controller (arXiv 2007.03964)"
    )
    multiplier_init: float = Field(
        0.0,
        ge=0,
        description="lambda before the first step; default: 1 in the blend forms, which so begin at the deployed "
        "weights and let go as far as the tolerance allows, else 0",
    )
    multiplier_rate: float = Field(5.0, gt=0, description="eta of the projected dual ascent, K_I of the PID")
    multiplier_min: float = Field(0.0, ge=0)
    multiplier_max: float = Field(1.0, gt=0)
    multiplier_warmup: int = Field(0, ge=0, description="first steps that do not move lambda")
    pid_proportional: float = Field(5.0, ge=0, description="K_P: lambda per unit of discrepancy above the tolerance")
    pid_derivative: float = Field(5.0, ge=0, description="K_D: lambda per unit that the discrepancy rose in a step")
    pid_smoothing: float = Field(
        0.5, ge=0, lt=1, description="share of the old average that K_P and K_D go by; 0: none"
    )

    @property
    def quantizes(self) -> bool:
        """Whether the trainer's own forward pass is on the way to the deployed weights."""
        return self.form in QUANTIZING_FORMS

    @property
    def acts(self) -> bool:
        """Whether a multiplier moves a lever."""
        return self.form not in ("none", "straight-through")

    @property
    def moves(self) -> bool:
        """Whether the measured gap moves the multiplier: not where its bounds are one number, a lever held fixed."""
        return self.acts and self.multiplier_min < self.multiplier_max

    @property
    def kl_weight(self) -> float:
        """Weight of the straight-through KL per unit of lambda; 0 where the form has none."""
        return {"distill": 1.0, "blend+distill": self.distill_weight}.get(self.form, 0.0)

    @property
    def keeps_start(self) -> bool:
        """Whether the weights that training began with are needed to the end."""
        return self.kl_weight > 0 and self.distill_from == "start"

    @model_validator(mode="before")
    @classmethod
    def _blends_begin_deployed(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("multiplier_init") is None:
            blends, top = table.get("form", DEFAULT_FORM) in BLEND_FORMS, table.get("multiplier_max", 1.0)
            deployed = top if isinstance(top, float) and top < 1 else 1.0  # what is no number is refused by its field
            return {**table, "multiplier_init": deployed if blends else 0.0}
        return table

    @model_validator(mode="after")
    def _bounds(self) -> ConstraintConfig:
        if isinstance(self.tolerance, float) and not self.tolerance > 0:
            raise ValueError(f"tolerance must be above 0, or 'auto', got {self.tolerance}")
        if not self.multiplier_min <= self.multiplier_init <= self.multiplier_max:
            raise ValueError(
                f"need multiplier_min <= multiplier_init <= multiplier_max, got "
                f"{self.multiplier_min}, {self.multiplier_init}, {self.multiplier_max}"
            )
        uses_tolerance = self.form == "advantage" and self.penalty != "full" and self.multiplier_init > 0
        if uses_tolerance and not isinstance(self.tolerance, float):
            raise ValueError(
                f"penalty {self.penalty!r} with multiplier_init > 0 needs a tolerance: the first step would use it "
                f"before it is measured"
            )
        if self.quantizes and self.multiplier_max > 1:
            raise ValueError(f"form {self.form!r} needs multiplier_max <= 1 (a share), got {self.multiplier_max}")
        if self.distill_every not in (1, DISTILL_EVERY) and not self.kl_weight:
            raise ValueError(f"distill_every needs form 'distill' or 'blend+distill', got {self.form!r}: it has no KL")
        if self.distill_half_life is not None and not self.kl_weight:
            raise ValueError(f"distill_half_life needs form 'distill' or 'blend+distill', got {self.form!r}: no KL")
        if self.stage == "reward" and self.form != "advantage":
            raise ValueError(f"stage 'reward' is one of form 'advantage', got form {self.form!r}")
        if self.groups == "block" and not (self.quantizes and self.acts):
            raise ValueError(
                f"groups 'block' needs form 'blend' or 'blend+distill', whose lever can be set block by block, got "
                f"{self.form!r}"
            )
        return self


class CorrectionConfig(Frozen):
    """The `[train.correction]` table: one importance weight and any masks, from rho = trainer / rollout probability.

    None where the quantized model is what ships. A masked token or sequence stays in the loss's denominator.
    """

    weight: Literal["none", "token-tis", "sequence-tis", "token-masked", "sequence-masked", "icepop"] = Field(
        "none", description="tis: rho cut at the cap; masked, icepop: rho inside the bounds, else 0"
    )
    cap: float = Field(2.0, gt=0, description="tis: the largest weight")
    bounds: tuple[float, float] | None = Field(
        None, description="masked, icepop: kept ratios; default [0.5, 2] for masked, [0.5, 5] for icepop"
    )
    masks: tuple[Literal["geometric", "veto", "max-k2", "mean-k3", "mean-k1"], ...] = Field(
        (), description="what drops whole sequences; trust region masking (arXiv 2512.23075) is max-k2 and mean-k3"
    )
    geometric: tuple[float, float] = Field((0.99, 1.01), description="bounds on exp(mean log rho) of a sequence")
    veto: float = Field(1e-4, gt=0, lt=1, description="drop a sequence with any rho below this")
    max_k2: float = Field(0.05, gt=0, description="limit on a sequence's largest (log rho)^2 / 2")
    mean_k3: float = Field(0.001, gt=0, description="limit on a sequence's mean rho - log rho - 1")
    mean_k1: float = Field(0.001, gt=0, description="limit on a sequence's |mean log rho|")

    @model_validator(mode="before")
    @classmethod
    def _bounds_of_the_weight(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("bounds") is None:
            bounds = {"token-masked": (0.5, 2.0), "sequence-masked": (0.5, 2.0), "icepop": (0.5, 5.0)}
            return {**table, "bounds": bounds.get(str(table.get("weight", "none")))}
        return table

    @model_validator(mode="after")
    def _consistent(self) -> CorrectionConfig:
        bounded = self.weight in ("token-masked", "sequence-masked", "icepop")
        if self.bounds is not None and not bounded:
            raise ValueError(f"bounds have no use with weight {self.weight!r}; its limit is the cap")
        for name, pair in (("bounds", self.bounds), ("geometric", self.geometric)):
            if pair is not None and not 0 <= pair[0] < pair[1]:
                raise ValueError(f"{name} must be [low, high] with 0 <= low < high, got {list(pair)}")
        if len(set(self.masks)) < len(self.masks):
            raise ValueError(f"masks names one twice: {list(self.masks)}")
        return self


class LossConfig(Frozen):
    """The `[train.loss]` table: the policy loss, its clip, and what it is divided by."""

    name: Literal["grpo", "dapo", "gspo", "qurl", "reinforce"] = Field(
        "grpo",
        description="grpo: PPO's clip per token; dapo: the same with its paper's clip; gspo: the sequence's ratio; "
        "qurl: an upper clip that adapts to the quantized engine; reinforce: no ratio, no clip",
    )
    ratio: Literal["decoupled", "bypass"] = Field(
        "decoupled",
        description="inside the clip: pi / pi_old with corrections outside, or bypass: pi / rollout probability",
    )
    clip_low: float | None = Field(None, gt=0, lt=1, description="ratio >= 1 - clip_low; default: see CLIPS")
    clip_high: float | None = Field(None, gt=0, description="ratio <= 1 + clip_high; default: see CLIPS")
    normalize: Literal["token-mean", "sequence-mean"] = Field(
        "token-mean",
        description="mean over the tokens of the optimizer step, or over its sequences of their token means; gspo is "
        "the latter",
    )
    reference_kl: float = Field(0.0, ge=0, description="times KL(policy || initial policy), k3; 0 keeps no copy of it")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        name = str(table.get("name", "grpo"))
        low, high = CLIPS.get(name, (None, None))
        filled = {"clip_low": low, "clip_high": high} | {k: v for k, v in table.items() if v is not None}
        return {"normalize": "sequence-mean"} | filled if name == "gspo" else filled

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.name == "reinforce" and (self.clip_low, self.clip_high) != (None, None):
            raise ValueError("loss 'reinforce' has no clip: clip_low and clip_high have no use")
        if self.name in ("dapo", "gspo") and self.normalize != (
            "token-mean" if self.name == "dapo" else "sequence-mean"
        ):
            other = "'grpo' is it with either" if self.name == "dapo" else "its ratio is a sequence's"
            raise ValueError(f"loss {self.name!r} does not go with normalize {self.normalize!r}; {other}")
        if self.name == "qurl" and self.ratio == "bypass":
            raise ValueError("loss 'qurl' needs ratio 'decoupled': its clip already holds pi / rollout probability")
        return self


class SamplingConfig(Frozen):
    """The `[train.sampling]` table: dynamic sampling and the overlong punishment (DAPO, arXiv 2503.14476)."""

    dynamic: bool = Field(False, description="groups whose rewards are all equal do not count in the loss")
    extra_rounds: int = Field(0, ge=0, le=64, description="dynamic: rounds that sample other prompts in their place")
    overlong_buffer: int = Field(
        0, ge=0, description="tokens before max_tokens over which the punishment grows; 0 punishes none"
    )
    overlong_penalty: float = Field(1.0, gt=0, description="what the reward loses at max_tokens")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingConfig:
        if self.extra_rounds and not self.dynamic:
            raise ValueError(f"extra_rounds = {self.extra_rounds} needs dynamic = true")
        return self


class ScheduleConfig(Frozen):
    """The `[train.schedule]` table: the learning rate's multiplier over the steps."""

    kind: Literal["constant", "linear", "cosine", "length-triggered"] = Field(
        "constant", description="length-triggered: halve once response lengths have surged (arXiv 2602.01826)"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, for every kind")
    final: float = Field(0.0, ge=0, le=1, description="linear, cosine: share of lr that is left after the last step")
    floor: float = Field(0.1, ge=0, le=1, description="length-triggered: share of lr that the halving stops at")
    decay_period_ratio: float = Field(1.8, gt=0, description="length-triggered: steps to halve, in multiples of t_s")
    surge_ratio: float = Field(3.0, gt=1, description="length-triggered: mean response length over baseline, a surge")
    surge_baseline_steps: int = Field(50, ge=1, description="length-triggered: first steps, whose mean is the baseline")


class CriticConfig(Frozen):
    """The `[train.critic]` table: PPO's value head, with a discount that is fixed or depends on the state."""

    gamma: float | Literal["adaptive"] = Field(
        1.0, description="the discount of every token, in (0, 1]; 'adaptive': learned per state (arXiv 2605.06149)"
    )
    gamma_min: float = Field(0.99, gt=0, lt=1, description="adaptive: the lowest discount")
    gamma_max: float = Field(1.0, gt=0, le=1, description="adaptive: the highest discount")
    lam: float = Field(1.0, ge=0, le=1, description="GAE's lambda; 1 is the whole return less the value")
    lr: float = Field(1e-3, gt=0, description="of the critic's own AdamW")
    hidden_size: int = Field(256, ge=1, description="width of the heads' one hidden layer")
    epochs: int = Field(4, ge=1, description="optimizer steps per rollout batch, each over all of its tokens")
    n_step: int = Field(5, ge=1, description="adaptive: steps of real rewards in the return to be consistent with")
    reference_rate: float = Field(0.1, gt=0, le=1, description="adaptive: share of the new mean in the reference gamma")
    deviation_weight: float = Field(1e-3, ge=0, description="adaptive: times (mean gamma - reference)^2 in the range")
    variance_weight: float = Field(1e-3, ge=0, description="adaptive: times the variance of gamma in the range")
    boundary_weight: float = Field(1e-3, ge=0, description="adaptive: times squared depth in the range's outer 5%")

    @model_validator(mode="after")
    def _discounts(self) -> CriticConfig:
        if isinstance(self.gamma, float) and not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], or 'adaptive', got {self.gamma}")
        if self.gamma_min >= self.gamma_max:
            raise ValueError(f"gamma_min ({self.gamma_min}) must be below gamma_max ({self.gamma_max})")
        return self


class LoraConfig(Frozen):
    """The `[train.lora]` table: adapt linear layers by a low-rank change; without it every weight learns.

    W = W0 + (alpha / rank) B A (arXiv 2106.09685). It wants a larger lr than full fine-tuning.
    """

    rank: int = Field(16, ge=1, description="r: rows of A, columns of B")
    alpha: int = Field(32, ge=1, description="the change is scaled by alpha / rank")
    modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="names of linear layers, whole or their ends, such as q_proj; all-linear: but the head",
    )

    @model_validator(mode="after")
    def _named(self) -> LoraConfig:
        names = self.modules
        listed = isinstance(names, tuple) and names and all(names) and len(set(names)) == len(names)
        if not listed and names != "all-linear":
            raise ValueError(
                f"modules must be 'all-linear' or a list of different names of linear layers, such as "
                f"['q_proj', 'v_proj'], got {(names if isinstance(names, str) else list(names))!r}"
            )
        return self


class DistributedConfig(Frozen):
    """The `[train.distributed]` table: the processes that train one policy, sharded by FSDP2; one per GPU."""

    processes: int = Field(1, ge=1, le=64, description="trainer ranks on each node")
    nodes: int = Field(1, ge=1, le=1024)
    cpu_offload: bool = Field(False, description="GPU only: weights, gradients and moments in the host's memory")

    @property
    def ranks(self) -> int:
        """Trainer processes over all nodes."""
        return self.processes * self.nodes


class TrainConfig(Frozen):
    """The `[train]` table."""

    task: TaskConfig
    rollout: RolloutConfig
    constraint: ConstraintConfig = ConstraintConfig()
    loss: LossConfig = LossConfig()
    correction: CorrectionConfig = CorrectionConfig()
    sampling: SamplingConfig = SamplingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    distributed: DistributedConfig = DistributedConfig()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="where to show the curves live")
    lora: LoraConfig | None = None
    critic: CriticConfig | None = Field(None, description="advantage 'gae' alone has one")
    steps: int = Field(ge=1)
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass over a rollout batch, of whole groups each")
    epochs: int = Field(1, ge=1, le=64, description="passes over a rollout batch, each in `minibatches` steps")
    microbatch_tokens: int = Field(8192, ge=1, description="padded tokens in one forward-backward")
    lr: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    advantage: Literal["grpo", "rloo", "reinforce", "otb", "gae"] = Field(
        "grpo",
        description="baseline of the reward: the group's mean, the mean of the group's others, the batch's mean, the "
        "optimal one of each token position (arXiv 2602.07078), or a critic's value of each token's state (PPO)",
    )
    normalize_std: bool = Field(True, description="grpo: divide the group's centred rewards by their std")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints; the last step always has one")
    keep_checkpoints: int = Field(
        2, ge=1, description="the newest that are kept; with one, a damaged checkpoint has none before it to go back to"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    liger: bool = Field(
        False, description="GPU only, untested: liger-kernel's fused norms, rotary embedding and gate in the trainer"
    )
    gradient_checkpointing: bool = False

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.epochs * self.minibatches

    @model_validator(mode="before")
    @classmethod
    def _critic_of_the_advantage(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("advantage") == "gae" and table.get("critic") is None:
            return {**table, "critic": {}}
        return table

    @model_validator(mode="after")
    def _one_correction(self) -> TrainConfig:
        loss, weight = self.loss, self.correction.weight
        if loss.ratio == "bypass" and loss.name != "reinforce" and weight != "none":
            raise ValueError(
                f"correction.weight must be 'none' with loss.ratio 'bypass' (its ratio already is the importance "
                f"weight), got {weight!r}"
            )
        if loss.name == "qurl" and weight != "token-tis":
            raise ValueError(f"loss 'qurl' needs correction.weight 'token-tis', min(rho, cap), got {weight!r}")
        if self.sampling.overlong_buffer > self.rollout.max_tokens:
            raise ValueError(
                f"sampling.overlong_buffer ({self.sampling.overlong_buffer}) must be at most rollout.max_tokens "
                f"({self.rollout.max_tokens})"
            )
        return self

    @model_validator(mode="after")
    def _over_ranks(self) -> TrainConfig:
        ranks = self.distributed.ranks
        if ranks == 1:
            if self.distributed.cpu_offload:
                raise ValueError("distributed.cpu_offload needs more than one rank, got processes = 1 and nodes = 1")
            return self
        alone = {
            "lora": self.lora is not None,
            "advantage 'gae'": self.advantage == "gae",
            "loss.reference_kl": self.loss.reference_kl > 0,
            "rollout.engine 'exact'": self.rollout.engine == "exact",
            "rollout.batch_invariant": self.rollout.batch_invariant,
        }
        for what, given in alone.items():
            if given:
                raise ValueError(
                    f"{what} works in one process only: distributed.processes and nodes must be 1, got "
                    f"{self.distributed.processes} and {self.distributed.nodes}"
                )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.rollout.prompts % self.minibatches:
            raise ValueError(
                f"rollout.prompts ({self.rollout.prompts}) must be a multiple of minibatches ({self.minibatches})"
            )
        if self.normalize_std and self.advantage != "grpo":
            raise ValueError(
                f"advantage {self.advantage!r} needs normalize_std = false (dividing by the group's std is grpo's)"
            )
        if self.critic is not None and self.advantage != "gae":
            raise ValueError(f"train.critic needs advantage = 'gae', got {self.advantage!r}: nothing else has a critic")
        schedule = self.schedule
        if schedule.kind in ("linear", "cosine") and schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({schedule.warmup_steps}) must be below steps ({self.steps}) when "
                f"schedule.kind is {schedule.kind!r}"
            )
        if schedule.kind == "length-triggered" and schedule.surge_baseline_steps >= self.steps:
            raise ValueError(
                f"schedule.surge_baseline_steps ({schedule.surge_baseline_steps}) must be below steps ({self.steps}): "
                f"a surge could never be seen"
            )
        if self.constraint.moves and self.constraint.multiplier_warmup >= self.steps:
            raise ValueError(
                f"constraint.multiplier_warmup ({self.constraint.multiplier_warmup}) must be below steps "
                f"({self.steps}), or the multiplier never moves"
            )
        if not self.rollout.target and self.constraint.form != "none":
            raise ValueError(
                f"constraint.form must be 'none' when rollout.target is false (no deployed engine to be constrained "
                f"against), got {self.constraint.form!r}"
            )
        return self
