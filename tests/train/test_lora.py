"""LoRA: the policy is the merged model, its adapters learn by the chain rule, and peft reads what is written."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from quant.config import TargetSpec
from quant.target import Target
from tests.tiny import tiny_model
from tests.train.test_policy import batch
from train.blend import blended
from train.checkpoint import CheckpointError, LoopState, load_checkpoint, save_checkpoint
from train.config import ConstraintConfig, LoraConfig, RolloutConfig, TaskConfig, TrainConfig
from train.distill import pull
from train.lora import Adapters, LoraError
from train.multiplier import initial_multiplier
from train.policy import Policy

QUERY = "model.layers.0.self_attn.q_proj"
STATE = LoopState(2, initial_multiplier(ConstraintConfig()), None, None)


LORA = LoraConfig(rank=4, alpha=8)


def config(*, lora: LoraConfig | None = LORA, **changes: Any) -> TrainConfig:
    rollout = RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64)
    defaults: dict[str, Any] = {"attention": "eager", "lr": 1e-2}
    task = TaskConfig(source="jsonl", name="x")
    return TrainConfig(task=task, rollout=rollout, steps=1, lora=lora, **{**defaults, **changes})


def train(policy: Policy, updates: int) -> None:
    """Raise the log-probs of the first two rows and lower those of the others."""
    data = batch()
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    for _ in range(updates):
        policy.run_at(policy.weights())
        for micro in policy.microbatches(data, range(4)):
            (-(signs[micro] * policy.logprobs(data, micro)).sum() / data.mask.sum()).backward()
        policy.update()


def moved(seed: int = 0, **changes: Any) -> Policy:
    """A policy whose B is no longer zero."""
    policy = Policy(tiny_model(), config(**changes), seed=seed)
    train(policy, 2)
    return policy


def test_before_the_first_update_the_policy_is_the_base() -> None:
    """B = 0: every weight equals the model's, bit for bit, and so do the log-probs; A differs from seed to seed only,
    and the global generator has not moved."""
    base = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    module = tiny_model()
    torch.random.set_rng_state(state)
    policy = Policy(module, config(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = policy.weights()
    assert list(weights) == list(base)
    assert all(torch.equal(weights[name].view(torch.int16), base[name].view(torch.int16)) for name in base)
    full = Policy(tiny_model(), config(lora=None))
    assert torch.equal(policy.all_logprobs(batch()), full.all_logprobs(batch()))
    a = f"{QUERY}.lora_A.weight"
    same, other = (Policy(tiny_model(), config(), seed=seed).masters[a] for seed in (1, 2))
    assert torch.equal(policy.masters[a], same)
    assert not torch.equal(policy.masters[a], other)


def test_gradients_equal_autograd_through_the_explicit_sum() -> None:
    """dL/dA and dL/dB, for a loss of W0 + s B A written out in float64 and differentiated by autograd: 1e-6 relative,
    the FP32 rounding; the loss is sum(C * W), so that dL/dW = C exactly."""
    adapters = Adapters(tiny_model(), LoraConfig(rank=4, alpha=6), seed=0)
    assert adapters.scale == 1.5
    a, b = (adapters.parameters[f"{QUERY}.lora_{side}.weight"] for side in "AB")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        b.normal_(generator=generator)
    cotangents = [torch.randn(b.shape[0], a.shape[1], generator=generator).bfloat16() for _ in range(2)]
    a64, b64 = (side.detach().double().requires_grad_() for side in (a, b))
    for cotangent in cotangents:  # two micro-batches
        adapters.accumulate(f"{QUERY}.weight", cotangent)
        (cotangent.double() * (adapters.frozen[f"{QUERY}.weight"].double() + 1.5 * b64 @ a64)).sum().backward()
    for mine, exact in ((a, a64), (b, b64)):
        assert mine.grad is not None
        assert exact.grad is not None
        assert ((mine.grad - exact.grad).norm() / exact.grad.norm()).item() < 1e-6


def test_a_policys_gradient_is_that_of_full_fine_tuning_put_through_the_chain_rule() -> None:
    """Backward through the model, same weights: A and B get s B^T G and s G A^T of the full gradient G, exactly where
    it arrives; frozen parameters have none; the module keeps none."""
    adapted, data = moved(), batch()
    weights = adapted.weights()
    full = Policy(tiny_model(), config(lora=None))
    for policy in (adapted, full):
        policy.run_at(weights)
        (-policy.logprobs(data, range(4)).sum()).backward()
        assert all(p.grad is None for p in policy.module.parameters())
    assert isinstance(adapted.learned, Adapters)
    for name in adapted.learned.trained:
        gradient = full.masters[name].grad
        a, b = (adapted.masters[name.replace(".weight", f".lora_{side}.weight")] for side in "AB")
        assert a.grad is not None
        assert b.grad is not None
        assert gradient is not None
        torch.testing.assert_close(a.grad, 2.0 * b.detach().T @ gradient, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.grad, 2.0 * gradient @ a.detach().T, rtol=1e-5, atol=1e-5)
    learn = {name for name, p in adapted.module.named_parameters() if p.requires_grad}
    assert learn == adapted.learned.trained
    assert len(learn) == 14  # 7 linear layers in each of 2 blocks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_does_not_depend_on_the_micro_batch_split(checkpointing) -> None:
    """One batch of four rows or four of one, with gradient checkpointing over a frozen embedding or without: the
    adapters' gradients agree up to BF16 noise."""
    gradients = []
    for budget, recompute in ((1000, False), (1, checkpointing)):
        policy, data = moved(microbatch_tokens=1000, gradient_checkpointing=recompute), batch()
        policy.config = config(microbatch_tokens=budget)
        for micro in policy.microbatches(data, range(4)):
            (-policy.logprobs(data, micro).sum()).backward()
        gradients.append(torch.cat([m.grad.flatten() for m in policy.masters.values() if m.grad is not None]))
    assert len(gradients[0]) == sum(m.numel() for m in policy.masters.values())
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


@pytest.mark.parametrize("rank", [1, 4])
def test_an_update_has_the_rank_and_leaves_everything_else(rank) -> None:
    """B A has exactly `rank` singular values; the rounded weights that are deployed differ from the base in adapted
    layers only, by s B A up to half a BF16 step; embeddings, head and norms keep their bits."""
    policy = moved(lora=LoraConfig(rank=rank, alpha=8, modules=("q_proj", "down_proj")))
    base, weights = dict(tiny_model().named_parameters()), policy.weights()
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    assert changed == {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")}
    for name in changed:
        a, b = (policy.masters[name.replace(".weight", f".lora_{side}.weight")].detach().double() for side in "AB")
        values = torch.linalg.svdvals(b @ a)
        assert (values > 1e-9 * values[0]).sum() == rank
        exact = base[name].detach().double() + 8 / rank * (b @ a)
        assert ((weights[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()


def test_memory_is_that_of_the_adapters() -> None:
    """Learned parameters are r (in + out) per layer, and AdamW's moments twice that: counted, against full
    fine-tuning, which has 12 bytes per weight."""
    adapted, full = moved(), Policy(tiny_model(), config(lora=None))
    train(full, 1)
    shapes = [tuple(layer.weight.shape) for name, layer in adapted.module.named_modules() if name.endswith("_proj")]
    assert sum(m.numel() for m in adapted.masters.values()) == 4 * sum(rows + columns for rows, columns in shapes)

    def learned_bytes(policy: Policy) -> int:
        moments = [policy.optimizer.state[m][key] for m in policy.masters.values() for key in ("exp_avg", "exp_avg_sq")]
        return sum(t.nbytes for t in [*policy.masters.values(), *moments])

    assert learned_bytes(full) == 12 * sum(p.numel() for p in full.module.parameters())
    assert learned_bytes(adapted) == 12 * sum(m.numel() for m in adapted.masters.values())
    assert learned_bytes(adapted) < 0.06 * learned_bytes(full)


@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_peft_loads_the_adapter_and_merges_to_the_same_bits(tmp_path, dtype, tied) -> None:
    """PeftModel.from_pretrained on the base, merged in FP32 and rounded: our BF16 weights, bit for bit, for a BF16 and
    for an FP32 checkpoint; a BF16 base merged as it is gives them too. No warning about keys that are missing."""
    module = tiny_model(tied=tied)
    if dtype == torch.float32:  # weights that BF16 cannot hold
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data = parameter.data.float() * (1 + 1e-3 * torch.rand(parameter.shape, generator=generator))
    original = copy.deepcopy(module)
    policy = Policy(module, config(), seed=3)
    train(policy, 3)
    assert isinstance(policy.learned, Adapters)
    policy.learned.save(tmp_path / "adapter", base_model="somewhere/base")
    for base in {dtype, torch.float32}:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original).to(base), str(tmp_path / "adapter"))
        merged = dict(loaded.merge_and_unload().named_parameters())
        weights = policy.weights()
        assert merged.keys() == weights.keys()
        differing = [name for name in weights if not torch.equal(merged[name].to(torch.bfloat16), weights[name])]
        assert differing == []
    recorded = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(recorded, peft.LoraConfig)
    assert (recorded.r, recorded.lora_alpha, recorded.base_model_name_or_path) == (4, 8, "somewhere/base")


def test_a_checkpoint_resumes_bit_for_bit_and_holds_adapters_only(tmp_path) -> None:
    """Two updates, a checkpoint, one more: the same weights as three without a break; the files hold the adapters and
    their moments, a thirtieth of the model's."""
    through, broken = moved(), moved()
    folder = save_checkpoint(tmp_path, broken, STATE)
    resumed = Policy(tiny_model(), config(), seed=9)
    load_checkpoint(folder, resumed)
    for policy in (through, resumed):
        train(policy, 1)
    first, second = through.weights(), resumed.weights()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(m, resumed.masters[name]) for name, m in through.masters.items())
    learned = sum(m.nbytes for m in through.masters.values())
    assert (folder / "masters.safetensors").stat().st_size < learned + 8192


def test_a_checkpoint_is_refused_over_another_base(tmp_path) -> None:
    """One frozen weight moved by one BF16 step, or full fine-tuning: an error that names the checkpoint, either way
    round."""
    folder = save_checkpoint(tmp_path / "lora", moved(), STATE)
    other = tiny_model()
    with torch.no_grad():
        other.model.norm.weight[0] *= 1 + 2**-7
    for policy in (Policy(other, config()), Policy(tiny_model(), config(lora=None))):
        with pytest.raises(CheckpointError, match="checkpoint-000002 was made over other frozen weights"):
            load_checkpoint(folder, policy)
    full = save_checkpoint(tmp_path / "full", Policy(tiny_model(), config(lora=None)), STATE)
    with pytest.raises(CheckpointError, match="other frozen weights"):
        load_checkpoint(full, moved())


def test_levers_act_on_the_merged_weights() -> None:
    """Blend: the module runs at W + lambda (Q(W) - W) of the merged W, and the gradient goes straight through to the
    adapters: it is the chain rule of dL/dW there. Distill: its KL's gradient arrives in them too. W stays W."""
    policy, data = moved(), batch()
    target = Target.for_model(TargetSpec.load("int4-g128"), policy.module)
    weights = policy.weights()
    deployed = target.deployed(weights)
    at = blended(weights, deployed, 0.5)
    policy.run_at(at)
    held = dict(policy.module.named_parameters())
    assert torch.equal(held[f"{QUERY}.weight"], at[f"{QUERY}.weight"])
    assert not torch.equal(held[f"{QUERY}.weight"], weights[f"{QUERY}.weight"])
    (-policy.logprobs(data, range(4)).sum()).backward()
    full = Policy(tiny_model(), config(lora=None))
    full.run_at(at)
    (-full.logprobs(data, range(4)).sum()).backward()
    gradient = _gradient(full.masters[f"{QUERY}.weight"])
    a, b = (policy.masters[f"{QUERY}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(_gradient(b), 2.0 * gradient @ a.detach().T, rtol=1e-5, atol=1e-5)
    policy.optimizer.zero_grad()
    assert pull(policy, data, [0, 1], teacher=weights, weights=weights, deployed=deployed, scale=1.0) > 0
    assert _gradient(a).norm() > 0
    assert _gradient(b).norm() > 0
    assert all(torch.equal(policy.weights()[name], weight) for name, weight in weights.items())


def _gradient(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad


@pytest.mark.parametrize(
    ("options", "modules", "message"),
    [
        ({}, ("q_porj",), r"'q_porj' matches no linear layer .* there are down_proj, .*, v_proj"),
        ({}, ("q_proj", "embed_tokens"), "'embed_tokens' matches no linear layer"),
        ({"tied": True}, ("lm_head",), "'lm_head' matches no linear layer"),
        ({"family": "qwen3-moe"}, "all-linear", r"the experts stacked in model\.layers\.0\.mlp\.experts\.gate_up_proj"),
        ({"family": "qwen3-moe"}, ("gate_proj", "up_proj"), "'gate_proj' matches no linear layer"),
        ({"family": "qwen3-moe"}, ("gate",), "'gate' matches no linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options, modules, message) -> None:
    """One line that names the entry and what there is, when the policy is made: before any engine is started."""
    with pytest.raises(LoraError, match=r"^train\.lora\.modules: .*" + message):
        Policy(tiny_model(**options), config(lora=LoraConfig(modules=modules)))


def test_the_attention_of_a_mixture_and_an_untied_head_can_be_adapted() -> None:
    """By name; experts and routers of the mixture keep their bits."""
    lora = LoraConfig(rank=4, alpha=8, modules=("q_proj", "lm_head"))
    policy = Policy(tiny_model(family="qwen3-moe"), config(lora=lora))
    train(policy, 2)
    base, weights = dict(tiny_model(family="qwen3-moe").named_parameters()), policy.weights()
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    assert changed == {"lm_head.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than or equal to 1"),
        ({"modules": "q_proj"}, r"modules must be 'all-linear' or a list of .*, got 'q_proj'"),
        ({"modules": []}, "modules must be 'all-linear' or a list of different names"),
        ({"modules": ["q_proj", "q_proj"]}, "modules must be 'all-linear' or a list of different names"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_the_table_is_checked(table, message) -> None:
    """Refused when the config is read, without torch."""
    with pytest.raises(ValueError, match=message):
        LoraConfig.model_validate(table)
