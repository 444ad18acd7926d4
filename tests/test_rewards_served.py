"""Served rewards against a real server in a child process: equal scores, and every fault named."""

import http.client
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import difftilt
from command_line import CommandLine
from difftilt import api
from difftilt.card import Card
from difftilt.errors import RewardError, UserError
from difftilt.models.ledger import Ledger
from difftilt.recipes.parts import NoFields
from difftilt.rewards import Reward, Samples, WeightedSum, as_reward, evaluate
from difftilt.rewards.served import RemoteReward, wire
from difftilt.rewards.served.remote import Config
from difftilt.rewards.served.service import Description
from difftilt.training.needs import check_needs
from served_rewards import closeness, faulty, spread
from training_runs import make_task, without_pictures

TOKEN = "a token of enough letters"
HERE = Path(__file__).parent
LIMIT = 200_000


@dataclass(frozen=True)
class Child:
    process: "subprocess.Popen[str]"
    url: str


@contextmanager
def child(*arguments: str) -> Generator[Callable[[], Child]]:
    """``difftilt serve-reward`` in another process; the call waits until it answers."""
    command = [sys.executable, "-m", "difftilt", "serve-reward", "served_rewards:faulty", *arguments, "--port", "0"]
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{HERE}"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE, env=environment
    ) as process:
        found: list[Child] = []

        def ready() -> Child:
            assert process.stdout is not None
            if not found:
                line = process.stdout.readline().strip()
                assert line.startswith("reward 'faulty' scores samples at http://127.0.0.1:"), line
                found.append(Child(process, line.split()[-1]))
            return found[0]

        try:
            yield ready
        finally:
            process.kill()


@pytest.fixture(scope="module")
def children() -> Generator[tuple[Callable[[], Child], Callable[[], Child]]]:
    """One that lives, with a token and a limit, and one that dies at its seventh request; both start at once."""
    with child("--token", TOKEN, "--max-bytes", str(LIMIT)) as lasting, child("lives=6") as mortal:
        yield lasting, mortal


@pytest.fixture(scope="module")
def server(children: tuple[Callable[[], Child], Callable[[], Child]]) -> Child:
    return children[0]()


def connect(url: str, token: str | None = TOKEN, **changes: Any) -> RemoteReward:
    fields: dict[str, Any] = {"batch": 3, "retries": 1, "backoff": 0.01, "timeout": 20.0, **changes}
    return RemoteReward(Config(url=url, **fields), token)


def samples_of(prompt: str = "", rows: int = 8) -> Samples:
    generator = torch.Generator().manual_seed(rows)
    media = torch.rand(rows, 3, 4, 4, generator=generator)
    return Samples(media, [prompt] * rows, [prompt] * rows, torch.arange(rows) % 3)


def score(reward: Reward, samples: Samples) -> Tensor:
    return evaluate(reward, samples, Ledger()).total


def test_scores_are_those_of_the_reward_itself(server: Child) -> None:
    reward, samples = connect(server.url), samples_of()
    assert reward.name == "faulty"
    assert reward.capabilities.background
    assert not reward.capabilities.differentiable
    assert torch.equal(score(reward, samples), score(faulty(), samples))
    assert torch.equal(score(connect(server.url, batch=99), samples), score(faulty(), samples))
    # in a sum it stands beside others, with its own component
    total = evaluate(WeightedSum({"there": reward, "here": faulty()}, {"there": 1.0, "here": -1.0}), samples, Ledger())
    assert torch.equal(total.total, torch.zeros(8))


FAULTS = {
    "raise": r"samples 3 to 5|samples 0 to 2.*raised ValueError on samples 0 to 2: the judge is out",
    "nan": r"'faulty' is not finite for 3 of 8 scores: row 1 \(prompt 'nan'\) is nan",
    "inf": r"'faulty' is not finite for 3 of 8 scores: row 1 \(prompt 'inf'\) is inf",
    "shape": r"samples 0 to 2: .*returned shape \(3, 1\) for 3 samples; return one number per sample",
    "length": r"samples 0 to 2: .*returned shape \(2,\) for 3 samples; return one number per sample",
    "dtype": r"samples 0 to 2: .*raised TypeError .*scores must be real numbers, not list of <U4",
    "complex": r"samples 0 to 2: .*raised TypeError .*not complex ones",
    "none": r"samples 0 to 2: .*raised TypeError .*not NoneType",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_reward_is_named(server: Child, fault: str) -> None:
    with pytest.raises(RewardError, match=FAULTS[fault]) as raised:
        score(connect(server.url), samples_of(fault))
    if fault not in ("nan", "inf"):
        assert server.url in str(raised.value)


def test_what_a_reward_says_to_the_user_stays_a_word_to_the_user(server: Child) -> None:
    with pytest.raises(UserError, match="write prompts in English"):
        score(connect(server.url), samples_of("user"))


def test_a_reward_that_hangs_runs_out_of_time(server: Child) -> None:
    reward, began = connect(server.url, timeout=0.3), time.monotonic()
    with pytest.raises(
        RewardError, match=r"no answer for samples 0 to 2 in 2 attempts, the last: no answer within 0\.3 s"
    ):
        score(reward, samples_of("hang"))
    assert 0.6 < time.monotonic() - began < 5


def test_a_wrong_token_is_refused_before_any_work(server: Child) -> None:
    for token in ("another token of enough letters", "", None):
        with pytest.raises(UserError, match="token is missing or wrong: set DIFFTILT_REWARD_TOKEN"):
            connect(server.url, token)


def test_the_token_comes_from_the_environment(server: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", TOKEN)
    assert connect(server.url, None, token_variable="MINE").name == "faulty"


def test_requests_that_are_too_large_are_refused_on_both_sides(server: Child) -> None:
    large = replace(samples_of(), media=torch.zeros(8, 3, 128, 128))
    with pytest.raises(UserError, match=rf"3 samples are \d+ bytes, .* takes at most {LIMIT}: lower reward\.batch"):
        score(connect(server.url), large)
    assert torch.equal(score(connect(server.url, batch=1), large), torch.zeros(8))
    status, answer = ask(server.url, {"Content-Length": str(LIMIT + 1)}, b"")
    assert status == 413
    assert json.loads(answer)["error"]["kind"] == "size"


def ask(
    url: str, headers: dict[str, str], body: bytes, method: str = "POST", path: str = "/score"
) -> tuple[int, bytes]:
    """A request by hand."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    given = {"Content-Type": wire.CONTENT_TYPE, "Authorization": f"Bearer {TOKEN}", **headers}
    connection.putrequest(method, path, skip_host="Host" in given)
    for name, value in ({"Content-Length": str(len(body))} | given).items():
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def test_foreign_requests_get_a_sentence(server: Child) -> None:
    body = wire.pack_samples(samples_of(), condition=False)
    cases = {
        404: [ask(server.url, {}, body, path="/other"), ask(server.url, {}, body, "GET", "/")],
        411: [ask(server.url, {"Content-Length": "-5"}, b""), ask(server.url, {"Content-Length": "two"}, b"")],
        415: [ask(server.url, {"Content-Type": "text/plain"}, body)],
        401: [ask(server.url, {"Authorization": "Bearer é"}, body), ask(server.url, {"Authorization": TOKEN}, body)],
        400: [ask(server.url, {}, content) for content in (b"", b"{}", pickle.dumps([1.0]), body[: len(body) // 2])],
    }
    for status, answers in cases.items():
        for found, answer in answers:
            assert found == status
            assert json.loads(answer)["error"]["message"]
    assert score(connect(server.url), samples_of()).shape == (8,)  # it lives on


def test_a_server_that_is_gone_in_mid_run_leaves_a_checkpoint_to_go_on_from(
    children: tuple[Callable[[], Child], Callable[[], Child]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting, mortal = children
    monkeypatch.setenv("DIFFTILT_REWARD_TOKEN", TOKEN)

    def recipe(url: str) -> dict[str, Any]:
        return {
            "testbed": {"name": "mixtures", "classes": 4, "steps": 4, "hidden": 8},
            "reward": {"name": "remote", "url": url, "batch": 16, "retries": 1, "backoff": 0.01},
            "method": {"name": "diffusion-nft", "groups": 4, "group_size": 4},
            "training": {
                "iterations": 6,
                "forward_batch": 16,
                "evaluation_samples": 8,
                "evaluate_every": 0,
                "checkpoint_every": 1,
            },
        }

    with without_pictures():
        # one request evaluates before, each iteration makes one
        with pytest.raises(RewardError, match=r"no answer for samples 0 to 15 in 2 attempts, .*refused.* --resume"):
            difftilt.train(recipe(mortal().url), tmp_path / "run")
        assert mortal().process.wait(10) == 9
        assert (tmp_path / "run" / "checkpoints" / "step_5").is_dir()
        with pytest.raises(UserError, match=r"does not answer .*difftilt serve-reward"):
            difftilt.train(recipe(mortal().url), tmp_path / "run", resume=True)
        resumed = difftilt.train(recipe(lasting().url), tmp_path / "run", resume=True)
        whole = difftilt.train(recipe(lasting().url), tmp_path / "whole")
    assert resumed.after == whole.after
    assert resumed.before != resumed.after
    assert TOKEN not in (tmp_path / "run" / "config.yaml").read_text()


def test_nobody_there_is_said_before_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "testbed": {"name": "mixtures"},
        "reward": {"name": "remote", "url": "http://127.0.0.1:9"},
        "method": {"name": "flow-grpo"},
    }
    with pytest.raises(UserError, match=r"reward server http://127\.0\.0\.1:9 does not answer \(Connection refused\)"):
        difftilt.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for url in ("127.0.0.1:8000", "ftp://host", "http://", "http://me:secret@host", "http://host:port"):
        with pytest.raises(UserError, match=r"reward\.url"):
            difftilt.train(recipe | {"reward": {"name": "remote", "url": url}}, tmp_path / "run")


def test_sets_are_scored_whole_and_in_order_of_their_index() -> None:
    samples = replace(samples_of(rows=12), group=torch.tensor([7, 2, 2, 9, 7, 2, 9, 9, 7, 2, 2, 9]))
    with api.reward_server(spread()) as server:
        for batch in (1, 4, 5, 9, 99):
            reward = connect(server.url, None, batch=batch)
            assert reward.capabilities.set_valued
            assert torch.equal(score(reward, samples), score(spread(), samples))


def test_no_gradient_crosses_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with api.reward_server(as_reward(closeness)) as server:
        reward = connect(server.url, None)
        samples = samples_of()
        wanted = replace(samples, media=samples.media.requires_grad_())
        with pytest.raises(UserError, match="no gradient crosses to another process"):
            score(reward, wanted)
        with torch.no_grad():
            assert score(reward, wanted).shape == (8,)
        card = Card(name="leaf", entry="Leaf", paper="none", needs=("differentiable reward",))
        monkeypatch.setitem(sys.modules, "leaf", ModuleType("leaf"))
        monkeypatch.setattr(sys.modules["leaf"], "CARD", card, raising=False)
        leaf = type("Leaf", (), {"__module__": "leaf"})
        with pytest.raises(UserError, match="its reward is black-box, as every served one is"):
            check_needs(leaf, replace(make_task(), reward=reward), NoFields())


def test_all_that_a_reward_may_see_arrives() -> None:
    seen: list[Samples] = []

    def look(samples: Samples) -> Tensor:
        seen.append(samples)
        return closeness(samples)

    condition: dict[str, Any] = {"text": (torch.rand(8, 2, 3), None), "label": [torch.arange(8)], "name": "x"}
    sent = replace(
        samples_of("a \u2028 prompt"),
        media=torch.rand(8, 2).to(torch.bfloat16),
        condition=condition,
        metadata={"count": [*range(8)]},
    )
    with api.reward_server(as_reward(look)) as server:
        score(connect(server.url, None, condition=True), sent)
        score(connect(server.url, None), sent)
        with pytest.raises(UserError, match="a condition of object cannot be sent"):
            score(connect(server.url, None, condition=True), replace(sent, condition=object()))
        with pytest.raises(UserError, match="only numbers, text, lists and mappings"):
            score(connect(server.url, None), replace(sent, metadata={"what": [object()] * 8}))
    got = Samples.join(seen[:3])
    assert torch.equal(got.media, sent.media)
    assert got.media.dtype == torch.bfloat16
    assert torch.equal(got.condition["text"][0], condition["text"][0])
    assert torch.equal(got.condition["label"][0], torch.arange(8))
    assert got.condition["name"] == "x"
    assert (got.prompts, got.metadata) == (sent.prompts, sent.metadata)
    assert seen[3].condition is None


def test_a_constant_reward_is_told_by_a_monitor(tmp_path: Path) -> None:
    with api.reward_server(as_reward(lambda samples: torch.ones(len(samples.group)), "same")) as server:
        recipe = {
            "testbed": {"name": "mixtures", "classes": 4, "steps": 4, "hidden": 8},
            "reward": {"name": "remote", "url": server.url},
            "method": {"name": "diffusion-nft", "groups": 4, "group_size": 4, "kl_weight": 0.1},
            "training": {"iterations": 1, "forward_batch": 16, "evaluation_samples": 8},
        }
        with without_pictures():
            done = difftilt.train(recipe, tmp_path / "run")
    assert "zero_std_fraction" in {verdict.monitor for verdict in done.verdicts}


class Exploit:
    """Would leave a file behind if anything unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def entry(content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose scores are ``content``, and a header that is right."""
    good = wire.pack_scores(torch.zeros(3))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        target.writestr("header.npy", source.read("header.npy"))
        target.writestr("scores.npy", content)
    return buffer.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def lying() -> bytes:
    """Says that it holds 8 TB."""
    return npy(np.zeros(3, np.float32)).replace(b"(3,), }               ", b"(2000000000000,), }   ")


@contextmanager
def stranger(answer: Callable[[int], tuple[int, bytes]]) -> Generator[str]:
    """A server that describes itself as one of rewards and answers whatever it likes to request 0, 1, ..."""
    asked: list[int] = []

    class Strange(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ours = self.path == "/health"
            self.reply(200, Description(name="strange").model_dump_json().encode() if ours else b'{"status": "ok"}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(0)
            self.reply(*answer(len(asked) - 1))

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (10 if body.endswith(b"cut") else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as strange:
        thread = Thread(target=strange.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{strange.server_address[1]}"
        strange.shutdown()
        thread.join()


GARBAGE: dict[str, tuple[int, Callable[[Path], bytes], str]] = {
    "text": (200, lambda path: b"<html>welcome</html>", "no archive of scores: it cannot be read"),
    "nothing": (200, lambda path: b"", "no archive of scores"),
    "pickle": (200, lambda path: pickle.dumps(Exploit(path)), "no archive of scores: it cannot be read"),
    "pickled array": (
        200,
        lambda path: entry(npy(np.array([Exploit(path)], dtype=object))),
        "holds object, not numbers",
    ),
    "compressed": (200, lambda path: entry(npy(np.zeros(3, np.float32)), zipfile.ZIP_DEFLATED), "are compressed"),
    "lying": (200, lambda path: entry(lying()), "another length than its shape says"),
    "doubles": (200, lambda path: entry(npy(np.zeros(3))), "no float32 scores"),
    "table": (200, lambda path: entry(npy(np.zeros((3, 1), np.float32))), "no float32 scores"),
    "too few": (200, lambda path: wire.pack_scores(torch.zeros(2)), "answered samples 0 to 2 with 2 scores, not 3"),
    "page": (500, lambda path: b"<html>oops</html>", "answered HTTP 500 without a sentence of a reward server"),
    "cut": (200, lambda path: b"half of an answer, cut", "the connection ended in the middle of an answer"),
    "busy": (503, lambda path: b"{}", "in 2 attempts, the last: answered HTTP 503"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_named_and_nothing_is_unpickled(what: str, tmp_path: Path) -> None:
    status, make, message = GARBAGE[what]
    body = make(tmp_path / "exploited")
    with stranger(lambda request: (status, body)) as url, pytest.raises(RewardError, match=message) as raised:
        score(connect(url), samples_of())
    assert url in str(raised.value)
    assert not (tmp_path / "exploited").exists()


def test_what_passes_is_asked_again_a_bounded_number_of_times() -> None:
    good = wire.pack_scores(torch.zeros(8))
    made: list[int] = []

    def answer(request: int) -> tuple[int, bytes]:
        made.append(request)
        return (503, b"{}") if request < 3 else (200, good)

    with stranger(answer) as url:
        assert torch.equal(score(connect(url, batch=8, retries=3), samples_of()), torch.zeros(8))
        assert len(made) == 4
        made.clear()
    with stranger(lambda request: (made.append(request) or 503, b"{}")) as url:
        with pytest.raises(RewardError, match="in 3 attempts"):
            score(connect(url, batch=8, retries=2), samples_of())
        assert len(made) == 3
        made.clear()
    with stranger(lambda request: (made.append(request) or 422, b"{}")) as url:
        with pytest.raises(RewardError, match="HTTP 422"):
            score(connect(url, batch=8, retries=2), samples_of())
        assert len(made) == 1  # what failed once fails again


def test_waits_double_and_differ_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with stranger(lambda request: (503, b"{}")) as url:
        waits: list[list[float]] = []
        for rank in range(20):
            monkeypatch.setenv("RANK", str(rank))
            reward = connect(url, backoff=0.5)
            waits.append([reward.wait(attempt) for attempt in range(8)])
            assert waits[-1] == [reward.wait(attempt) for attempt in range(8)]
    for attempt in range(8):
        base = min(0.5 * 2**attempt, 30)
        column = [row[attempt] for row in waits]
        assert all(0.5 * base < wait < 1.5 * base for wait in column)
        assert len(set(column)) == 20


def test_a_server_of_something_else_is_no_reward_server() -> None:
    with stranger(lambda request: (200, b"")) as url, pytest.raises(UserError, match="is no reward server"):
        connect(f"{url}/elsewhere")


def test_requests_under_way_are_answered_before_it_stops() -> None:
    def slow(samples: Samples) -> Tensor:
        time.sleep(0.4)
        return closeness(samples)

    found: list[Tensor] = []
    with api.reward_server(as_reward(slow)) as server:
        reward = connect(server.url, None, batch=8)
        asking = Thread(target=lambda: found.append(score(reward, samples_of())))
        asking.start()
        time.sleep(0.2)
    asking.join()
    assert torch.equal(found[0], closeness(samples_of()))
    with pytest.raises(RewardError, match="refused"):
        score(reward, samples_of())


def test_a_page_of_a_browser_cannot_reach_a_server_without_a_token() -> None:
    with api.reward_server(as_reward(closeness)) as server:
        assert ask(server.url, {"Host": "evil.example"}, b"")[0] == 403
        assert ask(server.url, {"Host": "localhost:80"}, b"")[0] == 400


def test_a_terminated_server_ends_well(children: tuple[Callable[[], Child], Callable[[], Child]]) -> None:
    """The last test that uses it."""
    server = children[0]()
    with pytest.raises(RewardError):
        score(connect(server.url), samples_of("raise"))
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 0
    assert "stopping" in out
    assert "the judge is out" in err  # where a reward raised is seen at the server


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.delenv("DIFFTILT_REWARD_TOKEN", raising=False)
    return CommandLine(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("served_rewards:faulty", "--host", "0.0.0.0"), "lets other machines in: give a token"),
        (("served_rewards:faulty", "--token", "short"), "at least 16 printable ASCII characters"),
        (("served_rewards:faulty", "lifes=3"), "did you mean lives?"),
        (("served_rewards:nobody",), "no class or function 'nobody'"),
        (("served_rewards:pooled",), "scores all samples as one set, which no single request holds"),
        (("served_rewards:of_a_task",), "is made from a task, which a server has none of"),
        (("symmetri",), "there is no reward 'symmetri'"),
        (("served_rewards:faulty", "--host", "192.0.2.1", "--token", TOKEN), "cannot listen at 192.0.2.1:8000"),
    ],
)
def test_what_cannot_be_served_is_said(command: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    ran = command("serve-reward", *arguments)
    assert ran.code == 2
    assert message in ran.err


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_of_any_origin_are_samples_or_an_error(data: st.DataObject) -> None:
    body = bytearray(wire.pack_samples(replace(samples_of(rows=2), condition={"a": torch.zeros(2)}), condition=True))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for content in (bytes(body), bytes(body[:cut]), bytes(body[cut:])):
        with suppress(wire.WireError):
            assert len(wire.unpack_samples(content).group) > 0
