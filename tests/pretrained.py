"""Tiny networks of the real classes of transformers with random weights, and what every reward with one is held to."""

import importlib.metadata
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.rewards import Reward, Samples
from pipelines import clip_config, clip_tokenizer, made

PROMPTS = ["a red cat", "two dogs by the sea", "a red cat"]
EDGE = 28
"""Pixels that the tiny networks see."""


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package were not installed, with the extras that pyproject.toml has now, not when it was installed."""
    monkeypatch.setitem(__import__("sys").modules, package, None)
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [f"{line}; extra == '{extra}'" for extra, wanted in extras.items() for line in wanted]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: lines)  # pyright: ignore[reportUnknownLambdaType]


def seeded(make: Callable[[], Any], scale: float = 3.0) -> Any:
    """A network whose weights are the same in every call.

    Matrices are enlarged, for fresh ones tell images and texts hardly apart; norms and biases are moved away from 1 and
    0, where one could stand for another.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().eval()
        with torch.no_grad():
            for weight in network.parameters():
                if weight.dim() > 1:
                    weight.mul_(scale)
                elif weight.dim() == 1:
                    weight.add_(0.2 * torch.randn_like(weight))
    return network


def vision_settings() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": 7,
    }


def clip(**text: Any) -> Any:
    """A ``CLIPModel``."""
    settings = clip_config().to_dict() | {"max_position_embeddings": 32} | text
    config = made("CLIPConfig", text_config=settings, vision_config=vision_settings(), projection_dim=8)
    return seeded(lambda: made("CLIPModel", config))


def save_clip(folder: Any, processor: Any) -> Any:
    """A folder as ``from_pretrained`` reads it."""
    model = clip()
    for part in (model, clip_tokenizer(), processor):
        part.save_pretrained(folder)
    return model


def images(rows: int = 3, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    """Smooth images of bytes, in [0.1, 0.9], so that no filter overshoots: what a file would hold."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (25 + 205 * smooth).round() / 255


def samples(media: Tensor, prompts: list[str] | None = None, **metadata: Any) -> Samples:
    prompts = PROMPTS[: len(media)] if prompts is None else prompts
    return Samples(
        media, prompts, ["rewritten"] * len(media), torch.zeros(len(media), dtype=torch.int64), None, metadata
    )


def hold(reward: Reward, given: Samples, low: float, high: float, tolerance: float = 1e-5) -> Tensor:
    """Shape, dtype, range, repeatability, and independence of the rows from one another; returns the scores."""
    scores = reward.score(given)
    assert scores.shape == (len(given.group),)
    assert scores.dtype == torch.float32
    assert bool((scores >= low).all())
    assert bool((scores <= high).all())
    assert torch.equal(scores, reward.score(given))
    alone = torch.cat([reward.score(given.take(torch.tensor([row]))) for row in range(len(scores))])
    torch.testing.assert_close(alone, scores, atol=tolerance * max(1.0, float(scores.abs().max())), rtol=0)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(reward.score(given.take(order)), scores[order], atol=tolerance, rtol=tolerance)
    return scores


def slope(reward: Reward, given: Samples, step: float = 1e-2) -> None:
    """The gradient that autograd finds is that of central differences along a direction, and is nowhere missing.

    The error of a central difference is of the order step², and rounding adds about 1e-7·|score|/step.
    """
    media = given.media.clamp(0.2, 0.8).requires_grad_()  # away from where images are clipped
    score = reward.score(replace(given, media=media)).sum()
    gradient = torch.autograd.grad(score, media)[0]
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    direction = gradient / torch.linalg.vector_norm(gradient)
    with torch.no_grad():
        ahead, behind = (reward.score(replace(given, media=media + sign * step * direction)).sum() for sign in (1, -1))
    expected = float(torch.linalg.vector_norm(gradient))
    assert (
        abs(float(ahead - behind) / (2 * step) - expected) < 0.02 * expected + 1e-5 * float(score.detach().abs()) / step
    )
