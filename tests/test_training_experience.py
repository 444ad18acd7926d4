"""Experience: whatever is gathered, cut or joined, pointers still name the same samples and edges."""

from dataclasses import replace

import torch
from torch import Tensor

from difftilt.training.experience import Experience, join_experience
from difftilt.trees import take
from training_runs import make_experience


def paired(samples: int = 6, steps: int = 2) -> Experience:
    """Sample 2k and 2k + 1 are a pair, the last has none."""
    experience = make_experience(samples, steps)
    partner = torch.arange(samples) ^ 1
    partner[-2:] = -1
    return replace(experience, pair=partner, extras={"mark": experience.index * 10})


def parents(experience: Experience) -> dict[int, int]:
    """Number of each edge -> number of its parent."""
    edges = experience.edges
    assert edges.parent is not None
    number = edges.extras["number"]
    return {
        int(own): -1 if parent < 0 else int(number[parent]) for own, parent in zip(number, edges.parent, strict=True)
    }


def owners(experience: Experience) -> dict[int, int]:
    """Number of each edge -> index of its sample."""
    edges = experience.edges
    return {int(n): int(experience.index[s]) for n, s in zip(edges.extras["number"], edges.sample, strict=True)}


def test_rows_line_every_field_up_with_its_edge() -> None:
    experience = paired()
    order = torch.tensor([11, 0, 7, 3])
    rows = experience.rows(order)
    assert rows.index.tolist() == [5, 0, 1, 3]
    assert rows.edges.sample.tolist() == [0, 1, 2, 3]
    assert rows.edges.step.tolist() == [1, 0, 1, 0]
    assert rows.extras["mark"].tolist() == [50, 0, 10, 30]
    assert rows.components["one"].tolist() == [5.0, 0.0, 1.0, 3.0]
    assert rows.x_0 is not None
    assert experience.x_0 is not None
    assert torch.equal(rows.x_0, experience.x_0[rows.index])


def partner_by_definition(rows: Experience, partner_of: Tensor) -> list[int]:
    found: list[int] = []
    for index, step in zip(rows.index.tolist(), rows.edges.step.tolist(), strict=True):
        wanted = int(partner_of[index])
        places = [
            place
            for place, (other, at) in enumerate(zip(rows.index.tolist(), rows.edges.step.tolist(), strict=True))
            if other == wanted and at == step
        ]
        found.append(places[0] if places else -1)
    return found


def test_pairs_point_to_the_partner_at_the_same_step_also_after_a_second_gathering() -> None:
    experience = paired(8, 3)
    assert experience.pair is not None
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        order = torch.randperm(24, generator=generator)[:17]
        rows = experience.rows(order)
        assert rows.pair is not None
        assert rows.pair.tolist() == partner_by_definition(rows, experience.pair)
        again = rows.rows(torch.randperm(17, generator=generator)[:11])
        assert again.pair is not None
        assert again.pair.tolist() == partner_by_definition(again, experience.pair)


def test_rows_of_no_edge_are_empty() -> None:
    rows = paired().rows(torch.zeros(0, dtype=torch.int64))
    assert len(rows.index) == 0
    assert rows.pair is not None
    assert len(rows.pair) == 0


def test_take_keeps_whole_samples_and_renumbers_pointers() -> None:
    experience = paired()
    kept = torch.tensor([4, 1, 0])
    part = experience.take(kept)
    assert part.index.tolist() == [4, 1, 0]
    assert part.pair is not None
    assert part.pair.tolist() == [-1, 2, 1]
    assert owners(part) == {number: owner for number, owner in owners(experience).items() if owner in (0, 1, 4)}
    everything = parents(experience)
    assert parents(part) == {number: everything[number] for number in owners(part)}


def test_take_cuts_pointers_to_what_is_left_out() -> None:
    experience = paired()
    edges = experience.edges
    assert edges.parent is not None
    # edge 8 (sample 2, step 1) hangs on the edge of another sample, as in a tree
    tree = replace(experience, edges=replace(edges, parent=edges.parent.clone().index_fill(0, torch.tensor([8]), 0)))
    part = tree.take(torch.tensor([2]))
    assert part.pair is not None
    assert part.pair.tolist() == [-1]
    assert parents(part) == {2: -1, 8: -1}


def test_join_undoes_take() -> None:
    experience = paired()
    parts = [experience.take(torch.tensor(rows)) for rows in ([0, 1], [2, 3], [4, 5])]
    joined = join_experience(parts)
    assert torch.equal(joined.index, experience.index)
    assert joined.pair is not None
    assert experience.pair is not None
    assert torch.equal(joined.pair, experience.pair)
    assert owners(joined) == owners(experience)
    assert parents(joined) == parents(experience)
    assert torch.equal(joined.extras["mark"], experience.extras["mark"])


def test_rows_of_a_taken_record_are_the_same_rows() -> None:
    experience = paired()
    part = experience.take(torch.tensor([3, 2]))
    rows, direct = part.rows(torch.tensor([2, 3])), experience.rows(torch.tensor([8, 9]))
    assert torch.equal(take(rows.edges.extras["number"], torch.tensor([0, 1])), direct.edges.extras["number"])
    assert rows.index.tolist() == direct.index.tolist() == [2, 3]
    assert rows.pair is not None
    assert rows.pair.tolist() == [1, 0]
