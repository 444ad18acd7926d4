"""A reward behind ``difftilt serve-reward``: on this machine or another, in an environment of its own."""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, RemoteDisconnected
from typing import Annotated, Any, cast
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, ValidationError

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.rewards.served.client import Answer, ClientConfig, ServedReward, UnreachableError
from difftilt.rewards.served.server import TOKEN_VARIABLE
from difftilt.rewards.served.service import Description, RefusedError
from difftilt.rewards.served.wire import CONTENT_TYPE

CARD = Card(
    name="remote",
    entry="RemoteReward",
    paper="A reward in another process, served by difftilt serve-reward; no paper.",
)

LARGEST_ANSWER = 64 * 2**20
AGAIN = (429, 502, 503, 504)
"""HTTP states that pass."""


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url!r} is no address of a server: write it as http://127.0.0.1:8000")
    _ = parts.port  # raises ValueError for a port that is none
    return url.rstrip("/")


class Config(ClientConfig):
    """Where the reward is, and how it is asked."""

    url: Annotated[str, AfterValidator(_address)]
    """Address that ``difftilt serve-reward`` printed."""
    token_variable: str = Field(default=TOKEN_VARIABLE, min_length=1)
    """Environment variable that holds the server's token, if it wants one: a token in a recipe would be kept with the
    run."""


class RemoteReward(ServedReward):
    """The reward of a server, which is asked at once whether it is there.

    Args:
        config: address and requests.
        token: of the server; None reads the environment variable.

    Raises:
        UserError: if the server does not answer, wants another token, or is no reward server.
    """

    config: Config

    def __init__(self, config: Config, token: str | None = None) -> None:
        known = token if token is not None else os.environ.get(config.token_variable) or None
        super().__init__(Http(config.url, config.timeout, known), config)


@dataclass(frozen=True)
class Http:
    """One connection for each request: on one machine it costs a fraction of a millisecond.

    Attributes:
        url: of the server.
        timeout: seconds that one request may take.
        token: sent with every request.
    """

    url: str
    timeout: float
    token: str | None = None

    @property
    def address(self) -> str:
        return f"reward server {self.url}"

    @property
    def width(self) -> int:
        """One: a server scores one batch after the other."""
        return 1

    def describe(self) -> Description:
        """What the server says of itself; there is no second attempt, for nothing has begun yet."""
        try:
            return Description.model_validate_json(self._ask("GET", "/health", None))
        except UnreachableError as error:
            raise UserError(
                f"{self.address} does not answer ({error}): start it with `difftilt serve-reward MODULE:FACTORY "
                f"--port {urlsplit(self.url).port or 80}`, or mend reward.url"
            ) from error
        except RefusedError as error:
            raise UserError(f"{self.address}: {error}") from error
        except ValidationError as error:
            raise UserError(
                f"{self.address} is no reward server of this version of difftilt: mend reward.url"
            ) from error

    def send(self, body: bytes) -> Answer:
        return lambda: self._ask("POST", "/score", body)

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        """The content of an answer that is no error."""
        deadline = time.monotonic() + self.timeout
        connection = _connection(urlsplit(self.url), self.timeout)
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        headers |= {} if body is None else {"Content-Type": CONTENT_TYPE}
        try:
            connection.request(method, urlsplit(self.url).path + path, body, headers)
            held = connection.sock
            _limit(held, deadline)
            with connection.getresponse() as response:
                status, content = response.status, _content(response, held, deadline)
        except TimeoutError as error:
            raise UnreachableError(
                f"no answer within {self.timeout:g} s; raise reward.timeout if it needs more"
            ) from error
        except (RemoteDisconnected, OSError) as error:
            raise UnreachableError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
        except HTTPException as error:
            raise RefusedError("request", f"what answers there does not speak HTTP ({type(error).__name__})") from error
        finally:
            connection.close()
        if status == 200:
            return content
        raise _error(status, content)


def _connection(url: SplitResult, timeout: float) -> HTTPConnection:
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    return kind(cast(str, url.hostname), url.port, timeout=timeout)


def _limit(held: socket.socket, deadline: float) -> None:
    """Let the next operation take what is left of the time, so that many slow ones cannot exceed it together."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    held.settimeout(left)


def _content(response: HTTPResponse, held: socket.socket, deadline: float) -> bytes:
    """All of an answer, in pieces."""
    content = bytearray()
    while piece := response.read1(1 << 16):
        content += piece
        if len(content) > LARGEST_ANSWER:
            raise RefusedError("request", f"the answer has more than {LARGEST_ANSWER} bytes: that is no list of scores")
        _limit(held, deadline)
    if response.length:
        raise ConnectionError("the connection ended in the middle of an answer")
    return bytes(content)


def _error(status: int, content: bytes) -> Exception:
    """What an answer other than 200 means."""
    try:
        told: Mapping[str, Any] = json.loads(content)["error"]
        kind, message = str(told["kind"]), str(told["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        kind, message = "", f"answered HTTP {status} without a sentence of a reward server: mend reward.url"
    if status in AGAIN:
        return UnreachableError(message)
    return RefusedError("user" if kind == "user" else "reward" if kind == "reward" else "request", message[:2000])
