"""How much a call of a steerer may cost, and when to stop: anytime steerers ask before every round.

Evaluations and reward calls are counted for each prompt, as steerers are compared for each sample; seconds are those of
the whole call, for prompts run together.
"""

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from pydantic import Field

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.ledger import Ledger, in_words
from difftilt.models.protocol import Denoiser
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward


class Budget(Config):
    """What a call may spend; None does not bound it."""

    nfe: int | None = Field(default=None, ge=1)
    """Network evaluations for each prompt."""
    reward_calls: int | None = Field(default=None, ge=1)
    """Samples handed to the reward, for each prompt."""
    seconds: float | None = Field(default=None, gt=0)
    """Wall clock of the whole call. A round that has begun is finished: it may last longer by one round."""

    @property
    def bounded(self) -> bool:
        """Whether anything is bounded."""
        return (self.nfe, self.reward_calls, self.seconds) != (None, None, None)

    def of(self, prompts: int) -> str:
        """What a call for so many prompts may spend, in words."""
        return in_words({name: count and prompts * count for name, count in self.counted.items()})

    @property
    def counted(self) -> dict[str, int | None]:
        """What is counted for each prompt; None is not bounded."""
        return {"nfe": self.nfe, "reward_calls": self.reward_calls}


@dataclass
class Meter:
    """What a call has spent of its budget.

    Attributes:
        budget: of the call.
        ledger: the denoiser's, which goes on counting.
        prompts: that share the call.
        before: the ledger when the call began.
        began: the clock then, seconds.
        interrupted: the user has asked to end the call.
    """

    budget: Budget
    ledger: Ledger
    prompts: int
    before: Ledger = field(init=False)
    began: float = field(init=False)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.before, self.began = self.ledger.copy(), time.monotonic()

    @property
    def spent(self) -> Ledger:
        """Since the call began, all prompts together."""
        return self.ledger - self.before

    def allows(self, more: Ledger, *, late: bool = False) -> bool:
        """Whether a round that costs at most ``more``, all prompts together, still fits.

        Of the seconds some must be left: how long a round takes is known only after it. ``late`` lets a round begin
        that is only too late, so that a call has something to show.
        """
        total, budget = self.spent + more, self.budget
        fits = budget.nfe is None or total.nfe <= budget.nfe * self.prompts
        fits = fits and (budget.reward_calls is None or total.reward_calls <= budget.reward_calls * self.prompts)
        return fits and (late or (not self.interrupted and self.in_time))

    def too_small(self, what: str, cost: Ledger) -> UserError:
        """The error of a budget that is less than what must fit: what it allows, and what that can cost."""
        allowed = self.budget.of(self.prompts)
        return UserError(f"the budget of {allowed} for all prompts is less than {what}, up to {cost}: raise it")

    @property
    def in_time(self) -> bool:
        """Whether seconds are left."""
        return self.budget.seconds is None or time.monotonic() - self.began < self.budget.seconds


def price(denoise: Denoiser, reward: Reward, evaluations: int, samples: int) -> Ledger:
    """What so many rows evaluated and so many samples scored are counted as: guidance and sums of rewards cost more."""
    return Ledger(nfe=evaluations * branches(denoise), reward_calls=samples * parts_of(reward))


def spend(
    total: int,
    batch: int,
    cost: Callable[[int], Ledger],
    advance: Callable[[int], bool],
    meter: Meter | None,
    progress: Callable[[int, int, None], None] | None,
) -> tuple[int, bool]:
    """Rounds of at most ``batch`` units until ``total`` are done or the budget is; rounds shrink to what still fits.

    Args:
        total: units that the settings allow.
        batch: units of a round.
        cost: units -> the most that a round of so many can cost.
        advance: runs a round of so many units; False says that nothing is left to do.
        meter: None does not bound the call.
        progress: told after every round.

    Returns:
        Units done, and whether neither the user nor the clock has ended the call before its time.

    Raises:
        UserError: if not even one unit fits.
    """
    done, more = 0, True
    while more and done < total:
        units = min(batch, total - done)
        while units and meter is not None and not meter.allows(cost(units), late=done == 0):
            units //= 2
        if not units:
            break
        more = advance(units)
        done += units
        if progress is not None:
            progress(done, total, None)
    if done == 0:
        assert meter is not None
        raise meter.too_small("one round", cost(1))
    ended = meter is not None and (meter.interrupted or not meter.in_time)
    return done, done == total or not more or not ended


def branches(denoise: Denoiser) -> int:
    """Network evaluations that one row counts: two with guidance."""
    return 2 if isinstance(denoise, NetworkDenoiser) and denoise.guidance not in (0, 1) else 1


def parts_of(reward: Reward) -> int:
    """Reward calls that one sample counts."""
    return sum(map(parts_of, reward.rewards.values())) if isinstance(reward, WeightedSum) else 1


@contextmanager
def metered(budget: Budget | None, ledger: Ledger, prompts: int) -> Generator[Meter, None, None]:
    """A meter for one call. Ctrl-C ends the call after its present round, a second one at once.

    Only the main thread can listen for Ctrl-C; elsewhere it does what it always does.
    """
    meter = Meter(Budget() if budget is None else budget, ledger, prompts)
    if threading.current_thread() is not threading.main_thread():
        yield meter
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if meter.interrupted:
            raise KeyboardInterrupt
        meter.interrupted = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield meter
    finally:
        signal.signal(signal.SIGINT, previous)
