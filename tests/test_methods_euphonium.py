"""Guidance moves what it should and nothing else; two advantages, two clipped terms; bad settings are refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difftilt.checks.trial import loop_of, make_method, perturbed, trained, with_reward
from difftilt.errors import RewardError, UserError
from difftilt.methods.policy_gradient.euphonium import PROCESS, TRAINED, Euphonium
from difftilt.models import ProcessReward, save_pretrained
from difftilt.models.ledger import Ledger
from difftilt.process.protocol import Condition
from difftilt.rewards.compose import Normalisation, WeightedSum
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import SHIFT, Edges
from difftilt.sampling.windows import window_mask
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Sequences
from difftilt.testbeds.shapes import Shapes
from difftilt.training.experience import Experience
from difftilt.training.guided import Distillation
from difftilt.training.loop import Loop
from difftilt.training.policy_gradient import Window
from difftilt.training.process_reward import ROLE, fit_to_base
from difftilt.training.protocol import Task
from difftilt.training.surrogate import surrogate_loss
from difftilt.values.process_reward import CHUNK, Scorer, Strength, fit_process_reward
from difftilt.values.spsa import spsa_gradient
from training_runs import make_task, steady, train

SMALL: dict[str, Any] = {
    "groups": 3,
    "group_size": 4,
    "updates": 1,
    "guide_from": 2,
    "fit_samples": 16,
    "fit_steps": 3,
    "fit_batch": 16,
    "step_fraction": 1.0,
}


class Bowl(nn.Module):
    """-(1 + t)|x|²/2, whose gradient is -(1 + t)·x."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return -(1 + t) * x_t.square().flatten(1).sum(1) / 2


def task() -> Task:
    return perturbed(Mixtures(MixturesConfig(steps=6)).task())


def rolled(network: nn.Module | None = None, on: Task | None = None, **settings: Any) -> tuple[Loop, Experience]:
    """A loop with its first experience."""
    on = task() if on is None else on
    loop = loop_of("euphonium", on, **{**SMALL, **settings})
    assert isinstance(loop.method, Euphonium)
    if network is not None:
        loop = _with(loop, network, on, settings)
    with torch.no_grad():
        return loop, loop.method.collect(loop.run)


def _with(loop: Loop, network: nn.Module, on: Task, settings: dict[str, Any]) -> Loop:
    """The loop again, with another process reward."""
    held = loop.run.roles
    object.__getattribute__(held, "_held")[ROLE].module = network
    return loop


def edges_of(experience: Experience) -> tuple[Edges, Tensor, Tensor]:
    edges = experience.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    return edges, edges.x_t, edges.x_s


def test_guidance_0_is_the_base_sampler_bit_for_bit() -> None:
    settings: dict[str, Any] = {"kernel": "dance_sde", "noise_level": 0.25, "share_start": True, "output": "x0"}
    _, plain = rolled(guidance=0.0)
    loop = loop_of("flow-grpo", task(), groups=3, group_size=4, **settings)
    with torch.no_grad():
        base = loop.method.collect(loop.run)
    assert plain.x_0 is not None
    assert base.x_0 is not None
    assert torch.equal(plain.x_0, base.x_0)
    assert torch.equal(plain.edges.log_prob, base.edges.log_prob)  # type: ignore[arg-type]


def test_a_guided_state_differs_by_gamma_times_the_gradient_and_only_where_guidance_is_active() -> None:
    _, plain = rolled(Bowl(), guidance=0.0)
    _, guided = rolled(Bowl(), guidance=0.5, guide_to=5, guide_every=2)
    edges, x_t, x_s = edges_of(guided)
    _, _, base = edges_of(plain)
    before, first = edges.step < 2, edges.step == 2
    assert torch.equal(x_s[before], base[before])
    assert edges.s is not None
    gamma = (0.5 * (edges.t - edges.s))[first, None]
    gradient = -(1 + edges.t[first, None]) * x_t[first]
    assert torch.allclose(x_s[first] - base[first], gamma * gradient, atol=1e-6)
    # step 3 is between two guided ones: its noise and its mean are those of the unguided law at its own state
    _, again = rolled(Bowl(), guidance=0.5, guide_to=3)
    _, _, other = edges_of(again)
    assert torch.equal(x_s[edges.step == 3], other[edges.step == 3])
    assert not torch.equal(x_s[edges.step == 4], other[edges.step == 4])


def test_the_factor_is_fixed_or_half_the_squared_diffusion_over_the_temperature() -> None:
    t, s, g = torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.4]), torch.tensor([0.5, 0.0])
    std = g * (t - s).sqrt()
    assert torch.allclose(Strength(None, 2.0)(std, t, s), g**2 / 4 * (t - s))
    assert torch.allclose(Strength(None, 2.0, by_length=False)(std, t, s), g**2 / 4)
    # a step without noise has no drift to put guidance in
    assert torch.allclose(Strength(0.3, 2.0)(std, t, s), torch.tensor([0.06, 0.0]))
    far = Strength(1.0, 1.0, by_length=False).shift(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), std, t, s, unit=True)
    assert torch.allclose(far, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_the_paper_s_fixed_factor_is_the_kl_form_at_its_temperature() -> None:
    _, fixed = rolled(Bowl())
    _, kl = rolled(Bowl(), guidance="kl")
    assert torch.allclose(edges_of(fixed)[2], edges_of(kl)[2], atol=1e-7)


@pytest.mark.parametrize("mean", ["unguided", "guided"])
def test_the_ratio_is_1_before_the_first_update_under_either_law_and_differs_between_them(mean: str) -> None:
    loop, experience = rolled(Bowl(), guidance=2.0, score_mean=mean)
    assert (SHIFT in experience.edges.extras) == (mean == "guided")
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    phase = loop.method.phases(loop.run)[0]
    ratio = phase.loss(rows, loop.run.noise).metrics["ratio"]
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-6)
    other = {k: v for k, v in rows.edges.extras.items() if k != SHIFT}
    other |= {} if mean == "guided" else {SHIFT: torch.ones_like(edges_of(rows)[1])}
    method = loop.method
    assert isinstance(method, Euphonium)
    mixed = replace(rows, edges=replace(rows.edges, extras=other))
    weights = {"outcome": 1.0, "process": 1.0}
    wrong = surrogate_loss(method.config, method.preset, loop.run, mixed, weights=weights).metrics["ratio"]
    assert float((wrong - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_step_is_judged_by_the_state_it_reaches_or_by_the_one_before(guidance: float) -> None:
    for which in ("reached", "before"):
        loop, experience = rolled(Bowl(), guidance=guidance, process_state=which, share_start=True, guide_from=0)
        edges, x_t, x_s = edges_of(experience)
        assert edges.s is not None
        states, times = (x_s, edges.s) if which == "reached" else (x_t, edges.t)
        assert torch.allclose(edges.extras[PROCESS], Bowl()(states, times, None), atol=1e-6)
        assert edges.advantage is not None
        # one start for the group: before the first step nothing tells its samples apart
        assert bool((edges.advantage[edges.step == 0, 1] == 0).all()) == (which == "before")
        calls = 12 * 5 * (which == "reached" or guidance == 0) + 12 * 6 * (guidance > 0)
        assert loop.run.ledger.auxiliary_calls == calls


def test_both_advantages_are_normalised_in_the_group_the_process_one_at_every_step() -> None:
    _, experience = rolled(Bowl(), guidance=0.3, guide_from=2)
    edges = experience.edges
    assert edges.advantage is not None
    assert experience.rewards is not None
    for group in range(3):
        members = (experience.group == group).nonzero()[:, 0]
        rewards = experience.rewards[members].double()
        expected = (rewards - rewards.mean()) / rewards.std()
        for step in range(5):
            rows = (experience.group[edges.sample] == group) & (edges.step == step)
            assert torch.allclose(edges.advantage[rows, 0].double(), expected, atol=1e-5)
            scores = edges.extras[PROCESS][rows].double()
            own = (scores - scores.mean()) / scores.std() if step >= 2 else torch.zeros_like(scores)
            assert torch.allclose(edges.advantage[rows, 1].double(), own, atol=1e-4)


def test_a_process_reward_that_says_nothing_gives_no_advantage_and_no_nan() -> None:
    class Flat(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return 0 * x_t.flatten(1).sum(1) + 1

    _, experience = rolled(Flat(), credit="process")
    assert experience.edges.advantage is not None
    assert not bool(experience.edges.advantage.any())
    assert not bool(experience.edges.extras[TRAINED].any())


@pytest.mark.parametrize("credit", ["both", "outcome", "process"])
def test_every_advantage_has_a_clipped_term_of_its_own(credit: str) -> None:
    loop, experience = rolled(credit=credit, process_weight=0.5)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    terms = loop.method.phases(loop.run)[0].loss(rows, loop.run.noise).terms
    assert set(terms) == ({"outcome", "process"} if credit == "both" else {credit})
    assert rows.edges.advantage is not None
    for column, (name, term) in enumerate(terms.items()):
        assert term.weight == (0.5 if name == "process" else 1.0)
        assert torch.allclose(term.value.detach(), -rows.edges.advantage[:, column], atol=1e-5)


def test_best_and_worst_by_outcome_and_a_share_of_the_steps_are_trained() -> None:
    loop, experience = rolled(best_worst=2, step_fraction=0.6)
    edges = experience.edges
    select = loop.method.phases(loop.run)[0].select
    assert select is not None
    assert torch.equal(select(experience), edges.extras[TRAINED].nonzero()[:, 0])
    assert experience.rewards is not None
    kept = edges.sample[edges.extras[TRAINED]].unique().tolist()
    for group in range(3):
        members = (experience.group == group).nonzero()[:, 0]
        order = members[experience.rewards[members].argsort()]
        assert set(kept) & set(members.tolist()) == {int(order[0]), int(order[-1])}
    steps = {sample: edges.step[edges.extras[TRAINED] & (edges.sample == sample)].tolist() for sample in kept}
    assert all(len(mine) == 3 for mine in steps.values())
    assert len({tuple(mine) for mine in steps.values()}) > 1


def test_failures_of_the_process_reward_are_raised() -> None:
    class Broken(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return x_t.flatten(1).sum(1) * torch.nan

    class Steep(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return (x_t.flatten(1).sum(1) * 0).sqrt()

    class Blind(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return t

    for network, message in ((Broken(), "finite"), (Steep(), "gradient"), (Blind(), "no gradient")):
        with pytest.raises(RewardError, match=message):
            rolled(network)
    with pytest.raises(RewardError, match="finite"):
        Scorer(Broken(), Ledger())(torch.ones(2, 2), torch.ones(2), None)


def test_score_and_gradient_come_from_one_counted_evaluation_and_leave_no_trace_on_the_weights() -> None:
    network, ledger = ProcessReward((2,), hidden=8), Ledger()
    x = torch.randn(CHUNK + 5, 2, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(x),), 0.4)
    score, slope = Scorer(network, ledger).gradient(x, t, None)
    assert ledger.auxiliary_calls == len(x)
    assert torch.equal(score, Scorer(network, ledger)(x, t, None))
    assert all(parameter.grad is None for parameter in network.parameters())
    nudged = x.double().clone()
    nudged[:, 0] += 1e-4
    wide = ProcessReward((2,), hidden=8).double()
    rise = (wide(nudged, t.double()) - wide(x.double(), t.double())) / 1e-4
    assert torch.allclose(rise.float(), slope[:, 0], atol=1e-3)


def test_spsa_is_exact_in_the_mean_for_a_linear_score() -> None:
    slope = torch.tensor([1.0, -2.0, 0.5])
    directions = torch.randn(5_000, 1, 3, generator=torch.Generator().manual_seed(0))
    found = spsa_gradient(lambda x: x @ slope, torch.zeros(1, 3), directions, 0.01)
    # the std of one draw is at most sqrt(|slope|² + slope²) < 3.1
    assert torch.allclose(found[0], slope, atol=4 * 3.1 / 5_000**0.5)


def test_spsa_guides_without_a_process_reward_for_two_reward_calls_per_draw() -> None:
    loop, guided = rolled(gradient="spsa", guidance=1.0, credit="outcome", spsa_draws=2)
    assert ROLE not in loop.run.roles.names
    assert loop.run.ledger.reward_calls == 12 * (1 + 4 * 2 * 2)
    _, plain = rolled(guidance=0.0, credit="outcome")
    assert float(guided.rewards.mean()) > float(plain.rewards.mean())  # type: ignore[union-attr]


def test_the_fit_learns_the_posterior_mean_of_a_linear_reward() -> None:
    bed = Mixtures(MixturesConfig(means=((0.0,),), std=1.0, reward="linear"))
    noise = loop_of("flow-grpo", bed.task(), groups=2, group_size=2).run.noise
    x_0 = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    network = ProcessReward((1,), hidden=32)
    reward = 3 * x_0[:, 0] + 7
    fit_process_reward(network, bed.process, x_0, reward, None, noise, temperature=1.0, updates=200)
    t = torch.full((5,), 0.4)
    x = torch.linspace(-1.5, 1.5, 5)[:, None]
    with torch.no_grad():
        expected = 7 + 3 * (1 - t) / ((1 - t) ** 2 + t**2) * x[:, 0]
        assert torch.allclose(network(x, t), expected, atol=0.5)


def test_the_fit_keeps_every_row_s_condition() -> None:
    bed = Mixtures(MixturesConfig())
    noise = loop_of("flow-grpo", bed.task(), groups=2, group_size=2).run.noise
    label = torch.arange(512) % 2
    x_0 = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    network = ProcessReward((2,), classes=2, hidden=16)
    fit_process_reward(network, bed.process, x_0, 4.0 * label, label, noise, temperature=1.0, updates=60, batch=64)
    with torch.no_grad():
        low, high = network(x_0[:2], torch.full((2,), 0.7), torch.tensor([0, 1])).tolist()
    assert abs(low) < 1
    assert abs(high - 4) < 1


@pytest.mark.parametrize("shape", [(2,), (3, 16, 16), (2, 3, 9, 8), (1, 8, 8), (4, 3)])
@pytest.mark.parametrize("kind", ["none", "class", "text"])
def test_the_network_reads_any_latent_and_the_model_s_condition(shape: tuple[int, ...], kind: str) -> None:
    settings: dict[str, Any] = {"none": {}, "class": {"classes": 3}, "text": {"vector": 5}}[kind]
    network = ProcessReward(shape, hidden=8, **settings)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *shape, generator=generator), torch.tensor([0.2, 0.2])
    x[1] = x[0]
    vector = torch.randn(2, 5, generator=generator)
    condition = {"none": None, "class": torch.tensor([0, 3]), "text": {"vector": vector, "text": vector[:, None]}}[kind]
    out = network(x, t, condition)
    assert out.shape == (2,)
    assert torch.allclose(out[0], out[1], atol=1e-6) == (kind == "none")
    assert bool(network(x, t + 0.3, condition)[0] != out[0])


def test_a_saved_process_reward_is_used_as_it_is(tmp_path: Path) -> None:
    network = ProcessReward((2,), hidden=8, seed=3)
    save_pretrained(network, tmp_path, {"shape": [2], "hidden": 8})
    loop, _ = rolled(process_reward=str(tmp_path))
    held = loop.run.roles.module(ROLE).state_dict()
    assert all(torch.equal(held[key], value) for key, value in network.state_dict().items())
    assert loop.run.ledger.nfe == 12 * 6


def _saved(directory: Path, shape: tuple[int, ...], **settings: int) -> str:
    save_pretrained(ProcessReward(shape, **settings), directory, {"shape": list(shape), **settings})
    return str(directory)


def _conditioned(condition: Callable[[Sequence[str]], Condition]) -> Task:
    base = task()
    return replace(base, model=replace(base.model, encode=condition))


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((3,), {"classes": 4}, r"shape \(3,\) and 4 classes.*shape \(2,\) and 4 classes"),
        ((1, 2), {}, r"shape \(1, 2\).*shape \(2,\)"),  # as many numbers, which a perceptron would take
        ((2,), {"classes": 3}, "3 classes.*4 classes"),  # class 3 would be read as the null label
        ((2,), {"vector": 5}, "vectors of width 5.*4 classes"),
    ],
)
def test_a_saved_process_reward_of_another_shape_or_condition_is_refused(
    shape: tuple[int, ...], settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    on = _conditioned(lambda prompts: torch.arange(len(prompts)) % 4)
    on = replace(on, prompts=["a", "b", "c", "d"])
    with pytest.raises(UserError, match=message):
        make_method("euphonium", on, **SMALL, process_reward=_saved(tmp_path, shape, **settings))


@pytest.mark.parametrize(
    ("condition", "settings", "message"),
    [
        (lambda n: {"vector": torch.ones(n, 4)}, {"vector": 5}, "width 5.*width 4"),
        (lambda n: None, {"classes": 3}, "3 classes.*no class or vector"),
        (lambda n: None, {"vector": 3}, "width 3.*no class or vector"),
    ],
)
def test_a_saved_process_reward_that_reads_what_is_not_there_is_refused(
    condition: Callable[[int], Condition], settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    on = _conditioned(lambda prompts: condition(len(prompts)))
    with pytest.raises(UserError, match=message):
        make_method("euphonium", on, **SMALL, process_reward=_saved(tmp_path, (2,), **settings))


def test_a_saved_process_reward_may_know_more_classes_or_none_but_has_to_give_a_number(tmp_path: Path) -> None:
    on = _conditioned(lambda prompts: torch.arange(len(prompts)) % 4)
    for name, settings in (("more", {"classes": 9}), ("none", {})):
        make_method("euphonium", on, **SMALL, process_reward=_saved(tmp_path / name, (2,), **settings))
    network = ProcessReward((2,))
    network.offset.fill_(torch.nan)
    save_pretrained(network, tmp_path / "broken", {"shape": [2]})
    with pytest.raises(UserError, match="not finite"):
        make_method("euphonium", on, **SMALL, process_reward=str(tmp_path / "broken"))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_fit_is_to_the_samples_of_all_processes_and_gathers_only_what_the_network_reads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(prompts: Sequence[str]) -> Condition:
        each = torch.arange(len(prompts)) % 3
        text = {"vector": torch.ones(len(prompts), 5), "text": torch.ones(len(prompts), 7, 5), "keep": each > 0}
        return each if kind == "class" else text

    loop = loop_of("euphonium", _conditioned(encode), **SMALL)
    gathered: list[Tensor] = []
    fitted: list[tuple[Any, ...]] = []

    def gather(*columns: Tensor) -> tuple[Tensor, ...]:
        """As in a world of two, whose other process holds the same rows in reverse."""
        gathered.extend(columns)
        return tuple(torch.cat([column, column.flip(0)]) for column in columns)

    monkeypatch.setattr(loop.run, "gather", gather)
    monkeypatch.setattr("difftilt.training.process_reward.fit_process_reward", lambda *given, **_: fitted.append(given))
    with torch.no_grad():
        fit_to_base(loop.method.config, loop.run)  # type: ignore[attr-defined]
    assert [tuple(column.shape) for column in gathered] == [(16, 2), (16,), (16,) if kind == "class" else (16, 5)]
    ((_, _, *columns, _),) = fitted
    for column, own in zip(columns, gathered, strict=True):
        assert torch.equal(column, torch.cat([own, own.flip(0)]))


def test_the_fit_is_counted_and_happens_once() -> None:
    loop, _ = rolled()
    first = loop.run.ledger.copy()
    assert first.nfe == (16 + 12) * 6
    assert first.reward_calls == 16 + 12
    assert first.auxiliary_calls == 3 * 16 + 12 * 4 + 12 * 3
    before = {key: value.clone() for key, value in loop.run.roles.module(ROLE).state_dict().items()}
    loop.run.begin(1)
    with torch.no_grad():
        loop.method.collect(loop.run)
    assert (loop.run.ledger - first).nfe == 12 * 6
    assert all(torch.equal(before[key], value) for key, value in loop.run.roles.module(ROLE).state_dict().items())


@pytest.mark.long
@pytest.mark.parametrize("is_beside", [False, True])
def test_the_process_reward_survives_a_resume(is_beside: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {f"method_{key}": value for key, value in SMALL.items()}
    settings |= {"method_train_beside": is_beside, "method_groups": 4, "method_guide_from": 1}
    whole = train("euphonium", tmp_path / "whole", iterations=4, **settings)
    train("euphonium", tmp_path / "parts", iterations=2, **settings)
    parts = train("euphonium", tmp_path / "parts", iterations=4, resume=True, **settings)
    assert steady(parts.rows[2:]) == steady(whole.rows[2:])
    assert (f"loss/regression/{ROLE}" in whole.rows[-1]) == is_beside
    moved = whole.run.roles.module(ROLE).state_dict()
    assert all(torch.equal(moved[key], value) for key, value in parts.run.roles.module(ROLE).state_dict().items())


def test_distillation_alone_moves_to_a_fixed_target_whatever_was_distilled_before() -> None:
    settings: dict[str, Any] = {"distillation": Distillation(target="finite"), "guidance": 1.0}
    loop, experience = rolled(Bowl(), **settings)
    phase = loop.method.phases(loop.run)[1]
    rows = experience.rows(torch.arange(len(experience.edges.step)))

    def gradient_target() -> Tensor:
        """The residual's gradient with respect to the output bias, which is linear in the distance to the target."""
        loss = phase.loss(rows, loop.run.noise).terms["distillation"].value.sum()
        return torch.autograd.grad(loss, list(loop.run.roles.parameters("current")))[-1]

    one = gradient_target()
    with torch.no_grad():
        for parameter in list(loop.run.roles.parameters("current"))[-1:]:
            parameter.add_(0.1)
    loop.run.roles.stepped("current")
    # v moved by 0.1, the target by nothing: each row's gradient of the mean square over 2 dimensions moves by 0.1
    assert torch.allclose(gradient_target() - one, torch.full((2,), 0.1 * len(rows.index)), rtol=1e-3)


def test_inactive_steps_are_distilled_to_the_base_itself_and_the_limit_leaves_out_pure_noise() -> None:
    loop, experience = rolled(Bowl(), distillation=Distillation(target="finite"), guidance=1.0, guide_from=3)
    phase = loop.method.phases(loop.run)[1]
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    gap = phase.loss(rows, loop.run.noise).terms["distillation"].value.detach()
    assert bool((gap[rows.edges.step < 3] == 0).all())
    assert bool((gap[rows.edges.step >= 3] > 0).all())
    loop, experience = rolled(Bowl(), distillation=Distillation(), guidance=1.0)
    phase = loop.method.phases(loop.run)[1]
    assert phase.select is not None
    chosen = phase.select(experience)
    assert sorted(experience.edges.step[chosen].unique().tolist()) == [1, 2, 3, 4]


def test_the_weight_of_distillation_makes_it_the_kl_to_the_guided_step() -> None:
    settings: dict[str, Any] = {
        "distillation": Distillation(target="finite", kl_weighted=True),
        "guidance": 1.0,
        "guide_from": 0,
    }
    loop, experience = rolled(Bowl(), **settings, score_mean="guided", kernel="flow_sde", noise_level=0.7)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    got = loop.method.phases(loop.run)[1].loss(rows, loop.run.noise).terms["distillation"].value
    shift = rows.edges.extras[SHIFT]
    assert rows.edges.s is not None
    # current is the base: the gap of the means is the guidance itself
    safe = torch.where(rows.edges.t < 1, 1 - rows.edges.t, 1 - rows.edges.s)
    variance = 0.7**2 * rows.edges.t / safe * (rows.edges.t - rows.edges.s)
    assert torch.allclose(got.detach(), shift.square().mean(1) / (2 * variance), rtol=1e-3)


def test_distillation_alone_ends_the_surrogate_when_it_begins() -> None:
    loop, _ = rolled(distillation=Distillation(first=2, alone=True))
    policy, distil = loop.method.phases(loop.run)
    assert [policy.when(i) for i in range(4)] == [True, True, False, False]
    assert [distil.when(i) for i in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "guard", "score_mean": "guided", "kernel": "flow_sde"},
        {"kernel": "ddim", "noise_level": 1.0, "guidance": "kl"},
        {"kernel": "cps", "clip_range": 0.01, "scale_by_step": False},
        {"window": {"width": 3, "low": 1, "high": 5}, "unit_gradient": True},
        {"gradient": "spsa", "credit": "both", "kl_weight": 0.1},
        {"train_beside": True, "fit": "stationary", "temperature": 1.0},
        {"distillation": {"target": "limit", "bound": 5.0}, "guidance": 0.0},
        {"objective": "reinforce", "output": "state"},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values())[:40],
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    result = trained("euphonium", task(), 2, 1e-3, count=16, **{**SMALL, **settings})
    assert all(row["grad_norm"] > 0 for row in result.rows)


@cache
def vp_task() -> Task:
    return perturbed(Mixtures(MixturesConfig(process="vp", kernel="ancestral", steps=6, classes=4)).task())


def test_a_variance_preserving_model_with_classes_trains_and_distils() -> None:
    settings: dict[str, Any] = {"kernel": "ddim", "noise_level": 1.0, "distillation": Distillation(target="finite")}
    result = trained("euphonium", vp_task(), 2, 1e-3, count=16, **{**SMALL, **settings})
    assert result.rows[-1]["loss/distillation"] > 0


def test_one_iteration_on_digits() -> None:
    settings: dict[str, Any] = {**SMALL, "groups": 2, "guide_from": None}
    result = trained("euphonium", Digits().task(), 1, 1e-4, count=8, **settings)
    assert result.rows[0]["ratio_mean"] == pytest.approx(1, abs=1e-5)


@pytest.mark.long
def test_one_iteration_on_shapes_keeps_the_clean_last_step_unguided() -> None:
    settings: dict[str, Any] = {
        **SMALL,
        "groups": 2,
        "guide_from": 5,
        "objective": "guard",
        "guidance": "kl",
        "temperature": 0.1,
    }
    result = trained("euphonium", Shapes().task(), 1, 1e-4, count=8, **settings)
    assert result.rows[0]["ratio_mean"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide_from": 6}, "guide_from < guide_to <= 6"),
        ({"guide_to": 7}, "guide_to <= 6"),
        ({"guide_from": 5}, "never trained"),
        ({"guidance": -1.0}, "at least 0"),
        ({"best_worst": 3}, "even"),
        ({"best_worst": 6}, "group_size"),
        ({"gradient": "spsa", "distillation": Distillation()}, "method.gradient"),
        ({"guidance": 0.0, "distillation": Distillation(target="finite")}, "distillation.target"),
        ({"train_beside": True, "credit": "outcome", "guidance": 0.0}, "train_beside"),
        ({"process_reward": "/nowhere"}, "missing"),
        ({"window": {"width": 2}, "guide_from": None}, "move or widen the window"),
        ({"window": {"width": 2}, "guide_from": 4, "credit": "outcome"}, "move or widen the window"),
        ({"window": {"width": 2}, "guide_from": 4, "guidance": 0.0}, "move or widen the window"),
        # starts 0, 2 and 4: step 3 is in no window
        (
            {"window": {"width": 1, "motion": "sliding", "stride": 2}, "guide_from": 3, "guide_to": 4},
            "in method.window",
        ),
        ({"guide_from": 5, "credit": "outcome"}, "never trained"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("euphonium", task(), **{**SMALL, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"window": {"width": 1, "motion": "sliding", "stride": 2}, "guide_from": 2, "guide_to": 3},
        {"window": {"width": 2, "high": 5}, "guide_from": 4},  # in one of its positions
        {"window": {"width": 2}, "guide_from": 4, "guidance": 0.0, "credit": "outcome"},
    ],
)
def test_a_window_that_meets_a_guided_step_or_needs_none_is_taken(settings: dict[str, Any]) -> None:
    make_method("euphonium", task(), **{**SMALL, **settings})


@pytest.mark.parametrize(
    "window",
    [
        Window(width=2),
        Window(width=2, low=1, high=7),
        Window(width=3, motion="sliding", every=2),
        Window(width=1, motion="sliding", every=1, stride=3),
        Window(width=2, motion="decay", every=3, stride=2),
        Window(width=2, motion="exponential_decay", every=2),
    ],
)
def test_the_reach_of_a_window_is_what_it_covers_in_all_iterations(window: Window) -> None:
    starts = [window.start(10, iteration, Noise(0).at(iteration)) for iteration in range(200)]
    covered = torch.stack([window_mask(10, start, window.width) for start in starts]).any(0)
    assert torch.equal(window.reach(10), covered)


@pytest.mark.parametrize("scale", ["group", "batch", "running"])
@pytest.mark.parametrize("settings", [{}, {"gradient": "spsa", "credit": "outcome"}, {"guidance": 0.0}])
def test_a_reward_that_scales_every_batch_anew_is_refused(settings: dict[str, Any], scale: Normalisation) -> None:
    base = task()
    scaled = replace(base, reward=WeightedSum({"one": base.reward}, {"one": 1.0}, scale))
    with pytest.raises(UserError, match=f"reward.normalise = {scale}.*weigh"):
        make_method("euphonium", scaled, **{**SMALL, **settings})
    make_method("euphonium", replace(base, reward=WeightedSum({"one": base.reward}, {"one": 1.0})), **SMALL)


def test_a_reward_that_scales_every_batch_anew_is_taken_where_nothing_is_fitted_to_it(tmp_path: Path) -> None:
    base = task()
    scaled = replace(base, reward=WeightedSum({"one": base.reward}, {"one": 1.0}, "group"))
    make_method("euphonium", scaled, **{**SMALL, "guidance": 0.0, "credit": "outcome"})
    where = _saved(tmp_path, (2,))
    make_method("euphonium", scaled, **SMALL, process_reward=where)
    with pytest.raises(UserError, match="normalise"):
        make_method("euphonium", scaled, **SMALL, process_reward=where, train_beside=True)


def test_the_calls_of_the_process_reward_are_in_the_metrics() -> None:
    rows = trained("euphonium", task(), 2, 1e-3, count=16, **SMALL).rows
    guided, judged = 12 * 4, 12 * 3
    assert [row["auxiliary_calls"] for row in rows] == [3 * 16 + guided + judged, guided + judged]


def test_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="tokens"):
        make_method("euphonium", Sequences().task(), **SMALL)


def test_a_condition_that_cannot_be_read_is_refused() -> None:
    base = task()
    strange = replace(base, model=replace(base.model, encode=lambda prompts: [torch.zeros(len(prompts), 2, 2)]))
    with pytest.raises(UserError, match="vector"):
        make_method("euphonium", strange, **SMALL)


def test_constant_rewards_teach_nothing_where_only_the_outcome_is_trained() -> None:
    flat = with_reward(make_task(), lambda samples: torch.zeros(len(samples.media)))
    settings: dict[str, Any] = {**SMALL, "guide_from": 1, "credit": "outcome"}
    loop = loop_of("euphonium", flat, **settings)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    assert not bool(experience.edges.extras[TRAINED].any())
