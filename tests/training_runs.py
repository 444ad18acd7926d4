"""Tiny trainings on a mixture that the tests of the loop share."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from difftilt.leaves import load
from difftilt.models.shards import gathered
from difftilt.recipes.parts import config_of
from difftilt.sampling.protocol import Edges
from difftilt.sampling.steps import GaussianStep
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop, TrainResult, assemble, train_task
from difftilt.training.policy_gradient import PolicyGradient
from difftilt.training.protocol import Method, Task
from difftilt.training.world import World
from difftilt.trees import Pooled

METHODS = ("flow-grpo", "diffusion-nft")
"""One that learns from chains, one from the forward process."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "flow-grpo": ("flow-grpo", {"advantage": "history", "history": 16}),
    "diffusion-nft": ("diffusion-nft", {}),
    "branch-grpo": ("branch-grpo", {"width": "parent_top1"}),
    "g2rpo": ("g2rpo", {"kl_weight": 0.1, "objective": "guard", "clip_range": 0.1}),
    "dense-grpo": ("dense-grpo", {"calibration_rounds": 2, "calibration_samples": 8, "share_start": True}),
    "tp-grpo": ("tp-grpo", {"kernel": "flow_sde"}),
    "euphonium": (
        "euphonium",
        {
            "fit_samples": 16,
            "fit_steps": 3,
            "fit_batch": 8,
            "guide_from": 0,
            "best_worst": 2,
            "score_mean": "guided",
            "train_beside": True,
            "distillation": {"target": "limit", "bound": 5.0},
        },
    ),
    "gardo": (
        "gardo",
        {"auxiliary": ("on_mode",), "gate_fraction": 0.2, "kl_weight": 1.0, "reset_steps": 3, "kl_limit": None},
    ),
    "gardo-nft": (
        "gardo",
        {"base": "diffusion-nft", "share_start": False, "auxiliary": ("on_mode",), "gate_fraction": 0.2},
    ),
    "crd": ("crd", {"centre": "batch", "temperature": 0.3, "draws": 3}),
    "prdp": ("prdp", {"epochs": 2, "reduction": "sum", "temperature": 0.3, "clip_range": 0.05, "ema": 0.9}),
    "gdro": ("gdro", {"collect": 8, "ema": 0.9}),
    "dragon": ("dragon", {"levels": 2, "beta": 1.0, "sweeps": 2, "drop_below": 1e-3}),
    "b2-diffurl": ("b2-diffurl", {"kernel": "flow_sde", "noise_level": 0.7, "ema": 0.9}),
}
"""Name of a case -> method and settings: every method, with the parts that speak to other processes or are saved."""
STILL = OptimizerConfig(lr=1e-30, weight_decay=0.0, max_grad_norm=1e30)
"""Neither clips nor moves anything that can be seen."""


def make_task(classes: int = 4, moved: bool = True) -> Task:
    """Four steps, eight hidden units; every weight moved at random, so that a gradient reaches all of them."""
    task = Mixtures(MixturesConfig(classes=classes, steps=4, hidden=8)).task()
    generator = torch.Generator().manual_seed(0)
    network = task.model.network
    assert isinstance(network, nn.Module)
    with torch.no_grad():
        for parameter in network.parameters() if moved else ():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return task


def make_method(name: str, task: Task, **settings: Any) -> Method:
    size: dict[str, Any] = {"groups": 4, "group_size": 4, **settings}
    entry = load("methods", name)
    return entry(config_of(entry)(**size), task)


def make_case(name: str, task: Task) -> Method:
    method, settings = CASES[name]
    return make_method(method, task, updates=2, **settings)


def make_config(**settings: Any) -> TrainingConfig:
    small: dict[str, Any] = {"iterations": 3, "forward_batch": 16, "evaluate_every": 0, "evaluation_samples": 8}
    small |= {"checkpoint_every": 2, "optimizer": OptimizerConfig(lr=1e-2), **settings}
    return TrainingConfig(**small)


def make_loop(method: Method, task: Task, **settings: Any) -> Loop:
    """At its first iteration, without a directory; the optimiser stands still unless one is given."""
    config = make_config(**{"optimizer": STILL, **settings})
    loop = assemble(task, method, config, None, ("ratio_one",), (), World())
    loop.run.begin(0)
    return loop


def train(name: str, directory: Path | None, *, resume: bool = False, **settings: Any) -> TrainResult:
    """A whole run; settings that start with ``method_`` go to the method."""
    own = {key[7:]: value for key, value in settings.items() if key.startswith("method_")}
    rest = {key: value for key, value in settings.items() if not key.startswith("method_")}
    task = make_task()
    return train_task(task, make_method(name, task, **own), make_config(**rest), directory, resume=resume)


@contextmanager
def without_pictures() -> Generator[None]:
    """Nothing is drawn: pictures take longer than trainings of this size."""
    with patch("difftilt.training.loop.show"), patch("difftilt.training.loop.save_gallery"):
        yield


def steady(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows without what the clock decides."""
    return [
        {key: row[key] for key in row if not key.startswith("time/") and key != "samples_per_second"} for row in rows
    ]


def gradient(loop: Loop) -> Tensor:
    """Of role ``current`` after an update, flattened."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in loop.run.roles.parameters("current")]
    return torch.cat([gathered(grad).reshape(-1) for grad in grads]).double()


def densities(loop: Loop, experience: Experience) -> Tensor:
    """Of every edge: the log-density of its Gaussian step under the current weights, a mean over dimensions."""
    assert isinstance(loop.method, PolicyGradient)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    edges = rows.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.s is not None
    with torch.no_grad():
        prediction = loop.run.denoiser("current")(edges.x_t, edges.t, rows.condition)
    step = loop.method.preset.kernel(prediction, edges.x_t, edges.t, edges.s)
    assert isinstance(step, GaussianStep)
    return torch.distributions.Normal(step.mean, step.std[:, None]).log_prob(edges.x_s).mean(1)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def make_experience(samples: int = 12, steps: int = 3, size: int = 4) -> Experience:
    """Hand-made: sample i of group i // size has one edge per step, ordered by step; ``number`` names the edge."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.arange(samples).repeat(steps)
    step = torch.arange(steps).repeat_interleave(samples)
    number = torch.arange(samples * steps)
    edges = Edges(
        sample=sample,
        step=step,
        t=0.9 - 0.2 * step,
        start=Pooled.of(torch.randn(samples * steps, 2, generator=generator)),
        end=Pooled.of(torch.randn(samples * steps, 2, generator=generator)),
        parent=torch.where(step > 0, number - samples, -1),
        extras={"number": number},
    )
    index = torch.arange(samples)
    return Experience(
        index=index,
        group=index // size,
        prompt=torch.zeros_like(index),
        condition=torch.zeros_like(index),
        x_0=torch.randn(samples, 2, generator=generator),
        rewards=torch.randn(samples, generator=generator),
        components={"one": index.float()},
        edges=edges,
    )


def with_edges(experience: Experience, change: Callable[[Edges], Edges]) -> Experience:
    return replace(experience, edges=change(experience.edges))
