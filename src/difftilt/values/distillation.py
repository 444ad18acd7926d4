"""Self-distillation of a reward: record trajectories of a model, fit weights for every prune step, judge the fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.denoiser import device_of
from difftilt.models.protocol import Denoiser, GenerativeModel
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.scoring import evaluate
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import NoiseSource, Sampler
from difftilt.statistics.ranking import kendall_tau
from difftilt.trees import take, to_device
from difftilt.values.curriculum import Curriculum, first_level, fit_curriculum, levels_of, predict
from difftilt.values.estimates import LatentReward
from difftilt.values.noise_aware import Regressor, Term, Verifier, verifier_of
from difftilt.values.trajectories import Recorded, record

GRID = "grid"
"""Key of the times that the weights belong to."""
VALIDATED = 32
"""Most prompts that a fit is judged on."""

Tell = Callable[[int, int, None], None]
"""``tell(level, levels, None)`` after every level."""


@dataclass(frozen=True)
class Distillation:
    """A reward's noise-aware forms for one model and its sampler.

    Attributes:
        config: of the fit.
        model: gives shape and conditions.
        sampler: whose kernel and grid the trajectories follow.
        denoise: the network; its ledger counts.
        latent: the reward of latents, with the prompts at hand.
        terms: of the reward, each fitted on its own.
        everyone: all prompts of the task, so that regressors have room for all classes.
    """

    config: Curriculum
    model: GenerativeModel
    sampler: Sampler
    denoise: Denoiser
    latent: LatentReward
    terms: Mapping[str, Term]
    everyone: Sequence[str]

    @property
    def steps(self) -> int:
        """Of the grid."""
        return len(self.sampler.grid) - 1

    def regressor(self) -> Regressor:
        """For a reward that is no network."""
        process = self.model.process
        return Regressor(
            self.model.shape,
            self.model.encode(self.everyone) if self.config.prompted else None,
            vocab=process.vocab if isinstance(process, MaskedProcess) else None,
            hidden=self.config.hidden,
        ).to(device_of(self.model.network))

    def recorded(
        self, rows: Int[Tensor, " prompts"], images: int, noise: NoiseSource, steps: Sequence[int]
    ) -> Recorded:
        """Plain samples for these of the prompts."""
        device = device_of(self.model.network)
        condition = to_device(self.model.encode(self.latent.prompts), device)
        return record(self.denoise, self.sampler, self.model.shape, condition, rows.to(device), images, noise, steps)

    def fit(self, at: Sequence[int], noise: NoiseSource, tell: Tell) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weights for the prune steps, and Kendall's tau on other trajectories.

        Args:
            at: prune steps, rising.
            noise: of the whole fit.
            tell: of the progress.

        Returns:
            ``step/term/parameter`` -> weights; ``tau/step_s`` and ``tau_plain/step_s``, with the name of the term
            before them where there are several.
        """
        if not at:
            raise UserError("without a prune step there is nothing to learn: set prune_steps, or use best-of-n")
        first, rows = first_level(self.config, self.steps), torch.arange(len(self.latent.prompts))
        kept = [*range(at[0], first + 1), self.steps - 1]
        recorded = self.recorded(rows, self.config.images, Apart(noise, "record"), kept)
        judged = torch.linspace(0, len(rows) - 1, min(len(rows), VALIDATED)).long()
        held = self.recorded(judged, self.config.validation_images, Apart(noise, "validation"), kept)
        state, metrics = {GRID: self.sampler.grid.clone()}, dict[str, float]()
        for number, (name, term) in enumerate(self.terms.items()):
            verifier = verifier_of(term, self.regressor)
            label, truth = self.score(term, recorded.x_0, recorded.prompt), self.score(term, held.x_0, held.prompt)
            prefix = "" if len(self.terms) == 1 else f"{name}/"
            for step in self._curriculum(verifier, at[0], recorded, label, noise, (number, tell)):
                if step not in at or step > first:
                    continue
                weights = verifier.module.state_dict()
                state |= {f"{step}/{name}/{key}": value.detach().clone() for key, value in weights.items()}
                plain = self.score(term, held.predictions[step], held.prompt)
                fitted = predict(verifier, step, held, self.latent)
                metrics[f"{prefix}tau/step_{step}"] = self._tau(fitted, truth)
                metrics[f"{prefix}tau_plain/step_{step}"] = self._tau(plain, truth)
        return state, metrics

    def _curriculum(
        self,
        verifier: Verifier,
        earliest: int,
        recorded: Recorded,
        label: Float[Tensor, " samples"],
        noise: NoiseSource,
        turn: tuple[int, Tell],
    ) -> Iterator[int]:
        """The levels of one term, on the trajectories that have a label."""
        number, tell = turn
        levels = levels_of(self.config, self.steps, earliest, verifier)
        known = label.isfinite().nonzero()[:, 0]
        rows, label = take((recorded, label), known)
        source = Apart(noise, f"term {number}")
        for done, step in enumerate(fit_curriculum(verifier, levels, rows, self.latent, label, self.config, source)):
            yield step
            tell(number * len(levels) + done + 1, len(self.terms) * len(levels), None)

    def score(self, term: Term, x_0: Tensor, prompt: Int[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        """What the frozen reward says of latents, counted."""
        return evaluate(term.reward, self.latent.samples(x_0, prompt), self.latent.ledger).total

    def _tau(self, predicted: Tensor, truth: Tensor) -> float:
        """Mean over the prompts; NaN where no prompt has an order."""
        images = self.config.validation_images
        return float(kendall_tau(predicted.reshape(-1, images), truth.reshape(-1, images)).nanmean())

    def verifiers(self, state: Mapping[str, Tensor], at: Sequence[int]) -> dict[int, dict[str, Verifier]]:
        """Step -> term -> verifier with its weights, for the prune steps up to the first level.

        Raises:
            UserError: if there are none for such a step, or they belong to another grid, reward or model.
        """
        if not torch.equal(state[GRID].cpu(), self.sampler.grid.cpu()):
            raise UserError("the noise-aware reward was fitted on another grid: fit it with this sampler")
        tuned = [step for step in at if step <= first_level(self.config, self.steps)]
        return {
            step: {name: self._loaded(term, step, name, state) for name, term in self.terms.items()} for step in tuned
        }

    def _loaded(self, term: Term, step: int, name: str, state: Mapping[str, Tensor]) -> Verifier:
        verifier, prefix = verifier_of(term, self.regressor), f"{step}/{name}/"
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        shapes = {key: value.shape for key, value in verifier.module.state_dict().items()}
        if {key: value.shape for key, value in own.items()} != shapes:
            raise UserError(
                f"what was fitted holds no weights for step {step} and the reward {name!r} of this model: fit it again "
                "with these settings"
            )
        verifier.module.load_state_dict(own)
        verifier.module.requires_grad_(False)
        return verifier
