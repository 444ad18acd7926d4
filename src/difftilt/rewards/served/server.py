"""The server's end of HTTP: ``GET /health`` describes the reward, ``POST /score`` takes samples and returns scores.

Python's own server is enough: one reward answers one request after the other, so an event loop or worker processes
would only wait at the same lock, and there is no dependency to keep patched. Errors are JSON,
``{"error": {"kind", "message"}}``.
"""

import hmac
import ipaddress
import json
import signal
import sys
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Event, Thread
from types import FrameType
from urllib.parse import urlsplit

from difftilt.errors import UserError
from difftilt.rewards.served.service import RefusedError, Service
from difftilt.rewards.served.wire import CONTENT_TYPE

TOKEN_VARIABLE = "DIFFTILT_REWARD_TOKEN"
"""Environment variable that both ends read the token from."""
SHORTEST_TOKEN = 16
AT_ONCE = 8
"""Requests that are held in memory at once; further ones are told to come again."""
SLOWEST = 60.0
"""Seconds of silence after which a connection is closed."""


class RewardServer(ThreadingHTTPServer):
    """Serves a reward until :meth:`stop`; as a context manager in a thread of its own.

    Args:
        service: answers.
        host: address to listen at; any but the own machine's needs a token.
        port: 0 takes a free one, see :attr:`url`.
        token: clients must send it.

    Raises:
        UserError: for an address without a token, a token that is too short, or a port that is taken.
    """

    daemon_threads = False  # closing waits for the requests that are under way
    service: Service

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
            raise UserError(f"a token needs at least {SHORTEST_TOKEN} printable ASCII characters: make a longer one")
        if token is None and not is_loopback(host):
            raise UserError(
                f"--host {host} lets other machines in: give a token with --token or in {TOKEN_VARIABLE}, or stay with "
                "127.0.0.1"
            )
        self.service, self.token, self.host = service, token, host
        self.places = BoundedSemaphore(AT_ONCE)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot listen at {host}:{port} ({reason}): name another --host or --port") from error

    @property
    def url(self) -> str:
        """What a recipe names."""
        return f"http://{self.host}:{self.server_address[1]}"

    def __enter__(self) -> "RewardServer":
        self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="reward server")
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no further request, finish those that are under way, free the port."""
        self.shutdown()
        self.server_close()
        self._thread.join()


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve_until_stopped(server: RewardServer, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second one does not wait for requests that are under way.

    Args:
        server: not yet started.
        tell: called with a line when it answers, and when it begins to stop.
    """
    asked = Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, stop)
    with server:
        kind = "sets" if server.service.describe().set_valued else "samples"
        tell(f"reward {server.service.reward.name!r} scores {kind} at {server.url}")
        asked.wait()
        tell("stopping when the requests that are under way are answered")


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed after it."""

    server: RewardServer  # type: ignore[assignment]
    timeout = SLOWEST
    server_version, sys_version = "difftilt", ""

    def do_GET(self) -> None:
        """The description of the reward."""
        if self._admitted("/health"):
            self._send(HTTPStatus.OK, "application/json", self.server.service.describe().model_dump_json().encode())

    def do_POST(self) -> None:
        """Scores of samples."""
        if not self._admitted("/score"):
            return
        if not self.server.places.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "busy", f"{AT_ONCE} requests are waiting already: come again")
            return
        try:
            body = self._body()
            if body is not None:
                self._answer(body)
        finally:
            self.server.places.release()

    def _admitted(self, path: str) -> bool:
        """Whether the request may be looked at: path, token, and no page of a browser that was lured here."""
        token, given = self.server.token, self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            remedy = f"set {TOKEN_VARIABLE} to the token that the server was started with"
            self._refuse(HTTPStatus.UNAUTHORIZED, "token", f"the token is missing or wrong: {remedy}")
        elif token is None and not is_loopback(urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""):
            self._refuse(
                HTTPStatus.FORBIDDEN, "host", "a server without a token answers to its own machine's names only"
            )
        elif self.path != path:
            self._refuse(HTTPStatus.NOT_FOUND, "path", "there are GET /health and POST /score")
        else:
            return True
        return False

    def _body(self) -> bytes | None:
        """The request's bytes, or None after refusing them unread."""
        length = self.headers.get("Content-Length", "")
        limit = self.server.service.max_bytes
        if self.headers.get("Content-Type") != CONTENT_TYPE:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "request", f"the request must be of type {CONTENT_TYPE}")
        elif not (length.isascii() and length.isdecimal()) or len(length) > 18:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "request", "the request must say how long it is (Content-Length)")
        elif int(length) > limit:
            message = f"the request has {length} bytes, the limit is {limit}: lower reward.batch, or raise --max-bytes"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "size", message)
        else:
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                return body
            self._refuse(HTTPStatus.BAD_REQUEST, "request", "the request ended before its length")
        return None

    def _answer(self, body: bytes) -> None:
        try:
            scores = self.server.service.answer(body)
        except RefusedError as error:
            cause = error.__cause__.__cause__ if error.__cause__ is not None else None
            if cause is not None:  # where a reward raised is seen here, not at the client
                traceback.print_exception(cause, file=sys.stderr)
            status = HTTPStatus.BAD_REQUEST if error.kind == "request" else HTTPStatus.UNPROCESSABLE_ENTITY
            self._refuse(status, error.kind, str(error))
            return
        self._send(HTTPStatus.OK, CONTENT_TYPE, scores)

    def _refuse(self, status: HTTPStatus, kind: str, message: str) -> None:
        body = json.dumps({"error": {"kind": kind, "message": message}}).encode()
        self._send(status, "application/json", body)

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            sys.stderr.write("a client went away before its answer\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each request would bury what matters."""
