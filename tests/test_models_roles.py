"""Laws of roles: copies, sameness, blending, and a state that comes back bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models import CopiedRoles, Frozen, GaussianMixture, Lagging, MixtureVelocity, Roles, Trained
from difftilt.process import RectifiedFlow


def network() -> MixtureVelocity:
    return MixtureVelocity(GaussianMixture(torch.eye(2), 0.5, torch.tensor([0.4, 0.6])), RectifiedFlow())


def specs() -> dict[str, Lagging | Trained | Frozen]:
    return {
        "behaviour": Lagging("current", lambda step: 0.0),
        "ema": Lagging("current", lambda step: 0.9, every=1),
        "fake": Trained("reference"),
        "critic": Trained(None, nn.Linear(3, 1)),
        "teacher": Frozen(network=nn.Linear(2, 2)),
    }


def move(roles: Roles, role: str, by: float = 0.25) -> None:
    with torch.no_grad():
        for parameter in roles.parameters(role):
            parameter.add_(by)
    roles.stepped(role)


def weights(roles: Roles, role: str) -> Tensor:
    return nn.utils.parameters_to_vector(roles.module(role).parameters()).detach().clone()


def test_current_is_the_network_and_the_others_are_copies() -> None:
    own = network()
    roles: Roles = CopiedRoles(own, specs())
    assert list(roles.names) == ["current", "reference", "behaviour", "ema", "fake", "critic", "teacher"]
    assert roles.module("current") is own
    before = weights(roles, "reference")
    move(roles, "current")
    assert torch.equal(weights(roles, "reference"), before)
    assert torch.equal(weights(roles, "fake"), before)
    assert not torch.equal(weights(roles, "current"), before)


def test_only_trained_roles_have_parameters_to_move() -> None:
    roles = CopiedRoles(network(), specs())
    counts = {role: len(roles.parameters(role)) for role in roles.names}
    assert counts["current"] == counts["fake"] == 6
    assert counts["critic"] == 2
    assert counts["reference"] == counts["behaviour"] == counts["ema"] == counts["teacher"] == 0
    assert [p.data_ptr() for p in roles.parameters("fake")] == [p.data_ptr() for p in roles.parameters("fake")]
    with pytest.raises(UserError, match="no optimiser may move it"):
        roles.stepped("ema")


def test_sameness_follows_copies_and_ends_with_a_step() -> None:
    roles = CopiedRoles(network(), specs())
    assert roles.same("current", "reference")
    assert roles.same("behaviour", "ema")
    assert not roles.same("critic", "teacher")
    move(roles, "current")
    assert not roles.same("current", "behaviour")
    assert roles.same("behaviour", "reference")
    roles.blend("behaviour", "current", 0.0)
    assert roles.same("current", "behaviour")
    assert torch.equal(weights(roles, "behaviour"), weights(roles, "current"))
    move(roles, "current", 0.0)
    assert not roles.same("current", "behaviour")


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_blending_is_the_weighted_mean(decay: float) -> None:
    roles = CopiedRoles(network(), specs())
    move(roles, "current", 0.5)
    lagging, source = weights(roles, "ema"), weights(roles, "current")
    roles.blend("ema", "current", decay)
    expected = decay * lagging.double() + (1 - decay) * source.double()
    assert torch.allclose(weights(roles, "ema").double(), expected, atol=1e-7)
    assert roles.same("ema", "current") == (decay == 0)
    assert roles.same("ema", "reference") == (decay == 1)


def test_blending_copies_buffers_and_equal_weights_change_no_bit() -> None:
    roles = CopiedRoles(nn.BatchNorm1d(2), {"ema": Lagging("current", lambda step: 0.9)})
    current = roles.module("current")
    current.get_buffer("running_mean").fill_(3.0)
    current.get_buffer("num_batches_tracked").fill_(7)
    move(roles, "current")
    roles.blend("ema", "current", 0.9)
    assert torch.equal(roles.module("ema").get_buffer("running_mean"), torch.full((2,), 3.0))
    assert int(roles.module("ema").get_buffer("num_batches_tracked")) == 7
    roles.blend("ema", "current", 0.0)
    before = weights(roles, "ema")
    roles.blend("ema", "current", 0.37)
    assert torch.equal(weights(roles, "ema"), before)
    assert roles.same("ema", "current")


def test_state_comes_back_bit_for_bit_with_sameness() -> None:
    roles = CopiedRoles(network(), specs())
    move(roles, "current", 1 / 3)
    roles.blend("ema", "current", 0.7)
    roles.blend("behaviour", "current", 0.0)
    move(roles, "critic", 0.1)
    saved = roles.state_dict()
    assert {key.split("/")[0] for key in saved} == set(roles.names)
    assert "ema/means" in saved
    move(roles, "current", 0.9)
    fresh = CopiedRoles(network(), specs())
    fresh.load_state_dict(saved)
    again = fresh.state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    pairs = [("current", "behaviour"), ("reference", "fake"), ("current", "ema"), ("current", "reference")]
    assert [fresh.same(*pair) for pair in pairs] == [True, True, False, False]


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    roles = CopiedRoles(network(), specs())
    before = roles.state_dict()
    state = {key: value + 1 for key, value in before.items()}
    del state["ema/means"]
    with pytest.raises(UserError, match="missing \\['ema/means'\\]"):
        roles.load_state_dict(state)
    state["ema/means"] = torch.zeros(3, 2)
    with pytest.raises(UserError, match="'ema/means' is \\(3, 2\\)"):
        roles.load_state_dict(state)
    assert all(torch.equal(before[key], value) for key, value in roles.state_dict().items())


def test_mistakes_are_named() -> None:
    roles = CopiedRoles(network(), specs())
    with pytest.raises(UserError, match=r"'refrence'.*reference"):
        roles.network("refrence")
    with pytest.raises(UserError, match=r"source of role 'ema'.*'curent'.*current"):
        CopiedRoles(network(), {"ema": Lagging("curent", lambda step: 0.5)})
    with pytest.raises(UserError, match="exists already"):
        CopiedRoles(network(), {"reference": Frozen()})
    with pytest.raises(UserError, match="neither a source nor"):
        CopiedRoles(network(), {"critic": Trained(None)})
    with pytest.raises(UserError, match="different networks"):
        roles.blend("critic", "current", 0.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        roles.blend("ema", "current", 1.5)
