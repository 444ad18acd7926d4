"""A slow reward beside sampling: one collection of Flow-GRPO, whose reward takes as long as its rollout."""

import resource
import time
from dataclasses import dataclass, field, replace

from torch import Tensor

from benchmarks.paired import Pairs, Report, Subject, Timing, summary
from benchmarks.training import assembled, collected
from benchmarks.workload import Size, make_task, shapes_of
from difftilt import api
from difftilt.methods.policy_gradient.flow_grpo import Config, FlowGRPO
from difftilt.rewards import FunctionReward, Reward, Samples
from difftilt.rewards.served.remote import Config as RemoteConfig
from difftilt.rewards.served.remote import RemoteReward
from difftilt.training.loop import Loop

PARTS, STEPS = 16, 3


@dataclass
class Judge:
    """Brightness, for which it sleeps as long as the drawing of the same samples took.

    So both take equally long in one and the same run, whatever else the machine does.

    Attributes:
        drawn: seconds that the drawing of each part took.
        slept: seconds of each answer.
    """

    drawn: list[float] = field(default_factory=list[float])
    slept: list[float] = field(default_factory=list[float])
    mark: float = 0.0

    def begin(self) -> None:
        """A new collection."""
        self.drawn, self.slept, self.mark = [], [], time.perf_counter()

    def decode(self, latents: Tensor) -> Tensor:
        """Ends the drawing of a part."""
        media = latents[:, :3].sigmoid()
        now = time.perf_counter()
        self.drawn.append(now - self.mark)
        self.mark = now
        return media

    def score(self, samples: Samples) -> Tensor:
        began = time.perf_counter()
        time.sleep(self.drawn[len(self.slept)])
        self.slept.append(time.perf_counter() - began)
        return samples.media.flatten(1).mean(1)


def run(size: Size, repeats: int) -> Report:
    """Through a real server, in a thread of this process, over HTTP: packing and unpacking are part of the program."""
    size, judge = replace(size, batch=size.batch // 2, steps=STEPS), Judge()
    with api.reward_server(FunctionReward("judge", judge.score)) as server:
        loop = _loop(size, judge, RemoteReward(RemoteConfig(url=server.url, batch=size.batch)))
        _once(loop, judge)  # warms up
        halves = [_once(loop, judge) for _ in range(repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pairs = Pairs([floor for floor, _ in halves], [program for _, program in halves], peak, peak)
    return summary(_subject(size, loop), pairs)


def _once(loop: Loop, judge: Judge) -> tuple[Timing, Timing]:
    """The longer of drawing and scoring in one collection, and the whole."""
    judge.begin()
    wall, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
    collected(loop, 0)
    whole = Timing(time.perf_counter() - wall, time.process_time() - cpu)
    return Timing(max(sum(judge.drawn), sum(judge.slept)), time.thread_time() - own), whole


def _subject(size: Size, loop: Loop) -> Subject:
    def nothing() -> None: ...

    return Subject(
        name="overlap",
        bound=1.15,
        program=f"a collection whose remote reward takes as long as its rollout, in {PARTS} parts",
        floor="the longer of the two in the same collection; of processor time that of the thread that draws",
        run_program=nothing,
        run_floor=nothing,
        shapes=shapes_of(size, loop.run.roles.module("current")) | {"samples": PARTS * size.batch, "parts": PARTS},
        extra={"one after the other": 2.0, "ideal": 1 + 1 / PARTS},
        phases={},
    )


def _loop(size: Size, judge: Judge, reward: Reward) -> Loop:
    task = make_task(size)
    task = replace(task, reward=reward, model=replace(task.model, decode=judge.decode))
    return assembled(task, FlowGRPO(Config(groups=PARTS * size.batch // 4, group_size=4), task), size)
