"""Steerers whose value can be learned: a small network, fitted to rollouts of the base model.

SVDD calls it the MC form (arXiv 2408.08252), FK steering a learned intermediate reward (arXiv 2501.06848).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import device_of
from difftilt.models.ledger import Ledger
from difftilt.models.process_reward import ProcessReward, process_reward_for
from difftilt.models.protocol import Denoiser, Stateful
from difftilt.process.masked import MaskedProcess
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Reward
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import NoiseSource
from difftilt.sampling.rollout import start_state
from difftilt.steering.chain import Chain
from difftilt.steering.particles import bind
from difftilt.steering.protocol import Lesson, Progress
from difftilt.steering.valuing import Valued, value_of
from difftilt.training.process_reward import condition_of
from difftilt.training.protocol import Task
from difftilt.trees import take, to_device
from difftilt.values.estimates import LatentReward
from difftilt.values.learned import Learned
from difftilt.values.process_reward import Scorer
from difftilt.values.protocol import Value
from difftilt.values.recorded import States, fit_states, record_states, value_correlations

GRID = "grid"
"""Name of the times among the tensors of a fitted value."""


class LearnsValue:
    """What such a steerer shares: the value of a call, and ``Fitted`` of the protocol.

    Args:
        settings: of the value.
        temperature: β of the steerer, which a soft value is learned for where the settings do not say otherwise.
        value: an intermediate reward of one's own, in place of the settings'.
    """

    def __init__(self, settings: Valued, temperature: float, value: Value | None) -> None:
        self.settings, self.value = settings, value
        # at temperature 0 there is no soft value; the choice between states needs only their order
        self.value_temperature = settings.value_temperature or temperature or 1.0
        self._saved: Mapping[str, Tensor] = {}

    def value_in(self, task: Task, prompts: Sequence[str], scorer: LatentReward, chain: Chain) -> Value:
        """The value of the states of ``chain``; one that is to be learned and was not yet is fitted now, and counted.

        Raises:
            UserError: if what was fitted belongs to another model or grid.
        """
        if self.value is not None:
            return self.value
        if self.settings.value != "learned":
            return value_of(self.settings, scorer, chain, self.value_temperature)
        if not self._saved:
            self.fit_for(task, chain.denoise, scorer.reward, prompts, chain.noise)
        network = self.network(task)

        def function(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return network(x_t, t, condition.condition if isinstance(condition, Stateful) else condition)

        return Learned(Scorer(function, chain.denoise.ledger))

    @property
    def unfitted(self) -> bool:
        """Whether there is something to learn that was not learned yet."""
        return self.value is None and self.settings.value == "learned" and not self._saved

    def fit_for(
        self, task: Task, denoise: Denoiser, reward: Reward, prompts: Sequence[str], noise: NoiseSource
    ) -> None:
        """Fit to the task's training prompts, so that the value is the same for any batch of prompts.

        A task without any, and one with more than there are rollouts, is fitted to what there is room for.
        """
        own = list(dict.fromkeys(task.prompts or prompts))[: self.settings.fit_samples]
        self.fit(task, denoise, reward, own, Apart(noise, "fit"))

    def fit_price(self, task: Task) -> Ledger:
        """What a fit costs that has not been made; paid once, whatever the prompts."""
        config = self.settings
        if not self.unfitted:
            return Ledger()
        trained = config.fit_updates * config.fit_batch * (1 + config.bootstrap)
        return Ledger(config.fit_samples * (len(task.sampler.grid) - 1), config.fit_samples, auxiliary_calls=trained)

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
        """Fit the value network to ``fit_samples`` rollouts shared by the prompts; arguments as in the protocol.

        Returns:
            ``loss``, the mean of the last tenth; ``samples``, rollouts that had a score; and for every time the
            ``correlation`` between the value and the reward that the rollout ended with.

        Raises:
            UserError: if the steerer's value is not learned, or there are more prompts than rollouts.
        """
        settings = self.settings
        if settings.value != "learned":
            raise UserError(f"steerer.value = {settings.value} has nothing to learn: set steerer.value=learned")
        network = network_for(task, settings.fit_hidden)
        states = base_states(task, denoise, reward, prompts, noise, network, settings)
        if progress is not None:
            progress(1, 2, None)
        network.calibrate(states.reward)
        losses = fit_states(
            network,
            states,
            noise,
            temperature=self.value_temperature,
            kind=settings.regression,
            updates=settings.fit_updates,
            batch=settings.fit_batch,
            learning_rate=settings.fit_lr,
        )
        denoise.ledger.auxiliary_calls += settings.fit_updates * settings.fit_batch * (1 + settings.bootstrap)
        self._saved = {**network.eval().state_dict(), GRID: task.sampler.grid}
        found = value_correlations(network, states)
        if progress is not None:
            progress(2, 2, None)
        last = losses[-max(len(losses) // 10, 1) :]
        metrics = {"loss": sum(last) / len(last), "samples": len(states.t) / len(found)}
        return metrics | {f"correlation t={t:.3g}": value for t, value in found.items()}

    def lesson(self, task: Task, reward: Reward) -> Lesson:
        """The reward, what is regressed and, where that is a soft value, its temperature."""
        kind = self.settings.regression
        own: dict[str, float | str] = {"regression": kind}
        if kind != "mean":
            own["temperature"] = float(self.value_temperature)
        return Lesson({reward.name: reward}, own)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Weights and grid; empty before it was fitted."""
        return self._saved

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back; whether it belongs to the task is known when steering.

        Raises:
            UserError: if it is no fitted value.
        """
        if state and GRID not in state:
            raise UserError("this is no fitted value: it has no grid")
        self._saved = dict(state)

    def network(self, task: Task) -> ProcessReward:
        grid, weights = self._saved[GRID], {name: leaf for name, leaf in self._saved.items() if name != GRID}
        network = network_for(task, self.settings.fit_hidden)
        shapes = {name: leaf.shape for name, leaf in network.state_dict().items()}
        if shapes != {name: leaf.shape for name, leaf in weights.items()}:
            raise UserError(
                f"the fitted value was made for other states, conditions or another fit_hidden than {task.name!r} with "
                f"fit_hidden {self.settings.fit_hidden}: fit it again"
            )
        if not torch.equal(grid.cpu(), task.sampler.grid.cpu()):
            raise UserError(
                f"the fitted value knows the {len(grid)} times of its own grid, and {task.name!r} samples at "
                f"{len(task.sampler.grid)} others: fit it again"
            )
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False)


def network_for(task: Task, hidden: int) -> ProcessReward:
    """A new network for the task's states and conditions, on the device of its model."""
    process = task.model.process
    symbols = process.mask + 1 if isinstance(process, MaskedProcess) else 0
    network = process_reward_for(task.model.shape, condition_of(task), symbols=symbols, hidden=hidden)
    return network.to(device_of(task.model.network))


def base_states(
    task: Task,
    denoise: Denoiser,
    reward: Reward,
    prompts: Sequence[str],
    noise: NoiseSource,
    network: ProcessReward,
    settings: Valued,
) -> States:
    """States of rollouts, as many for each prompt, or one more.

    Raises:
        UserError: if there are more prompts than rollouts.
        RewardError: if fewer than two of them have a score.
    """
    if len(prompts) > settings.fit_samples:
        raise UserError(
            f"steerer.fit_samples = {settings.fit_samples} rollouts are too few for {len(prompts)} prompts: give at "
            f"least {len(prompts)}"
        )
    device = device_of(task.model.network)
    index = torch.arange(settings.fit_samples, device=device)
    scorer, prompt = bind(reward, task, prompts, denoise), index % len(prompts)
    condition = take(to_device(task.model.encode(prompts), device), prompt)
    states = record_states(
        denoise,
        task.sampler,
        start_state(task.model.process, noise, index, task.model.shape, condition),
        condition,
        lambda x_0: scorer(x_0, prompt),
        noise=noise,
        index=index,
        kept=network.read(condition),
        draws=settings.bootstrap,
    )
    if len(states.t) < 2 * len(task.sampler.grid):
        raise RewardError(f"fewer than two of {settings.fit_samples} rollouts have a score: there is nothing to learn")
    return states
