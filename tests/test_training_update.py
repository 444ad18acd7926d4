"""Updates: a gradient is the mean over rows, whatever the split; and the guards notice what breaks theory."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difftilt.errors import GuardError
from difftilt.models.protocol import Lagging, RoleSpec, Trained
from difftilt.process.gaussian import as_gaussian
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.base import MethodBase
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Loss, Phase, Run, Term, Unit
from difftilt.trees import Pooled
from training_runs import (
    METHODS,
    gradient,
    make_experience,
    make_loop,
    make_method,
    make_task,
    relative,
    with_edges,
)

NOISE = Noise(5)
STEP = 1e-2


@dataclass
class Regression(MethodBase):
    """Squared distance of the velocity at x_t to x_s; notes the edges of every microbatch."""

    specs: dict[str, RoleSpec] = field(default_factory=dict[str, RoleSpec])
    seen: list[Tensor] = field(default_factory=list[Tensor])

    def roles(self) -> dict[str, RoleSpec]:
        return self.specs

    def collect(self, run: Run) -> Experience:
        return make_experience()

    def phases(self, run: Run) -> list[Phase]:
        return []

    def phase(self, loop: Loop, role: str = "current", **settings: Any) -> Phase:
        def loss(rows: Experience, noise: NoiseSource) -> Loss:
            self.seen.append(rows.edges.extras["number"])
            return Loss({"regression": Term(self.value(loop, role, rows))}, {"label": rows.edges.step.float()})

        return Phase(role, loss, **settings)

    def value(self, loop: Loop, role: str, rows: Experience) -> Tensor:
        assert rows.edges.x_t is not None
        assert rows.edges.x_s is not None
        denoise = loop.run.denoiser(role)
        prediction = as_gaussian(denoise(rows.edges.x_t, rows.edges.t, rows.condition))
        return (prediction.velocity - rows.edges.x_s).square().sum(1)


def regression(forward_batch: int = 64, **settings: Any) -> tuple[Regression, Loop]:
    method = Regression()
    loop = make_loop(method, make_task(), **settings)
    loop.run.forward_batch = forward_batch
    return method, loop


def shuffled(experience: Experience) -> Experience:
    """The same edges in another order."""
    order = torch.randperm(len(experience.edges.step), generator=torch.Generator().manual_seed(3))
    rows = experience.rows(order)
    return replace(experience, edges=replace(rows.edges, sample=experience.edges.sample[order]))


def masked(experience: Experience) -> Experience:
    """Every third edge carries no gradient, and would spoil one."""
    mask = torch.arange(len(experience.edges.step)) % 3 != 0

    def spoil(edges: Any) -> Any:
        return replace(edges, end=Pooled.of(torch.where(mask[:, None], edges.x_s, torch.nan)), mask=mask)

    return with_edges(experience, spoil)


def test_a_gradient_is_the_gradient_of_the_mean_over_rows_that_are_not_masked() -> None:
    experience = masked(make_experience())
    method, loop = regression()
    assert experience.edges.mask is not None
    kept = experience.rows(experience.edges.mask.nonzero()[:, 0])
    value = method.value(loop, "current", kept).mean()
    expected = torch.autograd.grad(value, list(loop.run.roles.parameters("current")))
    wanted = torch.cat([part.reshape(-1) for part in expected]).double()
    for size in (5, 64):
        for form in (experience, shuffled(experience)):
            method, loop = regression(size)
            means = loop.updater.run_phase(method.phase(loop), form, NOISE)
            assert relative(wanted, gradient(loop)) < 1e-6
            assert means["loss/regression"] == pytest.approx(float(value.detach()), rel=1e-6)
            assert means["grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-5)
            seen = torch.cat(method.seen)
            assert sorted(seen.tolist()) == sorted(kept.edges.extras["number"].tolist())
            assert max(map(len, method.seen)) <= size


def test_a_step_moves_weights_and_the_same_whatever_the_microbatches() -> None:
    weights: list[Tensor] = []
    for size in (5, 64):
        method, loop = regression(size)
        loop.updater.optimizers["current"].param_groups[0]["lr"] = STEP
        loop.updater.run_phase(method.phase(loop, updates=2, epochs=2), make_experience(), NOISE)
        weights.append(torch.cat([p.detach().reshape(-1) for p in loop.run.roles.parameters("current")]).double())
    assert 0 < relative(*weights) < 1e-4  # AdamW divides a rounding error by a small root
    assert not loop.run.roles.same("current", "reference")


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_a_method_does_not_depend_on_microbatches(name: str) -> None:
    task = make_task()
    method = make_method(name, task, updates=1)
    loop = make_loop(method, task, forward_batch=64)
    with torch.no_grad():
        experience = method.collect(loop.run)
    grads: list[Tensor] = []
    for size in (64, 5):
        loop.run.forward_batch = size
        loop.updater.fresh = True
        (phase,) = method.phases(loop.run)
        loop.updater.run_phase(phase, experience, NOISE)
        grads.append(gradient(loop))
    # the log-probability sums terms of opposite sign: a rounding error of 1e-7 grows a little
    assert relative(*grads) < 1e-5


def updates_seen(
    unit: Unit, experience: Experience, forward_batch: int = 64, epochs: int = 1, micro: Unit | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """(edges of each update, edges of each microbatch)."""
    method, loop = regression(forward_batch)
    updates: list[list[int]] = []

    def before(rows: Experience) -> Experience:
        updates.append(rows.edges.extras["number"].tolist())
        return rows

    phase = method.phase(loop, unit=unit, micro=micro, updates=3, epochs=epochs, before=before)
    loop.updater.run_phase(phase, experience, NOISE)
    return updates, [piece.tolist() for piece in method.seen]


@pytest.mark.parametrize("unit", ["edge", "sample", "group"])
def test_updates_part_the_edges_exactly_once(unit: Unit) -> None:
    updates, pieces = updates_seen(unit, make_experience(), epochs=2)
    assert [len(part) for part in updates] == [12] * 6
    for epoch in (updates[:3], updates[3:]):
        assert sorted(chain(*epoch)) == list(range(36))
    assert sorted(map(sorted, updates[:3])) != sorted(map(sorted, updates[3:])) or unit == "group"
    assert sorted(chain(*pieces)) == sorted(chain(*updates))


@pytest.mark.parametrize("unit", ["edge", "sample", "group"])
def test_the_edges_of_an_update_do_not_depend_on_their_order(unit: Unit) -> None:
    one, _ = updates_seen(unit, make_experience())
    other, _ = updates_seen(unit, shuffled(make_experience()))
    assert [sorted(part) for part in one] == [sorted(part) for part in other]


@pytest.mark.parametrize(("unit", "size"), [("sample", 1), ("group", 4)])
def test_units_stay_whole_in_updates_and_in_microbatches(unit: Unit, size: int) -> None:
    owner = torch.arange(12).repeat(3) // size
    for forward_batch in (2, 5, 20):
        updates, pieces = updates_seen(unit, shuffled(make_experience()), forward_batch, micro=unit)
        for parts in (updates, pieces):
            for part in parts:
                held = set(owner[torch.tensor(part)].tolist())
                assert len(part) == len(held) * 3 * size


def test_the_steps_of_samples_fill_the_calls_of_the_network() -> None:
    updates, pieces = updates_seen("sample", make_experience(), 5)
    assert [len(part) for part in updates] == [12] * 3
    assert [len(piece) for piece in pieces] == [5, 5, 2] * 3


def test_a_guided_loss_fills_a_call_of_the_network_with_half_as_many_rows() -> None:
    for guidance, sizes in ((1.0, [8, 4]), (3.0, [4, 4, 4])):
        method, loop = regression(8)
        loop.run.task = replace(loop.run.task, sampler=replace(loop.run.task.sampler, guidance=guidance))
        loop.updater.run_phase(method.phase(loop, updates=3, unit="sample", guided=True), make_experience(), NOISE)
        assert [len(piece) for piece in method.seen] == sizes * 3


class OneKey(Noise):
    """Every unit draws the same key."""

    def named(self, scope: str) -> "OneKey":
        return self

    def uniform(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        return torch.full((len(index), *shape), 0.5)


@pytest.mark.parametrize("unit", ["edge", "sample", "group"])
def test_units_that_draw_one_key_are_told_apart(unit: Unit) -> None:
    method, loop = regression()
    phase = method.phase(loop, unit=unit, updates=3)
    loop.updater.run_phase(phase, make_experience(), OneKey(0))
    assert [len(piece) for piece in method.seen] == [12, 12, 12]


def test_more_updates_than_units_leave_no_empty_step() -> None:
    method, loop = regression()
    means = loop.updater.run_phase(method.phase(loop, unit="group", updates=7), make_experience(), NOISE)
    assert means["updates"] == 3
    assert loop.updater.steps == {"current": 3}


def test_before_sees_a_whole_update_and_what_it_returns_is_trained() -> None:
    method, loop = regression(5)
    seen: list[int] = []

    def before(rows: Experience) -> Experience:
        seen.append(len(rows.index))
        assert rows.edges.x_s is not None
        return replace(
            rows, edges=replace(rows.edges, end=Pooled.of(rows.edges.x_s.mean(0).expand(len(rows.index), -1)))
        )

    loop.updater.run_phase(method.phase(loop, before=before), make_experience(), NOISE)
    assert seen == [36]
    experience = make_experience()
    assert experience.edges.x_s is not None
    mean = experience.edges.x_s.mean(0).expand(36, -1)
    direct = with_edges(experience, lambda edges: replace(edges, end=Pooled.of(mean)))
    other, still = regression(64)
    still.updater.run_phase(other.phase(still), direct, NOISE)
    assert relative(gradient(still), gradient(loop)) < 1e-6


def test_stop_ends_the_phase_after_the_update_that_asked_for_it() -> None:
    method, loop = regression()
    asked: list[float] = []

    def stop(means: Any) -> bool:
        asked.append(means["label"])
        return len(asked) == 4

    means = loop.updater.run_phase(method.phase(loop, updates=3, epochs=5, stop=stop), make_experience(), NOISE)
    assert means["updates"] == len(asked) == 4
    assert loop.updater.steps["current"] == 4
    assert means["label"] == pytest.approx(sum(asked) / 4)


def test_select_and_mask_together_choose_the_edges() -> None:
    method, loop = regression()
    experience = masked(make_experience())
    phase = method.phase(loop, select=lambda rows: (rows.edges.step == 1).nonzero()[:, 0])
    loop.updater.run_phase(phase, experience, NOISE)
    assert sorted(torch.cat(method.seen).tolist()) == [n for n in range(12, 24) if n % 3]


def test_a_phase_without_edges_does_nothing() -> None:
    for updates in (1, 3):
        method, loop = regression()
        phase = method.phase(loop, updates=updates, select=lambda rows: torch.zeros(0, dtype=torch.int64))
        assert loop.updater.run_phase(phase, make_experience(), NOISE) == {"updates": 0.0}


def test_followers_move_when_their_source_steps_and_once_per_iteration() -> None:
    specs: dict[str, RoleSpec] = {
        "fast": Lagging("current", lambda n: 0.0, every=2),
        "slow": Lagging("current", lambda n: 0.5),
        "shadow": Lagging("slow", lambda n: 0.0),
    }
    method = Regression(specs)
    loop = make_loop(method, make_task(), forward_batch=64)
    loop.updater.optimizers["current"].param_groups[0]["lr"] = STEP
    first = loop.run.roles.parameters("current")[0].detach().clone()
    loop.updater.run_phase(method.phase(loop, updates=3), make_experience(), NOISE)
    assert not loop.run.roles.same("fast", "current")  # copied after the second of three steps
    assert loop.run.roles.same("slow", "reference")
    loop.updater.follow()
    now = loop.run.roles.parameters("current")[0].detach()
    slow = next(loop.run.roles.module("slow").parameters())
    assert torch.allclose(slow, 0.5 * first + 0.5 * now, rtol=1e-6, atol=0)
    assert loop.run.roles.same("shadow", "slow")


Change = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Tensor.detach, "no gradient"),
        (lambda value: value.mean()[None], "one value for each"),
        (lambda value: value * torch.nan, "is nan"),
    ],
)
def test_a_broken_loss_is_refused_and_moves_nothing(change: Change, message: str) -> None:
    method, loop = regression()
    loop.updater.optimizers["current"].param_groups[0]["lr"] = STEP
    before = loop.run.roles.state_dict()

    def loss(rows: Experience, noise: NoiseSource) -> Loss:
        return Loss({"broken": Term(change(method.value(loop, "current", rows)), 0.5)})

    with pytest.raises(GuardError, match=message):
        loop.updater.run_phase(Phase("current", loss), make_experience(), NOISE)
    after = loop.run.roles.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not loop.updater.optimizers["current"].state


def test_a_term_of_weight_zero_needs_no_gradient() -> None:
    method, loop = regression()

    def loss(rows: Experience, noise: NoiseSource) -> Loss:
        value = method.value(loop, "current", rows)
        return Loss({"one": Term(value), "off": Term(value.detach(), 0.0)})

    means = loop.updater.run_phase(Phase("current", loss), make_experience(), NOISE)
    assert means["loss/off"] == pytest.approx(means["loss/one"])


def test_a_gradient_that_misses_the_role_of_its_phase_is_refused() -> None:
    method = Regression({"critic": Trained("current")})
    loop = make_loop(method, make_task())

    def loss(rows: Experience, noise: NoiseSource) -> Loss:
        return Loss({"one": Term(method.value(loop, "critic", rows))})

    with pytest.raises(GuardError, match="reaches role current"):
        loop.updater.run_phase(Phase("current", loss), make_experience(), NOISE)
    loop.updater.run_phase(Phase("critic", loss), make_experience(), NOISE)
    assert loop.updater.fresh  # the critic's step says nothing of the ratio


class Forgetful(nn.Module):
    """A network whose output changes from call to call, as with dropout left on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.network(x_t, t, condition) * (1 + 1e-3 * self.calls)


def test_a_ratio_that_is_not_one_is_refused() -> None:
    task = make_task()
    network = task.model.network
    assert isinstance(network, nn.Module)
    task = replace(task, model=replace(task.model, network=Forgetful(network)))
    loop = make_loop(make_method("flow-grpo", task), task)
    with pytest.raises(GuardError, match="ratio differs from 1"):
        loop.iterate(0)


def test_dropout_is_off_so_the_ratio_is_one() -> None:
    task = make_task()
    network = task.model.network
    assert isinstance(network, nn.Module)

    class Dropping(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.dropout = inner, nn.Dropout(0.5)

        def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
            return self.dropout(self.inner(x_t, t, condition))

    task = replace(task, model=replace(task.model, network=Dropping(network).train()))
    loop = make_loop(make_method("flow-grpo", task, updates=1), task)
    loop.iterate(0)
    assert loop.rows[0]["ratio_mean"] == 1.0
    assert loop.rows[0]["ratio_std"] == 0.0


def test_a_phase_may_say_which_update_an_edge_belongs_to_and_hear_of_each() -> None:
    method, loop = regression()
    heard: list[float] = []
    experience = shuffled(make_experience())
    phase = method.phase(
        loop,
        updates=3,
        part=lambda experience: 2 - experience.edges.step,
        after=lambda metrics: heard.append(metrics["label"]),
    )
    loop.updater.run_phase(phase, experience, NOISE)
    assert heard == [2, 1, 0]
    assert [sorted(piece.tolist()) for piece in method.seen] == [
        list(range(24, 36)),
        list(range(12, 24)),
        list(range(12)),
    ]


def test_microbatches_count_units_where_the_rows_of_one_share_a_state() -> None:
    method, loop = regression(forward_batch=2)
    loop.updater.run_phase(method.phase(loop, unit="group", one_state=True), make_experience(), NOISE)
    assert [len(piece) for piece in method.seen] == [24, 12]


def test_a_level_keeps_groups_whole_in_an_update_and_one_step_of_a_group_whole_in_a_microbatch() -> None:
    experience = make_experience()  # 3 groups of 4 samples, 3 steps each
    method, loop = regression(forward_batch=2)  # smaller than a cell: a cell is never parted
    loop.updater.run_phase(method.phase(loop, unit="level", updates=3), experience, NOISE)
    groups = [experience.group[experience.edges.sample[piece]] for piece in method.seen]
    steps = [experience.edges.step[piece] for piece in method.seen]
    assert [len(piece) for piece in method.seen] == [4] * 9
    assert all(len(group.unique()) == len(step.unique()) == 1 for group, step in zip(groups, steps, strict=True))
    # the three cells of a group follow one another: they belong to one update
    assert all(len(torch.cat(groups[start : start + 3]).unique()) == 1 for start in (0, 3, 6))
    method, loop = regression(forward_batch=8)
    loop.updater.run_phase(method.phase(loop, unit="level"), experience, NOISE)
    assert [len(piece) for piece in method.seen] == [8, 8, 8, 8, 4]


def test_microbatches_may_part_what_an_update_keeps_together() -> None:
    method, loop = regression(forward_batch=5)
    updates: list[set[int]] = []

    def before(rows: Experience) -> Experience:
        updates.append(set(rows.group.tolist()))
        assert len(rows.group) == 12
        return rows

    phase = method.phase(loop, unit="group", micro="edge", updates=3, before=before)
    loop.updater.run_phase(phase, make_experience(), NOISE)
    assert sorted(map(sorted, updates)) == [[0], [1], [2]]
    assert [len(piece) for piece in method.seen] == [5, 5, 2] * 3
