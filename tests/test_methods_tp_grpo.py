"""TP-GRPO: gains of ODE completions of the very same noise, turning points, balancing, compared step by step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import SMALL, by_hand, collected, standardised, table, task
from difftilt.checks.trial import loop_of, make_method, trained
from difftilt.credit.gains import turning_points
from difftilt.errors import UserError
from difftilt.methods.policy_gradient.tp_grpo import TPGRPO, Config
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.shapes import Shapes
from difftilt.training.policy_gradient import Window
from difftilt.training.world import World

WINDOW = Window(width=4, motion="sliding", every=1)


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def credited(r: list[float], consistent: bool) -> list[float]:
    """The rules of the paper, one chain at a time, without balancing."""
    end, trend, result = r[-1], sign(r[-1] - r[0]), list[float]()
    for k in range(len(r) - 1):
        d, before = r[k + 1] - r[k], r[k] - r[k - 1] if k else 0.0
        onwards = sign(d) * sign(end - r[k + 1]) > 0
        if k == 0:
            turns = onwards if consistent else sign(d) * trend > 0
        else:
            turns = sign(before) * trend < 0 < sign(d) * trend and (onwards or not consistent)
        result.append(end - r[k] if turns else d)
    return result


@pytest.mark.parametrize("definition", ["consistent", "basic"])
def test_advantages_are_those_of_the_paper_step_by_step(definition: str) -> None:
    loop, experience = collected(
        "tp-grpo", task(classes=4), apart=True, definition=definition, balance=False, kernel="flow_sde"
    )
    rewards = by_hand(loop, experience)
    assert rewards.shape == (16, 10)  # all but the last step are stochastic, the last follows the ODE
    values = torch.tensor([credited(row, definition == "consistent") for row in rewards.tolist()], dtype=torch.float64)
    assert not torch.equal(values, rewards.diff(dim=1))
    assert torch.allclose(table(experience).double(), standardised(values, 4), atol=2e-3)


def test_a_window_is_credited_by_the_states_inside_it_and_the_sample() -> None:
    loop, experience = collected("tp-grpo", window=WINDOW, balance=False)
    loop.run.begin(2)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    assert sorted(experience.edges.step.unique().tolist()) == [2, 3, 4, 5]
    rewards = by_hand(loop, experience)
    values = torch.tensor([credited(row, True) for row in rewards.tolist()], dtype=torch.float64)
    assert torch.allclose(table(experience).double(), standardised(values, 4), atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "nfe", "rewards"),
    [
        ({}, 16 * (10 + 45), 16 * 10),
        ({"window": WINDOW}, 16 * (10 + 9 + 8 + 7 + 6), 16 * 5),
        ({"share_start": True}, 16 * (10 + 45) - 12 * 9, 16 * 10 - 12),
    ],
)
def test_the_cost_is_counted_exactly(settings: dict[str, Any], nfe: int, rewards: int) -> None:
    loop, _ = collected("tp-grpo", **settings)
    assert (loop.run.ledger.nfe, loop.run.ledger.reward_calls) == (nfe, rewards)


def test_balancing_looks_at_the_whole_batch_and_is_a_switch() -> None:
    # samples 0 and 1 rise, sample 2 falls: of the two positive turning points the larger is kept, across groups
    rewards = torch.tensor([[0.0, 0.1, 0.3], [0.0, 0.5, 2.0], [0.0, -0.1, -0.2]])
    for balance, first in ((True, [0.1, 2.0, -0.2]), (False, [0.3, 2.0, -0.2])):
        method = make_method("tp-grpo", task(), balance=balance, **SMALL)
        assert isinstance(method, TPGRPO)
        assert method.credit(rewards)[:, 0].tolist() == pytest.approx(first)


@dataclass(frozen=True)
class Half(World):
    """One of two processes in one: credit sees its columns after those of ``before`` or before those of ``after``."""

    before: tuple[Tensor, ...] = ()
    after: tuple[Tensor, ...] = ()
    seen: list[tuple[Tensor, ...]] = field(default_factory=list[tuple[Tensor, ...]])

    def jointly(self, function: Callable[..., Any], *columns: Tensor) -> Any:
        self.seen.append(columns)
        parts = [part for part in (self.before, columns, self.after) if part]
        start = len(self.before[0]) if self.before else 0
        return function(*(torch.cat(column) for column in zip(*parts, strict=True)))[start : start + len(columns[0])]


def test_turning_points_are_balanced_and_compared_over_all_processes() -> None:
    def advantages(world: World) -> Tensor:
        loop = loop_of("tp-grpo", task(classes=4), kernel="flow_sde", **SMALL)
        loop.run.world = world
        with torch.no_grad():
            return table(loop.method.collect(loop.run))

    alone = [Half(rank, 2) for rank in (0, 1)]
    apart = torch.cat([advantages(world) for world in alone])
    ((first,), (second,)) = (world.seen for world in alone)
    joint = torch.cat([advantages(Half(0, 2, after=second)), advantages(Half(1, 2, before=first))])
    whole = advantages(World())
    assert torch.allclose(joint, whole, atol=1e-4)
    # what each process would balance on its own is something else
    assert float((apart - whole).abs().max()) > 0.1


def test_switches_reach_the_credit() -> None:
    hand = torch.tensor([[1.0, 0.8, 1.1, 1.0, 1.4]])

    def credit(**settings: Any) -> list[float]:
        method = make_method("tp-grpo", task(), balance=False, **settings, **SMALL)
        assert isinstance(method, TPGRPO)
        return [round(value, 5) for value in method.credit(hand)[0].tolist()]

    assert credit() == [-0.2, 0.6, -0.1, 0.4]
    assert credit(definition="reversal") == [-0.2, 0.6, 0.3, 0.4]
    assert credit(assignment="bonus", bonus_weight=0.5) == [-0.2, 0.6, -0.1, 0.4]
    assert credit(assignment="bonus") == [-0.2, 0.9, -0.1, 0.4]
    assert credit(assignment="released", definition="basic") == [0.4, 0.7, 0.4, 0.8]
    assert credit(dead_zone=0.25) == [-0.2, 0.3, -0.1, 0.4]


def test_turning_points_occur_in_training() -> None:
    loop, experience = collected("tp-grpo", kernel="flow_sde", groups=8)
    share = turning_points(by_hand(loop, experience), "consistent").double().mean()
    assert 0.02 < float(share) < 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_range": 0.01},
        {"kernel": "flow_sde", "objective": "guard", "share_start": True, "kl_weight": 0.3},
        {"kernel": "dance_sde", "noise_level": 0.3, "assignment": "released", "definition": "basic"},
        {"kernel": "flow_sde", "objective": "reinforce", "window": {"width": 3}, "output": "x0"},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values())[:40],
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    result = trained("tp-grpo", task(steps=5), 2, 1e-3, count=8, **{**SMALL, **settings})
    assert all(row["grad_norm"] > 0 for row in result.rows)


def test_digits_train() -> None:
    loop = loop_of("tp-grpo", Digits().task(), 32, groups=1, group_size=2, steps=4)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    (phase,) = loop.method.phases(loop.run)
    assert loop.updater.run_phase(phase, experience, loop.run.noise)["grad_norm"] > 0


@pytest.mark.long
def test_shapes_train() -> None:
    loop = loop_of("tp-grpo", Shapes().task(), 32, groups=1, group_size=4, steps=4, kernel="flow_sde")
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    (phase,) = loop.method.phases(loop.run)
    assert loop.updater.run_phase(phase, experience, loop.run.noise)["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_level": 1.5}, "at most 1"),
        ({"window": {"width": 10}}, "window"),
        ({"objective": "guard"}, "flow_sde"),
        ({"kernel": "unmasking"}, "flow_sde"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("tp-grpo", task(), **{**SMALL, **settings})


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.kernel, config.definition, config.assignment, config.balance) == (
        "cps",
        "consistent",
        "replace",
        True,
    )
    assert (config.advantage_std, config.ddof, config.std_eps, config.advantage_clip) == ("group", 0, 1e-4, 5.0)
