"""Each method hands the right weights, settings and noise to its loss: rows against the papers' formulas by hand.

All roles differ from one another and no setting is the default, so that a mistaken role or an ignored setting shows.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difftilt.checks.trial import loop_of, perturbed
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Task

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4}
GUIDANCE, A = 2.5, 0.6


def guided_task() -> Task:
    task = perturbed(Mixtures(MixturesConfig(classes=4)).task())
    return replace(task, sampler=replace(task.sampler, guidance=GUIDANCE))


def scatter(loop: Loop, *roles: str) -> None:
    """Move the weights of every role by noise of its own."""
    for place, role in enumerate(roles):
        generator = torch.Generator().manual_seed(place + 1)
        network = loop.run.roles.network(role)
        assert isinstance(network, nn.Module)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    loop.run.roles.stepped("current")


def collected(loop: Loop) -> Experience:
    with torch.no_grad():
        return loop.method.collect(loop.run)


def velocity(loop: Loop, role: str, x_t: Tensor, t: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
    network = loop.run.roles.network(role)
    conditional = network(x_t, t, labels)
    if guidance == 1.0:
        return conditional
    null = network(x_t, t, torch.full_like(labels, 4))
    return null + guidance * (conditional - null)


def step_of(v: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the Flow-SDE step as the paper writes them."""
    dt = s - t
    sigma = A * (t / (1 - torch.where(t == 1, s, t))).sqrt()
    mean = x * (1 + sigma**2 / (2 * t) * dt)[:, None] + v * ((1 + sigma**2 * (1 - t) / (2 * t)) * dt)[:, None]
    return mean, sigma * (-dt).sqrt()


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std[:, None]).log_prob(x).mean(1)


def flow_terms(loop: Loop, rows: Experience, objective: str, clip: float, kl: str) -> dict[str, Tensor]:
    edges = rows.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.s is not None
    assert edges.log_prob is not None
    assert edges.advantage is not None
    t, s, advantage = edges.t, edges.s, edges.advantage[:, 0]
    v = velocity(loop, "current", edges.x_t, t, rows.condition, GUIDANCE)
    v_ref = velocity(loop, "reference", edges.x_t, t, rows.condition, GUIDANCE)
    mean, std = step_of(v, edges.x_t, t, s)
    mean_ref, _ = step_of(v_ref, edges.x_t, t, s)
    log_prob = log_density(edges.x_s, mean, std)
    log_ratio = log_prob - edges.log_prob
    if objective == "guard":
        assert edges.mean is not None
        log_ratio = std * (log_ratio + (mean - edges.mean).square().mean(1) / (2 * std**2))
    rho = log_ratio.exp()
    policy = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip, 1 + clip))
    policy = -advantage * log_prob if objective == "reinforce" else policy
    policy = policy / (t - s) if objective == "guard" else policy
    gap = (mean - mean_ref).square().mean(1)
    penalties = {
        "exact": gap / (2 * std**2),
        "flow_grpo": gap / (2 * std**2) * (t - s),
        "velocity": (v - v_ref).square().mean(1),
        "mean": gap,
    }
    return {"policy": policy, "kl": penalties[kl]}


@pytest.mark.parametrize(
    ("objective", "kl"),
    [("clipped", "exact"), ("clipped", "flow_grpo"), ("guard", "velocity"), ("reinforce", "mean")],
)
def test_flow_grpo_off_policy_under_guidance(objective: str, kl: str) -> None:
    clip = 0.002 if objective == "guard" else 0.03
    settings: dict[str, Any] = {
        "objective": objective,
        "kl": kl,
        "kl_weight": 0.3,
        "clip_range": clip,
        "noise_level": A,
    }
    loop = loop_of("flow-grpo", guided_task(), **SMALL, **settings)
    experience = collected(loop)
    scatter(loop, "current", "reference")
    (phase,) = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    loss = phase.loss(rows, loop.run.noise)
    expected = flow_terms(loop, rows, objective, clip, kl)
    assert torch.allclose(loss.terms["policy"].value, expected["policy"], rtol=1e-3, atol=1e-4)
    assert torch.allclose(loss.terms["kl"].value, expected["kl"], rtol=1e-3, atol=1e-5)
    assert loss.terms["kl"].weight == 0.3
    assert 0.05 < float(loss.metrics["clip_fraction"].double().mean()) < 1


def test_the_learned_baseline_is_subtracted() -> None:
    loop = loop_of("flow-grpo", guided_task(), **SMALL, value_baseline=True, objective="reinforce", kl_weight=0.0)
    experience = collected(loop)
    policy, value = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    assert rows.edges.advantage is not None
    guess = loop.run.roles.module("value")(rows.edges.x_t, rows.edges.t, rows.prompt)[:, 0]
    target = rows.edges.advantage[:, 0]
    assert torch.allclose(value.loss(rows, loop.run.noise).terms["value"].value, (target - guess).square())
    assert rows.edges.log_prob is not None
    policy_rows = policy.loss(rows, loop.run.noise).terms["policy"].value
    assert torch.allclose(policy_rows, -(target - guess) * rows.edges.log_prob, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["x0", "velocity"])
def test_diffusion_nft_with_all_roles_apart(space: str) -> None:
    settings: dict[str, Any] = {"nft_beta": 0.4, "max_advantage": 3.0, "kl_weight": 0.2, "space": space}
    loop = loop_of("diffusion-nft", guided_task(), **SMALL, **settings)
    experience = collected(loop)
    scatter(loop, "current", "reference", "behaviour")
    (phase,) = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    loss = phase.loss(rows, loop.run.noise)
    assert rows.x_0 is not None
    assert rows.label is not None
    t, x_0 = rows.edges.t[:, None], rows.x_0
    eps = loop.run.noise.normal(rows.index, (2,), purpose="renoise", step=rows.edges.step)
    x_t = (1 - t) * x_0 + t * eps
    now, old, frozen = (
        velocity(loop, role, x_t, rows.edges.t, rows.condition) for role in ("current", "behaviour", "reference")
    )
    errors: list[Tensor] = []
    for branch in (0.4 * now + 0.6 * old, 1.4 * old - 0.4 * now):
        gap = x_t - t * branch - x_0 if space == "x0" else branch - (eps - x_0)
        weight = gap.abs().mean(1).clamp(min=1e-5) if space == "x0" else torch.ones(len(gap))
        errors.append(gap.square().mean(1) / weight)
    expected = 3.0 * (rows.label * errors[0] + (1 - rows.label) * errors[1]) / 0.4
    assert torch.allclose(loss.terms["policy"].value, expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(loss.terms["kl"].value, (now - frozen).square().mean(1), rtol=1e-3, atol=1e-5)
    assert loss.terms["kl"].weight == 0.2


def test_nft_noise_is_new_for_every_time_sample_and_iteration() -> None:
    loop = loop_of("diffusion-nft", guided_task(), **SMALL)
    experience = collected(loop)
    (phase,) = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    first = phase.loss(rows, loop.run.noise).terms["policy"].value
    again = phase.loss(rows, loop.run.noise).terms["policy"].value
    later = phase.loss(rows, loop.run.noise.at(1)).terms["policy"].value
    assert torch.equal(first, again)
    assert not bool((first == later).any())


def test_nft_samples_and_is_evaluated_without_guidance() -> None:
    loop = loop_of("diffusion-nft", guided_task(), **SMALL)
    before = loop.run.ledger.copy()
    collected(loop)
    assert (loop.run.ledger - before).nfe == 16 * 10  # guidance would double it
    assert loop.method.sampler(loop.run.task).guidance == 1.0


@pytest.mark.parametrize(("schedule", "decay"), [(0, 0.0), (1, 0.001)])
def test_nft_behaviour_follows_by_the_schedule(schedule: int, decay: float) -> None:
    loop = loop_of("diffusion-nft", guided_task(), **SMALL, behaviour_decay=schedule, ema=0.5)
    before = loop.run.roles.state_dict()
    scatter(loop, "current")
    moved = {name: value.clone() for name, value in loop.run.roles.state_dict().items()}
    loop.updater.steps["current"] = 1
    loop.updater.follow()
    after = loop.run.roles.state_dict()
    for name in (name for name in after if name.startswith("behaviour/") and name.endswith("weight")):
        plain = name.removeprefix("behaviour/")
        expected = decay * before[name] + (1 - decay) * moved[f"current/{plain}"]
        assert torch.allclose(after[name], expected, atol=1e-7)
        lagging = min(2 / 11, 0.5)
        smooth = lagging * before[f"ema/{plain}"] + (1 - lagging) * moved[f"current/{plain}"]
        assert torch.allclose(after[f"ema/{plain}"], smooth, atol=1e-7)


@pytest.mark.parametrize("name", ["flow-grpo", "diffusion-nft"])
def test_the_averaged_weights_are_the_ones_evaluated(name: str) -> None:
    loop = loop_of(name, guided_task(), **SMALL)
    scatter(loop, "current")
    assert loop.evaluate(0).numbers["kl_reference"] == 0.0
    loop.run.roles.blend("ema", "current", 0.0)
    assert loop.evaluate(0).numbers["kl_reference"] > 0.0


def test_flow_grpo_averages_every_eight_steps_with_the_capped_decay() -> None:
    loop = loop_of("flow-grpo", guided_task(), **SMALL, ema=0.3)
    spec = loop.method.roles()["ema"]
    assert getattr(spec, "every", None) == 8
    decay = getattr(spec, "decay", None)
    assert decay is not None
    assert decay(8) == pytest.approx(0.3)
    assert decay(1) == pytest.approx(2 / 11)
