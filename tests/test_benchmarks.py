"""The benchmarks run, and what they write holds what the documentation promises."""

import importlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch

from difftilt.checks.trial import gradient
from difftilt.training.memory import Live

UPDATES = {
    "update_flow_grpo": (1, 1),
    "update_diffusion_nft": (1, 1),
    "update_crd": (3, 1),
    "update_gdro": (1, 1),
    "update_prdp": (2, 2),
    "update_dragon": (2, 1),
}
"""Name -> evaluations of a row without gradient and with: of the reference, twice where it is guided; of a lagging
copy, which diffusion-nft has none of while behaviour = current; and the first passes of prdp and dragon. prdp passes
twice."""
NAMES = (
    "rollout",
    "tree",
    "branch_saving",
    "completion",
    *UPDATES,
    "fk_steering",
    "find",
    "svdd",
    "dlbs",
    "ttsnap",
    "dts",
    "dts_frontier",
    "peptune",
    "noise",
    "sets_leave_one_out",
    "sets_swaps",
    "overlap",
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


@pytest.mark.long
def test_every_benchmark_writes_its_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    assert main(["--size", "tiny", "--repeats", "1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(results) == sorted(NAMES)
    for name, result in results.items():
        assert name in shown
        assert result["name"] == name
        assert result["repeats"] == 1
        assert result["ratio_median"] > 0
        # one ratio is its own median and quartiles
        assert result["ratio_spread"] == 0
        assert result["ratio_quartiles"] == [result["ratio_median"]] * 2
        assert result["seconds"]["program"] == pytest.approx(
            result["seconds"]["floor"] * result["ratio_median"], rel=1e-9
        )
        assert result["machine"].keys() >= {"threads", "torch", "cpu", "python"}
        assert result["peak_memory_mb"] > 0
        assert result["shapes"]
    assert [results[name]["bound"] for name in NAMES] == [
        *(1.05, 1.15, None, 1.15),
        *[1.10] * 12,
        *(None, 1.10, None, None, None),
    ]
    assert results["rollout"]["seconds"].keys() >= {"rollout"}
    for name in UPDATES:
        assert results[name]["seconds"].keys() >= {"rollout", "reward", "update"}
    assert results["fk_steering"]["seconds"].keys() >= {"rollout", "reward"}


@pytest.mark.parametrize("name", UPDATES)
def test_the_floor_of_an_update_is_what_its_ledger_counts(name: str) -> None:
    made, size = (importlib.import_module(f"benchmarks.{module}") for module in ("__main__", "workload"))
    subject = made.BENCHMARKS[name](size.SIZES["tiny"])
    plain, passes = UPDATES[name]
    assert dict(subject.extra) == {"nfe": 16 * plain, "gradient_passes": 16 * passes, "rows": 16}
    subject.run_floor()
    subject.run_program()  # compares what it has cost with the floor


def test_an_iteration_keeps_the_states_of_more_steps_and_no_more_activations() -> None:
    memory, workload = (importlib.import_module(f"benchmarks.{module}") for module in ("memory", "workload"))
    few, many = (memory.measure(workload.SIZES["tiny"], steps) for steps in (4, 16))
    latent, samples = 4 * 4 * 4 * 4, 8
    assert (few.states, many.states) == (4 * samples * latent, 16 * samples * latent)
    rows = samples * (16 - 4)
    # of every row pointers, rewards and log-probabilities, some 150 bytes: less than a latent, far less than a forward
    assert many.update - few.update < 200 * rows
    assert many.kept - few.kept < many.states - few.states + 100 * rows
    # while they are recorded the states are there twice: as the steps left them, and joined
    assert many.collect - few.collect < 2 * (many.states - few.states) + 100 * rows


def test_transformers_of_the_real_families_are_timed_beside_floor_and_stock_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    assert main(["gpu", "--size", "tiny", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["shapes"]["device"]
    assert [row["model"] for row in found["rows"]] == ["SD3.5 Medium", "FLUX.1"]
    shown = capsys.readouterr().out
    for row in found["rows"]:
        assert row["model"] in shown
        assert row["images_per_second"].keys() == {"plain", "difftilt", "stock"}
        assert row["seconds"].keys() == {"rollout", "reward", "update"}
        for group in ("images_per_second", "seconds", "peak", "teraflops"):
            assert all(value > 0 for value in row[group].values())


def test_what_is_alive_is_counted_while_it_is_alive() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with Live() as live:
        kept = torch.zeros(1000)
        view = kept[:10]
        assert (live.now, live.peak) == (4000, 4000)
        # what the graph needs of the product is its exponential, which is the result
        product = (weight * kept).exp()
        assert live.now == 8000
        squares = product.square()
        assert live.now == 12000
        del product
        # the graph of the squares holds it
        assert live.now == 12000
        del squares
        assert live.now == 4000
        assert live.peak == 12000
        del kept
        assert live.now == 4000
        del view
        assert live.now == 0


def test_the_median_of_pairs_does_not_see_a_disturbed_pair() -> None:
    paired = importlib.import_module("benchmarks.paired")
    assert paired.quartiles([1.0, 1.1, 1.2, 1.3, 9.0]) == (1.1, 1.2, 1.3)


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    with pytest.raises(SystemExit) as refusal:
        main(["rolout"])
    assert refusal.value.code == 2
    assert "rollout" in capsys.readouterr().err


def test_the_share_of_signal_is_that_of_gradients_whose_law_is_known() -> None:
    signal = importlib.import_module("benchmarks.signal")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 400, generator=generator)
    mean = torch.full((400,), 0.5)
    # |m|² = 100 and the noise has 400: a fifth is signal
    found = signal.share_of(mean + noise)
    assert found.share == pytest.approx(0.2, abs=4 * found.error)
    assert 0 < found.error < 0.01
    assert found.length == pytest.approx(500**0.5, rel=0.02)
    assert signal.share_of(noise).share == pytest.approx(0, abs=4 * signal.share_of(noise).error)
    assert signal.share_of(mean.expand(5, -1)).share == pytest.approx(1, rel=1e-5)
    # 36.9 degrees between the expectations, whatever the noise
    turned = torch.cat([mean[:200] * 1.4, mean[200:] * 0.2]) + torch.randn(200, 400, generator=generator)
    assert signal.cosine_of_means(mean + noise, turned) == pytest.approx(0.8, abs=0.05)


def test_signal_is_measured_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    assert main(["signal", "--size", "tiny", "--repeats", "3", "--output", str(tmp_path)]) == 0
    assert "diffusion-nft" in capsys.readouterr().out
    stored = json.loads((tmp_path / "signal.json").read_text())
    nft, grpo = stored["rows"]
    assert nft["like_nft"] is None
    assert grpo["steps"].keys() == {"0", "1"}
    # 8 samples, of 10 evaluations; their gradients at two steps, or at half of 10 times, where the old policy costs as
    # much again, except before the first step
    assert 8 * 10 + 8 * 5 < nft["evaluations"] <= 8 * 10 + 8 * 5 * 2
    assert grpo["evaluations"] == 8 * 10 + 8 * 2


def test_the_gradient_of_all_steps_is_the_one_that_training_takes() -> None:
    signal = importlib.import_module("benchmarks.signal")
    setting = signal.chosen("tiny")[1]
    drawn = signal.draw(setting, 1).whole[0].double()
    taken = gradient(setting.method, signal.task_of(setting), **setting.settings)
    assert float((drawn - taken).norm() / taken.norm()) < 1e-5


def test_noise_is_drawn_anew_from_a_step_on_and_only_what_steps_inject() -> None:
    attribution = importlib.import_module("benchmarks.attribution")
    plain = attribution.Redrawn(1, 2, "scope")
    late = attribution.Redrawn(1, 2, "scope", 3, 1)
    index = torch.arange(5)

    def equal(purpose: str, step: int | torch.Tensor) -> list[bool]:
        one, other = (noise.normal(index, (2,), purpose=purpose, step=step) for noise in (plain, late))
        return (one == other).all(1).tolist()

    assert equal("start", 7) == [True] * 5
    assert equal("step", 2) == equal("siblings", 2) == [True] * 5
    assert equal("step", 3) == equal("siblings", 4) == [False] * 5
    assert equal("step", torch.arange(5)) == [True, True, True, False, False]


def test_one_stochastic_step_owns_all_of_its_advantage_and_one_reward_is_shared_out() -> None:
    attribution = importlib.import_module("benchmarks.attribution")
    signal = importlib.import_module("benchmarks.signal")
    sizes = {"groups": 2, "group_size": 8, "kl_weight": 0.0, "share_start": True}
    one = signal.Setting("one", "mixtures", "flow-grpo", {**sizes, "window": {"width": 1, "low": 0, "high": 1}}, {})
    loop = attribution.loop_of("flow-grpo", attribution.task_of(one), forward_batch=16, **one.settings)
    moments, _ = attribution.moments_of(loop, 1)
    assert moments[0].through == pytest.approx(moments[0].variance, rel=1e-6)
    every = signal.Setting("all", "mixtures", "flow-grpo", sizes, {"steps": 4})
    row = attribution.measure(every, 2)
    total, error = sum(row.own[step].share for step in row.own), sum(row.own[step].error for step in row.own)
    assert total <= 1 + 3 * error
    assert len(row.own) == len(row.fit) == 3
    assert (row.evaluations, row.reward_calls) == (16 * 4, 16)


@pytest.mark.long
def test_the_replay_counts_both_ways_and_never_beats_its_record(tmp_path: Path) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    assert main(["ttsnap_replay", "--size", "tiny", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "ttsnap_replay.json").read_text())
    assert [replay["start"] for replay in stored["replays"]] == [-1, 0]
    honest, published = (replay["candidates"]["plain"] for replay in stored["replays"])
    # 61.8 and 51.9 TFLOPs a candidate
    assert honest == [6, 16, 25]
    assert published == [7, 19, 30]
    assert [row["step"] for row in stored["early"]["plain"]] == list(range(15))
    assert all(-1 <= row["tau"] <= 1 for kind in stored["early"].values() for row in kind)
    for replay in stored["replays"]:
        assert replay["candidates"]["best-of-n"] == [2, 5, 8]
        assert set(replay["increase"]) == {"plain", "noise-aware"}


@pytest.mark.long
def test_the_study_of_trade_offs_spends_no_more_calls_than_allowed(tmp_path: Path) -> None:
    pareto = importlib.import_module("benchmarks.pareto")
    rows = pareto.run("tiny", 1, tmp_path / "pareto.json")
    methods = ["peptune", "independent samples", "svdd, each objective alone", "svdd, their sum"]
    methods.append("svdd, their sum, all it scored")
    assert [(row.testbed, row.method) for row in rows] == [*product(("molecules", "peptides"), methods)]
    assert all(0 < row.reward_calls <= pareto.CALLS["tiny"] for row in rows)
    assert len(json.loads((tmp_path / "pareto.json").read_text())) == 10
    assert len(pareto.table(rows).rows) == 10


@pytest.mark.long
def test_the_study_of_nodes_grows_trees_of_the_size_it_names(tmp_path: Path) -> None:
    nodes = importlib.import_module("benchmarks.nodes")
    rows = nodes.run("tiny", tmp_path / "nodes.json")
    assert [(row.store, row.predictions) for row in rows] == list(nodes.SETTINGS)
    assert all(row.nodes >= nodes.NODES["tiny"] for row in rows)
    half, bare, full = (row.stores for row in rows)
    assert bare < half
    # blocks of rows are as many in both, and of half the bytes
    assert 2 * half == full
    assert len(json.loads((tmp_path / "nodes.json").read_text())) == 3
