"""Make the checkpoints of the digits testbed: the flow model and the two classifiers.

Usage: python scripts/train_digits.py [--output DIR] [--steps N]

Seeded; about two minutes on one CPU core. Prints the training loss and, at the end, what docs/testbeds.md reports.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftilt.models.denoiser import denoiser
from difftilt.models.dit import DiT
from difftilt.models.protocol import GenerativeModel
from difftilt.models.saving import save_pretrained
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.sampling.noise import Noise
from difftilt.sampling.solvers import EulerSolver
from difftilt.testbeds.digits import CHECKPOINT, CLASSIFIERS, decode
from difftilt.testbeds.digits_classifier import DigitClassifier, convolution, perceptron, save_classifiers
from difftilt.testbeds.digits_data import CLASSES, DigitImages, all_prompts, digit_of, labels_of, load_splits

ARCHITECTURE: dict[str, Any] = {
    "channels": 1,
    "size": 8,
    "patch": 4,
    "width": 48,
    "depth": 2,
    "heads": 4,
    "classes": CLASSES,
}
BATCH = 128
NULL_SHARE = 0.1  # labels replaced by the null label, for classifier-free guidance


def reset(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights from the generator: PyTorch's layers are built from the global one."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.zero_()


def train_classifier(network: DigitClassifier, data: DigitImages, seed: int, epochs: int = 60) -> None:
    """Cross-entropy with label smoothing on images with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    reset(network, generator)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for rows in torch.randperm(len(data.images), generator=generator).split(32):
            images = data.images[rows]
            noisy = images + 0.05 * torch.randn(images.shape, generator=generator)
            loss = F.cross_entropy(network(noisy), data.digits[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(network: nn.Module, images: Tensor, digits: Tensor) -> float:
    """Share of images whose digit is recognised."""
    with torch.no_grad():
        return float((network(images).argmax(1) == digits).float().mean())


def train_flow(data: DigitImages, steps: int, rate: float = 3e-3) -> DiT:
    """Flow matching with logit-normal times, cosine rate, and an average of the weights, which is returned."""
    generator = torch.Generator().manual_seed(0)
    network, average = DiT(**ARCHITECTURE), DiT(**ARCHITECTURE)
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    process, latents, recent = RectifiedFlow(), 2 * data.images - 1, 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        t = torch.randn(BATCH, generator=generator).sigmoid()
        noise = torch.randn(BATCH, 1, 8, 8, generator=generator)
        label = torch.where(torch.rand(BATCH, generator=generator) < NULL_SHARE, CLASSES, data.labels[rows])
        x_0 = latents[rows]
        loss = F.mse_loss(network(process.corrupt(x_0, t, noise), t, label), noise - x_0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                mine.lerp_(theirs, 1 - min(0.999, (1 + step) / (10 + step)))
        recent += loss.item() / 100
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {recent:.4f}", flush=True)
            recent = 0.0
    return average


def base_samples(network: DiT, count: int, guidance: float, steps: int = 10) -> tuple[Tensor, list[str]]:
    """Images of the base by Euler steps, and their prompts in turn."""
    prompts = [all_prompts()[i % CLASSES] for i in range(count)]
    model = GenerativeModel(
        network, RectifiedFlow(), "velocity", (1, 8, 8), labels_of, decode, lambda rows: torch.full((rows,), CLASSES)
    )
    noise = Noise(0).normal(torch.arange(count), (1, 8, 8), purpose="report")
    with torch.no_grad():
        x_0 = EulerSolver()(denoiser(model, guidance=guidance), noise, labels_of(prompts), uniform_grid(steps))
    return decode(x_0), prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, splits = time.perf_counter(), load_splits()
    first, second = perceptron(), convolution()
    train_classifier(first, splits.first, seed=1)
    train_classifier(second, splits.second, seed=2)
    network = train_flow(splits.train, arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_classifiers(arguments.output / CLASSIFIERS, {"reward": first, "heldout": second})
    save_pretrained(network, arguments.output, ARCHITECTURE)
    print(f"{time.perf_counter() - start:.0f} s, {sum(p.numel() for p in network.parameters())} parameters")
    for name, classifier in (("reward", first), ("held-out", second)):
        print(f"{name} classifier, test accuracy {accuracy(classifier, splits.test.images, splits.test.digits):.3f}")
    for guidance in (1.0, 2.0):
        images, prompts = base_samples(network, 2000, guidance)
        digits = digit_of(prompts)
        found = f"{accuracy(first, images, digits):.3f} and {accuracy(second, images, digits):.3f}"
        probability = first(images).softmax(1).gather(1, digits[:, None]).mean().item()
        print(f"base at guidance {guidance:g}: accuracy {found}, mean reward {probability:.3f}")


if __name__ == "__main__":
    main()
