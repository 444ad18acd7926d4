"""Steerers that learn their value: fitted before, or by themselves and paid for, saved and taken back."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from difftilt.checks.tilted_truths import ring_truth, sequence_truth
from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.ledger import Ledger
from difftilt.process.grid import uniform_grid
from difftilt.rewards import FunctionReward, Masked
from difftilt.sampling.noise import Noise
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.learning import LearnsValue
from difftilt.steering.protocol import Steered
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.testbeds import Digits
from difftilt.training.protocol import Task

FIT = {"value": "learned", "temperature": 1.0, "fit_samples": 32, "fit_updates": 4, "fit_batch": 8, "fit_hidden": 8}


def svdd(**settings: Any) -> SVDD:
    return SVDD(SVDDConfig.model_validate({**FIT, "children": 3, "particles": 2, **settings}))


def fk(**settings: Any) -> FKSteering:
    return FKSteering(
        FKSteeringConfig.model_validate({**FIT, "particles": 4, "resample_at": 2, "resample": "always", **settings})
    )


def steer(steerer: SVDD | FKSteering, task: Task, prompts: list[str], **extra: Any) -> Steered:
    return steerer.steer(task, denoiser(task.model), extra.pop("reward", task.reward), prompts, Noise(0), **extra)


def fit(steerer: LearnsValue, task: Task, prompts: list[str], seed: int = 5) -> dict[str, float]:
    return dict(steerer.fit(task, denoiser(task.model), task.reward, prompts, Noise(seed)))


@pytest.mark.parametrize("truth", [ring_truth, sequence_truth])
@pytest.mark.parametrize("bootstrap", [0, 3])
def test_an_unfitted_steerer_fits_itself_and_pays(truth: Any, bootstrap: int) -> None:
    """The fit costs its rollouts and their rewards once; decoding then needs only the chosen states' evaluations."""
    task = truth().task
    steps, steerer = len(task.sampler.grid) - 1, svdd(bootstrap=bootstrap)
    price, fit = steerer.price(steps), steerer.fit_price(task)
    first, second = steer(steerer, task, ["", ""]), steer(steerer, task, ["", ""])
    assert second.ledger.nfe == 4 * steps
    assert second.ledger.reward_calls == 4 * 3
    assert second.ledger.auxiliary_calls == 4 * 3 * (steps - 1)
    assert steerer.price(steps) * 2 == second.ledger
    paid = first.ledger - second.ledger
    assert fit == paid
    assert price == steerer.price(steps)
    assert steerer.fit_price(task) == Ledger()
    assert (paid.nfe, paid.reward_calls, paid.auxiliary_calls) == (32 * steps, 32, 4 * 8 * (1 + bootstrap))
    assert torch.equal(first.x_0, second.x_0)


@pytest.mark.parametrize("make", [svdd, fk])
def test_what_was_saved_steers_as_what_was_fitted(make: Any) -> None:
    task = sequence_truth().task
    fitted, fresh = make(), make()
    assert not fresh.state_dict()
    found = fit(fitted, task, [""])
    assert found["samples"] == 32
    assert {"loss", "correlation t=0", "correlation t=0.5"} <= found.keys()
    fresh.load_state_dict(fitted.state_dict())
    one, other = steer(fitted, task, [""] * 8), steer(fresh, task, [""] * 8)
    assert torch.equal(one.x_0, other.x_0)
    assert one.ledger == other.ledger
    assert not torch.equal(one.x_0, steer(make(value="posterior_mean"), task, [""] * 8).x_0)


def test_a_value_of_another_task_is_refused() -> None:
    steerer = svdd()
    fit(steerer, ring_truth().task, [""])
    with pytest.raises(UserError, match=r"other states.*fit it again"):
        steer(steerer, sequence_truth().task, [""])
    task = ring_truth().task
    coarse = replace(task, sampler=replace(task.sampler, grid=uniform_grid(8)))
    with pytest.raises(UserError, match=r"17 times.*fit it again"):
        steer(steerer, coarse, [""])
    with pytest.raises(UserError, match="no grid"):
        svdd().load_state_dict({"weight": torch.zeros(2)})


def test_what_cannot_be_fitted() -> None:
    task = ring_truth().task
    with pytest.raises(UserError, match="nothing to learn"):
        fit(svdd(value="posterior_mean"), task, [""])
    with pytest.raises(UserError, match="fit_samples = 2 rollouts are too few for 3 prompts"):
        fit(svdd(fit_samples=2), task, ["a", "b", "c"])
    nothing = Masked(FunctionReward("nothing", lambda s: torch.full((len(s.media),), torch.nan)))
    with pytest.raises(RewardError, match="fewer than two of 32"):
        svdd().fit(task, denoiser(task.model), nothing, [""], Noise(0))


def test_a_learned_value_knows_the_prompt() -> None:
    """Rollouts are shared among the prompts, and the network reads the class."""
    task = Digits().task()
    prompts, steerer = [*task.prompts[:3]], svdd(fit_samples=7, children=2, particles=1)
    seen: list[str] = []

    def score(samples: Any) -> torch.Tensor:
        seen.extend(samples.prompts)
        return samples.media.flatten(1).mean(1)

    reward = FunctionReward("bright", score)
    steerer.fit(task, denoiser(task.model), reward, prompts, Noise(0))
    assert [seen.count(prompt) for prompt in prompts] == [3, 2, 2]
    network, t = steerer.network(task), torch.full((2,), 0.5)
    value = network(torch.zeros(2, *task.model.shape), t, task.model.encode(prompts[:2]))
    assert float(value[0]) != float(value[1])
