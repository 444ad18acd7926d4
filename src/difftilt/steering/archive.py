"""What a search for several objectives trades off, and the archive of the best trade-offs that it has seen."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.errors import RewardError, UserError, quoted
from difftilt.leaves import nearest
from difftilt.models.ledger import Ledger
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.masked import Masked
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import score_components
from difftilt.statistics.folds import segment_mean
from difftilt.statistics.pareto import insert, pareto_rank
from difftilt.steering.protocol import Steered
from difftilt.training.protocol import Task
from difftilt.values.estimates import LatentReward

Scores = Float[Tensor, "rows components"]


@dataclass(frozen=True)
class Goals:
    """The components of a weighted sum of rewards, some of which are objectives.

    Attributes:
        reward: the sum; its weights rank finished samples and have no part in the search.
        names: of its components, in order.
        objectives: columns of the components that are traded off.
    """

    reward: WeightedSum
    names: tuple[str, ...]
    objectives: Int[Tensor, " objectives"]

    @classmethod
    def of(cls, reward: Reward, objectives: Sequence[str] = ()) -> "Goals":
        """The named components; all of them if none is named.

        Raises:
            UserError: if the reward is no sum, or has no component of that name.
        """
        total = reward.reward if isinstance(reward, Masked) else reward
        if not isinstance(total, WeightedSum):
            raise UserError(
                f"a search for several objectives needs a sum of rewards by name and was given {reward.name!r}: write "
                "reward: {weights: {NAME: 1, NAME: 1}}"
            )
        if isinstance(reward, Masked):
            parts = {name: Masked(part) for name, part in total.rewards.items()}
            total = WeightedSum(parts, total.weights, total.normalise, total.name)
        names = tuple(total.rewards)
        for place, name in enumerate(objectives or names):
            if name not in names:
                raise UserError(f"objectives: the reward has no component {name!r}; {nearest(name, names)}")
            if name in objectives[:place]:
                raise UserError(f"objectives: {name} is named twice; name each once")
        return cls(total, names, torch.tensor([names.index(name) for name in objectives or names]))

    def score(self, samples: Samples, ledger: Ledger) -> Scores:
        """Every component of each sample, float64; NaN where one is missing and may be."""
        found = score_components(self.reward, samples, ledger)
        return torch.stack([found[name] for name in self.names], 1).double()

    def total(self, scores: Scores, group: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The weighted sum of given components."""
        return self.reward.combine(dict(zip(self.names, scores.float().unbind(1), strict=True)), group)


@dataclass
class Archive:
    """Samples that grow one by one; in the columns that count nothing in it dominates anything else in it.

    Attributes:
        x: members, in the order in which they came.
        scores: components of each, float64.
        names: who each one is.
    """

    x: Int[Tensor, "members position"]
    scores: Float[Tensor, "members components"]
    names: list[Hashable] = field(default_factory=list[Hashable])

    def add(
        self,
        x: Int[Tensor, "rows position"],
        scores: Scores,
        objectives: Int[Tensor, " objectives"],
        active: Int[Tensor, " active"],
        names: Sequence[Hashable] | None = None,
    ) -> Float[Tensor, "rows objectives"]:
        """The Pareto ranks of each sample among the members that it meets; it then joins if none dominates it.

        A sample that is a member already has its rank and does not enter twice.

        Args:
            x: clean samples.
            scores: components of each.
            objectives: columns that have a rank.
            active: columns that dominance looks at, for the members as well.
            names: who each sample is: equal ones are one sample, whatever their tokens. None is the tokens.
        """
        names = told(x) if names is None else names
        ranks = scores.new_zeros(len(x), len(objectives))
        for row, (one, score) in enumerate(zip(x[:, None], scores[:, None], strict=True)):
            ranks[row] = pareto_rank(score[:, objectives], self.scores[:, objectives])[0]
            if names[row] not in self.names:
                kept, entering = insert(self.scores[:, active], score[:, active])
                self.names = [self.names[place] for place in kept.tolist()] + [names[row]] * len(entering)
                self.x = torch.cat([self.x[kept], one[entering]])
                self.scores = torch.cat([self.scores[kept], score[entering]])
        return ranks


def told(x: Int[Tensor, "rows position"], text: Sequence[str] | None = None) -> list[Hashable]:
    """Who each sample is: what its tokens spell, or the tokens themselves where there is no text or it is empty."""
    tokens = [tuple(one) for one in x.tolist()]
    return [*tokens] if text is None else [one or other for one, other in zip(text, tokens, strict=True)]


@dataclass
class Archives:
    """The archives of all prompts, and what has been seen so far.

    Attributes:
        goals: the objectives.
        scorer: samples of latents, and the ledger.
        valid: media -> which samples mean anything, the others are not scored; None takes all.
        text: media -> one string per sample; samples with equal ones are one member. None compares tokens.
        members: the archive of each prompt, on the CPU.
        invalid: sequences of each prompt that have no scores.
        missing: those among them that are valid.
        history: size of the archive and share of the sequences with scores in every round, (2, prompts).
    """

    goals: Goals
    scorer: LatentReward
    valid: Callable[[Tensor], Tensor] | None
    text: Callable[[Tensor], Sequence[str]] | None
    members: list[Archive]
    invalid: Int[Tensor, " prompts"]
    missing: Int[Tensor, " prompts"]
    history: list[Float[Tensor, "two prompts"]] = field(default_factory=list[Tensor])

    @classmethod
    def empty(cls, goals: Goals, scorer: LatentReward, task: Task, length: int) -> Self:
        """For sequences of so many tokens; the task says what is valid and what tokens spell."""
        x, scores = torch.zeros(0, length, dtype=torch.int64), torch.zeros(0, len(goals.names), dtype=torch.float64)
        members = [Archive(x, scores) for _ in scorer.prompts]
        none = torch.zeros(len(members), dtype=torch.int64)
        return cls(goals, scorer, task.valid, task.text, members, none, none)

    def add(
        self, x_0: Int[Tensor, "rows position"], root: Int[Tensor, " rows"], active: Int[Tensor, " active"]
    ) -> tuple[Float[Tensor, "rows objectives"], Bool[Tensor, " rows"]]:
        """Pareto ranks of new sequences, 0 for those without scores, and which have them.

        Args:
            x_0: clean.
            root: prompt of each.
            active: objectives that dominance looks at, by their place among the objectives.
        """
        samples = self.scorer.samples(x_0, root.to(x_0.device))
        valid = torch.ones(len(x_0), dtype=torch.bool) if self.valid is None else self.valid(samples.media).cpu()
        scores = torch.full((len(x_0), len(self.goals.names)), torch.nan, dtype=torch.float64)
        if bool(valid.any()):
            judged = samples.take(valid.nonzero()[:, 0].to(x_0.device))
            scores[valid] = self.goals.score(judged, self.scorer.ledger).cpu()
        scored = ~scores.isnan().any(1)
        objectives = self.goals.objectives
        ranks = torch.zeros(len(x_0), len(objectives), dtype=torch.float64)
        for prompt in root.unique().tolist():
            mine = (scored & (root == prompt)).nonzero()[:, 0]
            x, media = x_0[mine.to(x_0.device)].cpu(), samples.media[mine.to(samples.media.device)]
            names = told(x, None if self.text is None else self.text(media))
            ranks[mine] = self.members[prompt].add(x, scores[mine], objectives, objectives[active], names)
        self._note(root, valid, scored)
        return ranks, scored

    def _note(self, root: Int[Tensor, " rows"], valid: Bool[Tensor, " rows"], scored: Bool[Tensor, " rows"]) -> None:
        count = len(self.members)
        self.invalid = self.invalid + torch.bincount(root[~scored], minlength=count)
        self.missing = self.missing + torch.bincount(root[valid & ~scored], minlength=count)
        size = torch.tensor([float(len(archive.x)) for archive in self.members])
        # of a prompt that is not searched any more there is no share
        self.history.append(torch.stack([size, segment_mean(scored.float(), root, count)]))

    def outcome(self, ledger: Ledger, device: torch.device) -> Steered:
        """The archives as particles; nothing in one is preferred, so all weights of a prompt are equal.

        Raises:
            RewardError: if nothing of a prompt has scores.
        """
        sizes = torch.tensor([len(archive.x) for archive in self.members])
        if not bool(sizes.all()):
            lost = int((sizes == 0).nonzero()[0])
            every, missing = int(self.invalid[lost]), int(self.missing[lost])
            raise RewardError(
                f"none of the {every} sequences of prompt {quoted(self.scorer.prompts[lost])} has all scores "
                f"({every - missing} are invalid, {missing} valid ones miss a score): use more iterations or children, "
                "or a better base model"
            )
        group = torch.arange(len(sizes)).repeat_interleave(sizes)
        x_0, scores = (torch.cat([getattr(one, name) for one in self.members]) for name in ("x", "scores"))
        rewards = self.goals.total(scores, group)
        best = torch.where(group == torch.arange(len(sizes))[:, None], rewards.double(), -torch.inf).argmax(1)
        nothing, history = torch.zeros(0, len(sizes), device=device), torch.stack(self.history, 1).to(device)
        return Steered(
            x_0.to(device),
            self.scorer.samples(x_0.to(device), group.to(device)).media,
            group.to(device),
            (1 / sizes.double())[group].to(device),
            rewards.to(device),
            best.to(device),
            torch.full((len(sizes),), torch.nan, dtype=torch.float64, device=device),
            nothing,
            nothing.long(),
            ledger,
            components=dict(zip(self.goals.names, scores.float().to(device).unbind(1), strict=True)),
            invalid=self.invalid.to(device),
            history={"archive": history[0], "valid": history[1]},
        )
