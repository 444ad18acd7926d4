"""A slow reward beside sampling: one collection of Flow-GRPO, whose reward takes as long as its rollout."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from benchmarks.paired import Report, Subject, measure
from benchmarks.training import assembled, collected
from benchmarks.workload import Size, make_network, make_task, shapes_of
from difftilt import api
from difftilt.methods.policy_gradient.flow_grpo import Config, FlowGRPO
from difftilt.rewards import FunctionReward, Reward, Samples
from difftilt.rewards.served.remote import Config as RemoteConfig
from difftilt.rewards.served.remote import RemoteReward
from difftilt.training.loop import Loop

PARTS, STEPS = 16, 3


class Sleeper:
    """Brightness, and a sleep: so much of ``seconds`` as the share of samples that it is asked for."""

    def __init__(self, samples: int) -> None:
        self.samples, self.seconds = samples, 0.0

    def score(self, samples: Samples) -> Tensor:
        time.sleep(self.seconds * len(samples.group) / self.samples)
        return samples.media.flatten(1).mean(1)


def run(size: Size, repeats: int) -> Report:
    """Through a real server, in a thread of this process, over HTTP: packing and unpacking are part of the program."""
    size = replace(size, batch=size.batch // 2, steps=STEPS)
    sleeper = Sleeper(PARTS * size.batch)
    with served(sleeper, size) as reward:
        return measure(_subject(size, sleeper, reward), repeats)


@contextmanager
def served(sleeper: Sleeper, size: Size) -> Generator[Reward]:
    """The sleeping reward behind a server, asked for one part at a time."""
    with api.reward_server(FunctionReward("sleeper", sleeper.score)) as server:
        yield RemoteReward(RemoteConfig(url=server.url, batch=size.batch))


def _subject(size: Size, sleeper: Sleeper, reward: Reward) -> Subject:
    overlapping, free = _loop(size, reward), _loop(size, FunctionReward("free", Sleeper(1).score))
    waited: list[float] = []
    hidden: list[float] = []

    def program() -> None:
        collected(overlapping, 0)
        waited.append(overlapping.run.reward_seconds)
        hidden.append(overlapping.run.hidden_seconds)

    def floor() -> None:
        # the machine's speed drifts: the reward takes as long as the rollout did just now
        began = time.perf_counter()
        collected(free, 0)
        sleeper.seconds = time.perf_counter() - began

    return Subject(
        name="overlap",
        bound=1.15,
        program=f"a collection whose remote reward takes as long as the rollout, drawn and scored in {PARTS} parts",
        floor="the longer of the two: the same rollout with a reward that costs nothing",
        run_program=program,
        run_floor=floor,
        shapes=shapes_of(size, make_network(size)) | {"samples": PARTS * size.batch, "parts": PARTS},
        extra={"one after the other": 2.0, "ideal": 1 + 1 / PARTS},
        phases={"waited for the reward": waited, "reward beside the rollout": hidden},
    )


def _loop(size: Size, reward: Reward) -> Loop:
    task = replace(make_task(size), reward=reward)
    return assembled(task, FlowGRPO(Config(groups=PARTS * size.batch // 4, group_size=4), task), size)
