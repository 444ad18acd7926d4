"""What advantages promise, whatever the rewards: measured on drawn rewards and uneven groups, in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.credit import aggregate, group_advantage, leave_one_out, optimality, standardise
from difftilt.credit.group import Scale

Advantage = Callable[[Tensor, Tensor], Tensor]


def _of(std: Scale) -> Advantage:
    return lambda rewards, group: group_advantage(rewards, group, std=std)


def _two(rewards: Tensor, group: Tensor) -> Tensor:
    return aggregate({"a": rewards, "b": rewards.sin()}, {"a": 1.0, "b": 0.5}, group, "renormalised")


INVARIANT: dict[str, Advantage] = {std: _of(std) for std in ("group", "pooled", "none")} | {"rloo": leave_one_out}
EVERY: dict[str, Advantage] = INVARIANT | {"global": _of("global"), "two": _two}
SAMPLES = 97


def _drawn() -> tuple[Tensor, Tensor]:
    """Rewards in [0, 1) and a group of each; the groups differ in size and do not stand together."""
    generator = torch.Generator().manual_seed(0)
    group = (torch.rand(SAMPLES, generator=generator) ** 2 * 12).long()
    return torch.rand(SAMPLES, generator=generator, dtype=torch.float64), group


def constant_reward() -> float:
    """Largest advantage that a constant reward per prompt earns."""
    group = _drawn()[1]
    rewards = (0.1 + group).double()
    return max(EVERY[name](rewards, group).abs().max().item() for name in EVERY if name != "two")


def prompt_offset(functions: dict[str, Advantage]) -> float:
    """Largest change of an advantage when each prompt's rewards are shifted by up to 10."""
    rewards, group = _drawn()
    offset = torch.linspace(-10, 10, int(group.max()) + 1, dtype=torch.float64)[group]
    return max((f(rewards + offset, group) - f(rewards, group)).abs().max().item() for f in functions.values())


def row_order() -> float:
    """Largest change of an advantage when the rows and the group labels are permuted."""
    rewards, group = _drawn()
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    relabelled = (17 - group) ** 2
    moved = [f(rewards[order], relabelled[order]) - f(rewards, group)[order] for f in EVERY.values()]
    return max(gap.abs().max().item() for gap in moved)


def own_reward_in_baseline(function: Advantage) -> float:
    """Largest |1 - dA_i/dr_i|: what the baseline of a sample takes from the sample's own reward."""
    rewards, group = _drawn()
    jacobian = torch.autograd.functional.jacobian(lambda r: function(r, group), rewards)
    assert isinstance(jacobian, Tensor)
    return (1 - jacobian.diagonal()).abs().max().item()


def optimality_is_affine() -> float:
    """Largest |(2r - 1) - A/A_max| over advantages that are not clipped."""
    advantage = standardise(_drawn()[0])
    return (2 * optimality(advantage, 5.0) - 1 - advantage / 5).abs().max().item()


PROOFS = (
    Proof("a reward that is constant per prompt gives advantage 0", constant_reward, at_most=0.0),
    Proof(
        "an offset per prompt changes no advantage (std of the group, pooled, none; leave-one-out)",
        lambda: prompt_offset(INVARIANT),
        # rounding: the std of a group may be as small as 1e-4 + the eps of the division
        at_most=1e-9,
    ),
    Proof(
        "the std of the whole batch about the batch's mean does see an offset per prompt",
        lambda: prompt_offset({"global": EVERY["global"]}),
        at_least=0.1,
    ),
    Proof("permuting rows and renaming groups permutes the advantages", row_order, at_most=1e-9),
    Proof(
        "the leave-one-out baseline holds nothing of the sample's own reward",
        lambda: own_reward_in_baseline(leave_one_out),
        at_most=1e-12,
    ),
    Proof(
        "the group mean as baseline does hold 1/n of it",
        lambda: own_reward_in_baseline(EVERY["none"]),
        at_least=0.02,
    ),
    Proof("optimality 2r - 1 is A/A_max where nothing is clipped", optimality_is_affine, at_most=1e-12),
)
