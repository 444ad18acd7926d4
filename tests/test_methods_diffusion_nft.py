"""DiffusionNFT: who samples, who anchors, what it costs, and what a constant reward does."""

from typing import Any

import pytest
import torch

from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, trained, with_reward
from difftilt.errors import UserError
from difftilt.methods.forward_process.diffusion_nft import behaviour_decay
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.training.protocol import Task

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4}


def task(**changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(**changes)).task())


def test_the_three_schedules_of_the_old_policy() -> None:
    assert [behaviour_decay(0, n) for n in (0, 500)] == [0, 0]
    assert [behaviour_decay(1, n) for n in (0, 100, 900)] == pytest.approx([0, 0.1, 0.5])
    assert [behaviour_decay(2, n) for n in (0, 74, 75, 115, 1000)] == pytest.approx([0, 0, 0, 0.3, 0.999])


def test_the_behaviour_role_samples_not_the_trained_one() -> None:
    plain = loop_of("diffusion-nft", task(), **SMALL)
    moved = loop_of("diffusion-nft", task(), **SMALL)
    with torch.no_grad():
        for parameter in moved.run.roles.parameters("current"):
            parameter.add_(0.1)
        first, second = (loop.method.collect(loop.run) for loop in (plain, moved))
    assert first.x_0 is not None
    assert second.x_0 is not None
    assert torch.equal(first.x_0, second.x_0)


def test_every_sample_is_trained_at_its_own_shuffled_times_of_the_solver() -> None:
    loop = loop_of("diffusion-nft", task(), **SMALL)
    with torch.no_grad():
        edges = loop.method.collect(loop.run).edges
    assert len(edges.step) == 16 * 9
    grid = loop.run.task.sampler.grid[:-1].float()
    assert torch.equal(edges.t, grid[edges.step])
    subsets = {tuple(sorted(edges.step[edges.sample == sample].tolist())) for sample in range(16)}
    assert all(len(subset) == len(set(subset)) == 9 for subset in subsets)
    assert len(subsets) > 1


def test_the_label_is_the_clamped_affine_map_of_the_advantage() -> None:
    loop = loop_of("diffusion-nft", task(), max_advantage=2.0, **SMALL)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    rewards, label = experience.rewards, experience.label
    assert rewards is not None
    assert label is not None
    means = rewards.reshape(4, 4).mean(1).repeat_interleave(4)
    advantage = (rewards - means) / (rewards.std(correction=0) + 1e-4)
    assert torch.allclose(label, (advantage / 4 + 0.5).clamp(0, 1), atol=1e-5)


def test_while_behaviour_equals_current_an_update_runs_two_forwards_not_three() -> None:
    loop = loop_of("diffusion-nft", task(), **SMALL)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    before = loop.run.ledger.copy()
    for phase in loop.method.phases(loop.run):
        loop.updater.run_phase(phase, experience, loop.run.noise)
    cost = loop.run.ledger - before
    rows = len(experience.edges.step)
    assert (cost.gradient_passes, cost.nfe) == (rows, rows)
    # once the trained weights have moved, the old ones need a pass of their own
    before = loop.run.ledger.copy()
    for phase in loop.method.phases(loop.run):
        loop.updater.run_phase(phase, experience, loop.run.noise)
    assert (loop.run.ledger - before).nfe == 2 * rows


def test_a_constant_reward_without_anchor_moves_no_weight() -> None:
    on = with_reward(task(), lambda samples: torch.full((len(samples.media),), 0.7))
    result = trained("diffusion-nft", on, 3, 1e-2, count=32, kl_weight=0.0, ema=0.0, **SMALL)
    assert result.after["kl_reference"] == 0.0


def test_the_anchor_has_no_gradient_at_the_reference_and_one_beyond_it() -> None:
    on = with_reward(task(), lambda samples: torch.full((len(samples.media),), 0.7))
    assert float(gradient("diffusion-nft", on, kl_weight=1.0, **SMALL).norm()) == 0.0
    result = trained("diffusion-nft", task(), 2, 1e-3, count=32, kl_weight=1.0, **SMALL)
    assert result.rows[1]["loss/kl"] > 0


def test_the_velocity_form_and_the_x0_form_differ() -> None:
    x0 = gradient("diffusion-nft", task(), space="x0", kl_weight=0.0, **SMALL)
    velocity = gradient("diffusion-nft", task(), space="velocity", kl_weight=0.0, **SMALL)
    cosine = torch.cosine_similarity(x0, velocity, dim=0)
    assert 0.2 < float(cosine) < 0.999


def test_tokens_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="Gaussian"):
        make_method("diffusion-nft", Sequences(SequencesConfig()).task(), **SMALL)
