"""Make the checkpoint of the molecules testbed: a masked transformer over words of SELFIES, in half precision.

Usage: python scripts/train_molecules.py [--output DIR] [--steps N] [--log FILE] [--state FILE]

Trained on the molecules that the RDKit wheel carries; nothing is downloaded. Seeded. Every 500 steps it prints the
loss and what 256 samples of the averaged weights are worth; --log also writes them as JSON lines. With --state the run
is kept there every 500 steps, and goes on from it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftilt.models.masked_transformer import MaskedTransformer
from difftilt.models.saving import save_pretrained
from difftilt.objectives import masked_error
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.kernels import Unmasking
from difftilt.testbeds.molecules import CHECKPOINT
from difftilt.testbeds.molecules_chemistry import parse
from difftilt.testbeds.molecules_strings import LENGTH, learn_words, smiles_of, tokens_of, training_smiles

NETWORK: dict[str, Any] = {"length": LENGTH, "width": 128, "depth": 4, "heads": 4}
BATCH = 64
RATE = 1.5e-3
AVERAGE = 0.999
EVERY = 500


class Training:
    """The likelihood bound on real molecules; ``average`` are the averaged weights.

    Args:
        steps: of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.seconds = steps, 0, 0.0
        self.generator = torch.Generator().manual_seed(0)
        self.words = learn_words(training_smiles())
        self.config: dict[str, Any] = NETWORK | {"vocab": len(self.words), "words": self.words}
        self.process = MaskedProcess(len(self.words))
        self.network = MaskedTransformer(**self.config)
        self.average = MaskedTransformer(**self.config).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.02)
        self.data = tokens_of(training_smiles(), self.words)

    def step(self) -> float:
        """One update; returns the bound in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1, (self.done + 1) / 100, (self.steps - self.done) / (0.4 * self.steps))
        x_0 = self.data[torch.randint(len(self.data), (BATCH,), generator=self.generator)]
        # times on a shifted even grid: less variance than independent ones
        t = (torch.rand(1, generator=self.generator) + torch.arange(BATCH) / BATCH) % 1 * (1 - 1e-3) + 1e-3
        x_t = self.process.corrupt(x_0, t, torch.rand(x_0.shape, generator=self.generator))
        prediction = self.process.predict(self.network(x_t, t), x_t, t, "logits")
        loss = masked_error(prediction, x_0).mean() / LENGTH
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


def train(training: Training, log: Path | None, state: Path | None) -> MaskedTransformer:
    """Returns the averaged weights."""
    if state is not None and state.exists():
        training.load(state)
    while training.done < training.steps:
        start, count = time.process_time(), min(EVERY, training.steps - training.done)
        loss = sum(training.step() for _ in range(count)) / count
        training.seconds += time.process_time() - start
        row = {"step": training.done, "loss": loss, **judged(training), "seconds": training.seconds}
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if state is not None:
            training.save(state)
    return training.average


def samples(training: Training, count: int, steps: int) -> Tensor:
    """Sequences of the averaged weights, from fixed noise."""
    generator = torch.Generator().manual_seed(1)
    x = training.process.prior(torch.zeros(count, LENGTH))
    grid = uniform_grid(steps).float()
    for t, s in zip(grid[:-1].split(1), grid[1:].split(1), strict=True):
        at, then = t.expand(count), s.expand(count)
        step = Unmasking()(training.process.predict(training.average(x, at), x, at, "logits"), x, at, then)
        x = step.draw(torch.rand(count, *step.noise_shape, generator=generator).clamp(1e-7, 1 - 1e-7))
    return x


@torch.no_grad()
def judged(training: Training, count: int = 256, steps: int = 16) -> dict[str, float]:
    """Share of samples that are molecules; of these, the shares that are different and new, and mean properties."""
    found = [parse(one) for one in smiles_of(samples(training, count, steps), training.words)]
    molecules = [one for one in found if one is not None]
    names = [one.smiles for one in molecules]
    many, known = max(1, len(names)), set(training_smiles())
    return {
        "valid": len(names) / count,
        "different": len(set(names)) / many,
        "new": sum(name not in known for name in names) / many,
        "qed": sum(one.qed for one in molecules) / many,
        "sa": sum(one.synthetic_accessibility for one in molecules) / many,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(arguments.steps)
    network = train(training, arguments.log, arguments.state).half()
    save_pretrained(network, arguments.output, training.config)
    print(f"{sum(parameter.numel() for parameter in network.parameters())} parameters, {len(training.data)} molecules")


if __name__ == "__main__":
    main()
