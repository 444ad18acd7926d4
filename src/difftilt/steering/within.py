"""One call within a budget, whatever the steerer.

A steerer that can end after any round is given the budget. Of the others the price of a call is known beforehand: it is
brought to the budget by its number of particles or children, or repeated with new noise where that was chosen.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor

from difftilt.errors import GuardError, RewardError, UserError
from difftilt.models.protocol import Denoiser
from difftilt.rewards.protocol import Reward
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Budget, Meter, metered
from difftilt.steering.merging import merged
from difftilt.steering.pricing import Priced, fitted_to, price_of
from difftilt.steering.protocol import Anytime, Judges, Progress, SelfFitting, Steered, Steerer
from difftilt.training.protocol import Task


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
