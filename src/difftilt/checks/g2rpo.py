"""G2RPO on mixtures: its advantage belongs to its step's own noise, its costs are those counted, it climbs."""

from functools import cache, partial
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.checks.attribution import explained, unrelated
from difftilt.checks.proof import Proof
from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, trained, with_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.completion import ODE, Granularity, Start, complete
from difftilt.sampling.protocol import Edges, Moment
from difftilt.sampling.rollout import rollout, start_state
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop, train_task
from difftilt.training.protocol import Task

STEPS, SHIFT = 10, 3.0
MEASURED = (0, 2, 4, 6, 8)
"""Steps whose attribution is measured."""
SMALL: dict[str, Any] = {"groups": 4, "group_size": 6}


def _ring() -> Task:
    """The ring of eight modes with its exact velocity, reward -|x - (2, 0)|."""
    return Mixtures(MixturesConfig(steps=STEPS, shift=SHIFT)).task()


def _moved() -> Task:
    """Four classes, and weights that a gradient reaches."""
    return perturbed(Mixtures(MixturesConfig(classes=4, steps=STEPS, shift=SHIFT)).task())


def _collected(name: str, task: Task, **settings: Any) -> tuple[Loop, Experience]:
    loop = loop_of(name, task, 256, **settings)
    with torch.no_grad():
        return loop, loop.method.collect(loop.run)


def identity_gap(step: int) -> float:
    """Relative gap of the gradient to Flow-GRPO's with the window {step}, one start and the same statistics."""
    common: dict[str, Any] = {**SMALL, "updates": 1, "ddof": 1, "std_eps": 1e-8, "kl_weight": 0.1, "clip_range": 0.1}
    own = gradient("g2rpo", _moved(), trained_steps=(step,), granularities=(1,), **common)
    window = {"width": 1, "low": step, "high": step + 1}
    chain = gradient("flow-grpo", _moved(), window=window, share_start=True, output="x0", **common)
    return float((own - chain).norm() / chain.norm())


def cost_gap(trained_steps: tuple[int, ...], granularities: tuple[int, ...]) -> float:
    """Largest gap of an iteration's evaluations, gradient passes, rewards and updates to the count.

    Evaluations are prompts·(T + Σ_k G·Σ_n ceil((T - k - 1)/n)); granularities n of at least T - k - 1 are one schedule,
    counted once.
    """
    loop = loop_of("g2rpo", _moved(), trained_steps=trained_steps, granularities=granularities, **SMALL)
    loop.iterate(0)
    ends = [{(k, min(n, STEPS - k - 1)) for n in granularities} for k in trained_steps]
    left = sum(-(-(STEPS - k - 1) // n) for different in ends for k, n in different)
    views = SMALL["group_size"] * sum(len(different) for different in ends)
    row, prompts = loop.rows[0], SMALL["groups"]
    gaps = (
        row["nfe"] - prompts * (STEPS + SMALL["group_size"] * left),
        row["gradient_passes"] - prompts * len(trained_steps),
        row["reward_calls"] - prompts * (views + 1),
        row["updates"] - len(trained_steps),
    )
    return max(abs(gap) for gap in gaps)


def anchor_gap() -> float:
    """Largest difference between the states that samples start from and the plain ODE from the shared noise."""
    loop, experience = _collected("g2rpo", _moved(), **SMALL)
    edges, steps = experience.edges, len(experience.edges.step.unique())
    run = loop.run
    prompt = experience.group[edges.sample] // steps
    states: dict[int, Tensor] = {}

    def keep(moment: Moment, x_s: Tensor) -> None:
        states[int(moment.position)] = moment.x_t

    with torch.no_grad():
        x = start_state(run.task.model.process, run.noise, prompt, run.task.model.shape)
        condition = experience.rows(torch.arange(len(prompt))).condition
        grid = run.task.sampler.grid
        rollout(run.denoiser("current"), ODE, grid, x, condition, noise=run.noise, index=prompt, observe=keep)
    expected = torch.stack([states[k] for k in range(STEPS)])[edges.step, torch.arange(len(prompt))]
    assert edges.x_t is not None
    return float((edges.x_t - expected).abs().max())


def completion_gap() -> float:
    """Largest difference between the samples and a second completion of their states at s: nothing else is drawn."""
    loop, experience = _collected("g2rpo", _moved(), **SMALL)
    gap = 0.0
    for step in experience.edges.step.unique().tolist():
        rows = (experience.edges.step == step).nonzero()[:, 0]
        (again,) = _completed(loop, experience, rows, 1, "x0")
        assert experience.x_0 is not None
        gap = max(gap, float((again - experience.x_0[experience.edges.sample[rows]]).abs().max()))
    return gap


def _completed(loop: Loop, experience: Experience, rows: Int[Tensor, " rows"], skip: int, output: Any) -> list[Tensor]:
    """The states at s of edges of one step, completed."""
    part = experience.rows(rows)
    assert part.edges.x_s is not None
    times = Granularity(skip)(loop.run.task.sampler.grid, int(part.edges.step[0]) + 1)
    with torch.no_grad():
        start = Start(part.edges.x_s, part.condition, tuple(times.tolist()))
        return complete(loop.run.denoiser("current"), [start], output=output)


def fake_noise() -> float:
    """Mean distance from granularity 2 to granularity 1 with the last state decoded, over that with the prediction.

    After step 1 the schedule of granularity 2 ends short of the data.
    """
    loop, experience = _collected("g2rpo", _ring(), trained_steps=(1,), groups=16, group_size=16)
    rows = torch.arange(256)
    (fine,), (predicted,), (state,) = (
        _completed(loop, experience, rows, skip, output) for skip, output in ((1, "x0"), (2, "x0"), (2, "state"))
    )
    return float((state - fine).norm(dim=1).mean() / (predicted - fine).norm(dim=1).mean())


def schedule_gap(scale: float, offset: float) -> float:
    """Largest change of an advantage when the reward also depends on which completion it is asked for."""
    task, calls = _moved(), count()

    def biased(samples: Samples) -> Tensor:
        call = next(calls)
        return (1 + scale * call) * task.reward.score(samples) + offset * call

    plain, other = (_collected("g2rpo", one, **SMALL)[1] for one in (task, with_reward(task, biased)))
    assert plain.edges.advantage is not None
    assert other.edges.advantage is not None
    return float((plain.edges.advantage - other.edges.advantage).abs().max())


@cache
def attribution(scheme: str) -> Float[Tensor, " steps"]:
    """R² of a linear fit, in each group of 24, of the advantage at each measured step on the noise of that step."""
    settings: dict[str, Any] = {"groups": 100, "group_size": 24}
    if scheme == "broadcast":
        loop, experience = _collected("flow-grpo", _ring(), share_start=True, **settings)
    else:
        granularities = (1,) if scheme == "singular" else (1, 2, 3)
        settings |= {"trained_steps": MEASURED, "granularities": granularities}
        loop, experience = _collected("g2rpo", _ring(), **settings)
    edges = experience.edges
    noise = loop.run.noise.normal(experience.index[edges.sample], (2,), purpose="step", step=edges.step)
    group = experience.group[edges.sample]
    return torch.tensor([_own_noise(edges, noise, group, step, scheme == "shuffled") for step in MEASURED])


def _own_noise(edges: Edges, noise: Tensor, group: Tensor, step: int, shuffle: bool) -> float:
    """The fit at one step, in groups of 24."""
    assert edges.advantage is not None
    rows = (edges.step == step).nonzero()[:, 0]
    rows = rows[group[rows].argsort(stable=True)]
    drawn = noise[rows].reshape(-1, 24, 2)
    return explained(edges.advantage[rows, 0].reshape(-1, 24), unrelated(drawn) if shuffle else drawn)


def ring_reward(name: str, seeds: int, **settings: Any) -> float:
    """Mean reward of 1024 samples after 60 iterations of one group of 8; -2.49 before."""
    common: dict[str, Any] = {"groups": 1, "group_size": 8, "clip_range": 0.2, "ema": 0.0, "kl_weight": 0.0}
    total = 0.0
    for seed in range(seeds):
        task = _ring()
        config = TrainingConfig(
            iterations=60,
            seed=seed,
            forward_batch=64,
            evaluate_every=0,
            evaluation_samples=1024,
            optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
        )
        total += train_task(task, make_method(name, task, **{**common, **settings}), config).after["reward"]
    return total / seeds


def climbed() -> float:
    """Reward of the ring after 30 iterations with the settings of the recipe."""
    settings: dict[str, Any] = {"groups": 4, "group_size": 12, "clip_range": 0.2, "ema": 0.0}
    return trained("g2rpo", _ring(), 30, 1e-3, **settings).after["reward"]


PROOFS = (
    Proof(
        "with one trained step and granularity 1 the gradient is Flow-GRPO's with that window and one start, step 0",
        partial(identity_gap, 0),
        at_most=1e-5,
    ),
    Proof("the same for step 8, the last that can be trained", partial(identity_gap, 8), at_most=1e-5),
    Proof(
        "evaluations, gradient passes, rewards and updates are those counted: steps 0 to 4, granularities 1, 2, 3",
        partial(cost_gap, (0, 1, 2, 3, 4), (1, 2, 3)),
        at_most=0.0,
    ),
    Proof(
        "the same for steps 1 and 8 and granularities 1 and 4",
        partial(cost_gap, (1, 8), (1, 4)),
        at_most=0.0,
    ),
    Proof("samples start from the very states of the ODE of their prompt's noise", anchor_gap, at_most=0.0),
    Proof("after its one noisy step a sample is determined: completed again it is the same", completion_gap, at_most=0),
    Proof(
        "a term of the reward that depends on the completion's schedule only changes no advantage, offset 8 per view",
        partial(schedule_gap, 0.0, 8.0),
        at_most=1e-3,
    ),
    Proof("nor does a scale of its own for each view", partial(schedule_gap, 3.0, 0.0), at_most=1e-3),
    Proof(
        "where a schedule ends short of the data the last state is further from the sample than the prediction",
        fake_noise,
        at_least=1.0,
    ),
    Proof(
        "the step's own noise explains most of the advantage, one granularity: smallest R² over steps 0, 2, 4, 6, 8",
        lambda: float(attribution("singular").min()),
        at_least=0.6,
    ),
    Proof(
        "with all steps noisy and one advantage for all (the idea removed) it does not: smallest ratio of the two R²",
        lambda: float((attribution("singular") / attribution("broadcast")).min()),
        at_least=3.0,
    ),
    Proof(
        "three granularities explain no less than one at any step: smallest difference of R²",
        lambda: float((attribution("multi") - attribution("singular")).min()),
        at_least=-0.02,
    ),
    Proof(
        "and more on average",
        lambda: float((attribution("multi") - attribution("singular")).mean()),
        at_least=0.03,
    ),
    Proof(
        "chance: with the noise of another member of the group R² is 2/23 = 0.087",
        lambda: float(attribution("shuffled").mean()),
        at_least=0.06,
        at_most=0.115,
    ),
    Proof("on the ring the reward -|x - (2, 0)| rises from -2.49 in 30 iterations", climbed, at_least=-1.2, long=True),
    Proof(
        "one group of 8, 60 iterations: reward less Flow-GRPO's, one granularity, at five times its optimiser steps",
        lambda: ring_reward("g2rpo", 2, granularities=(1,)) - ring_reward("flow-grpo", 2, updates=1),
        at_least=0.0,
        long=True,
    ),
)
