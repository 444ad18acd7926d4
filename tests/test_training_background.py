"""Scoring beside sampling: the same samples, scores and gradients bit for bit, errors with their rows, prompt stops."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from threading import Event, get_ident

import pytest
import torch
from torch import Tensor

from difftilt.errors import GuardError, RewardError
from difftilt.rewards import Capabilities, FunctionReward, Reward, Samples, WeightedSum, as_reward
from difftilt.rewards.scoring import splits
from difftilt.sampling.recording import join_trajectories
from difftilt.training.background import Worker, in_parts
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.loop import Loop
from difftilt.training.protocol import Task
from difftilt.trees import take
from training_runs import CASES, gradient, make_config, make_loop, make_method, make_task

BACKGROUND = Capabilities(background=True)


def norm(samples: Samples) -> Tensor:
    return -samples.media.flatten(1).square().sum(1)


def first(samples: Samples) -> Tensor:
    return samples.media.flatten(1)[:, 0]


def rewards(capabilities: Capabilities) -> dict[str, Reward]:
    one, other = FunctionReward("norm", norm, capabilities), FunctionReward("first", first, capabilities)
    weights = {"norm": 0.3, "first": 2.0}
    return {
        "plain": one,
        "batch": WeightedSum({"norm": one, "first": other}, weights, "batch"),
        "group": WeightedSum({"norm": one, "first": other}, weights, "group"),
    }


OVERLAPPING = ("flow-grpo", "diffusion-nft", "crd", "prdp", "gardo", "gardo-nft", "b2-diffurl", "gdro")


def task_with(reward: Reward) -> Task:
    return replace(make_task(), reward=reward)


def loop_of(name: str, reward: Reward) -> Loop:
    task = task_with(reward)
    method, settings = CASES[name]
    settings = {key: value for key, value in settings.items() if key != "auxiliary"}
    # 8 groups of 16 are 4 parts of 32 rows, each one full network call
    sized = {"groups": 8, "group_size": 16, **settings, **({"auxiliary": ("on_mode",)} if "gardo" in name else {})}
    return make_loop(make_method(method, task, **sized), task, forward_batch=32)


def collected(loop: Loop) -> Experience:
    with torch.no_grad():
        return loop.method.collect(loop.run)


@torch.no_grad()
def parts_of(loop: Loop) -> int:
    return len(loop.run.parts(loop.run.prompts(8, 16)))


def updated(loop: Loop, experience: Experience) -> Tensor:
    for place, phase in enumerate(loop.method.phases(loop.run)):
        loop.updater.run_phase(phase, experience, loop.run.noise.named(f"phase{place}"))
    return gradient(loop)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_samples_rewards_credit_and_gradients_are_those_of_one_batch(name: str) -> None:
    at_once, beside = (loop_of(name, rewards(can)["plain"]) for can in (Capabilities(), BACKGROUND))
    assert parts_of(beside) == 4
    one, other = collected(at_once), collected(beside)
    assert one.x_0 is not None
    assert other.x_0 is not None
    assert one.rewards is not None
    assert other.rewards is not None
    pairs = [(one.x_0, other.x_0), (one.rewards, other.rewards), (one.edges.sample, other.edges.sample)]
    pairs += [(one.edges.step, other.edges.step), (one.edges.t, other.edges.t)]
    for mine, theirs in ((one.edges.x_t, other.edges.x_t), (one.edges.log_prob, other.edges.log_prob)):
        assert (mine is None) == (theirs is None)
        pairs += [] if mine is None or theirs is None else [(mine, theirs)]
    pairs += [] if one.edges.parent is None or other.edges.parent is None else [(one.edges.parent, other.edges.parent)]
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert at_once.run.ledger == beside.run.ledger
    assert at_once.run.hidden_seconds == 0
    mine, theirs = updated(at_once, one), updated(beside, other)
    assert mine.abs().max() > 0
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_sums_are_standardised_over_all_parts(kind: str) -> None:
    one, other = (collected(loop_of("diffusion-nft", rewards(can)[kind])) for can in (Capabilities(), BACKGROUND))
    assert one.rewards is not None
    assert other.rewards is not None
    assert torch.equal(one.rewards, other.rewards)
    assert all(torch.equal(one.components[name], other.components[name]) for name in ("norm", "first"))
    # the ablation: a part has other statistics than the whole
    if kind == "batch":
        total = rewards(Capabilities())[kind]
        assert isinstance(total, WeightedSum)
        part = {name: values[:32] for name, values in one.components.items()}
        assert (total.combine(part, one.group[:32]) - one.rewards[:32]).abs().max() > 1e-3


def test_rewards_that_need_all_samples_are_not_split() -> None:
    inner = WeightedSum({"norm": rewards(BACKGROUND)["plain"]}, {"norm": 1.0}, "batch")
    outer = WeightedSum({"inner": inner}, {"inner": 1.0})
    assert splits(inner)
    assert not splits(outer)
    assert not splits(FunctionReward("set", norm, Capabilities(set_valued=True, pooled=True)))
    loop = loop_of("diffusion-nft", outer)
    assert outer.capabilities.background
    assert parts_of(loop) == 1


def test_a_loss_with_gradient_scores_in_its_own_thread() -> None:
    threads: list[int] = []

    def noted(samples: Samples) -> Tensor:
        threads.append(get_ident())
        return norm(samples)

    loop = loop_of("diffusion-nft", FunctionReward("noted", noted, BACKGROUND))
    batch = loop.run.prompts(8, 16)
    samples = loop.run.samples(torch.zeros(128, 2, requires_grad=True), batch)
    _, scores = loop.run.score_parts([samples])
    assert threads == [get_ident()]
    assert scores.total.requires_grad
    collected(loop)
    assert len(set(threads)) == 2


def test_scoring_runs_while_the_next_part_is_drawn() -> None:
    """Each part waits until the next is being drawn, and each drawing until the part before is being scored."""
    loop = loop_of("diffusion-nft", FunctionReward("norm", norm, BACKGROUND))
    drawing, scoring = [Event() for _ in range(5)], [Event() for _ in range(4)]
    seen: list[int] = []

    def met(samples: Samples) -> Tensor:
        part = len(seen)
        seen.append(part)
        scoring[part].set()
        assert drawing[part + 1].wait(10)
        return norm(samples)

    loop.run.task = replace(loop.run.task, reward=FunctionReward("met", met, BACKGROUND))
    batch = loop.run.prompts(8, 16)

    def drawn() -> Generator[Samples]:
        for place, part in enumerate(loop.run.parts(batch)):
            drawing[place].set()
            if place:
                assert scoring[place - 1].wait(10)
            yield loop.run.samples(torch.zeros(len(part.index), 2), part)
        drawing[4].set()

    with torch.no_grad():
        loop.run.score_parts(drawn())
    assert seen == [0, 1, 2, 3]
    assert loop.run.hidden_seconds > 0


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_an_error_names_its_rows_and_stops_the_drawing(bad: int) -> None:
    parts: list[int] = []

    def fails(samples: Samples) -> Tensor:
        parts.append(len(parts))
        if parts[-1] == bad:
            raise ValueError("the judge is out")
        return norm(samples)

    loop = loop_of("diffusion-nft", FunctionReward("judge", fails, BACKGROUND))
    rows = f"samples {32 * bad} to {32 * bad + 31} of the batch"
    with pytest.raises(RewardError, match=f"{rows}: reward 'judge' raised ValueError .*the judge is out"):
        collected(loop)
    assert parts == list(range(bad + 1))  # nothing is scored behind it


def test_scores_that_are_not_finite_name_their_prompt() -> None:
    def sick(samples: Samples) -> Tensor:
        return norm(samples) / (samples.group != 5)

    loop = loop_of("diffusion-nft", FunctionReward("sick", sick, BACKGROUND))
    with pytest.raises(RewardError, match=r"samples 64 to 95 of the batch: reward 'sick' is not finite for 16 of 32"):
        collected(loop)


def test_samples_that_are_not_finite_are_never_scored() -> None:
    loop = loop_of("diffusion-nft", FunctionReward("norm", norm, BACKGROUND))
    batch = loop.run.prompts(8, 16)
    with torch.no_grad(), pytest.raises(GuardError, match="not finite"):
        loop.run.score_parts([loop.run.samples(torch.full((128, 2), torch.nan), batch)])


def test_parts_are_whole_groups_of_enough_rows() -> None:
    group = torch.tensor([0] * 3 + [1] * 3 + [2] * 10 + [3] * 2)
    batch = PromptBatch(torch.arange(18), group, group, None)
    for rows, lengths in ((1, [3, 3, 10, 2]), (4, [6, 10, 2]), (7, [16, 2]), (17, [18]), (99, [18])):
        parts = in_parts(batch, rows)
        assert [len(part.index) for part in parts] == lengths
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)


def test_a_worker_keeps_the_order_and_makes_no_call_after_a_failure() -> None:
    made: list[int] = []

    def call(number: int) -> Callable[[], int]:
        def work() -> int:
            made.append(number)
            time.sleep(0.01)
            if number == 3:
                raise KeyError(number)
            return number

        return work

    def submit_all() -> None:
        with Worker[int]() as worker:
            for number in range(1000):
                worker.submit(call(number))
                time.sleep(0.002)

    with pytest.raises(KeyError):
        submit_all()
    assert made == [0, 1, 2, 3]


STUCK = """
import time, torch
from difftilt.rewards import Samples
from difftilt.training.background import score_in_background
from difftilt.rewards import as_reward, Capabilities

def stuck(samples):
    print("scoring", flush=True)
    time.sleep(60)

part = Samples(torch.zeros(2, 2), ["a", "b"], ["a", "b"], torch.arange(2))
score_in_background(as_reward(stuck, "stuck", Capabilities(background=True)), iter([part]))
"""


@pytest.mark.long  # it imports everything anew
def test_ctrl_c_does_not_wait_for_a_reward_that_hangs(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "scoring\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 10
        assert process.returncode in (-signal.SIGINT, 130)
        assert "KeyboardInterrupt" in err
        assert "Fatal" not in err


def test_trajectories_of_parts_join_to_the_one_of_all() -> None:
    loop = loop_of("b2-diffurl", FunctionReward("norm", norm))
    loop.run.begin(1)
    method, batch = loop.method, loop.run.prompts(8, 16)
    roll = getattr(method, "roll")  # noqa: B009 - of this method only
    with torch.no_grad():
        whole = roll(loop.run, batch)
        parts = [roll(loop.run, take(batch, rows)) for rows in torch.arange(128).split(32)]
    joined = join_trajectories(parts)
    assert torch.equal(joined.x_0, whole.x_0)
    assert torch.equal(joined.root, whole.root)
    assert torch.equal(joined.last_edge, whole.last_edge)
    for field in ("sample", "step", "t", "s", "log_prob", "parent", "x_t", "x_s"):
        assert torch.equal(getattr(joined.edges, field), getattr(whole.edges, field)), field
    assert joined.ledger == whole.ledger


def test_an_evaluation_overlaps_too() -> None:
    numbers = [
        make_loop(make_method("diffusion-nft", task), task, forward_batch=32, evaluation_samples=128)
        .evaluate(0)
        .numbers
        for task in (task_with(rewards(can)["plain"]) for can in (Capabilities(), BACKGROUND))
    ]
    assert numbers[0] == numbers[1]


def test_what_is_hidden_is_a_metric() -> None:
    def slow(samples: Samples) -> Tensor:
        time.sleep(0.005)
        return norm(samples)

    loop = loop_of("diffusion-nft", as_reward(slow, "slow", BACKGROUND))
    loop.iterate(0)
    assert loop.rows[0]["hidden_reward_seconds"] > 0.004
    assert make_config().forward_batch == 16
