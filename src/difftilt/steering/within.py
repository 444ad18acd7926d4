"""One call within a budget, whatever the steerer.

A steerer that can end after any round is given the budget. Of the others the price of a call is known beforehand: it is
brought to the budget by its number of particles or children, or repeated with new noise where that was chosen.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import GuardError, RewardError, UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Budget, Meter, branches, metered, parts_of
from difftilt.steering.protocol import Anytime, Judges, Progress, SelfFitting, Steered, Steerer
from difftilt.training.protocol import Task


@runtime_checkable
class Priced(Protocol):
    """A steerer whose cost is known before it runs."""

    @property
    def config(self) -> Config: ...

    def price(self, steps: int) -> Ledger:
        """What one prompt costs on a grid of ``steps`` steps without guidance, at most."""
        ...


def is_anytime(steerer: object) -> bool:
    """Whether a steerer asks a meter."""
    return "meter" in inspect.signature(cast(Steerer, steerer).steer).parameters


def steer_within(
    steerer: Steerer | Anytime,
    task: Task,
    denoise: Denoiser,
    reward: Reward,
    prompts: Sequence[str],
    noise: NoiseSource,
    *,
    index: Int[Tensor, " prompts"] | None = None,
    progress: Progress | None = None,
    budget: Budget | None = None,
) -> Steered:
    """Steer, and spend no more than the budget.

    Evaluations and reward calls are never exceeded, and seconds by one round. On Ctrl-C, or where the seconds are over,
    what the finished rounds have found comes out, with ``complete`` False.

    Args:
        steerer: any; one that has neither rounds nor a price takes no budget.
        task: model, grid and kernel.
        denoise: the network; counts in its ledger.
        reward: what is steered to.
        prompts: repeated ones are independent runs.
        noise: of the whole call.
        index: global index of each prompt, as in :meth:`Steerer.steer`.
        progress: told of every step, of every round anew.
        budget: None leaves the cost to the settings.

    Raises:
        UserError: if the budget is below the least that the steerer can spend.
    """
    call = _Call(steerer, task, denoise, reward, prompts, noise, index, progress)
    if not is_anytime(steerer) and (budget is None or not budget.bounded):
        return call.run(steerer)
    if isinstance(steerer, SelfFitting) and steerer.unfitted:
        # paid once for all calls, beside the budget and in the same ledger
        steerer.fit_for(task, denoise, reward, prompts, noise)
    with metered(budget, denoise.ledger, len(prompts)) as meter:
        if is_anytime(steerer):
            return call.run(steerer, meter=meter)
        if not isinstance(steerer, Priced):
            name = type(steerer).__name__
            raise UserError(f"{name} says neither what it costs nor when it can end: leave the budget out")
        return _rounds(call, steerer, meter)


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    steerer: Any
    task: Task
    denoise: Denoiser
    reward: Reward
    prompts: Sequence[str]
    noise: NoiseSource
    index: Tensor | None
    progress: Progress | None

    def run(self, steerer: Any, noise: NoiseSource | None = None, **more: Any) -> Steered:
        """Once, or with other noise."""
        source, extra = self.noise if noise is None else noise, {"index": self.index, "progress": self.progress, **more}
        return steerer.steer(self.task, self.denoise, self.reward, self.prompts, source, **extra)


def _rounds(call: _Call, steerer: Priced, meter: Meter) -> Steered:
    """Rounds with noise of their own for as long as the next one fits."""
    sized = fitted_to(steerer, call.task, call.denoise, call.reward, meter.budget)
    price = price_of(sized, call.task, call.denoise, call.reward) * meter.prompts
    parts: list[Steered] = []
    counted = meter.budget.nfe is not None or meter.budget.reward_calls is not None
    alone = counted and meter.budget.seconds is None and sized is not steerer
    while (meter.allows(price) if parts else True) and not (alone and parts):
        try:
            part = call.run(sized, Apart(call.noise, f"round {len(parts)}") if parts else None)
        except RewardError:
            if not parts:
                raise
            break  # a round without one score loses none of the others
        if part.ledger.nfe > price.nfe or part.ledger.reward_calls > price.reward_calls:
            raise GuardError(
                f"a round cost {part.ledger}, and its price is {price}: a value or guide of one's own has none"
            )
        parts.append(part)
    ended, whole = meter.interrupted or not meter.in_time, merged(parts)
    whole = steerer.judged(whole, call.reward) if isinstance(steerer, Judges) and len(parts) > 1 else whole
    return replace(whole, ledger=meter.spent, complete=not ended)


def scaled_by(config: Config | type[Config]) -> str | None:
    """The setting that a budget decides: what the class names as ``SCALED_BY``, or ``particles``; None if neither."""
    kind = config if isinstance(config, type) else type(config)
    name = str(getattr(kind, "SCALED_BY", "particles"))
    return name if name in kind.model_fields else None


def price_of(steerer: Priced, task: Task, denoise: Denoiser, reward: Reward) -> Ledger:
    """What one prompt costs with this task's grid and guidance and this reward, at most."""
    own, factor = steerer.price(len(task.sampler.grid) - 1), branches(denoise)
    calls = own.reward_calls * parts_of(reward)
    return replace(own, nfe=factor * own.nfe, gradient_passes=factor * own.gradient_passes, reward_calls=calls)


def fitted_to(steerer: Priced, task: Task, denoise: Denoiser, reward: Reward, budget: Budget) -> Priced:
    """The steerer with the largest number of particles (or children) whose price fits, or itself if that was chosen.

    Raises:
        UserError: if not even one fits, or the chosen number does not; names the least.
    """
    name = scaled_by(steerer.config)

    def fits(one: Priced) -> bool:
        price = price_of(one, task, denoise, reward)
        nfe, calls = budget.nfe, budget.reward_calls
        return (nfe is None or price.nfe <= nfe) and (calls is None or price.reward_calls <= calls)

    free = name is not None and name not in steerer.config.model_fields_set
    least = scaled(steerer, 1) if free else steerer
    if not fits(least):
        price = price_of(least, task, denoise, reward)
        raise UserError(
            f"the budget (nfe {budget.nfe}, reward_calls {budget.reward_calls} for each prompt) is too little: "
            f"{f'{name} = 1' if free else 'these settings'} can cost {price.nfe} network evaluations and "
            f"{price.reward_calls} reward calls for each prompt"
        )
    if not (free and _grows(steerer, task, denoise, reward, budget)):
        return steerer if fits(steerer) else least
    return scaled(steerer, largest(lambda count: fits(scaled(steerer, count))))


def _grows(steerer: Priced, task: Task, denoise: Denoiser, reward: Reward, budget: Budget) -> bool:
    """Whether more particles (or children) cost more of what is bounded."""
    one, two = (price_of(scaled(steerer, count), task, denoise, reward) for count in (1, 2))
    evaluations = budget.nfe is not None and two.nfe > one.nfe
    return evaluations or (budget.reward_calls is not None and two.reward_calls > one.reward_calls)


def scaled(steerer: Priced, count: int) -> Priced:
    """The same settings with another number of particles, or of what else a budget decides."""
    config = steerer.config.model_copy(update={scaled_by(steerer.config) or "": count})
    made = cast(Any, type(steerer))(config)
    kept = {name: value for name, value in vars(steerer).items() if name != "config"}
    vars(made).update(kept)
    return made


def largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, of a cost that grows with it; 1 fits, and more than 2^20 are never meant."""
    high = 2
    while fits(high):
        if high > 1 << 20:
            raise UserError("this budget does not bound the steerer: its cost hardly grows; bound another currency")
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def merged(parts: Sequence[Steered]) -> Steered:
    """Independent rounds as one outcome.

    Where every round estimates Z, a round weighs as much as its estimate, and the estimates are averaged: the union is
    then weighted as one large sample is. A search keeps the best of all rounds. Otherwise rounds weigh alike, or by the
    number of their samples that have a score.
    """
    if len(parts) == 1:
        return parts[0]
    prompts = len(parts[0].log_z)
    log_z = torch.stack([part.log_z for part in parts])
    known = torch.stack([_known(part, prompts) for part in parts])
    share = torch.where(log_z.isnan(), known.log(), log_z).softmax(0)
    group = torch.cat([part.group for part in parts])
    # prompts outermost, as in one round
    order = group.argsort(stable=True)

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    weight = torch.cat([part.weight * share[number, part.group] for number, part in enumerate(parts)])[order]
    group, rewards = group[order], column("rewards")
    best = _best(group, rewards, prompts)
    if all(part.search for part in parts):
        weight = torch.zeros_like(weight)
        weight[best] = 1.0
    invalid = [part.invalid for part in parts if part.invalid is not None]
    return replace(
        parts[0],
        x_0=column("x_0"),
        media=column("media"),
        group=group,
        weight=weight,
        rewards=rewards,
        best=best,
        log_z=log_z.logsumexp(0) - torch.tensor(len(parts)).double().log(),
        ess=torch.cat([part.ess for part in parts]),
        ancestors=torch.cat([part.ancestors for part in parts]),
        components={key: torch.cat([part.components[key] for part in parts])[order] for key in parts[0].components},
        invalid=torch.stack(invalid).sum(0) if invalid else None,
    )


def _known(part: Steered, prompts: int) -> Tensor:
    """Samples of each prompt that have a score, float64."""
    mine = part.group == torch.arange(prompts, device=part.group.device)[:, None]
    return (mine & ~part.rewards.isnan()).sum(1).double()


def _best(group: Tensor, rewards: Tensor, prompts: int) -> Int[Tensor, " prompts"]:
    """Row of the highest reward of each prompt."""
    known = torch.where(rewards.isnan(), -torch.inf, rewards.double())
    mine = group == torch.arange(prompts, device=group.device)[:, None]
    return torch.where(mine, known, -torch.inf).argmax(1)
