"""Adapters as roles: the laws of roles, and what is low-rank about them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import difftilt
from difftilt.errors import UserError
from difftilt.models import CopiedRoles, Frozen, Lagging, Trained
from difftilt.models.fingerprint import fingerprint
from difftilt.models.lora import LoraSettings, adapted
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.training.checkpoint import load_checkpoint


class Net(nn.Module):
    """Two linear layers with names of their own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.to_q, self.to_out = nn.Linear(3, 8), nn.Linear(8, 3)
        for value in self.parameters():
            value.data = torch.randn(value.shape, generator=generator) / 2

    def forward(self, x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return self.to_out(torch.tanh(self.to_q(x_t)) + t[:, None])


X, T = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(0.1, 0.9, 5)


def specs() -> dict[str, Lagging | Trained | Frozen]:
    return {
        "behaviour": Lagging("current", lambda step: 0.0),
        "ema": Lagging("current", lambda step: 0.9, every=1),
        "fake": Trained("reference"),
        "critic": Trained(None, nn.Linear(3, 1)),
    }


def made(seed: int = 0, **settings: object) -> CopiedRoles:
    return CopiedRoles(adapted(Net(seed), LoraSettings.model_validate({"rank": 2, "alpha": 6.0, **settings})), specs())


def move(roles: CopiedRoles, role: str, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in roles.parameters(role):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    roles.stepped(role)


def out(roles: CopiedRoles, role: str) -> Tensor:
    with torch.no_grad():
        return roles.network(role)(X, T, None)


def test_all_roles_begin_as_the_network_itself_bit_for_bit() -> None:
    plain = Net()(X, T)
    roles = made()
    assert list(roles.names) == ["current", "reference", "behaviour", "ema", "fake", "critic"]
    for role in ("current", "reference", "behaviour", "ema", "fake"):
        assert torch.equal(out(roles, role), plain)
    assert roles.same("current", "reference")


def test_the_adapter_adds_alpha_over_rank_times_b_a() -> None:
    roles, plain = made(targets=("to_q",)), Net()
    move(roles, "current")
    a, b = roles.parameters("current")
    assert (a.shape, b.shape) == ((2, 3), (8, 2))
    plain.to_q.weight.data += 3.0 * b.detach() @ a.detach()
    assert torch.allclose(out(roles, "current"), plain(X, T), atol=1e-6)
    assert torch.equal(out(roles, "reference"), Net()(X, T))


def test_only_adapters_of_trained_roles_move() -> None:
    roles = made()
    counts = {role: len(roles.parameters(role)) for role in roles.names}
    assert counts == {"current": 4, "reference": 0, "behaviour": 0, "ema": 0, "fake": 4, "critic": 2}
    # a pass of another role between forward and backward changes neither gradients nor what may have one
    loss = roles.network("current")(X, T, None).square().mean()
    for role in ("reference", "behaviour"):
        out(roles, role)
    loss.backward()
    assert all(p.grad is not None for p in roles.parameters("current"))
    assert all(p.grad is None for p in roles.parameters("fake"))
    base = [value for name, value in roles.module("current").named_parameters() if ".lora_" not in name]
    assert base
    assert all(not value.requires_grad and value.grad is None for value in base)


def test_roles_are_apart_and_follow_as_copies_do() -> None:
    roles = made()
    reference = out(roles, "reference")
    move(roles, "current")
    assert not torch.equal(out(roles, "current"), reference)
    assert all(torch.equal(out(roles, role), reference) for role in ("reference", "behaviour", "ema", "fake"))
    roles.blend("behaviour", "current", 0.0)
    assert torch.equal(out(roles, "behaviour"), out(roles, "current"))
    assert roles.same("behaviour", "current")
    before, source = roles.state_dict(), 0.25
    roles.blend("ema", "current", source)
    after = roles.state_dict()
    name = "to_q.lora_B.weight"
    expected = source * before[f"ema/{name}"] + (1 - source) * before[f"current/{name}"]
    assert torch.allclose(after[f"ema/{name}"], expected)
    # a reference that follows is no longer the backbone alone
    roles.blend("reference", "current", 0.0)
    assert torch.equal(out(roles, "reference"), out(roles, "current"))


def test_a_checkpoint_holds_adapters_only_and_comes_back_with_sameness() -> None:
    roles = made()
    move(roles, "current")
    roles.blend("ema", "current", 0.5)
    roles.blend("behaviour", "current", 0.0)
    saved = roles.state_dict()
    assert not any("base_layer" in key for key in saved)
    fresh = made()
    move(fresh, "fake")
    fresh.load_state_dict(saved)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in saved.items())
    assert all(torch.equal(out(fresh, role), out(roles, role)) for role in ("current", "reference", "ema", "fake"))
    pairs = [("current", "behaviour"), ("reference", "fake"), ("current", "ema")]
    assert [fresh.same(*pair) for pair in pairs] == [True, False, False] or fresh.same("reference", "fake")
    with pytest.raises(UserError, match="another base model"):
        made(seed=1).load_state_dict(saved)


def test_the_fingerprint_is_that_of_the_base() -> None:
    network = Net()
    before = fingerprint(network)
    roles = CopiedRoles(adapted(network, LoraSettings()), specs())
    move(roles, "current")
    assert fingerprint(network) == before
    network.to_q.base_layer.weight.data += 1  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
    assert fingerprint(network) != before


def test_checkpointed_layers_have_the_gradients_of_the_pass_that_was_made() -> None:
    class Checkpointed(Net):
        def forward(self, x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(super().forward, x_t, t, condition, use_reentrant=False)  # pyright: ignore

    gradients: list[list[Tensor]] = []
    for network in (Net(), Checkpointed()):
        roles = CopiedRoles(adapted(network, LoraSettings(rank=2)), specs())
        move(roles, "current")
        loss = roles.network("current")(X, T, None).square().mean()
        for role in ("reference", "ema"):
            out(roles, role)
        gradients.append(list(torch.autograd.grad(loss, roles.parameters("current"))))
    assert all(torch.allclose(*pair) for pair in zip(*gradients, strict=True))


def test_half_precision_backbones_have_full_precision_adapters() -> None:
    roles = CopiedRoles(adapted(Net().bfloat16(), LoraSettings(rank=2)), {})
    assert {value.dtype for value in roles.parameters("current")} == {torch.float32}
    assert out_dtype(roles) == torch.bfloat16


def out_dtype(roles: CopiedRoles) -> torch.dtype:
    with torch.no_grad():
        return roles.network("current")(X.bfloat16(), T.bfloat16(), None).dtype


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"no layer's name ends in 'to_k'; the layers end in to_out, to_q"):
        made(targets=("to_k", "to_q"))
    network = Net()
    adapted(network, LoraSettings())
    with pytest.raises(UserError, match="has adapters already"):
        adapted(network, LoraSettings())


def test_first_weights_depend_on_the_seed_alone_and_leave_the_global_state() -> None:
    network = Net()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = CopiedRoles(adapted(network, LoraSettings(), seed=1), {}).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = CopiedRoles(adapted(Net(), LoraSettings(), seed=1), {}).state_dict()
    other = CopiedRoles(adapted(Net(), LoraSettings(), seed=2), {}).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["current/to_q.lora_A.weight"], other["current/to_q.lora_A.weight"])


SMALL = [
    *("method.groups=2", "method.group_size=8", "training.forward_batch=32", "training.evaluate_every=0"),
    *("training.evaluation_samples=16", "training.checkpoint_every=2", "training.optimizer.lr=0.003"),
    "training.lora={rank: 4, alpha: 8.0}",
]


@pytest.mark.parametrize("method", ["flow-grpo", "diffusion-nft"])
def test_a_run_trains_adapters_and_resumes_in_the_same_bits(method: str, tmp_path: Path) -> None:
    def recipe(iterations: int) -> Recipe:
        return load_recipe(f"digits/{method}", [*SMALL, f"training.iterations={iterations}"])

    whole = difftilt.train(recipe(4), tmp_path / "whole")
    difftilt.train(recipe(2), tmp_path / "parts")
    difftilt.train(recipe(4), tmp_path / "parts", resume=True)
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "step_4")[0]["weights"] for name in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    names = {key.partition("/")[2] for key in ends[0]} - {"fingerprint"}
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    reference, current = (
        {key: value for key, value in ends[0].items() if key.startswith(f"{role}/") and ".lora_B." in key}
        for role in ("reference", "current")
    )
    assert all(not value.any() for value in reference.values())
    assert any(value.any() for value in current.values())
    assert whole.after["kl_reference"] > 0
    # the run directory is enough to come back to the same numbers
    assert difftilt.evaluate(tmp_path / "whole")["kl_reference"] == pytest.approx(whole.after["kl_reference"], rel=1e-6)
