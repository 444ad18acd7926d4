"""DRAGON: on-policy rounds, sets of whole samples, shared times and noise, the losses by hand, refusals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, scatter
from difftilt.errors import UserError
from difftilt.methods.forward_process.dragon import LOWEST, OFFSET, REFERENCE
from difftilt.objectives import gain_preference, kto, kto_offset
from difftilt.rewards import FrechetReward, ReferenceSet
from difftilt.rewards.protocol import SetReward
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Loss, Task

SMALL: dict[str, Any] = {"groups": 6, "group_size": 2, "levels": 2, "beta": 3.0}


def task_of(reward: str = "frechet") -> Task:
    return perturbed(Mixtures(Config(classes=4, steps=4, reward=reward)).task())  # pyright: ignore[reportArgumentType]


@dataclass
class Calls:
    """How often networks and the joint part of a method were asked."""

    networks: int = 0
    joint: int = 0

    def forward(self, *_: object) -> None:
        self.networks += 1


def collected(loop: Loop) -> Experience:
    with torch.no_grad():
        return loop.method.collect(loop.run)


def rows_of(loop: Loop, experience: Experience) -> tuple[Experience, Loss]:
    (phase,) = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    assert phase.before is not None
    rows = phase.before(rows)
    return rows, phase.loss(rows, loop.run.noise)


def errors(loop: Loop, rows: Experience) -> dict[str, Tensor]:
    """Mean squared velocity errors at x_t = (1 - t)·x_0 + t·eps, the noise keyed by the pair."""
    assert rows.x_0 is not None
    t = rows.edges.t[:, None]
    eps = loop.run.noise.normal(rows.index // 2, (2,), purpose="renoise", step=rows.edges.step)
    x_t = (1 - t) * rows.x_0 + t * eps
    truth = eps - rows.x_0
    found: dict[str, Tensor] = {}
    for role in ("current", "reference"):
        velocity = loop.run.roles.network(role)(x_t, rows.edges.t, rows.condition)
        found[role] = (velocity - truth).square().mean(1)
    return found


@pytest.mark.parametrize("loss", ["kto", "dpo"])
@pytest.mark.parametrize("offset", ["clamped", "classes"])
def test_the_loss_is_that_of_the_paper(loss: str, offset: str) -> None:
    loop = loop_of("dragon", task_of(), loss=loss, offset=offset, **SMALL)
    experience = collected(loop)
    scatter(loop, "current", "reference")
    rows, found = rows_of(loop, experience)
    each = errors(loop, rows)
    gain = (each["reference"] - each["current"]).detach()
    label, pair = rows.label, rows.pair
    assert label is not None
    assert pair is not None
    assert rows.extras[REFERENCE].tolist() == pytest.approx(each["reference"].detach().tolist(), rel=1e-4)
    if loss == "dpo":
        expected = -torch.nn.functional.logsigmoid(1.5 * label * (gain - gain[pair]))
    else:
        mean = gain.mean().clamp(min=0)
        both = (gain[label > 0].mean() + gain[label < 0].mean()) / 2
        z_0 = both if offset == "classes" else mean
        assert float(rows.extras[OFFSET][0]) == pytest.approx(float(z_0), abs=1e-6)
        expected = 1 - torch.sigmoid(label * 3.0 * (gain - z_0))
    torch.testing.assert_close(found.terms["preference"].value, expected.double(), rtol=1e-4, atol=1e-5)


def test_a_pair_shares_prompt_time_and_noise_and_stands_in_both_sets() -> None:
    loop = loop_of("dragon", task_of(), **SMALL)
    experience = collected(loop)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    assert rows.pair is not None
    assert rows.label is not None
    assert (rows.pair >= 0).all()
    assert rows.edges.t.equal(rows.edges.t[rows.pair])
    assert rows.prompt.equal(rows.prompt[rows.pair])
    assert (rows.label == -rows.label[rows.pair]).all()
    assert (rows.index // 2).equal(rows.index[rows.pair] // 2)
    assert not rows.index.equal(rows.index[rows.pair])
    # one time from each half of the range, in an order of the pair's own
    t = experience.edges.t.reshape(12, 2)
    assert ((t > 0.5).sum(1) == 1).all()
    assert len(set((t[:, 0] > 0.5).tolist())) == 2
    assert float(t.min()) >= LOWEST
    assert float(t.max()) <= 1 - LOWEST


def test_rounds_are_drawn_by_the_current_weights() -> None:
    loop = loop_of("dragon", task_of(), **SMALL)
    before = collected(loop).x_0
    scatter(loop, "reference", scale=0.5)
    unmoved = collected(loop).x_0
    scatter(loop, "current", scale=0.5)
    assert before is not None
    assert unmoved is not None
    assert before.equal(unmoved)
    assert not before.equal(collected(loop).x_0)  # pyright: ignore[reportArgumentType]


def test_no_sample_needs_a_score_and_each_is_encoded_once() -> None:
    seen: list[int] = []

    def encoder(media: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(len(media))
        return media.double()

    law = ReferenceSet.gaussian(torch.tensor([1.0, 0.0]), 0.5 * torch.eye(2))
    reward = FrechetReward(law, encoder)
    loop = loop_of("dragon", replace(task_of(), reward=reward), **SMALL)
    experience = collected(loop)
    assert seen == [12]
    assert loop.run.ledger.reward_calls == 12
    assert experience.rewards is not None
    assert experience.label is not None
    assert experience.x_0 is not None
    whole, ours = experience.x_0.double(), experience.x_0[experience.label > 0].double()
    assert float(experience.rewards[0]) == pytest.approx(reward.score_features(whole), rel=1e-5)
    assert float(experience.components["positive_set"][0]) == pytest.approx(reward.score_features(ours), rel=1e-5)
    assert float(experience.components["positive_set"][0]) > float(experience.components["negative_set"][0])


def test_instance_rewards_keep_their_components_and_put_the_better_sample_first() -> None:
    loop = loop_of("dragon", task_of("distance"), **SMALL)
    experience = collected(loop)
    rewards, label = experience.rewards, experience.label
    assert rewards is not None
    assert label is not None
    assert loop.run.ledger.reward_calls == 12
    assert set(experience.components) == {"distance", "positive_set", "negative_set"}
    assert (rewards[label > 0] > rewards[label < 0]).all()  # pairs stand side by side
    unpaired = collected(loop_of("dragon", task_of("distance"), paired=False, **SMALL))
    assert unpaired.pair is None
    assert unpaired.rewards is not None
    assert unpaired.label is not None
    assert float(unpaired.rewards[unpaired.label > 0].min()) >= float(unpaired.rewards[unpaired.label < 0].max())


def test_updates_share_the_levels_and_all_samples() -> None:
    loop = loop_of("dragon", task_of(), **{**SMALL, "levels": 4}, updates=2)
    experience = collected(loop)
    (phase,) = loop.method.phases(loop.run)
    assert phase.part is not None
    part = phase.part(experience)
    for update in (0, 1):
        assert torch.bincount(experience.edges.sample[part == update]).tolist() == [2] * 12


def test_pairs_that_hardly_matter_are_dropped() -> None:
    kept = collected(loop_of("dragon", task_of(), drop_below=1e-9, **SMALL)).edges.mask
    none = collected(loop_of("dragon", task_of(), drop_below=1e9, **SMALL)).edges.mask
    some = collected(loop_of("dragon", task_of(), drop_below=0.3, **SMALL)).edges.mask
    assert kept is not None
    assert none is not None
    assert some is not None
    assert not none.any()
    assert 0 < int(some.sum()) < int(kept.sum())
    assert (some.reshape(6, 2, 2) == some.reshape(6, 2, 2)[:, :1]).all()


def test_the_share_of_pairs_that_are_kept_is_told() -> None:
    assert "kept_pairs" not in collected(loop_of("dragon", task_of(), **SMALL)).components
    shares: list[float] = []
    for least in (1e-9, 0.3, 1e9):
        experience = collected(loop_of("dragon", task_of(), drop_below=least, **SMALL))
        assert experience.edges.mask is not None
        shares.append(float(experience.components["kept_pairs"].mean()))
        assert shares[-1] == pytest.approx(float(experience.edges.mask.float().mean()))
    assert shares[0] > shares[1] > shares[2] == 0


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_a_process_without_rows_asks_no_network_but_takes_part_in_the_offset(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_of("dragon", task_of(), loss=loss, **SMALL)
    experience = collected(loop)
    scatter(loop, "current", "reference")
    (phase,) = loop.method.phases(loop.run)
    calls, jointly = Calls(), loop.run.jointly

    def counted(function: Callable[..., object], *columns: Tensor) -> object:
        calls.joint += 1
        return jointly(function, *columns)

    monkeypatch.setattr(loop.run, "jointly", counted)
    for role in ("current", "reference"):
        network = loop.run.roles.network(role)
        assert isinstance(network, torch.nn.Module)
        network.register_forward_hook(calls.forward)
    assert phase.before is not None
    rows = phase.before(experience.rows(torch.arange(0)))
    assert (calls.networks, calls.joint) == (0, int(loss == "kto"))
    assert all(len(column) == 0 for column in rows.extras.values())
    phase.before(experience.rows(torch.arange(4)))
    assert calls.networks == (2 if loss == "kto" else 1)


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_the_split_into_microbatches_changes_nothing(loss: str) -> None:
    whole = gradient("dragon", task_of(), 64, loss=loss, **SMALL)
    parts = gradient("dragon", task_of(), 4, loss=loss, **SMALL)
    assert float((whole - parts).norm() / whole.norm()) < 1e-5


def test_losses_push_apart_around_their_offset() -> None:
    gain = torch.tensor([0.3, -0.2], requires_grad=True)
    sign, none = torch.tensor([1.0, -1.0]), torch.zeros(2)
    for value in (kto(gain, sign, none, 2.0), gain_preference(gain, torch.tensor([1, 0]), sign, 2.0)):
        (slope,) = torch.autograd.grad(value.sum(), gain)
        assert slope[0] < 0 < slope[1]
    far = torch.tensor([20.0], requires_grad=True)
    (slope,) = torch.autograd.grad(kto(far, sign[:1], none[:1], 2.0).sum(), far)
    assert abs(float(slope)) < 1e-10
    assert float(kto_offset(torch.tensor([-1.0, -3.0]), sign)) == 0
    assert float(kto_offset(torch.tensor([-1.0, -3.0, -3.0]), torch.tensor([1.0, -1.0, -1.0]), classes=True)) == -2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpo", "paired": False}, "pair"),
        ({"levels": 3, "updates": 2}, "multiple"),
        ({"group_size": 3}, "multiple of 2"),
        ({"drop_below": 0.1, "paired": False}, "pairs"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method("dragon", task_of(), **settings)


def test_sets_that_are_too_small_for_the_reward_are_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"two sets of 2, and frechet scores sets of at least 3: raise method.groups"):
        make_method("dragon", task_of(), groups=2)
    reward = task_of().reward
    assert isinstance(reward, SetReward)
    assert reward.smallest == 3
