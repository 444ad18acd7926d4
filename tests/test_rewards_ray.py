"""Rewards in actors of a real local Ray with one core: equal scores, faults named, the dead started again."""

import gc
import os
import sys
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

import difftilt
from difftilt.errors import RewardError, UserError
from difftilt.models.ledger import Ledger
from difftilt.rewards import Reward, Samples, evaluate
from difftilt.rewards.served import ray_actors
from difftilt.rewards.served.ray_actors import Config, RayReward
from served_rewards import faulty, spread
from training_runs import without_pictures

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_core() -> Generator[None]:
    assert str(Path(__file__).parent) in sys.path  # where the actors find the rewards too
    if "RAY_ADDRESS" in os.environ:  # a node that runs already: a busy machine may be too slow to start one in time
        ray.init(log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it forgets processes that still run
        ray.shutdown()
        gc.collect()


def connect(reward: str = "served_rewards:faulty", **changes: Any) -> RayReward:
    fields: dict[str, Any] = {"cpus": 0.1, "batch": 3, "retries": 2, "backoff": 0.1, **changes}
    return RayReward(Config(reward=reward, **fields))


def samples_of(prompt: str = "") -> Samples:
    media = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Samples(media, [prompt] * 8, [prompt] * 8, torch.arange(8) % 3)


def score(reward: Reward, samples: Samples) -> Tensor:
    return evaluate(reward, samples, Ledger()).total


def test_scores_come_in_order_from_several_actors() -> None:
    reward = connect(actors=2)
    assert reward.name == "faulty"
    assert reward.capabilities.background
    assert torch.equal(score(reward, samples_of()), score(faulty(), samples_of()))
    assert torch.equal(score(connect("served_rewards:spread"), samples_of()), score(spread(), samples_of()))


def test_faults_are_named() -> None:
    reward = connect(timeout=0.5, retries=1)
    assert score(connect(), samples_of()).shape == (8,)
    with pytest.raises(RewardError, match=r"samples 0 to 2: .*raised ValueError .*the judge is out"):
        score(reward, samples_of("raise"))
    with pytest.raises(RewardError, match=r"row 1 \(prompt 'nan'\) is nan"):
        score(reward, samples_of("nan"))
    with pytest.raises(UserError, match="write prompts in English"):
        score(reward, samples_of("user"))
    with pytest.raises(RewardError, match=r"samples 0 to 2 in 2 attempts, the last: no answer within 0\.5"):
        score(reward, samples_of("hang"))


def test_an_actor_that_dies_is_started_again() -> None:
    # it dies at its third request; the new one has lives of its own
    reward = connect(settings={"lives": 2}, timeout=120)
    assert torch.equal(score(reward, samples_of()), score(faulty(), samples_of()))
    with pytest.raises(RewardError, match="in 2 attempts"):
        score(connect(retries=1, timeout=120), samples_of("die"))


def test_what_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no class or function 'nobody'"):
        connect("served_rewards:nobody")
    with pytest.raises(UserError, match="cannot be made with the settings"):
        connect(settings={"lifes": 1})
    monkeypatch.setattr(ray_actors, "STARTED", 5.0)
    with pytest.raises(UserError, match=r"did not start within 5 s .*lower reward\.actors"):
        connect(cpus=99)


def test_a_run_with_actors_is_the_run_without(tmp_path: Path) -> None:
    recipe = {
        "testbed": {"name": "mixtures", "classes": 4, "steps": 4, "hidden": 8},
        "method": {"name": "diffusion-nft", "groups": 4, "group_size": 16},
        "training": {"iterations": 2, "forward_batch": 32, "evaluation_samples": 8},
    }
    served = {"name": "ray-actors", "reward": "served_rewards:faulty", "actors": 1, "cpus": 0.1, "batch": 8}
    with without_pictures():
        done = [
            difftilt.train(recipe | {"reward": reward}, tmp_path / str(place))
            for place, reward in enumerate(({"name": "served_rewards:faulty"}, served))
        ]
    assert done[0].after == done[1].after
    assert done[0].before != done[0].after
