"""difftilt at the work of its peers: what makes the comparison one of equal work."""

import sys
from pathlib import Path

import torch
from benchmarks.peers.__main__ import OWN, started
from benchmarks.peers.pipeline import SIZES, save_pipeline
from benchmarks.peers.stock import sampling
from benchmarks.peers.work import Work, redness


def test_an_iteration_costs_the_passes_that_the_work_names_and_samples_are_the_stock_pipelines(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    weights = save_pipeline(SIZES["tiny"], folder)
    work = Work(str(folder), batch=4, steps=3)
    with started(Path(sys.executable), OWN, work) as worker:
        turn = worker.turn()
    # guidance takes two rows a sample; the last step is drawn and not learned from; drift costs a call, unguided
    assert tuple(turn.passes) == (2 * 4 * 3 + 8, 2 * 4 * 2)
    assert 0 < turn.network < turn.wall
    subject = sampling(work, "stock")
    difference = subject.extra["largest difference of a pixel"]
    assert isinstance(difference, float)
    assert difference < 1e-4
    assert subject.shapes["parameters"] == weights


def test_redness() -> None:
    images = torch.stack([torch.tensor([1.0, 0.0, 0.5])[:, None, None].expand(3, 2, 2), torch.ones(3, 2, 2)])
    torch.testing.assert_close(redness(images), torch.tensor([0.75, 0.0]))
