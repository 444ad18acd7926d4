"""Make the checkpoint of the tones testbed: the flow model with its text encoder, in half precision.

Usage: python scripts/train_tones.py [--output DIR] [--steps N] [--log FILE] [--state FILE]

Seeded; every chord is synthesised anew. Every 250 steps it prints the loss and how samples of the averaged weights are
judged; --log also writes them as JSON lines. With --state the run is kept there every 250 steps, and goes on from it.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftilt.models.dit import DiT
from difftilt.models.saving import save_pretrained
from difftilt.models.text_encoder import TextEncoder
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.sampling.noise import Noise
from difftilt.testbeds.tones import CHECKPOINT, FRAME, SIDE, decode, latents_of
from difftilt.testbeds.tones_verifier import hear, right
from difftilt.testbeds.tones_world import CATEGORIES, ROOTS, WORDS, Category, Wish, draw, parse, prompts_on

WIDTH = 112
DENOISER: dict[str, Any] = {
    "channels": FRAME,
    "size": SIDE,
    "patch": 1,
    "width": WIDTH,
    "depth": 4,
    "heads": 4,
    "vector": 64,
    "text": 64,
    "form": "x0_velocity",
}
TEXT: dict[str, Any] = {"vocabulary": list(WORDS), "length": 5, "width": 64, "depth": 1, "heads": 4}
SHARES: dict[Category, float] = {"empty": 0.25, "free": 0.25, "family": 0.2, "named": 0.3}
"""Of prompts in training, by category; ``empty`` is the unconditional model."""
BATCH = 64
RATE = 2e-3
AVERAGE = 0.998
EVERY = 250
REPEATS: dict[Category, int] = {"empty": 12, "free": 12, "family": 6, "named": 1}
"""Samples of each prompt in a report, so that every category has 144."""


class Both(nn.Module):
    """Text encoder and denoiser, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(**TEXT)
        self.denoiser = DiT(**DENOISER)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        text, keep, pooled = self.text(tokens)
        return self.denoiser(x_t, t, {"text": text, "text_keep": keep, "vector": pooled})


class Training:
    """Flow matching with new chords in every batch; ``average`` are the averaged weights."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.seconds = steps, 0, 0.0
        self.generator = torch.Generator().manual_seed(0)
        self.network, self.average = Both(), Both().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-2)
        self.prompts = [prompts_on(ROOTS, (category,)) for category in SHARES]

    def wishes(self) -> list[Wish]:
        """Prompts of a batch, by the shares."""
        shares = torch.tensor(list(SHARES.values()))
        drawn = torch.multinomial(shares, BATCH, True, generator=self.generator).tolist()
        places = torch.rand(BATCH, generator=self.generator).tolist()
        lists = [self.prompts[category] for category in drawn]
        return [parse(texts[int(place * len(texts))]) for texts, place in zip(lists, places, strict=True)]

    def step(self) -> float:
        """One update; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1, (self.done + 1) / 100, (self.steps - self.done) / (0.4 * self.steps))
        wishes = self.wishes()
        x_0 = latents_of(draw(wishes, self.generator))
        t = (torch.randn(BATCH, generator=self.generator) + 1.5).sigmoid()
        noise = torch.randn(x_0.shape, generator=self.generator)
        tokens = self.network.text.tokenise([wish.text for wish in wishes])
        x_t = RectifiedFlow().corrupt(x_0, t, noise)
        error = (self.network(x_t, t, tokens) - (noise - x_0)).square().mean((1, 2, 3))
        loss = (t * error).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mine.lerp_(theirs, 1 - min(AVERAGE, (1 + self.done) / (10 + self.done)))
        self.done += 1
        return loss.item()

    def save(self, file: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        clock = {"done": self.done, "seconds": self.seconds, "generator": self.generator.get_state()}
        draft = file.with_name(file.name + ".part")
        torch.save(parts | clock, draft)
        draft.replace(file)

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        for name in ("network", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.done, self.seconds = state["done"], state["seconds"]
        self.generator.set_state(state["generator"])


def train(steps: int, log: Path | None, state: Path | None) -> Both:
    """Returns the averaged weights."""
    training = Training(steps)
    if state is not None and state.exists():
        training.load(state)
    while training.done < steps:
        start = time.process_time()
        loss = sum(training.step() for _ in range(EVERY)) / EVERY
        training.seconds += time.process_time() - start
        row = {"step": training.done, "loss": loss, **judged(training.average), "seconds": training.seconds}
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if state is not None:
            training.save(state)
    return training.average


@torch.no_grad()
def judged(network: Both, steps: int = 10, shift: float = 3.0) -> dict[str, float]:
    """Mean scores of 144 samples of every category, by Euler steps from fixed noise."""
    scores: dict[str, float] = {}
    for name in CATEGORIES:
        prompts = prompts_on(ROOTS, (name,)) * REPEATS[name]
        condition = network.text.condition(prompts)
        x = Noise(0).normal(torch.arange(len(prompts)), (FRAME, SIDE, SIDE), purpose="report")
        for t, s in pairwise(uniform_grid(steps, shift)):
            x = x - (t - s) * network.denoiser(x, t.expand(len(x)), condition)
        heard = hear(decode(x))
        scores[f"accuracy_{name}"] = right(heard, prompts).mean().item()
        scores[f"fidelity_{name}"] = heard.fidelity.mean().item()
        scores[f"consonance_{name}"] = heard.consonance.mean().item()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = train(arguments.steps, arguments.log, arguments.state).half()
    save_pretrained(network.denoiser, arguments.output / "denoiser", DENOISER)
    save_pretrained(network.text, arguments.output / "text", TEXT)
    print(f"{sum(parameter.numel() for parameter in network.parameters())} parameters")


if __name__ == "__main__":
    main()
