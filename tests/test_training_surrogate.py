"""The surrogate's options that members of the family share: columns, a gated penalty, shared states, guided laws."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difftilt.sampling.protocol import Edges
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.policy_gradient import PolicyGradientConfig
from difftilt.training.protocol import Loss
from difftilt.training.surrogate import KL_GATE, make_preset, surrogate_loss
from training_runs import make_loop, make_method, make_task

CONFIG = PolicyGradientConfig(kl_weight=0.5, clip_range=0.2)


def collected(**settings: Any) -> tuple[Loop, Experience]:
    """Rows of a Flow-GRPO rollout, with the weights moved since."""
    task = make_task()
    loop = make_loop(make_method("flow-grpo", task, **settings), task)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
        network = loop.run.roles.network("current")
        assert isinstance(network, nn.Module)
        for parameter in network.parameters():
            parameter.add_(0.02)
    loop.run.roles.stepped("current")
    return loop, experience.rows(torch.arange(len(experience.edges.step)))


def loss_of(loop: Loop, rows: Experience, **more: Any) -> Loss:
    return surrogate_loss(CONFIG, make_preset(CONFIG), loop.run, rows, **more)


def changed(rows: Experience, **fields: Any) -> Experience:
    edges: Edges = replace(rows.edges, **fields)
    return replace(rows, edges=edges)


def test_every_column_of_the_advantage_is_a_clipped_term_of_its_own() -> None:
    loop, rows = collected()
    one = rows.edges.advantage
    assert one is not None
    two = torch.cat([one, -2 * one], 1)
    loss = loss_of(loop, changed(rows, advantage=two), weights={"outcome": 1.0, "process": 0.5})
    for column, name, weight in ((one, "outcome", 1.0), (-2 * one, "process", 0.5)):
        alone = loss_of(loop, changed(rows, advantage=column))
        assert torch.equal(loss.terms[name].value, alone.terms["policy"].value)
        assert loss.terms[name].weight == weight


def parameters_gradient(loop: Loop, value: Tensor) -> Tensor:
    parameters = list(loop.run.roles.parameters("current"))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)])


def test_a_gate_weighs_each_rows_penalty_and_closed_rows_cost_nothing() -> None:
    loop, rows = collected()
    gate = torch.tensor([0.0, 2.0, 0.0, 1.0]).repeat(len(rows.index) // 4)
    plain = loss_of(loop, rows).terms["kl"].value
    before = loop.run.ledger.copy()
    gated = loss_of(loop, changed(rows, extras={KL_GATE: gate})).terms["kl"].value
    assert (loop.run.ledger - before).nfe == int((gate > 0).sum())
    assert torch.allclose(gated, gate * plain, rtol=1e-5, atol=1e-9)
    assert not bool(parameters_gradient(loop, gated[gate == 0].sum()).any())
    assert bool(parameters_gradient(loop, gated.sum()).any())


def test_a_gate_that_lets_nothing_through_leaves_a_penalty_of_zero() -> None:
    loop, rows = collected()
    before = loop.run.ledger.copy()
    kl = loss_of(loop, changed(rows, extras={KL_GATE: torch.zeros(len(rows.index))})).terms["kl"].value
    assert (loop.run.ledger - before).nfe == 0
    assert not bool(kl.any())
    assert not bool(parameters_gradient(loop, kl.sum()).any())


def test_the_penalty_pulls_to_the_role_that_is_named() -> None:
    loop, rows = collected()
    assert float(loss_of(loop, rows).terms["kl"].value.sum().detach()) > 0
    assert float(loss_of(loop, rows, reference="current").terms["kl"].value.abs().sum().detach()) == 0


def test_rows_of_one_state_are_evaluated_together_with_the_same_result() -> None:
    loop, rows = collected(share_start=True)
    first = rows.rows((rows.edges.step == 0).nonzero()[:, 0])
    apart, before = loss_of(loop, first), loop.run.ledger.copy()
    together = loss_of(loop, first, state=first.group)
    cost = loop.run.ledger - before
    assert (cost.nfe, cost.gradient_passes) == (4, 4)
    for name in ("policy", "kl"):
        assert torch.allclose(apart.terms[name].value, together.terms[name].value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", ["clipped", "guard"])
def test_a_recorded_shift_moves_the_scored_law_but_not_the_penalty(objective: str) -> None:
    loop, rows = collected(objective="guard")
    config = CONFIG.model_copy(update={"objective": objective})
    assert rows.edges.x_s is not None
    moved = changed(rows, extras={"shift": torch.full_like(rows.edges.x_s, 0.1)})
    plain, shifted = (surrogate_loss(config, make_preset(config), loop.run, one) for one in (rows, moved))
    assert not torch.allclose(plain.metrics["ratio"], shifted.metrics["ratio"], atol=1e-3)
    assert torch.equal(plain.terms["kl"].value, shifted.terms["kl"].value)
