"""What the loop lends to a method during one iteration: prompts, denoisers by role, rewards and everybody's columns."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import GuardError, UserError
from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.execution import PLAIN, Execution
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser, Roles
from difftilt.process.protocol import Condition
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.prompts import identity
from difftilt.rewards.protocol import Reward, Samples, Scores, SetReward
from difftilt.rewards.scoring import add_up, encode, evaluate, splits
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import start_state
from difftilt.training.background import in_parts, score_in_background
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.lockstep import Lockstep
from difftilt.training.protocol import Task
from difftilt.training.world import World
from difftilt.trees import join, take, to_device


@dataclass
class LoopRun:
    """The loop's :class:`~difftilt.training.protocol.Run`.

    Attributes:
        task: model, reward and prompts; its model is the one that the method adapted.
        roles: weights by role.
        world: processes of the run.
        noise: of the present iteration.
        forward_batch: rows of every network call.
        device: of the network.
        execution: precision of network calls, and whether they are compiled.
        iteration: counts from 0.
        reward_seconds: spent in rewards during this iteration, while nothing else was done.
        hidden_seconds: spent in rewards while samples were drawn.
        lockstep: of processes that hold weights in parts; None where each holds all.
    """

    task: Task
    roles: Roles
    world: World
    noise: Noise
    forward_batch: int
    device: torch.device
    execution: Execution = PLAIN
    iteration: int = 0
    reward_seconds: float = 0.0
    hidden_seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)
    lockstep: Lockstep | None = None
    _encoded: dict[str, Condition] = field(default_factory=dict[str, Condition])

    def begin(self, iteration: int) -> None:
        """Turn to another iteration."""
        self.iteration = iteration
        self.noise = self.noise.at(iteration)
        self.reward_seconds = self.hidden_seconds = 0.0

    def denoiser(self, role: str, guidance: float | None = None) -> Denoiser:
        model = self.task.model
        network = self.roles.network(role) if self.lockstep is None else self.lockstep.of(role)
        return NetworkDenoiser(
            network,
            model.process,
            model.output,
            self.ledger,
            guidance=self.task.sampler.guidance if guidance is None else guidance,
            null_condition=model.null_condition,
            forward_batch=self.forward_batch,
            execution=self.execution,
        )

    def idle(self) -> tuple[Tensor, Tensor, Condition]:
        """States, times and condition of one full network call that means nothing: noise, for the first prompt."""
        model, index = self.task.model, torch.arange(self.forward_batch, device=self.device)
        states = start_state(model.process, Noise(0).named("idle"), index, model.shape)
        times = torch.ones(len(index), dtype=torch.float32, device=self.device)
        return states, times, take(self.encode([self.task.prompts[0]]), torch.zeros_like(index))

    def backward(self, value: Tensor) -> None:
        """Backward pass from a number; together, where processes hold weights in parts."""
        if self.lockstep is None:
            value.backward()
        else:
            self.lockstep.backward(value)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition with one row per prompt; every distinct prompt is encoded once per run."""
        keys = [identity(prompt) for prompt in prompts]  # texts alike may name other images
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._encoded}
        if missing:
            with torch.no_grad():
                rows = to_device(self.task.model.encode([*missing.values()]), self.device)
            for place, key in enumerate(missing):
                self._encoded[key] = take(rows, torch.tensor([place]))
        return join([self._encoded[key] for key in keys])

    def prompts(self, groups: int, size: int) -> PromptBatch:
        share = self.world.share(groups, "groups per iteration")
        places = [self.iteration * groups + slot for slot in share]
        prompt = self._in_turn(places, len(self.task.prompts), "prompts")
        group = torch.tensor(list(share)).repeat_interleave(size)
        return self.batch(prompt.repeat_interleave(size), group, first=share.start * size)

    def batch(self, prompt: Tensor, group: Tensor, first: int = 0, heldout: bool = False) -> PromptBatch:
        """Rows for the given prompts and groups, with global indices from ``first`` on."""
        texts = self.task.heldout_prompts if heldout else self.task.prompts
        condition = self.encode([texts[int(i)] for i in prompt])
        index = torch.arange(first, first + len(prompt))
        return PromptBatch(index.to(self.device), group.to(self.device), prompt.to(self.device), condition)

    def _in_turn(self, places: Sequence[int], count: int, purpose: str) -> Int[Tensor, " places"]:
        """What stands at places of the endless sequence of shuffled passes over ``count`` things."""
        noise = self.noise.at(0)
        passes = {place // count for place in places}
        order = {number: noise.permutation(count, purpose=purpose, step=number) for number in passes}
        return torch.stack([order[place // count][place % count] for place in places])

    def stored(self, data: Experience, rows: Int[Tensor, "count size"], groups: int) -> Experience:
        share = self.world.share(groups, "groups per iteration")
        places = [self.iteration * groups + slot for slot in share]
        chosen = rows[self._in_turn(places, len(rows), "stored groups")].reshape(-1)
        size = rows.shape[1]
        slots = torch.tensor(list(share)).repeat_interleave(size)
        batch = self.batch(data.prompt[chosen], slots, first=share.start * size)
        drawn = to_device(replace(data, condition=None).take(chosen), self.device)
        return replace(drawn, index=batch.index, group=batch.group, prompt=batch.prompt, condition=batch.condition)

    def samples(self, x_0: Tensor, batch: PromptBatch | Experience, heldout: bool = False) -> Samples:
        texts = self.task.heldout_prompts if heldout else self.task.prompts
        prompts = [texts[int(i)] for i in batch.prompt]
        return Samples.of(self.task.model.decode(x_0), prompts, batch.group, batch.condition)

    def score(self, samples: Samples) -> Scores:
        return self.score_with(self.task.reward, samples)

    def score_with(self, reward: Reward, samples: Samples) -> Scores:
        """Scores of another reward than the task's own, counted all the same.

        A sum that standardises its parts over the batch does so over the batch of all processes, except inside a loss
        (where gradients are on), which sees a microbatch anyway.
        """
        self._check_scorable(reward, samples)
        start = time.perf_counter()
        scores = self._jointly_scored(reward, evaluate(reward, samples, self.ledger, self.world.gather), samples)
        self.reward_seconds += time.perf_counter() - start
        return scores

    def _jointly_scored(self, reward: Reward, scores: Scores, samples: Samples) -> Scores:
        """The scores, with statistics of the batch over all processes."""
        if isinstance(reward, WeightedSum) and reward.normalise in ("batch", "running") and not torch.is_grad_enabled():
            return replace(scores, total=self._combined(reward, scores, samples))
        return scores

    def parts(self, batch: PromptBatch) -> Sequence[PromptBatch]:
        return in_parts(batch, self.forward_batch) if self._overlaps() else [batch]

    def score_parts(self, drawn: Iterable[Samples]) -> tuple[Samples, Scores]:
        if not self._overlaps():
            samples = Samples.join([*drawn])
            return samples, self.score(samples)
        reward = self.task.reward
        done = score_in_background(reward, map(self._scorable, drawn))
        self.ledger.reward_calls += done.ledger.reward_calls
        self.reward_seconds += done.waited
        self.hidden_seconds += done.hidden
        scores = Scores(add_up(reward, done.components, done.samples), done.components)
        return done.samples, self._jointly_scored(reward, scores, done.samples)

    def _overlaps(self) -> bool:
        """Whether samples are scored in parts while others are drawn."""
        reward = self.task.reward
        return reward.capabilities.background and splits(reward) and not torch.is_grad_enabled()

    def _scorable(self, samples: Samples) -> Samples:
        self._check_scorable(self.task.reward, samples)
        return samples

    def _check_scorable(self, reward: Reward, samples: Samples) -> None:
        self._check_finite(samples)
        if reward.capabilities.missing:
            raise UserError(f"training needs a score for every sample; {reward.name!r} may have none: unmask it")

    def features(self, reward: SetReward, samples: Samples) -> Float[Tensor, "samples dim"]:
        self._check_finite(samples)
        start = time.perf_counter()
        features = encode(reward, samples, self.ledger)
        self.reward_seconds += time.perf_counter() - start
        return features

    def _check_finite(self, samples: Samples) -> None:
        media = samples.media
        if media.is_floating_point() and not bool(media.isfinite().all()):
            raise GuardError(
                f"iteration {self.iteration}: the samples are not finite, so there is nothing to score; lower "
                "training.optimizer.lr, or raise the KL weight"
            )

    def _combined(self, reward: WeightedSum, scores: Scores, samples: Samples) -> Float[Tensor, " samples"]:
        """The sum again, from the components of all processes."""
        if self.world.size == 1 or reward.capabilities.set_valued:
            return scores.total
        names = list(reward.rewards)

        def combine(group: Tensor, *columns: Tensor) -> Tensor:
            return reward.combine(dict(zip(names, columns, strict=True)), group)

        return self.jointly(combine, samples.group, *(scores.components[name] for name in names))

    def observe(self, components: Mapping[str, Tensor]) -> None:
        """Add the scores of one iteration, of all processes, to a reward that standardises by what it has seen."""
        reward = self.task.reward
        if (
            isinstance(reward, WeightedSum)
            and reward.normalise == "running"
            and reward.rewards.keys() <= components.keys()
        ):
            reward.observe({name: self.world.gather(components[name]) for name in reward.rewards})

    def gather(self, *columns: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.world.gather(column) for column in columns)

    def jointly(self, function: Callable[..., Any], *columns: Tensor) -> Any:
        return self.world.jointly(function, *columns)
