"""Make the checkpoint of the shapes testbed: the flow model with its text encoder.

Usage: python scripts/train_shapes.py [--output DIR] [--steps N] [--log FILE]

Seeded; 900 steps take about two minutes on one CPU core. They are few on purpose: the model is to have room left. Every
250 steps it prints the loss and the share of right pictures by category, of the averaged weights on validation prompts;
--log also writes them as JSON lines.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
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
from difftilt.testbeds.shapes import CELLS, CHECKPOINT, decode
from difftilt.testbeds.shapes_verifier import judge, see
from difftilt.testbeds.shapes_world import CATEGORIES, CELL, WORDS, Wish, balanced, draw, parse, splits

DENOISER: dict[str, Any] = {
    "channels": 3,
    "size": CELLS * CELL,
    "patch": CELL,
    "width": 96,
    "depth": 4,
    "heads": 4,
    "vector": 96,
    "text": 96,
    "form": "x0_velocity",
}
TEXT: dict[str, Any] = {"vocabulary": list(WORDS), "length": 8, "width": 96, "depth": 2, "heads": 4}
SHARES = {"single": 0.05, "count": 0.15, "binding": 0.15, "position": 0.3, "count_position": 0.35}
SCENES = 60_000
BATCH = 64
NULL_SHARE = 0.1  # prompts replaced by the empty one, for classifier-free guidance
RATE = 2e-3
AVERAGE = 0.998


class Both(nn.Module):
    """Text encoder and denoiser, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(**TEXT)
        self.denoiser = DiT(**DENOISER)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        text, keep, pooled = self.text(tokens)
        return self.denoiser(x_t, t, {"text": text, "text_keep": keep, "vector": pooled})


def scenes(generator: torch.Generator) -> tuple[Tensor, list[Wish]]:
    """Pictures (scenes, 3, 32, 32) as bytes and what they show, by the shares of the categories."""
    wishes: list[Wish] = []
    for category, share in SHARES.items():
        texts = splits(category)["train"]
        wishes += [
            parse(texts[i]) for i in torch.randint(len(texts), (round(share * SCENES),), generator=generator).tolist()
        ]
    return torch.stack([(draw(wish, generator, CELLS) * 255).round().byte() for wish in wishes]), wishes


def train(steps: int, log: Path | None) -> Both:
    """Flow matching with times at high noise; returns the averaged weights."""
    generator = torch.Generator().manual_seed(0)
    network, average = Both(), Both().requires_grad_(False)
    images, wishes = scenes(generator)
    tokens = network.text.tokenise([wish.text for wish in wishes])
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    process, recent, start = RectifiedFlow(), 0.0, time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * min(1, (steps - step) / (0.3 * steps))
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        x_0 = images[rows].float() / 127.5 - 1
        t = (torch.randn(BATCH, generator=generator) + 1.5).sigmoid()
        noise = torch.randn(x_0.shape, generator=generator)
        null = torch.rand(BATCH, generator=generator) < NULL_SHARE
        words = torch.where(null[:, None], 0, tokens[rows])
        error = (network(process.corrupt(x_0, t, noise), t, words) - (noise - x_0)).square().mean((1, 2, 3))
        loss = (t * error).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                mine.lerp_(theirs, 1 - min(AVERAGE, (1 + step) / (10 + step)))
        recent += loss.item() / 250
        if (step + 1) % 250 == 0:
            row = {"step": step + 1, "loss": recent, **accuracy(average, "validation", each=40)}
            row["seconds"] = time.perf_counter() - start
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            recent = 0.0
    return average


@torch.no_grad()
def accuracy(network: Both, split: Any, each: int, steps: int = 8, shift: float = 3.0) -> dict[str, float]:
    """Share of right pictures by category and their mean, by Euler steps from fixed noise."""
    prompts = balanced(split, CATEGORIES, each)
    right = torch.tensor([one.accuracy for one in judged(network, prompts, uniform_grid(steps, shift))])
    by_category = {name: right[place :: len(CATEGORIES)].mean().item() for place, name in enumerate(CATEGORIES)}
    return {"accuracy": math.fsum(by_category.values()) / len(by_category), **by_category}


def judged(network: Both, prompts: Sequence[str], grid: Tensor) -> list[Any]:
    """One picture of each prompt, judged."""
    condition = network.text.condition(prompts)
    x = Noise(0).normal(torch.arange(len(prompts)), (3, CELLS * CELL, CELLS * CELL), purpose="report")
    for t, s in pairwise(grid):
        x = x - (t - s) * network.denoiser(x, t.expand(len(x)), condition)
    return [judge(seen, parse(prompt)) for seen, prompt in zip(see(decode(x)), prompts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = train(arguments.steps, arguments.log)
    save_pretrained(network.denoiser, arguments.output / "denoiser", DENOISER)
    save_pretrained(network.text, arguments.output / "text", TEXT)
    print(f"{sum(parameter.numel() for parameter in network.parameters())} parameters")
    for split in ("validation", "test"):
        scores = accuracy(network, split, each=100)
        print(split, "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
