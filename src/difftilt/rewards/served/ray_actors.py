"""A reward in actors of Ray: several copies of it, on this machine or a cluster."""

import os
import sys
from collections.abc import Mapping
from itertools import count
from types import TracebackType
from typing import Any

import ray
from pydantic import Field
from ray import exceptions

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.rewards.served.client import Answer, ClientConfig, ServedReward, UnreachableError
from difftilt.rewards.served.service import Description, RefusedError, Service, make_reward

CARD = Card(name="ray-actors", entry="RayReward", paper="A reward in actors of Ray; no paper.")

STARTED = 120.0
"""Seconds that an actor may take to start: it imports what the reward needs."""


class Config(ClientConfig):
    """What the actors hold, how many there are, and how they are asked."""

    reward: str = Field(min_length=1)
    """``package.module:Name``: a function of samples, or what makes a reward; imported by the actors only."""
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Arguments of what makes the reward."""
    actors: int = Field(default=1, ge=1)
    """Copies of the reward; each works on a batch of its own."""
    cpus: float = Field(default=1.0, ge=0)
    """Cores that an actor reserves."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs that an actor reserves."""
    address: str | None = None
    """Of a Ray cluster; null takes the one of the environment (RAY_ADDRESS), or starts one on this machine."""


class _Holder:
    """What an actor is: a service, and errors as values, for Ray would wrap them."""

    def __init__(self, reward: str, settings: Mapping[str, Any]) -> None:
        self._service: Service | None = None
        self._fault = ""
        try:
            self._service = Service(make_reward(reward, settings))
        except UserError as error:
            self._fault = str(error)

    def describe(self) -> tuple[str | None, str]:
        """The description as JSON, or None and a sentence."""
        return (None, self._fault) if self._service is None else (self._service.describe().model_dump_json(), "")

    def answer(self, body: bytes) -> tuple[bytes | None, str, str]:
        """Scores, or None with kind and sentence of the refusal."""
        assert self._service is not None
        try:
            return self._service.answer(body), "", ""
        except RefusedError as error:
            return None, error.kind, str(error)


class RayReward(ServedReward):
    """The reward of some actors, which are started at once and live as long as this object.

    Raises:
        UserError: if Ray or an actor does not start, or the reward cannot be made.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(Actors(config), config)


class Actors:
    """Copies of a reward, asked in turn; one that dies is started again by Ray, and asked again by the client."""

    def __init__(self, config: Config) -> None:
        self._config = config
        _connect(config)
        # the actors find the modules that the run finds
        places = os.pathsep.join([os.getcwd(), *(place for place in sys.path if place)])
        options = {
            "num_cpus": config.cpus,
            "num_gpus": config.gpus,
            "max_restarts": config.retries,
            # else whatever is asked while an actor starts again would fail at once
            "max_task_retries": config.retries,
            "runtime_env": {"env_vars": {"PYTHONPATH": places}},
        }
        holder = ray.remote(_Holder).options(**options)
        self._actors: list[Any] = [holder.remote(config.reward, config.settings) for _ in range(config.actors)]
        self._turn = count()

    @property
    def address(self) -> str:
        return f"{self._config.actors} Ray actors with {self._config.reward}"

    @property
    def width(self) -> int:
        """One request for each actor."""
        return self._config.actors

    def describe(self) -> Description:
        """What the first says of itself, when all have started."""
        try:
            told: list[tuple[str | None, str]] = ray.get(
                [one.describe.remote() for one in self._actors], timeout=STARTED
            )
        except exceptions.RayError as error:
            raise UserError(
                f"{self.address} did not start within {STARTED:g} s ({_first_line(error)}): lower reward.actors, "
                "reward.cpus or reward.gpus to what the cluster has, or mend the reward"
            ) from error
        description, fault = told[0]
        if description is None:
            raise UserError(f"{self.address}: {fault}")
        return Description.model_validate_json(description)

    def send(self, body: bytes) -> Answer:
        reference = self._actors[next(self._turn) % len(self._actors)].answer.remote(body)

        def wait() -> bytes:
            try:
                scores, kind, message = ray.get(reference, timeout=self._config.timeout)
            except exceptions.GetTimeoutError as error:
                raise UnreachableError(f"no answer within {self._config.timeout:g} s; raise reward.timeout") from error
            except exceptions.RayError as error:
                raise UnreachableError(_first_line(error)) from error
            if scores is None:
                raise RefusedError("user" if kind == "user" else "reward" if kind == "reward" else "request", message)
            return scores

        return wait


def _connect(config: Config) -> None:
    if ray.is_initialized():
        return
    with _Named():
        ray.init(address=config.address, log_to_driver=False, configure_logging=False)


class _Named:
    """Turns what Ray raises when it does not start, which may be a bare ``Exception``, into a sentence."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            raise UserError(
                f"Ray does not start ({_first_line(error)}): mend reward.address, or start a cluster with `ray start "
                "--head` on a machine that is less busy"
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
