"""B²-DiffuRL: what branches share, how much of the reward's variance they explain, and training on a sparse reward."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.checks.attribution import explained
from difftilt.checks.flow_grpo import WIDTH, closed_chain
from difftilt.checks.proof import Proof
from difftilt.checks.trial import loop_of, make_method, perturbed, with_reward
from difftilt.methods.policy_gradient.b2_diffurl import B2DiffuRL, Config
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import flow_sde
from difftilt.sampling.protocol import Moment, Trajectory
from difftilt.sampling.rollout import Plan, rollout, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.sampling.windows import interval_length
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import PromptBatch
from difftilt.training.loop import train_task
from difftilt.training.protocol import Run

GROUPS, SIZE, STEPS = 300, 12, 20
RING = MixturesConfig(steps=STEPS, shift=3.0)


def _groups(noise_level: float, length: int) -> tuple[Float[Tensor, "groups size"], list[Tensor]]:
    """Rewards of branch groups on the ring, and the noise that each step drew; length 0 is independent chains."""
    task, noise, seen = Mixtures(RING).task(), Noise(1), list[Tensor]()

    def watch(moment: Moment, x_s: Tensor) -> None:
        assert isinstance(moment.step, GaussianStep)
        seen.append((x_s - moment.step.mean) / moment.step.std[:, None])

    index = torch.arange(GROUPS) * SIZE if length else torch.arange(GROUPS * SIZE)
    plan = Plan(branch={STEPS - length: SIZE}) if length else Plan()
    loop = loop_of("flow-grpo", task, 1024)
    with torch.no_grad():
        x = start_state(task.model.process, noise, index, task.model.shape)
        denoise, preset = loop.run.denoiser("current"), flow_sde(noise_level)
        grid = task.sampler.grid
        done = rollout(denoise, preset, grid, x, None, noise=noise, index=index, plan=plan, observe=watch)
        rewards = task.reward.score(Samples(done.x_0, [""] * len(done.x_0), [""] * len(done.x_0), done.root, None))
    return rewards.double().reshape(GROUPS, SIZE), seen


def inside_groups(noise_level: float, length: int) -> float:
    """Share of the reward's variance that is left within groups: E[Var(R | x_{T-L})]/Var(R)."""
    rewards = _groups(noise_level, length)[0]
    return float(rewards.var(1).mean() / rewards.var())


def smallest_rise(noise_level: float) -> float:
    """Of that share from the last 6 to 10, to 14, to all 20 steps, and from there to independent chains."""
    shares = [inside_groups(noise_level, length) for length in (6, 10, 14, 20, 0)]
    return min(late - early for early, late in pairwise(shares))


def closed_form_gap(length: int) -> float:
    """Variance within branch groups against its closed form, in standard errors, for x_0 of a Gaussian in 10 steps.

    The exact chain is affine, so Var(x_0 | x_{T-L}) is the sum of (gain·std)² over the interval.
    """
    task = Mixtures(MixturesConfig(means=((0.0,),), std=WIDTH, steps=10, shift=3.0)).task()
    index, noise = torch.arange(GROUPS) * SIZE, Noise(2)
    with torch.no_grad():
        x = start_state(task.model.process, noise, index, (1,))
        denoise, plan = loop_of("flow-grpo", task, 1024).run.denoiser("current"), Plan(branch={10 - length: SIZE})
        grid = task.sampler.grid
        x_0 = rollout(denoise, flow_sde(0.7), grid, x, None, noise=noise, index=index, plan=plan).x_0
    inside = x_0.double().reshape(GROUPS, SIZE).var(1)
    expected = (torch.stack(closed_chain()).prod(0)[10 - length :] ** 2).sum()
    return float((inside.mean() - expected).abs() / (expected * (2 / (GROUPS * (SIZE - 1))) ** 0.5))


def own_noise(length: int, step: int) -> float:
    """Share of the variance within groups that the noise of one step explains by linear regression; chance is 2/11."""
    rewards, noise = _groups(0.7, length)
    return explained(rewards, noise[step].reshape(GROUPS, SIZE, 2))


def branch_share(length: int) -> float:
    """Mean of :func:`own_noise` over the first three steps of the interval."""
    return sum(own_noise(length, STEPS - length + step) for step in range(3)) / 3


def chain_share() -> float:
    """The same of independent chains, at the same steps as for the interval of 6."""
    return sum(own_noise(0, STEPS - 6 + step) for step in range(3)) / 3


def frozen_prefix() -> float:
    """Largest difference between the branch states of a group's members, plus the number of edges before the interval.

    NaN if the members do not part after it.
    """
    loop = loop_of("b2-diffurl", perturbed(Mixtures(RING).task()), groups=4, kernel="flow_sde", noise_level=0.7)
    with torch.no_grad():
        edges = loop.method.collect(loop.run).edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    at = edges.step == STEPS - 14
    start, end = edges.x_t[at].reshape(4, 5, -1), edges.x_s[at].reshape(4, 5, -1)
    parted = bool((end[:, 1:] != end[:, :1]).any(-1).all())
    gap = (start - start[:, :1]).abs().max() + (edges.step < STEPS - 14).sum()
    return float(gap) if parted else float("nan")


def schedule() -> float:
    """Stages, of 100, at which L differs from the published 14 for stages 0 to 14, ..., 20 for 86 to 99, or falls."""
    lengths = [interval_length(stage, 100, 14, 20) for stage in range(100)]
    wrong = sum(lengths[stage] != 14 for stage in range(15)) + sum(lengths[stage] != 20 for stage in range(86, 100))
    return float(wrong + sum(late < early for early, late in pairwise(lengths)))


class _Chains(B2DiffuRL):
    """The ablation without branches: members of a group are independent chains."""

    def roll(self, run: Run, batch: PromptBatch) -> Trajectory:
        x = start_state(run.task.model.process, run.noise, batch.index, run.task.model.shape)
        plan, denoise = replace(self.plan(run.iteration), branch={}), run.denoiser("current")
        return rollout(
            denoise, self.preset, self.grid, x, batch.condition, noise=run.noise, index=batch.index, plan=plan
        )


def _hit(samples: Samples) -> Float[Tensor, " samples"]:
    """1 inside a disc of radius 0.5 around the mode at (2, 0), else 0: an eighth of the base's samples."""
    centre: Int[Tensor, " two"] = torch.tensor([2, 0])
    return ((samples.media - centre).norm(dim=1) < 0.5).float()


@cache
def sparse(progressive: bool, branches: bool, seeds: int = 1) -> tuple[float, float]:
    """(hits, mean distance between samples) over the last five of 60 stages of 24 groups of 5, mean over seeds."""
    found: list[tuple[float, float]] = []
    settings: dict[str, Any] = {"groups": 24, "kernel": "flow_sde", "noise_level": 0.7, "updates": 1, "stages": 60}
    settings |= {} if progressive else {"shortest": STEPS}
    for seed in range(seeds):
        task = with_reward(Mixtures(RING).task(), _hit)
        method = make_method("b2-diffurl", task, **settings)
        if not branches:
            method = _Chains(Config(**settings), task)
        optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.0)
        config = TrainingConfig(
            iterations=60, seed=seed, forward_batch=1024, evaluate_every=0, evaluation_samples=64, optimizer=optimizer
        )
        rows = train_task(task, method, config, None).rows[-5:]
        found.append(tuple(sum(row[name] for row in rows) / 5 for name in ("reward_mean", "diversity")))  # type: ignore[arg-type]
    return sum(hits for hits, _ in found) / seeds, sum(spread for _, spread in found) / seeds


PROOFS = (
    Proof("members of a group are bit-equal where they part, and no edge is before the interval", frozen_prefix, 0, 0),
    Proof("L rises from 14 (stages 0 to 14) to 20 (stages 86 to 99): stages that differ", schedule, 0, 0),
    *(
        Proof(
            f"variance of x_0 within branch groups of an exact Gaussian, last {length} of 10 steps, in standard errors",
            lambda length=length: closed_form_gap(length),
            at_most=4,
        )
        for length in (3, 6, 9)
    ),
    Proof(
        "share of the ring's reward variance within branch groups, last 6 of 20 steps, a = 0.3: the rest is not theirs",
        lambda: inside_groups(0.3, 6),
        at_most=0.1,
    ),
    Proof("the same at a = 0.7", lambda: inside_groups(0.7, 6), at_most=0.3),
    # a group of the whole chain still shares its start
    Proof("that share rises with the interval: smallest rise, a = 0.3", lambda: smallest_rise(0.3), at_least=0.05),
    Proof("of independent chains all variance is within groups", lambda: inside_groups(0.7, 0), 0.95, 1.05),
    Proof(
        "of that within groups, the noise of an early step of the interval explains more than chance (0.18), L = 6",
        lambda: branch_share(6),
        at_least=2 / 11 + 0.05,
    ),
    Proof("among independent chains it explains what chance does", chain_share, 2 / 11 - 0.05, 2 / 11 + 0.05),
    Proof(
        "share of samples that hit a small disc, the only place with a reward, after 60 stages of 120; 0.12 before",
        lambda: sparse(True, True)[0],
        at_least=0.4,
        long=True,
    ),
    Proof(
        "distance between samples after that, over that left by whole chains without branches",
        lambda: sparse(True, True)[1] / sparse(False, False)[1],
        at_least=1.1,
        long=True,
    ),
)
