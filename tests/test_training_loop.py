"""The loop: metrics, files, resuming, refusals."""

import json
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from difftilt.errors import RewardError, UserError
from difftilt.models.protocol import RoleSpec, Trained
from difftilt.process.gaussian import as_gaussian
from difftilt.rewards.base import as_reward
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Samples
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.base import MethodBase
from difftilt.training.checkpoint import load_checkpoint, same_bits
from difftilt.training.experience import Experience
from difftilt.training.logs import read_rows
from difftilt.training.loop import train_task
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from training_runs import (
    METHODS,
    make_config,
    make_experience,
    make_loop,
    make_method,
    make_task,
    steady,
    train,
    without_pictures,
)


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Generator[None]:
    """One test looks at them."""
    with nullcontext() if request.function is test_a_run_writes_what_is_documented else without_pictures():
        yield


ALWAYS = {
    "iteration",
    "reward_mean",
    "reward_std",
    "reward/distance",
    "zero_std_fraction",
    "kl_reference",
    "diversity",
    "grad_norm",
    "nfe",
    "reward_calls",
    "gradient_passes",
    "auxiliary_calls",
    "time/rollout",
    "time/reward",
    "time/update",
    "samples_per_second",
}


def final_parts(directory: Path) -> dict[str, dict[str, Tensor]]:
    return load_checkpoint(directory / "checkpoints" / "latest")[0]


def assert_same_end(one: Path, other: Path) -> None:
    """Weights of all roles, optimiser, memory, and every row of metrics."""
    mine, theirs = final_parts(one), final_parts(other)
    assert mine.keys() == theirs.keys()
    for stem, group in mine.items():
        assert group.keys() == theirs[stem].keys()
        assert all(same_bits(tensor, theirs[stem][name]) for name, tensor in group.items())
    assert steady(read_rows(one / "metrics.jsonl")) == steady(read_rows(other / "metrics.jsonl"))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_writes_what_is_documented(name: str, tmp_path: Path) -> None:
    seen: list[int] = []
    task = make_task()
    method = make_method(name, task, ema=0)
    hook = [lambda row, verdicts: seen.append(row["iteration"])]
    result = train_task(task, method, make_config(evaluate_every=2), tmp_path / "run", laws=("ratio_one",), hooks=hook)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert seen == [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(row.keys() >= ALWAYS for row in rows)
    assert (rows[0].keys() >= {"ratio_mean", "ratio_std", "clip_fraction"}) == (name == "flow-grpo")
    assert [("heldout/reward" in row) for row in rows] == [False, True, True]
    assert rows[0]["reward_calls"] == 16
    assert rows[0]["nfe"] >= 16 * 4
    assert all(row["time/rollout"] >= 0 for row in rows)
    assert result.after == {key[8:]: rows[2][key] for key in rows[2] if key.startswith("heldout/")}
    assert result.before["kl_reference"] == 0
    assert result.after["kl_reference"] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"] == result.after
    assert summary["before"] == result.before
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "prompts.json",
        *(f"step_{step}.{suffix}" for step in (0, 2, 3) for suffix in ("png", "safetensors")),
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_2", "step_3"]


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"evaluate_every": 2}
    if name == "flow-grpo":
        more |= {"method_advantage": "history", "method_history": 16}
    train(name, tmp_path / "whole", iterations=4, **more)
    train(name, tmp_path / "parts", iterations=2, **more)
    # what a kill leaves behind the newest checkpoint
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2, "reward_mean": 9.9}) + '\n{"iterat')
    torch.rand(3)
    resumed = train(name, tmp_path / "parts", iterations=4, resume=True, **more)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert len(resumed.rows) == 4
    assert (tmp_path / "whole" / "before.json").read_text() == (tmp_path / "parts" / "before.json").read_text()


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = train("flow-grpo", tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    again = train("flow-grpo", tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert again.after == first.after
    assert again.before == first.before


def test_a_resumed_run_remembers_its_verdicts(tmp_path: Path) -> None:
    strict = make_config().monitors.model_copy(update={"grad_norm": 1e-9})
    whole = train("flow-grpo", tmp_path / "whole", iterations=4, monitors=strict)
    train("flow-grpo", tmp_path / "parts", iterations=2, monitors=strict)
    resumed = train("flow-grpo", tmp_path / "parts", iterations=4, resume=True, monitors=strict)
    assert [v.iteration for v in whole.verdicts if v.monitor == "grad_norm"] == [0, 1, 2, 3]
    assert resumed.verdicts == whole.verdicts


def test_after_a_damaged_checkpoint_is_removed_the_earlier_one_is_resumed(tmp_path: Path) -> None:
    train("flow-grpo", tmp_path / "whole", iterations=4)
    train("flow-grpo", tmp_path / "parts", iterations=4)
    newest = tmp_path / "parts" / "checkpoints" / "step_4"
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged.*remove"):
        train("flow-grpo", tmp_path / "parts", iterations=4, resume=True)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    train("flow-grpo", tmp_path / "parts", iterations=4, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a directory"):
        train("flow-grpo", None, resume=True)
    with pytest.raises(UserError, match="start again without --resume"):
        train("flow-grpo", tmp_path / "empty", resume=True)
    train("flow-grpo", tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already"):
        train("flow-grpo", tmp_path / "run")
    with pytest.raises(UserError, match="ask for at least 3"):
        train("flow-grpo", tmp_path / "run", resume=True, iterations=2)
    with pytest.raises(UserError, match="do not fit"):
        train("diffusion-nft", tmp_path / "run", resume=True)


class Failing:
    """Raises in the given call."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, samples: Samples) -> Tensor:
        self.left -= 1
        return samples.media[:, 0] * (torch.nan if self.left == 0 else 1.0)


def test_a_reward_that_fails_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    # calls: before, iterations 0, 1 and 2
    task = replace(make_task(), reward=as_reward(Failing(4), name="failing"))
    with pytest.raises(RewardError, match="failing"):
        train_task(task, make_method("flow-grpo", task), make_config(), tmp_path / "parts")
    whole = replace(make_task(), reward=as_reward(Failing(-1), name="failing"))
    train_task(whole, make_method("flow-grpo", whole), make_config(), tmp_path / "whole")
    mended = replace(make_task(), reward=as_reward(Failing(-1), name="failing"))
    train_task(mended, make_method("flow-grpo", mended), make_config(), tmp_path / "parts", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def running_task() -> Task:
    task = make_task()
    left = as_reward(lambda samples: samples.media[:, 0], name="left")
    reward = WeightedSum({"left": left, "distance": task.reward}, {"left": 1.0, "distance": 1.0}, "running")
    return replace(task, reward=reward)


def test_running_statistics_of_a_reward_move_once_per_iteration_and_are_resumed(tmp_path: Path) -> None:
    def run(directory: Path, iterations: int, resume: bool = False) -> WeightedSum:
        task = running_task()
        method = make_method("flow-grpo", task)
        config = make_config(iterations=iterations, evaluate_every=2)
        train_task(task, method, config, directory, resume=resume)
        assert isinstance(task.reward, WeightedSum)
        return task.reward

    assert run(tmp_path / "whole", 4).moments["left"].count == 4 * 16
    run(tmp_path / "parts", 2)
    run(tmp_path / "parts", 4, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


class TwoRoles(MethodBase):
    """A critic learns first, then ``current``; only even iterations train the critic."""

    def roles(self) -> dict[str, RoleSpec]:
        return {"critic": Trained("current", optimizer={"lr": 1e-3})}

    def collect(self, run: Run) -> Experience:
        return replace(make_experience(), group=torch.arange(12))

    def phases(self, run: Run) -> list[Phase]:
        def loss_of(role: str) -> Any:
            def loss(rows: Experience, noise: NoiseSource) -> Loss:
                assert rows.edges.x_t is not None
                prediction = as_gaussian(run.denoiser(role)(rows.edges.x_t, rows.edges.t, rows.condition))
                return Loss({"size": Term(prediction.velocity.square().sum(1))})

            return loss

        even = Phase("critic", loss_of("critic"), when=lambda iteration: iteration % 2 == 0)
        return [even, Phase("current", loss_of("current"))]


def test_every_role_has_its_numbers_and_its_optimiser_and_is_resumed(tmp_path: Path) -> None:
    def run(directory: Path, iterations: int, resume: bool = False) -> None:
        config = make_config(iterations=iterations, evaluate_every=2)
        train_task(make_task(), TwoRoles(), config, directory, resume=resume)

    run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    run(tmp_path / "parts", 4, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [("grad_norm/critic" in row) for row in rows] == [True, False, True, False]
    assert all("grad_norm" in row for row in rows)
    assert "zero_std_fraction" not in rows[0]  # groups of one sample have no variance to lose
    assert final_parts(tmp_path / "whole")["optimizer_critic"]["0/step"] == 2


def test_settings_of_a_role_are_checked(tmp_path: Path) -> None:
    class Wrong(TwoRoles):
        def roles(self) -> dict[str, RoleSpec]:
            return {"critic": Trained("current", optimizer={"learning_rate": 1e-3})}

    with pytest.raises(ValueError, match="learning_rate"):
        make_loop(Wrong(), make_task())


def test_a_network_with_nothing_to_train_is_refused() -> None:
    task = make_task()
    assert isinstance(task.model.network, torch.nn.Module)
    task.model.network.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        make_loop(TwoRoles(), task)


def test_prompts_come_in_shuffled_passes_and_only_from_the_training_set() -> None:
    task = make_task()
    loop = make_loop(make_method("flow-grpo", task), task)
    drawn: list[int] = []
    for iteration in range(6):
        loop.run.begin(iteration)
        batch = loop.run.prompts(2, 3)
        assert batch.index.tolist() == list(range(6))
        assert batch.group.tolist() == [0, 0, 0, 1, 1, 1]
        assert batch.condition.tolist() == batch.prompt.tolist()
        drawn += batch.prompt[::3].tolist()
    assert [sorted(drawn[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 12, 3)}) > 1


@pytest.mark.parametrize("name", ["flow-grpo", "branch-grpo", "diffusion-nft", "crd", "prdp"])
def test_an_iteration_decodes_its_samples_once_and_lets_them_go(name: str) -> None:
    """An image decoder costs about as much as a step of the network, and pictures are larger than latents."""
    task = make_task()
    rows: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        rows.append(len(latents))
        return task.model.decode(latents)

    counted = replace(task, model=replace(task.model, decode=decode))
    loop = make_loop(make_method(name, counted), counted, iterations=2)
    with patch.object(loop.updater, "run_phase", wraps=loop.updater.run_phase) as learned:
        loop.iterate(0)
    assert rows == [16]
    assert loop.rows[0]["diversity"] > 0
    assert all(call.args[1].media is None for call in learned.call_args_list)


def test_what_is_measured_of_samples_is_no_part_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick(*given: object, by: float = 1.0) -> float:
        clock[0] += by
        return clock[0]

    monkeypatch.setattr("difftilt.training.loop.time.perf_counter", tick)
    monkeypatch.setattr("difftilt.training.loop.diversity_of", partial(tick, by=1e6))
    task = make_task()
    loop = make_loop(make_method("diffusion-nft", task), task)
    loop.iterate(0)
    assert loop.rows[-1]["diversity"] >= 1e6
    assert loop.rows[-1]["time/update"] < 100
    assert loop.rows[-1]["samples_per_second"] > 16 / 100
