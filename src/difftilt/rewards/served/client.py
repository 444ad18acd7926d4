"""The client's side, whatever carries the bytes: batches, bounded retries, the scores of all samples in their order."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import RewardError, UserError
from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.rewards.served.service import Description, RefusedError
from difftilt.rewards.served.wire import FORMAT, WireError, pack_samples, unpack_scores
from difftilt.sampling.noise import Noise

LONGEST_WAIT = 30.0
"""Seconds between two attempts, at most."""


class ClientConfig(Config):
    """How a served reward is asked."""

    batch: int = Field(default=64, ge=1)
    """Samples of one request, at most; the members of a set stay together."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that one request may take."""
    retries: int = Field(default=3, ge=0)
    """Further attempts where no answer comes; a reward that fails is not asked again."""
    backoff: float = Field(default=0.5, ge=0)
    """Seconds before the first of them, doubled for each further one, half as much more or less at random."""
    condition: bool = False
    """Also send the condition of the samples, for a reward that reads it; a text encoding can be large."""


class UnreachableError(Exception):
    """No answer: nobody there, gone in the middle, too slow or too busy. Another attempt may have one."""


Answer = Callable[[], bytes]
"""Waits for an answer. Raises ``UnreachableError``, or ``RefusedError`` where asking again would not help."""


class Channel(Protocol):
    """Carries bytes to a :class:`~difftilt.rewards.served.service.Service` and back."""

    @property
    def address(self) -> str:
        """For messages: ``reward server http://127.0.0.1:8000``."""
        ...

    @property
    def width(self) -> int:
        """Requests that may be under way at once."""
        ...

    def describe(self) -> Description:
        """What the service says of itself.

        Raises:
            UserError: if it is not there, or is none.
        """
        ...

    def send(self, body: bytes) -> Answer:
        """Begin to ask."""
        ...


@dataclass(frozen=True)
class Batch:
    """A request.

    Attributes:
        rows: of the samples.
        scores: how many are expected.
        body: to send.
    """

    rows: Int[Tensor, " rows"]
    scores: int
    body: bytes

    @property
    def where(self) -> str:
        """The samples, for messages."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        return f"samples {first} to {last}" if last - first == len(self.rows) - 1 else f"{len(self.rows)} samples"


class ServedReward:
    """A reward in another process. It has no gradient; sets are scored where the service does so.

    Args:
        channel: to the service, which is asked at once what it is.
        config: of the requests.

    Raises:
        UserError: if nobody answers, or it speaks another format.
    """

    def __init__(self, channel: Channel, config: ClientConfig) -> None:
        self.channel, self.config = channel, config
        self.described = channel.describe()
        if self.described.format != FORMAT:
            raise UserError(
                f"{channel.address} speaks format {self.described.format} (difftilt {self.described.version}), this is "
                f"format {FORMAT}: use the same version of difftilt on both sides"
            )
        # each process waits for another time, so that they do not all come back at once
        self._noise = Noise(0).named(channel.address)
        self._rank = torch.tensor([int(os.environ.get("RANK", "0"))])

    @property
    def name(self) -> str:
        return self.described.name

    @property
    def capabilities(self) -> Capabilities:
        """The service's, without the gradient; its time passes elsewhere."""
        found = self.described
        return Capabilities(
            set_valued=found.set_valued,
            missing=found.missing,
            background=True,
            cost=found.cost,
            tolerance=found.tolerance,
        )

    def score(self, samples: Samples) -> Float[Tensor, " scores"]:
        """The service's scores, in the order of samples, or of group index for sets; they may not be finite.

        Raises:
            UserError: for samples that cannot be sent, or that want a gradient.
            RewardError: for a service that is gone, or a reward that fails there.
        """
        if torch.is_grad_enabled() and samples.media.requires_grad:
            raise UserError(
                f"reward {self.name!r} is served by {self.channel.address}, and no gradient crosses to another "
                "process: use the reward itself"
            )
        begun: deque[tuple[Batch, Answer]] = deque()
        found: list[Tensor] = []
        for rows in self._split(samples):
            if len(begun) == self.channel.width:
                found.append(self._finish(*begun.popleft()))
            batch = self._pack(samples, rows)
            begun.append((batch, self.channel.send(batch.body)))
        found += [self._finish(batch, answer) for batch, answer in begun]
        return torch.cat(found).to(samples.media.device)

    def _split(self, samples: Samples) -> Sequence[Int[Tensor, " rows"]]:
        """Rows of each request: neighbours, or whole sets in order of their index."""
        rows = torch.arange(len(samples.group))
        if not self.described.set_valued:
            return rows.split(self.config.batch)
        group = samples.group.cpu()
        parts = [rows[group == label] for label in group.unique()]
        packed: list[Tensor] = []
        for part in parts:
            if packed and len(packed[-1]) + len(part) <= self.config.batch:
                packed[-1] = torch.cat([packed[-1], part])
            else:
                packed.append(part)
        return packed

    def _pack(self, samples: Samples, rows: Int[Tensor, " rows"]) -> Batch:
        part = samples.take(rows.to(samples.group.device))
        try:
            body = pack_samples(part, condition=self.config.condition)
        except WireError as error:
            raise UserError(
                f"reward {self.name!r}: these samples cannot be sent to {self.channel.address}: {error}"
            ) from error
        largest = self.described.max_bytes
        if len(body) > largest:
            raise UserError(
                f"reward {self.name!r}: {len(rows)} samples are {len(body)} bytes, and {self.channel.address} takes at "
                f"most {largest}: lower reward.batch, or start it with a larger --max-bytes"
            )
        return Batch(rows, len(part.group.unique()) if self.described.set_valued else len(rows), body)

    def _finish(self, batch: Batch, answer: Answer) -> Float[Tensor, " scores"]:
        """The scores of a batch, asked for again as often as is allowed."""
        for attempt in range(self.config.retries + 1):
            try:
                return self._scores(batch, (answer if attempt == 0 else self.channel.send(batch.body))())
            except UnreachableError as error:
                if attempt == self.config.retries:
                    raise self._gone(batch, error) from error
                time.sleep(self.wait(attempt))
            except RefusedError as error:
                raise self._failed(batch, error) from error
        raise AssertionError("the last attempt returns or raises")

    def _scores(self, batch: Batch, body: bytes) -> Float[Tensor, " scores"]:
        try:
            scores = unpack_scores(body)
        except WireError as error:
            raise RewardError(
                f"reward {self.name!r}: {self.channel.address} answered {batch.where} with something that is no "
                f"archive of scores: {error}; is it a difftilt reward server, with nothing in between?"
            ) from error
        if len(scores) != batch.scores:
            raise RewardError(
                f"reward {self.name!r}: {self.channel.address} answered {batch.where} with {len(scores)} scores, not "
                f"{batch.scores}"
            )
        return scores

    def wait(self, attempt: int) -> float:
        """Seconds to wait after attempt 0, 1, ...: doubled each time, times a factor in (1/2, 3/2)."""
        factor = 0.5 + float(self._noise.uniform(self._rank, (), purpose="retry", step=attempt))
        return min(self.config.backoff * 2.0**attempt, LONGEST_WAIT) * factor

    def _gone(self, batch: Batch, error: UnreachableError) -> RewardError:
        return RewardError(
            f"reward {self.name!r}: {self.channel.address} gave no answer for {batch.where} in "
            f"{self.config.retries + 1} attempts, the last: {error}; look there, start it again, and go on with the "
            "run with --resume"
        )

    def _failed(self, batch: Batch, error: RefusedError) -> RewardError | UserError:
        message = f"{self.channel.address}, {batch.where}: {error}"
        return UserError(message) if error.kind == "user" else RewardError(message)
