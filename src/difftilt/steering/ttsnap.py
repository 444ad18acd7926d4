"""TTSnap (Yu, Song, Campbell et al. 2025, arXiv 2511.22242): best-of-n that rejects candidates early.

All candidates start; after a few early steps their x0-predictions are scored, a fraction is kept, and only the
survivors go on. The reward of an early, blurred prediction hardly says which sample will be best, so a noise-aware
reward is fitted to predict, from the prediction, the score that the frozen reward gives to the final sample of the same
trajectory: one set of weights per prune step, learned by a curriculum from clean to noisy. With the plain reward
(``value = posterior_mean``) it is the paper's TTSp. The unmodified reward chooses among the finished samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.gaussian import GaussianProcess
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.masked import parts_masked
from difftilt.rewards.protocol import Reward, Samples, Scores
from difftilt.rewards.scoring import evaluate
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.loop import search
from difftilt.steering.particles import bind, start
from difftilt.steering.protocol import Lesson, Progress, Steered
from difftilt.steering.pruning import Pruning, Schedule, rejudged
from difftilt.steering.selection import fused
from difftilt.training.protocol import Task
from difftilt.values.curriculum import Curriculum, first_level
from difftilt.values.distillation import GRID, VALIDATED, Distillation
from difftilt.values.estimates import LatentReward
from difftilt.values.noise_aware import Verified, Verifier, terms_of

CARD = Card(
    name="ttsnap",
    entry="TTSnap",
    paper="Yu, Song, Campbell et al. 2025, TTSnap: Test-Time Scaling of Diffusion Models via Noise-Aware Pruning, "
    "arXiv 2511.22242",
)

PUBLISHED = {1: ((2, 6, 11), (0.4, 0.4, 0.5)), 3: ((4, 6, 11), (0.4, 0.5, 0.6))}
"""Number of rewards -> prune steps of 20, and what they keep."""


class TTSnapConfig(Curriculum):
    """Settings of pruned best-of-n, and of the fit of the noise-aware reward."""

    particles: int = Field(default=25, ge=1)
    """Candidates per prompt, n."""
    prune_steps: tuple[int, ...] | None = None
    """Steps after whose network call candidates are scored, 0 at the noise end; null is 2, 6, 11 of 20, in proportion,
    and 4, 6, 11 for several fused rewards."""
    keep: tuple[float, ...] | None = None
    """Fraction of the present candidates kept at each; null is 0.4, 0.4, 0.5, and 0.4, 0.5, 0.6 for several."""
    value: Literal["noise_aware", "posterior_mean"] = "noise_aware"
    """What scores x0-predictions: the fitted reward, or the plain one, which needs no fit (TTSp)."""
    fusion: Literal["ranks", "total"] = "ranks"
    """How the parts of a weighted sum of rewards count: by the sum of their ranks among the candidates, at prunings and
    at the end, where only the sign of a weight matters; or by the sum itself."""
    kernel: Literal["task", "ode"] = "task"
    """The task's kernel, or the deterministic one that the paper assumes (DDIM with eta 0; continuous models only)."""


class TTSnap:
    """Start n candidates, prune, finish the survivors, take the best."""

    Config = TTSnapConfig

    def __init__(self, config: TTSnapConfig) -> None:
        self.config = config
        self.learned: dict[str, Tensor] = {}

    def schedule(self, steps: int, rewards: int = 1) -> Schedule:
        """When to prune on a grid of ``steps`` steps, for so many rewards."""
        at, keep = PUBLISHED[1 if rewards == 1 else 3]
        at = tuple(step * steps // 20 for step in at) if self.config.prune_steps is None else self.config.prune_steps
        return Schedule(steps, at, keep if self.config.keep is None else self.config.keep)

    def price(self, steps: int) -> Ledger:
        """Of the search, exact for one reward."""
        schedule = self.schedule(steps)
        sizes, tuned = schedule.sizes(self.config.particles), self._tuned(schedule)
        auxiliary = sum(size for size, step in zip(sizes, schedule.at, strict=False) if step in tuned)
        nfe, scores = schedule.spent(self.config.particles)
        return Ledger(nfe=nfe, reward_calls=scores - auxiliary, auxiliary_calls=auxiliary)

    def _tuned(self, schedule: Schedule) -> list[int]:
        """Prune steps that have a noise-aware reward."""
        if self.config.value != "noise_aware":
            return []
        return [step for step in schedule.at if step <= first_level(self.config, schedule.steps)]

    @property
    def unfitted(self) -> bool:
        """Whether the noise-aware reward is still to be learned."""
        return self.config.value == "noise_aware" and self.config.prune_steps != () and not self.learned

    def fit_for(
        self, task: Task, denoise: Denoiser, reward: Reward, prompts: Sequence[str], noise: NoiseSource
    ) -> None:
        """Fit to the training prompts, as the protocol says."""
        self.fit(task, denoise, reward, list(dict.fromkeys(task.prompts or prompts)), Apart(noise, "fit"))

    def fit_price(self, task: Task) -> Ledger:
        """What a fit that has not been made costs with the task's own reward, at most."""
        if not self.unfitted:
            return Ledger()
        terms = terms_of(task.reward, self.config.fusion == "ranks")
        schedule, config = self.schedule(len(task.sampler.grid) - 1, len(terms)), self.config
        tuned, prompts = self._tuned(schedule), len(dict.fromkeys(task.prompts)) or 1
        images, held = config.images * prompts, config.validation_images * min(prompts, VALIDATED)
        passes = config.warm_up_epochs + config.epochs * len(
            range(min(tuned, default=0), first_level(config, schedule.steps) + 1)
        )
        calls, seen = images + held * (1 + len(tuned)), images * passes + held * len(tuned)
        return Ledger(schedule.steps * (images + held), len(terms) * calls, auxiliary_calls=len(terms) * seen)

    @torch.no_grad()
    def steer(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        index: Int[Tensor, " prompts"] | None = None,
        progress: Progress | None = None,
    ) -> Steered:
        """Search for every prompt; arguments as in the protocol."""
        before = denoise.ledger.copy()
        distillation = self.distillation(task, denoise, reward, prompts)
        rule = Pruning(self.schedule(distillation.steps, len(distillation.terms)))
        tuned: dict[int, dict[str, Verifier]] = {}
        if self.unfitted:
            self.fit_for(task, denoise, reward, prompts, noise)
        if self.config.value == "noise_aware" and rule.schedule.at:
            tuned = distillation.verifiers(self.learned, rule.schedule.at)
        latent = distillation.latent
        value = Verified(latent, distillation.terms, fused, tuned)
        choice = Choice(latent.reward, latent.decode, latent.prompts, latent.ledger, value)
        chain, particles = start(self.sampled(task), denoise, prompts, self.config.particles, noise, index)
        steered = search(rule, chain, particles, choice, value, progress=progress)
        return replace(choice.unfused(steered), ledger=denoise.ledger - before)

    @torch.no_grad()
    def fit(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
    ) -> Mapping[str, float]:
        """Fit the noise-aware reward; arguments as in the protocol.

        Returns:
            Kendall's tau to the final reward within prompts, on trajectories that were not trained on, at every prune
            step: of the plain reward and of the fitted one.
        """
        if self.config.value != "noise_aware":
            raise UserError("value = posterior_mean learns nothing: leave the fit out, or set value = noise_aware")
        distillation = self.distillation(task, denoise, reward, prompts)
        at = self.schedule(distillation.steps, len(distillation.terms)).at
        self.learned, metrics = distillation.fit(at, noise, progress or _silent)
        return metrics

    def lesson(self, reward: Reward) -> Lesson:
        """The terms, one by one, and whose trajectories they were learned on."""
        terms = terms_of(parts_masked(reward), self.config.fusion == "ranks")
        return Lesson({name: term.reward for name, term in terms.items()}, {"kernel": self.config.kernel})

    def judged(self, steered: Steered, reward: Reward) -> Steered:
        """Rounds joined by the same ranks as the candidates of one."""
        terms = terms_of(parts_masked(reward), self.config.fusion == "ranks")
        return rejudged(steered, terms) if len(terms) > 1 else steered

    def state_dict(self) -> Mapping[str, Tensor]:
        """``step/term/parameter`` -> weights, and the grid that they belong to."""
        return dict(self.learned)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back; whether they belong to the task's reward, model and grid is seen when it steers."""
        if state and GRID not in state:
            raise UserError("these are no weights of a noise-aware reward: name what `difftilt train` wrote for ttsnap")
        self.learned = dict(state)

    def sampled(self, task: Task) -> Task:
        """The task with the kernel that the settings name."""
        if self.config.kernel == "task":
            return task
        if not isinstance(task.model.process, GaussianProcess):
            raise UserError("kernel = ode is for continuous models; tokens have none: leave it at task")
        return replace(task, sampler=replace(task.sampler, kernel=Euler(), solver=None, clean_end=False))

    def distillation(self, task: Task, denoise: Denoiser, reward: Reward, prompts: Sequence[str]) -> Distillation:
        """What the noise-aware reward is learned by and read by, for these prompts."""
        task, reward = self.sampled(task), parts_masked(reward)
        everyone = [*task.prompts, *task.heldout_prompts]
        terms = terms_of(reward, self.config.fusion == "ranks")
        latent = bind(reward, task, prompts, denoise)
        return Distillation(self.config, task.model, task.sampler, denoise, latent, terms, everyone)


@dataclass(frozen=True)
class Choice(LatentReward):
    """The reward of finished samples as one score to choose by; what the parts said is kept beside it.

    Attributes:
        value: knows the terms and how they are fused.
        found: the scores of the finished samples, once they are there.
    """

    value: Verified
    found: list[Scores] = field(default_factory=list[Scores])

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        scores = evaluate(self.reward, samples, self.ledger)
        self.found.append(scores)
        whole = {name for name, term in self.value.terms.items() if term.reward is self.reward}
        parts = {name: scores.total if name in whole else scores.components[name] for name in self.value.terms}
        return self.value.fused(parts, samples.group)

    def unfused(self, steered: Steered) -> Steered:
        """The outcome with r(x_0), and the parts of a sum, in place of what was chosen by."""
        scores = self.found[-1]
        components = scores.components if isinstance(self.reward, WeightedSum) else {}
        return replace(steered, rewards=scores.total, components=components)


def _silent(step: int, steps: int, ess: Tensor | None) -> None:
    """Tells nothing."""
