"""Values learned from states of base trajectories and what became of them (SVDD-MC, arXiv 2408.08252).

The states of a rollout have the law that a steerer's kernel gives them, those at t = 0 included; the reward at the end
is the target of all states of its chain, or, bootstrapped, the value of several next states of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from difftilt.models.protocol import Denoiser
from difftilt.process.protocol import Condition
from difftilt.sampling.noise import Apart, copies
from difftilt.sampling.protocol import Moment, NoiseSource, Sampler
from difftilt.sampling.rollout import sample_by_kernel, step_noise
from difftilt.statistics.correlation import correlation
from difftilt.trees import Batched, join, take
from difftilt.values.estimates import average
from difftilt.values.learned import Regression, ValueFunction, chosen, descend, regression_loss


@dataclass(frozen=True)
class States(Batched):
    """States of base trajectories, noise first; those of one time stand together, in the order of their chains.

    Attributes:
        x: each state.
        t: its time.
        condition: what is kept of its condition.
        reward: r(x_0) that its chain ended with.
        s: the next time; 0 at the end.
        ahead: next states drawn from the kernel at each state, (states, draws, *shape); at the end copies of the state.
            None where none were drawn.
    """

    x: Shaped[Tensor, "states *shape"]
    t: Float[Tensor, " states"]
    condition: Condition
    reward: Float[Tensor, " states"]
    s: Float[Tensor, " states"]
    ahead: Shaped[Tensor, "states draws *shape"] | None = None


def record_states(
    denoise: Denoiser,
    sampler: Sampler,
    x: Shaped[Tensor, "rows *shape"],
    condition: Condition,
    reward: Callable[[Tensor], Tensor],
    *,
    noise: NoiseSource,
    index: Int[Tensor, " rows"],
    kept: Condition = None,
    draws: int = 0,
) -> States:
    """All states of plain stochastic rollouts, t = 1 and t = 0 among them; further draws of a step cost no evaluation.

    Args:
        denoise: the base model, counted.
        sampler: its grid and kernel.
        x: at the noise end.
        condition: one row per state.
        reward: of finished samples; rollouts whose reward is NaN are left out.
        noise: of the rollouts.
        index: of each row.
        kept: what is recorded as condition of each row.
        draws: next states to draw beside the one that the rollout takes.
    """
    seen: list[States] = []
    unknown = torch.zeros(len(x), device=x.device)

    def observe(moment: Moment, x_s: Tensor) -> None:
        ahead = _ahead(moment, Apart(noise, "ahead"), draws) if draws else None
        seen.append(States(moment.x_t, moment.t, kept, unknown, moment.s, ahead))

    with torch.no_grad():
        x_0 = sample_by_kernel(denoise, sampler, x, condition, noise=noise, index=index, observe=observe).x_0
    still = x_0[:, None].expand(-1, draws, *x_0.shape[1:]) if draws else None
    end = torch.zeros_like(seen[0].t)
    rewards = reward(x_0)
    known = rewards.isfinite().nonzero()[:, 0]
    return join(
        [take(replace(part, reward=rewards), known) for part in [*seen, States(x_0, end, kept, unknown, end, still)]]
    )


def _ahead(moment: Moment, noise: NoiseSource, draws: int) -> Shaped[Tensor, "rows draws *shape"]:
    """Draws of the step's law, without another evaluation."""
    again, index = copies(moment.index, draws)
    step, position = take(moment.step, again), int(moment.position)
    found = step.draw(step_noise(step, noise, index, position))
    return found.reshape(len(moment.index), draws, *found.shape[1:])


def fit_states(
    network: nn.Module,
    states: States,
    noise: NoiseSource,
    *,
    temperature: float,
    kind: Regression = "stationary",
    updates: int = 1000,
    batch: int = 256,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Fit ``network(x_t, t, condition)`` in place to recorded states; returns the loss of each update.

    The target of a state is the reward of its chain; where next states were drawn it is their value by the network
    itself, averaged as the Bellman equation of ``kind`` asks, exp(v_t/β) = E[exp(v_s/β) | x_t] or v_t = E[v_s | x_t],
    and the reward only at t = 0. No gradient flows through a target.

    Args:
        network: any module of that signature.
        states: recorded; not empty.
        noise: of the choice of rows.
        temperature: β of the soft value.
        kind: see :func:`regression_loss`.
        updates: optimiser steps (Adam, cosine decay of the learning rate).
        batch: rows per update.
        learning_rate: at the start.
    """
    index, ceiling = torch.arange(batch, device=states.t.device), float(states.reward.max())

    def loss(update: int) -> Tensor:
        rows = take(states, chosen(len(states.t), index, noise, "states", update))
        goal = rows.reward if rows.ahead is None else bootstrapped(network, rows, temperature, kind != "mean")
        value = network(rows.x, rows.t, rows.condition)
        return regression_loss(value, goal.to(value), temperature, kind, ceiling).mean()

    return descend(network, loss, updates, learning_rate)


@torch.no_grad()
def bootstrapped(network: ValueFunction, states: States, temperature: float, soft: bool) -> Float[Tensor, " states"]:
    """The mean (``soft``: β·log mean exp(·/β)) of the network over the next states, the reward at t = 0."""
    assert states.ahead is not None
    draws = states.ahead.shape[1]
    again, _ = copies(torch.arange(len(states.t), device=states.t.device), draws)
    value = network(states.ahead.flatten(0, 1), states.s[again], take(states.condition, again))
    return torch.where(states.t > 0, average(value.reshape(-1, draws), temperature, soft), states.reward.double())


def value_correlations(value: ValueFunction, states: States) -> dict[float, float]:
    """Time -> correlation between the value of a state and the reward that its chain ended with.

    Where it is low a steerer chooses among noise; it rises towards t = 0. NaN where the value does not vary.
    """
    with torch.no_grad():
        found = value(states.x, states.t, states.condition)
    times = list(dict.fromkeys(states.t.tolist()))
    rows = len(times)
    return dict(zip(times, correlation(found.reshape(rows, -1), states.reward.reshape(rows, -1)).tolist(), strict=True))
