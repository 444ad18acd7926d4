"""Measuring a model on held-out prompts at fixed noise: reward, drift and diversity side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward, Samples, Scores, SetReward
from difftilt.sampling.drift import path_kl
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.statistics.diversity import group_diversity, mean_group_diversity
from difftilt.training.drawing import in_turn
from difftilt.training.experience import PromptBatch
from difftilt.training.plain import draw
from difftilt.training.protocol import Task
from difftilt.training.run import LoopRun
from difftilt.training.world import World
from difftilt.trees import take

DRIFT_SAMPLES = 128
"""Samples whose path KL is computed: it costs five times as much as sampling them in eight steps."""
DRIFT_STEPS = 20
"""Steps of the grid on which the path KL is summed: its own, so that numbers do not depend on a method's sampler."""


@dataclass(frozen=True)
class Measured:
    """One evaluation.

    Attributes:
        numbers: ``reward``, ``reward/<component>``, every held-out reward, ``kl_reference``, ``diversity``. Of reward
            and held-out rewards also ``<name>_std``, the population std over samples; of held-out rewards that declare
            one also ``<name>_tolerance``; of the task's headline also ``<name>@<category>``, the mean over the prompts
            of each category that the task knows. A pooled reward scores all samples as one set: it has only its name.
        samples: decoded, of this process.
    """

    numbers: dict[str, float]
    samples: Samples


def measure(run: LoopRun, role: str, sampler: Sampler, count: int, seed: int) -> Measured:
    """Evaluate the weights of ``role`` on held-out prompts, the same prompts and noise for every call with one seed.

    Args:
        run: gives task, roles and processes. Its ledger does not count evaluations.
        role: whose weights.
        sampler: how to sample.
        count: samples over all prompts and processes; every prompt gets at least two.
        seed: of prompts and noise.
    """
    groups, size = _heldout_groups(run, count)
    for reward in (run.task.reward, *run.task.heldout.values()):
        _large_enough(reward, groups, size)
    # where a process would go without a group, every process measures all of them: sets stay whole, numbers equal
    run = replace(run, ledger=Ledger(), world=run.world if groups >= run.world.size else World())
    noise = Noise(seed).named("evaluation")
    with torch.no_grad():
        batch = heldout_batch(run, count)
        made, samples, scores = in_turn(
            run,
            batch,
            lambda part: draw(run, role, sampler, part, noise),
            lambda x_0, part: run.samples(x_0, part, heldout=True),
        )
        x_0 = torch.cat(made)
        numbers = numbers_of(run, samples, scores)
        few = batch.index % max(1, groups * size // DRIFT_SAMPLES) == 0
        drift = drift_of(run, role, x_0[few], take(batch, few.nonzero()[:, 0]), noise)
        numbers["kl_reference"] = float(run.world.gather(drift).mean())
    return Measured(numbers, samples)


def numbers_of(run: LoopRun, samples: Samples, scores: Scores | None = None) -> dict[str, float]:
    """All that is known of samples of held-out prompts without their model: every number but ``kl_reference``.

    Args:
        run: gives rewards and processes.
        samples: of this process.
        scores: of the task's own reward, where it is known already.
    """
    return _rewards(run, samples, run.score(samples) if scores is None else scores) | {
        "diversity": diversity_of(run, samples.media, samples.group)
    }


def _heldout_groups(run: LoopRun, count: int) -> tuple[int, int]:
    """One group for every held-out prompt, or as many as there are pairs of samples; and the samples of each."""
    groups = min(len(run.task.heldout_prompts), max(1, count // 2))
    return groups, max(2, count // groups)


def _large_enough(reward: Reward, groups: int, size: int) -> None:
    """Refuse an evaluation that is too small for a reward of sets.

    Raises:
        UserError: names the setting.
    """
    for part in reward.rewards.values() if isinstance(reward, WeightedSum) else ():
        _large_enough(part, groups, size)
    if not isinstance(reward, SetReward):
        return
    each = groups * size if reward.capabilities.pooled else size
    if each < reward.smallest:
        least = reward.smallest if reward.capabilities.pooled else groups * reward.smallest
        raise UserError(
            f"training.evaluation_samples gives {groups * size} samples, so sets of {each}, and {reward.name!r} scores "
            f"sets of at least {reward.smallest}: raise it to {least}, or see what the reward offers for small sets"
        )


def heldout_batch(run: LoopRun, count: int) -> PromptBatch:
    """This process's share of whole groups, spread over the held-out prompts; at least two samples in each."""
    groups, size = _heldout_groups(run, count)
    rank, processes = run.world.rank, run.world.size
    share = torch.arange(rank * groups // processes, (rank + 1) * groups // processes)
    group = share.repeat_interleave(size)
    return run.batch(_spread(run.task, groups)[group], group, first=int(share[0]) * size, heldout=True)


def _spread(task: Task, groups: int) -> Int[Tensor, " groups"]:
    """Places of the prompts that are evaluated: evenly over all, unless that step leaves out a whole category."""
    prompts = len(task.heldout_prompts)
    even = torch.arange(groups) * prompts // groups
    if task.categories is None:
        return even
    kinds = [task.categories(prompt) for prompt in task.heldout_prompts]
    if len({kinds[place] for place in even.tolist()}) == len(set(kinds)):
        return even
    # prompts that come in turn by category meet an even step; the first ones then hold every category
    return torch.arange(groups)


def _rewards(run: LoopRun, samples: Samples, scores: Scores) -> dict[str, float]:
    numbers = {f"reward/{name}": float(run.gather(value)[0].mean()) for name, value in scores.components.items()}
    rewards = {"reward": run.task.reward} | dict(run.task.heldout)
    columns = {"reward": scores.total}
    columns |= {name: run.score_with(reward, samples).total for name, reward in run.task.heldout.items()}
    for name, column in columns.items():
        values = run.gather(column.double())[0]
        numbers[name] = float(values.mean())
        if not rewards[name].capabilities.pooled:  # one set has one score, and neither spread nor kinds of prompts
            numbers[f"{name}_std"] = float(values.std(correction=0))
    for name, reward in run.task.heldout.items():
        if reward.capabilities.tolerance is not None:
            numbers[f"{name}_tolerance"] = reward.capabilities.tolerance
    if rewards[run.task.headline].capabilities.pooled:
        return numbers
    return numbers | _by_category(run, columns[run.task.headline], samples.prompts)


def _by_category(run: LoopRun, column: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean of the headline over the prompts of each category that has any."""
    task = run.task
    if task.categories is None:
        return {}
    names = list(dict.fromkeys(map(task.categories, task.heldout_prompts)))
    place = torch.tensor([names.index(task.categories(prompt)) for prompt in prompts], dtype=torch.int64)
    values, places = run.gather(column.double(), place.to(column.device))
    return {f"{task.headline}@{names[one]}": float(values[places == one].mean()) for one in places.unique().tolist()}


def drift_of(run: LoopRun, role: str, x_0: Tensor, batch: PromptBatch, noise: Noise) -> Float[Tensor, " samples"]:
    """Path KL of ``role`` to the reference from each sample, in nats: unguided, on a grid of its own."""
    grid = _drift_grid(run.task)
    if run.roles.same(role, "reference"):
        return torch.zeros(len(x_0), device=x_0.device)
    current, reference = run.denoiser(role, 1.0), run.denoiser("reference", 1.0)
    return path_kl(current, reference, x_0, batch.condition, grid, noise, batch.index)


def _drift_grid(task: Task) -> Float[Tensor, " times"]:
    """Even steps over the times that samples pass: all of them, or those below the one that they begin at."""
    grid = uniform_grid(DRIFT_STEPS)
    return grid * task.sampler.grid[0].to(grid) if task.sampler.begins else grid


def quick_drift(run: LoopRun, role: str, x_0: Tensor, condition: Condition, index: Int[Tensor, " samples"]) -> float:
    """The same number from one step of the grid per sample and at most one network batch of samples: unbiased, cheap.

    The samples are the first of all processes together, so that their number does not change the result; their steps
    go round the grid from a random one, for the rate grows steeply towards the data and one step for all is too noisy.
    """
    if run.roles.same(role, "reference"):
        return 0.0
    run = replace(run, ledger=Ledger())
    noise = run.noise.named("drift")
    first = int(noise.permutation(DRIFT_STEPS, purpose="step")[0])
    earlier = sum(run.world.lengths(len(x_0))[: run.world.rank])
    rows = torch.arange(max(0, min(run.forward_batch - earlier, len(x_0))))
    step = (first + earlier + rows) % DRIFT_STEPS
    times = _drift_grid(run.task)
    kl = torch.zeros(0, device=x_0.device)
    if len(rows):
        grid, rows = torch.stack([times[step], times[step + 1]], dim=1), rows.to(x_0.device)
        with torch.no_grad():
            current, reference = run.denoiser(role, 1.0), run.denoiser("reference", 1.0)
            kl = path_kl(current, reference, x_0[rows], take(condition, rows), grid, noise, index[rows]).float()
    return float(run.world.gather(kl).mean()) * DRIFT_STEPS


def diversity_of(run: LoopRun, media: Tensor, group: Tensor) -> float:
    """Mean distance between the features of samples of one group; flattened media where the task names no features.

    Features, which may be whole images, stay in their process, but for groups that are spread over several.
    """
    features = media.flatten(1).double() if run.task.features is None else run.task.features(media)
    (labels,) = run.gather(group.unique())
    if len(labels.unique()) < len(labels):
        return float(mean_group_diversity(*run.gather(features, group)))
    (every,) = run.gather(group_diversity(features, group))
    return float(every.nanmean())
