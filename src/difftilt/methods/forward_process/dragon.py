"""DRAGON: a reward of a set, and the round cut in two sets that it tells apart (arXiv 2504.15217).

Each round is drawn by the current weights. Samples are exchanged between a positive and a negative set as long as that
raises R(D+); only R of whole sets is asked for. With the gain g = error_reference - error_current of a sample at a time
and noise that its pair shares, the model then moves towards D+ and away from D-:

    DPO:  -log sigmoid((beta/2)·(g⁺ - g⁻)),     KTO:  1 - sigmoid(±beta·(g - z_0)),  z_0 = max(0, mean g).

An instance reward is the special case of a mean: the better sample of each pair goes to D+.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from difftilt.card import Card
from difftilt.credit.sets import Partition, partners, swap_sets, top_half
from difftilt.errors import UserError
from difftilt.objectives.denoising import ErrorSpace, denoising_error
from difftilt.objectives.preference import gain_preference, kto, kto_offset
from difftilt.rewards.checked import CheckedSets
from difftilt.rewards.instances import MeanReward, as_set
from difftilt.rewards.protocol import Samples, Scores
from difftilt.sampling.protocol import Edges, NoiseSource
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.needs import check_space
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.renoising import ForwardConfig, ForwardProcess, levels, predicted, renoised
from difftilt.training.two_pass import in_pieces

CARD = Card(
    name="dragon",
    entry="Dragon",
    paper="Bai et al. 2025, DRAGON: Distributional Rewards Optimize Diffusion Generative Models, arXiv 2504.15217",
    needs=("gaussian process",),
    laws=("offset_per_prompt", "batch_split"),
)

REFERENCE = "reference_error"
OFFSET = "offset"
LOWEST = 0.01
"""Times are drawn from [LOWEST, 1 - LOWEST]: at the ends a velocity says nothing of the sample, or is infinite."""


class Config(ForwardConfig):
    """Rounds, the search for the two sets, and the loss."""

    groups: int = Field(default=64, ge=1)
    """Prompts per round."""
    group_size: int = Field(default=2, ge=2, multiple_of=2)
    """Samples per prompt: half of them go to each set, compared two by two."""
    loss: Literal["kto", "dpo"] = "kto"
    """Diffusion-KTO, or Diffusion-DPO, which needs pairs."""
    beta: float = Field(default=1000.0, gt=0)
    """Sharpness, for errors that are means over dimensions; 2000 to 5000 for dpo. About 1 in two dimensions."""
    offset: Literal["clamped", "classes"] = "clamped"
    """z_0 of kto: max(0, mean gain of the update), or the mean of the mean gains of both sets."""
    paired: bool = True
    """One of every two samples of a prompt goes to each set; else any two samples may be exchanged, and of an instance
    reward the better half is D+."""
    contrast: bool = False
    """Maximise R(D+) - R(D-) instead of R(D+)."""
    margin: float = Field(default=0.0, ge=0)
    """An exchange must gain more than this, in units of R."""
    sweeps: int = Field(default=1, ge=1)
    """Visits of every pair in the search."""
    drop_below: float = Field(default=0.0, ge=0)
    """Pairs whose exchange would lower R by less than this teach nothing; 0 keeps all."""
    levels: int = Field(default=1, ge=1)
    """Noise levels that each sample is trained at; every update takes an equal share of them, of all samples."""
    space: ErrorSpace = "velocity"
    """What errors are of."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss == "dpo" and not self.paired:
            raise ValueError("loss dpo compares the two samples of a pair: set paired to true, or use loss kto")
        if self.levels % self.updates:
            raise ValueError(
                f"levels = {self.levels} does not divide among updates = {self.updates}: use a multiple of it"
            )
        if self.drop_below and not self.paired:
            raise ValueError("drop_below drops pairs: set paired to true, or drop_below to 0")
        return self


@dataclass(frozen=True)
class Rewarded:
    """What the reward says of a round: scores for the log, features for the search."""

    features: Float[Tensor, "samples dim"]
    scores: Scores | None


class Dragon(ForwardProcess[Config]):
    """Sample with ``current``, cut the round in two, move towards the one and away from the other.

    Attributes:
        reward: of sets; an instance reward as its mean.
        single: whether it is one of samples.

    Raises:
        UserError: for tokens, a reward of sets that cannot be searched, or sets too small for it.
    """

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task, CARD.name)
        reward = as_set(task.reward)
        self.single = isinstance(reward, MeanReward)
        self.reward = CheckedSets(reward)
        size = config.groups * config.group_size // 2
        if size < self.reward.smallest:
            check_space(reward, task)
            raise UserError(
                f"dragon cuts a round of {2 * size} samples in two sets of {size}, and {task.reward.name} scores sets "
                f"of at least {self.reward.smallest}: raise method.groups, or see what the reward offers for small sets"
            )

    def collect(self, run: Run) -> Experience:
        """One round: two samples of each prompt, encoded once, and the search for the two sets."""
        config = self.config
        batch = run.prompts(config.groups, config.group_size)
        x_0 = self.finished(run, batch)
        samples = run.samples(x_0, batch)
        rewarded = self._rewarded(run, samples)
        order = run.noise.uniform(batch.index, (1 + config.sweeps,), purpose="swap")
        found: Partition = run.jointly(self._search, rewarded.features, batch.group, order)
        levels, scores = self._levels(run, batch, found), self._scores(run, rewarded, found)
        record = scored_experience(batch, x_0, levels, scores, samples.media)
        return replace(record, label=found.label, pair=partners(batch.group) if config.paired else None)

    def _rewarded(self, run: Run, samples: Samples) -> Rewarded:
        if self.single:
            scores = run.score(samples)
            return Rewarded(scores.total.double()[:, None], scores)
        return Rewarded(run.features(self.reward, samples).double(), None)

    def _search(self, features: Tensor, group: Tensor, order: Tensor) -> Partition:
        """The two sets of the round of all processes."""
        config = self.config
        if self.single and not config.paired:
            return Partition.of(top_half(features[:, 0]), features, self.reward.score_features)
        return swap_sets(
            features,
            group,
            order,
            begin=self.reward.begin,
            against=config.contrast,
            margin=config.margin,
            paired=config.paired,
            changes=config.drop_below > 0,
        )

    def _scores(self, run: Run, rewarded: Rewarded, found: Partition) -> Scores:
        """Of an instance reward its own; of a set reward that of the whole round. R of both sets beside it."""
        scores = rewarded.scores
        if scores is None:
            whole: Tensor = run.jointly(
                lambda features: torch.full(
                    (len(features),), self.reward.score_features(features), device=features.device
                ),
                rewarded.features,
            )
            scores = Scores(whole, {self.reward.name: whole})
        sets = {"positive_set": found.positive.float(), "negative_set": found.negative.float()}
        if self.config.drop_below:
            sets["kept_pairs"] = self._kept(found).float()
        return Scores(scores.total, scores.components | sets)

    def _kept(self, found: Partition) -> Bool[Tensor, " samples"]:
        """Whether a sample's pair matters enough to be trained on."""
        return found.change >= self.config.drop_below

    def _levels(self, run: Run, batch: PromptBatch, found: Partition) -> Edges:
        """One edge for each sample and each of its times, one from every equal part of the range, in random order."""
        count = self.config.levels
        drawn = run.noise.uniform(self._key(batch.index), (2, count), purpose="training times")
        t = LOWEST + (1 - 2 * LOWEST) * (drawn[:, 0].argsort(1) + drawn[:, 1]) / count
        edges = levels(torch.arange(count, device=t.device).expand(len(t), -1), t)
        if not self.config.drop_below:
            return edges
        return replace(edges, mask=self._kept(found)[edges.sample])

    def _key(self, index: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """What keys times and noise: the pair, whose members are neighbours, so that both share them."""
        return index // 2 if self.config.paired else index

    def phases(self, run: Run) -> Sequence[Phase]:
        """One: the preference."""
        updates = self.config.updates
        return [
            Phase(
                "current",
                partial(self._loss, run),
                unit="level" if self.config.paired else "sample",
                updates=updates,
                before=partial(self._frozen, run),
                part=lambda experience: experience.edges.step * updates // self.config.levels,
            )
        ]

    def _error(self, run: Run, role: str, rows: Experience) -> Float[Tensor, " rows"]:
        """Of what ``role`` predicts, with gradient where gradients are on."""
        assert rows.x_0 is not None
        x_t = renoised(run.task.model.process, rows, run.noise, self._key(rows.index))
        prediction = predicted(run, role, x_t, rows)
        return denoising_error(prediction, rows.x_0, space=self.config.space).double()

    def _frozen(self, run: Run, rows: Experience) -> Experience:
        """The rows of an update with the reference's error, and for kto the offset of all rows of all processes.

        A process that holds no rows evaluates no network, yet takes part in the offset.
        """
        reference = in_pieces(run, partial(self._error, run, "reference"), rows)
        known = {REFERENCE: reference}
        if self.config.loss == "kto":
            same = run.roles.same("current", "reference")
            gain = reference - (reference if same else in_pieces(run, partial(self._error, run, "current"), rows))
            assert rows.label is not None
            known[OFFSET] = run.jointly(self._offset, gain, rows.label)
        return rows.changed(extras=rows.extras | known)

    def _offset(self, gain: Tensor, label: Tensor) -> Tensor:
        return kto_offset(gain, label, classes=self.config.offset == "classes").expand(len(gain))

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        beta, label = self.config.beta, rows.label
        assert label is not None
        gain = rows.extras[REFERENCE] - self._error(run, "current", rows)
        if self.config.loss == "dpo":
            assert rows.pair is not None
            value = gain_preference(gain, rows.pair, label, beta)
        else:
            value = kto(gain, label, rows.extras[OFFSET], beta)
        return Loss({"preference": Term(value)}, {"gain": gain.detach(), "gain_gap": 2 * label * gain.detach()})
