"""The benchmarks run, and what they write holds what the documentation promises."""

import importlib
import json
from pathlib import Path

import pytest

NAMES = ("rollout", "update_flow_grpo", "update_diffusion_nft", "fk_steering", "noise")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


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
    assert [results[name]["bound"] for name in NAMES] == [1.05, 1.10, 1.10, 1.10, None]
    assert results["rollout"]["seconds"].keys() >= {"rollout"}
    for name in NAMES[1:3]:
        assert results[name]["seconds"].keys() >= {"rollout", "reward", "update"}
    assert results["fk_steering"]["seconds"].keys() >= {"rollout", "reward"}


def test_the_floor_of_an_update_is_what_its_ledger_counts(tmp_path: Path) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    names = list(NAMES[1:3])
    assert main([*names, "--size", "tiny", "--repeats", "1", "--output", str(tmp_path)]) == 0
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(names)
    for name in names:
        extra = json.loads((tmp_path / f"{name}.json").read_text())["extra"]
        # one pass with gradient and one of the reference for each row; behaviour = current costs none of its own
        assert extra == {"nfe": extra["rows"], "gradient_passes": extra["rows"], "rows": 16}


def test_the_median_of_pairs_does_not_see_a_disturbed_pair() -> None:
    paired = importlib.import_module("benchmarks.paired")
    assert paired.quartiles([1.0, 1.1, 1.2, 1.3, 9.0]) == (1.1, 1.2, 1.3)


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.__main__").main
    with pytest.raises(SystemExit) as refusal:
        main(["rolout"])
    assert refusal.value.code == 2
    assert "rollout" in capsys.readouterr().err
