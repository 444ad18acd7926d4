"""A steerer whose price is known beforehand, brought to a budget by its number of particles, or of children."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.steering.budget import Budget, branches, parts_of
from difftilt.training.protocol import Task


@runtime_checkable
class Priced(Protocol):
    """A steerer whose cost is known before it runs."""

    @property
    def config(self) -> Config: ...

    def price(self, steps: int) -> Ledger:
        """What one prompt costs on a grid of ``steps`` steps without guidance, at most."""
        ...


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
        least_of = f"{name} = 1" if free else "these settings"
        raise UserError(
            f"the budget of {budget.of(1)} for each prompt is too little: {least_of} can cost "
            f"{price_of(least, task, denoise, reward)}"
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
