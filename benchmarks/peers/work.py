"""The work that every library does, and how a process that does it takes orders. Nothing but PyTorch is imported here.

Each library runs in a process of its own that stays alive, so that iterations of two of them can take turns.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

PROMPT = "a red cat"


@dataclass(frozen=True)
class Work:
    """One iteration of policy gradients on DDIM steps with noise (Black et al. 2023, DDPO).

    Every library draws ``batch`` samples of one prompt with classifier-free guidance, scores them, standardises the
    scores over the batch, and makes one AdamW step on the clipped surrogate of all steps but the last.

    Attributes:
        pipeline: folder of the Stable Diffusion pipeline.
        batch: samples of an iteration, all in one call of the network.
        steps: of a sample.
        guidance: scale.
        lr: learning rate.
        clip_range: of the ratio of mean log-densities.
        seed: of the draws.
        threads: of PyTorch.
    """

    pipeline: str
    batch: int = 8
    steps: int = 10
    guidance: float = 5.0
    lr: float = 3e-4
    clip_range: float = 1e-4
    seed: int = 0
    threads: int = 1

    def to_json(self) -> str:
        """For the command line of a process."""
        return json.dumps(asdict(self))


def redness(images: Tensor) -> Tensor:
    """Red minus the mean of green and blue, of images in [0, 1]: (batch,)."""
    return (images[:, 0] - images[:, 1:].mean(1)).flatten(1).mean(1)


@dataclass(frozen=True)
class Turn:
    """What one iteration took.

    Attributes:
        wall: seconds that passed.
        cpu: seconds of processor time, over all threads.
        reward: mean over the batch.
        grown_mb: highest resident memory of the process so far, less what it had before the first iteration.
        passes: calls of the network, in rows: without gradient and with.
        network: seconds inside the forward passes of the network.
    """

    wall: float
    cpu: float
    reward: float
    grown_mb: float
    passes: tuple[int, int]
    network: float


@dataclass
class Counter:
    """Rows and seconds of the forward passes of a network, by hooks on it."""

    plain: int = 0
    learning: int = 0
    seconds: float = 0.0
    began: float = 0.0

    def watch(self, network: torch.nn.Module) -> None:
        """Count from now on."""
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(self._leave)

    def _enter(self, network: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        self.began = time.perf_counter()

    def _leave(self, network: torch.nn.Module, given: tuple[Tensor, ...], output: object) -> None:
        self.seconds += time.perf_counter() - self.began
        if torch.is_grad_enabled():
            self.learning += len(given[0])
        else:
            self.plain += len(given[0])


def serve(begin: Callable[[Work, Counter], Callable[[int], float]]) -> None:
    """Read the work from the command line and do one iteration for each line of standard input, until it ends.

    Args:
        begin: (work, counter) -> a function that does one iteration, given its number, and returns its mean reward.
    """
    work = Work(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    torch.set_num_threads(work.threads)
    counter = Counter()
    iterate = begin(work, counter)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.write("ready\n")
    answers.flush()
    for number, _ in enumerate(sys.stdin):
        counter.plain = counter.learning = 0
        counter.seconds = 0.0
        cpu, wall = time.process_time(), time.perf_counter()
        reward = iterate(number)
        took, spent = time.perf_counter() - wall, time.process_time() - cpu
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024
        turn = Turn(took, spent, reward, grown, (counter.plain, counter.learning), counter.seconds)
        answers.write(json.dumps(asdict(turn)) + "\n")
        answers.flush()
