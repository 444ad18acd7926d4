"""Running one member of an arena: the base, a steerer or a method, and how far a budget takes it."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import GuardError, UserError
from difftilt.evaluation.arena.config import Member
from difftilt.evaluation.arena.cost import CURRENCIES, WORDS, Currency, now, spent
from difftilt.evaluation.arena.records import MemberRun, Reading, finite, within
from difftilt.evaluation.arena.stage import Stage, noise_of, search_bound
from difftilt.leaves import load
from difftilt.models.denoiser import denoiser
from difftilt.models.ledger import Ledger
from difftilt.recipes.parts import Part
from difftilt.rewards import as_reward
from difftilt.sampling.protocol import Sampler
from difftilt.steering.budget import Budget, price
from difftilt.steering.pricing import Priced, largest, price_of, scaled_by
from difftilt.steering.protocol import SelfFitting, Steered, Steerer
from difftilt.steering.within import is_anytime, steer_within
from difftilt.training.loop import Loop
from difftilt.training.measure import heldout_batch, measure, numbers_of
from difftilt.training.protocol import Task

Counts = dict[Currency, int]

Tell = Callable[[str], None]
"""Called with a sentence on how far a member is."""

PARTICLES_AT_ONCE = 4096
"""Particles of one steering call: bounds the memory, and changes no number."""

PROMPTS_AT_ONCE = 32
"""Prompts of one call of a steerer that works in rounds, for the same reason."""

Amount = int | Budget
"""How a steerer is brought to a budget: a number of particles, or what it may spend in rounds for each sample."""


@dataclass(frozen=True)
class Plan:
    """What a member spends: ``fixed``, and ``unit`` as often as the budget allows.

    Attributes:
        fixed: spent whatever the budget: plain sampling of all samples, for those that sample plainly.
        unit: of one iteration of training, as the dearer one of the first two was, for the first may need no pass of
            the reference; or of one particle for each sample.
        least: the smallest number of units that makes sense.
        what: a unit in words.
    """

    fixed: Ledger
    unit: Ledger
    least: int
    what: str

    def problem(self, currency: Currency, budget: int) -> str | None:
        """What is wrong with a budget: the member, the budget and the least that would do; None if nothing."""
        if self.least and not spent(self.unit, currency):
            return f"a budget of {WORDS[currency]} does not bound it, it makes none: leave the member out"
        needed = spent(self.fixed, currency) + self.least * spent(self.unit, currency)
        if needed <= budget:
            return None
        parts = " and ".join([self.what] if self.least else []) or "plain sampling"
        return f"arena.{currency} = {budget} is too little for {parts}: give at least {needed}"


def plan_of(stage: Stage, member: Member) -> Plan:
    """Find out by the smallest trial what a unit costs, with the first seed."""
    seed = stage.arena.config.seeds[0]
    if member.steerer is not None:
        count = stage.arena.config.samples
        what = "one rollout" if in_rounds(member) else f"{scaled_by(member.steerer.config)} = 1"
        return Plan(
            _fit_price(stage, member), _price(stage, member, 1) * count, 1, f"{what} for each of {count} samples"
        )
    if member.method is not None:
        loop = stage.loop(member, seed)
        fixed = stage.sampling(loop.run, loop.method.evaluated_role, loop.method.sampler(loop.run.task)).cost
        loop.iterate(0)
        first = loop.run.ledger.copy()
        loop.iterate(1)
        return Plan(fixed, _dearer(first, loop.run.ledger - first), 1, "one iteration of training and the samples")
    task = stage.task(member)
    return Plan(stage.sampling(stage.run(task, seed), "reference", base_sampler(task, member)).cost, Ledger(), 0, "")


_FIELDS = ("nfe", "reward_calls", "gradient_passes", "auxiliary_calls")


def _dearer(one: Ledger, other: Ledger) -> Ledger:
    """The larger count of everything."""
    return Ledger(*(max(getattr(one, name), getattr(other, name)) for name in _FIELDS))


def run_member(stage: Stage, member: Member, plan: Plan, seed: int, tell: Tell) -> MemberRun:
    """Both readings of a member."""
    if member.steerer is not None:
        return _steered(stage, member, plan, seed, tell)
    if member.method is not None:
        return _trained(stage, member, seed, tell)
    reading = base_reading(stage, member, seed)
    return MemberRun(member=member.name, seed=seed, readings=dict.fromkeys(CURRENCIES, reading))


def base_sampler(task: Task, member: Member) -> Sampler:
    """The task's sampler, or its stochastic kernel on the same grid."""
    return replace(task.sampler, solver=None) if member.base.sampler == "kernel" else task.sampler


def base_reading(stage: Stage, member: Member, seed: int) -> Reading:
    """The untrained model."""
    task = stage.task(member)
    run, sampler = stage.run(task, seed), base_sampler(task, member)
    sampling = stage.sampling(run, "reference", sampler)
    measured = measure(run, "reference", sampler, stage.arena.config.samples, seed)
    numbers = finite(measured.numbers) | stage.drift(task, measured.samples, seed)
    return Reading(numbers=numbers, cost=sampling.cost, seconds=sampling.seconds)


def in_rounds(member: Member) -> bool:
    """Whether a member is a steerer that asks a meter before every round."""
    return member.steerer is not None and is_anytime(load(member.steerer.kind, member.steerer.name))


def _steered(stage: Stage, member: Member, plan: Plan, seed: int, tell: Tell) -> MemberRun:
    readings: dict[Currency, Reading] = {}
    for currency in CURRENCIES:
        budget = stage.arena.config.budget(currency)
        amount = _amount(stage, member, plan, currency)
        known = [reading for reading in readings.values() if reading.particles == amount]
        readings[currency] = known[0] if known else steered_reading(stage, member, amount, seed, tell)
        cost = spent(readings[currency].cost, currency)
        if cost > budget:
            raise GuardError(
                f"{member.name!r} costs {cost} {WORDS[currency]} with {amount}, more than the budget of {budget}: the "
                "cost of this steerer does not grow in proportion to its particles, or it does not heed its meter"
            )
    curve: list[Reading] = []
    if stage.arena.config.steered_curve:
        amounts = _smaller(stage, member, plan)
        curve = [steered_reading(stage, member, amount, seed, tell) for amount in amounts]
        curve.append(readings["evaluations"])
    return MemberRun(member=member.name, seed=seed, readings=readings, curve=tuple(curve))


def _smaller(stage: Stage, member: Member, plan: Plan) -> list[Amount]:
    """What halves, quarters, ... of the budget of evaluations allow, the smallest first, while it is anything."""
    budget, found = stage.arena.config.evaluations // 2, list[Amount]()
    while plan.problem("evaluations", budget) is None:
        amount = _amount(stage, member, plan, "evaluations", budget)
        found = [amount, *found] if amount not in found else found
        budget //= 2
    return found


def _price(stage: Stage, member: Member, amount: int) -> Ledger:
    """What a steerer costs for one sample, at most; of one that works in rounds, a plain rollout."""
    assert member.steerer is not None
    task = stage.task(member)
    model = denoiser(task.model, guidance=task.sampler.guidance)
    if in_rounds(member):
        return price(model, as_reward(task.reward), len(task.sampler.grid) - 1, 1)
    steerer = _sized(member.steerer, amount).build(task)
    if not isinstance(steerer, Priced):
        raise UserError(f"{member.algorithm} does not say what it costs (price), so no budget can be kept")
    return price_of(steerer, task, model, as_reward(task.reward))


def _fit_price(stage: Stage, member: Member) -> Ledger:
    """What is paid once, before the first sample."""
    task = stage.task(member)
    steerer = None if member.steerer is None or in_rounds(member) else member.steerer.build(task)
    return steerer.fit_price(task) if isinstance(steerer, SelfFitting) else Ledger()


def _sized(part: Part, amount: int) -> Part:
    """A steerer with another number of particles, or of what else a budget decides."""
    return replace(part, config=type(part.config)(**(part.config.model_dump() | {str(scaled_by(part.config)): amount})))


def _amount(stage: Stage, member: Member, plan: Plan, currency: Currency, budget: int | None = None) -> Amount:
    """What of a budget, by default the arena's, a steerer may use for each sample."""
    budget, count = stage.arena.config.budget(currency) if budget is None else budget, stage.arena.config.samples
    if not in_rounds(member):
        fit = _fit_price(stage, member)
        return largest(lambda amount: spent(_price(stage, member, amount) * count + fit, currency) <= budget)
    each = budget // count
    return Budget(nfe=each) if currency == "evaluations" else Budget(reward_calls=each)


def steered_reading(stage: Stage, member: Member, amount: Amount, seed: int, tell: Tell = lambda text: None) -> Reading:
    """Steer with a number of particles, or for a budget, and measure one sample of every call."""
    assert member.steerer is not None
    task, count = stage.task(member), stage.arena.config.samples
    began = now(stage.arena.config.clock)
    x_0, cost = steer_all(stage, task, member, amount, seed, samples=count, tell=tell)
    seconds = now(stage.arena.config.clock) - began
    run = replace(stage.run(task, seed), ledger=Ledger())
    with torch.no_grad():
        samples = run.samples(x_0, heldout_batch(run, count), heldout=True)
        numbers = finite(numbers_of(run, samples)) | stage.drift(task, samples, seed)
    particles = amount if isinstance(amount, int) else None
    if particles is not None and member.algorithm == "best-of-n":
        numbers["kl_bound"] = search_bound(particles)
    word = scaled_by(member.steerer.config)
    unit = word if particles is not None and word != "particles" else None
    return Reading(numbers=numbers, cost=cost, seconds=seconds, particles=particles, unit=unit)


def steer_all(
    stage: Stage,
    task: Task,
    member: Member,
    amount: Amount,
    seed: int,
    *,
    samples: int,
    tell: Tell = lambda text: None,
) -> tuple[Float[Tensor, "samples *shape"] | Int[Tensor, "samples *shape"], Ledger]:
    """Independent steering calls for the first ``samples`` of the held-out prompts, one sample from each, and the cost.

    The sample is drawn by the weights of the particles: for best-of-n that is the best one.
    """
    assert member.steerer is not None
    part, config = member.steerer, stage.arena.config
    budget = amount if isinstance(amount, Budget) else None
    at_once = PROMPTS_AT_ONCE if isinstance(amount, Budget) else max(1, PARTICLES_AT_ONCE // amount)
    steerer = cast(Steerer, (part if isinstance(amount, Budget) else _sized(part, amount)).build(task))
    run = stage.run(task, seed)
    prompts = [task.heldout_prompts[int(place)] for place in heldout_batch(run, config.samples).prompt[:samples]]
    model = denoiser(task.model, guidance=task.sampler.guidance, forward_batch=config.forward_batch)
    noise, reward = noise_of(seed), as_reward(task.reward)
    found: list[Tensor] = []
    cost = Ledger()
    for index in torch.arange(samples).split(at_once):
        wanted = [prompts[int(place)] for place in index]
        steered = steer_within(steerer, task, model, reward, wanted, noise, index=index, budget=budget)
        where = noise.uniform(index, (), purpose="output").to(steered.weight)
        found.append(steered.x_0[drawn_rows(steered, where)])
        cost = cost + steered.ledger
        done = f"{amount} {scaled_by(part.config)}" if budget is None else "rounds"
        tell(f"{done}, {int(index[-1]) + 1} of {samples} samples")
    return torch.cat(found), cost


def drawn_rows(steered: Steered, uniform: Float[Tensor, " prompts"]) -> Int[Tensor, " prompts"]:
    """For every prompt one row, drawn by the weights: the first whose cumulative weight exceeds the uniform.

    Args:
        steered: outcome.
        uniform: in (0, 1), one for each prompt.
    """
    rows: list[Tensor] = []
    for group, point in enumerate(uniform):
        mine = (steered.group == group).nonzero()[:, 0]
        total = steered.weight[mine].cumsum(0)
        rows.append(mine[(total <= point * total[-1]).sum()])
    return torch.stack(rows)


def _trained(stage: Stage, member: Member, seed: int, tell: Tell) -> MemberRun:
    """Train until both budgets are exceeded; a reading is of the last iteration within its budget.

    What an iteration costs is known only after it, and differs between iterations. So the weights before it are kept,
    and evaluated when it was one too many. An offline method that spends nothing of what is left ends there: its last
    reading holds for both budgets.
    """
    loop, config = stage.loop(member, seed), stage.arena.config
    budgets: Counts = {currency: config.budget(currency) for currency in CURRENCIES}
    sampling = stage.sampling(loop.run, loop.method.evaluated_role, loop.method.sampler(loop.run.task))
    curve: list[Reading] = []

    def read(iteration: int, cost: Ledger, seconds: float) -> None:
        curve.append(trained_reading(stage, loop, cost + sampling.cost, iteration, seconds + sampling.seconds))
        tell(_progress(curve[-1], budgets))

    iteration, seconds = 0, 0.0
    read(iteration, loop.run.ledger.copy(), seconds)
    while kept := _kept(loop.run.ledger + sampling.cost, budgets):
        weights, cost, began = loop.run.roles.state_dict(), loop.run.ledger.copy(), now(config.clock)
        loop.iterate(iteration)
        took, still = now(config.clock) - began, _kept(loop.run.ledger + sampling.cost, budgets)
        if still != kept and curve[-1].iterations != iteration:
            with _returned_to(loop, weights):
                read(iteration, cost, seconds)
        iteration, seconds = iteration + 1, seconds + took
        if iteration > 1 and not _grown(cost, loop.run.ledger, still):
            break
        if still and iteration % member.training.evaluate_every == 0:
            read(iteration, loop.run.ledger.copy(), seconds)
    return MemberRun(member=member.name, seed=seed, readings=within(tuple(curve), budgets), curve=tuple(curve))


def _grown(before: Ledger, after: Ledger, currencies: list[Currency]) -> bool:
    """Whether an iteration has spent of any of the currencies that are left, or none is left to ask about."""
    return not currencies or any(spent(after, one) > spent(before, one) for one in currencies)


def _kept(cost: Ledger, budgets: Counts) -> list[Currency]:
    """The budgets that a cost does not exceed."""
    return [currency for currency in CURRENCIES if spent(cost, currency) <= budgets[currency]]


@contextmanager
def _returned_to(loop: Loop, weights: Mapping[str, Tensor]) -> Generator[None, None, None]:
    """Earlier weights for a while."""
    present = loop.run.roles.state_dict()
    loop.run.roles.load_state_dict(weights)
    try:
        yield
    finally:
        loop.run.roles.load_state_dict(present)


def trained_reading(stage: Stage, loop: Loop, cost: Ledger, iteration: int, seconds: float) -> Reading:
    """An evaluation of the present weights, which took ``cost`` and ``seconds``, sampling included."""
    seed, task = loop.config.seed, loop.run.task
    role, sampler = loop.method.evaluated_role, loop.method.sampler(task)
    measured = measure(loop.run, role, sampler, stage.arena.config.samples, seed)
    numbers = finite(measured.numbers) | stage.drift(task, measured.samples, seed)
    return Reading(numbers=numbers, cost=cost, seconds=seconds, iterations=iteration)


def _progress(reading: Reading, budgets: Counts) -> str:
    shares = [f"{spent(reading.cost, one) / budgets[one]:.0%} of the {WORDS[one]}" for one in CURRENCIES]
    return f"iteration {reading.iterations}, {' and '.join(shares)}, reward {reading.numbers['reward']:.4g}"
