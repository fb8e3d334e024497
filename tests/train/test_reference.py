"""The frozen initial policy: its log-probs, and that using it changes nothing else."""

from __future__ import annotations

import torch

from tests.tiny import tiny_model
from tests.train.test_policy import batch, config
from train.checkpoint import load_checkpoint, save_checkpoint
from train.loss import reference_kl
from train.policy import Policy
from train.reference import Reference
from train.trainer import initial_state


def moved(policy: Policy) -> None:
    """Move the masters and the module by a few steps' worth."""
    with torch.no_grad():
        for i, master in enumerate(policy.masters.values()):
            master.add_(0.02 * torch.randn(master.shape, generator=torch.Generator().manual_seed(i)))
    policy.run_at(policy.weights())


def test_it_keeps_the_start_and_leaves_the_policy_alone() -> None:
    """After the policy has moved, the reference's log-probs are the start's, bit for bit; the policy's are its own
    before and after; and a gradient whose graph was made before the reference ran is the same as without."""
    policy, data = Policy(tiny_model(), config()), batch()
    rows = [0, 1, 2, 3]
    with torch.no_grad():
        start = policy.logprobs(data, rows)
    reference = Reference(policy)
    moved(policy)
    gradients = []
    for used in (False, True):
        logprobs = policy.logprobs(data, rows)
        if used:
            found = reference.logprobs(policy, data, rows)
            assert torch.equal(found, start)
            assert not found.requires_grad
        reference_kl(logprobs, start, data.mask).sum().backward()
        gradients.append({name: m.grad.clone() for name, m in policy.masters.items() if m.grad is not None})
        policy.optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(policy.logprobs(data, rows), logprobs.detach())
    assert not torch.equal(logprobs, start)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_a_resumed_run_has_the_same_reference(tmp_path) -> None:
    """A checkpoint of a moved policy loaded into a fresh one: the reference made then is still the start."""
    policy = Policy(tiny_model(), config())
    start = policy.weights()
    moved(policy)
    saved = save_checkpoint(tmp_path, policy, initial_state(policy.config))
    fresh = Policy(tiny_model(), config())
    load_checkpoint(saved, fresh)
    reference = Reference(fresh)
    assert reference.weights.keys() == start.keys()
    assert all(torch.equal(reference.weights[name], start[name]) for name in start)
    assert not all(torch.equal(fresh.weights()[name], start[name]) for name in start)
