"""How surely a frozen classifier sees what the prompt asked for."""

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.errors import quoted
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="classifier",
    entry="ClassifierReward",
    paper="Log-probability of the prompted class under a frozen classifier (Dhariwal and Nichol 2021 as a reward).",
    needs=("a classifier", "prompts that name a class"),
)


class ClassifierReward:
    """log p(class of the prompt | media), p itself, or the margin of its logit; differentiable with respect to media.

    Attributes:
        name: shown in reports.
        network: media -> logits (batch, classes); a copy, in eval mode, whose parameters take no gradient.
        target: prompt -> class, a mapping or a function. The user's prompt counts, not a rewritten one.
        probability: score p, in [0, 1], in place of log p, in nats.
        margin: score the logit of the class minus the largest of the others, which never saturates.
    """

    def __init__(
        self,
        network: nn.Module,
        target: Mapping[str, int] | Callable[[str], int],
        *,
        probability: bool = False,
        margin: bool = False,
        name: str = "classifier",
        cost: float = 1.0,
    ) -> None:
        if probability and margin:
            raise ValueError("a classifier reward is either a probability or a margin: choose one")
        self.name = name
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.target = target
        self.probability, self.margin = probability, margin
        self.capabilities = Capabilities(differentiable=True, cost=cost)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        log_probs = self.network(samples.media).float().log_softmax(-1)
        wanted = torch.tensor([self._class_of(prompt) for prompt in samples.prompts], device=log_probs.device)[:, None]
        chosen = log_probs.gather(1, wanted)[:, 0]
        if self.margin:
            return chosen - log_probs.scatter(1, wanted, -torch.inf).amax(1)
        return chosen.exp() if self.probability else chosen

    def _class_of(self, prompt: str) -> int:
        if not isinstance(self.target, Mapping):
            return self.target(prompt)
        if prompt not in self.target:
            raise ValueError(
                f"no class for the prompt {quoted(prompt)}; known prompts: {', '.join(sorted(self.target))}"
            )
        return self.target[prompt]
