"""Scoring of one part of the samples while the next is drawn, for rewards whose time passes elsewhere.

The parts are scored by one thread, one after the other in their order, so scores, messages and what a reward remembers
are those of scoring all at once.
"""

import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.errors import RewardError
from difftilt.models.ledger import Ledger
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import score_components
from difftilt.training.experience import PromptBatch
from difftilt.trees import take

T = TypeVar("T")


@dataclass(frozen=True)
class _Handed:
    """Hands whatever is raised to the thread that asks for the result, and to nobody else."""

    future: Future[Any]

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self.future.set_exception(error)
        return True


@dataclass
class Worker(Generic[T]):
    """Makes calls in a thread, one after the other; after one that fails it makes no more.

    A daemon: an interrupted run does not wait for a call that is under way.
    """

    seconds: float = 0.0
    _calls: "queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None]" = field(default_factory=queue.SimpleQueue)
    _given: list[Future[T]] = field(default_factory=list)

    def __enter__(self) -> "Worker[T]":
        Thread(target=self._work, name="scoring", daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        for future in self._given:
            future.cancel()
        self._calls.put(None)

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """The result to come; raises what an earlier call has raised meanwhile."""
        for earlier in self._given:
            if earlier.done() and not earlier.cancelled():
                earlier.result()
        future: Future[T] = Future()
        self._given.append(future)
        self._calls.put((future, call))
        return future

    def _work(self) -> None:
        failed = False
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if failed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            began = time.perf_counter()
            with _Handed(future):
                result = call()
                self.seconds += time.perf_counter() - began
                future.set_result(result)
            failed = future.exception() is not None


@dataclass(frozen=True)
class Scored:
    """Components of all parts, not yet added up.

    Attributes:
        samples: of all parts.
        components: name -> (samples,).
        ledger: what scoring cost.
        waited: seconds that nothing else was done in.
        hidden: seconds of scoring while samples were drawn.
    """

    samples: Samples
    components: dict[str, Tensor]
    ledger: Ledger
    waited: float
    hidden: float


def score_in_background(reward: Reward, drawn: Iterable[Samples]) -> Scored:
    """Draw the parts one after the other, and score each while the next is drawn; no gradient.

    Raises:
        RewardError: of the first part that fails; its rows are named, and no further part is drawn.
    """
    with Worker[tuple[dict[str, Tensor], Ledger]]() as worker:
        parts: list[Samples] = []
        pending: list[Future[tuple[dict[str, Tensor], Ledger]]] = []
        first = 0
        for part in drawn:
            pending.append(worker.submit(partial(_score, reward, part, first)))
            parts.append(part)
            first += len(part.group)
        began = time.perf_counter()
        found = [future.result() for future in pending]
        waited = time.perf_counter() - began
    names = found[0][0]
    return Scored(
        Samples.join(parts),
        {name: torch.cat([components[name] for components, _ in found]) for name in names},
        sum((ledger for _, ledger in found), Ledger()),
        waited,
        max(worker.seconds - waited, 0.0),
    )


@torch.no_grad()
def _score(reward: Reward, samples: Samples, first: int) -> tuple[dict[str, Tensor], Ledger]:
    """Components and cost of one part, whose first sample is row ``first`` of all."""
    ledger = Ledger()
    try:
        return score_components(reward, samples, ledger), ledger
    except RewardError as error:
        raise RewardError(f"samples {first} to {first + len(samples.group) - 1} of the batch: {error}") from error


def in_parts(batch: PromptBatch, rows: int) -> Sequence[PromptBatch]:
    """Neighbouring whole groups, at least ``rows`` rows in each part but the last."""
    lengths: Int[Tensor, " groups"] = torch.unique_consecutive(batch.group, return_counts=True)[1]
    parts: list[int] = []
    for length in lengths.tolist():
        if parts and parts[-1] < rows:
            parts[-1] += length
        else:
            parts.append(length)
    return [take(batch, part) for part in torch.arange(len(batch.index)).split(parts)]
