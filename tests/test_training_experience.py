"""Experience: whatever is gathered, cut or joined, pointers still name the same samples and edges."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.experience import Experience, join_experience
from difftilt.training.loop import train_task
from difftilt.training.protocol import Loss, Phase, Term
from difftilt.training.update import Updater
from difftilt.trees import Pooled, fetched, leaves, resting, take
from training_runs import (
    CASES,
    METHODS,
    make_case,
    make_config,
    make_experience,
    make_loop,
    make_method,
    make_task,
    without_pictures,
)


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


def wide(steps: int, size: int) -> Experience:
    """Six samples with ``size`` numbers in everything that can be large, and ``steps`` edges each."""
    generator = torch.Generator().manual_seed(3)

    def numbers() -> Tensor:
        return torch.randn(6, size, generator=generator)

    large = {"condition": {"text": numbers()}, "x_0": numbers(), "media": numbers(), "extras": {"image": numbers()}}
    return replace(paired(6, steps), **large)


def storages(trees: Iterable[Any]) -> dict[int, int]:
    """Address and bytes of everything that the trees keep; of pools their stores and places, not their rows."""
    tensors = list[Tensor]()
    for tree in trees:
        parts = tree.values() if isinstance(tree, dict) else [tree]
        for part in parts:
            tensors += [part.store, part.place] if isinstance(part, Pooled) else leaves(part)
    return {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in tensors}


def own_bytes(record: Experience, of: Experience) -> int:
    """Bytes of the fields per sample that ``record`` keeps beside what ``of`` keeps anyway."""
    kept, known = ({**vars(one), "edges": None}.values() for one in (record, of))
    return sum(size for address, size in storages(kept).items() if address not in storages(known))


def test_the_rows_of_an_update_hold_no_copy_of_what_is_large() -> None:
    added: dict[tuple[int, int], int] = {}
    for steps in (1, 10):
        for size in (2, 1000):
            experience = wide(steps, size)
            rows = experience.rows(torch.arange(6 * steps), share=True)
            added[steps, size] = own_bytes(rows, experience)
            copied = experience.rows(torch.arange(6 * steps))
            # four fields of float32; this is what would be added
            assert own_bytes(copied, experience) >= 6 * steps * 4 * 4 * size
    # what a row adds does not depend on how large its sample is, and is a few columns and pointers of eight bytes
    assert added[1, 2] == added[1, 1000]
    assert added[10, 2] == added[10, 1000] <= 60 * 8 * 16


def test_shared_rows_are_read_gathered_and_taken_again_like_copied_ones() -> None:
    experience = wide(3, 5)
    order = torch.tensor([11, 0, 7, 3, 17, 4])
    copied, shared = experience.rows(order), experience.rows(order, share=True)
    some = torch.tensor([4, 1, 2])
    for one, other in (
        (copied, shared),
        (copied.rows(some), shared.rows(some)),
        (copied.take(some), shared.take(some)),
    ):
        assert one.x_0 is not None
        assert other.x_0 is not None
        assert torch.equal(one.x_0, other.x_0)
        assert [torch.equal(*both) for both in zip(leaves(vars(one)), leaves(vars(other)), strict=True)].count(
            False
        ) == 0
    assert isinstance(vars(shared.changed(weight=None))["x_0"], Pooled)
    assert not isinstance(vars(shared.rows(some))["x_0"], Pooled)
    joined = join_experience([shared, shared])
    assert joined.x_0 is not None
    assert copied.x_0 is not None
    assert torch.equal(joined.x_0, torch.cat([copied.x_0, copied.x_0]))


def test_an_update_gathers_one_microbatch_at_a_time() -> None:
    task = make_task()
    loop = make_loop(make_case("diffusion-nft", task), task, forward_batch=4)
    alive, most = list[weakref.ref[Tensor]](), list[int]()

    def before(rows: Experience) -> Experience:
        assert isinstance(vars(rows)["x_0"], Pooled)
        return rows

    def loss(rows: Experience, noise: NoiseSource) -> Loss:
        assert rows.x_0 is not None
        alive.append(weakref.ref(rows.x_0))
        most.append(sum(one() is not None for one in alive))
        weight = next(iter(loop.run.roles.parameters("current")))
        return Loss({"any": Term(rows.x_0.sum(1) * weight.sum())})

    loop.updater.run_phase(Phase("current", loss, before=before), wide(6, 2), loop.run.noise)
    assert len(most) == 9
    # the next one is gathered while the last one is still held
    assert max(most) <= 2


@pytest.mark.parametrize("case", ["flow-grpo", "diffusion-nft", "crd", "gdro", "prdp", "dragon"])
def test_sharing_changes_no_bit_of_what_is_learned(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, found = Experience.rows, dict[bool, list[Tensor]]()
    for share in (True, False):
        if not share:
            monkeypatch.setattr(Experience, "rows", lambda self, edge, share=False: rows(self, edge))
        task = make_task()
        loop = make_loop(make_case(case, task), task, optimizer={"lr": 1e-2})
        loop.iterate(0)
        loop.iterate(1)
        found[share] = [parameter.detach() for parameter in loop.run.roles.parameters("current")]
    assert all(torch.equal(*both) for both in zip(found[True], found[False], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_rows_that_rest_elsewhere_are_the_rows(dtype: torch.dtype) -> None:
    store = (10 * torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    place = torch.tensor([6, 0, 0, 3])
    assert torch.equal(fetched(store, place), store[place])
    assert fetched(store, place[:0]).shape == (0, 2, 3)


def test_what_rests_is_what_is_large_and_each_store_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []

    def move(store: Tensor, device: torch.device) -> Tensor:
        moved.append(store)
        return store.clone().to(device)

    monkeypatch.setattr("difftilt.trees._moved", move)
    states = torch.randn(5, 3)
    tree: dict[str, Any] = {"start": Pooled(states, torch.tensor([0, 1])), "end": Pooled(states, torch.tensor([1, 4]))}
    tree |= {"text": {"rows": torch.randn(2, 8)}, "number": torch.arange(2), "name": "x"}
    rested = resting(tree)
    assert len(moved) == 2
    assert rested["start"].store is rested["end"].store is not states
    assert isinstance(rested["text"]["rows"], Pooled)
    assert isinstance(rested["number"], Tensor)
    assert torch.equal(rested["end"].rows, states[[1, 4]])


def test_experience_that_rests_reads_as_before() -> None:
    experience = paired()
    rested = experience.resting()
    assert isinstance(vars(rested)["x_0"], Pooled)
    some = torch.tensor([11, 0, 7, 3])
    for share in (False, True):
        for mine, theirs in zip(leaves(experience.rows(some)), leaves(rested.rows(some, share=share)), strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(vars(rested.take(some % 6))["x_0"].rows, experience.take(some % 6).x_0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in METHODS else [pytest.mark.long]) for case in CASES]
)
def test_a_run_whose_experience_rests_learns_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[dict[str, Tensor]] = []
    fetches: list[int] = []

    def rows(pool: Pooled) -> Tensor:
        fetches.append(len(pool.place))
        return fetched(pool.store, pool.place)  # as from another device

    def run_phase(updater: Updater, phase: Phase, experience: Experience, noise: Noise) -> dict[str, float]:
        assert isinstance(vars(experience)["x_0"], Pooled) == offloaded
        return learn(updater, phase, experience, noise)

    learn = Updater.run_phase
    monkeypatch.setattr(Updater, "run_phase", run_phase)
    for offloaded in (False, True):
        if offloaded:
            monkeypatch.setattr(Pooled, "rows", property(rows))
        task = make_task()
        config = make_config(iterations=2, offload_experience=offloaded)
        with without_pictures():
            ends.append(train_task(task, make_case(case, task), config).run.roles.state_dict())
    assert fetches
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def test_experience_still_rests_while_it_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Experience] = []
    whole = Updater.run_phase

    def watched(updater: Updater, phase: Phase, experience: Experience, noise: Noise) -> dict[str, float]:
        seen.append(experience)
        return whole(updater, phase, experience, noise)

    monkeypatch.setattr(Updater, "run_phase", watched)
    task = make_task()
    make_loop(make_method("diffusion-nft", task), task, offload_experience=True).iterate(0)
    for experience in seen:
        assert experience.media is None
        assert isinstance(vars(experience)["x_0"], Pooled)
    assert seen
